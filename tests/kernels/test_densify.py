"""The densify kernels in CUDA, for any number of texts and features, against float64, eager bfloat16 and the reference.

They run on a GPU under the mark `gpu`, else on the CPU emulator (cuda_on_cpu).
"""

from __future__ import annotations

import pytest
import torch

from tests.head_helpers import assert_parts_train_as_one, oracle_loss, target_matrix
from xmc_trainer.head import RewireRule

pytestmark = pytest.mark.slow

pytest.importorskip("triton", reason="the Triton backend needs triton")
from tests.kernels.cuda_helpers import DEVICES, LABELS, OPTIMIZERS, batch, dense_of, error, floats_of, make_head, use  # noqa: E402
from xmc_trainer.kernels import arguments  # noqa: E402
from xmc_trainer.kernels.cuda import densify, source  # noqa: E402

# (features, fan_in, group_size): slots are read one, two and four at a time; blocks have 64 to 256 features, some padded; logits take one
# or two slices of features.
HEADS = [(48, 18, 1), (200, 33, 3), (384, 100, 8), (768, 128, 1), (1000, 61, 1), (192, 24, 1)]


@pytest.fixture(autouse=True, params=DEVICES)
def device(request, monkeypatch):
    """The device that the kernels run on. A test fails if it did not launch them."""
    launched = use(request.param, densify, "run", monkeypatch)
    yield request.param
    assert launched


# The last case has positives in a few labels only. Tiles without positives are the usual ones in training and take a faster path.
@pytest.mark.parametrize("number, scale, texts, loss, with_positives", [
    *((number, 0.1, 37, "bce", LABELS) for number in (1, 3)), (4, 0.1, 129, "squared_hinge", LABELS),
    (0, 60.0, 128, "squared_hinge", LABELS), (2, 60.0, 300, "bce", LABELS), (3, 1.0, 128, "bce", 16),
])  # fmt: skip
def test_errs_no_more_than_eager_bfloat16(number, scale, texts, loss, with_positives, device):
    # Scale 60 saturates most logits, on both sides.
    features, fan_in, group_size = HEADS[number]
    labels = LABELS
    head = make_head(device, features, fan_in, group_size, labels=labels, lr=1.0, weight_decay=0.0, loss=loss)
    head.weight.copy_((head.weight * scale).bfloat16())
    before, mask = dense_of(head)
    feat, ids, counts = batch(device, features, texts, labels=labels)
    ids %= with_positives
    feat.requires_grad_()
    out = head(feat, ids, counts)
    out.backward()
    x, y = feat.detach().double(), target_matrix(ids.cpu(), counts.cpu(), labels).double().to(device)
    z = (x @ before.T).requires_grad_()  # the bias was zero
    exact = oracle_loss(z, y, loss).sum()
    exact.backward()
    twin_z = (x.bfloat16() @ before.bfloat16().T).requires_grad_()
    oracle_loss(twin_z, y.bfloat16(), loss).sum().backward()
    twin_dx, twin_dw = twin_z.grad @ before.bfloat16(), (twin_z.grad.T @ x.bfloat16()).double() * mask
    assert out.item() == pytest.approx(exact.item(), rel=1e-4)
    assert error(feat.grad, z.grad @ before) <= 1.05 * error(twin_dx, z.grad @ before)
    dw = (z.grad.T @ x) * mask
    assert error(before - dense_of(head)[0], dw) <= 1.05 * error(twin_dw, dw)
    torch.testing.assert_close(
        -head.bias.double(), z.grad.sum(0), rtol=1e-2, atol=1e-2 * z.grad.sum(0).abs().max().item()
    )


