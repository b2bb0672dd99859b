// The step of labels that share index rows with few others or none: sparse in memory, dense on the chip. For GPUs of
// capability 9.0, and up to 128 texts.
//
// A cluster of CLUSTER blocks shares out the features: each block has FEATURES of them. It keeps its part of X on the chip for as
// long as the kernel runs, and its part of dX in registers. Tiles of 64 labels pass through:
//
//     W <- rows of the tile, spread out         z_BT = sum over blocks of X W^T, + bias       s = dloss/dz
//     dX += s W         W <- s^T X              weight <- update(weight, W[index])
//
// so that weights, states and index rows are all that memory moves. Index rows are ascending: a block's part of a row is a run of
// slots, of which `feature_bits` tell the first. No other block of the cluster touches it.
//
// Half of a block's warps are producers, who spread and update, the others consumers, two warpgroups who multiply. The tiles
// BUFFERS of W are on their way between them:
//
//     producers:  await graded (tile - BUFFERS): update its weights; spread tile over the same buffer; arrive at full (tile)
//     consumers:  await full (tile + 1): logits of tile + 1; await slopes (tile): gradients of tile; arrive at graded (tile);
//                 slopes of tile + 1
//
// Logits are the sum of what the blocks have: of each label one block of the cluster is the owner, to whom the others send theirs,
// and who sends slopes to all. Both are on their way while products of another tile are made. Whoever sends may overwrite what was
// there before: a tile's partial logits are sent after all slopes of the tile before have come, whose senders had read theirs;
// and slopes after all partial logits have, whose senders have finished with the slopes of two tiles before.
//
// Sums have one order: results are the same, bit for bit, from run to run on GPUs that hold as many clusters.
//
// Compiled for one configuration by -D, besides those of tile_math.cuh: FEATURES (64, 128, 192), CLUSTER (1, 2, 4, 8); LABELS
// is 64, WARPS 16.

#include "tile_math.cuh"

namespace {

constexpr int ROW = 8, ROW_SIZE = 64;                  // of a matrix in shared memory: chunks, elements
constexpr int PARTS = FEATURES / 64;                   // such rows a row of X and W has
constexpr int NEXT = 32 / 16, NEXT_ROWS = 2048 / 16;   // to the next 16 columns, and rows, of an operand
constexpr int OWN = LABELS / CLUSTER, PIECES = OWN / 8;  // labels that a block owns; eights of them
constexpr int BUFFERS = 4;
constexpr int CONSUMERS = 256, PRODUCER_WARPS = 8;
constexpr int WORDS = FEATURES / 32;                   // of feature_bits, a block's part of a row
constexpr int CONSUMER_REGISTERS = PARTS == 3 ? 176 : 144, PRODUCER_REGISTERS = 256 - CONSUMER_REGISTERS;
constexpr int TOGETHER = 5;                            // slots that a producer reads before it needs any
constexpr int ALL_FEATURES = CLUSTER * FEATURES;
static_assert(LABELS == 64 && WARPS == 16 && FEATURES % 64 == 0 && FEATURES <= 192 && CLUSTER <= 8, "see above");

struct Shared {
    alignas(1024) bfloat16 x[PARTS][TEXTS * ROW_SIZE];
    bfloat16 w[BUFFERS][PARTS][LABELS * ROW_SIZE];
    bfloat16 s[2][TEXTS * ROW_SIZE];             // [texts, labels]
    uint4 partial[CLUSTER][PIECES][CONSUMERS];   // logits of own labels from each block, as its consumers have them
    uint32_t positive[BUFFERS][OWN][TEXTS / 32];
    float bias[BUFFERS][OWN], bias_grad[BUFFERS][CONSUMERS / 32][OWN];
    uint32_t run[BUFFERS][LABELS];               // the block's slots: the first, and in the upper half the number
    uint32_t square[2][CLUSTER][LABELS];         // from each block, its term of the labels' new state (ROWWISE)
    Barrier full[BUFFERS], graded[BUFFERS], partials, slopes[2], squares[2][PRODUCER_WARPS];
};

// The tiles of a cluster: every n-th.
struct Tiles {
    int first_label, end_label, first, step, count;

