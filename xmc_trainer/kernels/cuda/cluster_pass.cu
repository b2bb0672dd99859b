// The step of labels that share index rows with few others or none (sparse in memory, dense on the chip), and of dense heads, whose
// rows need no spreading. For GPUs of capability 9.0, and up to 128 texts.
//
// A cluster of CLUSTER blocks shares out the features: each block has FEATURES of them. It keeps its part of X on the chip for as
// long as the kernel runs, and its part of dX in registers. Tiles of 64 labels pass through:
//
//     W <- rows of the tile, spread out         z_BT = sum over blocks of X W^T, + bias       s = dloss/dz
//     dX += s W         W <- s^T X              weight <- update(weight, W[index])
//
// so that weights, states and index rows are all that memory moves. Index rows are ascending: a block's part of a row is a run of
// slots, of which `first_slots` tell the first. No other block of the cluster touches it. Of a dense head's rows slots are features.
//
// Half of a block's warps are producers, who spread and update, the others consumers, two warpgroups who multiply. The tiles
// BUFFERS of W are on their way between them:
//
//     producers:  await graded (tile - BUFFERS): update its weights; spread tile over the same buffer; arrive at full (tile)
//                 (what they read from memory for both, and where the slots of tile + 1 are, is on its way before they wait;
//                 a dense head's rows are copied instead: they arrive at full (tile) in the next turn, when the weights to update
//                 then have been asked for)
//     consumers:  await full (tile + 1): logits of tile + 1; await slopes (tile): gradients of tile; arrive at graded (tile);
//                 await partials (tile + 1): slopes of tile + 1
//
// Logits are the sum of what the blocks have: of each label one block of the cluster is the owner, to whom the others send theirs,
// and who sends slopes to all. Both are on their way while products of another tile are made. Whoever sends may overwrite what was
// there before, and what was sent before: a tile's partial logits are staged and sent after all slopes of the tile before have come,
// whose senders had read theirs; and slopes after all partial logits have, whose senders have finished with the slopes of two tiles
// before.
//
// Sums have one order: results are the same, bit for bit, from run to run on GPUs that hold as many clusters.
//
// Compiled for one configuration by -D, besides those of tile_math.cuh: FEATURES (64, 128, 192), CLUSTER (1, 2, 4, 8), DENSE (a
// dense head), CHUNK (1, 2, 4, or 8 if DENSE: slots that are read and written together, a divisor of the fan-in); LABELS is 64,
// WARPS 16.

#include "rows.cuh"

namespace {

constexpr int PARTS = FEATURES / 64;                   // such rows a row of X and W has
constexpr int NEXT = 32 / 16, NEXT_ROWS = 2048 / 16;   // to the next 16 columns, and rows, of an operand
constexpr int OWN = LABELS / CLUSTER, PIECES = OWN / 8;  // labels that a block owns; eights of them
constexpr int BUFFERS = 3;
constexpr int CONSUMERS = 256, PRODUCER_WARPS = 8, BLOCK_THREADS = THREADS;
constexpr int CONSUMER_REGISTERS = PARTS == 3 ? 168 : 144, PRODUCER_REGISTERS = 256 - CONSUMER_REGISTERS;
// Of a producer's warp LANES lanes have a label's slots, a chunk each and so on. Registers hold what they have of STRETCH slots
// one after another: most parts of sparse rows are no longer, at up to 32 slots a block and row.
constexpr bool PAIRED = BF16_WEIGHT && sizeof(INDEX) == 2 && CHUNK > 1;  // two slots a register
constexpr int STATES = RULE == ADAMW ? 2 : RULE == MOMENTUM ? 1 : 0;  // like weights
// Of a dense head's row registers hold the block's part, or as many chunks of it as there is room for.
constexpr int DENSE_CHUNKS = !BF16_WEIGHT || STATES ? 2 : 2 * PARTS;
constexpr int LANES = 4, CHUNKS = DENSE ? DENSE_CHUNKS : (PAIRED || RULE < MOMENTUM ? 12 : 8) / CHUNK;
constexpr int STRETCH = LANES * CHUNKS * CHUNK;
// Whether a producer reads what it will spread before it waits for the gradients of what it updates first. Where states or wider
// weights are read for that too, there are no registers for both.
constexpr bool SPREAD_AHEAD = PAIRED && RULE != ADAMW && !DENSE;
constexpr int ALL_FEATURES = CLUSTER * FEATURES;
static_assert(LABELS == 64 && WARPS == 16 && FEATURES % 64 == 0 && FEATURES <= 192 && CLUSTER <= 8, "see above");
static_assert(DENSE ? CHUNK == 8 && CHUNKS % 2 == 0 && FEATURES % STRETCH == 0 : 4 % CHUNK == 0, "see above");

// The slots that a block has of a label.
struct Run {
    uint32_t index_row;
    uint16_t first, number;
};

// The tiles of a cluster: every n-th.
struct Tiles {
    int first_label, end_label;  // of all
    int start, step, count;      // the first tile's first label; labels to the next; tiles

    __device__ __forceinline__ explicit Tiles(const Arguments& a) {
        first_label = a.first_row * a.group;
        end_label = static_cast<int>(min(static_cast<int64_t>(a.last_row) * a.group, a.labels));
        start = first_label + blockIdx.x / CLUSTER * LABELS;
        step = gridDim.x / CLUSTER * LABELS;
        count = (end_label - start + step - 1) / step;
    }

