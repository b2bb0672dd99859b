// Shared by logits.cu, feature_gradient.cu and weight_gradient.cu. Weights are sparse in device memory and become dense in shared memory.
//
// A tile is LABELS labels by TEXTS texts. The kernels exchange slopes through device memory: 16 KiB for each tile, in the layout of
// operands.cuh, so that a bulk copy to shared memory makes them an operand.
//
// Compile with -D: WEIGHT (float or bfloat16), INDEX (int16_t or int32_t), FEATURES (of a block, a multiple of 64), CHUNK (1, 2, 4: slots
// that are read together, a divisor of the fan-in), GROUP (labels of an index row), and the names that each file lists.

#pragma once

#include <type_traits>

#include "operands.cuh"

namespace {

constexpr int PARTS = FEATURES / 64, CONSUMERS = 256, BLOCKS = 1;
constexpr int SLOPES = TEXTS * LABELS;  // in a tile
constexpr bool BF16_WEIGHT = sizeof(WEIGHT) == 2;
static_assert(FEATURES % 64 == 0 && 4 % CHUNK == 0, "see above");

// The numbers of named barriers, for `meet`. 0 is __syncthreads.
enum NamedBarrier { OF_CONSUMERS = 1, OF_WARPGROUP };  // OF_WARPGROUP + w: for warpgroup w

// A ring of buffers that producers fill and consumers free. Each source lists its producers and consumers in its table of barriers.
template <int BUFFERS>
struct Pipeline {
    Barrier full[BUFFERS], free[BUFFERS];

    // A tile's buffer, and the parity of the phase in which the tile uses it.
    struct Turn {
        int buffer = 0, parity = 0;
        __device__ __forceinline__ void next() {
            if (++buffer == BUFFERS) buffer = 0, parity ^= 1;
        }
    };

    // Called by one thread, before the block's first barrier.
    __device__ __forceinline__ void start(int producers, int consumers) {
        for (int i = 0; i < BUFFERS; ++i) init(full[i], producers), init(free[i], consumers);
        publish_barriers();
    }
    __device__ __forceinline__ void await_full(const Turn& turn) { await(full[turn.buffer], turn.parity); }
    // Returns at once in the first round: the phase before the first counts as over.
    __device__ __forceinline__ void await_free(const Turn& turn) { await(free[turn.buffer], turn.parity ^ 1); }
};

// The tiles of labels that a block takes: every `step`-th.
struct Tiles {
    int first_label, last_label, number, step, count;

    __device__ __forceinline__ Tiles(const Arguments& a, int number, int step)
        : first_label(a.first_label), last_label(a.last_label), number(number), step(step),
          count((a.last_label - a.first_label + LABELS - 1) / LABELS) {}

    __device__ __forceinline__ bool any() const { return number < count; }
    __device__ __forceinline__ void next() { number += step; }
    __device__ __forceinline__ int label(int row) const { return first_label + number * LABELS + row; }
    // Whether row `row` of the tile is a label.
    __device__ __forceinline__ bool has(int row) const { return any() && label(row) < last_label; }
};

// One row of a matrix of ROWS rows in shared memory, addressed by feature.
template <int ROWS = LABELS>
struct DenseRow {
    uint8_t* elements;
    uint32_t swizzle;

    // first_feature: the matrix's first feature, a multiple of 64.
    __device__ __forceinline__ DenseRow(bfloat16* matrix, int row, int first_feature = 0)
        : elements(reinterpret_cast<uint8_t*>(matrix + row * ROW_SIZE - first_feature * ROWS)), swizzle((row & 7) * 8) {}

    __device__ __forceinline__ uint16_t& operator[](uint32_t feature) const {
        const uint32_t column = feature ^ swizzle;
        return *reinterpret_cast<uint16_t*>(elements + 2 * column + column / ROW_SIZE * (2 * (ROWS - 1) * ROW_SIZE));
    }
};

// A warp clears 8 * EIGHTS rows of a part.
template <int EIGHTS>
__device__ __forceinline__ void clear_rows(bfloat16* rows, int lane) {
#pragma unroll
    for (int i = 0; i < 2 * EIGHTS; ++i) reinterpret_cast<uint4*>(rows)[i * 32 + lane] = uint4{0, 0, 0, 0};
}

// Returns the index row of a local label.
__device__ __forceinline__ uint32_t index_row(int label) { return static_cast<uint32_t>(label) / GROUP; }

// The types of stored elements.
using Stored = std::conditional<BF16_WEIGHT, uint16_t, float>::type;
using Index = std::make_unsigned<INDEX>::type;

// Converts a weight to the bits of a bfloat16.
__device__ __forceinline__ uint16_t narrowed(uint16_t x) { return x; }
__device__ __forceinline__ uint16_t narrowed(float x) { return static_cast<uint16_t>(packed(x, 0.0f)); }

__device__ __forceinline__ const Index* index_of(const Arguments& a, int label) {
    return static_cast<const Index*>(a.index) + static_cast<uint64_t>(index_row(label)) * static_cast<uint32_t>(a.fan_in);
}
__device__ __forceinline__ const Stored* weights_of(const Arguments& a, int label) {
    return static_cast<const Stored*>(a.weight) + static_cast<uint64_t>(label) * static_cast<uint32_t>(a.fan_in);
}

// CHUNK neighbouring slots of a row, read and written together. Two 16-bit elements share a register.
template <typename T>
struct alignas(sizeof(T) * CHUNK) Chunk {
    static constexpr int EACH = sizeof(T) == 2 && CHUNK > 1 ? 2 : 1;
    typename std::conditional<EACH == 2, uint32_t, T>::type word[CHUNK / EACH];

