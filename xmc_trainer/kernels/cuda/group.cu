// The step of labels that share index rows, in one pass over the weights: loss, feature gradient and update. For GPUs of capability 9.0.
//
// A tile is LABELS labels of one index row, whose F features are gathered from X^T [d, B]. A warpgroup takes 64 labels. TEXTS texts at a
// time are the rows of its products:
//
//     z^T_BG = x_FB^T w_GF^T + bias     loss_B += sum_G loss(z, y)     s^T_BG = dloss/dz overwrites z in registers, where dX reads it
//     dX_BF = s^T_BG w_GF (atomic)      dw_GF = s_GB x_FB^T, with s in shared memory     w_GF, bias <- update
//
// Two warpgroups share x. Each computes half of the features of dX for the labels of both, from s in shared memory. Several blocks share
// a multiprocessor: one loads while another multiplies.
//
// A thread has rows lane / 4 and lane / 4 + 8 of its warp's 16, in both halves of the 128 rows. The columns of X are ordered such that
// these four rows are consecutive texts, and the rows of eight threads 32 consecutive texts. So feature gradients go to device memory in
// whole lines of 128 bytes without staging. Row 64 half + 16 warp + 8 high + r is text 32 warp + 4 r + 2 half + high.
//
//     barrier (all threads wait)        what then holds
//     __syncthreads, once a tile        the previous tile is done: offset, bias, w and the sums of slopes may be written
//     __syncthreads, before gathering   offset is written; the previous texts' products are done: x and s may be written
//     __syncthreads, after copies       x and w are written, and published by the threads that copied them
//     __syncthreads, after slopes       s is published, the sums of slopes are written. With slopes in registers this barrier comes after
//                                       the feature gradient, which does not need it
//
// tile_math.py has the same update rules and stochastic rounding in Triton.
//
// Compile with -D: WEIGHT (float or bfloat16, of states too), INDEX (int16_t or int32_t), RULE, LOSS, WARPS (4, 8), FEATURES (64, 128; F
// at most; 128 with 8 warps), ONE_TILE (at most TEXTS texts).

#include "losses.cuh"
#include "operands.cuh"

namespace {

constexpr int THREADS = 32 * WARPS, LABELS = 16 * WARPS, WARPGROUPS = WARPS / 4, BLOCKS = ONE_TILE ? 4 - WARPGROUPS : 1;
constexpr int FEATURE_PARTS = FEATURES / 64;  // parts of W in shared memory
constexpr int X_PITCH = TEXTS / 8, W_PITCH = FEATURES / 8;  // chunks in a row
constexpr bool BF16_WEIGHT = sizeof(WEIGHT) == 2;
constexpr bool SLOPES_IN_REGISTERS = WARPGROUPS == 1;  // for the feature gradient
static_assert(FEATURES % 64 == 0 && (WARPGROUPS == 1 || FEATURE_PARTS == WARPGROUPS), "each warpgroup makes a part of the feature gradient");

struct Shared {
    alignas(1024) bfloat16 x[2][FEATURES * ROW_SIZE];  // [half of the texts][features, 64 texts]
    bfloat16 w[FEATURE_PARTS][LABELS * ROW_SIZE];
    bfloat16 s[WARPGROUPS][TEXTS * ROW_SIZE];  // [texts, labels]
    int32_t offset[FEATURES];
    float bias[LABELS], bias_grad[4][LABELS];
};

using Logits = float[2][8][4];   // [half][n][2 high + j]: label 8 n + lane % 4 * 2 + j
using Slopes = uint32_t[2][4][4];  // [half][n / 2][n % 2 * 2 + high]: pairs of labels, as a product takes A from registers

__device__ __forceinline__ int text_of(int half, int high) {
    return threadIdx.x % 128 / 32 * 32 + threadIdx.x % 32 / 4 * 4 + 2 * half + high;
}

// The first label of a thread's warpgroup.
__device__ __forceinline__ int first_label() { return threadIdx.x / 128 * 64; }

// Stores the slopes of labels 8 n + lane % 4 * 2 and the next in registers and shared memory.
__device__ __forceinline__ void keep_slopes(Slopes& s, Shared& shared, int half, int n, int high, const float (&slope)[2]) {
    const int lane = threadIdx.x & 31, row = 64 * half + threadIdx.x % 128 / 32 * 16 + 8 * high + lane / 4;
    s[half][n / 2][n % 2 * 2 + high] = packed(slope[0], slope[1]);
    uint32_t* to = reinterpret_cast<uint32_t*>(shared.s[threadIdx.x / 128] + place<ROW>(row, n)) + lane % 4;
    *to = s[half][n / 2][n % 2 * 2 + high];
}

// Shares ROWS x PITCH chunks among the threads: calls take(row, chunk, i) for the thread's i-th. A thread's chunk number is constant.
template <int ROWS, int PITCH, typename Take>
__device__ __forceinline__ void share(Take take) {
    constexpr int STEP = THREADS / PITCH;
#pragma unroll
    for (int i = 0; i < ROWS / STEP; ++i) take(threadIdx.x / PITCH + i * STEP, threadIdx.x % PITCH, i);
}

// The labels of a tile.
struct Tile {
    int row;
    int64_t label0;  // the first label
    int local;       // label0, counted from the first label of first_row
    int count;       // labels; zero or negative in a tile past the last label

