// The plain reference: on the CPU these products are a BLAS's. Tests hold the CUDA grids to it.
#include "tall.h"

#include "tall.inl"

namespace flatcore {
namespace {

template <bool Update, class T>
void combine_rows(int64_t p, int64_t m, int64_t P, const T* B, const T* Y, int64_t Y_stride, T* X,
                  int64_t X_stride) {
    for (int64_t i = 0; i < p; ++i)
        for (int64_t c = 0; c < P; ++c) {
            T sum = 0;
            for (int64_t j = 0; j < m; ++j) sum += B[i * m + j] * Y[j * Y_stride + c];
            T& x = X[i * X_stride + c];
            x = body::combined<Update>(x, sum);
        }
}

}  // namespace

int64_t tall_gram_workspace(int64_t p, int64_t m, int64_t P) {
    const body::GramTiles tiles = body::gram_tiles(p, m, P);
    return tiles.down * tiles.across * tiles.tall * tiles.wide * tiles.column_blocks;
}

template <class T>
void tall_gram(int64_t p, int64_t m, int64_t P, const T* X, int64_t X_stride, const T* Y, int64_t Y_stride,
               double*, double* out) {
    for (int64_t i = 0; i < p; ++i)
        for (int64_t j = 0; j < m; ++j) {
            double sum = 0.0;
            for (int64_t c = 0; c < P; ++c) sum += double{X[i * X_stride + c]} * double{Y[j * Y_stride + c]};
            out[i * m + j] = sum;
        }
}

template <class T>
void tall_update(int64_t p, int64_t m, int64_t P, const T* B, const T* Y, int64_t Y_stride, T* X,
                 int64_t X_stride) {
    combine_rows<true>(p, m, P, B, Y, Y_stride, X, X_stride);
}

template <class T>
void tall_combine(int64_t p, int64_t m, int64_t P, const T* B, const T* Y, int64_t Y_stride, T* X,
                  int64_t X_stride) {
    combine_rows<false>(p, m, P, B, Y, Y_stride, X, X_stride);
}

#define INSTANTIATE(T)                                                                                \
    template void tall_gram(int64_t, int64_t, int64_t, const T*, int64_t, const T*, int64_t, double*, \
                            double*);                                                                 \
    template void tall_update(int64_t, int64_t, int64_t, const T*, const T*, int64_t, T*, int64_t);   \
    template void tall_combine(int64_t, int64_t, int64_t, const T*, const T*, int64_t, T*, int64_t);
INSTANTIATE(float)
INSTANTIATE(double)
#undef INSTANTIATE

}  // namespace flatcore