    __device__ __forceinline__ explicit Tiles(const Arguments& a) {
        first_label = a.first_row * a.group;
        end_label = static_cast<int>(min(static_cast<int64_t>(a.last_row) * a.group, a.labels));
        first = blockIdx.x / CLUSTER;
        step = gridDim.x / CLUSTER;
        count = ((end_label - first_label + LABELS - 1) / LABELS - first + step - 1) / step;
    }

    __device__ __forceinline__ int label0(int tile) const { return first_label + (first + tile * step) * LABELS; }
};

// The text of a consumer's rows (high: 8 rows on) of the logits.
__device__ __forceinline__ int text_of(int high) { return threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 + 8 * high; }

// What eight lanes of a producer's warp do at a time: each of the warp's eight labels, its slots from first to before end.
template <typename Take>
__device__ __forceinline__ void each_label(const Shared& shared, int buffer, unsigned thread, Take take) {
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
        const int row = thread / 32 * 8 + half * 4 + thread % 32 / 8;
        const uint32_t run = shared.run[buffer][row];
        take(row, run & 0xFFFF, (run & 0xFFFF) + (run >> 16));
    }
}

// Where a feature of this block is in a row of W: as `place` has it, in few instructions.
struct RowOfW {
    uint16_t* elements;  // where the row's would be if the block's first feature were 0
    uint32_t swizzle;

    __device__ __forceinline__ RowOfW(Shared& shared, int buffer, int row, int rank) {
        elements = reinterpret_cast<uint16_t*>(shared.w[buffer][0]) + row * ROW_SIZE - rank * (PARTS * LABELS * ROW_SIZE);
        swizzle = (row & 7) * 8;
    }

    __device__ __forceinline__ uint16_t& operator[](uint32_t feature) const {
        const uint32_t column = feature ^ swizzle;
        return elements[column + column / ROW_SIZE * ((LABELS - 1) * ROW_SIZE)];
    }
};

// An index row of a label of this rank.
__device__ __forceinline__ int64_t index_row(const Arguments& a, int label) {
    return static_cast<uint32_t>(label) / static_cast<uint32_t>(a.group);
}

// A tile's rows of the tensors on their way to the L2 cache, this block's share of them: thread 0, 1, ... has a tensor each.
__device__ __forceinline__ void fetch_tile(
    const Arguments& a, const Tiles& tiles, int tile, int rank, bool update, unsigned thread) {
    const int states = !update ? 0 : RULE == ADAMW ? 2 : RULE == MOMENTUM ? 1 : 0;
    const int first = tiles.label0(tile) + rank * OWN, end = min(first + OWN, tiles.end_label);
    if (tile >= tiles.count || first >= end || thread >= 3 + states) return;
    const void* const state = thread == 3 ? a.state0 : a.state1;
    const void* const tensor = thread == 0 ? a.feature_bits : thread == 1 ? a.index : thread == 2 ? a.weight : state;
    const int64_t bytes = thread == 0 ? 4 * a.words : (thread == 1 ? sizeof(INDEX) : sizeof(WEIGHT)) * a.fan_in;
    const int64_t first_row = thread < 2 ? index_row(a, first) : first, end_row = thread < 2 ? index_row(a, end - 1) + 1 : end;
    const auto base = reinterpret_cast<uintptr_t>(tensor);
    const uintptr_t from = (base + first_row * bytes) & ~uintptr_t(15), to = (base + end_row * bytes) & ~uintptr_t(15);
    if (from < to) prefetch(reinterpret_cast<const void*>(from), static_cast<uint32_t>(to - from));
}

