// Products of tiles by the matrix units (tensor_core.h), operands rounded to tf32 or bfloat16:
// tile_product.h. For .cu files.
//
// A warp owns 16 rows of the sums, all columns of them, so that sums of one product are the left operand of
// the next where they are, in registers. Operands are rounded once on their way into shared memory and stay
// there: those of the block's own rows for as long as it works on them, those of the other side for one tile.
// So within a tile no thread waits for another, and what the matrix units need comes from shared memory
// alone.
//
// A word of shared memory holds what follows each other along a row (tensor_core.h). Rows are padded by 16
// bytes, so that packs of eight rows, which a warp reads at once, lie in different banks.
#pragma once

#include "tensor_core.h"
#include "tile_product.h"

namespace flatcore::cuda {

template <class Format, int W>
struct TensorProduct {
    using Element = float;
    static constexpr int kWidth = W;
    static constexpr int kElements = Format::kElements;  // of a word
    // By the bytes of a row, so that all stays below kLargestShared.
    static constexpr int kRowBytes = W / kElements * 4;
    static constexpr int kTile = kRowBytes <= 256 ? 64 : 32, kOther = kRowBytes <= 128 ? 32 : 16;
    static constexpr int kThreads = kTile / 16 * kWarp, kBlocks = 2;
    static constexpr int kDirections = 1;
    static constexpr int kRows = 2;
    template <int N>
    static constexpr int kColumns = N / 4;
    static constexpr int kSharers = 4;

    static __device__ int lane_of_warp() { return static_cast<int>(threadIdx.x % kWarp); }
    static __device__ int warp_row() { return static_cast<int>(threadIdx.x / kWarp) * 16; }
    static __device__ int group() { return lane_of_warp() / 4; }
    static __device__ int member() { return lane_of_warp() % 4; }

    static __device__ int sharer() { return member(); }
    static __device__ int row(int i) { return warp_row() + group() + 8 * i; }
    template <int N>
    static __device__ int column(int j) {
        return j / 2 * 8 + member() * 2 + j % 2;
    }

    class Tiles;
};

template <class Format, int W>
class TensorProduct<Format, W>::Tiles {
    using Word = uint32_t;
    using Rows = MatrixRows<float>;
    static constexpr int kWords = W / kElements;  // of a row
    static constexpr int kStride = kWords + 4;
    static constexpr int kOwnWords = kTile * kStride, kOtherWords = kOther * kStride;

    Word* own_;
    Word* other_;

    static __device__ int place(int row, int word) { return row * kStride + word; }

    static constexpr int kPack = Rows::kPack, kParts = W / kPack;  // of a row

    static __device__ void store_rounded(Word* tile, int unit, const Rows::Elements& pack) {
        Pack<Word, kPack / kElements> words;
        FLATCORE_UNROLL
        for (int w = 0; w < kPack / kElements; ++w) {
            float x[kElements];
            FLATCORE_UNROLL
            for (int e = 0; e < kElements; ++e) x[e] = pack.lane[w * kElements + e];
            words.lane[w] = Format::word(x);
        }
        cuda::store(tile + place(unit / kParts, unit % kParts * kPack / kElements), words);
    }

    // Operands 0 to kOperands - 1 into shared memory, Count rows each. In loops: what is unrolled takes
    // registers from the results.
    template <int Count, class F>
    static __device__ void keep(const F& rows_of, Word* tiles) {
        constexpr int kUnits = Count * kParts, kPacks = kUnits / kThreads, kAtOnce = kPacks < 4 ? kPacks : 4;
        static_assert(kUnits % kThreads == 0 && kPacks % kAtOnce == 0);
        FLATCORE_NO_UNROLL
        for (int n = 0; n < kOperands; ++n) {
            const Rows rows = rows_of(n);
            if (!rows.rows) continue;
            const bool full = rows.aligned && rows.width == W;
            FLATCORE_NO_UNROLL
            for (int first = static_cast<int>(threadIdx.x); first < kUnits; first += kAtOnce * kThreads) {
                Rows::Elements packs[kAtOnce];
                FLATCORE_UNROLL
                for (int u = 0; u < kAtOnce; ++u) {
                    const int unit = first + u * kThreads;
                    const int row = unit / kParts, column = unit % kParts * kPack;
                    if (full)
                        packs[u] = row < rows.rows ? load<kPack>(rows.data + (row * rows.stride + column))
                                                   : typename Rows::Elements{};
                    else
                        packs[u] = rows.pack(row, column);
                }
                FLATCORE_UNROLL
                for (int u = 0; u < kAtOnce; ++u)
                    store_rounded(tiles + n * Count * kStride, first + u * kThreads, packs[u]);
            }
        }
    }

