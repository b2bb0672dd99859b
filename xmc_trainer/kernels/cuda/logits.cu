// Computes the logits of sparse rows, and from them losses and slopes or, for rankings, each text's largest logit in every BLOCK labels
// (see topk.py). For GPUs of capability 9.0.
//
// A block keeps TEXTS texts of X: two warpgroups hold 64 texts each in registers, and what does not fit in shared memory. So products
// read mostly W from shared memory. Tiles of LABELS labels pass through a `Pipeline`:
//
//     producers (4 warps, 16 labels each)     W <- rows of the tile
//     consumers (8 warps, 16 texts each)      z = X W^T + bias; free the buffer; loss += sum loss(z, y), slopes <- dloss/dz; or best
//
//     barrier          who arrives                        bytes   who waits       what then holds
//     __syncthreads    all                                        all             the mbarriers are initialised
//     OF_CONSUMERS     consumers                                  consumers       products may read x in shared memory
//     tiles.full[i]    a lane of each of 4 producer warps  0      each consumer   buffer i holds w, bias and bits of the next tile: each lane has
//                                                                                 published its writes, then synchronised with its warp
//     tiles.free[i]    a lane of each of 8 consumer warps  0      each producer   buffer i is free: its products are done, and every lane of the
//                                                                                 warp has its bits and biases in registers
//     __syncwarp       producers                                  the same        w is cleared before it is written
//
// The two warpgroups do not wait for each other: one multiplies while the other works on its logits.
//
// With more than 768 features, each launch takes a slice of them and reads the logits over earlier slices from `partial_in`.
//
// Compile with -D, besides those of densify.cuh: FAN_IN, LOSS, BEST (find the largest logits), SLICED (there are several slices).

#include "densify.cuh"
#include "losses.cuh"

namespace {

constexpr int TILES = BLOCK / LABELS;  // tiles that share a largest logit
constexpr int BUFFERS = 2, PRODUCER_WARPS = 4, OWN = LABELS / PRODUCER_WARPS, THREADS = CONSUMERS + 32 * PRODUCER_WARPS;
constexpr int CONSUMER_REGISTERS = 224, PRODUCER_REGISTERS = 56;  // each of the 384 threads begins with 168
constexpr int IN_REGISTERS = FEATURES < 640 ? FEATURES : 640, KEPT = (FEATURES - IN_REGISTERS) / 64;  // features; parts in shared memory
// CHUNKS in a row. A warp reads its labels' chunks in ROUNDS rounds, WINDOW of them in flight.
constexpr int CHUNKS = FAN_IN / CHUNK, WINDOW = (BF16_WEIGHT ? 32 : 16) / CHUNK;
constexpr int ROUNDS = ((OWN * CHUNKS + 31) / 32 + WINDOW - 1) / WINDOW * WINDOW;
static_assert(FEATURES <= 768 && FAN_IN % CHUNK == 0, "see above");

struct Shared {
    alignas(1024) bfloat16 w[BUFFERS][PARTS][LABELS * ROW_SIZE];
    bfloat16 x[KEPT ? KEPT : 1][KEPT ? TEXTS * ROW_SIZE : 8];
    alignas(8) float bias[BUFFERS][LABELS];
    uint32_t bits[BUFFERS][TEXTS / 32][LABELS];
    Pipeline<BUFFERS> tiles;
};
static_assert(sizeof(Shared) <= 227 << 10, "a block has no more shared memory");

// The tiles of labels that a block takes: the TILES tiles of a run of BLOCK labels follow each other.
struct BlockTiles : Tiles {
    int text_tile, sub = 0;

    __device__ __forceinline__ explicit BlockTiles(const Arguments& a)
        : Tiles(a, blockIdx.x / a.text_tiles * TILES, gridDim.x / a.text_tiles * TILES),
          text_tile(a.first_text_tile + blockIdx.x % a.text_tiles) {}