__device__ __forceinline__ float wide(float x) { return x; }
__device__ __forceinline__ float wide(uint16_t x) { return __uint_as_float(static_cast<uint32_t>(x) << 16); }

// Elements as they are stored.
template <typename T> struct StoredAs { using type = float; };
template <> struct StoredAs<bfloat16> { using type = uint16_t; };
using Stored = StoredAs<WEIGHT>::type;

__device__ __forceinline__ void store(float* to, float value, uint32_t, uint32_t, uint32_t) { *to = value; }
__device__ __forceinline__ void store(uint16_t* to, float value, uint32_t hashed, uint32_t key, uint32_t column) {
    *to = static_cast<uint16_t>(rounded(value, hashed, key, column) >> 16);
}

// Where a producer's warp has a tile's labels: their runs of slots, biases and positives, and W, zero but at the index.
__device__ __forceinline__ void spread(
    Shared& shared, const Arguments& a, const Tiles& tiles, int tile, int buffer, int rank, unsigned thread) {
    const unsigned lane = thread % 32, warp = thread / 32;
    const int label0 = tiles.label0(tile);
    {
        const int row = 8 * warp + lane / 4;
        const bool ok = label0 + row < tiles.end_label;
        const uint32_t* bits = a.feature_bits + (ok ? index_row(a, label0 + row) * a.words : 0);
        uint32_t run = 0;
#pragma unroll
        for (int i = 0; i < (CLUSTER * WORDS + 3) / 4; ++i) {
            const int word = 4 * i + lane % 4, mine = word - rank * WORDS;
            const uint32_t count = ok && word < a.words && mine < WORDS ? __popc(bits[word]) : 0;
            run += mine < 0 ? count : count << 16;
        }
        run += __shfl_xor_sync(~0u, run, 1);
        run += __shfl_xor_sync(~0u, run, 2);
        if (lane % 4 == 0) shared.run[buffer][row] = run;
    }
    const int own0 = label0 + rank * OWN;
    if (thread < OWN) {
        const int label = own0 + thread;
        // This one stands for no label: its loss and slope are zero.
        shared.bias[buffer][thread] = label >= tiles.end_label ? -1e30f : a.bias ? a.bias[label] : 0.0f;
    }
    for (int i = thread; i < OWN * (TEXTS / 32); i += 32 * PRODUCER_WARPS) {
        const int label = own0 + i / (TEXTS / 32);
        const uint32_t* words = a.positive + static_cast<int64_t>(label - tiles.first_label) * (TEXTS / 32);
        shared.positive[buffer][i / (TEXTS / 32)][i % (TEXTS / 32)] = label < tiles.end_label ? words[i % (TEXTS / 32)] : 0;
    }
    // The warp's labels are eight rows, 1024 bytes a part.
#pragma unroll
    for (int i = 0; i < 2 * PARTS; ++i)
        reinterpret_cast<uint4*>(shared.w[buffer][i / 2] + 8 * warp * ROW_SIZE)[i % 2 * 32 + lane] = uint4{0, 0, 0, 0};
    __syncwarp();
    each_label(shared, buffer, thread, [&](int row, int first, int end) {
        const int label = label0 + row;
        const INDEX* index = static_cast<const INDEX*>(a.index) + index_row(a, label) * a.fan_in;
        const Stored* weight = static_cast<const Stored*>(a.weight) + static_cast<int64_t>(label) * a.fan_in;
        const RowOfW to(shared, buffer, row, rank);
#pragma unroll 1
        for (int slot0 = first + lane % 8; slot0 < end; slot0 += 8 * TOGETHER) {
            int feature[TOGETHER];
            Stored value[TOGETHER];
#pragma unroll
            for (int k = 0; k < TOGETHER; ++k)
                if (slot0 + 8 * k < end) feature[k] = (index + slot0)[8 * k], value[k] = (weight + slot0)[8 * k];
#pragma unroll
            for (int k = 0; k < TOGETHER; ++k) {
                if (slot0 + 8 * k >= end) continue;
                if constexpr (BF16_WEIGHT) to[feature[k]] = value[k];
                else to[feature[k]] = static_cast<uint16_t>(packed(value[k], 0.0f));
            }
        }
    });
}

