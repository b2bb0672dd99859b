// The step of labels that share index rows with so few others that adding each tile's feature gradient to memory would take most
// of the time: features are gathered, as in group_pass.cu, for two of the three products, and rows spread out, as in
// cluster_pass.cu, for the feature gradient, which stays on the chip. For GPUs of capability 9.0, and up to 128 texts.
//
// A cluster of CLUSTER blocks takes a tile after another, of LABELS labels a block, which share an index row. Each block has:
//
//     teams of four warps, each for every TEAMS-th tile, for the block's labels, whose features are gathered from X^T:
//         z^T_BG = x_FB^T w_GF^T + bias     s = dloss/dz, to all blocks     dw^T_FG = x_FB s_GB^T     w, bias <- update
//     spreaders, two warpgroups, for all labels of the tile and the block's SLICE features:
//         W <- rows of the tile, spread out     dX += s^T W
//
// so that rows are read twice: by a team, who updates them once all blocks' spreaders have read them, too. A tile's texts are the
// rows of a team's z, in the order that warpgroup_pass.cu describes, and of dX.
//
//     teams:      await received (tile - TEAMS), and x and w (tile); logits; slopes; gradients of weights; meanwhile x and w
//                 (tile + TEAMS) are on their way, as soon as the other team is done with the place; await free (tile); send slopes;
//                 update
//     spreaders:  spread tile + 1, while products of tile - 1 are made; end these; arrive at free (tile + 1), of all blocks: its
//                 rows are read, and the place of its slopes, which those of tile - 1 had; begin zeros of tile + 2; await
//                 slopes (tile); arrive at received (tile), of all blocks; begin products of tile
//
// Sums have one order: results are the same, bit for bit, from run to run on GPUs that hold as many clusters.
//
// Compiled for one configuration by -D, besides those of tile_math.cuh: CLUSTER (1, 2, 4), SLICE (64, 128, 192), LABELS (8, 16),
// FEATURES (64, 128; F is at most that, and a multiple of 8), CHUNK (4: slots that are read together); WARPS, a team's, is 4.

#include "rows.cuh"

namespace {

constexpr int TEAMS = 2, SPREADERS = 256, BLOCK_THREADS = SPREADERS + TEAMS * THREADS;
constexpr int SPREADER_REGISTERS = 136, TEAM_REGISTERS = 256 - SPREADER_REGISTERS;
constexpr int ALL_FEATURES = CLUSTER * SLICE, PARTS = SLICE / 64, ROWS = CLUSTER * LABELS;  // rows of a tile
constexpr int NEXT = 32 / 16, NEXT_ROWS = 2048 / 16;  // to the next 16 columns, and rows, of an operand
constexpr int EIGHTS = LABELS / 8, SLOT_PARTS = FEATURES / 64, WARP_SLOTS = FEATURES / WARPS;  // of these a warp updates weights
constexpr int ROWS_A_COPY = THREADS / X_PITCH, COPIES = FEATURES / ROWS_A_COPY;  // rows of x that a team copies at once
constexpr int BUFFERS = 3, SLOTS = 2, GATHERED = TEAMS + 1;  // tiles whose rows, slopes and features are on the chip
// Lanes that share a row, and how many chunks of it each reads ahead. Most parts of bfloat16 rows are no longer.
constexpr int LANES = SPREADERS / ROWS, CHUNKS = sizeof(WEIGHT) + sizeof(INDEX) > 4 ? 1 : 3, STRETCH = LANES * CHUNKS * CHUNK;
constexpr int RECEIVED = (CLUSTER - 1) * LABELS * TEXTS * static_cast<int>(sizeof(bfloat16));  // slopes of other blocks' labels
static_assert(SLOTS == TEAMS, "a team's tiles have one");
static_assert(WARPS == 4 && CHUNK == 4 && EIGHTS * 8 == LABELS && EIGHTS <= 2 && ROWS % 16 == 0, "see above");
static_assert(PARTS * 64 == SLICE && SLICE <= 192 && CLUSTER <= 4, "see above");

struct Team {
    alignas(1024) bfloat16 w[2][SLOT_PARTS][LABELS * ROW_SIZE];  // of this tile and the next
    bfloat16 s[2][LABELS * ROW_SIZE];                            // [labels, half of the texts]
    alignas(16) int32_t offset[ROWS_A_COPY][COPIES];  // of slots' features in X^T: what a thread copies lies together
    float bias[2][LABELS], bias_grad[WARPS][LABELS];
    int32_t positive[2];
};

struct Shared {
    alignas(1024) bfloat16 w[BUFFERS][PARTS][ROWS * ROW_SIZE];
    bfloat16 s[SLOTS][2][ROWS * ROW_SIZE];               // [labels, half of the texts]
    bfloat16 x[GATHERED][2][FEATURES * ROW_SIZE];        // [slots, half of the texts]; then gradients of weights, [labels, slots]
    Team team[TEAMS];
    Barrier zeroed, gathered[GATHERED];                  // w has zeros; x is done with
    Barrier slopes[SLOTS], free[SLOTS];                  // s has come; s is done with, and all blocks have read the tile's rows
    Barrier received[SLOTS];                             // what a team has sent has come to all blocks
    float loss[TEXTS];                                   // of the second team
};
static_assert(sizeof(Shared) <= 227 << 10, "a block has no more shared memory");

__device__ alignas(16) uint8_t zeros[sizeof(bfloat16[PARTS][ROWS * ROW_SIZE])];

// The tiles of a cluster, every n-th; of each block's labels: numbers of `Tile`.
struct Tiles {
    int numbers, start, count;