    __device__ __forceinline__ Tile(const Arguments& a, int number) {
        const int tiles = (a.group + LABELS - 1) / LABELS, first = tiles == 1 ? 0 : number % tiles * LABELS;
        row = a.first_row + (tiles == 1 ? number : number / tiles);
        label0 = static_cast<int64_t>(row) * a.group + first;
        local = (row - a.first_row) * a.group + first;
        count = static_cast<int>(min(static_cast<int64_t>(min(LABELS, a.group - first)), a.labels - label0));
    }
};

// A thread's first loads for a tile, issued during the previous tile. Nothing may use a value before its accessor is called.
struct Ahead {
    int32_t index = 0;    // of slot `thread`
    float bias = -1e30f;  // of label `thread`; the default is for padding labels: their loss and slope are zero
    int32_t positive = 0;  // whether the tile has a positive

    __device__ __forceinline__ Ahead(const Arguments& a, int number, int numbers) {
        const Tile tile(a, number);
        const int thread = threadIdx.x;
        if (number >= numbers || tile.count <= 0) return;
        if (thread < a.fan_in) index = static_cast<const INDEX*>(a.index)[static_cast<int64_t>(tile.row) * a.fan_in + thread];
        if (thread < tile.count) bias = a.bias ? a.bias[tile.label0 + thread] : 0.0f;
        // Makes the address differ by thread: a uniform load would go to a uniform register, and the warp would wait for it.
        int place = number;
        forget(place);
        positive = a.any_positive[place];
    }

    // Returns the offset in X^T of the feature of slot `thread`, or -1 if there is no such slot.
    __device__ __forceinline__ int32_t offset(const Arguments& a, int thread) {
        forget(index);
        return thread < a.fan_in ? index * a.columns : -1;
    }

