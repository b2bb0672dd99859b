// One pass over the weights for labels that share index rows: loss, feature gradient and update, nothing kept in between.
//
// For the LABELS labels of a tile (of one index row, whose F features are gathered from X^T [d, B]), TEXTS texts at a time:
//
//     z_GB = w_GF x_FB + bias     loss_B += sum_G loss(z, y)     s_GB = dloss/dz
//     dX^T[index] += w_GF^T s_GB  (atomic)        dw_GF += s_GB x_FB^T        w_GF, bias <- update
//
// The operands of all three products stay in shared memory: X and W as they were read, s as the second product wants it.
// Triton cannot keep s on chip for both products without more registers than leave room for a second block, nor update a
// tile in place. A block takes one tile after another; several share a multiprocessor, so that one loads while another
// multiplies.
//
// Compiled for one configuration by -D, besides those of tile_math.cuh: LABELS (16, 32, 64), FEATURES (64, 128; F is at most
// that), BLOCKS (a multiprocessor), DX_M (1, 2, 4), ONE_TILE (TEXTS texts at most).

#include "tile_math.cuh"

namespace {

// Warps over [LABELS, TEXTS] and [LABELS, FEATURES]; pieces of 16 x 8 of each warp.
constexpr int ROWS = LABELS >= 64 && WARPS == 8 ? 2 : 1, COLUMNS = WARPS / ROWS;
constexpr int M = LABELS / ROWS / 16, N_TEXT = TEXTS / COLUMNS / 8, N_FEATURE = FEATURES / COLUMNS / 8;
// The feature gradient is made of parts of 16 DX_M features and 32 texts.
constexpr int DX_PASSES = FEATURES / (16 * DX_M) * (TEXTS / 32) / WARPS;
constexpr int STAGED_PITCH = 40;  // floats: four rows of eight lie in different banks
constexpr int W_PITCH = FEATURES / 8;     // chunks a row
static_assert(THREADS >= FEATURES && THREADS >= LABELS, "a thread for each slot and label");
static_assert(N_TEXT % 2 == 0 && N_FEATURE % 2 == 0 && DX_PASSES >= 1 && M >= 1, "the warps must share the tile");

struct Shared {
    alignas(128) bfloat16 x[FEATURES * TEXTS];
    bfloat16 w[LABELS * FEATURES];
    bfloat16 s[LABELS * TEXTS];
    int32_t offset[FEATURES];
    float bias[LABELS], bias_grad[COLUMNS][LABELS];
    float staged[WARPS][8 * STAGED_PITCH];
};

__device__ __forceinline__ void add_losses(const float (&loss)[2 * N_TEXT], float* to) {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int n = 0; n < 2 * N_TEXT; ++n) {
        const float sum = over_labels(loss[n]);
        if (lane < 4) atomicAdd(to + n / 2 * 8 + lane * 2 + n % 2, sum);
    }
}

__device__ __forceinline__ void add4(float* to, float4 value) {
#if __CUDA_ARCH__ >= 900
    atomicAdd(reinterpret_cast<float4*>(to), value);
#else
    atomicAdd(to, value.x), atomicAdd(to + 1, value.y), atomicAdd(to + 2, value.z), atomicAdd(to + 3, value.w);
#endif
}

// dX^T[index] += W^T S of one tile of texts. The L2 cache adds whole lines of 128 bytes nearly twice as fast as the 32 bytes
// in which fragments lie (H100: 3.2 against 1.9 TB/s), so eight rows of a warp's 32 texts pass through shared memory.
__device__ __forceinline__ void feature_gradient(Shared& shared, const Arguments& a, int text0) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
    float* const staged = shared.staged[warp];