    __device__ __forceinline__ int label0(int tile) const { return start + tile * step; }
};

// Which buffer a tile has, and the parity of the phase in which it has it.
struct Turn {
    int buffer = 0, parity = 0;

    __device__ __forceinline__ void next() {
        if (++buffer == BUFFERS) buffer = 0, parity ^= 1;
    }
};

// The i-th block to which a block gives what is for all. With states the order is the same for all blocks, without it is that of
// pairs that give to each other, and itself last: measured, the first is faster with momentum (H100; 5 %), the second without (1 %).
struct Receiver {
    int block;
    bool own;

    __device__ __forceinline__ Receiver(int i, int rank)
        : block(STATES ? i : rank ^ (CLUSTER - 1 - i)), own(STATES ? i == rank : i == CLUSTER - 1) {}
};

// Logits of OWN labels, as a block's consumers have them: by warp.
using Pieces = uint4[CONSUMERS / 32][PIECES][32];

struct Shared {
    alignas(1024) bfloat16 x[PARTS][TEXTS * ROW_SIZE];
    bfloat16 w[BUFFERS][PARTS][LABELS * ROW_SIZE];
    bfloat16 s[2][CLUSTER][TEXTS * OWN];           // [texts, labels] of each block's labels
    Pieces partial[CLUSTER];                       // logits of own labels from each block
    Pieces staged[CLUSTER];                        // of each block's labels, on their way there
    alignas(8) uint32_t positive[BUFFERS][TEXTS / 32][OWN];
    float bias[BUFFERS][OWN], bias_grad[BUFFERS][CONSUMERS / 32][OWN];
    Run run[BUFFERS][LABELS];
    uint32_t square[2][CLUSTER][LABELS];           // from each block, its term of the labels' new state (ROWWISE)
    Barrier full[BUFFERS], graded[BUFFERS], partials, slopes[2], squares[2][PRODUCER_WARPS];
};
static_assert(sizeof(Shared) <= 227 << 10, "a block has no more shared memory");

// The text of a consumer's rows (high: 8 rows on) of the logits.
__device__ __forceinline__ int text_of(unsigned thread, int high) { return thread / 32 * 16 + thread % 32 / 4 + 8 * high; }

// Slopes of a block's labels: where eight of a text's are.
__device__ __forceinline__ int place_of_slopes(int text, int chunk) {
    return (text * PIECES + (chunk ^ text % 8 / (8 / PIECES))) * 8;
}

// As an operand of products: rows of texts, or columns (TRANSPOSED).
template <bool TRANSPOSED>
__device__ __forceinline__ uint64_t slopes_matrix(const Shared& shared, int slot) {
    return matrix<sizeof(shared.s[0][0]), 2 * OWN, TRANSPOSED>(shared.s[slot]);
}

// As if the features of all blocks were here.
__device__ __forceinline__ RowOfW<> row_of_w(Shared& shared, int buffer, int row, int rank) {
    return RowOfW<>(shared.w[buffer][0] - rank * (PARTS * LABELS * ROW_SIZE), row);
}

// A tile's rows of the tensors on their way to the L2 cache, this block's share of them: warp 0, 1, ... has a tensor each; the
// first two those that dense heads have not.
__device__ __forceinline__ void fetch_tile(
    const Arguments& a, const Tiles& tiles, int tile, int rank, bool update, unsigned thread) {
    const unsigned number = thread / 32 + (DENSE ? 2 : 0);
    const int first = tiles.label0(tile) + rank * OWN, end = min(first + OWN, tiles.end_label);
    if (tile >= tiles.count || first >= end || number >= (update ? 3 + STATES : 3) || thread % 32) return;
    const void* const state = number == 3 ? a.state0 : a.state1;
    const void* const tensor = number == 0 ? a.first_slots : number == 1 ? a.index : number == 2 ? a.weight : state;
    const uint32_t slot_bytes = number == 1 ? sizeof(INDEX) : number == 2 ? sizeof(WEIGHT) : sizeof(STATE);
    const uint32_t row_bytes = number == 0 ? 2 * CLUSTER : slot_bytes * a.fan_in;
    const uint32_t first_row = number < 2 ? index_row(a, first) : first, end_row = number < 2 ? index_row(a, end - 1) + 1 : end;
    prefetch_rows(tensor, first_row, end_row, row_bytes);
}

// The part of a run that a lane has in registers, of STRETCH slots; they start where a chunk does, with slots before the run's.
struct Stretch {
    int slot0, from, rest;  // the lane's first slot, in the row and from the run's first on; from it on slots of the run
    int swapped;            // 1: of its chunks each second one comes first

    __device__ __forceinline__ Stretch(const Run& run, unsigned thread) {
        slot0 = run.first / CHUNK * CHUNK + thread % LANES * CHUNK;
        from = slot0 - run.first, rest = run.number - from;
        // Chunks of 16 bytes: four of an even label and four of the next are eight in different banks.
        swapped = DENSE ? thread / LANES & 1 : 0;
    }

    // Slots from the lane's first to those of its k-th chunk.
    __device__ __forceinline__ int to(int k) const { return (DENSE ? k ^ swapped : k) * (LANES * CHUNK); }

    __device__ __forceinline__ bool next() {
        slot0 += STRETCH, from += STRETCH, rest -= STRETCH;
        return rest > 0;
    }

