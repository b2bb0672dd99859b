#pragma once

#include "cuda_runtime.h"

struct __nv_bfloat16 { uint16_t bits; };
struct __nv_bfloat162 { __nv_bfloat16 x, y; };

inline __nv_bfloat16 rounded_to_bfloat16(float x) {
    const uint32_t bits = __float_as_uint(x);
    if (x != x) return {0x7FFF};
    return {static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {rounded_to_bfloat16(x), rounded_to_bfloat16(y)}; }
inline float widened_bfloat16(uint16_t bits) { return __uint_as_float(uint32_t(bits) << 16); }