// The terms of the new states of a producer's warp's labels (ROWWISE): of the gradients that each block has, to all blocks.
__device__ __forceinline__ void exchange_squares(
    Shared& shared, const Arguments& a, const Tiles& tiles, int tile, int buffer, int rank, unsigned thread) {
    const int lane = thread % 32, warp = thread / 32, slot = tile % 2;
    Barrier& barrier = shared.squares[slot][warp];
    if (lane == 0) arrive_expecting(barrier, (CLUSTER - 1) * 8 * sizeof(float));
    each_label(shared, buffer, thread, [&](int row, int first, int end) {
        const int label = tiles.label0(tile) + row;
        const INDEX* index = static_cast<const INDEX*>(a.index) + index_row(a, label) * a.fan_in;
        const RowOfW gradient(shared, buffer, row, rank);
        float sum = 0.0f;
#pragma unroll 4
        for (int i = first + lane % 8; i < end; i += 8) {
            const float grad = wide(gradient[index[i]]) * a.text_weight;
            sum = fmaf(grad, grad, sum);
        }
#pragma unroll
        for (int other = 1; other < 8; other *= 2) sum += __shfl_xor_sync(~0u, sum, other);
        sum *= (1.0f - a.beta1) / a.fan_in;
        if (rank == 0 && label < tiles.end_label) sum = a.beta1 * static_cast<const float*>(a.state0)[label] + sum;
        if (lane % 8 < CLUSTER) {
            uint32_t& here = shared.square[slot][rank][row];
            if (lane % 8 == rank) here = __float_as_uint(sum);
            else send(address_in(lane % 8, &here), __float_as_uint(sum), address_in(lane % 8, &barrier));
        }
    });
    __syncwarp();
    await(barrier, tile / 2 & 1);
}

// The update of a producer's warp's labels, whose gradients are in W.
__device__ __forceinline__ void update_slots(
    Shared& shared, const Arguments& a, const Tiles& tiles, int tile, int buffer, int rank, unsigned thread) {
    const unsigned lane = thread % 32;
    const int label0 = tiles.label0(tile);
    if (thread < OWN && label0 + rank * OWN + thread < tiles.end_label) {
        const float bias = shared.bias[buffer][thread], *grad = &shared.bias_grad[buffer][0][thread];
        update_bias<CONSUMERS / 32>(a, label0 + rank * OWN + thread, bias, grad, OWN);
    }
    if constexpr (RULE == ROWWISE) exchange_squares(shared, a, tiles, tile, buffer, rank, thread);
    each_label(shared, buffer, thread, [&](int row, int first, int end) {
        const int label = label0 + row;
        const int64_t start = static_cast<int64_t>(label) * a.fan_in;
        const INDEX* index = static_cast<const INDEX*>(a.index) + index_row(a, label) * a.fan_in;
        Stored* const weight = static_cast<Stored*>(a.weight) + start;
        Stored* const state0 = static_cast<Stored*>(a.state0) + start;
        Stored* const state1 = static_cast<Stored*>(a.state1) + start;
        const RowOfW gradient(shared, buffer, row, rank);
        const uint32_t number = static_cast<uint32_t>(a.label_start + label);
        const uint32_t hashed0 = mix(number ^ a.key[0]), hashed1 = mix(number ^ a.key[2]), hashed2 = mix(number ^ a.key[4]);
        float label_state = 0.0f;
        if constexpr (RULE == ROWWISE) {
#pragma unroll
            for (int r = 0; r < CLUSTER; ++r) label_state += __uint_as_float(shared.square[tile % 2][r][row]);
            if (rank == 0 && lane % 8 == 0 && label < tiles.end_label) static_cast<float*>(a.state0)[label] = label_state;
        }
#pragma unroll 1
        for (int slot0 = first + lane % 8; slot0 < end; slot0 += 8 * TOGETHER) {
            Stored old[TOGETHER], old0[TOGETHER], old1[TOGETHER];
            int feature[TOGETHER];
#pragma unroll
            for (int k = 0; k < TOGETHER; ++k) {
                if (slot0 + 8 * k >= end) continue;
                feature[k] = (index + slot0)[8 * k];
                old[k] = (weight + slot0)[8 * k];
                if (RULE == MOMENTUM || RULE == ADAMW) old0[k] = (state0 + slot0)[8 * k];
                if (RULE == ADAMW) old1[k] = (state1 + slot0)[8 * k];
            }
#pragma unroll
            for (int k = 0; k < TOGETHER; ++k) {
                const int slot = slot0 + 8 * k;
                if (slot >= end) continue;
                Values v{wide(old[k]), label_state, 0.0f};
                if (RULE == MOMENTUM || RULE == ADAMW) v.state0 = wide(old0[k]);
                if (RULE == ADAMW) v.state1 = wide(old1[k]);
                v = updated(v, wide(gradient[feature[k]]) * a.text_weight, a, a.weight_decay);
                store(weight + slot0 + 8 * k, v.weight, hashed0, a.key[1], slot);
                if (RULE == MOMENTUM || RULE == ADAMW) store(state0 + slot0 + 8 * k, v.state0, hashed1, a.key[3], slot);
                if (RULE == ADAMW) store(state1 + slot0 + 8 * k, v.state1, hashed2, a.key[5], slot);
            }
        }
    });
}

