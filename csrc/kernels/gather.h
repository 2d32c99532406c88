// Selection of elements within planes (max pooling): out[k, plane, o] = t[k, plane, index[plane, o]], and its transpose.
// t is (K, planes, in), out (K, planes, out), index (planes, out); all contiguous.
#pragma once

#include <cstdint>

namespace flatcore {

template <class T>
void gather_planes(int64_t K, int64_t planes, int64_t in, int64_t out, const int64_t* index, const T* t, T* result);

// result[k, plane, index[plane, o]] += t[k, plane, o]; result is zeroed first.
template <class T>
void scatter_planes(int64_t K, int64_t planes, int64_t in, int64_t out, const int64_t* index, const T* t, T* result);

}  // namespace flatcore