    // Whether the run has the i-th slot of the lane's k-th chunk. None but the first chunk begins before the run.
    __device__ __forceinline__ bool has(int k, int i) const {
        return to(k) + i < rest && (DENSE || CHUNK == 1 || k > 0 || from + i >= 0);
    }

    // A row's chunks; zeros beyond the end of the run. (Left as they were, they would need registers all the time.)
    template <typename T>
    __device__ __forceinline__ void load(Chunk<T> (&chunks)[CHUNKS], const T* row) const {
#pragma unroll
        for (int k = 0; k < CHUNKS; ++k) {
            const bool any = to(k) < rest;
            chunks[k] = any ? *reinterpret_cast<const Chunk<T>*>(row + slot0 + to(k)) : Chunk<T>{};
        }
    }

    // The k-th chunk, if the run has all of it.
    template <typename T>
    __device__ __forceinline__ void store(T* row, const Chunk<T>& chunk, int k) const {
        T* const there = row + slot0 + to(k);
        if (!has(k, 0) || !has(k, CHUNK - 1)) return;
        if constexpr (Chunk<T>::PAIRS && CHUNK == 8) store_words(there, chunk.word);
        // The compiler would store each word on its own.
        else if constexpr (Chunk<T>::PAIRS && CHUNK == 4)
            *reinterpret_cast<uint64_t*>(there) = static_cast<uint64_t>(chunk.word[1]) << 32 | chunk.word[0];
        else *reinterpret_cast<Chunk<T>*>(there) = chunk;
    }

    // Chunks at the ends of the run have other blocks' slots, too. Of what the run has of one, aligned pairs are stored as such: one
    // and a single slot an end, for lanes that have their ends in whatever chunks. A run inside one chunk has single slots alone.
    template <typename T>
    __device__ __forceinline__ void store_ends(T* row, const Chunk<T> (&chunks)[CHUNKS]) const {
        if constexpr (DENSE || CHUNK == 1) return;
        T* const there = row + slot0;
        struct alignas(2 * sizeof(T)) Two { T first, second; };
        Chunk<T> tail = chunks[0];
        int last = 0;
#pragma unroll
        for (int k = 1; k < CHUNKS; ++k)
            if (to(k) < rest) tail = chunks[k], last = to(k);
        const int begin = -from, end = rest - last;  // of the first chunk, and of the last: slots that are not the run's; that are
        const bool any = begin < rest, inside = begin > 0 && rest < CHUNK;
        const bool starts = any && begin > 0, ends = any && end > 0 && end < CHUNK;
        if constexpr (CHUNK == 4) {
            if (starts && !inside && begin <= 2) *reinterpret_cast<Two*>(there + 2) = {chunks[0][2], chunks[0][3]};
            if (ends && !inside && end >= 2) *reinterpret_cast<Two*>(there + last) = {tail[0], tail[1]};
        }
        if (starts && (inside || begin % 2)) there[begin] = slot_of(chunks[0], begin);
        if (ends && (inside || end % 2)) there[last + end - 1] = slot_of(tail, end - 1);
    }

private:
    template <typename T>
    __device__ __forceinline__ static T slot_of(const Chunk<T>& chunk, int number) {
        T found = chunk[0];
#pragma unroll
        for (int i = 1; i < CHUNK; ++i) found = number == i ? chunk[i] : found;
        return found;
    }
};

// What a producer needs of a tile before it reads its slots, read before it waits for the gradients of another.
struct Start {
    uint32_t index_row, positive;
    uint16_t first, end;  // slots that the block has of the lane's label
    float bias;

    __device__ __forceinline__ Start(const Arguments& a, const Tiles& tiles, int tile, int rank, unsigned thread) {
        const int label = tiles.label0(tile) + thread / LANES, own0 = tiles.label0(tile) + rank * OWN;
        const bool ok = tile < tiles.count && label < tiles.end_label;
        if constexpr (DENSE) {
            index_row = 0, first = min(rank * FEATURES, a.fan_in);
            end = ok ? min((rank + 1) * FEATURES, a.fan_in) : first;
        } else {
            index_row = ok ? ::index_row(a, label) : 0;
            const uint16_t* const slots = a.first_slots + static_cast<uint64_t>(index_row) * CLUSTER + rank;
            first = ok ? slots[0] : 0;
            end = !ok ? 0 : rank + 1 < CLUSTER ? slots[1] : a.fan_in;
        }
        // This one stands for no label: its loss and slope are zero.
        bias = -1e30f, positive = 0;
        if (tile >= tiles.count) return;
        if (thread < OWN && own0 + thread < tiles.end_label) bias = a.bias ? a.bias[own0 + thread] : 0.0f;
        constexpr int WORDS = TEXTS / 32;
        if (thread < OWN * WORDS && own0 + thread / WORDS < tiles.end_label)
            positive = a.positive[static_cast<int64_t>(own0 - tiles.first_label) * WORDS + thread];
    }

    __device__ __forceinline__ Run run() const { return {index_row, first, static_cast<uint16_t>(end - first)}; }
};

// A part of a label's row, as it is to be spread.
struct Weights {
    Chunk<INDEX> index[CHUNKS];
    Chunk<Stored> value[CHUNKS];

    __device__ __forceinline__ void load(const Arguments& a, const Run& run, const Stretch& stretch, int label) {
        stretch.load(index, row_of<INDEX>(a.index, a, run.index_row));
        stretch.load(value, row_of<Stored>(a.weight, a, label));
    }