    __device__ __forceinline__ explicit Tiles(const Arguments& a) {
        numbers = (a.last_row - a.first_row) * ((a.group + LABELS - 1) / LABELS);
        start = blockIdx.x / CLUSTER * CLUSTER;
        count = (numbers - start + gridDim.x - 1) / static_cast<int>(gridDim.x);
    }

    __device__ __forceinline__ int number(int tile, int block) const { return start + tile * static_cast<int>(gridDim.x) + block; }

    // Without labels, if it is past the last.
    __device__ __forceinline__ Tile of(const Arguments& a, int number) const {
        Tile tile(a, number);
        if (number >= numbers) tile.count = 0;
        return tile;
    }
};

// The text of a row of z^T and dX: of its half, warp and eight. As in warpgroup_pass.cu.
__device__ __forceinline__ int text_of(int warp, int lane, int half, int high) { return 32 * warp + lane / 4 * 4 + 2 * half + high; }

// Where sixteen slots' rows of x are, in sixteens: such that of the 64 rows that a product takes at once, and the next 64, a warp
// has the rows of slots one after another.
__device__ __forceinline__ int rows_of(int sixteen) { return sixteen % SLOT_PARTS * 4 + sixteen / SLOT_PARTS; }

__device__ __forceinline__ auto weights_at(Team& own, int buffer) {
    return [w = own.w[buffer][0]](int g, int chunk) { return w + chunk / ROW * (LABELS * ROW_SIZE) + place<ROW>(g, chunk % ROW); };
}

// What a team's tile to come needs first, to where all its threads find it.
__device__ __forceinline__ void keep_ahead(Team& own, Ahead& ahead, const Arguments& a, int buffer, unsigned thread) {
    // Where there is no slot weights are zeros, and gradients go nowhere: any features will do.
    if (thread < FEATURES) own.offset[thread % ROWS_A_COPY][thread / ROWS_A_COPY] = max(ahead.offset(a, thread), 0);
    if (thread < LABELS) own.bias[buffer][thread] = ahead.bias;
    if (thread == 0) own.positive[buffer] = ahead.positive;
}

// A thread's. Behind copies that have been asked for they would be waited for: all accesses to shared memory go one way.
struct TeamOffsets {
    int4 four[COPIES / 4];

