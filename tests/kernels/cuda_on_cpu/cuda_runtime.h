// As much of CUDA as xmc_trainer/kernels/*.cu use, on a CPU: the threads of a block are coroutines that take turns,
// and run from one synchronisation to the next. It is slow, and it finds wrong indices, fragments, missing barriers and deadlocks;
// not what only a GPU does (the order of atomic additions, approximate functions). What is asynchronous happens late: copies and
// products when a thread awaits them, what comes from memory in bulk some rounds later; and lanes stall now and then. When: by
// draws that are the same in every run.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
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

struct dim3 {
    int x = 0;
    dim3(int x = 0) : x(x) {}
};
struct int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) uint2 { uint32_t x, y; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
template <typename T> void __stcs(T* to, T value) { *to = value; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace cpu {

constexpr int WARP = 32;

// Calls of a group of threads that only return once all have called.
struct Meeting {
    int size, here = 0, round = 0;
};

// A block's own.
struct Block {
    std::vector<uint8_t> shared_memory;
    Meeting all;
    std::map<int, Meeting> some;  // by number
};

struct Copy {  // of 16 bytes
    void* to;
    const void* from;  // null: zeros
};

struct Thread {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    int number, block;        // in the cluster
    const int* word = nullptr;  // what it waits for: that this is no longer `value`
    int value = 0;
    std::vector<Copy> copies;                      // asked for, and not awaited
    std::vector<std::function<void()>> products;   // the same; null: the end of a group
    bool done = false;
};

inline ucontext_t scheduler;
inline std::vector<Thread> threads;  // of a cluster, block after block
inline Thread* current;
inline std::vector<Meeting> warps;
inline std::vector<Block> blocks;
inline Meeting cluster;
inline std::function<void()> kernel;
struct Lane { const void* pointer; uint32_t word[6]; bool flag; };
inline std::vector<Lane> lanes;  // what the lanes of each warp bring to a meeting

struct Event {
    int round;
    std::function<void()> what;
};
inline std::vector<Event> events;  // to come
inline int round_now;              // the threads have had so many turns
inline uint64_t drawn;

inline unsigned draw(unsigned below) {
    drawn = drawn * 6364136223846793005u + 1442695040888963407u;
    return static_cast<unsigned>(drawn >> 33) % below;
}
inline int some_rounds() { return draw(4) ? draw(8) : draw(100); }
inline void later(std::function<void()> what) { events.push_back({round_now + some_rounds(), std::move(what)}); }

inline void happen() {
    if (events.empty()) return;
    std::vector<Event> due;
    for (size_t i = 0; i < events.size();) {
        if (events[i].round > round_now) { ++i; continue; }
        due.push_back(std::move(events[i]));
        events.erase(events.begin() + i);
    }
    for (Event& event : due) event.what();
}

// Lets others run until *word is no longer value.
inline void wait(const int* word, int value) {
    Thread* self = current;
    self->word = word, self->value = value;
    if (*word == value) swapcontext(&self->context, &scheduler);
    self->word = nullptr;
}

inline void meet(Meeting& meeting) {
    const int round = meeting.round;
    if (++meeting.here == meeting.size) {
        meeting.here = 0;
        ++meeting.round;
    }
    wait(&meeting.round, round);
}

}  // namespace cpu

inline dim3 threadIdx, blockIdx, gridDim;

namespace cpu {

inline Meeting& own_warp() { return warps[current->number / WARP]; }
inline Lane* own_lanes() { return &lanes[current->number / WARP * WARP]; }
inline Block& own_block() { return blocks[current->block]; }

// Each lane brings something; `take` sees what all have brought. Nobody goes on to bring the next before all have taken.
template <typename Bring, typename Take>
inline void together(Bring bring, Take take) {
    bring(lanes[current->number]);
    meet(own_warp());
    take(own_lanes(), threadIdx.x % WARP);
    meet(own_warp());
}

inline void entry() {
    kernel();
    current->done = true;
    swapcontext(&current->context, &scheduler);
}

// kernel() for `grid` blocks, cluster after cluster, of `size` threads.
inline void run(int grid, int size, int shared_bytes, std::function<void()> what, int cluster_blocks = 1) {
    kernel = std::move(what);
    gridDim.x = grid;
    for (int first_block = 0; first_block < grid; first_block += cluster_blocks) {
        const int count = size * cluster_blocks;
        threads = std::vector<Thread>(count);
        lanes.assign(count, {});
        warps.assign(count / WARP, Meeting{WARP});
        cluster = Meeting{count};
        blocks.clear();
        for (int i = 0; i < cluster_blocks; ++i)  // 0xFF: not a number, wherever nobody has written
            blocks.push_back({std::vector<uint8_t>(shared_bytes + 1024, 0xFF), Meeting{size}, {}});
        for (int i = 0; i < count; ++i) {
            Thread& thread = threads[i];
            thread.number = i, thread.block = i / size;
            thread.stack.reset(new char[1 << 17]);
            getcontext(&thread.context);
            thread.context.uc_stack.ss_sp = thread.stack.get();
            thread.context.uc_stack.ss_size = 1 << 17;
            thread.context.uc_link = nullptr;
            makecontext(&thread.context, entry, 0);
        }
        events.clear(), round_now = 0, drawn = first_block;
        std::vector<int> stalled(count, 0);  // each lane until which round
        for (int left = count; left;) {
            ++round_now;
            happen();
            bool any = !events.empty();
            for (int& until : stalled)
                if (until < round_now && !draw(1024)) until = round_now + some_rounds();
            for (Thread& thread : threads) {
                if (thread.done || (thread.word && *thread.word == thread.value)) continue;
                any = true;
                if (stalled[thread.number] > round_now) continue;
                current = &thread;
                threadIdx.x = thread.number % size;
                blockIdx.x = first_block + thread.block;
                swapcontext(&scheduler, &thread.context);
                left -= thread.done;
            }
            if (!any) {
                std::fprintf(stderr, "deadlock: %d threads wait for each other\n", left);
                std::abort();
            }
        }
    }
}

inline uint8_t* aligned_memory(int block) {
    return reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(blocks[block].shared_memory.data()) + 1023) & ~uintptr_t(1023));
}
inline uint8_t* aligned_memory() { return aligned_memory(current->block); }

}  // namespace cpu

