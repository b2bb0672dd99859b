// The functions of xmc_trainer/kernels/ptx.cuh, by the figures of the PTX manual.

#pragma once

#include "cuda_bf16.h"

using bfloat16 = __nv_bfloat16;

namespace {

inline void copy_async(void* to, const void* from, bool ok) {
    if (ok) std::memcpy(to, from, 16);
    else std::memset(to, 0, 16);
}

inline void await_copies() {}

// Four matrices of 8 x 8: lane 8 i + r has brought the address of row r of matrix i.
template <bool TRANSPOSED>
inline void load_matrices(uint32_t (&r)[4], const bfloat16* from) {
    cpu::together([&](cpu::Lane& own) { own.pointer = from; }, [&](cpu::Lane* all, int lane) {
        for (int i = 0; i < 4; ++i) {
            uint32_t element[2];
            for (int j = 0; j < 2; ++j) {
                const int row = TRANSPOSED ? lane % 4 * 2 + j : lane / 4, column = TRANSPOSED ? lane / 4 : lane % 4 * 2 + j;
                element[j] = static_cast<const bfloat16*>(all[8 * i + row].pointer)[column].bits;
            }
            r[i] = element[0] | element[1] << 16;
        }
    });
}

inline void load4(uint32_t (&r)[4], const bfloat16* from) { load_matrices<false>(r, from); }
inline void load4_transposed(uint32_t (&r)[4], const bfloat16* from) { load_matrices<true>(r, from); }

// m16n8k16: A row (lane / 4, + 8), columns (lane % 4 * 2, + 8); B rows (lane % 4 * 2, + 8), column lane / 4.
inline void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    cpu::together(
        [&](cpu::Lane& own) {
            std::copy(a, a + 4, own.word);
            own.word[4] = b0, own.word[5] = b1;
        },
        [&](cpu::Lane* all, int lane) {
            const auto half = [](uint32_t word, int which) { return widened_bfloat16(static_cast<uint16_t>(word >> 16 * which)); };
            for (int i = 0; i < 4; ++i) {
                const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
                for (int k = 0; k < 16; ++k) {
                    const float x = half(all[row % 8 * 4 + k % 8 / 2].word[row / 8 + k / 8 * 2], k % 2);
                    const float y = half(all[column * 4 + k % 8 / 2].word[4 + k / 8], k % 2);
                    c[i] += x * y;
                }
            }
        });
}

inline float exp2_fast(float x) { return std::exp2(x); }
inline float reciprocal(float x) { return 1.0f / x; }
inline float square_root(float x) { return std::sqrt(x); }

}  // namespace