    __device__ __forceinline__ TeamOffsets(const Team& own, unsigned thread) {
#pragma unroll
        for (int i = 0; i < COPIES / 4; ++i) four[i] = *reinterpret_cast<const int4*>(&own.offset[thread / X_PITCH][4 * i]);
    }
};

__device__ __forceinline__ void begin_copies(
    Shared& shared, Team& own, const TeamOffsets& offsets, const Arguments& a, const Tile& tile, int buffer, int x, unsigned thread) {
    const int row = thread / X_PITCH, chunk = thread % X_PITCH;
    const bfloat16* const from = a.x + chunk * 8;
    bfloat16* const to = shared.x[x][chunk / ROW] + place<ROW>(row, chunk % ROW);
#pragma unroll
    for (int i = 0; i < COPIES; ++i) {
        const int4& four = offsets.four[i / 4];
        const int offset = i % 4 == 0 ? four.x : i % 4 == 1 ? four.y : i % 4 == 2 ? four.z : four.w, rows = i * ROWS_A_COPY;
        copy_async(to + (rows_of(rows / 16) * 16 + rows % 16) * ROW_SIZE, from + static_cast<uint32_t>(offset), true);
    }
    load_weights(a, tile, weights_at(own, buffer), thread);
}

using Logits = float[2][EIGHTS][4];  // [half of the texts][8 labels: lane % 4 * 2 and the next][2 high + label]

__device__ __forceinline__ void multiply_logits(Logits& z, Shared& shared, Team& own, int buffer, int x, int lane) {
#pragma unroll
    for (int n = 0; n < EIGHTS; ++n) {
        const float2 bias = *reinterpret_cast<const float2*>(own.bias[buffer] + 8 * n + lane % 4 * 2);
#pragma unroll
        for (int half = 0; half < 2; ++half) z[half][n][0] = z[half][n][2] = bias.x, z[half][n][1] = z[half][n][3] = bias.y;
    }
    pin(z[0]), pin(z[1]);
    begin_products();
#pragma unroll
    for (int k = 0; k < FEATURES / 16; ++k)
#pragma unroll
        for (int half = 0; half < 2; ++half)
            multiply<true, false>(z[half], matrix(shared.x[x][half]) + rows_of(k) * NEXT_ROWS,
                                  matrix(own.w[buffer][k / 4]) + k % 4 * NEXT, true);
    end_products();
    pin(z[0]), pin(z[1]);
}

// Logits -> slopes and bias gradients in the team's memory; losses are added to a thread's texts' (2 half + high).
__device__ __forceinline__ void team_slopes(
    const Logits& z, Team& own, const Arguments& a, bool any_positive, const Tile& tile, float (&loss)[4], int warp, int lane) {
    uint32_t piece[2][2 * EIGHTS];  // [half][2 n + high]
    float sum[2 * EIGHTS], tile_loss[4];
    const auto take_all = [&](auto slope_of) {  // slope_of(z, n, label, text)
#pragma unroll
        for (int n = 0; n < EIGHTS; ++n)
#pragma unroll
            for (int text = 0; text < 4; ++text) {
                float slope[2];
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    slope[j] = slope_of(z[text / 2][n][text % 2 * 2 + j], n, j, text);
                    sum[2 * n + j] = text == 0 ? slope[j] : sum[2 * n + j] + slope[j];
                }
                piece[text / 2][2 * n + text % 2] = packed(slope[0], slope[1]);
            }
    };
    bool fine = !any_positive && a.texts == TEXTS;
    if (fine) {
        float p[4] = {};
        take_all([&](float logit, int, int, int text) { return slope_of_negative(logit, p[text]); });
#pragma unroll
        for (int text = 0; text < 4; ++text) {
            fine = fine && !overflowed(p[text]);
            tile_loss[text] = loss_of_negatives(p[text]);
        }
        fine = __all_sync(~0u, fine);
    }
    if (!fine) {
        uint32_t positive[EIGHTS][2] = {};  // bit 2 half + high
#pragma unroll
        for (int i = 0; i < 2 * EIGHTS; ++i) {
            const int g = i / 2 * 8 + lane % 4 * 2 + i % 2;
            const int64_t word = static_cast<int64_t>(tile.local + g) * (TEXTS / 32) + warp;
            if (any_positive && g < tile.count) positive[i / 2][i % 2] = a.positive[word] >> (lane / 4 * 4);
        }
#pragma unroll
        for (int text = 0; text < 4; ++text) tile_loss[text] = 0.0f;
        take_all([&](float logit, int n, int j, int text) {
            const bool is_text = text_of(warp, lane, text / 2, text % 2) < a.texts;
            return slope_of_any(logit, positive[n][j] >> text << 31, is_text, tile_loss[text]);
        });
    }
#pragma unroll
    for (int text = 0; text < 4; ++text) loss[text] += tile_loss[text];
#pragma unroll
    for (int half = 0; half < 2; ++half)
        store_transposed(own.s[half] + place<ROW>(lane / 16 % EIGHTS * 8 + lane % 8, 2 * warp + lane / 8 % 2), piece[half]);
    const int column = sum_of_lanes(sum, lane);
    if (lane < LABELS) own.bias_grad[warp][8 * (column / 2) + lane % 4 * 2 + column % 2] = sum[0];
}