    __device__ __forceinline__ void next() {
        ++number;
        if (++sub == TILES) sub = 0, number += step - TILES;
    }
};

// A lane's reads. The rows that a warp takes of a tile form one sequence of chunks, of which the lane reads every 32nd.
struct Stream {
    const Index* index;
    const Stored* weight;
    int label, place, end;  // the label of the warp's first row; the lane's next chunk; the number of chunks

    // Returns how many chunks the rows of the thread's warp have.
    __device__ __forceinline__ static int chunks(const BlockTiles& tile, int thread) {
        return tile.any() ? max(0, min(OWN, tile.last_label - tile.label(thread / 32 * OWN))) * CHUNKS : 0;
    }

    __device__ __forceinline__ Stream(const Arguments& a, const BlockTiles& tile, int thread) {
        const int lane = thread % 32;
        end = chunks(tile, thread), place = lane;
        label = end ? tile.label(thread / 32 * OWN) : 0;
        index = index_of(a, label) + lane * CHUNK, weight = weights_of(a, label) + lane * CHUNK;
    }

    // Reads WINDOW chunks. free(i) is called before items[i] is overwritten.
    template <typename Items, typename Free>
    __device__ __forceinline__ void read(const Arguments& a, Items& items, Free free) {
#pragma unroll
        for (int i = 0; i < WINDOW; ++i) {
            free(i);
            const int there = place + i * 32;
            if (there >= end) continue;
            const Index* from = index + i * 32 * CHUNK;
            if (GROUP > 1) from = index_of(a, label + there / CHUNKS) + there % CHUNKS * CHUNK;
            items[i].index = Chunk<Index>::read(from);
            items[i].weight = Chunk<Stored>::read(weight + i * 32 * CHUNK);
        }
        place += WINDOW * 32, index += WINDOW * 32 * CHUNK, weight += WINDOW * 32 * CHUNK;
    }
};

struct Item {
    Chunk<Index> index;
    Chunk<Stored> weight;

    __device__ __forceinline__ void densify(bfloat16* w, const Arguments& a, uint32_t row) const {
        const DenseRow<> to(w, row);
#pragma unroll
        for (int i = 0; i < CHUNK; ++i) {
            const uint32_t feature = SLICED ? index[i] - static_cast<uint32_t>(a.first_feature) : index[i];
            if (!SLICED || feature < FEATURES) to[feature] = narrowed(weight[i]);
        }
    }
};

__device__ __forceinline__ void produce(Shared& shared, const Arguments& a) {
    int thread = threadIdx.x - CONSUMERS;
    Pipeline<BUFFERS>::Turn turn;
    BlockTiles tile(a);
    prefetch_rows(a, tile, thread == 0, thread == 32);
    Stream stream(a, tile, thread);
    Item items[WINDOW];
    stream.read(a, items, [](int) {});
#pragma unroll 1
    for (BlockTiles after = tile; tile.any(); tile = after, turn.next()) {
        after.next();
        prefetch_rows(a, after, thread == 0, thread == 32);
        forget(thread);  // or values derived from it would occupy registers throughout the loop
        // Padding labels have no loss and no slope, and are never best.
        float bias = BEST ? -INFINITY : -1e30f;
        if (thread < LABELS && tile.has(thread)) bias = a.bias && !a.partial_in ? a.bias[tile.label(thread)] : 0.0f;
        uint2 bits{};
        const int row = thread / 2, word = thread % 2 * 2;
        if (a.bits && tile.has(row))
            bits = *reinterpret_cast<const uint2*>(
                a.bits + static_cast<int64_t>(tile.label(row) - tile.first_label) * (a.columns / 32) + tile.text_tile * (TEXTS / 32) + word);
        shared.tiles.await_free(turn);
        if (thread < LABELS) shared.bias[turn.buffer][thread] = bias;
        shared.bits[turn.buffer][word][row] = bits.x, shared.bits[turn.buffer][word + 1][row] = bits.y;
        forget(thread);
#pragma unroll
        for (int part = 0; part < PARTS; ++part)
            clear_rows<OWN / 8>(shared.w[turn.buffer][part] + thread / 32 * (OWN * ROW_SIZE), thread % 32);
        __syncwarp();
        // Each chunk that is written to w makes room for the load of another, in the last rounds for one of the next tile.
        const int end = Stream::chunks(tile, thread);
#pragma unroll 1
        for (int place = 0; place < ROUNDS * 32; place += WINDOW * 32) {
            forget(thread);
            if (place + WINDOW * 32 >= ROUNDS * 32) stream = Stream(a, after, thread);
            stream.read(a, items, [&](int i) {
                const uint32_t here = place + i * 32 + thread % 32;
                if (here < end) items[i].densify(shared.w[turn.buffer][0], a, thread / 32 * OWN + here / CHUNKS);
            });
        }
        publish_shared();
        __syncwarp();
        if (thread % 32 == 0) arrive(shared.tiles.full[turn.buffer]);
    }
}

// A thread has the texts `row` and `row + 8` of a tile. Its z[n][2 high + j] is for text row + 8 high and label 8 n + lane % 4 * 2 + j.
using Logits = float[LABELS / 8][4];

struct Consumer {
    Shared& shared;
    const Arguments& a;
    const int warp, lane;
    BlockTiles tile;
    const int row;
    uint32_t x[IN_REGISTERS / 16][4];

