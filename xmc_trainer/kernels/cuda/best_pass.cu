// Each text's largest logit of every BLOCK labels (see topk.py), for labels that share index rows with few others or none: sparse in
// memory, dense on the chip. For GPUs of capability 9.0, and up to 768 features.
//
// A block has 128 texts for as long as it runs, in the registers of two warpgroups of consumers, 64 texts each (and what registers
// cannot hold in shared memory): of a product's two operands only W is read from there. Tiles of 64 labels pass through:
//
//     producers:  await free (tile); W <- rows of the tile, spread out; arrive at full (tile)
//     consumers:  await full (tile); z_BT = X W^T; arrive at free (tile); best <- max(best, z + bias)
//
// Compiled for one configuration by -D, besides those of rows.cuh: FEATURES (a multiple of 64), FAN_IN; LABELS is 64, WARPS 12.

#include "rows.cuh"

namespace {

constexpr int BLOCK = 128, TILES = BLOCK / LABELS;  // labels of which the largest logit is kept; tiles that have them
constexpr int PARTS = FEATURES / 64, NEXT = 32 / 16;
constexpr int BUFFERS = 2, CONSUMERS = 256, PRODUCER_WARPS = 4, OWN = LABELS / PRODUCER_WARPS;  // labels of a producer's warp
constexpr int CONSUMER_REGISTERS = 224, PRODUCER_REGISTERS = 56;  // of the 168 that each of 384 threads begins with
constexpr int IN_REGISTERS = FEATURES < 640 ? FEATURES : 640, KEPT = (FEATURES - IN_REGISTERS) / 64;  // features, parts of X
constexpr int CHUNKS = FAN_IN / CHUNK, ROUNDS = (OWN * CHUNKS + 31) / 32;  // of a row; in which a warp reads its labels' chunks
constexpr int TOGETHER = 16 / CHUNK;  // chunks that a lane reads before it spreads them
static_assert(LABELS == 64 && WARPS == 12 && FEATURES % 64 == 0 && FEATURES <= 768 && FAN_IN % CHUNK == 0, "see above");

struct Shared {
    alignas(1024) bfloat16 w[BUFFERS][PARTS][LABELS * ROW_SIZE];
    bfloat16 x[KEPT ? KEPT : 1][KEPT ? TEXTS * ROW_SIZE : 8];
    alignas(8) float bias[BUFFERS][LABELS];
    Barrier full[BUFFERS], free[BUFFERS];
};
static_assert(sizeof(Shared) <= 227 << 10, "a block has no more shared memory");

// The tiles of a block, in their order.
struct Tiles {
    int first_label, end_label;  // of all
    int text0, number, step, blocks, sub = 0;

    __device__ __forceinline__ explicit Tiles(const Arguments& a) {
        const int text_tiles = (a.columns + TEXTS - 1) / TEXTS;
        first_label = a.first_row, end_label = a.last_row;
        text0 = blockIdx.x % text_tiles * TEXTS;
        number = blockIdx.x / text_tiles, step = gridDim.x / text_tiles;
        blocks = (end_label - first_label + BLOCK - 1) / BLOCK;
    }

    __device__ __forceinline__ bool any() const { return number < blocks; }
    __device__ __forceinline__ int label0() const { return first_label + number * BLOCK + sub * LABELS; }
    __device__ __forceinline__ void next() {
        if (++sub == TILES) sub = 0, number += step;
    }
};

struct Turn {
    int buffer = 0, parity = 0;