@pytest.mark.parametrize("number, optimizer, weight_dtype, texts", [
    *((2, optimizer, torch.bfloat16, 100) for optimizer in OPTIMIZERS), (1, "adamw", torch.float32, 129),
    (4, "rowwise", torch.bfloat16, 37), (5, "sgd", torch.float32, 300), (0, "momentum", torch.float32, 700),
])  # fmt: skip
def test_updates_equal_the_reference(number, optimizer, weight_dtype, texts, device):
    features, fan_in, group_size = HEADS[number]
    labels = LABELS
    options = {
        "weight_dtype": weight_dtype,
        "lr": 1e-3,
        "text_reduction": "mean",
        "bias": number != 1,
        "labels": labels,
    }
    heads = [
        make_head(device, features, fan_in, group_size, optimizer, backend=name, **options)
        for name in ("triton", "reference")
    ]
    start = floats_of(heads[0])
    for step in range(2):
        for head in heads:
            head(*batch(device, features, texts, seed=step, labels=labels))
    for name in {"index", "skipped"} & {name for name, _ in heads[1].named_buffers()}:
        assert torch.equal(getattr(heads[0], name), getattr(heads[1], name)), name
    got = floats_of(heads[0])
    for name, expected in floats_of(heads[1]).items():
        # The kernels round slopes and gradients to bfloat16, so a few stochastic roundings of weights and states differ.
        allowed = 2e-2 if getattr(heads[1], name).dtype == torch.float32 else 5e-2
        assert error(got[name] - start[name], (expected - start[name]).double()) < allowed, name


@pytest.mark.parametrize("number, optimizer", [(2, "momentum"), (2, "rowwise"), (5, "adamw_8bit")])
def test_stochastic_rounding_equals_the_reference(number, optimizer, device):
    # With zero weights the slopes are +-1/2, and with features of +-1 the gradients are exact in bfloat16.
    options = {"weight_dtype": torch.bfloat16}
    heads = [make_head(device, *HEADS[number], optimizer, backend=name, **options) for name in ("triton", "reference")]
    for head in heads:
        head.weight.zero_()
        feat, ids, counts = batch(device, HEADS[number][0], 100)
        head(feat.sign(), ids, counts)
    for name, expected in heads[1].named_buffers():
        if expected.dtype in (torch.bfloat16, torch.uint8):
            assert (dict(heads[0].named_buffers())[name] == expected).float().mean() > 0.99, name


@pytest.mark.parametrize("number, optimizer", [(2, "adamw"), (4, "sgd")])
def test_runs_are_the_same_bit_for_bit_and_chunks_too(number, optimizer, device, monkeypatch):
    features, fan_in, group_size = HEADS[number]
    labels = LABELS if device == "cpu" else 64 * 500 + 11  # several tiles a thread block; in small chunks, one
    found = []
    for workspace in (1 << 20, 1 << 20, 1):  # at least a tile for each block
        monkeypatch.setattr(arguments, "STEP_WORKSPACE", workspace)
        monkeypatch.setattr(arguments, "STEP_SHARE", 0.0)
        head = make_head(device, features, fan_in, group_size, optimizer, labels, weight_dtype=torch.bfloat16)
        feat, ids, counts = batch(device, features, 128, labels=labels)
        feat.requires_grad_()
        loss = head(feat, ids, counts)
        loss.backward()
        found.append({"loss": loss.detach(), "dx": feat.grad} | dict(head.named_buffers()))
    first, second, chunked = found
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    for name, tensor in first.items():
        # Chunks change the order of sums. The last digit of a bias depends on the labels in its tile.
        if name in ("loss", "dx"):
            torch.testing.assert_close(chunked[name], tensor, rtol=1e-4, atol=1e-4)
        elif name.startswith("bias"):
            torch.testing.assert_close(chunked[name], tensor, rtol=1e-5, atol=1e-7)
        else:
            assert torch.equal(chunked[name], tensor), name


@pytest.mark.parametrize("number, optimizer", [(1, "adamw"), (0, "momentum")])
def test_micro_batches_and_shards_equal_one_batch(number, optimizer, device):
    def make(**more):
        return make_head(device, *HEADS[number], optimizer, text_reduction="mean", **more)

    assert_parts_train_as_one(make, [batch(device, HEADS[number][0], 90, seed) for seed in range(2)], grad_rtol=1e-3)


