// The functions of xmc_trainer/kernels/ptx.cuh, by the figures of the PTX manual.

#pragma once

#include <array>
#include <cstdlib>

#include "cuda_bf16.h"

using bfloat16 = __nv_bfloat16;

namespace {

inline uint32_t address(const void* shared) {
    const auto offset = static_cast<const uint8_t*>(shared) - cpu::aligned_memory();
    if (offset < 0 || offset >= 227 << 10) std::abort();
    return static_cast<uint32_t>(offset);
}

inline void copy_async(void* to, const void* from, bool ok) {
    std::memset(to, 0xFF, 16);
    cpu::current->copies.push_back({to, ok ? from : nullptr});
}

inline void await_copies() {
    for (const cpu::Copy& copy : cpu::current->copies) {
        if (copy.from) std::memcpy(copy.to, copy.from, 16);
        else std::memset(copy.to, 0, 16);
    }
    cpu::current->copies.clear();
}

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

inline void store4(bfloat16* to, const uint32_t (&r)[4]) {
    cpu::together([&](cpu::Lane& own) { own.pointer = to; }, [&](cpu::Lane* all, int lane) {
        for (int i = 0; i < 4; ++i) std::memcpy((bfloat16*)all[8 * i + lane / 4].pointer + lane % 4 * 2, &r[i], 4);
    });
}

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

// float16: a sign, five bits of exponent, ten of mantissa.
inline uint32_t half_bits(float x) {
    const float size = std::min(std::fabs(x), 57344.0f);
    const int exponent = std::max(size > 0.0f ? std::ilogb(size) : -14, -14);
    const auto steps = static_cast<uint32_t>(std::nearbyint(std::ldexp(size, 10 - exponent)));  // ties to even; 2048 goes to the next exponent
    return (std::signbit(x) ? 0x8000 : 0) + (exponent + 14) * 1024 + steps;
}
inline uint32_t halves(float x, float y) { return half_bits(x) | half_bits(y) << 16; }
inline float2 from_halves(uint32_t pair) {
    const auto one = [](uint32_t bits) {
        const int exponent = std::max<int>(bits >> 10 & 31, 1), steps = (bits & 1023) + (bits >> 10 & 31 ? 1024 : 0);
        return (bits & 0x8000 ? -1.0f : 1.0f) * std::ldexp(static_cast<float>(steps), exponent - 25);
    };
    return {one(pair & 0xFFFF), one(pair >> 16)};
}

inline void store_words(void* to, const uint32_t (&r)[4]) {
    if (reinterpret_cast<uintptr_t>(to) % 16) std::abort();
    std::memcpy(to, r, sizeof r);
}

inline void prefetch(const void* from, uint32_t bytes) {
    if (reinterpret_cast<uintptr_t>(from) % 16 || bytes % 16) std::abort();
}

// Products of a warpgroup. Here they are made when they are awaited.
inline void publish_shared() {}
inline void begin_products() {}
inline void commit_products() { cpu::current->products.push_back(nullptr); }
template <int LEFT> void await_products() {
    auto& products = cpu::current->products;
    size_t done = products.size();
    for (int groups = 0; done > 0; --done)
        if (!products[done - 1] && groups++ == LEFT) break;
    for (size_t i = 0; i < done; ++i)
        if (products[i]) products[i]();
    products.erase(products.begin(), products.begin() + done);
    cpu::meet(cpu::own_warp());  // .sync: no lane goes on before all have waited
}
inline void end_products() { commit_products(), await_products<0>(); }
template <typename T, int N> void pin(T (&)[N][4]) {}
template <typename T> void forget(T&) {}

// Descriptors, as the PTX manual has them: start address, offset of what follows a row that is not along K ("leading"), offset of the
// next eight rows ("stride"), each in sixteens, and kind of swizzle.
//
// Element (mn, k) of an operand: rows of 128, 64, 32 or 16 bytes along K or (MN_MAJOR) along M or N. The swizzle: of 128 bytes bits 4-6 of
// an address are exclusive-ored with bits 7-9, of 64 bits 4 and 5 with 7 and 8, of 32 bit 4 with bit 7. Rows of 16 bytes have none,
// and their leading offset is that of the next eight along K, the stride that of the next eight along M or N.
template <bool MN_MAJOR>
inline float element(uint64_t descriptor, int mn, int k) {
    const int kind = descriptor >> 62, row = 16 << (3 - (kind + 3) % 4), whole = row / 2;
    if (descriptor >> 49 & 7) std::abort();
    const auto field = [&](int bit) { return uint32_t(descriptor >> bit & 0x3FFF) << 4; };
    const uint32_t start = field(0), leading = field(16), stride = field(32);
    uint32_t plain = start + (MN_MAJOR ? mn % whole * 2 + k % 8 * row : k % whole * 2 + mn % 8 * row);
    if (kind == 0) plain += k / 8 * leading + mn / 8 * stride;
    else if (MN_MAJOR) plain += mn / whole * leading + k / 8 * stride;
    else if (k < whole) plain += mn / 8 * stride;
    else std::abort();
    uint16_t bits;
    std::memcpy(&bits, cpu::aligned_memory() + (plain ^ (plain >> 7 & (row / 16 - 1)) << 4), 2);
    return widened_bfloat16(bits);
}

// wgmma.m64nNk16: warp w has rows 16 w + lane / 4 and + 8 of the sums, columns 8 n + lane % 4 * 2 and the next.
template <bool B_N_MAJOR, int N, typename A>
inline void add_products(float (&c)[N][4], A a, uint64_t b, bool add) {
    const int lane = threadIdx.x % 32;
    for (int n = 0; n < N; ++n)
        for (int i = 0; i < 4; ++i) {
            float sum = add ? c[n][i] : 0.0f;
            const int row = lane / 4 + i / 2 * 8, column = 8 * n + lane % 4 * 2 + i % 2;
            for (int k = 0; k < 16; ++k) sum += a(row, k) * element<B_N_MAJOR>(b, column, k);
            c[n][i] = sum;
        }
}

template <bool A_M_MAJOR, bool B_N_MAJOR, int N>
inline void multiply(float (&c)[N][4], uint64_t a, uint64_t b, bool add) {
    cpu::current->products.push_back([&c, a, b, add] {
        const int row0 = threadIdx.x / 32 % 4 * 16;
        add_products<B_N_MAJOR>(c, [&](int row, int k) { return element<A_M_MAJOR>(a, row0 + row, k); }, b, add);
    });
}

// A from registers, as they are now.
template <bool B_N_MAJOR, int N>
inline void multiply(float (&c)[N][4], const uint32_t (&a)[4], uint64_t b, bool add) {
    cpu::together([&](cpu::Lane& own) { std::copy(a, a + 4, own.word); }, [&](cpu::Lane* all, int) {
        std::vector<std::array<uint32_t, 4>> words(cpu::WARP);
        for (int i = 0; i < cpu::WARP; ++i) std::copy(all[i].word, all[i].word + 4, words[i].begin());
        cpu::current->products.push_back([&c, words = std::move(words), b, add] {
            add_products<B_N_MAJOR>(c, [&](int row, int k) {
                return widened_bfloat16(static_cast<uint16_t>(words[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2] >> 16 * (k % 2)));
            }, b, add);
        });
    });
}

template <int N> void take_registers() {}
template <int N> void give_registers() {}

template <int THREADS>
inline void meet(int number) {
    cpu::Meeting& meeting = cpu::own_block().some[number];
    meeting.size = THREADS;
    cpu::meet(meeting);
}

// Arrivals that are still to come in a phase, bytes too, and the number of the phase.
struct alignas(8) Barrier {
    int16_t arrivals, left;
    int phase;
    int bytes;
};

inline void init(Barrier& barrier, int count) { barrier = {static_cast<int16_t>(count), static_cast<int16_t>(count), 0, 0}; }
inline void publish_barriers() {}

inline void change(Barrier& barrier, int arrivals, int bytes) {
    if ((barrier.left -= arrivals) < 0) std::abort();
    barrier.bytes += bytes;
    if (barrier.left || barrier.bytes) return;
    barrier.left = barrier.arrivals;
    ++barrier.phase;
}

inline void arrive(Barrier& barrier) { change(barrier, 1, 0); }
inline void arrive_expecting(Barrier& barrier, int bytes) { change(barrier, 1, bytes); }
inline void expect(Barrier& barrier, int bytes) { change(barrier, 0, bytes); }

inline void await(Barrier& barrier, int parity) {
    while (barrier.phase % 2 == parity) cpu::wait(&barrier.phase, barrier.phase);
}

inline void fetch_bulk(void* to, const void* from, int bytes, Barrier& barrier) {
    if (address(to) % 16 || bytes % 16 || reinterpret_cast<uintptr_t>(from) % 16) std::abort();
    std::memset(to, 0xFF, bytes);
    cpu::later([=, &barrier] {
        std::memcpy(to, from, bytes);
        change(barrier, 0, -bytes);
    });
}

inline float exp2_fast(float x) { return std::exp2(x); }
inline float log2_fast(float x) { return std::log2(x); }
inline float reciprocal(float x) { return 1.0f / x; }
inline float square_root(float x) { return std::sqrt(x); }

}  // namespace