    __device__ __forceinline__ void next() {
        if (++buffer == BUFFERS) buffer = 0, parity ^= 1;
    }
};

// A producer's warp's rows of a tile.
__device__ __forceinline__ void spread(Shared& shared, const Arguments& a, int buffer, int label0, int end_label, int warp, int lane) {
    bfloat16* const w = shared.w[buffer][0];
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
        uint4* const rows = reinterpret_cast<uint4*>(shared.w[buffer][part] + warp * (OWN * ROW_SIZE));
#pragma unroll
        for (int i = 0; i < OWN * ROW / 32; ++i) rows[i * 32 + lane] = uint4{0, 0, 0, 0};
    }
    __syncwarp();
#pragma unroll 1
    for (int round = 0; round < ROUNDS; round += TOGETHER) {
        Chunk<INDEX> index[TOGETHER];
        Chunk<Stored> value[TOGETHER];
        const auto row_of_item = [&](int i) { return ((round + i) * 32 + lane) / CHUNKS; };
        const auto has = [&](int i) { return row_of_item(i) < OWN && label0 + warp * OWN + row_of_item(i) < end_label; };
#pragma unroll
        for (int i = 0; i < TOGETHER; ++i) {
            if (!has(i)) continue;
            const int label = label0 + warp * OWN + row_of_item(i), slot = ((round + i) * 32 + lane) % CHUNKS * CHUNK;
            index[i] = *reinterpret_cast<const Chunk<INDEX>*>(row_of<INDEX>(a.index, a, index_row(a, label)) + slot);
            value[i] = *reinterpret_cast<const Chunk<Stored>*>(row_of<Stored>(a.weight, a, label) + slot);
        }
#pragma unroll
        for (int i = 0; i < TOGETHER; ++i) {
            if (!has(i)) continue;
            const RowOfW<> to(w, warp * OWN + row_of_item(i));
#pragma unroll
            for (int j = 0; j < CHUNK; ++j) to[index[i][j]] = narrowed(value[i][j]);
        }
    }
}

__device__ __forceinline__ void produce(Shared& shared, const Arguments& a) {
    const int thread = threadIdx.x - CONSUMERS, warp = thread / 32, lane = thread % 32;
    Turn turn;
    Tiles ahead(a);  // on its way to the L2 cache
    const auto fetch = [&] {
        const int first = ahead.label0(), end = min(first + LABELS, ahead.end_label);
        if (ahead.any() && first < end && lane == 0 && warp < 2) {
            if (warp == 0) prefetch_rows(a.weight, first, end, sizeof(Stored) * FAN_IN);
            else prefetch_rows(a.index, index_row(a, first), index_row(a, end - 1) + 1, sizeof(INDEX) * FAN_IN);
        }
        ahead.next();
    };
#pragma unroll 1
    for (int i = 0; i < BUFFERS; ++i) fetch();
#pragma unroll 1
    for (Tiles tile(a); tile.any(); tile.next(), turn.next()) {
        fetch();
        const int label0 = tile.label0();
        // No text's largest logit is that of a label past the last one.
        float bias = -INFINITY;
        if (thread < LABELS && label0 + thread < tile.end_label) bias = a.bias ? a.bias[label0 + thread] : 0.0f;
        await(shared.free[turn.buffer], turn.parity ^ 1);
        if (thread < LABELS) shared.bias[turn.buffer][thread] = bias;
        spread(shared, a, turn.buffer, label0, tile.end_label, warp, lane);
        publish_shared();
        __syncwarp();
        if (lane == 0) arrive(shared.full[turn.buffer]);
    }
}

// Whether a pair of a label, counted from the launch's first, and a text is to be left out.
__device__ __forceinline__ bool skipped(const Arguments& a, const Tiles& tiles, int label, int text) {
    if (label >= tiles.end_label - tiles.first_label || text >= a.columns) return false;
    return a.positive[static_cast<int64_t>(label) * (a.columns / 32) + text / 32] >> text % 32 & 1;
}