__device__ __forceinline__ void produce(Shared& shared, const Arguments& a, const Tiles& tiles, int rank, bool update) {
    int thread = threadIdx.x - CONSUMERS;
    fetch_tile(a, tiles, 0, rank, update, thread);
#pragma unroll 1
    for (int tile = 0; tile < tiles.count + (update ? BUFFERS : 0); ++tile) {
        const int buffer = tile % BUFFERS, before = tile - BUFFERS;
        forget(thread);
        fetch_tile(a, tiles, tile + 1, rank, update, thread);
        if (before >= 0 && before < tiles.count) {
            await(shared.graded[buffer], before / BUFFERS & 1);
            if (update) update_slots(shared, a, tiles, before, buffer, rank, thread);
            __syncwarp();
            forget(thread);
        }
        if (tile < tiles.count) {
            spread(shared, a, tiles, tile, buffer, rank, thread);
            publish_shared();
            __syncwarp();
            if (thread % 32 == 0) arrive(shared.full[buffer]);
        }
    }
}

// Z = X W^T of this block's features: the warpgroup's 64 texts, all labels.
using Logits = float[8][4];

__device__ __forceinline__ void begin_logits(Logits& z, const Shared& shared, int buffer, int warpgroup) {
    pin(z);
    begin_products();
#pragma unroll
    for (int k = 0; k < FEATURES / 16; ++k) {
        const uint64_t x = matrix(shared.x[k / 4]) + warpgroup * (64 * 128 / 16) + k % 4 * NEXT;
        multiply<false, false>(z, x, matrix(shared.w[buffer][k / 4]) + k % 4 * NEXT, k > 0);
    }
    commit_products();
}

// Before the first tile, and again when a tile's have come.
__device__ __forceinline__ void expect_partials(Shared& shared) {
    arrive_expecting(shared.partials, sizeof(shared.partial) / CLUSTER * (CLUSTER - 1));
}

