"""The Triton backend against float64 oracles, plain torch and itself. It runs on a GPU under the mark `gpu`, else in the interpreter."""

from __future__ import annotations

import pytest
import torch

from tests.head_helpers import OracleHead, assert_parts_train_as_one, dense_of, ragged_batch, target_matrix
from xmc_trainer.head import SGD, AdamW, FixedFanInHead, RewireRule, RowwiseRMSprop
from xmc_trainer.head.losses import bce
from xmc_trainer.kernels.dispatch import select_backend
from xmc_trainer.kernels.interface import HeadTensors, Update

pytestmark = pytest.mark.slow

pytest.importorskip("triton", reason="the Triton backend needs triton")

DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is off on a GPU")),
    pytest.param("cuda", marks=pytest.mark.gpu),
]


def on_gpu(*row):
    """A row of parameters that the interpreter, which is slow, leaves to a GPU."""
    return pytest.param(*row, marks=pytest.mark.gpu)


OPTIMIZERS = {
    "sgd": SGD(),
    "momentum": SGD(momentum=0.9),
    "adamw": AdamW(eps=1e-4),  # larger than the noise of a gradient of zero
    "rowwise_rmsprop": RowwiseRMSprop(eps=1e-4),
}
WITH_BYTES = OPTIMIZERS | {"adamw_8bit": AdamW(eps=1e-4, eight_bits=True)}
FEATURES, LABELS = 48, 131  # two tiles of 64 labels or one of 128, and a short one


def make_head(device, optimizer="sgd", features=FEATURES, labels=LABELS, **options):
    options = {"fan_in": 12, "lr": 0.03, "weight_decay": 0.02, "seed": 5, "backend": "triton"} | options
    return FixedFanInHead(features, labels, optimizer=WITH_BYTES[optimizer], device=device, **options)


