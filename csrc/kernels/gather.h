// Selection of pixels per image and channel (max pooling with known maxima), and its transpose.
// Channels are the fastest axis. index[n, o, c] is the input pixel that output pixel o of channel c reads,
// any one of them; no array overlaps another.
#pragma once

#include <cstdint>

namespace flatcore {

struct PixelShape {
    int64_t images, in, out, channels;  // images per direction, pixels in and out of each
};

// result[k, n, o, c] = t[k, n, index[n, o, c], c]
template <class T>
void gather_pixels(int64_t K, const PixelShape& shape, const int64_t* index, const T* t, T* result);

// result[k, n, index[n, o, c], c] += t[k, n, o, c], from zero, in the order of o.
template <class T>
void scatter_pixels(int64_t K, const PixelShape& shape, const int64_t* index, const T* t, T* result);

#if defined(FLATCORE_WITH_CUDA) || defined(__CUDACC__) || defined(FLATCORE_CUDA_SHIM)
namespace cuda {
// The same two on a device; `stream` is a cudaStream_t.
template <class T>
void gather_pixels(int64_t K, const PixelShape& shape, const int64_t* index, const T* t, T* result,
                   void* stream);
template <class T>
void scatter_pixels(int64_t K, const PixelShape& shape, const int64_t* index, const T* t, T* result,
                    void* stream);
}  // namespace cuda
#endif

}  // namespace flatcore