// Each label's to its owner.
__device__ __forceinline__ void send_logits(Logits& z, Shared& shared, int rank) {
    pin(z);
#pragma unroll
    for (int owner = 0; owner < CLUSTER; ++owner)
#pragma unroll
        for (int i = 0; i < PIECES; ++i) {
            const float(&c)[4] = z[owner * PIECES + i];
            const uint4 value{__float_as_uint(c[0]), __float_as_uint(c[1]), __float_as_uint(c[2]), __float_as_uint(c[3])};
            uint4& here = shared.partial[rank][i][threadIdx.x];
            if (owner == rank) here = value;
            else send(address_in(owner, &here), value, address_in(owner, &shared.partials));
        }
}

// Slopes of the block's own labels, to all blocks; losses are added to a thread's two texts'.
__device__ __forceinline__ void send_slopes(
    Shared& shared, const Arguments& a, float (&loss)[2], int tile, int buffer, int rank) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, slot = tile % 2;
    if (CLUSTER > 1) {
        await(shared.partials, tile & 1);
        if (threadIdx.x == 0) expect_partials(shared);
    }
    const auto to_all = [&](void* here, auto value) {
#pragma unroll
        for (int block = 0; block < CLUSTER; ++block) {
            if (block == rank) *static_cast<decltype(value)*>(here) = value;
            else send(address_in(block, here), value, address_in(block, &shared.slopes[slot]));
        }
    };
    constexpr int PAIR = PIECES < 2 ? PIECES : 2;
#pragma unroll
    for (int first = 0; first < PIECES; first += PAIR) {
        uint32_t piece[4];  // slopes of two labels: of text_of(i % 2), in the i / 2-th eight
#pragma unroll
        for (int i = first; i < first + PAIR; ++i) {
            float z[4], sum[2];
#pragma unroll
            for (int r = 0; r < CLUSTER; ++r) {
                const uint4 value = shared.partial[r][i][threadIdx.x];
                const uint32_t got[4] = {value.x, value.y, value.z, value.w};
#pragma unroll
                for (int j = 0; j < 4; ++j) z[j] = r == 0 ? __uint_as_float(got[j]) : z[j] + __uint_as_float(got[j]);
            }
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const int label = 8 * i + lane % 4 * 2 + j;
                const float bias = shared.bias[buffer][label];
                const uint32_t positive = shared.positive[buffer][label][warp / 2];
#pragma unroll
                for (int high = 0; high < 2; ++high) {
                    const int text = text_of(high);
                    float& x = z[2 * high + j];
                    x = slope_of_any(x + bias, positive >> text % 32 << 31, text < a.texts, loss[high]);
                }
                sum[j] = over_labels(z[j] + z[2 + j]);
            }
            float2& sums = *reinterpret_cast<float2*>(&shared.bias_grad[buffer][warp][8 * i + lane % 4 * 2]);
            if (lane < 4) sums = make_float2(sum[0], sum[1]);
            piece[2 * (i - first)] = packed(z[0], z[1]);
            piece[2 * (i - first) + 1] = packed(z[2], z[3]);
        }
        if constexpr (PAIR == 2) {
            exchange_words(piece);  // the whole of the one whose number is the lane's
            const int text = text_of(lane % 2), chunk = rank * PIECES + first + lane % 4 / 2;
            to_all(shared.s[slot] + place<ROW>(text, chunk), uint4{piece[0], piece[1], piece[2], piece[3]});
        } else {
#pragma unroll
            for (int high = 0; high < 2; ++high)
                to_all(reinterpret_cast<uint32_t*>(shared.s[slot] + place<ROW>(text_of(high), rank)) + lane % 4, piece[high]);
        }
    }
    publish_shared();
    __syncwarp();
    if (threadIdx.x == 0) arrive_expecting(shared.slopes[slot], (CLUSTER - 1) * OWN * TEXTS * sizeof(bfloat16));
    else if (lane == 0) arrive(shared.slopes[slot]);
}

