// The functions of xmc_trainer/kernels/cuda/ptx.cuh, as the PTX manual defines them.

#pragma once

#include <array>
#include <utility>
#include <vector>

#include "arguments.cuh"
#include "cuda_runtime.h"

namespace {

inline uint32_t address(const void* shared) {
    const auto offset = static_cast<const uint8_t*>(shared) - cpu::shared_memory();
    if (offset < 0 || offset >= 227 << 10) cpu::fail("an address that is not in shared memory");
    return static_cast<uint32_t>(offset);
}

inline void copy_async(void* to, const void* from, bool ok) { cpu::copy_later(to, ok ? from : nullptr); }
inline void await_copies() { cpu::await_copies(); }

inline void store4(bfloat16* to, const uint32_t (&r)[4]) {
    cpu::together([&](cpu::Brought& own) { own.pointer = to; }, [&](cpu::Brought* all, int lane) {
        for (int i = 0; i < 4; ++i) std::memcpy((bfloat16*)all[8 * i + lane / 4].pointer + lane % 4 * 2, &r[i], 4);
    });
}

inline void store_words(void* to, const uint32_t (&r)[4]) {
    if (reinterpret_cast<uintptr_t>(to) % 16) cpu::fail("16 bytes to an address that is no multiple");
    std::memcpy(to, r, sizeof r);
}

inline void prefetch(const void* from, uint32_t bytes) {
    if (reinterpret_cast<uintptr_t>(from) % 16 || bytes % 16) cpu::fail("a prefetch not of whole pieces of 16 bytes");
}

inline void publish_shared() { cpu::publish(); }
inline void begin_products() { cpu::begin_products(); }
inline void commit_products() { cpu::commit_products(); }
template <int LEFT> void await_products() { cpu::await_products(LEFT); }
inline void end_products() { commit_products(), await_products<0>(); }
template <typename T, int N> void pin(T (&)[N][4]) {}
template <typename T> void forget(T&) {}

// Returns the address of element (mn, k) of an operand. A descriptor (PTX manual) holds, in units of 16 bytes, the start address, the
// leading offset (from a row along M or N to the part that continues it) and the stride (to the next eight rows), and the kind of swizzle.
//
// Rows have 128, 64, 32 or 16 bytes, along K or (MN_MAJOR) along M or N. The swizzle XORs address bits 4-6 with bits 7-9 for rows of 128
// bytes, bits 4-5 with 7-8 for 64, bit 4 with bit 7 for 32. Rows of 16 bytes are not swizzled; their leading offset leads to the next eight
// along K, their stride to the next eight along M or N.
template <bool MN_MAJOR>
inline const void* element(uint64_t descriptor, int mn, int k) {
    const int kind = descriptor >> 62, row = 16 << (3 - (kind + 3) % 4), whole = row / 2;
    if (descriptor >> 49 & 7) cpu::fail("a descriptor with a base offset");
    const auto field = [&](int bit) { return uint32_t(descriptor >> bit & 0x3FFF) << 4; };
    const uint32_t start = field(0), leading = field(16), stride = field(32);
    uint32_t plain = start + (MN_MAJOR ? mn % whole * 2 + k % 8 * row : k % whole * 2 + mn % 8 * row);
    if (kind == 0) plain += k / 8 * leading + mn / 8 * stride;
    else if (MN_MAJOR) plain += mn / whole * leading + k / 8 * stride;
    else if (k < whole) plain += mn / 8 * stride;
    else cpu::fail("a row of an operand that is longer than its swizzle's");
    return cpu::shared_memory() + (plain ^ (plain >> 7 & (row / 16 - 1)) << 4);
}

inline float number_at(const void* shared) { return widened_bfloat16(*static_cast<const uint16_t*>(shared)); }

// wgmma.m64nNk16. A lane of warp w has rows 16 w + lane / 4 and + 8 of the sums, columns 8 n + lane % 4 * 2 and the next. a(row, k): an
// element of the warp's 16 rows of A.
template <bool B_N_MAJOR, int N, typename A>
inline void add_products(float (&c)[N][4], A a, uint64_t b, bool add) {
    const int lane = threadIdx.x % 32;
    float of_a[2][16];
    for (int k = 0; k < 16; ++k) of_a[0][k] = a(lane / 4, k), of_a[1][k] = a(lane / 4 + 8, k);
    for (int n = 0; n < N; ++n)
        for (int j = 0; j < 2; ++j) {
            float sum[2] = {add ? c[n][j] : 0.0f, add ? c[n][2 + j] : 0.0f};
            for (int k = 0; k < 16; ++k) {
                const float of_b = number_at(element<B_N_MAJOR>(b, 8 * n + lane % 4 * 2 + j, k));
                sum[0] += of_a[0][k] * of_b, sum[1] += of_a[1][k] * of_b;
            }
            c[n][j] = sum[0], c[n][2 + j] = sum[1];
        }
}

template <bool A_M_MAJOR, bool B_N_MAJOR, int N>
inline void multiply(float (&c)[N][4], uint64_t a, uint64_t b, bool add) {
    const int row0 = threadIdx.x / 32 % 4 * 16;
    cpu::multiply_later(
        [=, &c] { add_products<B_N_MAJOR>(c, [&](int row, int k) { return number_at(element<A_M_MAJOR>(a, row0 + row, k)); }, b, add); },
        [=](int i) {
            if (i < 256) return element<A_M_MAJOR>(a, row0 + i / 16, i % 16);
            return i < 256 + 8 * N * 16 ? element<B_N_MAJOR>(b, i / 16 - 16, i % 16) : nullptr;
        });
}

// A comes from registers, whose values are copied now.
template <bool B_N_MAJOR, int N>
inline void multiply(float (&c)[N][4], const uint32_t (&a)[4], uint64_t b, bool add) {
    std::vector<std::array<uint32_t, 4>> words(cpu::WARP);
    cpu::together([&](cpu::Brought& own) { std::copy(a, a + 4, own.word); }, [&](cpu::Brought* all, int) {
        for (int i = 0; i < cpu::WARP; ++i) std::copy(all[i].word, all[i].word + 4, words[i].begin());
    });
    cpu::multiply_later(
        [=, &c, words = std::move(words)] {
            add_products<B_N_MAJOR>(c, [&](int row, int k) {
                return widened_bfloat16(static_cast<uint16_t>(words[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2] >> 16 * (k % 2)));
            }, b, add);
        },
        [=](int i) { return i < 8 * N * 16 ? element<B_N_MAJOR>(b, i / 16, i % 16) : nullptr; });
}

template <int N> void take_registers() {}
template <int N> void give_registers() {}

template <int THREADS>
inline void meet(int number) { cpu::meet_some(number, THREADS); }

struct Barrier { uint64_t state; };
inline void init(Barrier& barrier, int count) { cpu::start_barrier(&barrier.state, count); }
inline void publish_barriers() { cpu::publish_barriers(); }
inline void arrive(Barrier& barrier) { cpu::change_barrier(&barrier.state, 1, 0); }
inline void arrive_expecting(Barrier& barrier, int bytes) { cpu::change_barrier(&barrier.state, 1, bytes); }
inline void await(Barrier& barrier, int parity) { cpu::await_barrier(&barrier.state, parity); }
inline void fetch_bulk(void* to, const void* from, int bytes, Barrier& barrier) {
    if (address(to) % 16 || bytes % 16 || reinterpret_cast<uintptr_t>(from) % 16) cpu::fail("a bulk copy not of whole pieces of 16 bytes");
    cpu::copy_in_bulk(to, from, bytes, &barrier.state);
}

inline float exp2_fast(float x) { return std::exp2(x); }
inline float log2_fast(float x) { return std::log2(x); }
inline float reciprocal(float x) { return 1.0f / x; }
inline float square_root(float x) { return std::sqrt(x); }

}  // namespace