using Gradients = float[SLOT_PARTS][EIGHTS][4];  // of weights: rows are those of x

__device__ __forceinline__ void pin_all(Gradients& grad) {
#pragma unroll
    for (int part = 0; part < SLOT_PARTS; ++part) pin(grad[part]);
}

__device__ __forceinline__ void begin_gradients(Gradients& grad, Shared& shared, Team& own, int x) {
    pin_all(grad);
    begin_products();
#pragma unroll
    for (int k = 0; k < TEXTS / 16; ++k)
#pragma unroll
        for (int part = 0; part < SLOT_PARTS; ++part)
            multiply<false, false>(grad[part], matrix(shared.x[x][k / 4]) + part * (64 * 128 / 16) + k % 4 * NEXT,
                                   matrix(own.s[k / 4]) + k % 4 * NEXT, k > 0);
    commit_products();
}

// From rows of slots to rows of labels, of which a lane has 2 n slots one after another: by way of x, which is done with. A warp
// has the same slots before and after.
template <int N>
__device__ __forceinline__ void turn_gradients(float (&c)[1][N][4], const Gradients& grad, bfloat16* x, int warp, int lane) {
    // A chunk of eight labels is in eight banks, and four chunks of a label and the next.
    const auto at = [&](int g, int chunk) { return x + (g * W_PITCH + (chunk ^ (g % 2 * 4 | g / 2 % 4))) * 8; };
#pragma unroll
    for (int part = 0; part < SLOT_PARTS; ++part) {
        uint32_t words[2 * EIGHTS];
#pragma unroll
        for (int j = 0; j < 2 * EIGHTS; ++j) words[j] = packed(grad[part][j / 2][j % 2 * 2], grad[part][j / 2][j % 2 * 2 + 1]);
        store_transposed(at(lane / 16 % EIGHTS * 8 + lane % 8, 2 * (warp * SLOT_PARTS + part) + lane / 8 % 2), words);
    }
    __syncwarp();
    const int slot = warp * WARP_SLOTS + lane % 4 * (2 * N);
#pragma unroll
    for (int m = 0; m < EIGHTS; ++m) {
        alignas(16) uint32_t pairs[N];
        using Unit = typename std::conditional<N == 4, uint4, uint2>::type;
        *reinterpret_cast<Unit*>(pairs) = *reinterpret_cast<const Unit*>(at(8 * m + lane / 4, slot / 8) + slot % 8);
#pragma unroll
        for (int n = 0; n < N; ++n) {
            const float2 pair = widened(pairs[n]);
            c[0][n][2 * m] = pair.x, c[0][n][2 * m + 1] = pair.y;
        }
    }
    __syncwarp();
}

// A team's slopes to all blocks, when there is room for them: to its own, where no bulk copy may go, a part each, to the others a warp
// each. The parts are read before, so that they are there when they may be written.
__device__ __forceinline__ void send_slopes(Shared& shared, const Team& own, int slot, int parity, int rank, int warp, int lane) {
    const int own_half = warp / 2, first = warp % 2 * (EIGHTS * 32) + lane;
    uint4 part[EIGHTS];
#pragma unroll
    for (int i = 0; i < EIGHTS; ++i) part[i] = reinterpret_cast<const uint4*>(own.s[own_half])[first + 32 * i];
    await(shared.free[slot], parity);
#pragma unroll
    for (int i = 0; i < EIGHTS; ++i)
        reinterpret_cast<uint4*>(shared.s[slot][own_half] + rank * (LABELS * ROW_SIZE))[first + 32 * i] = part[i];
    publish_shared();
    __syncwarp();
    if (lane == 0) arrive(shared.slopes[slot]);
    if (warp < CLUSTER && warp != rank && lane == 0)
#pragma unroll
        for (int half = 0; half < 2; ++half)
            send_bulk(address_in(warp, address(shared.s[slot][half] + rank * (LABELS * ROW_SIZE))), own.s[half], sizeof(own.s[half]),
                      address_in(warp, address(&shared.slopes[slot])));
    __syncwarp();
}

