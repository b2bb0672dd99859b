// Shared by group.cu and warpgroup.cu: tiles of labels that share an index row, a warp's matrix products, update rules, stochastic
// rounding. tile_math.py has the same arithmetic in Triton.
//
// A warp's products are mma.m16n8k16 instructions (bfloat16 operands, float32 sums). Operands have the layout of operands.cuh, with rows
// of any number of chunks. Fragments are those of the PTX manual: of a piece of 16 x 8 a thread has rows lane / 4 and lane / 4 + 8,
// columns lane % 4 * 2 and the next.
//
// Compile with -D: WEIGHT (float or bfloat16), STATE (the type of states with a value for each weight: WEIGHT; or, for AdamW with
// bfloat16 weights, uint8_t), INDEX (int16_t or int32_t), RULE, LOSS, WARPS, and the names that each file lists.

#pragma once

#include <type_traits>

#include "losses.cuh"
#include "operands.cuh"

namespace {

constexpr int THREADS = 32 * WARPS;
constexpr bool BF16_WEIGHT = sizeof(WEIGHT) == 2, BYTE_STATE = sizeof(STATE) == 1;
static_assert(BYTE_STATE ? BF16_WEIGHT && RULE == ADAMW : sizeof(STATE) == sizeof(WEIGHT), "see above");
constexpr int X_PITCH = TEXTS / 8, W_PITCH = FEATURES / 8;  // chunks in a row

// A matrix whose chunks `place` places.
template <int PITCH>
struct Placed {
    bfloat16* matrix;
    __device__ __forceinline__ bfloat16* operator()(int row, int chunk) const { return matrix + place<PITCH>(row, chunk); }
};

// c[m][n] += A B over K. A is stored [m, k] (A_T: [k, m]), B is stored [n, k] (B_T: [k, n]). a(row, chunk) and b(row, chunk) return the
// address of a chunk.
template <int K, bool A_T, bool B_T, int MM, int NN, typename A, typename B>
__device__ __forceinline__ void product(float (&c)[MM][NN][4], A a, int m0, B b, int n0) {
    const int lane = threadIdx.x & 31, low = lane & 15, high = lane >> 4;
    const int split = (lane & 7) + (high << 3), second = (lane >> 3) & 1;
#pragma unroll
    for (int k = 0; k < K; k += 16) {
        uint32_t fa[MM][4], fb[4];
#pragma unroll
        for (int m = 0; m < MM; ++m) {
            if (A_T) load4_transposed(fa[m], a(k + split, (m0 + 16 * m) / 8 + second));
            else load4(fa[m], a(m0 + 16 * m + low, k / 8 + high));
        }
#pragma unroll
        for (int n = 0; n < NN; n += 2) {
            if (B_T) load4_transposed(fb, b(k + low, n0 / 8 + n + high));
            else load4(fb, b(n0 + 8 * n + split, k / 8 + second));
#pragma unroll
            for (int m = 0; m < MM; ++m) {
                multiply(c[m][n], fa[m], fb[0], fb[1]);
                multiply(c[m][n + 1], fa[m], fb[2], fb[3]);
            }
        }
    }
}

template <int MM, int NN>
__device__ __forceinline__ void clear(float (&c)[MM][NN][4]) {
#pragma unroll
    for (int m = 0; m < MM; ++m)
#pragma unroll
        for (int n = 0; n < NN; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) c[m][n][i] = 0.0f;
}

// Shares ROWS x PITCH chunks among the threads: calls take(row, chunk, i) for the thread's i-th. A thread's chunk number is constant.
template <int ROWS, int PITCH, typename Take>
__device__ __forceinline__ void share(Take take, unsigned thread = threadIdx.x) {
    constexpr int STEP = THREADS / PITCH;
#pragma unroll
    for (int i = 0; i < (ROWS + STEP - 1) / STEP; ++i) {
        const int row = thread / PITCH + i * STEP;
        if (ROWS % STEP == 0 || row < ROWS) take(row, thread % PITCH, i);
    }
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
        if (number < numbers) *this = Ahead(a, number, Tile(a, number), threadIdx.x);
    }

