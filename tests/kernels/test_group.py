"""The CUDA kernels for groups against float64, eager bfloat16, the reference backend and themselves.

They run on a GPU under the mark `gpu`, else on the CPU emulator (cuda_on_cpu).
"""

from __future__ import annotations

import pytest
import torch

from tests.head_helpers import assert_parts_train_as_one, oracle_loss, target_matrix
from xmc_trainer.head import RewireRule

pytestmark = pytest.mark.slow

pytest.importorskip("triton", reason="the Triton backend needs triton")
from tests.kernels.cuda_helpers import DEVICES, LABELS, batch, dense_of, error, floats_of, make_head, use  # noqa: E402
from xmc_trainer.kernels.cuda import group  # noqa: E402

BY_ELEMENT = ["sgd", "momentum", "adamw"]
# (features, fan_in, group_size): one tile and several, short tiles and groups.
GROUPS = [(48, 16, 32), (200, 64, 40), (768, 128, 32), (768, 120, 64), (768, 128, 128), (4096, 72, 150), (300, 40, 50)]


@pytest.fixture(autouse=True, params=DEVICES)
def device(request, monkeypatch):
    """The device that the kernel runs on. A test fails if it did not launch the kernel."""
    launched = use(request.param, group, "run", monkeypatch)
    yield request.param
    assert launched


INPUTS = [(0.1, 37, "bce"), (60.0, 37, "squared_hinge"), (1.0, 150, "squared_hinge"), (60.0, 128, "bce")]


# Each head with both losses, saturated and not. The last four have positives in the first tile of labels only, and no padding columns.
@pytest.mark.parametrize("number, inputs, with_positives", [
    *((number, INPUTS[number % 2 * 2 + i], LABELS) for number in range(len(GROUPS)) for i in range(2)),
    (2, (1.0, 128, "bce"), 16), (3, (60.0, 256, "bce"), 16), (4, (1.0, 256, "squared_hinge"), 16), (4, (60.0, 128, "bce"), 16),
])  # fmt: skip
def test_errs_no_more_than_eager_bfloat16(number, inputs, with_positives, device):
    (features, fan_in, group_size), (scale, texts, loss) = GROUPS[number], inputs
    # Scale 60 saturates most logits, on both sides.
    head = make_head(device, features, fan_in, group_size, lr=1.0, weight_decay=0.0, loss=loss)
    head.weight.copy_((head.weight * scale).bfloat16())
    before, mask = dense_of(head)
    feat, ids, counts = batch(device, features, texts)
    ids %= with_positives
    feat.requires_grad_()
    out = head(feat, ids, counts)
    out.backward()
    x, y = feat.detach().double(), target_matrix(ids.cpu(), counts.cpu(), LABELS).double().to(device)
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


@pytest.mark.parametrize("number, optimizer, weight_dtype", [
    *((1, optimizer, dtype) for optimizer in BY_ELEMENT for dtype in (torch.float32, torch.bfloat16)),
    (4, "adamw", torch.bfloat16), (5, "adamw", torch.bfloat16), (5, "momentum", torch.float32), (6, "adamw", torch.bfloat16),
])  # fmt: skip
def test_updates_equal_the_reference(number, optimizer, weight_dtype, device):
    features, fan_in, group_size = GROUPS[number]
    options = {"weight_dtype": weight_dtype, "lr": 1e-3, "text_reduction": "mean"}
    heads = [
        make_head(device, features, fan_in, group_size, optimizer, backend=name, **options)
        for name in ("triton", "reference")
    ]
    start = floats_of(heads[0])
    for step in range(3):
        for head in heads:
            head(*batch(device, features, 200, seed=step))
    for name in {"index", "skipped"} & {name for name, _ in heads[1].named_buffers()}:
        assert torch.equal(getattr(heads[0], name), getattr(heads[1], name)), name
    got = floats_of(heads[0])
    for name, expected in floats_of(heads[1]).items():
        # The kernel rounds slopes to bfloat16, so a few stochastic roundings of weights and states differ.
        allowed = 1e-2 if getattr(heads[1], name).dtype == torch.float32 else 5e-2
        assert error(got[name] - start[name], (expected - start[name]).double()) < allowed, name


@pytest.mark.parametrize("number, optimizer", [(1, "sgd"), (1, "adamw"), (3, "momentum"), (4, "adamw")])
def test_stochastic_rounding_equals_the_reference(number, optimizer, device):
    features, fan_in, group_size = GROUPS[number]
    # With zero weights the hinge's slopes are +-2, so the backends differ only in the order of sums.
    options = {"weight_dtype": torch.bfloat16, "loss": "squared_hinge"}
    heads = [
        make_head(device, features, fan_in, group_size, optimizer, backend=name, **options)
        for name in ("triton", "reference")
    ]
    for head in heads:
        head.weight.zero_()
        head(*batch(device, features, 200))
    for name, expected in heads[1].named_buffers():
        if expected.dtype == torch.bfloat16:
            assert (dict(heads[0].named_buffers())[name] == expected).float().mean() > 0.99, name


@pytest.mark.parametrize("features, fan_in, group_size", [GROUPS[1], GROUPS[2]])
def test_micro_batches_and_shards_equal_one_batch(features, fan_in, group_size, device):
    def make(**more):
        return make_head(device, features, fan_in, group_size, "adamw", text_reduction="mean", **more)

    # Three tiles of texts.
    assert_parts_train_as_one(make, [batch(device, features, 300, seed) for seed in range(2)], grad_rtol=1e-3)


@pytest.mark.parametrize("features, fan_in, group_size", [GROUPS[0], GROUPS[3]])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_feature_never_reaches_a_weight(bad, features, fan_in, group_size, device):
    head = make_head(device, features, fan_in, group_size, "adamw", weight_dtype=torch.bfloat16)
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


@pytest.mark.parametrize("features, fan_in, group_size", [GROUPS[0], GROUPS[3]])
def test_no_texts_no_positives_and_rewired_rows(features, fan_in, group_size, device):
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
