// Computes the weight gradient of sparse rows at the features that they read, (s^T X)[index], from the slopes s of logits.cu. For GPUs of
// capability 9.0.
//
// A block keeps FEATURES features of X in shared memory, for all texts of the launch. Two warpgroups alternate between tiles of LABELS
// labels: one gathers while the other multiplies.
//
//     producers (a thread for each warpgroup)   bulk copies of s, for each tile of labels one tile of texts after another; see `Pipeline`
//     consumers (two warpgroups)                dW = sum over tiles of texts of s^T X; dW to shared memory as bfloat16; gradient <- dW[index]
//
//     barrier             who arrives                        bytes   who waits     what then holds
//     __syncthreads       all                                        all           the mbarriers are initialised
//     OF_CONSUMERS        consumers                                  consumers     products may read x
//     tiles[w].full[i]    the producer, with the bulk copy   16 Ki   warpgroup w   buffer i holds s of the next tile of labels and texts
//     tiles[w].free[i]    a lane of each of its 4 warps       0      the producer  buffer i is free: the warp's products that read it are done
//     OF_WARPGROUP + w    warpgroup w                                warpgroup w   first: dw of the previous tile is gathered and may be
//                                                                                  overwritten; second: dw of this tile may be gathered
//
// Compile with -D, besides those of densify.cuh: TEXT_TILES (most in a launch), GRADIENT (bfloat16, or float if launches add to it).

#include "densify.cuh"

namespace {

constexpr int BUFFERS = 2, THREADS = CONSUMERS + 128;
constexpr int CONSUMER_REGISTERS = 224, PRODUCER_REGISTERS = 40;
constexpr int LANES = 2, CHUNKS = 32 / CHUNK;  // for a label: a warpgroup's 128 lanes gather the 64 labels of a tile
using LabelRun = Run<LANES, CHUNKS>;
constexpr bool BF16_GRADIENT = sizeof(GRADIENT) == 2;
using StoredGradient = std::conditional<BF16_GRADIENT, uint16_t, float>::type;
static_assert(PARTS <= 4, "the sums must fit the registers");

struct Shared {
    alignas(1024) bfloat16 x[PARTS][TEXT_TILES * TEXTS * ROW_SIZE];
    bfloat16 s[2][BUFFERS][SLOPES];  // for each warpgroup
    bfloat16 dw[2][PARTS][LABELS * ROW_SIZE];
    Pipeline<BUFFERS> tiles[2];
};
static_assert(sizeof(Shared) <= 227 << 10, "a block has no more shared memory");

// block: which run of FEATURES features the thread block has. `lanes` thread blocks share it; this is the `lane`-th of them.
struct BlockShare {
    int block, lane, lanes;

    __device__ __forceinline__ explicit BlockShare(const Arguments& a) {
        const int blocks = (a.columns_of_64 + PARTS - 1) / PARTS;
        block = blockIdx.x % blocks, lane = blockIdx.x / blocks, lanes = gridDim.x / blocks;
    }
};

// The tiles of one warpgroup: every second tile of the block.
__device__ __forceinline__ Tiles tiles_of(const Arguments& a, const BlockShare& part, int warpgroup) {
    return Tiles(a, part.lane + warpgroup * part.lanes, 2 * part.lanes);
}

__device__ __forceinline__ void produce(Shared& shared, const Arguments& a, int warpgroup) {
    const BlockShare part(a);
    Pipeline<BUFFERS>& pipeline = shared.tiles[warpgroup];
    Pipeline<BUFFERS>::Turn turn;
    Tiles ahead = tiles_of(a, part, warpgroup);
    if (part.block == 0) prefetch_rows(a, ahead, false, true);
#pragma unroll 1
    for (Tiles tile = ahead; tile.any(); tile.next()) {
        ahead.next();
        if (part.block == 0) prefetch_rows(a, ahead, false, true);
#pragma unroll 1
        for (int text_tile = 0; text_tile < a.text_tiles; ++text_tile, turn.next()) {
            pipeline.await_free(turn);
            const int64_t pair = static_cast<int64_t>(tile.number) * (a.columns / TEXTS) + a.first_text_tile + text_tile;
            arrive_expecting(pipeline.full[turn.buffer], SLOPES * sizeof(bfloat16));
            fetch_bulk(shared.s[warpgroup][turn.buffer], a.slopes + pair * SLOPES, SLOPES * sizeof(bfloat16), pipeline.full[turn.buffer]);
        }
    }
}

// A lane's share of a label's index row.
struct Items {
    Chunk<Index> index[CHUNKS];

    __device__ __forceinline__ void load(const Arguments& a, const Tiles& tile, int row, const LabelRun& run) {
        run.load(index, index_of(a, tile.has(row) ? tile.label(row) : 0));
    }