    __device__ __forceinline__ void spread(const RowOfW<>& to, const Stretch& stretch) const {
#pragma unroll
        for (int k = 0; k < CHUNKS; ++k)
#pragma unroll
            for (int i = 0; i < CHUNK; ++i) {
                if (!stretch.has(k, i)) continue;
                to[index[k][i]] = narrowed(value[k][i]);
            }
    }
};

// A dense head's rows, a producer's part of its label's, on their way to where consumers read them; zeros where there is nothing.
struct Copies {
    RowOfW<> to;
    const Stored* row;
    int slot0, end;  // the lane's first slot and all that there are, of the row

    __device__ __forceinline__ Copies(const RowOfW<>& to, const Arguments& a, const Run& run, int label, int rank, unsigned thread)
        : to(to), row(row_of<Stored>(a.weight, a, run.number ? label : 0)), slot0(rank * FEATURES + thread % LANES * CHUNK),
          end(run.first + run.number) {}

    // Those of the chunk that begins `on` slots from the lane's first.
    __device__ __forceinline__ void begin(int on) const {
        const bool ok = slot0 + on < end;
        void* const there = &to[slot0 + on];
        const Stored* const from = row + (ok ? slot0 + on : 0);
        if constexpr (BF16_WEIGHT) {
            copy_async(there, from, ok);
        } else {
            Chunk<Stored> value{};
            if (ok) value = *reinterpret_cast<const Chunk<Stored>*>(from);
            *static_cast<uint4*>(there) = uint4{packed(value[0], value[1]), packed(value[2], value[3]), packed(value[4], value[5]),
                                                packed(value[6], value[7])};
        }
    }
};

// A part of a label's row, as it is to be updated.
struct Old {
    Chunk<INDEX> index[CHUNKS];
    Chunk<Stored> weight[CHUNKS];
    Chunk<StoredState> state0[CHUNKS], state1[CHUNKS];
    Chunk<uint16_t> gradient[CHUNKS];

    __device__ __forceinline__ void load(const Arguments& a, const Run& run, const Stretch& stretch, int label) {
        if (!DENSE) stretch.load(index, row_of<INDEX>(a.index, a, run.index_row));
        stretch.load(weight, row_of<Stored>(a.weight, a, label));
        if (RULE == MOMENTUM || RULE == ADAMW) stretch.load(state0, row_of<StoredState>(a.state0, a, label));
        if (RULE == ADAMW) stretch.load(state1, row_of<StoredState>(a.state1, a, label));
    }

    // Zeros outside the run.
    __device__ __forceinline__ void gather(const RowOfW<>& from, const Stretch& stretch) {
#pragma unroll
        for (int k = 0; k < CHUNKS && !DENSE; ++k)
#pragma unroll
            for (int i = 0; i < CHUNK; ++i) gradient[k].set(i, stretch.has(k, i) ? from[index[k][i]] : 0);
    }

    // Of a chunk, gathered before; a dense head's are read when they are needed: they take no registers before.
    __device__ __forceinline__ Chunk<uint16_t> gradients(int k, const RowOfW<>& from, const Stretch& stretch) const {
        if constexpr (!DENSE) return gradient[k];
        else if (stretch.has(k, 0)) return reinterpret_cast<const Chunk<uint16_t>&>(from[stretch.slot0 + stretch.to(k)]);
        else return Chunk<uint16_t>{};
    }

    __device__ __forceinline__ float squares(const Arguments& a, const RowOfW<>& from, const Stretch& stretch) const {
        float sum = 0.0f;
#pragma unroll
        for (int k = 0; k < CHUNKS; ++k) {
            const Chunk<uint16_t> gradient = gradients(k, from, stretch);
#pragma unroll
            for (int i = 0; i < CHUNK; ++i) {
                const float grad = wide(gradient[i]) * a.text_weight;
                sum = fmaf(grad, grad, sum);
            }
        }
        return sum;
    }

