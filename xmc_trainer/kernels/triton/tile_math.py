"""Device functions of the Triton kernels: random bits, losses and update rules.

They match `rng` and `eight_bits` bit for bit, and `reference` up to rounding. Triton's interpreter (TRITON_INTERPRET=1, CPU tensors)
computes bfloat16 arithmetic wrongly, so operands are rounded to bfloat16 and widened to float32 there.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

from xmc_trainer.kernels.arguments import LOSSES, RULES

INTERPRET = tl.constexpr(triton.knobs.runtime.interpret)
# The values of LOSS and RULE.
BCE = tl.constexpr(LOSSES["bce"])
MOMENTUM, ADAMW, ROWWISE = (tl.constexpr(RULES[name]) for name in ("momentum", "adamw", "rowwise_rmsprop"))


@triton.jit
def mix(x):
    """Apply the hash lowbias32 to uint32 values."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def row_hash(key0, row):
    """Compute the part of `rng.rounding_bits` that a row's elements share. key0: int32 scalar; row: int32."""
    return mix(row.to(tl.uint32, bitcast=True) ^ key0.to(tl.uint32, bitcast=True))


@triton.jit
def element_hash(hashed, key1, column):
    """Hash each element, uint32, from a `row_hash` and columns that broadcast. An element's draws are multiples of its hash."""
    x = (hashed + column.to(tl.uint32, bitcast=True) * 0x9E3779B1) ^ key1.to(tl.uint32, bitcast=True)
    return x ^ (x >> 16)


@triton.jit
def operand(x, BF16: tl.constexpr):
    """Convert to bfloat16 if BF16, else to float32."""
    if INTERPRET:
        x = x.to(tl.float32)
        if BF16:
            # The interpreter's conversion truncates.
            bits = x.to(tl.uint32, bitcast=True)
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
            x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    elif BF16:
        x = x.to(tl.bfloat16)
    else:
        x = x.to(tl.float32)
    return x


@triton.jit
def reciprocal(x):
    if INTERPRET:
        return 1.0 / x
    return libdevice.fast_dividef(1.0, x)


@triton.jit
def log(x):
    if INTERPRET:
        return tl.log(x)
    return libdevice.fast_logf(x)


@triton.jit
def loss_and_slope(z, any_positive, words_ptr, label_ok, places, LOSS: tl.constexpr):
    """Return the loss and dloss/dlogit of a tile of logits, float32; see `xmc_trainer.head.losses`.

    any_positive: scalar; false skips the bitmap, as in most tiles.
    words_ptr: int32 pointers of the shape of z, to each element's word of the bitmap.
    label_ok: bool, broadcasts to z; where words_ptr is valid.
    places: int32, broadcasts to z; each element's bit in its word.
    """
    # A positive with logit z has the loss of a negative with logit -z, and its negated slope.
    if any_positive:
        z = tl.where(((tl.load(words_ptr, mask=label_ok, other=0) >> places) & 1) != 0, -z, z)
    if LOSS == BCE:
        e = tl.exp(-tl.abs(z))
        inverse = reciprocal(1.0 + e)
        # Most e are small, and log(1 + e) would lose their digits.
        log1p = tl.where(e < 0.01, e * (1.0 - e * (0.5 - e * (0.33333334 - 0.25 * e))), -log(inverse))
        loss = tl.maximum(z, 0.0) + log1p
        slope = tl.where(z >= 0, inverse, e * inverse)
    else:
        margin = tl.maximum(1.0 + z, 0.0)
        loss = margin * margin
        slope = 2.0 * margin
    if any_positive:
        slope = tl.where(((tl.load(words_ptr, mask=label_ok, other=0) >> places) & 1) != 0, -slope, slope)
    return loss, slope


@triton.jit
def updated(
    weight, grad, square, state0, state1, lr, weight_decay, beta0, beta1, eps, correct0, correct1, RULE: tl.constexpr
):
    """Return the updated (weight, state0, state1), float32; see `xmc_trainer.head.optimizers`.

    square: with ROWWISE, the mean square whose moving average is state0; both broadcast to the weight.
    beta0, beta1: SGD's momentum, or Adam's beta1 and beta2. ROWWISE has its beta2 in beta1.
    correct0, correct1: bias corrections 1 / (1 - beta1^step) and 1 / (1 - beta2^step).
    """
    if RULE == ROWWISE:
        state0 = beta1 * state0 + (1.0 - beta1) * square
        weight = weight * (1.0 - lr * weight_decay) - lr * grad / (tl.sqrt(state0 * correct1) + eps)
    elif RULE == ADAMW:
        state0 = beta0 * state0 + (1.0 - beta0) * grad
        state1 = beta1 * state1 + (1.0 - beta1) * grad * grad
        deviation = tl.sqrt(state1 * correct1) + eps
        weight = weight * (1.0 - lr * weight_decay) - lr * correct0 * state0 / deviation
    else:
        grad = grad + weight_decay * weight
        if RULE == MOMENTUM:
            state0 = beta0 * state0 + grad
            grad = state0
        weight = weight - lr * grad
    return weight, state0, state1