    __device__ __forceinline__ bool any_positive() {
        forget(positive);
        return positive != 0;
    }
};

// Copies the tile's weights to shared memory as bfloat16: weights 8 c to 8 c + 7 of label g to to(g, c). Pads with zeros.
template <typename To>
__device__ __forceinline__ void load_weights(const Arguments& a, const Tile& tile, To to) {
    const WEIGHT* weight = static_cast<const WEIGHT*>(a.weight) + tile.label0 * a.fan_in;
    share<LABELS, W_PITCH>([&](int g, int chunk, int) {
        const int f = 8 * chunk;
        const bool ok = g < tile.count && f < a.fan_in;
        const WEIGHT* from = weight + (ok ? g * a.fan_in + f : 0);
        if constexpr (BF16_WEIGHT) {
            copy_async(to(g, chunk), from, ok);
        } else {
            const float4 none = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            const float4 x = ok ? reinterpret_cast<const float4*>(from)[0] : none;
            const float4 y = ok ? reinterpret_cast<const float4*>(from)[1] : none;
            const __nv_bfloat162 packed[4] = {__floats2bfloat162_rn(x.x, x.y), __floats2bfloat162_rn(x.z, x.w),
                                              __floats2bfloat162_rn(y.x, y.y), __floats2bfloat162_rn(y.z, y.w)};
            *reinterpret_cast<uint4*>(to(g, chunk)) = *reinterpret_cast<const uint4*>(packed);
        }
    });
}

// Prefetches the tile's rows of a tensor, which are contiguous, to the L2 cache.
__device__ __forceinline__ void fetch_rows(const Arguments& a, const Tile& tile, const void* tensor) {
    if (tile.count > 0) prefetch(static_cast<const WEIGHT*>(tensor) + tile.label0 * a.fan_in, sizeof(WEIGHT) * tile.count * a.fan_in);
}

// Prefetches the tile's states. Call it shortly before they are read: the prefetches of all blocks together fill the cache.
__device__ __forceinline__ void fetch_states(const Arguments& a, const Tile& tile) {
    if (threadIdx.x == 0) {
        if (RULE >= MOMENTUM) fetch_rows(a, tile, a.state0);
        if (RULE == ADAMW) fetch_rows(a, tile, a.state1);
    }
    __syncwarp();  // for convergence alone
}

// Loads the positives of a thread's four texts. positive[j]: bit 4 n + 2 half + high is for label 8 n + lane % 4 * 2 + j.
__device__ __forceinline__ void load_positives(uint32_t (&positive)[2], const Arguments& a, const Tile& tile, int text0) {
#pragma unroll
    for (int n = 0; n < 8; ++n)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const int g = first_label() + 8 * n + threadIdx.x % 4 * 2 + j;
            const int64_t word = static_cast<int64_t>(tile.local + g) * (a.columns / 32) + (text0 + text_of(0, 0)) / 32;
            if (g < tile.count) positive[j] |= (a.positive[word] >> (threadIdx.x % 32 / 4 * 4) & 15) << 4 * n;
        }
}

// Computes from logits: slopes; loss[2 half + high] of a thread's texts; sum[j][n] over these texts of the slopes of label
// 8 n + lane % 4 * 2 + j. Without ANY all logits must be of negatives: a text's losses share one logarithm. Returns false, for the whole
// warp, if a loss overflowed; then the results are invalid. ANY takes positives, padding columns and large logits too.
template <bool ANY>
__device__ __forceinline__ bool slopes(
    const Logits& z, Slopes& s, Shared& shared, float (&loss)[4], float (&sum)[2][8], const Arguments& a, const uint32_t (&positive)[2],
    int text0) {
#pragma unroll
    for (int text = 0; text < 4; ++text) loss[text] = 0.0f;
#pragma unroll
    for (int n = 0; n < 8; ++n)
#pragma unroll
        for (int text = 0; text < 4; ++text) {
            const bool is_text = text0 + text_of(text / 2, text % 2) < a.texts;
            float slope[2];
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const float logit = z[text / 2][n][text % 2 * 2 + j];
                if constexpr (ANY) slope[j] = slope_of_any(logit, positive[j] >> (4 * n + text) << 31, is_text, loss[text]);
                else slope[j] = slope_of_negative(logit, loss[text]);
                sum[j][n] = text == 0 ? slope[j] : sum[j][n] + slope[j];
            }
            keep_slopes(s, shared, text / 2, n, text % 2, slope);
        }
    bool fine = true;
#pragma unroll
    for (int text = 0; text < 4; ++text) {
        if (ANY) continue;
        fine = fine && !overflowed(loss[text]);
        loss[text] = loss_of_negatives(loss[text]);
    }
    return __all_sync(~0u, fine);
}

// Sums the losses of four texts over the four lanes of a row. A lane gets the sum of text lane % 4.
__device__ __forceinline__ float over_columns(const float (&loss)[4]) {
    const bool odd = threadIdx.x & 1, upper = threadIdx.x & 2;
    float pair[2];
#pragma unroll
    for (int i = 0; i < 2; ++i)
        pair[i] = (odd ? loss[2 * i + 1] : loss[2 * i]) + __shfl_xor_sync(~0u, odd ? loss[2 * i] : loss[2 * i + 1], 1);
    return (upper ? pair[1] : pair[0]) + __shfl_xor_sync(~0u, upper ? pair[0] : pair[1], 2);
}

__device__ __forceinline__ void add_losses(float loss, float* to) {
    atomicAdd(to + text_of(threadIdx.x % 4 / 2, threadIdx.x % 2), loss);
}