    // label_state: the new one (ROWWISE). `read` is called when a dense head's gradients of the k-th chunk have been read: read(k).
    template <typename Read>
    __device__ __forceinline__ void update(
        const Arguments& a, const RowOfW<>& from, const Stretch& stretch, int label, float label_state, Read read) {
        const uint32_t number = static_cast<uint32_t>(a.label_start + label);
        int hashed = BF16_WEIGHT ? mix(number ^ a.key[0]) + stretch.slot0 * COLUMN_HASH : 0;  // the row and the lane's first column
        forget(hashed);
        const auto set = [&](Chunk<Stored>& chunk, int i, float value, uint32_t draw, uint32_t factor) {
            if constexpr (BF16_WEIGHT) chunk.set_upper(i, rounded(value, draw, factor));
            else chunk.set(i, value);
        };
        const auto set_state = [&](Chunk<StoredState>& chunk, int i, float value, uint32_t draw, auto squares) {
            constexpr bool SQUARES = decltype(squares)::value;
            if constexpr (!BYTE_STATE) set(chunk, i, value, draw, SQUARES ? ROUND_STATE1 : ROUND_STATE0);
            else if constexpr (SQUARES) chunk.set(i, static_cast<StoredState>(to_square(value, draw * ROUND_STATE0)));
            else chunk.set(i, static_cast<StoredState>(rounded_halves({value, 0.0f}, {draw * ROUND_STATE0, 0}) >> 8));
        };
#pragma unroll
        for (int k = 0; k < CHUNKS; ++k) {
            const Chunk<uint16_t> gradient = gradients(k, from, stretch);
            if constexpr (DENSE) read(k);
            Chunk<Stored> new_weight;
            Chunk<StoredState> new_state0, new_state1;
#pragma unroll
            for (int i = 0; i < CHUNK; ++i) {
                Values v{wide(weight[k][i]), label_state, 0.0f};
                if (RULE == MOMENTUM || RULE == ADAMW) v.state0 = wide_state<false>(state0[k][i]);
                if (RULE == ADAMW) v.state1 = wide_state<true>(state1[k][i]);
                v = updated<BYTE_STATE>(v, wide(gradient[i]), a.text_weight, a, a.weight_decay);
                const uint32_t draw = element_hash(hashed, a.key[1], stretch.to(k) + i);
                set(new_weight, i, v.weight, draw, ROUND_WEIGHT);
                if (RULE == MOMENTUM || RULE == ADAMW) set_state(new_state0, i, v.state0, draw, std::false_type{});
                if (RULE == ADAMW) set_state(new_state1, i, v.state1, draw, std::true_type{});
            }
            stretch.store(row_of<Stored>(a.weight, a, label), weight[k] = new_weight, k);
            if (RULE == MOMENTUM || RULE == ADAMW) stretch.store(row_of<StoredState>(a.state0, a, label), state0[k] = new_state0, k);
            if (RULE == ADAMW) stretch.store(row_of<StoredState>(a.state1, a, label), state1[k] = new_state1, k);
        }
        stretch.store_ends(row_of<Stored>(a.weight, a, label), weight);
        if (RULE == MOMENTUM || RULE == ADAMW) stretch.store_ends(row_of<StoredState>(a.state0, a, label), state0);
        if (RULE == ADAMW) stretch.store_ends(row_of<StoredState>(a.state1, a, label), state1);
    }
};

// The new state of the lane's label (ROWWISE): the sum of the blocks' terms; this block's is that of `sum` over the label's lanes.
__device__ __forceinline__ float exchange_squares(
    Shared& shared, const Arguments& a, float sum, float old_state, int tile, int rank, unsigned thread) {
    const int lane = thread % 32, slot = tile % 2;
    Barrier& barrier = shared.squares[slot][thread / 32];
    if (lane == 0) arrive_expecting(barrier, CLUSTER * 8 * sizeof(float));
#pragma unroll
    for (int other = 1; other < LANES; other *= 2) sum += __shfl_xor_sync(~0u, sum, other);
    sum *= (1.0f - a.beta1) / a.fan_in;
    if (rank == 0) sum = a.beta1 * old_state + sum;
    uint32_t(&squares)[CLUSTER][LABELS] = shared.square[slot];
#pragma unroll
    for (int block = lane % LANES; block < CLUSTER; block += LANES) {
        const uint32_t here = address(&squares[rank][thread / LANES]);
        send(address_in(block, here), __float_as_uint(sum), address_in(block, address(&barrier)));
    }
    __syncwarp();
    await(barrier, tile / 2 & 1);
    float label_state = 0.0f;
#pragma unroll
    for (int r = 0; r < CLUSTER; ++r) label_state += __uint_as_float(squares[r][thread / LANES]);
    return label_state;
}

// A tile on its way back to memory: a producer's label of it, and what it reads before the gradients are there.
struct Update {
    int label;
    Run run;
    Old old;
    float label_state;

    __device__ __forceinline__ void load(const Run& own, const Arguments& a, const Tiles& tiles, int tile, int rank, unsigned thread) {
        label = tiles.label0(tile) + thread / LANES;
        run = own;
        old.load(a, run, Stretch(run, thread), label);
        const bool state_here = RULE == ROWWISE && rank == 0 && label < tiles.end_label;
        label_state = state_here ? static_cast<const float*>(a.state0)[label] : 0.0f;
    }

