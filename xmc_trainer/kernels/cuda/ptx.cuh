// PTX instructions for capability 9.0 (compiled for sm_90a): the toolkit's, and those that it does not have. tests/kernels/cuda_on_cpu/ptx.cuh has the same functions for a CPU.

#pragma once

#include <cuda/ptx>
#include <cuda_runtime.h>

#include "arguments.cuh"

namespace {

__device__ __forceinline__ uint32_t address(const void* shared) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

__device__ __forceinline__ void copy_async(void* to, const void* from, bool ok) {  // 16 bytes; zeros unless ok
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address(to)), "l"(from), "r"(ok ? 16 : 0) : "memory");
}

__device__ __forceinline__ void await_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Writes four 8 x 8 matrices, by rows.
__device__ __forceinline__ void store4(bfloat16* to, const uint32_t (&r)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};"
                 ::"r"(address(to)), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory");
}

// Writes 16 bytes to device memory in one store. The compiler would store each word by itself, a fourth as much.
__device__ __forceinline__ void store_words(void* to, const uint32_t (&r)[4]) {
    asm volatile("st.global.v4.b32 [%0], {%1,%2,%3,%4};" ::"l"(to), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory");
}

// Prefetches to the L2 cache. from, bytes: multiples of 16.
__device__ __forceinline__ void prefetch(const void* from, uint32_t bytes) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes));
}

// The products of a warpgroup (four warps) are `multiply` in wgmma.cuh. They read shared memory
// through the async proxy: a thread that has written operands calls publish_shared, and the products come after the next barrier.
__device__ __forceinline__ void publish_shared() { cuda::ptx::fence_proxy_async(cuda::ptx::space_shared); }

__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Makes one group of the products since the last call.
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most the last LEFT groups are pending.
template <int LEFT>
__device__ __forceinline__ void await_products() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory"); }

__device__ __forceinline__ void end_products() { commit_products(), await_products<0>(); }

// Keeps the compiler from moving other uses of these registers across it. Products use registers after their instruction, which the
// compiler does not know.
template <int N>
__device__ __forceinline__ void pin(float (&c)[N][4]) {
#pragma unroll
    for (int n = 0; n < N; ++n) asm volatile("" : "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])::"memory");
}

template <int N>
__device__ __forceinline__ void pin(uint32_t (&a)[N][4]) {
#pragma unroll
    for (int n = 0; n < N; ++n) asm volatile("" : "+r"(a[n][0]), "+r"(a[n][1]), "+r"(a[n][2]), "+r"(a[n][3])::"memory");
}

// Hides the origin of x from the compiler: values derived from x are computed again, not kept in registers, and x itself is kept.
template <typename T>
__device__ __forceinline__ void forget(T& x) { asm volatile("" : "+r"(x)); }

#include "wgmma.cuh"

// Sets the registers of each thread of the calling warpgroup. What one warpgroup takes, others must have given.
template <int N>
__device__ __forceinline__ void take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N)); }
template <int N>
__device__ __forceinline__ void give_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N)); }

// A barrier for some warps of a block, THREADS threads in all. number: not 0, which is __syncthreads.
template <int THREADS>
__device__ __forceinline__ void meet(int number) { asm volatile("bar.sync %0, %1;" ::"r"(number), "n"(THREADS) : "memory"); }

// An mbarrier in shared memory. A phase ends after `count` arrivals, when all expected bytes have come. Threads that have awaited the
// phase see the bytes, and what the arriving threads wrote before they arrived.
struct Barrier { uint64_t state; };

__device__ __forceinline__ void init(Barrier& barrier, int count) { cuda::ptx::mbarrier_init(&barrier.state, count); }

// Call after the inits, before the block's first barrier.
__device__ __forceinline__ void publish_barriers() { cuda::ptx::fence_mbarrier_init(cuda::ptx::sem_release, cuda::ptx::scope_cluster); }

__device__ __forceinline__ void arrive(Barrier& barrier) { cuda::ptx::mbarrier_arrive(&barrier.state); }

__device__ __forceinline__ void arrive_expecting(Barrier& barrier, int bytes) {
    cuda::ptx::mbarrier_arrive_expect_tx(cuda::ptx::sem_release, cuda::ptx::scope_cta, cuda::ptx::space_shared, &barrier.state, bytes);
}

// Waits for the end of a phase, by its parity: 0, 1, 0, ... Returns at once if the current phase has the other parity.
__device__ __forceinline__ void await(Barrier& barrier, int parity) {
    while (!cuda::ptx::mbarrier_try_wait_parity(&barrier.state, parity)) {}
}

// Starts a bulk copy from device memory. bytes: a multiple of 16. The current phase of `barrier` must expect them.
__device__ __forceinline__ void fetch_bulk(void* to, const void* from, int bytes, Barrier& barrier) {
    cuda::ptx::cp_async_bulk(cuda::ptx::space_cluster, cuda::ptx::space_global, to, from, bytes, &barrier.state);
}

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float log2_fast(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float square_root(float x) {
    float y;
    asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

}  // namespace
