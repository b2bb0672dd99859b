// The pass of group.cu for tiles of 64 and 128 labels, with warpgroup matrix instructions (capability 9.0).
//
// These read each operand once for 64 rows; a warp's instructions read it for 16 or 32, and shared memory is their bottleneck. A
// warpgroup takes 64 labels, and the texts of a tile are the rows of its products:
//
//     z^T_BG = x_FB^T w_GF^T + bias     s^T_BG overwrites z in registers, where dX reads it
//     dX_BF = s^T_BG w_GF (atomic)      dw_GF = s_GB x_FB^T, with s in shared memory
//
// Two warpgroups share x. Each computes half of the features of dX for the labels of both, from s in shared memory.
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
// Compile with -D, besides those of group.cuh: LABELS (16 WARPS; WARPS 4, 8), FEATURES (64, 128; F at most; 128 with 8 warps), BLOCKS (on
// a multiprocessor), ONE_TILE (at most TEXTS texts).

#include "group.cuh"

namespace {

constexpr int FEATURE_PARTS = FEATURES / 64;  // parts of W in shared memory
constexpr int WARPGROUPS = WARPS / 4;
constexpr bool SLOPES_IN_REGISTERS = WARPGROUPS == 1;  // for the feature gradient
static_assert(LABELS == 64 * WARPGROUPS && FEATURES % 64 == 0, "a warpgroup's labels are a row of s^T");
static_assert(WARPGROUPS == 1 || FEATURE_PARTS == WARPGROUPS, "each makes a part of the feature gradient");

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

// Computes from the logits of negatives: slopes; loss[2 half + high] of a thread's texts; sum[2 n + j] over these texts of the slopes of
// label 8 n + lane % 4 * 2 + j. A text's losses share one logarithm, as in slopes_of_negatives. Returns false if a loss overflowed.
__device__ __forceinline__ bool warpgroup_slopes_of_negatives(
    const Logits& c, Slopes& s, Shared& shared, float (&loss)[4], float (&sum)[16]) {
    float p[4] = {};
#pragma unroll
    for (int n = 0; n < 8; ++n)
#pragma unroll
        for (int text = 0; text < 4; ++text) {
            float slope[2];
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                slope[j] = slope_of_negative(c[text / 2][n][text % 2 * 2 + j], p[text]);
                sum[2 * n + j] = text == 0 ? slope[j] : sum[2 * n + j] + slope[j];
            }
            keep_slopes(s, shared, text / 2, n, text % 2, slope);
        }
    bool fine = true;
#pragma unroll
    for (int text = 0; text < 4; ++text) {
        fine = fine && !overflowed(p[text]);
        loss[text] = loss_of_negatives(p[text]);
    }
    return __all_sync(~0u, fine);
}

// The same for all logits: positives, padding columns, and large ones.
__device__ __forceinline__ void warpgroup_slopes_of_any(
    const Logits& c, Slopes& s, Shared& shared, float (&loss)[4], float (&sum)[16], const Arguments& a, bool any_positive,
    const Tile& tile, int text0) {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int text = 0; text < 4; ++text) loss[text] = 0.0f;
    uint32_t positive[2] = {};  // [j]: bit 4 n + 2 half + high is for label 8 n + lane % 4 * 2 + j. All loads are issued together.
    if (any_positive)
#pragma unroll
        for (int n = 0; n < 8; ++n)
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const int g = first_label() + 8 * n + lane % 4 * 2 + j;
                const int64_t word = static_cast<int64_t>(tile.local + g) * (a.columns / 32) + (text0 + text_of(0, 0)) / 32;
                if (g < tile.count) positive[j] |= (a.positive[word] >> (lane / 4 * 4) & 15) << 4 * n;
            }
#pragma unroll
    for (int n = 0; n < 8; ++n) {
#pragma unroll
        for (int text = 0; text < 4; ++text) {
            const bool is_text = text0 + text_of(text / 2, text % 2) < a.texts;
            float slope[2];
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                slope[j] = slope_of_any(c[text / 2][n][text % 2 * 2 + j], positive[j] >> (4 * n + text) << 31, is_text, loss[text]);
                sum[2 * n + j] = text == 0 ? slope[j] : sum[2 * n + j] + slope[j];
            }
            keep_slopes(s, shared, text / 2, n, text % 2, slope);
        }
    }
}