@pytest.mark.parametrize("number", [2])
def test_steps_without_update_take_states_of_a_byte(number, device):
    options = {"weight_dtype": torch.bfloat16, "lr": 1e-3, "text_reduction": "mean"}
    heads = [
        make_head(device, *HEADS[number], "adamw_8bit", backend=name, **options) for name in ("triton", "reference")
    ]
    start, losses = floats_of(heads[0]), []
    for head in heads:
        first, second = (batch(device, HEADS[number][0], texts, seed=texts) for texts in (60, 40))
        losses.append(
            [head(*first, end_of_step=False, texts_in_step=100).item(), head(*second, texts_in_step=100).item()]
        )
        head.eval()
        losses[-1].append(head(*first).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and not source._gave_up
    got = floats_of(heads[0])
    for name, expected in floats_of(heads[1]).items():
        allowed = 2e-2 if getattr(heads[1], name).dtype == torch.float32 else 5e-2
        assert error(got[name] - start[name], (expected - start[name]).double()) < allowed, name


@pytest.mark.parametrize("number, bad, optimizer", [
    (2, float("nan"), "adamw"), (4, float("inf"), "rowwise"),
])  # fmt: skip
def test_a_non_finite_feature_never_reaches_a_weight(number, bad, optimizer, device):
    features, fan_in, group_size = HEADS[number]
    head = make_head(device, features, fan_in, group_size, optimizer, weight_dtype=torch.bfloat16)
    good, (feat, ids, counts) = batch(device, features, 37), batch(device, features, 37, seed=1)
    head(*good)
    before = {name: tensor.clone() for name, tensor in head.named_buffers()}
    feat[3, 5] = bad
    feat.requires_grad_()
    head(feat, ids, counts).backward()
    assert not torch.isfinite(feat.grad).all() and head.skipped.item() == 1
    for name, tensor in head.named_buffers():
        assert name == "skipped" or torch.equal(tensor, before[name]), name
    head(*good)
    assert torch.isfinite(head.weight.float()).all() and not torch.equal(head.weight, before["weight"])


@pytest.mark.parametrize("number", [1])
def test_no_texts_no_positives_and_rewired_rows(number, device):
    features, fan_in, group_size = HEADS[number]
    head = make_head(device, features, fan_in, group_size)
    none = torch.empty(0, dtype=torch.int64, device=device)
    assert head(torch.empty(0, features, device=device), none, none).item() == 0
    feat = torch.randn(2, features, device=device).bfloat16().float()
    for _ in range(2):
        expected = oracle_loss(
            feat.double() @ dense_of(head)[0].T + head.bias.double(), torch.zeros(2, LABELS, device=device), "bce"
        )
        with torch.no_grad():
            head.eval()
            assert head(feat, none, torch.zeros(2, dtype=torch.int64, device=device)).item() == pytest.approx(
                expected.sum().item(), rel=1e-3
            )
            head.train()
        head.rewire(RewireRule("fraction", 0.3, "random"))


@pytest.mark.parametrize("number", [3])
def test_rows_that_one_block_has_all_features_of(number, device):
    """One thread block has runs of slots that are longer than registers can hold, and the others have none."""
    features, fan_in, group_size = HEADS[number]
    options = {"weight_dtype": torch.bfloat16, "lr": 1.0}
    heads = [
        make_head(device, features, fan_in, group_size, backend=name, **options) for name in ("triton", "reference")
    ]
    feat, ids, counts = batch(device, features, 100)
    found = []
    for head in heads:
        before = head.weight.double()
        head.index.copy_(torch.arange(fan_in))
        x = feat.clone().requires_grad_()
        head(x, ids, counts).backward()
        found.append((x.grad, head.weight.double() - before))
    for got, expected, allowed in zip(*found, (1e-2, 5e-2)):
        assert error(got, expected.double()) < allowed
