// Matrices in shared memory as the operands of a warpgroup's products, and sums over the lanes of a warp.
//
// A matrix is kept in parts of 64 columns. A row of a part is 128 bytes, eight chunks of 16 bytes: chunk c of row r lies at c ^ (r & 7), so
// that eight rows that are read at once lie in different banks. Copying 128 bytes to 128 bytes keeps this order, in memory too.

#pragma once

#include "ptx.cuh"

namespace {

constexpr int ROW = 8, ROW_SIZE = 64;  // of a part: chunks, elements
constexpr int NEXT = 32 / 16, NEXT_ROWS = 2048 / 16;  // from a descriptor to that of the next 16 columns, and of the next 16 rows

template <int PITCH>
__device__ __forceinline__ int place(int row, int chunk) {  // in elements
    return (row * PITCH + (chunk ^ (row & 7))) * 8;
}

// The descriptor of a matrix (PTX: "matrix descriptor", 128-byte swizzle). Its rows may be the operand's or its columns ("transposed");
// columns from 64 on are in a part that begins NEXT_PART bytes later.
template <int NEXT_PART = 1024>
__device__ __forceinline__ uint64_t matrix(const void* shared) {
    // In a cluster the bits above these are the block's.
    return static_cast<uint64_t>((address(shared) & 0x3FFFF) >> 4) | uint64_t(NEXT_PART / 16) << 16 | uint64_t(1024 / 16) << 32 |
           uint64_t(1) << 62;
}

__device__ __forceinline__ uint32_t packed(float x, float y) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(x, y);
    return *reinterpret_cast<const uint32_t*>(&pair);
}

// Of each four lanes, lane p's q-th word <-> lane q's p-th. All lanes of the warp must call.
__device__ __forceinline__ void exchange_words(uint32_t (&v)[4]) {
#pragma unroll
    for (int bit = 1; bit < 4; bit *= 2) {
        const bool upper = threadIdx.x & bit;
#pragma unroll
        for (int n = 0; n < 4; ++n) {
            if (n & bit) continue;
            const uint32_t got = __shfl_xor_sync(~0u, upper ? v[n] : v[n + bit], bit);
            v[n] = upper ? got : v[n];
            v[n + bit] = upper ? v[n + bit] : got;
        }
    }
}

// Sums over the eight lanes whose numbers are the same modulo 4: each lane has one of them in sums[0], and returns which. The
// first 4 N lanes have all.
template <int N>
__device__ __forceinline__ int sum_of_lanes(float (&sums)[N], int lane) {
    int which = 0;
#pragma unroll
    for (int left = N / 2, bit = 4; bit < 32; bit *= 2, left /= 2) {
        const bool upper = left && lane & bit;
#pragma unroll
        for (int i = 0; i < (left ? left : 1); ++i) {
            const float mine = upper ? sums[i + left] : sums[i], other = upper || !left ? sums[i] : sums[i + left];
            sums[i] = mine + __shfl_xor_sync(~0u, other, bit);
        }
        which += upper ? left : 0;
    }
    return which;
}

}  // namespace
