// What logits.cu, feature_gradient.cu and weight_gradient.cu share: labels' rows are sparse in memory and become dense on the chip.
//
// All three take LABELS labels and TEXTS texts a tile. What one kernel leaves for the next in memory are the slopes of each such pair of
// tiles, 16 KiB in the order in which products read it from shared memory (operands.cuh): a bulk copy brings it there.
//
// Compiled for one configuration by -D: WEIGHT (float or bfloat16), INDEX (int16_t or int32_t), FEATURES (a multiple of 64: those of a
// block), CHUNK (1, 2, 4: slots that are read together, a divisor of the fan-in), GROUPED (labels share index rows), and what each
// file names.

#pragma once

#include <type_traits>

#include "operands.cuh"

namespace {

constexpr int PARTS = FEATURES / 64, CONSUMERS = 256;
constexpr int SLOPES = TEXTS * LABELS;  // of a pair of tiles
constexpr bool BF16_WEIGHT = sizeof(WEIGHT) == 2;
static_assert(FEATURES % 64 == 0 && 4 % CHUNK == 0, "see above");

// Barriers of the block that some of its warps meet at, by number: `meet`. 0 is __syncthreads'.
enum NamedBarrier { OF_CONSUMERS = 1, OF_WARPGROUP };  // OF_WARPGROUP + w: of the w-th


// Buffers that producers fill and consumers free, one after another. The sources say who these are and how they wait.
template <int BUFFERS>
struct Pipeline {
    Barrier full[BUFFERS], free[BUFFERS];

    // Which buffer a tile has, and the parity of the phase in which it has it.
    struct Turn {
        int buffer = 0, parity = 0;
        __device__ __forceinline__ void next() {
            if (++buffer == BUFFERS) buffer = 0, parity ^= 1;
        }
    };

    // By one thread, before all meet.
    __device__ __forceinline__ void start(int producers, int consumers) {
        for (int i = 0; i < BUFFERS; ++i) init(full[i], producers), init(free[i], consumers);
        publish_barriers();
    }
    __device__ __forceinline__ void await_full(const Turn& turn) { await(full[turn.buffer], turn.parity); }
    // At once in the first round: the phase before the first counts as over.
    __device__ __forceinline__ void await_free(const Turn& turn) { await(free[turn.buffer], turn.parity ^ 1); }
};

// The tiles of labels of a block: every `step`-th.
struct Tiles {
    int first_label, last_label, number, step, count;

    __device__ __forceinline__ Tiles(const Arguments& a, int number, int step)
        : first_label(a.first_label), last_label(a.last_label), number(number), step(step),
          count((a.last_label - a.first_label + LABELS - 1) / LABELS) {}

    __device__ __forceinline__ bool any() const { return number < count; }
    __device__ __forceinline__ void next() { number += step; }
    __device__ __forceinline__ int label(int row) const { return first_label + number * LABELS + row; }
    // Whether there is such a label.
    __device__ __forceinline__ bool has(int row) const { return any() && label(row) < last_label; }
};

// A row of a matrix in shared memory of ROWS rows, by feature.
template <int ROWS = LABELS>
struct DenseRow {
    uint8_t* elements;
    uint32_t swizzle;

    // first_feature: that of the matrix, a multiple of 64.
    __device__ __forceinline__ DenseRow(bfloat16* matrix, int row, int first_feature = 0)
        : elements(reinterpret_cast<uint8_t*>(matrix + row * ROW_SIZE - first_feature * ROWS)), swizzle((row & 7) * 8) {}