    // `read` is called when the warp has read all gradients; of a dense head when the lane has read those of the chunk that begins
    // `on` slots from its first: read(on). Whatever comes to their place is on its way while weights are updated.
    template <typename Read>
    __device__ __forceinline__ void end(
        Shared& shared, const Arguments& a, const Tiles& tiles, int tile, int buffer, int rank, unsigned thread, Read read) {
        const RowOfW<> gradient = row_of_w(shared, buffer, thread / LANES, rank);
        Stretch stretch(run, thread);
        old.gather(gradient, stretch);
        if constexpr (RULE == ROWWISE) {
            float sum = old.squares(a, gradient, stretch);
            for (Stretch rest = stretch; rest.next();) {
                Old more;
                if (!DENSE) rest.load(more.index, row_of<INDEX>(a.index, a, run.index_row));
                more.gather(gradient, rest);
                sum += more.squares(a, gradient, rest);
            }
            __syncwarp();
            label_state = exchange_squares(shared, a, sum, label_state, tile, rank, thread);
            if (rank == 0 && thread % LANES == 0 && label < tiles.end_label) static_cast<float*>(a.state0)[label] = label_state;
        }
        for (int on = 0;; on += STRETCH) {
            const bool more = DENSE ? on + STRETCH < FEATURES : __any_sync(~0u, stretch.rest > STRETCH);
            if (!DENSE && !more) read(0);
            forget(label);
            old.update(a, gradient, stretch, label, label_state, [&](int k) { read(on + stretch.to(k)); });
            if (!more) break;
            stretch.next();
            old.load(a, run, stretch, label);
            old.gather(gradient, stretch);
        }
        const int own = tiles.label0(tile) + rank * OWN + thread;
        if (thread < OWN && own < tiles.end_label) {
            const Values bias = bias_values(a, own, shared.bias[buffer][thread]);
            update_bias<CONSUMERS / 32>(a, own, bias, &shared.bias_grad[buffer][0][thread], OWN);
        }
    }
};

__device__ __forceinline__ void produce(Shared& shared, const Arguments& a, int rank) {
    const Tiles tiles(a);
    const bool update = a.update && *a.finite;
    int thread = threadIdx.x - CONSUMERS;
#pragma unroll 1
    for (int tile = 0; tile < 2; ++tile) fetch_tile(a, tiles, tile, rank, update, thread);
    Start start(a, tiles, 0, rank, thread);
    Run run_before{};
    Turn turn;
    const auto publish_tile = [&](int buffer) {
        publish_shared();
        __syncwarp();
        if (thread % 32 == 0) arrive(shared.full[buffer]);
    };
#pragma unroll 1
    for (int tile = 0; tile < tiles.count + (update ? BUFFERS : DENSE); ++tile) {
        const int buffer = turn.buffer, before = tile - BUFFERS;
        const bool graded = before >= 0 && before < tiles.count, spreads = tile < tiles.count;
        forget(thread);
        fetch_tile(a, tiles, tile + 2, rank, update, thread);
        const int label = tiles.label0(tile) + thread / LANES;
        Weights weights;
        Update updating;
        if (graded && update) updating.load(run_before, a, tiles, before, rank, thread);
        const Run run = start.run();
        __syncwarp();
        if (thread % LANES == 0) shared.run[buffer][thread / LANES] = run;
        if (SPREAD_AHEAD && spreads) weights.load(a, run, Stretch(run, thread), label);
        const Start next(a, tiles, tile + 1, rank, thread);
        run_before = shared.run[buffer + 1 == BUFFERS ? 0 : buffer + 1][thread / LANES];
        // Awaited only here: what was asked for above for the update takes as long.
        if (DENSE && tile > 0 && tile <= tiles.count) await_copies(), publish_tile(buffer > 0 ? buffer - 1 : BUFFERS - 1);
        const RowOfW<> to = row_of_w(shared, buffer, thread / LANES, rank);
        const Copies copies(to, a, run, label, rank, thread);
        const auto make_room = [&](int on) {
            if (!spreads) return;
            if constexpr (DENSE) {
                copies.begin(on);
            } else {
                __syncwarp();
                // The warp's labels are eight rows, 1024 bytes a part.
#pragma unroll
                for (int i = 0; i < 2 * PARTS; ++i) {
                    uint4* const rows = reinterpret_cast<uint4*>(shared.w[buffer][i / 2] + thread / 32 * (8 * ROW_SIZE));
                    rows[i % 2 * 32 + thread % 32] = uint4{0, 0, 0, 0};
                }
            }
        };
        if (graded) await(shared.graded[buffer], turn.parity ^ 1);
        if (graded && update) {
            updating.end(shared, a, tiles, before, buffer, rank, thread, make_room);
        } else {
#pragma unroll
            for (int k = 0; k < (DENSE ? 2 * PARTS : 1); ++k) make_room(Stretch(run, thread).to(k));
        }
        __syncwarp();
        forget(thread);
        if (spreads) {
            if (!SPREAD_AHEAD && !DENSE) weights.load(a, run, Stretch(run, thread), label);
            if (thread < OWN) shared.bias[buffer][thread] = start.bias;
            if (thread < OWN * (TEXTS / 32)) shared.positive[buffer][thread % (TEXTS / 32)][thread / (TEXTS / 32)] = start.positive;
            if constexpr (!DENSE) {
                Stretch stretch(run, thread);
                for (;;) {
                    weights.spread(to, stretch);
                    if (!stretch.next()) break;
                    weights.load(a, run, stretch, label);
                }
                publish_tile(buffer);
            }
        }
        start = next;
        turn.next();
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
    arrive_expecting(shared.partials, static_cast<int>(sizeof(Pieces)) * (CLUSTER - 1));
}

// Each label's to where they are sent from, or read: own ones are never sent.
__device__ __forceinline__ void stage_logits(Logits& z, Shared& shared, int rank, unsigned thread) {
    pin(z);
#pragma unroll
    for (int owner = 0; owner < CLUSTER; ++owner) {
        uint4* const to = &(owner == rank ? shared.partial : shared.staged)[owner][thread / 32][0][thread % 32];
#pragma unroll
        for (int i = 0; i < PIECES; ++i) {
            const float(&c)[4] = z[owner * PIECES + i];
            to[32 * i] = uint4{__float_as_uint(c[0]), __float_as_uint(c[1]), __float_as_uint(c[2]), __float_as_uint(c[3])};
        }
    }
}

// To their owners, after `publish_shared`. The warp's number and its block's are such that the compiler sees that lanes agree.
__device__ __forceinline__ void send_logits(Shared& shared, int rank, int warp, unsigned thread) {
    __syncwarp();
    if (thread % 32) return;
#pragma unroll
    for (int i = 0; i < CLUSTER; ++i) {
        const Receiver owner(i, rank);
        if (owner.own) continue;
        send_bulk(address_in(owner.block, address(shared.partial[rank][warp])), shared.staged[owner.block][warp],
                  sizeof(Pieces) / (CONSUMERS / 32), address_in(owner.block, address(&shared.partials)));
    }
}

// Slopes of the block's own labels, to all blocks; losses are added to a thread's two texts'.
__device__ __forceinline__ void send_slopes(
    Shared& shared, const Arguments& a, float (&loss)[2], int tile, int buffer, int rank, int warp, unsigned thread) {
    const int lane = thread % 32, slot = tile % 2;
    bfloat16* const own = shared.s[slot][rank];
    if (CLUSTER > 1) {
        await(shared.partials, tile & 1);
        if (thread == 0) expect_partials(shared);
    }
    constexpr int PAIR = PIECES < 2 ? PIECES : 2;
#pragma unroll
    for (int first = 0; first < PIECES; first += PAIR) {
        float z[PAIR][4], slope[PAIR][4], p[2] = {};
        uint32_t positive[PAIR][2];
        bool plain = text_of(thread, 1) < a.texts;  // no positives among them, nor columns that are no texts
#pragma unroll
        for (int i = 0; i < PAIR; ++i) {
#pragma unroll
            for (int r = 0; r < CLUSTER; ++r) {
                const uint4 value = shared.partial[r][warp][first + i][lane];
                const uint32_t got[4] = {value.x, value.y, value.z, value.w};
#pragma unroll
                for (int j = 0; j < 4; ++j) z[i][j] = r == 0 ? __uint_as_float(got[j]) : z[i][j] + __uint_as_float(got[j]);
            }
            const int label = 8 * (first + i) + lane % 4 * 2;
            const float2 biases = *reinterpret_cast<const float2*>(shared.bias[buffer] + label);
            const uint2 positives = *reinterpret_cast<const uint2*>(shared.positive[buffer][warp / 2] + label);
            positive[i][0] = positives.x, positive[i][1] = positives.y;
            plain = plain && (positives.x | positives.y) == 0;
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const float bias = j ? biases.y : biases.x;
#pragma unroll
                for (int high = 0; high < 2; ++high) {
                    float& x = z[i][2 * high + j];
                    x += bias;
                    slope[i][2 * high + j] = slope_of_negative(x, p[high]);
                }
            }
        }
        if (__all_sync(~0u, plain && !overflowed(p[0]) && !overflowed(p[1]))) {
#pragma unroll
            for (int high = 0; high < 2; ++high) loss[high] += loss_of_negatives(p[high]);
        } else {
#pragma unroll
            for (int i = 0; i < PAIR; ++i)
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const int text = text_of(thread, j / 2);
                    slope[i][j] = slope_of_any(z[i][j], positive[i][j % 2] >> text % 32 << 31, text < a.texts, loss[j / 2]);
                }
        }
        float sums[2 * PAIR];
#pragma unroll
        for (int i = 0; i < PAIR; ++i) {
            const float(&s)[4] = slope[i];
            sums[2 * i] = s[0] + s[2], sums[2 * i + 1] = s[1] + s[3];
        }
        const int column = sum_of_lanes(sums, lane);
        if (lane < 8 * PAIR) shared.bias_grad[buffer][warp][8 * (first + column / 2) + lane % 4 * 2 + column % 2] = sums[0];
#pragma unroll
        for (int i = 0; i < PAIR; ++i)
#pragma unroll
            for (int high = 0; high < 2; ++high) {
                uint32_t* const to = reinterpret_cast<uint32_t*>(own + place_of_slopes(text_of(thread, high), first + i));
                to[lane % 4] = packed(slope[i][2 * high], slope[i][2 * high + 1]);
            }
    }
    publish_shared();
    __syncwarp();
    if (lane) return;
    bfloat16* const part = own + warp * (16 * OWN);
#pragma unroll
    for (int i = 0; i < CLUSTER; ++i) {
        const Receiver other(i, rank);
        if (other.own) continue;
        send_bulk(address_in(other.block, address(part)), part, 16 * OWN * sizeof(bfloat16),
                  address_in(other.block, address(&shared.slopes[slot])));
    }
    if (warp == 0) arrive_expecting(shared.slopes[slot], (CLUSTER - 1) * OWN * TEXTS * sizeof(bfloat16));
    else arrive(shared.slopes[slot]);
}