__device__ __forceinline__ void gather(Shared& shared, const Arguments& a, int rank) {
    const Tiles tiles(a);
    const bool update = a.update && *a.finite;
    const int warp = __shfl_sync(~0u, threadIdx.x / 32 % WARPS, 0);
    int team = __shfl_sync(~0u, (threadIdx.x - SPREADERS) / THREADS, 0);
    unsigned thread = threadIdx.x % THREADS;
    const int first = team;
    const auto meet_team = [&] { meet<THREADS>(2 + team); };

    // The team's next tile, and the one after, of which it has read what it needs first.
    Tile tile = tiles.of(a, tiles.number(first, rank)), next = tiles.of(a, tiles.number(first + TEAMS, rank));
    Ahead ahead(a, tiles.number(first, rank), tile, thread);
    keep_ahead(shared.team[team], ahead, a, 0, thread);
    meet_team();
    begin_copies(shared, shared.team[team], TeamOffsets(shared.team[team], thread), a, tile, 0, first, thread);
    meet_team();
    ahead = Ahead(a, tiles.number(first + TEAMS, rank), next, thread);
    int buffer = 0, x = first, x_parity = 1;  // parity: of the tile that had its place in x before
    float loss[4] = {};
#pragma unroll 1
    for (int i = first; i < tiles.count; i += TEAMS) {
        forget(thread), forget(team);  // addresses that follow from them are worked out anew: there are too many to keep
        thread %= THREADS;
        Team& own = shared.team[team];
        const int lane = thread % 32, slot = i % SLOTS, number = tiles.number(i + 2 * TEAMS, rank);
        const Tile after_next = tiles.of(a, number);
        int x_next = x + TEAMS, x_next_parity = x_parity;
        if (x_next >= GATHERED) x_next -= GATHERED, x_next_parity ^= 1;

        await(shared.received[slot], i / SLOTS & 1 ^ 1);  // the team's slopes before these
        await_copies();
        publish_shared();
        keep_ahead(own, ahead, a, buffer ^ 1, thread);
        ahead = Ahead(a, number, after_next, thread);
        meet_team();
        {
            const bool any_positive = own.positive[buffer] != 0;
            Logits z;
            multiply_logits(z, shared, own, buffer, x, lane);
            team_slopes(z, own, a, any_positive, tile, loss, warp, lane);
        }
        publish_shared();
        meet_team();
        await(shared.gathered[x_next], x_next_parity);
        if (update) fetch_states(a, tile, thread);
        const TeamOffsets offsets(own, thread);
        // Made in any case: with a branch around products under way the compiler would wait for them at once.
        Gradients grad;
        begin_gradients(grad, shared, own, x);
        begin_copies(shared, own, offsets, a, next, buffer ^ 1, x_next, thread);
        await_products<0>();
        pin_all(grad);
        meet_team();
        send_slopes(shared, own, slot, i / SLOTS & 1, rank, warp, lane);
        if (!update) {
            if (lane == 0) arrive(shared.gathered[x]);
        } else {
            float c[1][WARP_SLOTS / 8][4];
            turn_gradients(c, grad, shared.x[x][0], warp, lane);
            if (lane == 0) arrive(shared.gathered[x]);
            using Weights = WeightUpdate<EIGHTS, true, EIGHTS, 1, WARP_SLOTS / 8>;
            Weights::Read read;
            Weights::read(read, a, tile, 0, warp * WARP_SLOTS);
            Weights::update(c, read, a, tile, 0, warp * WARP_SLOTS, weights_at(own, buffer));
            if (static_cast<int>(thread) < tile.count) {
                const int64_t label = tile.label0 + thread;
                const Values bias = bias_values(a, label, own.bias[buffer][thread]);
                update_bias<WARPS>(a, label, bias, &own.bias_grad[0][thread], LABELS);
            }
        }
        tile = next, next = after_next;
        buffer ^= 1, x = x_next, x_parity = x_next_parity;
    }
    await_copies();

    const int lane = thread % 32;
#pragma unroll
    for (int text = 0; text < 4; ++text) {
        loss[text] += __shfl_xor_sync(~0u, loss[text], 1);
        loss[text] += __shfl_xor_sync(~0u, loss[text], 2);
        if (first > 0 && lane % 4 == 0) shared.loss[text_of(warp, lane, text / 2, text % 2)] = loss[text];
    }
    meet<TEAMS * THREADS>(2 + TEAMS);
    float* const losses = a.loss + blockIdx.x * TEXTS;
#pragma unroll
    for (int text = 0; text < 4; ++text) {
        const int column = text_of(warp, lane, text / 2, text % 2);
        if (first == 0 && lane % 4 == 0) losses[column] += loss[text] + shared.loss[column];
    }
}