    __device__ __forceinline__ uint16_t& operator[](uint32_t feature) const {
        const uint32_t column = feature ^ swizzle;
        return *reinterpret_cast<uint16_t*>(elements + 2 * column + column / ROW_SIZE * (2 * (ROWS - 1) * ROW_SIZE));
    }
};

// Zeros to EIGHTS times eight rows of a part.
template <int EIGHTS>
__device__ __forceinline__ void clear_rows(bfloat16* rows, int lane) {
#pragma unroll
    for (int i = 0; i < 2 * EIGHTS; ++i) reinterpret_cast<uint4*>(rows)[i * 32 + lane] = uint4{0, 0, 0, 0};
}

// The index row of a label of this rank: label / group.
__device__ __forceinline__ uint32_t index_row(const Arguments& a, int label) {
    if (!GROUPED) return label;
    return static_cast<uint32_t>(static_cast<uint64_t>(static_cast<uint32_t>(label)) * a.group_factor >> a.group_shift);
}

// Elements as they are stored.
using Stored = std::conditional<BF16_WEIGHT, uint16_t, float>::type;
using Index = std::make_unsigned<INDEX>::type;

// As products take them.
__device__ __forceinline__ uint16_t narrowed(uint16_t x) { return x; }
__device__ __forceinline__ uint16_t narrowed(float x) { return static_cast<uint16_t>(packed(x, 0.0f)); }

__device__ __forceinline__ const Index* index_of(const Arguments& a, int label) {
    return static_cast<const Index*>(a.index) + static_cast<uint64_t>(index_row(a, label)) * static_cast<uint32_t>(a.fan_in);
}
__device__ __forceinline__ const Stored* weights_of(const Arguments& a, int label) {
    return static_cast<const Stored*>(a.weight) + static_cast<uint64_t>(label) * static_cast<uint32_t>(a.fan_in);
}

// CHUNK neighbouring slots of a row, read and written together. Two elements of 16 bits share a register.
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
    // In ascending order of i.
    __device__ __forceinline__ void set(int i, T value) {
        if constexpr (EACH == 1) word[i] = value;
        else word[i / 2] = i % 2 ? __byte_perm(word[i / 2], value, 0x5410) : value;
    }
};

// A tile's rows of weights and index on their way to the L2 cache, each by one thread.
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

// Which slots of a label have the block's features: read from memory long before anything is made of it.
struct Slots {
    int begin = 0, end = 0;

    __device__ __forceinline__ Slots(const Arguments& a, const Tiles& tile, int row, int first_feature) {
        if (!tile.has(row)) return;
        const int part = first_feature / 64;
        const uint16_t* const slots = a.first_slots + static_cast<uint64_t>(index_row(a, tile.label(row))) * a.columns_of_64 + part;
        begin = slots[0], end = part + PARTS < a.columns_of_64 ? slots[PARTS] : a.fan_in;
    }
};

// What a lane has of them: CHUNKS chunks, each LANES chunks after the one before, and those STRETCH slots on, and so on. Chunks at
// the ends of the run have slots of other blocks, too.
template <int LANES, int CHUNKS>
struct Run {
    static constexpr int STEP = LANES * CHUNK, STRETCH = CHUNKS * STEP;
    int first, before, rest;  // the lane's first slot; from it on: slots that come before the run; to the end of the run

    __device__ __forceinline__ Run(Slots slots, int lane) {
        forget(slots.begin), forget(slots.end);
        first = slots.begin / CHUNK * CHUNK + lane % LANES * CHUNK;
        before = slots.begin - first, rest = slots.end - first;
    }

    // Of the i-th slot of the k-th chunk: none but the first chunk begins before the run.
    __device__ __forceinline__ bool has(int k, int i) const { return k * STEP + i < rest && (k > 0 || CHUNK == 1 || i >= before); }
    __device__ __forceinline__ bool any(int k) const { return k * STEP < rest; }
    __device__ __forceinline__ bool whole(int k) const { return k * STEP + CHUNK <= rest && (k > 0 || before <= 0); }
    // Whether there is more of it, in any lane.
    __device__ __forceinline__ bool next() {
        first += STRETCH, before -= STRETCH, rest -= STRETCH;
        return __any_sync(~0u, rest > 0);
    }

    // Chunks of a row of memory.
    template <typename T>
    __device__ __forceinline__ void load(Chunk<T> (&chunks)[CHUNKS], const T* row) const {
        const T* const from = row + first;
#pragma unroll
        for (int k = 0; k < CHUNKS; ++k)
            if (any(k)) chunks[k] = Chunk<T>::read(from + k * STEP);
    }
};

}  // namespace