def batches(count, device, texts=37, features=FEATURES, labels=LABELS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        feat = torch.randn(texts, features, generator=generator)
        yield feat.to(device), *(x.to(device) for x in ragged_batch(texts, labels, generator))


def error(got, exact):
    return ((got.double().cpu() - exact).norm() / exact.norm()).item()


# Dense, an index of all features, sparse with and without groups, whole and short last groups and tiles.
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("fan_in, group_size, loss, optimizer", [
    *((None, 1, "bce", optimizer) for optimizer in ("momentum", "rowwise_rmsprop")),
    *(on_gpu(None, 1, "bce", optimizer) for optimizer in ("sgd", "adamw")),
    *((12, 1, "bce", optimizer) for optimizer in ("sgd", "adamw")),
    *(on_gpu(12, 1, "bce", optimizer) for optimizer in ("momentum", "rowwise_rmsprop")),
    (48, 1, "bce", "adamw"), (12, 4, "squared_hinge", "sgd"), (7, 16, "bce", "momentum"), (12, 40, "bce", "rowwise_rmsprop"),
    on_gpu(12, 64, "squared_hinge", "sgd"), (20, 500, "bce", "adamw"),
])  # fmt: skip
def test_training_follows_a_masked_dense_layer(fan_in, group_size, loss, optimizer, device):
    head = make_head(device, optimizer, fan_in=fan_in, group_size=group_size, loss=loss, text_reduction="mean")
    oracle = OracleHead(make_head("cpu", optimizer, fan_in=fan_in, group_size=group_size, loss=loss,
                                  text_reduction="mean", backend="reference"), optimizer, lr=0.03, weight_decay=0.02)  # fmt: skip
    for feat, ids, counts in batches(2, device):  # the second step reads the state of the first
        feat.requires_grad_()
        out = head(feat, ids, counts)
        out.backward()
        expected, expected_grad = oracle.step(feat.cpu(), ids.cpu(), counts.cpu())
        assert out.item() == pytest.approx(expected.item(), rel=1e-5)
        torch.testing.assert_close(feat.grad.double().cpu(), expected_grad, rtol=1e-4, atol=5e-6)
    dense, mask = dense_of(head)
    torch.testing.assert_close(dense, oracle.weight.detach() * mask, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(head.bias.double().cpu(), oracle.bias.detach(), rtol=1e-4, atol=2e-5)


def eager_twin(head, feat, ids, counts):
    """Compute the feature gradient and the dense weight gradient with plain torch in bfloat16."""
    dense = dense_of(head)[0].to(torch.bfloat16)
    x = feat.cpu().to(torch.bfloat16)
    z = x @ dense.T + head.bias.cpu().to(torch.bfloat16)
    y = target_matrix(ids.cpu(), counts.cpu(), head.num_labels).to(torch.bfloat16)
    slope = torch.sigmoid(z) - y
    return slope @ dense, slope.T @ x


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scale", [0.1, 1.0, 60.0])
@pytest.mark.parametrize("fan_in, group_size", [(None, 1), (12, 1), (12, 40)])
def test_bfloat16_products_err_no_more_than_eager_ones(fan_in, group_size, scale, device):
    # Scale 60 saturates most logits, on both sides.
    head = make_head(
        device, fan_in=fan_in, group_size=group_size, product_dtype=torch.bfloat16, lr=1.0, weight_decay=0.0
    )
    head.weight.copy_((head.weight * scale).bfloat16())
    before, mask = dense_of(head)
    feat, ids, counts = next(batches(1, device))
    feat = feat.bfloat16().float().requires_grad_()
    twin_dx, twin_dw = eager_twin(head, feat.detach(), ids, counts)
    x, y = feat.detach().double().cpu(), target_matrix(ids.cpu(), counts.cpu(), LABELS)
    slope = torch.sigmoid(x @ before.T + head.bias.double().cpu()) - y
    head(feat, ids, counts).backward()
    # The dense kernel's weight gradient rounds the same numbers as plain torch, so either may be better; 1.02 allows for that.
    assert error(feat.grad, slope @ before) <= 1.02 * error(twin_dx, slope @ before)
    dw = (slope.T @ x) * mask
    assert error((before - dense_of(head)[0]), dw) <= 1.02 * error(twin_dw * mask, dw)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("fan_in, group_size, optimizer, weight_dtype", [
    *((12, 1, optimizer, torch.bfloat16) for optimizer in ("momentum", "adamw_8bit")),
    *(on_gpu(12, 1, optimizer, torch.bfloat16) for optimizer in ("sgd", "adamw", "rowwise_rmsprop")),
    on_gpu(12, 1, "adamw_8bit", torch.float32), (None, 1, "adamw", torch.bfloat16),
    on_gpu(None, 1, "adamw_8bit", torch.bfloat16), (12, 40, "adamw_8bit", torch.bfloat16),
])  # fmt: skip
def test_stochastic_rounding_equals_the_reference(fan_in, group_size, optimizer, weight_dtype, device):
    options = {"fan_in": fan_in, "group_size": group_size, "weight_dtype": weight_dtype}
    heads = [make_head(where, optimizer, backend=name, **options) for where, name in
             [(device, "triton"), ("cpu", "reference")]]  # fmt: skip
    for feat, ids, counts in batches(2, "cpu"):
        for head in heads:
            head(feat.to(head.weight.device), ids.to(head.weight.device), counts.to(head.weight.device))
    for name, tensor in heads[1].named_buffers():
        if tensor.dtype in (torch.bfloat16, torch.uint8):
            # Float32 sums differ in their last digits, so a few stochastic roundings differ.
            same = getattr(heads[0], name).cpu() == tensor
            assert same.float().mean() > 0.99, name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("optimizer, group_size", [("rowwise_rmsprop", 1), ("adamw", 40)])
def test_micro_batches_and_shards_equal_one_batch(group_size, optimizer, device):
    def make(**more):
        return make_head(device, optimizer, group_size=group_size, text_reduction="mean", **more)

    assert_parts_train_as_one(make, batches(2, device, texts=150), grad_rtol=1e-4)  # two tiles of texts


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bad, group_size", [(float("nan"), 1), (float("inf"), 40)])
def test_a_non_finite_feature_never_reaches_a_weight(bad, group_size, device):
    head = make_head(device, "adamw", group_size=group_size, weight_dtype=torch.bfloat16)
    (feat, ids, counts), good = batches(2, device)
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


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("texts, fan_in, group_size", [(150, None, 1), (37, 12, 1), (37, 12, 40)])
def test_deterministic_mode_repeats_bit_for_bit(texts, fan_in, group_size, device):
    results = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            head = make_head(device, "momentum", fan_in=fan_in, group_size=group_size, product_dtype=torch.bfloat16)
            for feat, ids, counts in batches(2, device, texts=texts):
                feat.requires_grad_()
                loss = head(feat, ids, counts)
                loss.backward()
            results.append((loss.detach(), feat.grad, head.weight))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("device", DEVICES)
def test_no_texts_and_no_positives(device):
    for group_size in (1, 40):
        head = make_head(device, group_size=group_size)
        none = torch.empty(0, dtype=torch.int64, device=device)
        assert head(torch.empty(0, FEATURES, device=device), none, none).item() == 0
        feat = torch.randn(2, FEATURES, device=device)
        assert head(feat, none, torch.zeros(2, dtype=torch.int64, device=device)).item() > 0
        assert head.topk(torch.empty(0, FEATURES, device=device), 3)[1].shape == (0, 3)


@pytest.mark.parametrize("device", DEVICES)
def test_rewiring_shows_in_the_next_step_and_ranking(device):
    head, twin = make_head(device), make_head("cpu", backend="reference")
    for feat, ids, counts in batches(2, "cpu"):
        losses = [
            h(feat.to(h.weight.device), ids.to(h.weight.device), counts.to(h.weight.device)) for h in (head, twin)
        ]
        assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
        rankings = [h.topk(feat.to(h.weight.device), 5)[1].cpu() for h in (head, twin)]
        assert torch.equal(*rankings)
        for h in (head, twin):
            h.rewire(RewireRule("fraction", 0.3, "random"))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "fan_in, group_size, texts, features, bias",
    [
        (None, 1, 1, 200, True), on_gpu(None, 1, 130, 33, False), on_gpu(20, 1, 1, 200, True),
        (20, 1, 130, 33, False), (20, 4, 1, 200, True), on_gpu(20, 4, 130, 33, False),
        # More features than a program takes at a time: 1024 weights of a label, 256 slots of an index row.
        (None, 1, 3, 1100, True), (20, 1, 3, 300, True), (20, 4, 3, 300, True),
    ],
)  # fmt: skip
def test_the_dense_way_takes_any_shape(fan_in, group_size, texts, features, bias, device):
    labels = 131
    results = []
    for where, name in [(device, "triton"), ("cpu", "reference")]:
        whole = make_head(
            where, "momentum", features=features, labels=labels, fan_in=fan_in, group_size=group_size, backend=name
        )
        head = whole.tensors()
        if not bias:
            head.bias_L, head.bias_state = None, []
        feat, ids, counts = next(batches(1, "cpu", texts=max(texts, 3), features=features, labels=labels))
        row = torch.repeat_interleave(torch.arange(len(counts)), counts)
        feat, ids, row = feat[:texts].to(where), ids[row < texts].to(where), row[row < texts].to(where)
        kept = head.weight_LF.clone()
        outputs = [
            whole._backend.head_step(
                head, feat, ids, row, loss_fn=bce, text_weight=0.5, grad_start=0, tile_labels=64,
                update=Update(SGD(momentum=0.9), 0.1, 0.01, 7, 1) if updates else None,
            )
            for updates in (False, True)
        ]  # fmt: skip
        results.append([x.cpu() for loss, grad, _ in outputs for x in (loss, grad)] + [(head.weight_LF - kept).cpu()])
    for got, expected in zip(*results):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_backends_that_cannot_run_are_refused(monkeypatch):
    select_backend.cache_clear()
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="backend='triton': needs a CUDA device"):
        select_backend("triton", torch.device("cpu"))
    with pytest.raises(ValueError, match="choose auto, triton, reference, torch_sparse"):
        select_backend("cuda", torch.device("cpu"))
    assert select_backend("auto", torch.device("cpu")).__name__.endswith("reference")
    select_backend.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("group_size", [1, 64])
