// The feature gradient dX = s W of labels whose rows are sparse in memory and dense on the chip: logits.cu has left the slopes s. For GPUs
// of capability 9.0.
//
// A block has TEXTS texts and FEATURES features of dX in registers for as long as it runs. Tiles of LABELS labels pass through, see
// `Pipeline`:
//
//     producers (4 warps, 16 labels each, two lanes a label)    W <- the block's runs of the tile's rows; s comes by bulk copy
//     consumers (8 warps, a warpgroup 64 texts)                 dX += s W, a tile's products under way while the next one's are asked for
//
// Sums have one order: results are the same, bit for bit, from run to run on GPUs of as many multiprocessors.

#include "densify.cuh"

namespace {

constexpr int BUFFERS = 4, PRODUCER_WARPS = 4, THREADS = CONSUMERS + 32 * PRODUCER_WARPS;
constexpr int CONSUMER_REGISTERS = 184, PRODUCER_REGISTERS = 136;  // of the 168 that each of 384 threads begins with
constexpr int LANES = 2, CHUNKS = 32 / CHUNK, STRETCH = LANES * CHUNKS * CHUNK;  // of a label: lanes; a lane's chunks; their slots
static_assert(PARTS <= 4, "the sums must fit the registers");

struct Shared {
    alignas(1024) bfloat16 w[BUFFERS][PARTS][LABELS * ROW_SIZE];
    bfloat16 s[BUFFERS][SLOPES];
    Pipeline<BUFFERS> tiles;
};
static_assert(sizeof(Shared) <= 227 << 10, "a block has no more shared memory");

// The block's part of dX.
struct Part {
    int text_tile, block, blocks, lane, lanes;  // texts; features, and how many such parts; of the blocks with this part

    __device__ __forceinline__ explicit Part(const Arguments& a) {
        blocks = (a.columns_of_64 + PARTS - 1) / PARTS;
        const int parts = a.text_tiles * blocks, part = blockIdx.x % parts;
        text_tile = a.first_text_tile + part / blocks, block = part % blocks;
        lane = blockIdx.x / parts, lanes = gridDim.x / parts;
    }
};

// A lane's chunks of a run, from the `on`-th slot of the run on.
struct Items {
    Chunk<INDEX> index[CHUNKS];
    Chunk<Stored> weight[CHUNKS];

    __device__ __forceinline__ static int slot(const Run& run, int on, int k, int lane) {
        return run.begin + on + (k * LANES + lane % LANES) * CHUNK;
    }

    __device__ __forceinline__ void load(const Arguments& a, const Tiles& tile, int row, const Run& run, int on, int lane) {
        const INDEX* const indices = index_of(a, tile.has(row) ? tile.label(row) : 0);
        const Stored* const weights = weights_of(a, tile.has(row) ? tile.label(row) : 0);
#pragma unroll
        for (int k = 0; k < CHUNKS; ++k) {
            const int first = slot(run, on, k, lane);
            if (first >= run.end) continue;
            index[k] = Chunk<INDEX>::read(indices + first);
            weight[k] = Chunk<Stored>::read(weights + first);
        }
    }