__device__ __forceinline__ void gather_features(Shared& shared, const Arguments& a, int text0) {
    // Offsets are read before the copies are issued: accesses to shared memory are in order, so behind copies each read would wait.
    int offset[FEATURES * X_PITCH / THREADS];
    share<FEATURES, X_PITCH>([&](int f, int, int i) { offset[i] = shared.offset[f]; });
    share<FEATURES, X_PITCH>([&](int f, int c, int i) {
        copy_async(shared.x[c / ROW] + place<ROW>(f, c % ROW), a.x + max(offset[i], 0) + text0 + c * 8, offset[i] >= 0);
    });
}

// z = X^T W^T + bias.
__device__ __forceinline__ void multiply_logits(Logits& z, const Shared& shared) {
#pragma unroll
    for (int n = 0; n < 8; ++n) {
        const float2 bias = *reinterpret_cast<const float2*>(shared.bias + first_label() + 8 * n + threadIdx.x % 4 * 2);
#pragma unroll
        for (int half = 0; half < 2; ++half) z[half][n][0] = z[half][n][2] = bias.x, z[half][n][1] = z[half][n][3] = bias.y;
    }
    pin(z[0]), pin(z[1]);
    begin_products();
#pragma unroll
    for (int k = 0; k < FEATURES / 16; ++k)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const uint64_t w = matrix(shared.w[k / 4] + first_label() * ROW_SIZE) + k % 4 * NEXT;
            multiply<true, false>(z[half], matrix(shared.x[half]) + k * NEXT_ROWS, w, true);
        }
    end_products();
    pin(z[0]), pin(z[1]);
}

// dX^T[index] += W^T S for one tile of texts.
__device__ __forceinline__ void feature_gradient(Slopes& s, const Shared& shared, const Arguments& a, int text0) {
    float* const to = a.dx + text0 + text_of(0, 0);
#pragma unroll
    for (int i = 0; i < FEATURE_PARTS / WARPGROUPS; ++i) {
        const int part = WARPGROUPS == 1 ? i : threadIdx.x / 128;
        float c[2][8][4] = {};
        if constexpr (SLOPES_IN_REGISTERS) pin(s[0]), pin(s[1]);
        pin(c[0]), pin(c[1]);
        begin_products();
#pragma unroll
        for (int k = 0; k < LABELS / 16; ++k)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const uint64_t w = matrix(shared.w[part]) + k * NEXT_ROWS;
                if constexpr (SLOPES_IN_REGISTERS) multiply<true>(c[half], s[half][k], w, k > 0);
                else multiply<false, true>(c[half], matrix(shared.s[k / 4] + 64 * half * ROW_SIZE) + k % 4 * NEXT, w, k > 0);
            }
        end_products();
        if constexpr (SLOPES_IN_REGISTERS) pin(s[0]), pin(s[1]);
        pin(c[0]), pin(c[1]);
#pragma unroll
        for (int n = 0; n < 8; ++n) {
            const int2 offset = *reinterpret_cast<const int2*>(shared.offset + 64 * part + 8 * n + threadIdx.x % 4 * 2);
            if (offset.x >= 0) atomicAdd(reinterpret_cast<float4*>(to + offset.x), make_float4(c[0][n][0], c[0][n][2], c[1][n][0], c[1][n][2]));
            if (offset.y >= 0) atomicAdd(reinterpret_cast<float4*>(to + offset.y), make_float4(c[0][n][1], c[0][n][3], c[1][n][1], c[1][n][3]));
        }
    }
}

__device__ __forceinline__ uint32_t mix(uint32_t x) {  // lowbias32, see rng.py
    x = (x ^ (x >> 16)) * 0x7FEB352Du;
    x = (x ^ (x >> 15)) * 0x846CA68Bu;
    return x ^ (x >> 16);
}

constexpr uint32_t COLUMN_HASH = 0x9E3779B1u;

// Hashes an element, from its row's hash. Weight, state0 and state1 each multiply it by a factor of their own.
__device__ __forceinline__ uint32_t element_hash(uint32_t hashed, uint32_t key, uint32_t column) {
    const uint32_t x = hashed + column * COLUMN_HASH;
    // This is y ^ (y >> 16) for y = x ^ k: `key` is k ^ (k >> 16).
    return x ^ (x >> 16) ^ key;
}

constexpr uint32_t ROUND_WEIGHT = 0x7FEB352D, ROUND_STATE0 = 0x846CA68B, ROUND_STATE1 = 0x85EBCA6B;