def test_offsets_beyond_2_to_the_31(group_size):
    labels, fan_in, d, tail = 17_000_000, 128, 256, 64 * 5
    assert labels * fan_in > 2**31
    rows = -(-labels // group_size)
    weight = torch.empty(labels, fan_in, dtype=torch.bfloat16, device="cuda").uniform_(-0.1, 0.1)
    index = torch.arange(0, d, 2, dtype=torch.int16, device="cuda").expand(rows, fan_in).contiguous()
    start = labels - labels % 64 - tail
    before = weight[start:].double()
    last = HeadTensors(weight[start:].clone(), index[start // group_size :].clone(), None, group_size, start)
    gpu = select_backend("triton", torch.device("cuda"))
    head = HeadTensors(weight, index, None, group_size, 0, of_index=lambda make, argument: make(index, argument))
    feat = torch.randn(32, d, device="cuda").bfloat16()
    label = torch.tensor([labels - 1, start + 3, 5], device="cuda")
    row = torch.tensor([0, 1, 2], device="cuda")
    options = dict(loss_fn=bce, text_weight=1.0, grad_start=0, update=Update(SGD(), 0.1, 0.0, 7, 1), tile_labels=4096)
    gpu.head_step(head, feat, label, row, **options)
    select_backend("reference", torch.device("cuda")).head_step(last, feat, label - start, row, **options)
    update = last.weight_LF.double() - before
    assert (weight[start:].double() - before - update).norm() < 0.02 * update.norm()


@pytest.mark.gpu
def test_wide_features_and_a_large_batch():
    for fan_in, group_size, d in [(100, 32, 4096), (100, 3, 4096), (1000, 1, 1021)]:
        heads = [
            make_head("cuda", "momentum", features=d, labels=1009, fan_in=fan_in, group_size=group_size, backend=name)
            for name in ("triton", "reference")
        ]
        for feat, ids, counts in batches(2, "cuda", texts=301, features=d, labels=1009):
            grads = []
            for head in heads:
                x = feat.clone().requires_grad_()
                head(x, ids, counts).backward()
                grads.append(x.grad)
            torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(heads[0].weight, heads[1].weight, rtol=1e-3, atol=1e-4)