    __device__ __forceinline__ void spread(const DenseRow<>& to, const Run& run, int first_feature, int on, int lane) const {
#pragma unroll
        for (int k = 0; k < CHUNKS; ++k) {
            if (slot(run, on, k, lane) >= run.end) continue;
#pragma unroll
            for (int i = 0; i < CHUNK; ++i) {
                const uint32_t feature = index[k][i] - first_feature;
                if (feature < FEATURES) to[feature] = narrowed(weight[k][i]);
            }
        }
    }
};

__device__ __forceinline__ void produce(Shared& shared, const Arguments& a) {
    const int thread = threadIdx.x - CONSUMERS, warp = thread / 32, lane = thread % 32, row = thread / LANES;
    const Part part(a);
    const int first_feature = part.block * FEATURES;
    const bool fetches = blockIdx.x % (a.text_tiles * part.blocks) == 0;  // for all blocks that take the same tiles
    Pipeline<BUFFERS>::Turn turn;
    Tiles tile(a, part.lane, part.lanes), after = tile, ahead = tile;
#pragma unroll 1
    for (int i = 0; i < BUFFERS; ++i, ahead.next()) prefetch_rows(a, ahead, fetches && thread == 0, fetches && thread == 32);
    after.next();
    Run run(a, tile, row, first_feature), run_after(a, after, row, first_feature);
    Items now, next;
    now.load(a, tile, row, run, 0, lane);
#pragma unroll 1
    for (; tile.any(); turn.next(), ahead.next()) {
        prefetch_rows(a, ahead, fetches && thread == 0, fetches && thread == 32);
        next.load(a, after, row, run_after, 0, lane);  // on its way while this tile is spread
        Tiles two_on = after;
        two_on.next();
        const Run run_two_on(a, two_on, row, first_feature);
        shared.tiles.await_free(turn);
        if (thread == 0) {
            const int64_t pair = static_cast<int64_t>(tile.number) * (a.columns / TEXTS) + part.text_tile;
            arrive_expecting(shared.tiles.full[turn.buffer], SLOPES * sizeof(bfloat16));
            fetch_bulk(shared.s[turn.buffer], a.slopes + pair * SLOPES, SLOPES * sizeof(bfloat16), shared.tiles.full[turn.buffer]);
        }
#pragma unroll
        for (int i = 0; i < PARTS; ++i) clear_rows<2>(shared.w[turn.buffer][i] + warp * (16 * ROW_SIZE), lane);
        __syncwarp();
        const DenseRow<> to(shared.w[turn.buffer][0], row);
        now.spread(to, run, first_feature, 0, lane);
        for (int on = STRETCH; run.begin + on < run.end; on += STRETCH) {
            now.load(a, tile, row, run, on, lane);
            now.spread(to, run, first_feature, on, lane);
        }
        publish_shared();
        __syncwarp();
        if (lane == 0 && thread) arrive(shared.tiles.full[turn.buffer]);
        tile = after, after = two_on, now = next, run = run_after, run_after = run_two_on;
    }
}

__device__ __forceinline__ void consume(Shared& shared, const Arguments& a) {
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
    const Part part(a);
    float dx[PARTS * 8][4] = {};
    Pipeline<BUFFERS>::Turn turn;
    int before = -1;  // the buffer whose products are under way
#pragma unroll 1
    for (Tiles tile(a, part.lane, part.lanes); tile.any(); tile.next(), turn.next()) {
        shared.tiles.await_full(turn);
        pin(dx);
        begin_products();
#pragma unroll
        for (int k = 0; k < LABELS / 16; ++k) {
            const uint64_t s = matrix(shared.s[turn.buffer]) + warp / 4 * (64 * 128 / 16) + k * NEXT;
            multiply<false, true>(dx, s, matrix<sizeof(shared.w[0][0])>(shared.w[turn.buffer]) + k * NEXT_ROWS, true);
        }
        commit_products();
        await_products<1>();
        if (lane == 0 && before >= 0) arrive(shared.tiles.free[before]);
        before = turn.buffer;
    }
    await_products<0>();
    pin(dx);
    const int pitch = part.blocks * FEATURES, row = part.text_tile * TEXTS + warp * 16 + lane / 4;
    float* const sums = a.dx + (static_cast<int64_t>(part.lane) * a.columns + row) * pitch + part.block * FEATURES + lane % 4 * 2;
#pragma unroll
    for (int high = 0; high < 2; ++high)
#pragma unroll
        for (int i = 0; i < PARTS * 8; ++i) {
            float2& sum = *reinterpret_cast<float2*>(sums + 8 * high * pitch + 8 * i);
            sum = make_float2(sum.x + dx[i][2 * high], sum.y + dx[i][2 * high + 1]);
        }
}

__global__ void __launch_bounds__(THREADS, 1) step_kernel(const Arguments a) {
    extern __shared__ __align__(1024) uint8_t memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    if (threadIdx.x == 0) shared.tiles.start(PRODUCER_WARPS, CONSUMERS / 32);
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
