// The part of CUDA that xmc_trainer/kernels/cuda uses, on a CPU; see README.md.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "cpu.h"

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n)

using std::max;
using std::min;

struct int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) uint2 { uint32_t x, y; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
template <typename T> void __stcs(T* to, T value) { *to = value; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

template <int (*VALUE)()>
struct Dimension {
    struct { operator int() const { return VALUE(); } } x;
};
inline Dimension<cpu::thread> threadIdx;
inline Dimension<cpu::block> blockIdx;
inline Dimension<cpu::blocks> gridDim;

inline void __syncthreads() { cpu::meet_block(); }
inline void __syncwarp() { cpu::meet_warp(); }

inline uint32_t __shfl_xor_sync(unsigned, uint32_t value, int other) {
    uint32_t got = 0;
    cpu::together([&](cpu::Brought& own) { own.word[0] = value; },
                  [&](cpu::Brought* all, int lane) { got = all[lane ^ other].word[0]; });
    return got;
}

inline int __shfl_sync(unsigned, int value, int from) {
    int got = 0;
    cpu::together([&](cpu::Brought& own) { own.word[0] = value; }, [&](cpu::Brought* all, int) { got = all[from].word[0]; });
    return got;
}

inline int __all_sync(unsigned, bool value) {
    bool all_true = true;
    cpu::together([&](cpu::Brought& own) { own.flag = value; },
                  [&](cpu::Brought* all, int) { for (int i = 0; i < cpu::WARP; ++i) all_true = all_true && all[i].flag; });
    return all_true;
}
inline int __any_sync(unsigned all, bool value) { return !__all_sync(all, !value); }

inline uint32_t __float_as_uint(float x) { uint32_t y; std::memcpy(&y, &x, 4); return y; }
inline float __uint_as_float(uint32_t x) { float y; std::memcpy(&y, &x, 4); return y; }
inline float __shfl_xor_sync(unsigned all, float value, int other) {
    return __uint_as_float(__shfl_xor_sync(all, __float_as_uint(value), other));
}
inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t order) {
    const uint64_t both = uint64_t(y) << 32 | x;
    uint32_t out = 0;
    for (int i = 0; i < 4; ++i) out |= uint32_t(both >> (order >> 4 * i & 7) * 8 & 0xFF) << 8 * i;
    return out;
}
inline void atomicAdd(float* to, float value) { *to += value; }
inline void atomicAdd(float4* to, float4 value) { to->x += value.x, to->y += value.y, to->z += value.z, to->w += value.w; }

using cudaError_t = int;
using cudaStream_t = void*;
constexpr int cudaFuncAttributeMaxDynamicSharedMemorySize = 0, cudaDevAttrMultiProcessorCount = 0;
inline bool failed = false;  // the last launch
template <typename Kernel> cudaError_t cudaFuncSetAttribute(Kernel, int, int) { return 0; }
template <typename Kernel> cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, int) { *blocks = 1; return 0; }
inline cudaError_t cudaGetDevice(int* device) { *device = 0; return 0; }
inline cudaError_t cudaDeviceGetAttribute(int* value, int, int) { *value = 3; return 0; }  // several blocks, each of several tiles
inline cudaError_t cudaGetLastError() { return failed ? 719 : 0; }  // "unspecified launch failure"
