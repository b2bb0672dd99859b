// The layout of operands in shared memory, and sums over the lanes of a warp.
//
// A matrix is kept in parts of 64 columns. A row of a part is 128 bytes, eight chunks of 16 bytes. Chunk c of row r is stored at
// c ^ (r & 7), so that eight rows read at once are in different banks. Slopes in device memory have the same layout.

#pragma once

#include "ptx.cuh"

namespace {

constexpr int ROW = 8, ROW_SIZE = 64;  // a row of a part, in chunks and in elements
constexpr int NEXT = 32 / 16, NEXT_ROWS = 2048 / 16;  // add to a descriptor for the next 16 columns, the next 16 rows

template <int PITCH>
__device__ __forceinline__ int place(int row, int chunk) {  // in elements
    return (row * PITCH + (chunk ^ (row & 7))) * 8;
}

// Returns a matrix descriptor (see the PTX manual; 128-byte swizzle). The matrix may be the operand or its transpose. Columns from 64 on
// are in the next part, NEXT_PART bytes later.
template <int NEXT_PART = 1024>
__device__ __forceinline__ uint64_t matrix(const void* shared) {
    // In a cluster, higher bits of the address name the block.
    return static_cast<uint64_t>((address(shared) & 0x3FFFF) >> 4) | uint64_t(NEXT_PART / 16) << 16 | uint64_t(1024 / 16) << 32 |
           uint64_t(1) << 62;
}

__device__ __forceinline__ uint32_t packed(float x, float y) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(x, y);
    return *reinterpret_cast<const uint32_t*>(&pair);
}

// Transposes a 4 x 4 matrix over each four lanes: swaps word q of lane p with word p of lane q. All lanes of the warp must call it.
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

// Sums each of N numbers over the eight lanes that are equal modulo 4. A lane gets one of the N sums, in sums[0], and returns its number.
// The first 4 N lanes hold all sums.
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