// Rounds to bfloat16, stochastically: the result is the upper half.
__device__ __forceinline__ uint32_t rounded(float value, uint32_t hashed, uint32_t factor) {
    return __float_as_uint(value) + (hashed * factor >> 16);
}

struct Values { float weight, state0, state1; };

// Updates by the gradient `grad` times `scale`. Factors in parentheses are the same for all elements and computed once.
__device__ __forceinline__ Values updated(Values v, float grad, float scale, const Arguments& a, float weight_decay) {
    if (RULE == ADAMW) {
        const float kept = weight_decay == 0.0f ? 1.0f : 1.0f - a.lr * weight_decay;  // a constant for biases
        v.state0 = a.beta0 * v.state0 + ((1.0f - a.beta0) * scale) * grad;
        v.state1 = a.beta1 * v.state1 + ((1.0f - a.beta1) * scale * scale) * (grad * grad);
        const float deviation = square_root(v.state1 * a.correct1) + a.eps;
        v.weight = v.weight * kept - (a.lr * a.correct0) * (v.state0 * reciprocal(deviation));
    } else if (RULE == MOMENTUM) {
        v.state0 = a.beta0 * v.state0 + fmaf(scale, grad, weight_decay * v.weight);
        v.weight -= a.lr * v.state0;
    } else {
        v.weight = fmaf(-(a.lr * weight_decay), v.weight, v.weight) - (a.lr * scale) * grad;
    }
    return v;
}

// Two neighbouring elements, as stored.
template <typename T> struct PairOf { using type = float2; };
template <> struct PairOf<bfloat16> { using type = uint32_t; };
using Pair = PairOf<WEIGHT>::type;

__device__ __forceinline__ float2 widened(float2 pair) { return pair; }
__device__ __forceinline__ float2 widened(uint32_t pair) {
    return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xFFFF0000u));
}

// Stores two elements; bfloat16 rounds stochastically.
__device__ __forceinline__ void narrow(float2& to, float2 v, const uint32_t (&)[2], uint32_t) { to = v; }
__device__ __forceinline__ void narrow(uint32_t& to, float2 v, const uint32_t (&hashed)[2], uint32_t factor) {
    to = __byte_perm(rounded(v.x, hashed[0], factor), rounded(v.y, hashed[1], factor), 0x7632);
}

// Eight neighbouring elements of a row, as stored.
struct alignas(16) Run { Pair pair[4]; };

// AdamW's writes are marked for early eviction from the L2 cache: otherwise its three tensors would evict prefetched data before it is read.
__device__ __forceinline__ void write(void* to, const Run& run) {
    const uint4* const words = reinterpret_cast<const uint4*>(&run);
#pragma unroll
    for (int i = 0; i < sizeof(Run) / sizeof(uint4); ++i) {
        if (RULE == ADAMW) __stcs(static_cast<uint4*>(to) + i, words[i]);
        else static_cast<uint4*>(to)[i] = words[i];
    }
}

// A warp updates its 16 labels in parts of eight labels and 32 features. A lane has a run of each.
constexpr int PARTS_IN_ROW = FEATURES / 32, PARTS = 2 * PARTS_IN_ROW, TOGETHER = 2;  // TOGETHER parts are lines of 128 bytes

struct Position {
    int g, f;    // the lane's label of the tile and its first feature
    bool there;  // false past the last label or feature
    int64_t at;  // in [L, F]

    __device__ __forceinline__ Position(const Arguments& a, const Tile& tile, int part)
        : g(threadIdx.x / 32 * 16 + part / PARTS_IN_ROW * 8 + threadIdx.x % 32 / 4), f(part % PARTS_IN_ROW * 32 + threadIdx.x % 4 * 8),
          there(g < tile.count && f < a.fan_in), at((tile.label0 + g) * a.fan_in + f) {}
};

// What the update of TOGETHER parts reads: weights if they are float32, else shared memory has them, and states.
struct Parts {
    Run weight[TOGETHER], state0[TOGETHER], state1[TOGETHER];

    __device__ __forceinline__ void read(const Arguments& a, const Tile& tile, int first_part) {
#pragma unroll
        for (int i = 0; i < TOGETHER; ++i) {
            const Position own(a, tile, first_part + i);
            const auto get = [&](const void* tensor) {
                return own.there ? *reinterpret_cast<const Run*>(static_cast<const WEIGHT*>(tensor) + own.at) : Run{};
            };
            if (RULE >= MOMENTUM) state0[i] = get(a.state0);
            if (RULE == ADAMW) state1[i] = get(a.state1);
            if (!BF16_WEIGHT) weight[i] = get(a.weight);
        }
    }
};