// dX += S W, the warpgroup's 64 texts.
__device__ __forceinline__ void begin_feature_gradient(
    float (&dx)[PARTS * 8][4], const Shared& shared, int slot, int buffer, int warpgroup) {
    pin(dx);
    begin_products();
#pragma unroll
    for (int k = 0; k < LABELS / 16; ++k) {
        const uint64_t s = slopes_matrix<false>(shared, slot) + warpgroup * (64 * 2 * OWN / 16) +
                           (16 * k / OWN * sizeof(shared.s[0][0]) + 16 * k % OWN * sizeof(bfloat16)) / 16;
        multiply<false, true>(dx, s, matrix<sizeof(shared.w[0][0])>(shared.w[buffer]) + k * NEXT_ROWS, true);
    }
    commit_products();
}

// S^T X in the place of W, every second part of the features, after the end of dX += S W of both warpgroups.
__device__ __forceinline__ void end_gradients(
    float (&dx)[PARTS * 8][4], Logits& grad, Shared& shared, int slot, int buffer, int warpgroup, bool update, unsigned thread) {
    const int lane = thread % 32, matrix_of_lane = lane / 8;
#pragma unroll
    for (int i = 0; i < (PARTS + 1) / 2; ++i) {
        const int part = 2 * i + warpgroup;
        const bool made = update && (2 * i + 1 < PARTS || warpgroup == 0);
        if (made) {
            pin(grad);
            begin_products();
#pragma unroll
            for (int k = 0; k < TEXTS / 16; ++k) {
                const uint64_t s = slopes_matrix<true>(shared, slot) + k * (16 * 2 * OWN / 16);
                multiply<true, true>(grad, s, matrix(shared.x[part]) + k * NEXT_ROWS, k > 0);
            }
            commit_products();
        }
        await_products<0>();
        if (i == 0) {
            pin(dx);
            meet<CONSUMERS>(1);
        }
        if (made) {
            pin(grad);
            // Of four matrices the first two are one chunk of 16 rows, the others the next; place<ROW>(row, n + 1) is
            // place<ROW>(row, 1) ^ 8 n for an even n.
            const int row = thread % 128 / 32 * 16 + matrix_of_lane % 2 * 8 + lane % 8, first = place<ROW>(row, matrix_of_lane / 2);
#pragma unroll
            for (int n = 0; n < 8; n += 2) {
                uint32_t words[4];
#pragma unroll
                for (int j = 0; j < 4; ++j) words[j] = packed(grad[n + j / 2][j % 2 * 2], grad[n + j / 2][j % 2 * 2 + 1]);
                store4(shared.w[buffer][part] + (first ^ 8 * n), words);
            }
        }
    }
    __syncwarp();
    if (lane == 0) arrive(shared.graded[buffer]);
}