// dX += S W, the warpgroup's 64 texts.
__device__ __forceinline__ void begin_feature_gradient(
    float (&dx)[PARTS][8][4], const Shared& shared, int slot, int buffer, int warpgroup) {
#pragma unroll
    for (int part = 0; part < PARTS; ++part) pin(dx[part]);
    begin_products();
#pragma unroll
    for (int k = 0; k < LABELS / 16; ++k)
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
            const uint64_t s = matrix(shared.s[slot]) + warpgroup * (64 * 128 / 16) + k * NEXT;
            multiply<false, true>(dx[part], s, matrix(shared.w[buffer][part]) + k * NEXT_ROWS, true);
        }
    commit_products();
}

// S^T X in the place of W, every second part of the features, after the end of dX += S W of both warpgroups.
__device__ __forceinline__ void end_gradients(
    float (&dx)[PARTS][8][4], Logits& grad, Shared& shared, int slot, int buffer, int warpgroup, bool update) {
    const int lane = threadIdx.x % 32, row = threadIdx.x % 128 / 32 * 16 + lane / 4;
#pragma unroll
    for (int i = 0; i < (PARTS + 1) / 2; ++i) {
        const int part = 2 * i + warpgroup;
        const bool made = update && (2 * i + 1 < PARTS || warpgroup == 0);
        if (made) {
            pin(grad);
            begin_products();
#pragma unroll
            for (int k = 0; k < TEXTS / 16; ++k)
                multiply<true, true>(grad, matrix(shared.s[slot]) + k * NEXT_ROWS, matrix(shared.x[part]) + k * NEXT_ROWS, k > 0);
            commit_products();
        }
        await_products<0>();
        if (i == 0) {
#pragma unroll
            for (int p = 0; p < PARTS; ++p) pin(dx[p]);
            meet<1, CONSUMERS>();
        }
        if (made) {
            pin(grad);
#pragma unroll
            for (int n = 0; n < 8; ++n)
#pragma unroll
                for (int high = 0; high < 2; ++high) {
                    bfloat16* const chunk = shared.w[buffer][part] + place<ROW>(row + 8 * high, n);
                    reinterpret_cast<uint32_t*>(chunk)[lane % 4] = packed(grad[n][2 * high], grad[n][2 * high + 1]);
                }
        }
    }
    __syncwarp();
    if (lane == 0) arrive(shared.graded[buffer]);
}

__device__ __forceinline__ void consume(Shared& shared, const Arguments& a, const Tiles& tiles, int rank, bool update) {
    const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);  // the compiler sees that a warp's lanes agree
    float dx[PARTS][8][4], loss[2] = {};
    clear(dx);
    {
        Logits z;
        await(shared.full[0], 0);
        begin_logits(z, shared, 0, warpgroup);
        await_products<0>();
        send_logits(z, shared, rank);
        send_slopes(shared, a, loss, 0, 0, rank);
    }
#pragma unroll 1
    for (int tile = 0; tile < tiles.count - 1; ++tile) {
        const int buffer = tile % BUFFERS, next = (tile + 1) % BUFFERS;
        Logits z;
        await(shared.full[next], (tile + 1) / BUFFERS & 1);
        begin_logits(z, shared, next, warpgroup);
        await(shared.slopes[tile % 2], tile / 2 & 1);
        publish_shared();
        begin_feature_gradient(dx, shared, tile % 2, buffer, warpgroup);
        await_products<1>();
        send_logits(z, shared, rank);
        end_gradients(dx, z, shared, tile % 2, buffer, warpgroup, update);
        send_slopes(shared, a, loss, tile + 1, next, rank);
    }
    const int last = tiles.count - 1;
    await(shared.slopes[last % 2], last / 2 & 1);
    publish_shared();
    begin_feature_gradient(dx, shared, last % 2, last % BUFFERS, warpgroup);
    Logits grad;
    end_gradients(dx, grad, shared, last % 2, last % BUFFERS, warpgroup, update);

    const int column = rank * FEATURES + threadIdx.x % 4 * 2;
    float* const sums = a.dx + static_cast<int64_t>(blockIdx.x / CLUSTER) * (TEXTS * ALL_FEATURES) + column;
