// As much of CUDA as xmc_trainer/kernels/*.cu use, on a CPU: the threads of a block are coroutines that take turns, and run
// from one synchronisation to the next. It is slow, and it finds wrong indices, fragments and missing barriers of a block's own
// data; not what only a GPU does (asynchronous copies, the order of atomic additions, approximate functions).

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <ucontext.h>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n)

using std::max;
using std::min;

struct dim3 { int x = 0; };
struct int2 { int x, y; };
struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace cpu {

constexpr int WARP = 32;

// Calls of a group of threads that only return once all have called.
struct Meeting {
    int size, here = 0, round = 0;
};

struct Thread {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    dim3 index;
    bool done = false;
};

inline ucontext_t scheduler;
inline std::vector<Thread> threads;
inline Thread* current;
inline std::vector<Meeting> warps;
inline Meeting block;
inline std::vector<uint8_t> shared_memory;
inline std::function<void()> kernel;
struct Lane { const void* pointer; uint32_t word[6]; bool flag; };
inline std::vector<Lane> lanes;  // what the lanes of each warp bring to a meeting

void turn();

inline void meet(Meeting& meeting) {
    const int round = meeting.round;
    if (++meeting.here == meeting.size) {
        meeting.here = 0;
        ++meeting.round;
    }
    while (meeting.round == round) turn();
}

}  // namespace cpu

inline dim3 threadIdx, blockIdx, gridDim;

namespace cpu {

inline void turn() {
    Thread* self = current;
    swapcontext(&self->context, &scheduler);
}

inline Meeting& own_warp() { return warps[threadIdx.x / WARP]; }
inline Lane* own_lanes() { return &lanes[threadIdx.x / WARP * WARP]; }

// Each lane brings something; `take` sees what all have brought. Nobody goes on to bring the next before all have taken.
template <typename Bring, typename Take>
inline void together(Bring bring, Take take) {
    bring(lanes[threadIdx.x]);
    meet(own_warp());
    take(own_lanes(), threadIdx.x % WARP);
    meet(own_warp());
}

inline void entry() {
    kernel();
    current->done = true;
    swapcontext(&current->context, &scheduler);
}

// kernel() for `blocks` blocks, one after another, of `size` threads.
inline void run(int blocks, int size, int shared_bytes, std::function<void()> what) {
    kernel = std::move(what);
    gridDim.x = blocks;
    for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
        shared_memory.assign(shared_bytes + 1024, 0xFF);  // not a number, wherever nobody has written
        threads = std::vector<Thread>(size);
        lanes.assign(size, {});
        warps.assign(size / WARP, Meeting{WARP});
        block = Meeting{size};
        for (int i = 0; i < size; ++i) {
            Thread& thread = threads[i];
            thread.index.x = i;
            thread.stack.reset(new char[1 << 17]);
            getcontext(&thread.context);
            thread.context.uc_stack.ss_sp = thread.stack.get();
            thread.context.uc_stack.ss_size = 1 << 17;
            thread.context.uc_link = nullptr;
            makecontext(&thread.context, entry, 0);
        }
        for (bool left = true; left;) {
            left = false;
            for (Thread& thread : threads) {
                if (thread.done) continue;
                left = true;
                current = &thread;
                threadIdx = thread.index;
                swapcontext(&scheduler, &thread.context);
            }
        }
    }
}

inline uint8_t* aligned_memory() {
    return reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(shared_memory.data()) + 1023) & ~uintptr_t(1023));
}

}  // namespace cpu

inline void __syncthreads() { cpu::meet(cpu::block); }
inline void __syncwarp() { cpu::meet(cpu::own_warp()); }

inline uint32_t __shfl_xor_sync(unsigned, uint32_t value, int other) {
    uint32_t got = 0;
    cpu::together([&](cpu::Lane& own) { own.word[0] = value; },
                  [&](cpu::Lane* all, int lane) { got = all[lane ^ other].word[0]; });
    return got;
}

inline int __all_sync(unsigned, bool value) {
    bool all_true = true;
    cpu::together([&](cpu::Lane& own) { own.flag = value; },
                  [&](cpu::Lane* all, int) { for (int i = 0; i < cpu::WARP; ++i) all_true = all_true && all[i].flag; });
    return all_true;
}

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
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline void atomicAdd(float* to, float value) { *to += value; }

using cudaError_t = int;
using cudaStream_t = void*;
constexpr int cudaFuncAttributeMaxDynamicSharedMemorySize = 0, cudaDevAttrMultiProcessorCount = 0;
template <typename Kernel> cudaError_t cudaFuncSetAttribute(Kernel, int, int) { return 0; }
template <typename Kernel> cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, int) { *blocks = 1; return 0; }
inline cudaError_t cudaGetDevice(int* device) { *device = 0; return 0; }
inline cudaError_t cudaDeviceGetAttribute(int* value, int, int) { *value = 3; return 0; }  // several blocks, each of several tiles
inline cudaError_t cudaGetLastError() { return 0; }