#pragma unroll 1
    for (int pass = 0; pass < DX_PASSES; ++pass) {
        const int part = warp + pass * WARPS, m0 = part / (TEXTS / 32) * (16 * DX_M), n0 = part % (TEXTS / 32) * 32;
        float c[DX_M][4][4];
        clear(c);
        product<LABELS, W_PITCH, true, X_PITCH, true>(c, shared.w, m0, shared.s, n0);
#pragma unroll
        for (int m = 0; m < 2 * DX_M; ++m) {
            __syncwarp();
#pragma unroll
            for (int n = 0; n < 4; ++n)
                *reinterpret_cast<float2*>(staged + lane / 4 * STAGED_PITCH + 8 * n + lane % 4 * 2) =
                    make_float2(c[m / 2][n][m % 2 * 2], c[m / 2][n][m % 2 * 2 + 1]);
            __syncwarp();
#pragma unroll
            for (int row = lane / 8; row < 8; row += 4) {
                const int offset = shared.offset[m0 + 8 * m + row];
                const float4 value = *reinterpret_cast<const float4*>(staged + row * STAGED_PITCH + lane % 8 * 4);
                if (offset >= 0) add4(a.dx + offset + text0 + n0 + lane % 8 * 4, value);
            }
        }
    }
}

// Which labels a tile has.
struct Tile {
    int row;
    int64_t label0;  // the first label
    int local;       // its place from first_row on
    int count;       // labels; none or fewer for a tile past the last label

    __device__ __forceinline__ Tile(const Arguments& a, int number) {
        const int tiles = (a.group + LABELS - 1) / LABELS, first = number % tiles * LABELS;
        row = a.first_row + number / tiles;
        label0 = static_cast<int64_t>(row) * a.group + first;
        local = (row - a.first_row) * a.group + first;
        count = static_cast<int>(min(static_cast<int64_t>(min(LABELS, a.group - first)), a.labels - label0));
    }
};

// Where an element's weight is read and written: bfloat16 ones in shared memory, from where they go out in whole rows.
__device__ __forceinline__ Pair* own_weights(float* global, bfloat16*) { return reinterpret_cast<Pair*>(global); }
__device__ __forceinline__ Pair* own_weights(bfloat16*, bfloat16* shared) { return reinterpret_cast<Pair*>(shared); }

// The update of a thread's weights. WHOLE: the tile has LABELS labels of FEATURES features.
template <bool WHOLE>
__device__ __forceinline__ void update_weights(
    const float (&c)[M][N_FEATURE][4], Shared& shared, const Arguments& a, const Tile& tile, int m0, int n0) {
    const int lane = threadIdx.x & 31, first_f = n0 + lane % 4 * 2, fan_in = WHOLE ? FEATURES : a.fan_in;
    const int64_t start = (tile.label0 + m0 + lane / 4) * fan_in + first_f;
    const auto there = [&](int m, int n) { return WHOLE || (m0 + 8 * m + lane / 4 < tile.count && first_f + 8 * n < a.fan_in); };
    const auto pair_of = [&](void* tensor, int m, int n) { return reinterpret_cast<Pair*>(static_cast<WEIGHT*>(tensor) + start + 8 * m * fan_in + 8 * n); };
    // All of the state is asked for before any is needed.
    Pair first[2 * M][N_FEATURE], second[2 * M][N_FEATURE];
#pragma unroll
    for (int m = 0; m < 2 * M; ++m)
#pragma unroll
        for (int n = 0; n < N_FEATURE; ++n) {
            if (RULE >= MOMENTUM && there(m, n)) first[m][n] = *pair_of(a.state0, m, n);
            if (RULE == ADAMW && there(m, n)) second[m][n] = *pair_of(a.state1, m, n);
        }
    __syncthreads();  // nobody needs the old weights any more
#pragma unroll
    for (int m = 0; m < 2 * M; ++m) {
        const int g = m0 + 8 * m + lane / 4;
        const uint32_t number = static_cast<uint32_t>(a.label_start + tile.label0 + g);
        const uint32_t hashed0 = mix(number ^ a.key[0]), hashed1 = mix(number ^ a.key[2]), hashed2 = mix(number ^ a.key[4]);
#pragma unroll
        for (int n = 0; n < N_FEATURE; ++n) {
            if (!there(m, n)) continue;
            const int f = first_f + 8 * n;
            Pair* own = own_weights(static_cast<WEIGHT*>(a.weight) + start + 8 * m * fan_in + 8 * n,
                                    shared.w + place<W_PITCH>(g, n0 / 8 + n) + lane % 4 * 2);
            const float2 none = make_float2(0.0f, 0.0f), w = widened(*own);
            const float2 v0 = RULE >= MOMENTUM ? widened(first[m][n]) : none, v1 = RULE == ADAMW ? widened(second[m][n]) : none;
            const float dx = c[m / 2][n][m % 2 * 2] * a.text_weight, dy = c[m / 2][n][m % 2 * 2 + 1] * a.text_weight;
            const Values x = updated({w.x, v0.x, v1.x}, dx, a, a.weight_decay), y = updated({w.y, v0.y, v1.y}, dy, a, a.weight_decay);
            narrow(*own, {x.weight, y.weight}, hashed0, a.key[1], f);
            if (RULE >= MOMENTUM) narrow(*pair_of(a.state0, m, n), {x.state0, y.state0}, hashed1, a.key[3], f);
            if (RULE == ADAMW) narrow(*pair_of(a.state1, m, n), {x.state1, y.state1}, hashed2, a.key[5], f);
        }
    }
}