@triton.jit
def load_state(pointer, mask, SQUARES: tl.constexpr):
    """Load a state as float32; 8-bit states as `eight_bits.decoded` does. SQUARES: it is state 2, the mean square."""
    x = tl.load(pointer, mask=mask, other=0)
    if pointer.dtype.element_ty == tl.uint8:
        if SQUARES:
            x = (((x.to(tl.uint32) << 21) + (64 << 23)).to(tl.float32, bitcast=True) - 2.0**-63) * 2.0**17
        else:
            x = (x.to(tl.uint16) << 8).to(tl.float16, bitcast=True).to(tl.float32) * 2.0**-7
    return x.to(tl.float32)


@triton.jit
def store_rounded(pointer, value, mask, hashed, FACTOR: tl.constexpr, SQUARES: tl.constexpr = False):
    """Store float32 values. bfloat16 and 8-bit tensors round stochastically, as `rng.round_to_bfloat16` and `eight_bits.encoded` do.

    hashed: result of `element_hash`. FACTOR: the tensor's factor in `rng`. SQUARES: as in `load_state`.
    """
    if pointer.dtype.element_ty == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True) + ((hashed * FACTOR) >> 16)
        value = (bits & 0xFFFF0000).to(tl.float32, bitcast=True).to(tl.bfloat16)
    elif pointer.dtype.element_ty == tl.uint8:
        draw = hashed * 0x846CA68B  # one draw for both states, which use different bits
        if SQUARES:
            bits = (value * 2.0**-17 + 2.0**-63).to(tl.uint32, bitcast=True) - (64 << 23)
            value = tl.minimum((bits + (draw >> 11)) >> 21, 0xFF).to(tl.uint8)
        else:
            half = tl.clamp(value * 2.0**7, -57344.0, 57344.0).to(tl.float16).to(tl.uint16, bitcast=True)
            value = ((half + ((draw >> 8) & 0xFF).to(tl.uint16)) >> 8).to(tl.uint8)
    tl.store(pointer, value, mask=mask)


@triton.jit
def update_weights(
    weight, weight_ptr, state0_ptr, state1_ptr, place, ok, finite, grad, label, label_start, column,
    lr, weight_decay, beta0, beta1, eps, correct0, correct1, key0, key1,
    F: tl.constexpr, RULE: tl.constexpr,
):  # fmt: skip
    """Update the weights and states at `place`, int64 [T, N], where `ok`; write nothing unless `finite`.

    weight: [T, N], as stored. grad: float32 [T, N]. label: int64 [T], local labels. label_start: global id of local label 0.
    column: int32 slots, broadcast to [T, N]; with ROWWISE they must cover all F weights of each label.
    """
    number = (label_start + label).to(tl.int32)
    weight = weight.to(tl.float32)
    state0 = weight
    state1 = weight
    square = grad
    write = ok & finite[:, None]
    if RULE == ROWWISE:
        label_ok = tl.max(ok.to(tl.int32), 1) != 0
        square = (tl.sum(tl.where(ok, grad * grad, 0.0), 1) * (1.0 / F))[:, None]
        state0 = tl.load(state0_ptr + label, mask=label_ok, other=0.0)[:, None]
    elif RULE >= MOMENTUM:
        state0 = load_state(state0_ptr + place, ok, False)
    if RULE == ADAMW:
        state1 = load_state(state1_ptr + place, ok, True)
    weight, state0, state1 = updated(
        weight, grad, square, state0, state1, lr, weight_decay, beta0, beta1, eps, correct0, correct1, RULE
    )
    hashed = element_hash(row_hash(key0, number)[:, None], key1, column)
    store_rounded(weight_ptr + place, weight, write, hashed, 0x7FEB352D)
    if RULE == ROWWISE:
        tl.store(state0_ptr + label[:, None], state0, mask=(label_ok & finite)[:, None])
    elif RULE >= MOMENTUM:
        store_rounded(state0_ptr + place, state0, write, hashed, 0x846CA68B)
    if RULE == ADAMW:
        store_rounded(state1_ptr + place, state1, write, hashed, 0x85EBCA6B, True)


@triton.jit
def update_bias(
    bias_ptr, state0_ptr, state1_ptr, label, ok, finite, bias, grad, lr, beta0, beta1, eps, correct0, correct1,
    RULE: tl.constexpr,
):  # fmt: skip
    """Update float32 biases [T], which the caller has read, and their states where `ok` and `finite`. Biases do not decay."""
    write = ok & finite
    state0 = bias
    state1 = bias
    if RULE >= MOMENTUM:
        state0 = tl.load(state0_ptr + label, mask=write, other=0.0)
    if RULE == ADAMW:
        state1 = tl.load(state1_ptr + label, mask=write, other=0.0)
    bias, state0, state1 = updated(
        bias, grad, grad * grad, state0, state1, lr, 0.0, beta0, beta1, eps, correct0, correct1, RULE
    )
    tl.store(bias_ptr + label, bias, mask=write)
    if RULE >= MOMENTUM:
        tl.store(state0_ptr + label, state0, mask=write)
    if RULE == ADAMW:
        tl.store(state1_ptr + label, state1, mask=write)


@triton.jit
def count_bits(x):
    """Count the bits set in each uint32, as int32."""
    if INTERPRET:
        # The interpreter's cost is in the number of operations, not of elements: use few.
        x = tl.sum(((tl.expand_dims(x, -1) >> tl.arange(0, 32).to(tl.uint32)) & 1).to(tl.int32), -1)
    else:
        x = libdevice.popc(x.to(tl.int32, bitcast=True))
    return x