// The row of which a spreader has slots to spread, those of the block's features.
struct Run {
    int label, index_row;
    bool any;             // whether there is such a row
    uint16_t first, end;  // nothing is made of them before they are needed

    __device__ __forceinline__ Run(const Arguments& a, const Tiles& tiles, int i, int rank, unsigned thread) {
        const int row = thread / LANES, g = row % LABELS;
        const Tile tile = tiles.of(a, tiles.number(i, row / LABELS));
        any = i < tiles.count && g < tile.count;
        label = any ? static_cast<int>(tile.label0) + g : 0, index_row = any ? tile.row : 0;
        const uint16_t* const slots = a.first_slots + static_cast<int64_t>(index_row) * CLUSTER + rank;
        first = slots[0];
        end = rank + 1 < CLUSTER ? slots[1] : a.fan_in;
    }
};

// A spreader's chunks of a run, every LANES-th from where a chunk starts, with slots before the run's and after.
struct Slots {
    Chunk<INDEX> index[CHUNKS];
    Chunk<Stored> value[CHUNKS];
    int slot0, from, number;  // the lane's first slot, in the row and from the run's first on; slots of the run

    __device__ __forceinline__ void begin(const Arguments& a, const Run& run, unsigned thread) {
        number = run.any ? run.end - run.first : 0;
        slot0 = run.first / CHUNK * CHUNK + thread % LANES * CHUNK;
        from = slot0 - run.first;
        load(a, run);
    }

    __device__ __forceinline__ void load(const Arguments& a, const Run& run) {
        const INDEX* const indexes = row_of<INDEX>(a.index, a, run.index_row) + slot0;
        const Stored* const values = row_of<Stored>(a.weight, a, run.label) + slot0;
#pragma unroll
        for (int k = 0; k < CHUNKS; ++k) {
            const int on = k * (LANES * CHUNK);
            const bool any = from + on < number;
            index[k] = any ? *reinterpret_cast<const Chunk<INDEX>*>(indexes + on) : Chunk<INDEX>{};
            value[k] = any ? *reinterpret_cast<const Chunk<Stored>*>(values + on) : Chunk<Stored>{};
        }
    }

    __device__ __forceinline__ void spread(const RowOfW<ROWS>& to) const {
#pragma unroll
        for (int k = 0; k < CHUNKS; ++k)
#pragma unroll
            for (int i = 0; i < CHUNK; ++i) {
                const bool has = static_cast<uint32_t>(from + k * (LANES * CHUNK) + i) < static_cast<uint32_t>(number);
                if (has) to[index[k][i]] = narrowed(value[k][i]);
            }
    }

    // Whether the lane has more of the run.
    __device__ __forceinline__ bool next() {
        slot0 += STRETCH, from += STRETCH;
        return from < number;
    }
};

