// Products of tiles by fused multiply-adds, in float32 and float64: tile_product.h. For .cu files.
//
// Shared memory holds slabs of `kSlab` elements of the inner axis, twice: while one is multiplied, the next
// is on its way through registers into the other, with one barrier a slab. A is stored along the inner axis,
// B along the inner axis (of a row-major B') or along its columns (of a row-major B). Rows are padded so that
// the lanes of a warp read different banks: by 16 bytes along the inner axis (row strides of 4 modulo 32
// words), by 8 words along columns (8 modulo 32).
#pragma once

#include "tile_product.h"

namespace flatcore::cuda {

// fetch(s) brings slab s into registers, store(s) from there into shared memory. Barriers before the first
// multiplication and after the last, so that what is in shared memory may be written before and after.
template <class Fetch, class Store, class Multiply>
__device__ void over_slabs(int slabs, const Fetch& fetch, const Store& store, const Multiply& multiply) {
    if (slabs == 0) return;
    fetch(0);
    store(0);
    __syncthreads();
    FLATCORE_NO_UNROLL
    for (int s = 0; s < slabs; ++s) {
        if (s + 1 < slabs) fetch(s + 1);
        multiply(s);
        if (s + 1 < slabs) store(s + 1);
        __syncthreads();
    }
}

// Threads are 16 x 16; each owns every 16th row and column from its own.
template <class T, int W>
struct PlainProduct {
    using Element = T;
    static constexpr int kWidth = W;
    static constexpr int kTile = sizeof(T) == 4 ? 64 : 32, kOther = kTile;
    static constexpr int kThreads = 256, kBlocks = 1;
    static constexpr int kDirections = W == 128 ? 1 : 2;  // what their results leave registers for
    static constexpr int kSlab = sizeof(T) == 4 ? 16 : 8;
    static constexpr int kRows = kTile / 16;  // of a thread
    template <int N>
    static constexpr int kColumns = N / 16;
    static constexpr int kSharers = 16;  // threads with the same rows

    static __device__ int sharer() { return static_cast<int>(threadIdx.x % 16); }
    static __device__ int row(int i) { return static_cast<int>(threadIdx.x / 16) + 16 * i; }
    template <int N>
    static __device__ int column(int j) {
        return static_cast<int>(threadIdx.x % 16) + 16 * j;
    }

    class Tiles;
};

template <class T, int W>
class PlainProduct<T, W>::Tiles {
    static constexpr int kPack = 16 / sizeof(T);
    static constexpr int kStride = kSlab + kPack;  // along the inner axis
    static constexpr int kColumnStride = W + 8;    // along columns
    static constexpr int kTileStride = kTile + kPack;
    static constexpr int kSlabA = kTile * kStride;
    static constexpr int kSlabB = std::max(kSlabA, kSlab* kColumnStride);
    using Rows = MatrixRows<T>;

    T *a_, *b_, *tile_;

    // One slab; strides of the rows of a and b.
    template <int StrideA, int StrideB, bool BAlongInner, int N>
    static __device__ void multiply(T (&sums)[kRows][kColumns<N>], const T* a, const T* b) {
        FLATCORE_UNROLL
        for (int k = 0; k < kSlab; k += kPack) {
            Pack<T, kPack> left[kRows];
            FLATCORE_UNROLL
            for (int i = 0; i < kRows; ++i) left[i] = load<kPack>(a + row(i) * StrideA + k);
            FLATCORE_UNROLL
            for (int j = 0; j < kColumns<N>; ++j) {
                Pack<T, kPack> right;
                if constexpr (BAlongInner) {
                    right = load<kPack>(b + column<N>(j) * StrideB + k);
                } else {
                    FLATCORE_UNROLL
                    for (int l = 0; l < kPack; ++l) right.lane[l] = b[(k + l) * StrideB + column<N>(j)];
                }
                FLATCORE_UNROLL
                for (int l = 0; l < kPack; ++l) {
                    FLATCORE_UNROLL
                    for (int i = 0; i < kRows; ++i) sums[i][j] += left[i].lane[l] * right.lane[l];
                }
            }
        }
    }

 public:
    static constexpr int kBytes =
        static_cast<int>(sizeof(T)) * (2 * kSlabA + 2 * kSlabB + kTile * kTileStride);

    explicit __device__ Tiles(void* shared)
        : a_(static_cast<T*>(shared)), b_(a_ + 2 * kSlabA), tile_(b_ + 2 * kSlabB) {}

    // Nothing of the operands is kept: every product reads them.
    template <class F>
    __device__ void keep_own(const F&) {}
    template <class F>
    __device__ void keep_others(const F&) {}
    static __device__ Rows own(const Rows& rows, int) { return rows; }
    static __device__ Rows other(const Rows& rows, int) { return rows; }

    // sums += a b', inner axis the width of both.
    __device__ void add_rows(Sums<PlainProduct, kOther>& sums, const Rows& a, const Rows& b) const {
        constexpr int kParts = kSlab / kPack, kUnits = kTile * kParts;
        constexpr int kOwn = (kUnits + kThreads - 1) / kThreads;
        Pack<T, kPack> of_a[kOwn], of_b[kOwn];
        const auto fetch = [&](int s) {
            each_unit<kThreads, kUnits>([&](int u, int unit) {
                const int column = s * kSlab + unit % kParts * kPack;
                of_a[u] = a.pack(unit / kParts, column);
                of_b[u] = b.pack(unit / kParts, column);
            });
        };
        const auto store = [&](int s) {
            each_unit<kThreads, kUnits>([&](int u, int unit) {
                const int at = unit / kParts * kStride + unit % kParts * kPack;
                cuda::store(a_ + s % 2 * kSlabA + at, of_a[u]);
                cuda::store(b_ + s % 2 * kSlabB + at, of_b[u]);
            });
        };
        over_slabs((a.width + kSlab - 1) / kSlab, fetch, store, [&](int s) {
            multiply<kStride, kStride, true, kOther>(sums.value, a_ + s % 2 * kSlabA, b_ + s % 2 * kSlabB);
        });
    }

    // results[n] += s b for the s whose elements are element(i, j), inner axis the rows of b.
    template <int Count, class F>
    __device__ void add_sums(Sums<PlainProduct, W> (&results)[Count], int n, const F& element,
                             const Rows& b) const {
        Sums<PlainProduct, kOther>::each([&](int i, int j) {
            tile_[row(i) * kTileStride + column<kOther>(j)] = element(i, j);
        });  // read behind the next barrier
        constexpr int kParts = W / kPack, kUnits = kSlab * kParts;
        Pack<T, kPack> of_b[(kUnits + kThreads - 1) / kThreads];
        const auto fetch = [&](int s) {
            each_unit<kThreads, kUnits>(
                [&](int u, int unit) { of_b[u] = b.pack(s * kSlab + unit / kParts, unit % kParts * kPack); });
        };
        const auto store = [&](int s) {
            each_unit<kThreads, kUnits>([&](int u, int unit) {
                cuda::store(b_ + s % 2 * kSlabB + unit / kParts * kColumnStride + unit % kParts * kPack,
                            of_b[u]);
            });
        };
        over_slabs((b.rows + kSlab - 1) / kSlab, fetch, store, [&](int s) {
            with_result(results, n, [&](auto& result, int) {
                multiply<kTileStride, kColumnStride, false, W>(result.value, tile_ + s * kSlab,
                                                               b_ + s % 2 * kSlabB);
            });
        });
    }
};

}  // namespace flatcore::cuda