    // One (16, 8) tile of a warp's sums, by half of `right`.
    template <int N>
    static __device__ void multiply(Sums<TensorProduct, N>& sums, int tile, const Word (&left)[4],
                                    const Word (&right)[4], int half) {
        const int j = 2 * tile;
        auto& [upper, lower] = sums.value;
        multiply_add<Format>(upper[j], upper[j + 1], lower[j], lower[j + 1], left,
                             {right[2 * half], right[2 * half + 1]});
    }

    // Sums as the left operand of step `step`. A step takes its 8 words of the inner axis in any order if
    // both operands have the same: in tf32 word t is column 2 t and word t + 4 is column 2 t + 1, which this
    // thread has.
    template <class F>
    static __device__ void left_operand(Word (&left)[4], int step, const F& element) {
        if constexpr (kElements == 1) {
            FLATCORE_UNROLL
            for (int w = 0; w < 4; ++w) left[w] = Format::word({element(w % 2, 2 * step + w / 2)});
        } else {
            FLATCORE_UNROLL
            for (int w = 0; w < 4; ++w) {
                const int j = 4 * step + w / 2 * 2;
                left[w] = Format::word({element(w % 2, j), element(w % 2, j + 1)});
            }
        }
    }
    // The right operand: rows of b of step `step`, in the order of left_operand, 16 of its columns.
    static __device__ void right_operand(Word (&right)[4], const Word* b, int step, int column) {
        if constexpr (kElements == 1) {
            FLATCORE_UNROLL
            for (int w = 0; w < 4; ++w)
                right[w] = b[place(8 * step + 2 * member() + w % 2, column + w / 2 * 8 + group())];
        } else {
            load_matrices<true>(right, b + place(16 * step + eighth() % 2 * 8 + of_eight(),
                                                 (column + eighth() / 2 * 8) / kElements));
        }
    }
    static __device__ int eighth() { return lane_of_warp() / 8; }
    static __device__ int of_eight() { return lane_of_warp() % 8; }

 public:
    static constexpr int kBytes = static_cast<int>(sizeof(Word)) * kOperands * (kOwnWords + kOtherWords);

    static_assert(kBytes <= kLargestShared);

    explicit __device__ Tiles(void* shared)
        : own_(static_cast<Word*>(shared)), other_(own_ + kOperands * kOwnWords) {}

    // rows_of(n): the rows of operand n, none where it is not there. What is kept may be read after
    // keep_others.
    template <class F>
    __device__ void keep_own(const F& rows_of) {
        __syncthreads();
        keep<kTile>(rows_of, own_);
    }
    template <class F>
    __device__ void keep_others(const F& rows_of) {
        __syncthreads();
        keep<kOther>(rows_of, other_);
        __syncthreads();
    }
    __device__ const Word* own(const Rows&, int n) const { return own_ + n * kOwnWords; }
    __device__ const Word* other(const Rows&, int n) const { return other_ + n * kOtherWords; }

    // sums += a b', inner axis the width of both.
    __device__ void add_rows(Sums<TensorProduct, kOther>& sums, const Word* a, const Word* b) const {
        FLATCORE_UNROLL_SOME
        for (int k = 0; k < kWords; k += 8) {
            Word left[4];
            load_matrices<false>(left,
                                 a + place(warp_row() + eighth() % 2 * 8 + of_eight(), k + eighth() / 2 * 4));
            FLATCORE_UNROLL
            for (int column = 0; column < kOther; column += 16) {
                Word right[4];
                load_matrices<false>(right,
                                     b + place(column + eighth() / 2 * 8 + of_eight(), k + eighth() % 2 * 4));
                FLATCORE_UNROLL
                for (int half = 0; half < 2; ++half) multiply(sums, column / 8 + half, left, right, half);
            }
        }
    }

    // results[n] += s b for the s whose elements are element(i, j), inner axis the rows of b.
    template <int Count, class F>
    __device__ void add_sums(Sums<TensorProduct, W> (&results)[Count], int n, const F& element,
                             const Word* b) const {
        with_result(results, n, [&](auto& result, int) {
            FLATCORE_UNROLL
            for (int step = 0; step < kOther / (8 * kElements); ++step) {
                Word left[4];
                left_operand(left, step, element);
                FLATCORE_UNROLL
                for (int column = 0; column < W; column += 16) {
                    Word right[4];
                    right_operand(right, b, step, column);
                    FLATCORE_UNROLL
                    for (int half = 0; half < 2; ++half)
                        multiply(result, column / 8 + half, left, right, half);
                }
            }
        });
    }
};

}  // namespace flatcore::cuda
