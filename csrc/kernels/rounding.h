// float32 rounded to the short formats that matrix units multiply: nearest, ties to even; nan stays nan, what
// is too large becomes infinite.
#pragma once

#include <bit>
#include <cstdint>

#include "macros.h"

namespace flatcore {

FLATCORE_HOST_DEVICE uint32_t bits_of(float x) {
#if defined(__CUDA_ARCH__)
    return __float_as_uint(x);
#else
    return std::bit_cast<uint32_t>(x);
#endif
}

// The upper 16 bits are the bfloat16.
FLATCORE_HOST_DEVICE uint32_t rounded_to_bf16(float x) {
    constexpr uint32_t kHalf = 0x7fff, kQuiet = 0x400000;
    const uint32_t bits = bits_of(x);
    return x != x ? bits | kQuiet : bits + kHalf + ((bits >> 16) & 1);
}

// Elements 2 p and 2 p + 1 of a row as the bfloat16 instructions take them.
FLATCORE_HOST_DEVICE uint32_t bf16_pair(float first, float second) {
#if defined(__CUDA_ARCH__)  // the same in one instruction
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
    return pair;
#else
    return (rounded_to_bf16(first) >> 16) | (rounded_to_bf16(second) & 0xffff0000U);
#endif
}

// The upper 19 bits are the tf32 number: sign, 8 of the exponent, 10 of the mantissa. The others are zero.
FLATCORE_HOST_DEVICE uint32_t rounded_to_tf32(float x) {
    constexpr uint32_t kHalf = 0xfff, kQuiet = 0x400000, kKept = 0xffffe000;
    const uint32_t bits = bits_of(x);
    return (x != x ? bits | kQuiet : bits + kHalf + ((bits >> 13) & 1)) & kKept;
}

}  // namespace flatcore