// Updates a part by `grad`. The lanes of a row first exchange sums, to have runs of them: accesses of 16 bytes have twice the throughput
// of single pairs.
__device__ __forceinline__ void update_part(
    const float (&grad)[FEATURES / 8][4], Run weight, Run state0, Run state1, int part, const Shared& shared, const Arguments& a,
    const Tile& tile) {
    const Position own(a, tile, part);
    uint32_t sums[2][4];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
        for (int n = 0; n < 4; ++n) sums[j][n] = __float_as_uint(grad[part % PARTS_IN_ROW * 4 + n][part / PARTS_IN_ROW * 2 + j]);
        exchange_words(sums[j]);
    }
    const int chunk = own.f / 8;
    if constexpr (BF16_WEIGHT) weight = *reinterpret_cast<const Run*>(shared.w[chunk / ROW] + place<ROW>(own.g, chunk % ROW));
    const uint32_t number = static_cast<uint32_t>(a.label_start + tile.label0 + own.g);
    int hashed = BF16_WEIGHT ? mix(number ^ a.row_key) + own.f * COLUMN_HASH : 0;  // of the row and the lane's first column
    forget(hashed);
#pragma unroll
    for (int n = 0; n < 4; ++n) {
        const float2 none = make_float2(0.0f, 0.0f), w = widened(weight.pair[n]);
        const float2 v0 = RULE >= MOMENTUM ? widened(state0.pair[n]) : none, v1 = RULE == ADAMW ? widened(state1.pair[n]) : none;
        const Values x = updated({w.x, v0.x, v1.x}, __uint_as_float(sums[0][n]), a.text_weight, a, a.weight_decay);
        const Values y = updated({w.y, v0.y, v1.y}, __uint_as_float(sums[1][n]), a.text_weight, a, a.weight_decay);
        const uint32_t draws[2] = {element_hash(hashed, a.column_key, 2 * n), element_hash(hashed, a.column_key, 2 * n + 1)};
        narrow(weight.pair[n], {x.weight, y.weight}, draws, ROUND_WEIGHT);
        if (RULE >= MOMENTUM) narrow(state0.pair[n], {x.state0, y.state0}, draws, ROUND_STATE0);
        if (RULE == ADAMW) narrow(state1.pair[n], {x.state1, y.state1}, draws, ROUND_STATE1);
    }
    if (!own.there) return;
    write(static_cast<WEIGHT*>(a.weight) + own.at, weight);
    if (RULE >= MOMENTUM) write(static_cast<WEIGHT*>(a.state0) + own.at, state0);
    if (RULE == ADAMW) write(static_cast<WEIGHT*>(a.state1) + own.at, state1);
}

// Updates a warp's weights. next: the first parts, which the caller has read early. Others are read while the previous ones are updated.
__device__ __forceinline__ void update_weights(
    const float (&grad)[FEATURES / 8][4], Parts& next, const Shared& shared, const Arguments& a, const Tile& tile) {
#pragma unroll
    for (int first = 0; first < PARTS; first += TOGETHER) {
        const Parts now = next;
        if (first + TOGETHER < PARTS) next.read(a, tile, first + TOGETHER);
#pragma unroll
        for (int i = 0; i < TOGETHER; ++i)
            update_part(grad, now.weight[i], now.state0[i], now.state1[i], first + i, shared, a, tile);
    }
}

// Loads a bias's states. bias: its value.
__device__ __forceinline__ Values bias_values(const Arguments& a, int64_t label, float bias) {
    Values v{bias, 0.0f, 0.0f};
    if (RULE >= MOMENTUM && a.bias) v.state0 = a.bias_state0[label];
    if (RULE == ADAMW && a.bias) v.state1 = a.bias_state1[label];
    return v;
}

// Updates a bias and its states by its gradient, without text_weight.
__device__ __forceinline__ void update_bias(const Arguments& a, int64_t label, Values v, float grad) {
    if (a.bias == nullptr) return;
    v = updated(v, grad * a.text_weight, 1.0f, a, 0.0f);
    a.bias[label] = v.weight;
    if (RULE >= MOMENTUM) a.bias_state0[label] = v.state0;
    if (RULE == ADAMW) a.bias_state1[label] = v.state1;
}