    __device__ __forceinline__ Ahead(const Arguments& a, int number, const Tile& tile, int thread) {
        if (tile.count <= 0) return;
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

// The offsets in X^T of the features that a thread helps to copy. They are read before the copies are issued: accesses to shared memory
// are in order, so behind copies each read would wait.
struct Offsets {
    static constexpr int STEP = THREADS / X_PITCH, COPIES = (FEATURES + STEP - 1) / STEP;
    int of[COPIES];

    __device__ __forceinline__ explicit Offsets(const int (&offset)[FEATURES]) {
#pragma unroll
        for (int i = 0; i < COPIES; ++i) of[i] = offset[threadIdx.x / X_PITCH + i * STEP];
    }
};

// Copies the tile's weights to shared memory as bfloat16: weights 8 c to 8 c + 7 of label g to to(g, c). Pads with zeros.
template <typename To>
__device__ __forceinline__ void load_weights(const Arguments& a, const Tile& tile, To to, unsigned thread = threadIdx.x) {
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
    }, thread);
}

// Prefetches the tile's rows of a tensor of T, which are contiguous, to the L2 cache. Rows of bytes may not begin and end at multiples of
// 16: then the last piece is left out.
template <typename T>
__device__ __forceinline__ void fetch_rows(const Arguments& a, const Tile& tile, const void* tensor) {
    constexpr uint32_t PIECE = sizeof(T) == 1 ? 16 : 1;
    const uint32_t bytes = sizeof(T) * a.fan_in, size = tile.count * bytes & ~(PIECE - 1);
    const uintptr_t from = reinterpret_cast<uintptr_t>(tensor) + tile.label0 * bytes & ~uintptr_t(PIECE - 1);
    if (tile.count > 0 && size > 0) prefetch(reinterpret_cast<const void*>(from), size);
}

// Prefetches the tile's states. Call it shortly before they are read: the prefetches of all blocks together fill the cache.
__device__ __forceinline__ void fetch_states(const Arguments& a, const Tile& tile, unsigned thread = threadIdx.x) {
    if (thread == 0) {
        if (RULE >= MOMENTUM) fetch_rows<STATE>(a, tile, a.state0);
        if (RULE == ADAMW) fetch_rows<STATE>(a, tile, a.state1);
    }
    __syncwarp();  // for convergence alone
}

__device__ __forceinline__ void add4(float* to, float4 value) {
#if __CUDA_ARCH__ >= 900
    atomicAdd(reinterpret_cast<float4*>(to), value);
#else
    atomicAdd(to, value.x), atomicAdd(to + 1, value.y), atomicAdd(to + 2, value.z), atomicAdd(to + 3, value.w);
#endif
}

// Loads the positives among a thread's logits: bit 8 n + j of word[2 m + half].
template <int M>
__device__ __forceinline__ void load_positives(
    uint32_t (&word)[2 * M], const Arguments& a, int local, int count, int m0, int text) {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int m = 0; m < 2 * M; ++m) {
        const int g = m0 + 8 * m + lane / 4;
        word[m] = g < count ? a.positive[static_cast<int64_t>(local + g) * (a.columns / 32) + text / 32] >> (text % 32 + lane % 4 * 2) : 0;
    }
}

// Stores slopes as bfloat16. s(label, chunk): the address of a label's slopes for eight texts.
template <int M, typename S>
__device__ __forceinline__ void keep_slopes(S s, const float (&slope)[2 * M][2], int m0, int n0, int n) {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int m = 0; m < 2 * M; ++m) {
        bfloat16* to = s(m0 + 8 * m + lane / 4, n0 / 8 + n) + lane % 4 * 2;
        *reinterpret_cast<uint32_t*>(to) = packed(slope[m][0], slope[m][1]);
    }
}

// Computes slopes, into s, losses of a thread's texts and bias gradients of its labels from logits c of negatives. Returns false, for the
// whole warp, if a loss overflowed; then the results are invalid.
template <int M, int N, typename S>
__device__ __forceinline__ bool slopes_of_negatives(
    const float (&c)[M][N][4], float (&loss)[2 * N], float (&row_sum)[2 * M], S s, int m0, int n0) {
    bool fine = true;
#pragma unroll
    for (int n = 0; n < N; ++n) {
        float slope[2 * M][2];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            float p = 0.0f;
#pragma unroll
            for (int m = 0; m < 2 * M; ++m) {
                slope[m][j] = slope_of_negative(c[m / 2][n][m % 2 * 2 + j], p);
                row_sum[m] += slope[m][j];
            }
            fine = fine && !overflowed(p);
            loss[2 * n + j] = loss_of_negatives(p);
        }
        keep_slopes<M>(s, slope, m0, n0, n);
    }
    return __all_sync(~0u, fine);
}