// What a thread needs first of a tile, read while the tile before is worked on.
struct Ahead {
    int32_t offset = -1;  // of the features of slot threadIdx.x in X^T; negative: there is no such slot
    float bias = -1e30f;  // of label threadIdx.x; this one stands for no label: its loss and slope are zero
    bool any_positive = false;

    __device__ __forceinline__ Ahead(const Arguments& a, int number, int numbers) {
        if (number >= numbers) return;
        const Tile tile(a, number);
        const int thread = threadIdx.x;
        if (thread < a.fan_in)
            offset = static_cast<const INDEX*>(a.index)[static_cast<int64_t>(tile.row) * a.fan_in + thread] * a.columns;
        if (thread < tile.count) bias = a.bias ? a.bias[tile.label0 + thread] : 0.0f;
        any_positive = a.any_positive[number] != 0;
    }
};

__device__ __forceinline__ void load_weights(Shared& shared, const Arguments& a, const Tile& tile) {
    const WEIGHT* weight = static_cast<const WEIGHT*>(a.weight) + tile.label0 * a.fan_in;
    share<LABELS * W_PITCH>([&](int chunk) {
        const int g = chunk / W_PITCH, f = chunk % W_PITCH * 8;
        const bool ok = g < tile.count && f < a.fan_in;
        const WEIGHT* from = weight + (ok ? g * a.fan_in + f : 0);
        bfloat16* to = shared.w + place<W_PITCH>(g, f / 8);
        if constexpr (BF16_WEIGHT) {
            copy_async(to, from, ok);
        } else {
            const float4 none = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            const float4 x = ok ? reinterpret_cast<const float4*>(from)[0] : none, y = ok ? reinterpret_cast<const float4*>(from)[1] : none;
            const __nv_bfloat162 packed[4] = {__floats2bfloat162_rn(x.x, x.y), __floats2bfloat162_rn(x.z, x.w),
                                              __floats2bfloat162_rn(y.x, y.y), __floats2bfloat162_rn(y.z, y.w)};
            *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(packed);
        }
    });
}

__device__ __forceinline__ void store_weights(const Shared& shared, const Arguments& a, const Tile& tile) {
    WEIGHT* weight = static_cast<WEIGHT*>(a.weight) + tile.label0 * a.fan_in;
    share<LABELS * W_PITCH>([&](int chunk) {
        const int g = chunk / W_PITCH, f = chunk % W_PITCH * 8;
        if (g < tile.count && f < a.fan_in)
            *reinterpret_cast<uint4*>(weight + g * a.fan_in + f) = *reinterpret_cast<const uint4*>(shared.w + place<W_PITCH>(g, f / 8));
    });
}

__device__ __forceinline__ void gather_features(Shared& shared, const Arguments& a, int text0) {
    share<FEATURES * X_PITCH>([&](int chunk) {
        const int f = chunk / X_PITCH, offset = shared.offset[f];
        const bfloat16* from = a.x + max(offset, 0) + text0 + chunk % X_PITCH * 8;
        copy_async(shared.x + place<X_PITCH>(f, chunk % X_PITCH), from, offset >= 0);
    });
}