#pragma unroll
    for (int high = 0; high < 2; ++high) {
#pragma unroll
        for (int i = 0; i < PARTS * 8; ++i) {
            float2& sum = *reinterpret_cast<float2*>(sums + text_of(high) * ALL_FEATURES + 8 * i);
            const float(&c)[4] = dx[i / 8][i % 8];
            sum = make_float2(sum.x + c[2 * high], sum.y + c[2 * high + 1]);
        }
        loss[high] += __shfl_xor_sync(~0u, loss[high], 1);
        loss[high] += __shfl_xor_sync(~0u, loss[high], 2);
        if (threadIdx.x % 4 == 0) a.loss[blockIdx.x * TEXTS + text_of(high)] += loss[high];
    }
}

__global__ void __launch_bounds__(THREADS, 1) step_kernel(const Arguments a) {
    extern __shared__ __align__(1024) uint8_t memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    const int rank = block_in_cluster();
    const bool update = a.update && *a.finite;
    const Tiles tiles(a);
    if (threadIdx.x == 0) {
        for (Barrier& barrier : shared.full) init(barrier, PRODUCER_WARPS);
        for (Barrier& barrier : shared.graded) init(barrier, CONSUMERS / 32);
        for (Barrier& barrier : shared.slopes) init(barrier, CONSUMERS / 32);
        for (auto& barriers : shared.squares)
            for (Barrier& barrier : barriers) init(barrier, 1);
        init(shared.partials, 1);
        publish_barriers();
        expect_partials(shared);
    }
    share<TEXTS, ROW * PARTS>([&](int text, int chunk) {
        const bfloat16* from = a.x + static_cast<int64_t>(text) * ALL_FEATURES + rank * FEATURES + chunk * 8;
        copy_async(shared.x[chunk / ROW] + place<ROW>(text, chunk % ROW), from, true);
    });
    await_copies();
    publish_shared();
    meet_cluster();
    if (threadIdx.x < CONSUMERS) {
        take_registers<CONSUMER_REGISTERS>();
        consume(shared, a, tiles, rank, update);
    } else {
        give_registers<PRODUCER_REGISTERS>();
        produce(shared, a, tiles, rank, update);
    }
    meet_cluster();  // nobody leaves while others may send
}

cudaLaunchConfig_t configuration(int clusters, void* stream, cudaLaunchAttribute& attribute) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = CLUSTER;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t found{};
    found.gridDim = dim3(clusters * CLUSTER), found.blockDim = dim3(THREADS);
    found.dynamicSmemBytes = sizeof(Shared);
    found.stream = static_cast<cudaStream_t>(stream);
    found.attrs = &attribute, found.numAttrs = 1;
    return found;
}

}  // namespace

// Launch on `stream`, at most one cluster a tile; a.dx has a part for each cluster, a.loss a row for each block. Returns 0, or
// CUDA's error number.
extern "C" int cluster_pass(const Arguments* arguments, int clusters, void* stream) {
    cudaLaunchAttribute attribute;
    const cudaLaunchConfig_t config = configuration(clusters, stream, attribute);
    const int bytes = sizeof(Shared);
    if (cudaError_t error = cudaFuncSetAttribute(step_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes)) return error;
    return cudaLaunchKernelEx(&config, step_kernel, *arguments);
}

// How many clusters fit on the current device at once; negative: CUDA's error number.
extern "C" int cluster_pass_clusters() {
    cudaLaunchAttribute attribute;
    const cudaLaunchConfig_t config = configuration(1, nullptr, attribute);
    const int bytes = sizeof(Shared);
    int clusters;
    cudaError_t error = cudaFuncSetAttribute(step_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (!error) error = cudaOccupancyMaxActiveClusters(&clusters, step_kernel, &config);
    return error ? -static_cast<int>(error) : clusters;
}