    __device__ __forceinline__ Consumer(Shared& shared, const Arguments& a)
        : shared(shared), a(a), warp(__shfl_sync(~0u, threadIdx.x / 32, 0)), lane(threadIdx.x % 32), tile(a), row(warp * 16 + lane / 4) {
        const bfloat16* const texts = a.x + static_cast<int64_t>(tile.text_tile) * (TEXTS * FEATURES);
#pragma unroll
        for (int k = 0; k < IN_REGISTERS / 16; ++k)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                x[k][i] = *reinterpret_cast<const uint32_t*>(texts + (row + i % 2 * 8) * FEATURES + 16 * k + lane % 4 * 2 + i / 2 * 8);
        for (int i = threadIdx.x; KEPT && i < KEPT * TEXTS * ROW; i += CONSUMERS) {
            constexpr int CHUNKS_A_TEXT = KEPT ? KEPT * ROW : 1;
            const int text = i / CHUNKS_A_TEXT, chunk = i % CHUNKS_A_TEXT;
            *reinterpret_cast<uint4*>(shared.x[chunk / ROW] + place<ROW>(text, chunk % ROW)) =
                *reinterpret_cast<const uint4*>(texts + text * FEATURES + IN_REGISTERS + chunk * 8);
        }
        publish_shared();
        meet<CONSUMERS>(OF_CONSUMERS);
    }

    // The number of this tile of labels and texts in `slopes` and the partial logits.
    __device__ __forceinline__ int64_t pair() const { return static_cast<int64_t>(tile.number) * (a.columns / TEXTS) + tile.text_tile; }

    // The place of partial logits. A warp's lanes are contiguous, so accesses coalesce.
    __device__ __forceinline__ int64_t place_of_partial(int n) const { return pair() * SLOPES + ((warp * ROW + n) * 32 + lane) * 4; }

