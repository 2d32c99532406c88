// The matrix units' instructions of compute capability 8.0 and later: a warp multiplies 16 x K by K x 8 and
// adds to 16 x 8 float32 sums, with K = 8 for tf32 and 16 for bfloat16. A word holds one tf32 number or two
// bfloat16 that follow each other along k, so in words both are 16 x 8 by 8 x 8, and the lanes hold the same
// words of the operands. With g = lane / 4 and t = lane % 4 (PTX ISA, "Matrix fragments for mma.m16n8k8" and
// "mma.m16n8k16"):
//   a[0..3]  words (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4)      (row, k)
//   b[0..1]  words (t, g), (t + 4, g)                                  (k, column)
//   c        sums  (g, 2 t), (g, 2 t + 1), (g + 8, 2 t), (g + 8, 2 t + 1)
// That the places of the sums are known, which nvcuda::wmma leaves open, lets what follows a product (masks,
// exponentials, row scalars) work in registers.
// The emulation multiplies exactly, as the units do, and adds in float32 from k = 0 on. The units' order and
// rounding of the sums are not documented; their products are exact.
//
// load_matrices brings operands there from shared memory: four matrices of 8 rows of 16 bytes. Lane l names
// row l % 8 of matrix l / 8, and gets of matrix m in word m: word t of row g; or, transposed, the 16-bit
// elements g of rows 2 t and 2 t + 1 (PTX ISA, "ldmatrix").
#pragma once

#include <array>
#include <stdexcept>

#include "cuda_launch.h"
#include "rounding.h"

namespace flatcore::cuda {

struct Tf32 {
    static constexpr int kElements = 1;  // of a word
    FLATCORE_HOST_DEVICE static uint32_t word(const float (&x)[1]) { return rounded_to_tf32(x[0]); }
};

struct Bf16 {
    static constexpr int kElements = 2;
    FLATCORE_HOST_DEVICE static uint32_t word(const float (&x)[2]) { return bf16_pair(x[0], x[1]); }
};

#if defined(__CUDACC__)

template <class Format>
__device__ __forceinline__ void multiply_add(float& c0, float& c1, float& c2, float& c3,
                                             const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    if constexpr (Format::kElements == 1)
        asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
            "{%0,%1,%2,%3};"
            : "+f"(c0), "+f"(c1), "+f"(c2), "+f"(c3)
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    else
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
            "{%0,%1,%2,%3};"
            : "+f"(c0), "+f"(c1), "+f"(c2), "+f"(c3)
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <bool Transposed>
__device__ __forceinline__ void load_matrices(uint32_t (&words)[4], const uint32_t* row) {
    const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    if constexpr (Transposed)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                     : "r"(address)
                     : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                     : "r"(address)
                     : "memory");
}

#else

// What the units read of a word: its element e as float32.
template <class Format>
float element_of(uint32_t word, int e) {
    if constexpr (Format::kElements == 1) return std::bit_cast<float>(word & 0xffffe000U);
    return std::bit_cast<float>(e == 0 ? word << 16 : word & 0xffff0000U);
}

template <class Format>
void multiply_add(float& c0, float& c1, float& c2, float& c3, const uint32_t (&a)[4], const uint32_t (&b)[2],
                  Place place = Place::current()) {
    const auto& words = exchange_words({a[0], a[1], a[2], a[3], b[0], b[1]}, place);
    const int g = lane() / 4, t = lane() % 4;
    const auto dot = [&](int half, int column, float sum) {
        for (int k = 0; k < 8; ++k)
            for (int e = 0; e < Format::kElements; ++e) {
                const uint32_t left =
                    words[static_cast<size_t>(g * 4 + k % 4)][static_cast<size_t>(half + k / 4 * 2)];
                const uint32_t right =
                    words[static_cast<size_t>(column * 4 + k % 4)][static_cast<size_t>(4 + k / 4)];
                sum += element_of<Format>(left, e) * element_of<Format>(right, e);
            }
        return sum;
    };
    c0 = dot(0, 2 * t, c0);
    c1 = dot(0, 2 * t + 1, c1);
    c2 = dot(1, 2 * t, c2);
    c3 = dot(1, 2 * t + 1, c3);
}

template <bool Transposed>
void load_matrices(uint32_t (&words)[4], const uint32_t* row, Place place = Place::current()) {
    const auto address = reinterpret_cast<uintptr_t>(row);
    if (address % 16 != 0) throw std::logic_error("load_matrices: a row is not aligned to 16 bytes");
    const auto& addresses = exchange_words(
        {static_cast<uint32_t>(address), static_cast<uint32_t>(uint64_t{address} >> 32)}, place);
    const auto row_of = [&](int matrix, int r) {
        const LaneWords& halves = addresses[static_cast<size_t>(8 * matrix + r)];
        return reinterpret_cast<const uint32_t*>(uint64_t{halves[1]} << 32 | halves[0]);
    };
    const int g = lane() / 4, t = lane() % 4;
    const auto element = [&](int matrix, int r) {
        return row_of(matrix, r)[g / 2] >> (g % 2 * 16) & 0xffffU;
    };
    for (int m = 0; m < 4; ++m)
        words[m] = Transposed ? element(m, 2 * t) | element(m, 2 * t + 1) << 16 : row_of(m, g)[t];
}

#endif

}  // namespace flatcore::cuda
