// Products of tiles by a block of 256 threads: operands in shared memory, sums in registers. For .cu files.
//
//   sums (tile x N) += A (tile x inner) B (inner x N)
//
// How numbers are multiplied and added is a type: PlainProduct<float>, PlainProduct<double>,
// TensorProduct<Tf32>, TensorProduct<Bf16>. It says how many rows a tile has, what a word of shared memory
// holds (elements that follow each other along the inner axis), and which elements of the sums a thread owns,
// so that the caller works on them where they are.
//
// Shared memory holds slabs of `kSlab` words of the inner axis, twice: while one is multiplied, the next is
// on its way through registers into the other, with one barrier a slab. A is stored along the inner axis, B
// along the inner axis (of a row-major B') or along its columns (of a row-major B). Rows are padded so that
// the lanes of a warp read different banks: by 16 bytes along the inner axis (row strides of 4 modulo 32
// words), by 8 words along columns (8 modulo 32).
#pragma once

#include <algorithm>

#include "cuda_grid.h"
#include "tensor_core.h"

namespace flatcore::cuda {

inline constexpr int kProductThreads = 256;

// Threads are 16 x 16; each owns every 16th row and column from its own.
template <class T>
struct PlainProduct {
    using Element = T;
    using Word = T;
    static constexpr int kElements = 1;
    static constexpr int kTile = sizeof(T) == 4 ? 64 : 32;
    static constexpr int kSlab = sizeof(T) == 4 ? 16 : 8;
    static constexpr int kRows = kTile / 16;  // of a thread
    template <int N>
    static constexpr int kColumns = N / 16;
    static constexpr int kSharers = 16;  // threads with the same rows

    static __device__ Word word(const T (&x)[1]) { return x[0]; }
    static __device__ int sharer() { return static_cast<int>(threadIdx.x % 16); }
    static __device__ int row(int i) { return static_cast<int>(threadIdx.x / 16) + 16 * i; }
    template <int N>
    static __device__ int column(int j) {
        return static_cast<int>(threadIdx.x % 16) + 16 * j;
    }

    // One slab; strides of the rows of a and b.
    template <int StrideA, int StrideB, bool BAlongInner, int N>
    static __device__ void add(T (&sums)[kRows][kColumns<N>], const T* a, const T* b) {
        constexpr int kCount = 16 / sizeof(T);
        FLATCORE_UNROLL
        for (int k = 0; k < kSlab; k += kCount) {
            Pack<T, kCount> left[kRows];
            FLATCORE_UNROLL
            for (int i = 0; i < kRows; ++i) left[i] = load<kCount>(a + row(i) * StrideA + k);
            FLATCORE_UNROLL
            for (int j = 0; j < kColumns<N>; ++j) {
                Pack<T, kCount> right;
                if constexpr (BAlongInner) {
                    right = load<kCount>(b + column<N>(j) * StrideB + k);
                } else {
                    FLATCORE_UNROLL
                    for (int l = 0; l < kCount; ++l) right.lane[l] = b[(k + l) * StrideB + column<N>(j)];
                }
                FLATCORE_UNROLL
                for (int l = 0; l < kCount; ++l) {
                    FLATCORE_UNROLL
                    for (int i = 0; i < kRows; ++i) sums[i][j] += left[i].lane[l] * right.lane[l];
                }
            }
        }
    }
};

// Warps are 4 x 2, each with 16 rows and half of the columns, as rows of 16 x 8 sums of tensor_core.h.
template <class Format>
struct TensorProduct {
    using Element = float;
    using Word = uint32_t;
    static constexpr int kElements = Format::kElements;
    static constexpr int kTile = 64;
    static constexpr int kSlab = 16;
    static constexpr int kRows = 2;
    template <int N>
    static constexpr int kColumns = N / 8;
    static constexpr int kSharers = 8;

    static __device__ Word word(const float (&x)[kElements]) { return Format::word(x); }
    static __device__ int group() { return static_cast<int>(threadIdx.x % 32 / 4); }
    static __device__ int member() { return static_cast<int>(threadIdx.x % 4); }
    static __device__ int warp_row() { return static_cast<int>(threadIdx.x / 64) * 16; }
    static __device__ int warp_column() { return static_cast<int>(threadIdx.x / 32 % 2); }

    static __device__ int sharer() { return warp_column() * 4 + member(); }
    static __device__ int row(int i) { return warp_row() + group() + 8 * i; }
    template <int N>
    static __device__ int column(int j) {
        return warp_column() * (N / 2) + j / 2 * 8 + member() * 2 + j % 2;
    }