    // Computes z = X W^T + bias. Returns the bitmap's bits: bit 4 n + 2 high + j is for z[n][2 high + j].
    __device__ __forceinline__ uint32_t multiply_logits(Logits& z, Pipeline<BUFFERS>::Turn& turn) {
        shared.tiles.await_full(turn);
        const float* const biases = shared.bias[turn.buffer] + lane % 4 * 2;
#pragma unroll
        for (int n = 0; n < LABELS / 8; ++n) {
            const float2 bias = *reinterpret_cast<const float2*>(biases + 8 * n);
            z[n][0] = z[n][2] = bias.x, z[n][1] = z[n][3] = bias.y;
            if (!SLICED || !a.partial_in) continue;
            const float4 before = *reinterpret_cast<const float4*>(a.partial_in + place_of_partial(n));
            z[n][0] += before.x, z[n][1] += before.y, z[n][2] += before.z, z[n][3] += before.w;
        }
        pin(z);
        begin_products();
#pragma unroll
        for (int k = 0; k < FEATURES / 16; ++k) {
            const uint64_t w = matrix(shared.w[turn.buffer][k / 4]) + k % 4 * NEXT;
            if (k < IN_REGISTERS / 16) {
                multiply<false>(z, x[k], w, true);
            } else {
                const bfloat16* const kept = shared.x[k / 4 - IN_REGISTERS / 64];
                multiply<false, false>(z, matrix(kept) + warp / 4 * (64 * 128 / 16) + k % 4 * NEXT, w, true);
            }
        }
        commit_products();
        const uint32_t* const words = shared.bits[turn.buffer][warp / 2] + lane % 4 * 2;
        uint32_t found = 0;
        uint2 word[LABELS / 8];
#pragma unroll
        for (int n = 0; n < LABELS / 8; ++n) {
            word[n] = *reinterpret_cast<const uint2*>(words + 8 * n);
            found |= word[n].x | word[n].y;
        }
        uint32_t bits = 0;
        if (__any_sync(~0u, found >> warp % 2 * 16 & 0xFFFF)) {
            const int first = warp % 2 * 16 + lane / 4;
#pragma unroll
            for (int n = 0; n < LABELS / 8; ++n)
#pragma unroll
                for (int high = 0; high < 2; ++high)
                    bits |= (word[n].x >> (first + 8 * high) & 1 | (word[n].y >> (first + 8 * high) & 1) << 1) << (4 * n + 2 * high);
        }
        await_products<0>();
        pin(z);
        __syncwarp();
        if (lane == 0) arrive(shared.tiles.free[turn.buffer]);
        turn.next();
        return bits;
    }

    __device__ __forceinline__ void keep_partial(const Logits& z) const {
#pragma unroll
        for (int n = 0; n < LABELS / 8; ++n)
            *reinterpret_cast<float4*>(a.partial_out + place_of_partial(n)) = make_float4(z[n][0], z[n][1], z[n][2], z[n][3]);
    }

    // Writes slopes and their sums over the warp's texts to device memory. Adds the losses of the thread's two texts to `loss`.
    __device__ __forceinline__ void slopes(const Logits& z, uint32_t positive, float (&loss)[2]) const {
        const int first_text = tile.text_tile * TEXTS;
        bfloat16* const to = a.slopes + pair() * SLOPES + row * ROW_SIZE;
        const bool real = first_text + warp * 16 + 15 < a.texts;  // the warp has no padding columns
        constexpr int TOGETHER = 4;
#pragma unroll
        for (int first = 0; first < LABELS / 8; first += TOGETHER) {
            float slope[TOGETHER][4], p[2] = {};
#pragma unroll
            for (int i = 0; i < TOGETHER; ++i)
#pragma unroll
                for (int j = 0; j < 4; ++j) slope[i][j] = slope_of_negative(z[first + i][j], p[j / 2]);
            if (__all_sync(~0u, real && positive >> 4 * first << 16 == 0 && !overflowed(p[0]) && !overflowed(p[1]))) {
#pragma unroll
                for (int high = 0; high < 2; ++high) loss[high] += loss_of_negatives(p[high]);
            } else {
#pragma unroll
                for (int i = 0; i < TOGETHER; ++i)
#pragma unroll
                    for (int j = 0; j < 4; ++j) {
                        const bool is_text = first_text + row + 8 * (j / 2) < a.texts;
                        slope[i][j] = slope_of_any(z[first + i][j], positive >> (4 * (first + i) + j) << 31, is_text, loss[j / 2]);
                    }
            }
#pragma unroll
            for (int high = 0; high < 2; ++high) {
                uint32_t words[4];
#pragma unroll
                for (int i = 0; i < TOGETHER; ++i) words[i] = packed(slope[i][2 * high], slope[i][2 * high + 1]);
                exchange_words(words);  // now a lane has eight labels of one text: chunk first + lane % 4
                store_words(to + high * (8 * ROW_SIZE) + ((first + lane % 4) ^ (row & 7)) * 8, words);
            }
            if (a.bias_gradient) {
                float sums[2 * TOGETHER];
#pragma unroll
                for (int i = 0; i < TOGETHER; ++i) sums[2 * i] = slope[i][0] + slope[i][2], sums[2 * i + 1] = slope[i][1] + slope[i][3];
                const int which = sum_of_lanes(sums, lane), label = 8 * (first + which / 2) + lane % 4 * 2 + which % 2;
                a.bias_gradient[(tile.text_tile * (TEXTS / 16) + warp) * a.labels_pitch + tile.number * LABELS + label] = sums[0];
            }
        }
    }