__device__ __forceinline__ void spread(Shared& shared, const Arguments& a, int rank) {
    const Tiles tiles(a);
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), warpgroup = warp / 4;
    unsigned thread = threadIdx.x;
    forget(thread);
    const int lane = thread % 32;
    float dx[PARTS * 8][4] = {};
    Run run(a, tiles, 0, rank, thread), next(a, tiles, 1, rank, thread);
    Slots slots;
    slots.begin(a, run, thread);
    const auto arrive_everywhere = [&](Barrier& barrier) {
        __syncwarp();
        if (lane < CLUSTER) arrive_there(address_in(lane, address(&barrier)));
    };
    // By a copy: stores of threads would be a twelfth of all that threads' accesses to shared memory wait for.
    const auto begin_zeros = [&](int i) {
        if (thread == 0) {
            arrive_expecting(shared.zeroed, sizeof(zeros));
            fetch_bulk(shared.w[i % BUFFERS], zeros, sizeof(zeros), shared.zeroed);
        }
        __syncwarp();
    };
    const auto spread_tile = [&](int i) {
        await(shared.zeroed, i & 1);
        const RowOfW<ROWS> to(shared.w[i % BUFFERS][0] - rank * (PARTS * ROWS * ROW_SIZE), thread / LANES);
        for (;;) {
            slots.spread(to);
            if (__all_sync(~0u, !slots.next())) break;
            slots.load(a, run);
        }
        publish_shared();
        run = next;
        slots.begin(a, run, thread);
        next = Run(a, tiles, i + 2, rank, thread);
    };
    if (tiles.count > 0) {
        begin_zeros(0);
        spread_tile(0);
        arrive_everywhere(shared.free[0]);
        meet<SPREADERS>(1);  // all have awaited the first zeros
    }
    if (tiles.count > 1) begin_zeros(1);
#pragma unroll 1
    for (int i = 0; i < tiles.count; ++i) {
        const int slot = i % SLOTS;
        if (i + 1 < tiles.count) spread_tile(i + 1);
        await_products<0>();
        pin(dx);
        arrive_everywhere(shared.free[(i + 1) % SLOTS]);
        meet<SPREADERS>(1);  // nobody reads rows of tile i - 1 any more, and all of tile i are there
        if (i + 2 < tiles.count) begin_zeros(i + 2);
        await(shared.slopes[slot], i / SLOTS & 1);
        if (thread == 0) arrive_expecting(shared.slopes[slot], RECEIVED);
        if (thread < CLUSTER) arrive_there(address_in(thread, address(&shared.received[slot])));
        __syncwarp();
        pin(dx);
        begin_products();
#pragma unroll
        for (int k = 0; k < ROWS / 16; ++k)
            multiply<true, true>(dx, matrix(shared.s[slot][warpgroup]) + k * NEXT_ROWS,
                                 matrix<sizeof(shared.w[0][0])>(shared.w[i % BUFFERS]) + k * NEXT_ROWS, true);
        commit_products();
    }
    await_products<0>();
    pin(dx);

    float* const sums = a.dx + static_cast<int64_t>(blockIdx.x / CLUSTER) * (TEXTS * ALL_FEATURES) + rank * SLICE + thread % 4 * 2;
#pragma unroll
    for (int high = 0; high < 2; ++high)
#pragma unroll
        for (int n = 0; n < PARTS * 8; ++n) {
            float2& sum = *reinterpret_cast<float2*>(sums + text_of(warp % 4, lane, warpgroup, high) * ALL_FEATURES + 8 * n);
            sum = make_float2(sum.x + dx[n][2 * high], sum.y + dx[n][2 * high + 1]);
        }
}

__global__ void __launch_bounds__(BLOCK_THREADS, 1) step_kernel(const Arguments a) {
    extern __shared__ __align__(1024) uint8_t memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    const int rank = block_in_cluster();
    if (threadIdx.x == 0) {
        init(shared.zeroed, 1);
        for (Barrier& barrier : shared.gathered) init(barrier, WARPS);
        for (Barrier& barrier : shared.slopes) init(barrier, 1 + WARPS);
        for (Barrier& barrier : shared.free) init(barrier, CLUSTER * (SPREADERS / 32));
        for (Barrier& barrier : shared.received) init(barrier, CLUSTER);
        publish_barriers();
        for (Barrier& barrier : shared.slopes) arrive_expecting(barrier, RECEIVED);
    }
    meet_cluster();
    if (threadIdx.x < SPREADERS) {
        take_registers<SPREADER_REGISTERS>();
        spread(shared, a, rank);
    } else {
        give_registers<TEAM_REGISTERS>();
        gather(shared, a, rank);
    }
    meet_cluster();  // nobody leaves while others may send
}

}  // namespace

#include "launch_clusters.cuh"