    __device__ __forceinline__ static Chunk read(const T* from) { return *reinterpret_cast<const Chunk*>(from); }
    __device__ __forceinline__ void write(T* to) const { *reinterpret_cast<Chunk*>(to) = *this; }
    __device__ __forceinline__ T operator[](int i) const {
        if constexpr (EACH == 1) return word[i];
        else return static_cast<T>(word[i / 2] >> i % 2 * 16);
    }
    // Call in ascending order of i.
    __device__ __forceinline__ void set(int i, T value) {
        if constexpr (EACH == 1) word[i] = value;
        else word[i / 2] = i % 2 ? __byte_perm(word[i / 2], value, 0x5410) : value;
    }
};

// Prefetches a tile's weights, index rows or both to the L2 cache. One thread calls it for each.
__device__ __forceinline__ void prefetch_rows(const Arguments& a, const Tiles& tile, bool weights, bool index) {
    const int first = tile.label(0), end = min(first + LABELS, tile.last_label);
    if (!tile.any()) return;
    const auto from_to = [](const void* from, const void* to) {
        const uintptr_t start = reinterpret_cast<uintptr_t>(from) & ~uintptr_t(15), stop = reinterpret_cast<uintptr_t>(to) & ~uintptr_t(15);
        if (start < stop) prefetch(reinterpret_cast<const void*>(start), static_cast<uint32_t>(stop - start));
    };
    if (weights) from_to(weights_of(a, first), weights_of(a, end));
    if (index) from_to(index_of(a, first), index_of(a, end - 1) + a.fan_in);
}

// The slots of a label that hold the block's features. Loaded long before they are used.
struct Slots {
    int begin = 0, end = 0;

    __device__ __forceinline__ Slots(const Arguments& a, const Tiles& tile, int row, int first_feature) {
        if (!tile.has(row)) return;
        const int part = first_feature / 64;
        const uint16_t* const slots = a.first_slots + static_cast<uint64_t>(index_row(tile.label(row))) * a.columns_of_64 + part;
        begin = slots[0], end = part + PARTS < a.columns_of_64 ? slots[PARTS] : a.fan_in;
    }
};

// A lane's share of those slots: CHUNKS chunks, LANES chunks apart; `next` moves on by STRETCH slots. The first and last chunk of the
// run may hold slots of other blocks, too.
template <int LANES, int CHUNKS>
struct Run {
    static constexpr int STEP = LANES * CHUNK, STRETCH = CHUNKS * STEP;
    int first, before, rest;  // the lane's first slot; relative to it, where the run begins and ends

    __device__ __forceinline__ Run(Slots slots, int lane) {
        forget(slots.begin), forget(slots.end);
        first = slots.begin / CHUNK * CHUNK + lane % LANES * CHUNK;
        before = slots.begin - first, rest = slots.end - first;
    }

    // Whether slot i of chunk k is in the run. Only the first chunk can begin before it.
    __device__ __forceinline__ bool has(int k, int i) const { return k * STEP + i < rest && (k > 0 || CHUNK == 1 || i >= before); }
    __device__ __forceinline__ bool any(int k) const { return k * STEP < rest; }
    __device__ __forceinline__ bool whole(int k) const { return k * STEP + CHUNK <= rest && (k > 0 || before <= 0); }
    // Moves on. Returns whether any lane of the warp has slots left.
    __device__ __forceinline__ bool next() {
        first += STRETCH, before -= STRETCH, rest -= STRETCH;
        return __any_sync(~0u, rest > 0);
    }

    // Loads the lane's chunks of a row.
    template <typename T>
    __device__ __forceinline__ void load(Chunk<T> (&chunks)[CHUNKS], const T* row) const {
        const T* const from = row + first;
#pragma unroll
        for (int k = 0; k < CHUNKS; ++k)
            if (any(k)) chunks[k] = Chunk<T>::read(from + k * STEP);
    }
};

}  // namespace