__global__ void __launch_bounds__(THREADS, BLOCKS) step_kernel(const Arguments a) {
    extern __shared__ uint8_t memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
    const int m0 = warp / COLUMNS * (LABELS / ROWS), n0 = warp % COLUMNS * (TEXTS / COLUMNS);
    const int f0 = warp % COLUMNS * (FEATURES / COLUMNS);
    const int numbers = (a.last_row - a.first_row) * ((a.group + LABELS - 1) / LABELS);
    const bool update = a.update && *a.finite;
    float* const losses = a.loss + static_cast<int64_t>(blockIdx.x) * a.columns + n0;
    float loss[2 * N_TEXT] = {};

    Ahead ahead(a, blockIdx.x, numbers);
    for (int number = blockIdx.x; number < numbers; number += gridDim.x) {
        const Tile tile(a, number);
        const bool any_positive = ahead.any_positive;
        __syncthreads();  // the tile before is finished with
        if (threadIdx.x < FEATURES) shared.offset[threadIdx.x] = ahead.offset;
        if (threadIdx.x < LABELS) shared.bias[threadIdx.x] = ahead.bias;
        load_weights(shared, a, tile);
        ahead = Ahead(a, number + gridDim.x, numbers);
        float grad[M][N_FEATURE][4];
        clear(grad);
        for (int text0 = 0; text0 < (ONE_TILE ? 1 : a.columns); text0 += TEXTS) {
            __syncthreads();
            gather_features(shared, a, text0);
            await_copies();
            __syncthreads();
            {
                float z[M][N_TEXT][4], row_sum[2 * M], tile_loss[2 * N_TEXT];
#pragma unroll
                for (int m = 0; m < 2 * M; ++m)
#pragma unroll
                    for (int n = 0; n < N_TEXT; ++n)
                        z[m / 2][n][m % 2 * 2] = z[m / 2][n][m % 2 * 2 + 1] = shared.bias[m0 + 8 * m + lane / 4];
                product<FEATURES, W_PITCH, false, X_PITCH, true>(z, shared.w, m0, shared.x, n0);
                slopes(z, tile_loss, row_sum, shared.s, a, any_positive, tile.local, tile.count, m0, n0, text0);
                if (!ONE_TILE) add_losses(tile_loss, losses + text0);
#pragma unroll
                for (int n = 0; n < 2 * N_TEXT; ++n) loss[n] += tile_loss[n];
#pragma unroll
                for (int m = 0; m < 2 * M; ++m) {
                    float& total = shared.bias_grad[warp % COLUMNS][m0 + 8 * m + lane / 4];
                    if (lane % 4 == 0) total = text0 == 0 ? row_sum[m] : total + row_sum[m];
                }
            }
            __syncthreads();
            feature_gradient(shared, a, text0);
            if (update) product<TEXTS, X_PITCH, false, X_PITCH, false>(grad, shared.s, m0, shared.x, f0);
        }
        if (!update) continue;
        if (tile.count == LABELS && a.fan_in == FEATURES) update_weights<true>(grad, shared, a, tile, m0, f0);
        else update_weights<false>(grad, shared, a, tile, m0, f0);
        // Signed: a tile past the last label has fewer than none.
        const int thread = threadIdx.x;
        if (thread < tile.count) update_bias<COLUMNS>(a, tile.label0 + thread, shared.bias[thread], &shared.bias_grad[0][thread], LABELS);
        if constexpr (BF16_WEIGHT) {
            __syncthreads();
            store_weights(shared, a, tile);
        }
    }
    if (ONE_TILE) add_losses(loss, losses);
}

}  // namespace

// Launch on `stream`; a.loss has a row for each block. Returns 0, or CUDA's error number.
extern "C" int group_pass(const Arguments* arguments, int blocks, void* stream) {
    const int bytes = sizeof(Shared);
    if (cudaError_t error = cudaFuncSetAttribute(step_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes)) return error;
    step_kernel<<<blocks, THREADS, bytes, static_cast<cudaStream_t>(stream)>>>(*arguments);
    return cudaGetLastError();
}

// How many blocks of it fit on the current device at once; negative: CUDA's error number.
extern "C" int group_pass_blocks() {
    const int bytes = sizeof(Shared);
    int device, units, blocks;
    cudaError_t error = cudaFuncSetAttribute(step_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (!error) error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, step_kernel, THREADS, bytes);
    if (!error) error = cudaGetDevice(&device);
    if (!error) error = cudaDeviceGetAttribute(&units, cudaDevAttrMultiProcessorCount, device);
    return error ? -static_cast<int>(error) : blocks * units;
}
