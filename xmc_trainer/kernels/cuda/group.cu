// The step of labels that share index rows, in one pass over the weights: loss, feature gradient and update.
//
// A tile is LABELS labels of one index row, whose F features are gathered from X^T [d, B]. TEXTS texts at a time:
//
//     z_GB = w_GF x_FB + bias     loss_B += sum_G loss(z, y)     s_GB = dloss/dz
//     dX^T[index] += w_GF^T s_GB  (atomic)        dw_GF += s_GB x_FB^T        w_GF, bias <- update
//
// The operands of all three products stay in shared memory: X and W as read, s as the second product needs it. (Triton would need so
// many registers for s that a second block would not fit, and cannot update a tile in place.) A block takes one tile after another.
// Several blocks share a multiprocessor: one loads while another multiplies.
//
//     barrier                           who waits    what then holds
//     __syncthreads, once a tile        all          the previous tile is done: offset, bias, w and the sums of slopes may be written
//     __syncthreads, before gathering   all          offset and w (if float32) are written; the previous texts' products are done: x
//                                                    may be written
//     __syncthreads, after copies       all          x and w are written
//     __syncthreads, after slopes       all          s and the sums of slopes are written
//     __syncwarp, twice for 8 rows      a warp       first: `staged` has been read and may be written; second: it may be read
//
// Compile with -D, besides those of group.cuh: LABELS (16, 32, 64), FEATURES (64, 128; F at most), BLOCKS (on a multiprocessor),
// DX_M (1, 2, 4), ONE_TILE (at most TEXTS texts).

#include "group.cuh"

namespace {

// ROWS x COLUMNS warps share [LABELS, TEXTS] and [LABELS, FEATURES]; each has M x N_TEXT and M x N_FEATURE pieces of 16 x 8.
constexpr int ROWS = LABELS >= 64 && WARPS == 8 ? 2 : 1, COLUMNS = WARPS / ROWS;
constexpr int M = LABELS / ROWS / 16, N_TEXT = TEXTS / COLUMNS / 8, N_FEATURE = FEATURES / COLUMNS / 8;
// A warp computes 16 DX_M features and 32 texts of the feature gradient in each pass.
constexpr int DX_PASSES = FEATURES / (16 * DX_M) * (TEXTS / 32) / WARPS;
constexpr int STAGED_PITCH = 40;  // floats; puts four rows of eight in different banks
static_assert(THREADS >= FEATURES && THREADS >= LABELS, "a thread for each slot and label");
static_assert(N_TEXT % 2 == 0 && N_FEATURE % 2 == 0 && DX_PASSES >= 1 && M >= 1, "the warps must share the tile");

// The place of a chunk of X. Unlike `place`, it also puts the eight rows of `slot_of_column` that a product reads at once in different
// banks.
__device__ __forceinline__ int place_of_x(int row, int chunk) {
    return (row * X_PITCH + (chunk ^ (row & 7) ^ (row >> 3 & 3) << 1)) * 8;
}

// The slot of a column of dW. The order gives each lane 2 N_FEATURE contiguous slots.
__device__ __forceinline__ int slot_of_column(int column) {
    const int n = column / 8 % N_FEATURE;
    return column / (8 * N_FEATURE) * (8 * N_FEATURE) + column % 8 / 2 * (2 * N_FEATURE) + 2 * n + column % 2;
}

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

// dX^T[index] += W^T S for one tile of texts. Atomic adds of whole lines of 128 bytes are nearly twice as fast as of the 32 bytes that
// fragments have (H100: 3.2 against 1.9 TB/s), so eight rows of a warp's 32 texts are staged in shared memory.
__device__ __forceinline__ void feature_gradient(Shared& shared, const Arguments& a, int text0) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
    float* const staged = shared.staged[warp];
#pragma unroll 1
    for (int pass = 0; pass < DX_PASSES; ++pass) {
        const int part = warp + pass * WARPS, m0 = part / (TEXTS / 32) * (16 * DX_M), n0 = part % (TEXTS / 32) * 32;
        float c[DX_M][4][4];
        clear(c);
        product<LABELS, true, true>(c, Placed<W_PITCH>{shared.w}, m0, Placed<X_PITCH>{shared.s}, n0);
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

__device__ __forceinline__ void gather_features(Shared& shared, const Arguments& a, int text0) {
    const Offsets offsets(shared.offset);
    share<FEATURES, X_PITCH>([&](int f, int chunk, int i) {
        const int offset = offsets.of[i];
        copy_async(shared.x + place_of_x(f, chunk), a.x + max(offset, 0) + text0 + chunk * 8, offset >= 0);
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
    const Placed<W_PITCH> at_w{shared.w};
    const Placed<X_PITCH> at_s{shared.s};
    const auto at_x = [&](int row, int chunk) { return shared.x + place_of_x(row, chunk); };
    const auto at_x_of_column = [&](int column, int chunk) { return at_x(slot_of_column(column), chunk); };
    float loss[2 * N_TEXT] = {};

    Ahead ahead(a, blockIdx.x, numbers);
    for (int number = blockIdx.x; number < numbers; number += gridDim.x) {
        const Tile tile(a, number);
        const bool any_positive = ahead.any_positive();
        __syncthreads();  // the previous tile is done
        if (threadIdx.x < FEATURES) shared.offset[threadIdx.x] = ahead.offset(a, threadIdx.x);
        if (threadIdx.x < LABELS) shared.bias[threadIdx.x] = ahead.bias;
        load_weights(a, tile, at_w);
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
                product<FEATURES, false, true>(z, at_w, m0, at_x, n0);
                slopes(z, tile_loss, row_sum, at_s, a, any_positive, tile.local, tile.count, m0, n0, text0);
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
            if (update && (ONE_TILE || text0 + TEXTS >= a.columns)) fetch_states(a, tile);
            feature_gradient(shared, a, text0);
            if (update) product<TEXTS, false, false>(grad, at_s, m0, at_x_of_column, f0);
        }
        if (!update) continue;
        using Weights = WeightUpdate<2 * M, true, 2 * M, M, N_FEATURE>;
        Weights::Read read;
        Weights::read(read, a, tile, m0, f0);
        Weights::update(grad, read, a, tile, m0, f0, at_w);
        // Signed, because count is negative in a tile past the last label.
        const int thread = threadIdx.x;
        if (thread < tile.count) {
            const int64_t label = tile.label0 + thread;
            update_bias<COLUMNS>(a, label, bias_values(a, label, shared.bias[thread]), &shared.bias_grad[0][thread], LABELS);
        }
    }
    if (ONE_TILE) add_losses(loss, losses);
}

}  // namespace

#include "launch.cuh"