__device__ __forceinline__ void run(Shared& shared, const Arguments& a) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
    const int numbers = (a.last_row - a.first_row) * ((a.group + LABELS - 1) / LABELS);
    const bool update = a.update && *a.finite;
    float* const losses = a.loss + static_cast<int64_t>(blockIdx.x) * a.columns;
    const auto weights_at = [&](int g, int c) { return shared.w[c / ROW] + place<ROW>(g, c % ROW); };
    float loss = 0.0f;  // of one text; see `over_columns`

    Ahead ahead(a, blockIdx.x, numbers);
    for (int number = blockIdx.x; number < numbers; number += gridDim.x) {
        const Tile tile(a, number);
        const bool any_positive = ahead.any_positive();
        __syncthreads();  // the previous tile is done
        if (threadIdx.x < FEATURES) shared.offset[threadIdx.x] = ahead.offset(a, threadIdx.x);
        if (threadIdx.x < LABELS) shared.bias[threadIdx.x] = ahead.bias;
        load_weights(a, tile, weights_at);
        if (threadIdx.x == 0 && number + gridDim.x < numbers) fetch_rows(a, Tile(a, number + gridDim.x), a.weight);
        ahead = Ahead(a, number + gridDim.x, numbers);
        float grad[FEATURES / 8][4] = {};
        Parts parts;
        for (int text0 = 0; text0 < (ONE_TILE ? 1 : a.columns); text0 += TEXTS) {
            __syncthreads();
            gather_features(shared, a, text0);
            await_copies();
            publish_shared();
            __syncthreads();
            Slopes s;
            {
                Logits z;
                float tile_loss[4], sum[2][8];
                multiply_logits(z, shared);
                uint32_t positive[2] = {};
                if (any_positive || text0 + TEXTS > a.texts || !slopes<false>(z, s, shared, tile_loss, sum, a, positive, text0)) {
                    if (any_positive) load_positives(positive, a, tile, text0);
                    slopes<true>(z, s, shared, tile_loss, sum, a, positive, text0);
                }
                const float sum_of_losses = over_columns(tile_loss);
                if (ONE_TILE) loss += sum_of_losses;
                else add_losses(sum_of_losses, losses + text0);
                const int n = sum_of_lanes(sum[0], lane);
                sum_of_lanes(sum[1], lane);
                float2& total = *reinterpret_cast<float2*>(shared.bias_grad[warp % 4] + first_label() + 8 * n + lane % 4 * 2);
                const float2 before = text0 == 0 ? make_float2(0.0f, 0.0f) : total;
                total = make_float2(before.x + sum[0][0], before.y + sum[1][0]);
            }
            publish_shared();
            if constexpr (!SLOPES_IN_REGISTERS) __syncthreads();
            const bool last = ONE_TILE || text0 + TEXTS >= a.columns;
            const int g = threadIdx.x;
            const int64_t label = tile.label0 + g;
            const bool has_bias = update && last && g < tile.count;  // signed: count is negative in a tile past the last label
            Values bias{};
            if (has_bias) bias = bias_values(a, label, shared.bias[g]);
            if (update && last) fetch_states(a, tile);
            feature_gradient(s, shared, a, text0);
            if constexpr (SLOPES_IN_REGISTERS) __syncthreads();
            if (!update) continue;
            const float(&sums)[4][LABELS] = shared.bias_grad;
            if (has_bias) update_bias(a, label, bias, sums[0][g] + sums[1][g] + sums[2][g] + sums[3][g]);
            if (last) parts.read(a, tile, 0);
            pin(grad);
            begin_products();
#pragma unroll
            for (int k = 0; k < TEXTS / 16; ++k) {
                const uint64_t x = matrix(shared.x[k / 4]) + k % 4 * NEXT;
                multiply<true, false>(grad, matrix(shared.s[warp / 4]) + k * NEXT_ROWS, x, true);
            }
            end_products();
            pin(grad);
        }
        if (update) update_weights(grad, parts, shared, a, tile);
    }
    if (ONE_TILE) add_losses(loss, losses);
}

}  // namespace

#include "launch.cuh"