    // Writes from[index] to the label's gradient, `to`.
    __device__ __forceinline__ void gather(StoredGradient* to, const DenseRow<>& from, const Arguments& a, const LabelRun& run) const {
        StoredGradient* const there = to + run.first;
        uint16_t value[CHUNKS][CHUNK];  // all loads are issued before the first value is used
#pragma unroll
        for (int k = 0; k < CHUNKS; ++k)
#pragma unroll
            for (int i = 0; i < CHUNK; ++i) {
                value[k][i] = 0;
                if (run.has(k, i)) value[k][i] = from[index[k][i]];
            }
#pragma unroll
        for (int k = 0; k < CHUNKS; ++k) {
            Chunk<StoredGradient> found;
#pragma unroll
            for (int i = 0; i < CHUNK; ++i) {
                if constexpr (BF16_GRADIENT) found.set(i, value[k][i]);
                else found.set(i, __uint_as_float(uint32_t(value[k][i]) << 16) + (a.add && run.has(k, i) ? there[k * LabelRun::STEP + i] : 0.0f));
            }
            if (run.whole(k)) {
                found.write(there + k * LabelRun::STEP);
            } else {
#pragma unroll
                for (int i = 0; i < CHUNK; ++i)
                    if (run.has(k, i)) there[k * LabelRun::STEP + i] = found[i];
            }
        }
    }
};

__device__ __forceinline__ void consume(Shared& shared, const Arguments& a) {
    const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0), thread = threadIdx.x % 128, lane = thread % 32;
    const BlockShare part(a);
    const int first_feature = part.block * FEATURES, pitch = (a.columns_of_64 + PARTS - 1) / PARTS * FEATURES;
    for (int i = threadIdx.x; i < a.text_tiles * TEXTS * (PARTS * ROW); i += CONSUMERS) {
        const int text = i / (PARTS * ROW), chunk = i % (PARTS * ROW);
        const bfloat16* const from = a.x + static_cast<int64_t>(a.first_text_tile * TEXTS + text) * pitch + first_feature + chunk * 8;
        *reinterpret_cast<uint4*>(shared.x[chunk / ROW] + place<ROW>(text, chunk % ROW)) = *reinterpret_cast<const uint4*>(from);
    }
    publish_shared();
    meet<CONSUMERS>(OF_CONSUMERS);

    bfloat16* const dw = shared.dw[warpgroup][0];
    const int row = thread / LANES;
    Pipeline<BUFFERS>& pipeline = shared.tiles[warpgroup];
    Pipeline<BUFFERS>::Turn turn;
    Tiles tile = tiles_of(a, part, warpgroup);
    Slots slots(a, tile, row, first_feature);
#pragma unroll 1
    while (tile.any()) {
        LabelRun run(slots, lane);
        Items items;
        items.load(a, tile, row, run);
        Tiles after = tile;
        after.next();
        slots = Slots(a, after, row, first_feature);
        float grad[PARTS * 8][4];
        int before = -1;
#pragma unroll 1
        for (int text_tile = 0; text_tile < a.text_tiles; ++text_tile, turn.next()) {
            pipeline.await_full(turn);
            pin(grad);
            begin_products();
#pragma unroll
            for (int k = 0; k < TEXTS / 16; ++k) {
                const uint64_t x = matrix<sizeof(shared.x[0])>(shared.x) + (text_tile * (TEXTS / 16) + k) * NEXT_ROWS;
                multiply<true, true>(grad, matrix(shared.s[warpgroup][turn.buffer]) + k * NEXT_ROWS, x, text_tile + k > 0);
            }
            commit_products();
            await_products<1>();
            if (lane == 0 && before >= 0) arrive(pipeline.free[before]);
            before = turn.buffer;
        }
        await_products<0>();
        pin(grad);
        if (lane == 0) arrive(pipeline.free[before]);

        meet<128>(OF_WARPGROUP + warpgroup);
        // store4 writes four 8 x 8 matrices: one chunk of 16 rows, then the next chunk. For an even n, place<ROW>(row, n + 1) is
        // place<ROW>(row, 1) ^ 8 n.
        const int first = place<ROW>(thread / 32 * 16 + lane / 8 % 2 * 8 + lane % 8, lane / 16);
#pragma unroll
        for (int n = 0; n < PARTS * 8; n += 2) {
            uint32_t words[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) words[j] = packed(grad[n + j / 2][j % 2 * 2], grad[n + j / 2][j % 2 * 2 + 1]);
            store4(dw + n / 8 * (LABELS * ROW_SIZE) + (first ^ n % 8 * 8), words);
        }
        meet<128>(OF_WARPGROUP + warpgroup);
        const int64_t local = static_cast<int64_t>(tile.label(row) - tile.first_label);
        StoredGradient* const to = static_cast<StoredGradient*>(a.gradient) + local * a.fan_in;
        const DenseRow<> from(dw, row, first_feature);
        items.gather(to, from, a, run);
        while (run.next()) {
            items.load(a, tile, row, run);
            items.gather(to, from, a, run);
        }
        tile = after;
    }
}

__device__ __forceinline__ void run(Shared& shared, const Arguments& a) {
    if (threadIdx.x == 0) for (auto& pipeline : shared.tiles) pipeline.start(1, 4);
    __syncthreads();
    if (threadIdx.x < CONSUMERS) {
        take_registers<CONSUMER_REGISTERS>();
        consume(shared, a);
    } else {
        give_registers<PRODUCER_REGISTERS>();
        const int warp = (threadIdx.x - CONSUMERS) / 32;
        if (warp < 2 && threadIdx.x % 32 == 0) produce(shared, a, warp);
    }
}

}  // namespace

#include "launch.cuh"