    template <int StrideA, int StrideB, bool BAlongInner, int N>
    static __device__ void add(float (&sums)[kRows][kColumns<N>], const uint32_t* a, const uint32_t* b) {
        FLATCORE_UNROLL
        for (int k = 0; k < kSlab; k += 8) {
            const uint32_t* corner = a + row(0) * StrideA + k + member();
            const uint32_t left[4] = {corner[0], corner[8 * StrideA], corner[4], corner[8 * StrideA + 4]};
            FLATCORE_UNROLL
            for (int j = 0; j < kColumns<N>; j += 2) {
                const int n = warp_column() * (N / 2) + j * 4 + group();
                const int at = k + member();
                const uint32_t right[2] = {BAlongInner ? b[n * StrideB + at] : b[at * StrideB + n],
                                           BAlongInner ? b[n * StrideB + at + 4] : b[(at + 4) * StrideB + n]};
                multiply_add<Format>(sums[0][j], sums[0][j + 1], sums[1][j], sums[1][j + 1], left, right);
            }
        }
    }
};

// A thread's part of (tile, N) sums.
template <class Product, int N>
struct Sums {
    using Element = typename Product::Element;
    static constexpr int kRows = Product::kRows, kColumns = Product::template kColumns<N>;
    Element value[kRows][kColumns];

    static __device__ int row(int i) { return Product::row(i); }
    static __device__ int column(int j) { return Product::template column<N>(j); }

    // f(i, j) for all elements
    template <class F>
    static __device__ void each(const F& f) {
        FLATCORE_UNROLL
        for (int i = 0; i < kRows; ++i) {
            FLATCORE_UNROLL
            for (int j = 0; j < kColumns; ++j) f(i, j);
        }
    }
    __device__ void zero() {
        each([&](int i, int j) { value[i][j] = 0; });
    }
};

// What a kernel whose results are at most W wide declares:
//   FLATCORE_SHARED(Word, a, Layout::kA); and so on; a whole tile of factors is only for add_tile_product.
template <class Product, int W>
struct TileLayout {
    using Word = typename Product::Word;
    static constexpr int kPad = 16 / sizeof(Word);
    static constexpr int kStride = Product::kSlab + kPad;  // along the inner axis
    static constexpr int kColumnStride = W + 8;            // along columns
    static constexpr int kTileStride = Product::kTile / Product::kElements + kPad;
    static constexpr int kSlabA = Product::kTile * kStride;
    static constexpr int kSlabB = std::max(kSlabA, Product::kSlab* kColumnStride);
    static constexpr int kA = 2 * kSlabA, kB = 2 * kSlabB, kTile = Product::kTile * kTileStride;
    static constexpr int kSlabElements = Product::kSlab * Product::kElements;
};

template <class Word>
struct TileMemory {
    Word *a, *b, *tile;
};

// A tile's rows of a (count, width) matrix in global memory, contiguous, from row `first` on. What lies
// outside is zero. Places within a tile are 32 bits, which saves registers.
template <class Product>
struct MatrixRows {
    using T = typename Product::Element;
    static constexpr int kPack = 16 / sizeof(T);
    using Elements = Pack<T, kPack>;
    const T* data;  // of row `first`
    int rows, width;
    bool aligned;  // rows are whole packs of 16 bytes

    __device__ MatrixRows(const T* matrix, int64_t first, int64_t count, int64_t row_width)
        : data(matrix + first * row_width),
          rows(count - first < Product::kTile ? static_cast<int>(count - first) : Product::kTile),
          width(static_cast<int>(row_width)),
          aligned(reinterpret_cast<uintptr_t>(data) % 16 == 0 && width % kPack == 0) {}

