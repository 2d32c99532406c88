// Cross-entropy of rows against targets, for K directions at once.
// Row r of C logits z with target masses m_c >= 0 (one-hot, smoothed, weighted; all zero for an ignored row):
//   loss_r = sum_c m_c (logsumexp(z) - z_c) = M logsumexp(z) - <m, z>,   M = sum_c m_c,   p = softmax(z)
//   d loss_r / dz   = M p - m                                            =: g
//   d2 loss_r / dz2 = M (diag p - p p^T)
// Arrays are contiguous: z, p (rows, C); M, loss (rows); directions (K, rows, C) and (K, rows).
#pragma once

#include <cstdint>

namespace flatcore {

// The masses of all classes of each row, (rows, C).
template <class T>
struct ClassMasses {
    const T* mass;
};

// One class of each row and its mass, both (rows): M is `mass` itself.
template <class T>
struct OneClass {
    const int64_t* index;
    const T* mass;
};

// p may be z; total, which receives M, may be null.
template <class T, class Target>
void cross_entropy_forward(int64_t rows, int64_t C, const T* z, Target target, T* loss, T* p, T* total);

// tloss[k, r] = <g_r, tz[k, r]>
template <class T, class Target>
void cross_entropy_tangent(int64_t K, int64_t rows, int64_t C, Target target, const T* p, const T* total,
                           const T* tz, T* tloss);

// out[k, r] = tdloss[k, r] g_r + dloss[r] M_r (p tz - p <p, tz>).
// tdloss may be null (no first term); tz may be null (no second term) and may be out.
template <class T, class Target>
void cross_entropy_adjoint(int64_t K, int64_t rows, int64_t C, Target target, const T* p, const T* total,
                           const T* tdloss, const T* dloss, const T* tz, T* out);

#if defined(FLATCORE_WITH_CUDA) || defined(__CUDACC__) || defined(FLATCORE_CUDA_SHIM)
namespace cuda {
// The same three on a device; `stream` is a cudaStream_t.
template <class T, class Target>
void cross_entropy_forward(int64_t rows, int64_t C, const T* z, Target target, T* loss, T* p, T* total,
                           void* stream);
template <class T, class Target>
void cross_entropy_tangent(int64_t K, int64_t rows, int64_t C, Target target, const T* p, const T* total,
                           const T* tz, T* tloss, void* stream);
template <class T, class Target>
void cross_entropy_adjoint(int64_t K, int64_t rows, int64_t C, Target target, const T* p, const T* total,
                           const T* tdloss, const T* dloss, const T* tz, T* out, void* stream);
}  // namespace cuda
#endif

}  // namespace flatcore