__device__ __forceinline__ void consume(Shared& shared, const Arguments& a, int rank) {
    const Tiles tiles(a);
    const bool update = a.update && *a.finite;
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), warpgroup = warp / 4;  // the compiler sees that a warp's lanes agree
    unsigned thread = threadIdx.x;
    forget(thread);
    float dx[PARTS * 8][4] = {}, loss[2] = {};
    Turn turn, turn_before;
#pragma unroll 1
    for (int tile = 0; tile <= tiles.count; ++tile) {
        const int slot_before = tile % 2 ^ 1;
        const bool any = tile < tiles.count;
        Logits z;
        if (any) {
            await(shared.full[turn.buffer], turn.parity);
            begin_logits(z, shared, turn.buffer, warpgroup);
            await_products<0>();
        }
        if (tile > 0) await(shared.slopes[slot_before], (tile - 1) / 2 & 1);
        if (any) {
            stage_logits(z, shared, rank, thread);
            publish_shared();
        }
        if (tile == 0) {
            send_logits(shared, rank, warp, thread);
        } else {
            begin_feature_gradient(dx, shared, slot_before, turn_before.buffer, warpgroup);
            if (any) send_logits(shared, rank, warp, thread);
            end_gradients(dx, z, shared, slot_before, turn_before.buffer, warpgroup, update, thread);
        }
        if (any) send_slopes(shared, a, loss, tile, turn.buffer, rank, warp, thread);
        turn_before = turn;
        turn.next();
    }

    const int column = rank * FEATURES + thread % 4 * 2;
    float* const sums = a.dx + static_cast<int64_t>(blockIdx.x / CLUSTER) * (TEXTS * ALL_FEATURES) + column;
#pragma unroll
    for (int high = 0; high < 2; ++high) {
#pragma unroll
        for (int i = 0; i < PARTS * 8; ++i) {
            float2& sum = *reinterpret_cast<float2*>(sums + text_of(thread, high) * ALL_FEATURES + 8 * i);
            const float(&c)[4] = dx[i];
            sum = make_float2(sum.x + c[2 * high], sum.y + c[2 * high + 1]);
        }
        loss[high] += __shfl_xor_sync(~0u, loss[high], 1);
        loss[high] += __shfl_xor_sync(~0u, loss[high], 2);
        if (thread % 4 == 0) a.loss[blockIdx.x * TEXTS + text_of(thread, high)] += loss[high];
    }
}

__global__ void __launch_bounds__(THREADS, 1) step_kernel(const Arguments a) {
    extern __shared__ __align__(1024) uint8_t memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    const int rank = block_in_cluster();
    if (threadIdx.x == 0) {
        for (Barrier& barrier : shared.full) init(barrier, PRODUCER_WARPS);
        for (Barrier& barrier : shared.graded) init(barrier, CONSUMERS / 32);
        for (auto& barriers : shared.squares)
            for (Barrier& barrier : barriers) init(barrier, 1);
        for (Barrier& barrier : shared.slopes) init(barrier, CONSUMERS / 32);
        init(shared.partials, 1);
        publish_barriers();
        expect_partials(shared);
    }
    share<TEXTS, ROW * PARTS>([&](int text, int chunk, int) {
        const bfloat16* from = a.x + static_cast<int64_t>(text) * ALL_FEATURES + rank * FEATURES + chunk * 8;
        copy_async(shared.x[chunk / ROW] + place<ROW>(text, chunk % ROW), from, true);
    });
    await_copies();
    publish_shared();
    meet_cluster();
    if (threadIdx.x < CONSUMERS) {
        take_registers<CONSUMER_REGISTERS>();
        consume(shared, a, rank);
    } else {
        give_registers<PRODUCER_REGISTERS>();
        produce(shared, a, rank);
    }
    meet_cluster();  // nobody leaves while others may send
}

}  // namespace

#include "launch_clusters.cuh"