__device__ __forceinline__ void consume(Shared& shared, const Arguments& a) {
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
    Tiles tile(a);
    const int text = tile.text0 + warp * 16 + lane / 4;  // and 8 on
    uint32_t x[IN_REGISTERS / 16][4];
#pragma unroll
    for (int k = 0; k < IN_REGISTERS / 16; ++k)
#pragma unroll
        for (int i = 0; i < 4; ++i)
            x[k][i] = *reinterpret_cast<const uint32_t*>(
                a.x + static_cast<int64_t>(text + i % 2 * 8) * FEATURES + 16 * k + lane % 4 * 2 + i / 2 * 8);
    for (int i = threadIdx.x; KEPT && i < KEPT * TEXTS * ROW; i += CONSUMERS) {
        constexpr int CHUNKS_A_TEXT = KEPT ? KEPT * ROW : 1;
        const int row = i / CHUNKS_A_TEXT, chunk = i % CHUNKS_A_TEXT;
        const bfloat16* const from = a.x + static_cast<int64_t>(tile.text0 + row) * FEATURES + IN_REGISTERS + chunk * 8;
        *reinterpret_cast<uint4*>(shared.x[chunk / ROW] + place<ROW>(row, chunk % ROW)) = *reinterpret_cast<const uint4*>(from);
    }
    publish_shared();
    meet<CONSUMERS>(1);
    Turn turn;
#pragma unroll 1
    while (tile.any()) {
        const int block = tile.number;
        const bool skips = a.any_positive && a.any_positive[block];
        float best[2] = {-INFINITY, -INFINITY};
#pragma unroll 1
        for (int sub = 0; sub < TILES; ++sub, tile.next(), turn.next()) {
            await(shared.full[turn.buffer], turn.parity);
            float z[LABELS / 8][4];
            pin(z);
            begin_products();
#pragma unroll
            for (int k = 0; k < FEATURES / 16; ++k) {
                const uint64_t w = matrix(shared.w[turn.buffer][k / 4]) + k % 4 * NEXT;
                if (k < IN_REGISTERS / 16) {
                    multiply<false>(z, x[k], w, k > 0);
                } else {
                    const bfloat16* const kept = shared.x[k / 4 - IN_REGISTERS / 64];
                    multiply<false, false>(z, matrix(kept) + warp / 4 * (64 * 128 / 16) + k % 4 * NEXT, w, true);
                }
            }
            end_products();
            pin(z);
#pragma unroll
            for (int n = 0; n < LABELS / 8; ++n) {
                const int own = 8 * n + lane % 4 * 2;
                const float2 bias = *reinterpret_cast<const float2*>(shared.bias[turn.buffer] + own);
#pragma unroll
                for (int high = 0; high < 2; ++high) {
                    float first = z[n][2 * high] + bias.x, second = z[n][2 * high + 1] + bias.y;
                    if (skips) {
                        const int local = block * BLOCK + sub * LABELS + own;
                        if (skipped(a, tile, local, text + 8 * high)) first = -INFINITY;
                        if (skipped(a, tile, local + 1, text + 8 * high)) second = -INFINITY;
                    }
                    best[high] = fmaxf(best[high], fmaxf(first, second));
                }
            }
            __syncwarp();
            if (lane == 0) arrive(shared.free[turn.buffer]);
        }
#pragma unroll
        for (int high = 0; high < 2; ++high) {
            best[high] = fmaxf(best[high], __shfl_xor_sync(~0u, best[high], 1));
            best[high] = fmaxf(best[high], __shfl_xor_sync(~0u, best[high], 2));
            const int here = text + 8 * high;
            if (lane % 4 == 0 && here < a.columns) a.loss[static_cast<int64_t>(block) * a.columns + here] = best[high];
        }
    }
}

__global__ void __launch_bounds__(THREADS, 1) step_kernel(const Arguments a) {
    extern __shared__ __align__(1024) uint8_t memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    if (threadIdx.x == 0) {
        for (Barrier& barrier : shared.full) init(barrier, PRODUCER_WARPS);
        for (Barrier& barrier : shared.free) init(barrier, CONSUMERS / 32);
        publish_barriers();
    }
    __syncthreads();
    if (threadIdx.x < CONSUMERS) {
        take_registers<CONSUMER_REGISTERS>();
        consume(shared, a);
    } else {
        give_registers<PRODUCER_REGISTERS>();
        produce(shared, a);
    }
}

}  // namespace

#include "launch.cuh"