// The same for all logits: positives, padding columns, and large ones.
template <int M, int N, typename S>
__device__ __forceinline__ void slopes_of_any(
    const float (&c)[M][N][4], float (&loss)[2 * N], float (&row_sum)[2 * M], S s, const Arguments& a,
    const uint32_t (&positive)[2 * M], int m0, int n0, int text0) {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int m = 0; m < 2 * M; ++m) row_sum[m] = 0.0f;
#pragma unroll
    for (int n = 0; n < N; ++n) {
        float slope[2 * M][2];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            float sum = 0.0f;
            const bool is_text = text0 + n0 + 8 * n + lane % 4 * 2 + j < a.texts;
#pragma unroll
            for (int m = 0; m < 2 * M; ++m) {
                slope[m][j] = slope_of_any(c[m / 2][n][m % 2 * 2 + j], positive[m] >> (8 * n + j) << 31, is_text, sum);
                row_sum[m] += slope[m][j];
            }
            loss[2 * n + j] = sum;
        }
        keep_slopes<M>(s, slope, m0, n0, n);
    }
}

// Computes slopes, into s, losses of a thread's texts and sums of slopes over texts from logits z with bias, in the faster way that is
// valid. m0, n0: the warp's first label and text in the tile.
template <int M, int N, typename S>
__device__ __forceinline__ void slopes(
    const float (&z)[M][N][4], float (&loss)[2 * N], float (&row_sum)[2 * M], S s, const Arguments& a, bool any_positive,
    int local, int count, int m0, int n0, int text0) {
    static_assert(8 * N <= 32, "a warp's texts are bits of one word");
#pragma unroll
    for (int m = 0; m < 2 * M; ++m) row_sum[m] = 0.0f;
    if (any_positive || text0 + TEXTS > a.texts || !slopes_of_negatives(z, loss, row_sum, s, m0, n0)) {
        uint32_t positive[2 * M] = {};
        if (any_positive) load_positives<M>(positive, a, local, count, m0, text0 + n0);
        slopes_of_any(z, loss, row_sum, s, a, positive, m0, n0, text0);
    }
#pragma unroll
    for (int m = 0; m < 2 * M; ++m) {
        row_sum[m] += __shfl_xor_sync(~0u, row_sum[m], 1);
        row_sum[m] += __shfl_xor_sync(~0u, row_sum[m], 2);
    }
}