    __device__ Elements pack(int row, int column) const {
        Elements result{};
        if (row >= rows || column >= width) return result;
        const T* from = data + (row * width + column);
        if (aligned) return load<kPack>(from);
        FLATCORE_UNROLL
        for (int l = 0; l < kPack; ++l)
            if (column + l < width) result.lane[l] = from[l];
        return result;
    }
};

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

// Units of work dealt out to the threads: f(u, unit) for the u-th of this thread.
template <int Units, class F>
__device__ void each_unit(const F& f) {
    FLATCORE_UNROLL
    for (int u = 0; u * kProductThreads < Units; ++u) {
        const int unit = static_cast<int>(threadIdx.x) + u * kProductThreads;
        if ((u + 1) * kProductThreads <= Units || unit < Units) f(u, unit);
    }
}

// sums += a b', inner axis the width of both.
template <class Product, int W>
__device__ void add_product_of_rows(Sums<Product, Product::kTile>& sums, const MatrixRows<Product>& a,
                                    const MatrixRows<Product>& b,
                                    const TileMemory<typename Product::Word>& memory) {
    using T = typename Product::Element;
    using Word = typename Product::Word;
    using Layout = TileLayout<Product, W>;
    using Elements = typename MatrixRows<Product>::Elements;
    constexpr int kPack = MatrixRows<Product>::kPack, kParts = Layout::kSlabElements / kPack;
    constexpr int kUnits = Product::kTile * kParts, kWords = kPack / Product::kElements;
    constexpr int kOwn = (kUnits + kProductThreads - 1) / kProductThreads;
    Elements of_a[kOwn], of_b[kOwn];
    const auto fetch = [&](int s) {
        each_unit<kUnits>([&](int u, int unit) {
            const int column = s * Layout::kSlabElements + unit % kParts * kPack;
            of_a[u] = a.pack(unit / kParts, column);
            of_b[u] = b.pack(unit / kParts, column);
        });
    };
    const auto store = [&](int s) {
        each_unit<kUnits>([&](int u, int unit) {
            const int at = s % 2 * Layout::kSlabA + unit / kParts * Layout::kStride + unit % kParts * kWords;
            const auto put = [&](const Elements& from, Word* to) {
                Pack<Word, kWords> words;
                FLATCORE_UNROLL
                for (int w = 0; w < kWords; ++w) {
                    T x[Product::kElements];
                    FLATCORE_UNROLL
                    for (int e = 0; e < Product::kElements; ++e) x[e] = from.lane[w * Product::kElements + e];
                    words.lane[w] = Product::word(x);
                }
                cuda::store(to, words);
            };
            put(of_a[u], memory.a + at);
            // b's second slab starts where its larger form needs it
            put(of_b[u], memory.b + at + s % 2 * (Layout::kSlabB - Layout::kSlabA));
        });
    };
    const auto multiply = [&](int s) {
        Product::template add<Layout::kStride, Layout::kStride, true, Product::kTile>(
            sums.value, memory.a + s % 2 * Layout::kSlabA, memory.b + s % 2 * Layout::kSlabB);
    };
    over_slabs((a.width + Layout::kSlabElements - 1) / Layout::kSlabElements, fetch, store, multiply);
}

// The factors of add_tile_product: element(i, j) of this thread's part of a (tile, tile) matrix. They are
// read behind the next barrier.
template <class Product, int W, class F>
__device__ void write_tile(const TileMemory<typename Product::Word>& memory, const F& element) {
    using S = Sums<Product, Product::kTile>;
    FLATCORE_UNROLL
    for (int i = 0; i < S::kRows; ++i) {
        FLATCORE_UNROLL
        for (int j = 0; j < S::kColumns; j += Product::kElements) {
            typename Product::Element x[Product::kElements];
            FLATCORE_UNROLL
            for (int e = 0; e < Product::kElements; ++e) x[e] = element(i, j + e);
            memory.tile[S::row(i) * TileLayout<Product, W>::kTileStride + S::column(j) / Product::kElements] =
                Product::word(x);
        }
    }
}

// f(results[n], n), where n is known at run time and the results lie in registers.
template <class Result, int Count, class F>
__device__ void with_result(Result (&results)[Count], int n, const F& f) {
    FLATCORE_UNROLL
    for (int i = 0; i < Count; ++i)
        if (i == n) f(results[i], i);
}

// sums[n] += (the tile in shared memory) b, inner axis the rows of b.
template <class Product, int W, int Count>
__device__ void add_tile_product(Sums<Product, W> (&sums)[Count], int n, const MatrixRows<Product>& b,
                                 const TileMemory<typename Product::Word>& memory) {
    using T = typename Product::Element;
    using Word = typename Product::Word;
    using Layout = TileLayout<Product, W>;
    using Elements = typename MatrixRows<Product>::Elements;
    constexpr int kPack = MatrixRows<Product>::kPack, kParts = W / kPack;
    constexpr int kUnits = Product::kSlab * kParts;
    Elements of_b[(kUnits + kProductThreads - 1) / kProductThreads][Product::kElements];
    const auto fetch = [&](int s) {
        each_unit<kUnits>([&](int u, int unit) {
            const int row = s * Layout::kSlabElements + unit / kParts * Product::kElements;
            FLATCORE_UNROLL
            for (int e = 0; e < Product::kElements; ++e) of_b[u][e] = b.pack(row + e, unit % kParts * kPack);
        });
    };
    const auto store = [&](int s) {
        each_unit<kUnits>([&](int u, int unit) {
            Pack<Word, kPack> words;
            FLATCORE_UNROLL
            for (int l = 0; l < kPack; ++l) {
                T x[Product::kElements];
                FLATCORE_UNROLL
                for (int e = 0; e < Product::kElements; ++e) x[e] = of_b[u][e].lane[l];
                words.lane[l] = Product::word(x);
            }
            cuda::store(memory.b + s % 2 * Layout::kSlabB + unit / kParts * Layout::kColumnStride +
                            unit % kParts * kPack,
                        words);
        });
    };
    const auto multiply = [&](int s) {
        with_result(sums, n, [&](auto& sum, int) {
            Product::template add<Layout::kTileStride, Layout::kColumnStride, false, W>(
                sum.value, memory.tile + s * Product::kSlab, memory.b + s % 2 * Layout::kSlabB);
        });
    };
    over_slabs((b.rows + Layout::kSlabElements - 1) / Layout::kSlabElements, fetch, store, multiply);
}

}  // namespace flatcore::cuda
