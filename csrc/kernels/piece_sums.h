// The last step of sums over rows: those of the pieces (row_pieces.h) become results, of two arrays at once.
#pragma once

#include "row_pieces.h"

namespace flatcore {

// sums is (K, kRowPieces, C). result[k, c] becomes sum over pieces of sums[k, piece, c], or that is added;
// its directions are `stride` apart. Nothing where either is null.
template <class T>
struct PieceSums {
    const double* sums = nullptr;
    T* result = nullptr;
    int64_t stride = 0;
    bool add = false;

    FLATCORE_HOST_DEVICE void run(int64_t k, int64_t C, int64_t c) const {
        if (!sums || !result) return;
        const double* piece = sums + k * kRowPieces * C + c;
        double sum = 0;
        for (int64_t p = 0; p < kRowPieces; ++p) sum += piece[p * C];
        T& value = result[k * stride + c];
        value = add ? value + static_cast<T>(sum) : static_cast<T>(sum);
    }
};

template <class T>
void add_pieces(int64_t K, int64_t C, const PieceSums<T>& first, const PieceSums<T>& second);

#if defined(FLATCORE_WITH_CUDA) || defined(__CUDACC__) || defined(FLATCORE_CUDA_SHIM)
namespace cuda {
// The same on a device; `stream` is a cudaStream_t.
template <class T>
void add_pieces(int64_t K, int64_t C, const PieceSums<T>& first, const PieceSums<T>& second, void* stream);
}  // namespace cuda
#endif

}  // namespace flatcore