// Sums over the eight lanes that share a text. Each of them gets the sum.
__device__ __forceinline__ float over_labels(float sum) {
#pragma unroll
    for (int other = 4; other < 32; other *= 2) sum += __shfl_xor_sync(~0u, sum, other);
    return sum;
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

// 8-bit states (eight_bits.py) stay multiplied by these scales in registers, which takes no instructions.
constexpr float SCALE0 = 1 << 7, SCALE1 = 1.0f / (1 << 17);
constexpr float FIRST_SQUARE = 0x1p-63f;  // the offset of state 2

// Rounds two values of state 1 to bytes 1 and 3 of a word. draws: hash times factor of each element.
__device__ __forceinline__ uint32_t rounded_halves(float2 v, const uint32_t (&draws)[2]) {
    return halves(v.x, v.y) + (__byte_perm(draws[0], draws[1], 0x0501) & 0x00FF00FF);
}

// Convert state 2 from and to the lowest byte of a word.
__device__ __forceinline__ float from_square(uint32_t byte) {
    return __uint_as_float(byte * (1u << 21) + (64u << 23)) - FIRST_SQUARE;
}

__device__ __forceinline__ uint32_t to_square(float value, uint32_t draw) {
    return min((__float_as_uint(value + FIRST_SQUARE) + (draw >> 11)) >> 21, 0x1FFu);  // FIRST_SQUARE gives 256, whose low byte is 0
}

// Updates by the gradient `grad` times `scale`. Factors in parentheses are the same for all elements and computed once.
// SCALED: states are multiplied by the scales above.
template <bool SCALED>
__device__ __forceinline__ Values updated(Values v, float grad, float scale, const Arguments& a, float weight_decay) {
    constexpr float scale0 = SCALED ? SCALE0 : 1.0f, scale1 = SCALED ? SCALE1 : 1.0f;
    const float kept = weight_decay == 0.0f ? 1.0f : 1.0f - a.lr * weight_decay;  // a constant for biases
    if (RULE == ADAMW) {
        v.state0 = a.beta0 * v.state0 + ((1.0f - a.beta0) * scale * scale0) * grad;
        v.state1 = a.beta1 * v.state1 + ((1.0f - a.beta1) * scale * scale * scale1) * (grad * grad);
        const float deviation = square_root(v.state1 * (a.correct1 / scale1)) + a.eps;
        v.weight = v.weight * kept - (a.lr * a.correct0 / scale0) * (v.state0 * reciprocal(deviation));
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

// PAIRS neighbouring pairs of states of a row, as stored. SQUARES: state 2.
template <int PAIRS>
struct States {
    using Word = std::conditional<BYTE_STATE, uint32_t, Pair>::type;
    static constexpr int WORDS = BYTE_STATE ? PAIRS / 2 : PAIRS;
    static_assert(!BYTE_STATE || PAIRS % 2 == 0, "two pairs of bytes share a word");
    alignas(16) Word word[WORDS];

    template <bool SQUARES>
    __device__ __forceinline__ float2 pair(int n) const {
        if constexpr (!BYTE_STATE) {
            return widened(word[n]);
        } else {
            const uint32_t four = word[n / 2], odd = n % 2;
            if constexpr (!SQUARES) return from_halves(__byte_perm(four, 0, odd ? 0x3424 : 0x1404));
            else return make_float2(from_square(__byte_perm(four, 0, odd ? 0x4442 : 0x4440)), from_square(__byte_perm(four, 0, odd ? 0x4443 : 0x4441)));
        }
    }

    // Rounds pair n stochastically.
    template <bool SQUARES>
    __device__ __forceinline__ void set(int n, float2 v, const uint32_t (&hashed)[2]) {
        if constexpr (!BYTE_STATE) {
            narrow(word[n], v, hashed, SQUARES ? ROUND_STATE1 : ROUND_STATE0);
        } else {
            const uint32_t draws[2] = {hashed[0] * ROUND_STATE0, hashed[1] * ROUND_STATE0};  // shared; each state uses its own bits
            uint32_t& four = word[n / 2];
            if constexpr (!SQUARES) four = __byte_perm(four, rounded_halves(v, draws), n % 2 ? 0x7510 : 0x3275);
            else four = __byte_perm(four, __byte_perm(to_square(v.x, draws[0]), to_square(v.y, draws[1]), 0x0040), n % 2 ? 0x5410 : 0x3254);
        }
    }
};

// A part of a row is 8 PAIRS columns, of which a lane has PAIRS pairs of a product's sums. Returns the column of the lane's first pair. The
// others follow every 8 columns or, with RUN, one after another, if the product's operand was read in that order.
template <bool RUN, int PAIRS>
__device__ __forceinline__ int first_column() { return threadIdx.x % 4 * (RUN ? 2 * PAIRS : 2); }

// Copies a run in as few accesses as possible. BACK: to device memory. AdamW's writes are marked for early eviction from the L2 cache:
// otherwise its three tensors would evict prefetched data before it is read.
template <int BYTES, bool BACK = false>
__device__ __forceinline__ void copy_run(void* to, const void* from) {
    using Half = typename std::conditional<BYTES % 8 == 0, uint2, uint32_t>::type;
    using Unit = typename std::conditional<BYTES % 16 == 0, uint4, Half>::type;
#pragma unroll
    for (int i = 0; i < BYTES / sizeof(Unit); ++i) {
        if (BACK && RULE == ADAMW) __stcs(static_cast<Unit*>(to) + i, static_cast<const Unit*>(from)[i]);
        else static_cast<Unit*>(to)[i] = static_cast<const Unit*>(from)[i];
    }
}

// Reads a lane's pairs of a part. columns: how many follow `from`, a multiple of 8. there: whether the row exists.
template <bool RUN, int PAIRS, typename T, typename Word, int WORDS>
__device__ __forceinline__ void read_part(Word (&v)[WORDS], const T* from, bool there, int columns) {
    static_assert(RUN || WORDS == PAIRS, "bytes are read in runs");
    const int first = first_column<RUN, PAIRS>();
    alignas(16) Word got[WORDS] = {};
    if (RUN && there && first < columns) copy_run<sizeof(got)>(got, from + first);
#pragma unroll
    for (int n = 0; n < WORDS; ++n) {
        if (!RUN && there && 8 * n < columns) got[n] = *reinterpret_cast<const Word*>(from + first + 8 * n);
        v[n] = got[n];
    }
}

template <bool RUN, int PAIRS, typename T, typename Word, int WORDS>
__device__ __forceinline__ void write_part(T* to, const Word (&v)[WORDS], bool there, int columns) {
    const int first = first_column<RUN, PAIRS>();
    alignas(16) Word given[WORDS];
#pragma unroll
    for (int n = 0; n < WORDS; ++n) {
        if (!RUN && there && 8 * n < columns) *reinterpret_cast<Word*>(to + first + 8 * n) = v[n];
        given[n] = v[n];
    }
    if (RUN && there && first < columns) copy_run<sizeof(given), true>(to + first, given);
}

// Updates a warp's weights by their gradient c: 8 EIGHTS labels from m0 on, features from f0 on, in parts of rows as above. SUMS_RUN: a
// lane's sums are runs. The loads of TOGETHER parts are issued before the previous parts are updated; those of the first parts by `read`,
// which the caller calls early.
//
// A lane accesses 16 bytes at a time, which doubles the throughput of single pairs. Where sums are not runs, the four lanes of a row
// exchange words to get runs: of the gradients if there are states, else of the new weights.
template <int TOGETHER, bool SUMS_RUN, int EIGHTS, int M, int N>
struct WeightUpdate {
    static constexpr int PAIRS = N < 4 ? N : 4, PARTS = N / PAIRS;  // PARTS in a row
    static constexpr bool EXCHANGES = !SUMS_RUN && BF16_WEIGHT && PAIRS == 4, GRADIENTS = EXCHANGES && RULE >= MOMENTUM;
    static constexpr bool RUN = SUMS_RUN || GRADIENTS;
    static_assert(EIGHTS <= 2 * M && EIGHTS * PARTS % TOGETHER == 0 && N % PAIRS == 0 && (!SUMS_RUN || PARTS == 1), "whole parts");

    struct Read {
        Pair weight[TOGETHER][PAIRS];
        States<PAIRS> state0[TOGETHER], state1[TOGETHER];
    };

    __device__ __forceinline__ static void read(Read& to, const Arguments& a, const Tile& tile, int m0, int f0, int first_part = 0) {
#pragma unroll
        for (int i = 0; i < TOGETHER; ++i) {
            const int g = m0 + (first_part + i) / PARTS * 8 + threadIdx.x % 32 / 4, f = f0 + (first_part + i) % PARTS * (8 * PAIRS);
            const int64_t start = (tile.label0 + g) * a.fan_in + f;
            const auto get = [&](auto& v, const auto* tensor) {
                read_part<RUN, PAIRS>(v, tensor + start, g < tile.count, a.fan_in - f);
            };
            if (RULE >= MOMENTUM) get(to.state0[i].word, static_cast<const STATE*>(a.state0));
            if (RULE == ADAMW) get(to.state1[i].word, static_cast<const STATE*>(a.state1));
            if constexpr (!BF16_WEIGHT) get(to.weight[i], static_cast<const WEIGHT*>(a.weight));
        }
    }

    // old(g, c): the address in shared memory of bfloat16 weights 8 c to 8 c + 7 of label g.
    template <typename Old>
    __device__ __forceinline__ static void update(
        const float (&c)[M][N][4], Read& next, const Arguments& a, const Tile& tile, int m0, int f0, Old old) {
#pragma unroll
        for (int first_part = 0; first_part < EIGHTS * PARTS; first_part += TOGETHER) {
            Read now = next;
            if (first_part + TOGETHER < EIGHTS * PARTS) read(next, a, tile, m0, f0, first_part + TOGETHER);
#pragma unroll
            for (int i = 0; i < TOGETHER; ++i)
                update_part(c, now.weight[i], now.state0[i], now.state1[i], first_part + i, a, tile, m0, f0, old);
        }
    }

private:
    template <typename Old>
    __device__ __forceinline__ static void update_part(
        const float (&c)[M][N][4], Pair (&weight)[PAIRS], States<PAIRS>& state0, States<PAIRS>& state1, int part,
        const Arguments& a, const Tile& tile, int m0, int f0, Old old) {
        const int lane = threadIdx.x & 31, m = part / PARTS, n0 = part % PARTS * PAIRS;
        const int g = m0 + 8 * m + lane / 4, f = f0 + 8 * n0, column = f + first_column<RUN, PAIRS>();
        const uint32_t number = static_cast<uint32_t>(a.label_start + tile.label0 + g);
        int hashed = BF16_WEIGHT ? mix(number ^ a.row_key) + column * COLUMN_HASH : 0;  // of the row and the lane's first column
        forget(hashed);
        uint32_t grad[2][PAIRS];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
#pragma unroll
            for (int n = 0; n < PAIRS; ++n) grad[j][n] = __float_as_uint(c[m / 2][n0 + n][m % 2 * 2 + j]);
            if constexpr (GRADIENTS) exchange_words(grad[j]);
        }
        if constexpr (BF16_WEIGHT && RUN) copy_run<sizeof(weight)>(weight, old(g, column / 8) + column % 8);
#pragma unroll
        for (int n = 0; n < PAIRS; ++n) {
            const int on = RUN ? 2 * n : 8 * n;
            if constexpr (BF16_WEIGHT && !RUN) weight[n] = *reinterpret_cast<const Pair*>(old(g, f / 8 + n) + lane % 4 * 2);
            const float2 none = make_float2(0.0f, 0.0f), w = widened(weight[n]);
            const float2 v0 = RULE >= MOMENTUM ? state0.template pair<false>(n) : none;
            const float2 v1 = RULE == ADAMW ? state1.template pair<true>(n) : none;
            const Values x = updated<BYTE_STATE>({w.x, v0.x, v1.x}, __uint_as_float(grad[0][n]), a.text_weight, a, a.weight_decay);
            const Values y = updated<BYTE_STATE>({w.y, v0.y, v1.y}, __uint_as_float(grad[1][n]), a.text_weight, a, a.weight_decay);
            const uint32_t draws[2] = {element_hash(hashed, a.column_key, on), element_hash(hashed, a.column_key, on + 1)};
            narrow(weight[n], {x.weight, y.weight}, draws, ROUND_WEIGHT);
            if (RULE >= MOMENTUM) state0.template set<false>(n, {x.state0, y.state0}, draws);
            if (RULE == ADAMW) state1.template set<true>(n, {x.state1, y.state1}, draws);
        }
        if constexpr (EXCHANGES && !GRADIENTS) exchange_words(weight);
        const auto write = [&](auto* tensor, const auto& v) {
            write_part<RUN || EXCHANGES, PAIRS>(tensor + (tile.label0 + g) * a.fan_in + f, v, g < tile.count, a.fan_in - f);
        };
        write(static_cast<WEIGHT*>(a.weight), weight);
        if (RULE >= MOMENTUM) write(static_cast<STATE*>(a.state0), state0.word);
        if (RULE == ADAMW) write(static_cast<STATE*>(a.state1), state1.word);
    }
};

// Loads a bias's states. bias: its value.
__device__ __forceinline__ Values bias_values(const Arguments& a, int64_t label, float bias) {
    Values v{bias, 0.0f, 0.0f};
    if (RULE >= MOMENTUM && a.bias) v.state0 = a.bias_state0[label];
    if (RULE == ADAMW && a.bias) v.state1 = a.bias_state1[label];
    return v;
}

// Updates a bias and its states. The gradient is the sum of PARTS numbers, `stride` apart.
template <int PARTS>
__device__ __forceinline__ void update_bias(const Arguments& a, int64_t label, Values v, const float* part, int stride) {
    if (a.bias == nullptr) return;
    float grad = 0.0f;
#pragma unroll
    for (int i = 0; i < PARTS; ++i) grad += part[i * stride];
    grad *= a.text_weight;
    v = updated<false>(v, grad, 1.0f, a, 0.0f);
    a.bias[label] = v.weight;
    if (RULE >= MOMENTUM) a.bias_state0[label] = v.state0;
    if (RULE == ADAMW) a.bias_state1[label] = v.state1;
}

}  // namespace
