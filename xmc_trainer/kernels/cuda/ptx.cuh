// Single instructions of the GPU that CUDA C++ has no name for. tests/kernels/cuda_on_cpu has the same functions for a CPU.

#pragma once

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

__device__ __forceinline__ void load4(uint32_t (&r)[4], const bfloat16* from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address(from)) : "memory");
}

__device__ __forceinline__ void load4_transposed(uint32_t (&r)[4], const bfloat16* from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address(from)) : "memory");
}

// The other way: to the rows of four matrices of 8 x 8.
__device__ __forceinline__ void store4(bfloat16* to, const uint32_t (&r)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};"
                 ::"r"(address(to)), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory");
}

__device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two numbers as float16, x the lower, in size at most 57344; and back.
__device__ __forceinline__ uint32_t halves(float x, float y) {
    uint32_t pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(y), "f"(x));
    asm("min.f16x2 %0, %0, %1;" : "+r"(pair) : "r"(0x7B007B00));
    asm("max.f16x2 %0, %0, %1;" : "+r"(pair) : "r"(0xFB00FB00));
    return pair;
}

__device__ __forceinline__ float2 from_halves(uint32_t pair) {
    float2 v;
    asm("{\n.reg .f16 x, y;\nmov.b32 {x, y}, %2;\ncvt.f32.f16 %0, x;\ncvt.f32.f16 %1, y;\n}" : "=f"(v.x), "=f"(v.y) : "r"(pair));
    return v;
}

// To memory, together: the compiler stores each word on its own where it can, a fourth of what a sector takes.
__device__ __forceinline__ void store_words(void* to, const uint32_t (&r)[4]) {
    asm volatile("st.global.v4.b32 [%0], {%1,%2,%3,%4};" ::"l"(to), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory");
}

// On their way to the L2 cache; a multiple of 16 bytes.
__device__ __forceinline__ void prefetch(const void* from, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes));
#endif
}

// Products of a warpgroup, four warps, on GPUs of capability 9.0 (compiled for sm_90a), are `multiply` of wgmma.cuh. Before them: what
// threads have written to shared memory, asynchronously too, is there for products after the next barrier.
__device__ __forceinline__ void publish_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// The products since the last call are one group.
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until all groups but the last LEFT are done.
template <int LEFT>
__device__ __forceinline__ void await_products() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory"); }

__device__ __forceinline__ void end_products() { commit_products(), await_products<0>(); }

// Between products that use registers and whatever else does: the compiler knows nothing of what the first do later.
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

// What follows from x is worked out anew after this, not kept in registers from before; x itself is kept, not worked out anew.
template <typename T>
__device__ __forceinline__ void forget(T& x) { asm volatile("" : "+r"(x)); }

#include "wgmma.cuh"

// Registers a thread of the calling warpgroup has from here on; others must have given up what one takes.
template <int N>
__device__ __forceinline__ void take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N)); }
template <int N>
__device__ __forceinline__ void give_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N)); }

// Some warps of a block, THREADS in all, meet; `number`: not 0, which is __syncthreads'.
template <int THREADS>
__device__ __forceinline__ void meet(int number) { asm volatile("bar.sync %0, %1;" ::"r"(number), "n"(THREADS) : "memory"); }

// A barrier in shared memory. A phase of it ends when `count` arrivals have been, and the bytes that they said to expect. What
// threads have written before they arrive, and the bytes, are there for those that have awaited the phase.
struct Barrier { uint64_t state; };

__device__ __forceinline__ void init(Barrier& barrier, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address(&barrier)), "r"(count) : "memory");
}

// Between the inits and the first meeting of the block.
__device__ __forceinline__ void publish_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ __forceinline__ void arrive(Barrier& barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address(&barrier)) : "memory");
}

__device__ __forceinline__ void arrive_expecting(Barrier& barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address(&barrier)), "r"(bytes) : "memory");
}

// Without an arrival.
__device__ __forceinline__ void expect(Barrier& barrier, int bytes) {
    asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(address(&barrier)), "r"(bytes) : "memory");
}

// Phases have parities 0, 1, 0, ...; returns at once if the phase of the other parity is the one under way.
__device__ __forceinline__ void await(Barrier& barrier, int parity) {
    asm volatile(
        "{\n.reg .pred done;\n"
        "AGAIN:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra AGAIN;\n}" ::"r"(address(&barrier)), "r"(parity) : "memory");
}

// From memory; a multiple of 16 bytes, of which a phase of `barrier` waits.
__device__ __forceinline__ void fetch_bulk(void* to, const void* from, int bytes, Barrier& barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 ::"r"(address(to)), "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(address(&barrier)) : "memory");
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
