// Rows of weights and index in memory, a chunk of slots at a time, and where they are spread out on the chip.
//
// Takes -D CHUNK (1, 2, 4, 8: slots that are read together, a divisor of the fan-in) besides what tile_math.cuh takes, of which
// it uses LABELS and WEIGHT.

#pragma once

#include <type_traits>

#include "tile_math.cuh"

namespace {

constexpr int ROW = 8, ROW_SIZE = 64;  // of a matrix in shared memory, which products take: chunks of 16 bytes, elements

// A row of W, [ROWS, 64] for every 64 features: as `place` has it, in few instructions.
template <int ROWS = LABELS>
struct RowOfW {
    uint8_t* elements;
    uint32_t swizzle;

    __device__ __forceinline__ RowOfW(bfloat16* w, int row)
        : elements(reinterpret_cast<uint8_t*>(w + row * ROW_SIZE)), swizzle((row & 7) * 8) {}

    __device__ __forceinline__ uint16_t& operator[](uint32_t feature) const {
        const uint32_t column = feature ^ swizzle;
        return *reinterpret_cast<uint16_t*>(elements + 2 * column + column / ROW_SIZE * (2 * (ROWS - 1) * ROW_SIZE));
    }
};

// The index row of a label of this rank: label / group.
__device__ __forceinline__ uint32_t index_row(const Arguments& a, int label) {
    return static_cast<uint32_t>(static_cast<uint64_t>(static_cast<uint32_t>(label)) * a.group_factor >> a.group_shift);
}

// A row of a tensor of labels, or of index rows.
template <typename T>
__device__ __forceinline__ T* row_of(const void* tensor, const Arguments& a, uint32_t row) {
    return static_cast<T*>(const_cast<void*>(tensor)) + static_cast<uint64_t>(row) * static_cast<uint32_t>(a.fan_in);
}

// Rows from `first` to `end` on their way to the L2 cache.
__device__ __forceinline__ void prefetch_rows(const void* tensor, uint32_t first, uint32_t end, uint64_t row_bytes) {
    const auto base = reinterpret_cast<uintptr_t>(tensor);
    const uintptr_t from = (base + first * row_bytes) & ~uintptr_t(15), to = (base + end * row_bytes) & ~uintptr_t(15);
    if (from < to) prefetch(reinterpret_cast<const void*>(from), static_cast<uint32_t>(to - from));
}

// Elements as they are stored.
template <typename T> struct StoredAs { using type = float; };
template <> struct StoredAs<bfloat16> { using type = uint16_t; };
template <> struct StoredAs<uint8_t> { using type = uint8_t; };
using Stored = StoredAs<WEIGHT>::type;
using StoredState = StoredAs<STATE>::type;

__device__ __forceinline__ float wide(float x) { return x; }
__device__ __forceinline__ float wide(uint16_t x) { return __uint_as_float(static_cast<uint32_t>(x) << 16); }

// Of a state, times its factor if it is a byte. SQUARES: of a second one.
template <bool SQUARES, typename T>
__device__ __forceinline__ float wide_state(T x) {
    if constexpr (!BYTE_STATE) return wide(x);
    else if constexpr (SQUARES) return from_square(x);
    else return from_halves(static_cast<uint32_t>(x) << 8).x;
}

// As products take them.
__device__ __forceinline__ uint16_t narrowed(uint16_t x) { return x; }
__device__ __forceinline__ uint16_t narrowed(float x) { return static_cast<uint16_t>(packed(x, 0.0f)); }

// What neighbouring slots of a row have. Two elements of 16 bits share a register, and four of 8.
template <typename T>
struct alignas(sizeof(T) * CHUNK) Chunk {
    static constexpr bool PAIRS = sizeof(T) == 2 && CHUNK > 1;
    static constexpr int EACH = PAIRS ? 2 : sizeof(T) > 1 ? 1 : CHUNK < 4 ? CHUNK : 4;
    using Together = typename std::conditional<EACH * sizeof(T) == 4, uint32_t, uint16_t>::type;
    typename std::conditional<EACH == 1, T, Together>::type word[CHUNK / EACH];

    __device__ __forceinline__ T operator[](int i) const {
        if constexpr (EACH == 1) return word[i];
        else return static_cast<T>(word[i / EACH] >> i % EACH * (8 * sizeof(T)));
    }

    // In ascending order of i.
    __device__ __forceinline__ void set(int i, T value) {
        if constexpr (EACH == 1) word[i] = value;
        else if constexpr (PAIRS) word[i / 2] = i % 2 ? __byte_perm(word[i / 2], value, 0x5410) : value;
        else word[i / EACH] = i % EACH ? word[i / EACH] | value << i % EACH * 8 : value;
    }

    // The same, to the upper half of `value`. A pair's first is kept as it is until its second comes.
    __device__ __forceinline__ void set_upper(int i, uint32_t value) {
        if constexpr (!PAIRS) word[i] = static_cast<T>(value >> 16);
        else word[i / 2] = i % 2 ? __byte_perm(word[i / 2], value, 0x7632) : value;
    }
};

}  // namespace