// Sums 2 LEFT numbers over the lanes that differ in bits 2 to log2(2 LEFT) of their number. In each step a lane sends half of its numbers
// to its partner. For LEFT = 8, a lane ends with sums 2 (lane / 4) and the next.
template <int LEFT>
__device__ __forceinline__ void add_over_rows(float (&v)[16]) {
    const bool upper = threadIdx.x & (2 * LEFT);
#pragma unroll
    for (int i = 0; i < LEFT; ++i) {
        const float got = __shfl_xor_sync(~0u, upper ? v[i] : v[i + LEFT], 2 * LEFT);
        v[i] = (upper ? v[i + LEFT] : v[i]) + got;
    }
    if constexpr (LEFT > 2) add_over_rows<LEFT / 2>(v);
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
    const Offsets offsets(shared.offset);
    share<FEATURES, X_PITCH>([&](int f, int c, int i) {
        const int offset = offsets.of[i];
        copy_async(shared.x[c / ROW] + place<ROW>(f, c % ROW), a.x + max(offset, 0) + text0 + c * 8, offset >= 0);
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
        float c[2][8][4];
        clear(c);
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
            if (offset.x >= 0) add4(to + offset.x, make_float4(c[0][n][0], c[0][n][2], c[1][n][0], c[1][n][2]));
            if (offset.y >= 0) add4(to + offset.y, make_float4(c[0][n][1], c[0][n][3], c[1][n][1], c[1][n][3]));
        }
    }
}

__global__ void __launch_bounds__(THREADS, BLOCKS) step_kernel(const Arguments a) {
    extern __shared__ __align__(1024) uint8_t memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
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
        if (threadIdx.x == 0 && number + gridDim.x < numbers) fetch_rows<WEIGHT>(a, Tile(a, number + gridDim.x), a.weight);
        ahead = Ahead(a, number + gridDim.x, numbers);
        float grad[1][FEATURES / 8][4];
        clear(grad);
        // TOGETHER parts cover lines of 128 bytes: of one row or, for 8-bit states, whose parts are short, of both rows of a thread.
        using Weights = WeightUpdate<BYTE_STATE ? 4 : 2, false, 2, 1, FEATURES / 8>;
        Weights::Read read;
        for (int text0 = 0; text0 < (ONE_TILE ? 1 : a.columns); text0 += TEXTS) {
            __syncthreads();
            gather_features(shared, a, text0);
            await_copies();
            publish_shared();
            __syncthreads();
            Slopes s;
            {
                Logits z;
                float tile_loss[4], sum[16];
                multiply_logits(z, shared);
                if (any_positive || text0 + TEXTS > a.texts || !warpgroup_slopes_of_negatives(z, s, shared, tile_loss, sum))
                    warpgroup_slopes_of_any(z, s, shared, tile_loss, sum, a, any_positive, tile, text0);
                const float sum_of_losses = over_columns(tile_loss);
                if (ONE_TILE) loss += sum_of_losses;
                else add_losses(sum_of_losses, losses + text0);
                float2& total = *reinterpret_cast<float2*>(shared.bias_grad[warp % 4] + first_label() + 2 * lane);
                add_over_rows<8>(sum);
                total = text0 == 0 ? make_float2(sum[0], sum[1]) : make_float2(total.x + sum[0], total.y + sum[1]);
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
            if (has_bias) update_bias<4>(a, label, bias, &shared.bias_grad[0][g], LABELS);
            if (last) Weights::read(read, a, tile, 16 * warp, 0);
            pin(grad[0]);
            begin_products();
#pragma unroll
            for (int k = 0; k < TEXTS / 16; ++k) {
                const uint64_t x = matrix(shared.x[k / 4]) + k % 4 * NEXT;
                multiply<true, false>(grad[0], matrix(shared.s[warp / 4]) + k * NEXT_ROWS, x, true);
            }
            end_products();
            pin(grad[0]);
        }
        if (update) Weights::update(grad, read, a, tile, 16 * warp, 0, weights_at);
    }
    if (ONE_TILE) add_losses(loss, losses);
}

}  // namespace

#include "launch.cuh"