inline void __syncthreads() { cpu::meet(cpu::own_block().all); }
inline void __syncwarp() { cpu::meet(cpu::own_warp()); }

inline uint32_t __shfl_xor_sync(unsigned, uint32_t value, int other) {
    uint32_t got = 0;
    cpu::together([&](cpu::Lane& own) { own.word[0] = value; },
                  [&](cpu::Lane* all, int lane) { got = all[lane ^ other].word[0]; });
    return got;
}

inline int __shfl_sync(unsigned, int value, int from) {
    int got = 0;
    cpu::together([&](cpu::Lane& own) { own.word[0] = value; }, [&](cpu::Lane* all, int) { got = all[from].word[0]; });
    return got;
}

inline int __all_sync(unsigned, bool value) {
    bool all_true = true;
    cpu::together([&](cpu::Lane& own) { own.flag = value; },
                  [&](cpu::Lane* all, int) { for (int i = 0; i < cpu::WARP; ++i) all_true = all_true && all[i].flag; });
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

using cudaError_t = int;
using cudaStream_t = void*;
constexpr int cudaFuncAttributeMaxDynamicSharedMemorySize = 0, cudaDevAttrMultiProcessorCount = 0;
template <typename Kernel> cudaError_t cudaFuncSetAttribute(Kernel, int, int) { return 0; }
template <typename Kernel> cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, int) { *blocks = 1; return 0; }
inline cudaError_t cudaGetDevice(int* device) { *device = 0; return 0; }
inline cudaError_t cudaDeviceGetAttribute(int* value, int, int) { *value = 3; return 0; }  // several blocks, each of several tiles
inline cudaError_t cudaGetLastError() { return 0; }
