// Row normalisation (layer norm, RMS norm; group and instance norm after a reshape) through the sweeps.
// Per row of C elements, mean(.) the average over the row, mu = mean(x) where `centred`, else 0:
//   r = (mean((x - mu)^2) + eps)^(-1/2),  xhat = (x - mu) r,  y = xhat w + b
//   txhat = r (tx - mean(tx) - xhat m),  m = mean(xhat tx);  ty = txhat w + xhat tw + tb
//   dx = r (a - mean(a) - xhat B),  a = dy w,  B = mean(a xhat)
//   tdx = r (ta - mean(ta) - xhat tB - txhat B) - r m dx,  ta = tdy w + dy tw,  tB = mean(ta xhat + a txhat)
//   tdw = sum over rows of (tdy xhat + dy txhat),  tdb = sum over rows of tdy
// with mean(tx), mean(a), mean(ta) left out where not centred.
// xhat is (rows, C), r (rows); directions (K, rows, C); w, b (C), their directions a stride apart. All
// contiguous.
#pragma once

#include <cstdint>

#include "row_pieces.h"

namespace flatcore {

struct NormShape {
    int64_t rows, C;
    bool centred;
};

template <class T>
void normalise_forward(const NormShape& shape, double eps, const T* x, const T* w, const T* b, T* xhat, T* r,
                       T* y);

// tx, tw, tb may be null (not active); w null counts as 1.
template <class T>
void normalise_tangent(const NormShape& shape, int64_t K, const T* xhat, const T* r, const T* w, const T* tx,
                       const T* tw, int64_t tw_stride, const T* tb, int64_t tb_stride, T* ty);

template <class T>
struct NormaliseAdjoint {
    const T *xhat, *r, *w;
    const T* tdy;  // (K, rows, C); null: zero
    const T* dy;   // (rows, C); null: no second-derivative terms
    const T* tx;   // with dy: the tangents, null where x is not active
    const T* tw;   // with dy: null where w is not active
    int64_t tw_stride;
    const T* so_far = nullptr;  // (K, rows, C), added to tdx; may be null
};

// tdx is written.
template <class T>
void normalise_adjoint(const NormShape& shape, int64_t K, const NormaliseAdjoint<T>& d, T* tdx);

// Sums over the rows, in the kRowPieces pieces of row_pieces.h: weight_sums[k, piece, c] of tdw, bias_sums of
// tdb. Either may be null.
template <class T>
void normalise_sums(const NormShape& shape, int64_t K, const NormaliseAdjoint<T>& d, double* weight_sums,
                    double* bias_sums);

#if defined(FLATCORE_WITH_CUDA) || defined(__CUDACC__) || defined(FLATCORE_CUDA_SHIM)
namespace cuda {
// The same four on a device; `stream` is a cudaStream_t.
template <class T>
void normalise_forward(const NormShape& shape, double eps, const T* x, const T* w, const T* b, T* xhat, T* r,
                       T* y, void* stream);
template <class T>
void normalise_tangent(const NormShape& shape, int64_t K, const T* xhat, const T* r, const T* w, const T* tx,
                       const T* tw, int64_t tw_stride, const T* tb, int64_t tb_stride, T* ty, void* stream);
template <class T>
void normalise_adjoint(const NormShape& shape, int64_t K, const NormaliseAdjoint<T>& d, T* tdx, void* stream);
template <class T>
void normalise_sums(const NormShape& shape, int64_t K, const NormaliseAdjoint<T>& d, double* weight_sums,
                    double* bias_sums, void* stream);
}  // namespace cuda
#endif

}  // namespace flatcore
