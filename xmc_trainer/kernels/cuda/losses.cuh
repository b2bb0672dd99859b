// The losses of `xmc_trainer.head.losses` for one logit. Compile with -D LOSS: 0 (bce) or 1 (squared hinge).

#pragma once

#include "ptx.cuh"

namespace {

__device__ __forceinline__ float log1p_fast(float x) {
    return x < 0.01f ? x * (1.0f - x * (0.5f - x * (0.33333334f - 0.25f * x))) : 0.6931471805599453f * log2_fast(1.0f + x);
}

// Returns the slope of a negative's logit and adds its loss to p. Several logits share p, and so one logarithm, in `loss_of_negatives`:
// 1 + p <- (1 + p) (1 + e^z), which loses no digit of a small e^z. p may overflow.
__device__ __forceinline__ float slope_of_negative(float z, float& p) {
    if (LOSS == BCE) {
        const float e = exp2_fast(fminf(1.4426950408889634f * z, 126.0f));
        p = fmaf(p, e, p + e);
        return e * reciprocal(1.0f + e);
    }
    const float margin = fmaxf(1.0f + z, 0.0f);
    p = fmaf(margin, margin, p);
    return 2.0f * margin;
}

__device__ __forceinline__ bool overflowed(float p) { return LOSS == BCE && !(p < 1e30f); }
__device__ __forceinline__ float loss_of_negatives(float p) { return LOSS == BCE ? log1p_fast(p) : p; }

// Returns the slope of any logit, however large, and adds its loss to `loss`. sign: the top bit, set for a positive.
__device__ __forceinline__ float slope_of_any(float logit, uint32_t sign, bool is_text, float& loss) {
    // A positive with logit z has the loss of a negative with logit -z, and its negated slope.
    const float z = __uint_as_float(__float_as_uint(logit) ^ sign);
    float y;
    if (LOSS == BCE) {
        const float e = exp2_fast(-1.4426950408889634f * fabsf(z)), inverse = reciprocal(1.0f + e);
        y = z >= 0.0f ? inverse : e * inverse;
        loss += fmaxf(z, 0.0f) + log1p_fast(e);
    } else {
        const float margin = fmaxf(1.0f + z, 0.0f);
        y = 2.0f * margin;
        loss = fmaf(margin, margin, loss);
    }
    return is_text ? __uint_as_float(__float_as_uint(y) ^ sign) : 0.0f;
}

}  // namespace
