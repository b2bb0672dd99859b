// Computes the feature gradient dX = s W of sparse rows, from the slopes s of logits.cu. For GPUs of capability 9.0.
//
// A block keeps dX of TEXTS texts and FEATURES features in registers. Tiles of LABELS labels pass through a `Pipeline`:
//
//     producers (4 warps, 2 lanes a label; or 8 warps, 4 lanes)   W <- the block's features of the tile's rows; a bulk copy brings s
//     consumers (8 warps; a warpgroup takes 64 texts)             dX += s W; one tile's products run while the next tile's are issued
//
//     barrier          who arrives                        bytes   who waits       what then holds
//     __syncthreads    all                                        all             the mbarriers are initialised
//     tiles.full[i]    a lane of each producer warp        0      each consumer   buffer i holds w and s of the next tile: each lane has published
//                      one for s's bulk copy              16 Ki                   its writes of w, then synchronised with its warp
//     tiles.free[i]    a lane of each of 8 consumer warps  0      each producer   buffer i is free: the warp's products of its tile are done, and
//                                                                                 only those of the next tile are pending
//     __syncwarp       producers                                  the same        w is cleared before it is written
//
// The order of sums is fixed by the number of multiprocessors: results repeat bit for bit on equal GPUs.

#include "densify.cuh"

namespace {

// With four parts the products take longer than the producers, so four producer warps are enough.
constexpr int BUFFERS = 4, PRODUCER_WARPS = PARTS == 4 ? 4 : 8, THREADS = CONSUMERS + 32 * PRODUCER_WARPS;
constexpr int CONSUMER_REGISTERS = PARTS == 4 ? 184 : 152, PRODUCER_REGISTERS = PARTS == 4 ? 136 : 104;
constexpr int ROWS_A_WARP = LABELS / PRODUCER_WARPS, LANES = 32 / ROWS_A_WARP, CHUNKS = 64 / (LANES * CHUNK);  // lanes for a label
using LabelRun = Run<LANES, CHUNKS>;
static_assert(PARTS <= 4, "the sums must fit the registers");

struct Shared {
    alignas(1024) bfloat16 w[BUFFERS][PARTS][LABELS * ROW_SIZE];
    bfloat16 s[BUFFERS][SLOPES];
    Pipeline<BUFFERS> tiles;
};
static_assert(sizeof(Shared) <= 227 << 10, "a block has no more shared memory");

// The block's part of dX. `lanes` thread blocks share a part and its labels; this is the `lane`-th of them.
struct BlockShare {
    int text_tile, block, blocks, lane, lanes;  // block: which of the `blocks` runs of FEATURES features

    __device__ __forceinline__ explicit BlockShare(const Arguments& a) {
        blocks = (a.columns_of_64 + PARTS - 1) / PARTS;
        const int parts = a.text_tiles * blocks, part = blockIdx.x % parts;
        text_tile = a.first_text_tile + part / blocks, block = part % blocks;
        lane = blockIdx.x / parts, lanes = gridDim.x / parts;
    }
};

// A lane's share of a label's row.
struct Items {
    Chunk<Index> index[CHUNKS];
    Chunk<Stored> weight[CHUNKS];

    __device__ __forceinline__ void load(const Arguments& a, const Tiles& tile, int row, const LabelRun& run) {
        const int label = tile.has(row) ? tile.label(row) : 0;
        run.load(index, index_of(a, label));
        run.load(weight, weights_of(a, label));
    }

    __device__ __forceinline__ void densify(const DenseRow<>& to, const LabelRun& run) const {
#pragma unroll
        for (int k = 0; k < CHUNKS; ++k)
#pragma unroll
            for (int i = 0; i < CHUNK; ++i)
                if (run.has(k, i)) to[index[k][i]] = narrowed(weight[k][i]);
    }
};

__device__ __forceinline__ void produce(Shared& shared, const Arguments& a) {
    const int thread = threadIdx.x - CONSUMERS, warp = thread / 32, lane = thread % 32, row = thread / LANES;
    const BlockShare part(a);
    const int first_feature = part.block * FEATURES;
    const bool fetches = blockIdx.x % (a.text_tiles * part.blocks) == 0;  // one block for all that take the same tiles
    Pipeline<BUFFERS>::Turn turn;
    Tiles tile(a, part.lane, part.lanes), after = tile, ahead = tile;
#pragma unroll 1
    for (int i = 0; i < BUFFERS; ++i, ahead.next()) prefetch_rows(a, ahead, fetches && thread == 0, fetches && thread == 32);
    after.next();
    LabelRun run(Slots(a, tile, row, first_feature), lane);
    Slots slots_after(a, after, row, first_feature);
    Items now, next;
    now.load(a, tile, row, run);
#pragma unroll 1
    for (; tile.any(); turn.next(), ahead.next()) {
        prefetch_rows(a, ahead, fetches && thread == 0, fetches && thread == 32);
        const LabelRun run_after(slots_after, lane);
        next.load(a, after, row, run_after);  // in flight while this tile is written to w
        Tiles two_on = after;
        two_on.next();
        slots_after = Slots(a, two_on, row, first_feature);
        Barrier& full = shared.tiles.full[turn.buffer];
        shared.tiles.await_free(turn);
        if (thread == 0) {
            const int64_t pair = static_cast<int64_t>(tile.number) * (a.columns / TEXTS) + part.text_tile;
            arrive_expecting(full, SLOPES * sizeof(bfloat16));
            fetch_bulk(shared.s[turn.buffer], a.slopes + pair * SLOPES, SLOPES * sizeof(bfloat16), full);
        }
#pragma unroll
        for (int i = 0; i < PARTS; ++i) clear_rows<ROWS_A_WARP / 8>(shared.w[turn.buffer][i] + warp * (ROWS_A_WARP * ROW_SIZE), lane);
        __syncwarp();
        const DenseRow<> to(shared.w[turn.buffer][0], row, first_feature);
        now.densify(to, run);
        while (run.next()) {
            now.load(a, tile, row, run);
            now.densify(to, run);
        }
        publish_shared();
        __syncwarp();
        if (lane == 0) arrive(full);
        tile = after, after = two_on, now = next, run = run_after;
    }
}

__device__ __forceinline__ void consume(Shared& shared, const Arguments& a) {
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
    const BlockShare part(a);
    float dx[PARTS * 8][4] = {};
    Pipeline<BUFFERS>::Turn turn;
    int before = -1;  // the buffer whose products are pending
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

__device__ __forceinline__ void run(Shared& shared, const Arguments& a) {
    if (threadIdx.x == 0) shared.tiles.start(PRODUCER_WARPS + 1, CONSUMERS / 32);
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