    __device__ __forceinline__ void train() {
        Pipeline<BUFFERS>::Turn turn;
        float loss[2] = {};
#pragma unroll 1
        for (; tile.any(); tile.next()) {
            Logits z;
            const uint32_t positive = multiply_logits(z, turn);
            if (SLICED && a.partial_out) keep_partial(z);
            else slopes(z, positive, loss);
        }
        if (SLICED && a.partial_out) return;
#pragma unroll
        for (int high = 0; high < 2; ++high) {
            loss[high] += __shfl_xor_sync(~0u, loss[high], 1);
            loss[high] += __shfl_xor_sync(~0u, loss[high], 2);
            float* const to = a.loss + static_cast<int64_t>(blockIdx.x / a.text_tiles) * a.columns + tile.text_tile * TEXTS + row + 8 * high;
            if (lane % 4 == 0) *to += loss[high];
        }
    }

    __device__ __forceinline__ void rank() {
        Pipeline<BUFFERS>::Turn turn;
#pragma unroll 1
        while (tile.any()) {
            const int block = tile.number / TILES;
            float best[2] = {-INFINITY, -INFINITY};
#pragma unroll 1
            do {
                Logits z;
                const uint32_t skipped = multiply_logits(z, turn);
                if (SLICED && a.partial_out) keep_partial(z);
#pragma unroll
                for (int n = 0; n < LABELS / 8; ++n)
#pragma unroll
                    for (int j = 0; j < 4; ++j)
                        if (!(skipped >> (4 * n + j) & 1)) best[j / 2] = fmaxf(best[j / 2], z[n][j]);
                tile.next();
            } while (tile.sub && tile.any());
            if (tile.sub) return finish(block, best);
            finish(block, best);
        }
    }

    __device__ __forceinline__ void finish(int block, float (&best)[2]) const {
#pragma unroll
        for (int high = 0; high < 2; ++high) {
            best[high] = fmaxf(best[high], __shfl_xor_sync(~0u, best[high], 1));
            best[high] = fmaxf(best[high], __shfl_xor_sync(~0u, best[high], 2));
            float* const to = a.loss + static_cast<int64_t>(block) * a.columns + tile.text_tile * TEXTS + row + 8 * high;
            if (lane % 4 == 0 && !(SLICED && a.partial_out)) *to = best[high];
        }
    }
};

__device__ __forceinline__ void run(Shared& shared, const Arguments& a) {
    if (threadIdx.x == 0) shared.tiles.start(PRODUCER_WARPS, CONSUMERS / 32);
    __syncthreads();
    if (threadIdx.x < CONSUMERS) {
        take_registers<CONSUMER_REGISTERS>();
        Consumer consumer(shared, a);
        if constexpr (BEST) consumer.rank();
        else consumer.train();
    } else {
        give_registers<PRODUCER_REGISTERS>();
        produce(shared, a);
    }
}

}  // namespace

#include "launch.cuh"
