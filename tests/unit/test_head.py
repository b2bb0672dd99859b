"""The head against dense float64 oracles: loss, gradients, optimizers, accumulation, sharding, top-k."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch

from tests.head_helpers import OneOf, OracleHead, dense_of, ragged_batch
from xmc_trainer.head import SGD, AdamW, FixedFanInHead, RewireRule, RowwiseRMSprop
from xmc_trainer.head.layer import label_range
from xmc_trainer.kernels.dispatch import select_backend
from xmc_trainer.kernels.interface import unpack_candidates

LABELS, FEATURES, TEXTS = 211, 48, 37
OPTIMIZERS = {
    "sgd": SGD(),
    "momentum": SGD(momentum=0.9),
    "adamw": AdamW(eps=1e-4),  # above the rounding noise of a zero gradient
    "rowwise_rmsprop": RowwiseRMSprop(eps=1e-4),
}
WITH_BYTES = OPTIMIZERS | {"adamw_8bit": AdamW(eps=1e-4, eight_bits=True)}
BACKEND = "reference"
SHAPES = [(None, 1), (1, 1), (12, 1), (12, 4), (12, 64), (48, 1)]


@pytest.fixture(params=["reference", "torch_sparse"], autouse=True)
def backend(request, monkeypatch):
    """Run each test on the reference backend, and on torch_sparse if PyG's package is installed."""
    if request.param == "torch_sparse":
        pytest.importorskip("torch_sparse", reason="the torch_sparse backend needs PyG's torch_sparse")
    monkeypatch.setattr(f"{__name__}.BACKEND", request.param)


def make_head(optimizer="sgd", **options):
    options = (
        {"backend": BACKEND} | {"fan_in": 12, "lr": 0.03, "weight_decay": 0.02, "tile_labels": 50, "seed": 5} | options
    )
    return FixedFanInHead(FEATURES, LABELS, optimizer=WITH_BYTES[optimizer], **options)


def batches(count, texts=TEXTS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        yield torch.randn(texts, FEATURES, generator=generator), *ragged_batch(texts, LABELS, generator)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("loss", ["bce", "squared_hinge"])
@pytest.mark.parametrize("fan_in, group_size", SHAPES)
def test_training_follows_a_masked_dense_layer(fan_in, group_size, loss, optimizer):
    head = make_head(optimizer, fan_in=fan_in, group_size=group_size, loss=loss, text_reduction="mean")
    oracle = OracleHead(head, optimizer, lr=0.03, weight_decay=0.02)
    for feat, ids, counts in batches(5):
        feat.requires_grad_()
        out = head(feat, ids, counts)
        out.backward()
        expected, expected_grad = oracle.step(feat, ids, counts)
        assert out.item() == pytest.approx(expected.item(), rel=1e-5)
        torch.testing.assert_close(feat.grad.double(), expected_grad, rtol=1e-4, atol=1e-6)
    dense, mask = dense_of(head)
    torch.testing.assert_close(dense, oracle.weight.detach() * mask, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(head.bias.double(), oracle.bias.detach(), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_micro_batches_equal_one_batch(optimizer, reduction):
    whole, parts = (make_head(optimizer, text_reduction=reduction) for _ in range(2))
    for feat, ids, counts in batches(4):
        a, b = feat.clone().requires_grad_(), feat.clone().requires_grad_()
        whole_loss = whole(a, ids, counts)
        whole_loss.backward()
        cuts, parts_loss = [0, 5, 5, 20, TEXTS], 0.0  # uneven, one of them empty
        for number, (start, stop) in enumerate(zip(cuts, cuts[1:])):
            first, last = int(counts[:start].sum()), int(counts[:stop].sum())
            loss = parts(
                b[start:stop],
                ids[first:last],
                counts[start:stop],
                end_of_step=number == 3,
                texts_in_step=TEXTS,
                engine_divisor=4.0,
            )
            (loss / 4).backward()  # like an engine that averages over micro-batches
            parts_loss += loss.item()
        assert parts_loss == pytest.approx(whole_loss.item(), rel=1e-5)
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-5, atol=1e-6)
    assert parts.steps == whole.steps == 4
    torch.testing.assert_close(parts.weight, whole.weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(parts.bias, whole.bias, rtol=1e-5, atol=1e-6)


def test_labels_are_ranked_by_shifted_logits_and_trained_by_their_own():
    shift = torch.linspace(-3, 3, LABELS)
    plain, shifted = make_head(), make_head(logit_shift=shift)
    shards = [make_head(logit_shift=shift, ranks=OneOf(rank, 3)) for rank in range(3)]
    for feat, ids, counts in batches(3):
        for head in (plain, shifted, *shards):
            head(feat, ids, counts)
    assert torch.equal(plain.weight, shifted.weight) and torch.equal(plain.bias, shifted.bias)
    feat = next(batches(1, seed=9))[0]
    logits = feat.double() @ dense_of(plain)[0].T + plain.bias.double()
    expected = (logits - shift.double()).topk(5)
    for name, head in {"ranked": shifted, "saved": plain}.items():
        if name == "saved":
            plain.bias.copy_(shifted.ranking_bias)
        score, label = head.topk(feat, 5)
        assert torch.equal(label, expected.indices), name
        torch.testing.assert_close(score.double(), expected.values, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.cat([shard.ranking_bias for shard in shards]), shifted.ranking_bias)
    assert not torch.equal(logits.topk(5).indices, expected.indices)
    with pytest.raises(ValueError, match="needs a bias"):
        make_head(logit_shift=shift, bias=False)


def test_zero_weights_start_at_zero_and_train():
    head = make_head(zero_weights=True)
    assert not head.weight.any() and torch.equal(head.index, make_head().index)
    head(*next(batches(1)))
    assert head.weight.any()


def test_mean_over_micro_batches_needs_the_number_of_texts():
    feat, ids, counts = next(batches(1))
    with pytest.raises(ValueError, match="texts_in_step"):
        make_head(text_reduction="mean")(feat, ids, counts, end_of_step=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("optimizer", WITH_BYTES)
@pytest.mark.parametrize("group_size", [1, 8])
def test_shards_and_tiles_train_as_the_whole(group_size, optimizer, dtype):
    options = {"weight_dtype": dtype, "group_size": group_size}
    whole = make_head(optimizer, tile_labels=1000, **options)
    shards = [make_head(optimizer, tile_labels=17, ranks=OneOf(r, 3), **options) for r in range(3)]
    for feat, ids, counts in batches(3):
        loss = whole(feat, ids, counts).item()
        assert sum(shard(feat, ids, counts).item() for shard in shards) == pytest.approx(loss, rel=1e-5)
    # Differences in float32's last digit may change the rounding to bfloat16, so a few elements may differ.
    for name in ("weight", "bias", "index"):
        joined = torch.cat([getattr(shard, name) for shard in shards])
        if name == "index":
            assert torch.equal(joined, whole.index)
        else:
            close = torch.isclose(joined.float(), getattr(whole, name).float(), rtol=1e-4, atol=1e-6)
            assert close.double().mean() >= (0.98 if dtype == torch.bfloat16 else 1.0)


def test_labels_are_sharded_by_whole_groups():
    for labels, group, size in [(211, 1, 3), (211, 32, 3), (64, 32, 2), (7, 1, 7)]:
        ranges = [label_range(labels, group, rank, size) for rank in range(size)]
        assert [label for part in ranges for label in part] == list(range(labels))
        assert all(part.start % group == 0 and len(part) > 0 for part in ranges)
        assert max(map(len, ranges)) - min(map(len, ranges)) <= 2 * group
    with pytest.raises(ValueError, match="fewer processes"):
        label_range(64, 32, 0, 3)


def test_stochastic_rounding_follows_float32_where_rounding_to_nearest_stalls():
    # Updates are 1/40 of bfloat16's spacing: rounding to nearest would drop all of them.
    head = FixedFanInHead(4, 4000, fan_in=2, bias=False, optimizer=SGD(), lr=1.0, weight_dtype=torch.bfloat16, seed=1)
    head.weight.fill_(1.0)
    feat, none = torch.zeros(1, 4), torch.zeros(1, dtype=torch.int64)
    head.weight_decay = 2**-7 / 40
    for _ in range(40):
        head(feat, none[:0], none)
    assert head.weight.float().mean().item() == pytest.approx((1 - 2**-7 / 40) ** 40, abs=2e-4)
    assert (head.weight != 1).any() and head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_non_finite_feature_never_reaches_a_weight(bad, dtype):
    head = make_head("adamw", weight_dtype=dtype)
    (feat, ids, counts), good = batches(2)
    head(*good)
    before = {name: tensor.clone() for name, tensor in head.named_buffers()}
    feat[3, 5] = bad
    feat.requires_grad_()
    head(feat, ids, counts).backward()
    assert not torch.isfinite(feat.grad).all()  # so that a loss scaler notices the overflow
    assert head.skipped.item() == 1
    for name, tensor in head.named_buffers():
        assert name == "skipped" or torch.equal(tensor, before[name]), name
    head(*good)
    assert torch.isfinite(head.weight).all() and not torch.equal(head.weight, before["weight"])
    assert head.skipped.item() == 1


def test_evaluation_mode_and_no_grad_leave_the_weights_alone():
    head = make_head()
    before = head.weight.clone()
    feat, ids, counts = next(batches(1))
    training = head(feat, ids, counts).item()
    assert not torch.equal(head.weight, before)
    other = make_head().eval()
    assert other(feat, ids, counts).item() == pytest.approx(training)
    with torch.no_grad():
        other.train()(feat, ids, counts)
    assert torch.equal(other.weight, before) and other.steps == 0


def test_gradient_keeps_the_dtype_and_the_loss_scale_stays_out_of_the_head():
    feat, ids, counts = next(batches(1))
    scaled, plain = make_head(), make_head()
    half = feat.half().requires_grad_()
    (scaled(half, ids, counts) * 256).backward()
    full = feat.half().float().requires_grad_()
    plain(full, ids, counts).backward()
    assert half.grad.dtype == torch.float16
    torch.testing.assert_close(half.grad.float() / 256, full.grad, rtol=2e-3, atol=1e-3)
    assert torch.equal(scaled.weight, plain.weight)


@pytest.mark.parametrize("fan_in, group_size", SHAPES)
@pytest.mark.parametrize("shards", [1, 3])
def test_topk_sorts_by_score_then_label(shards, fan_in, group_size):
    whole = make_head(fan_in=fan_in, group_size=group_size)
    # With few distinct scores, most of the ranking depends on ties.
    whole.weight.copy_((whole.weight * 3).round())
    generator = torch.Generator().manual_seed(3)
    feat = torch.randint(-1, 2, (TEXTS, FEATURES), generator=generator).float()
    skip_ids, skip_counts = ragged_batch(TEXTS, LABELS, generator, most=40)
    scores = feat.double() @ dense_of(whole)[0].T
    scores[torch.repeat_interleave(torch.arange(TEXTS), skip_counts), skip_ids] = -torch.inf
    expected = [sorted(range(LABELS), key=lambda label: (-row[label], label))[:7] for row in scores.tolist()]

    groups = -(-LABELS // group_size)
    if groups < shards:
        pytest.skip("fewer groups than shards")
    keys = []
    for rank in range(shards):
        part = make_head(fan_in=fan_in, group_size=group_size, ranks=OneOf(rank, shards))
        part.load_labels(range(LABELS), {"weight": whole.weight})
        if shards == 1:
            score, label = part.topk(feat, 7, skip_ids, skip_counts)
            assert label.tolist() == expected
            torch.testing.assert_close(score.double(), scores.gather(1, label))
        local = torch.arange(TEXTS).repeat_interleave(skip_counts)
        keys.append(
            part._backend.head_topk(part.tensors(), feat, 7, skip_ids - part.labels.start, local, tile_labels=23)
        )
    assert unpack_candidates(torch.cat(keys, 1).topk(7).values)[1].tolist() == expected


def test_topk_marks_missing_labels():
    head = FixedFanInHead(8, 3, fan_in=4)
    score, label = head.topk(torch.randn(2, 8), 5, torch.tensor([1]), torch.tensor([0, 1]))
    assert sorted(label[0].tolist()[:3]) == [0, 1, 2] and label[0].tolist()[3:] == [-1, -1]
    assert sorted(label[1].tolist()[:2]) == [0, 2] and label[1].tolist()[2:] == [-1, -1, -1]
    assert (score[label == -1] == -torch.inf).all() and torch.isfinite(score[label >= 0]).all()


def test_impossible_shapes_are_refused():
    for options, match in [({"fan_in": 49}, "fan_in"), ({"weight_dtype": torch.float16}, "weight_dtype")]:
        with pytest.raises(ValueError, match=match):
            make_head(**options)
    with pytest.raises(ValueError, match="text_reduction"):
        make_head(text_reduction="max")
    with pytest.raises(ValueError, match="loss='hinge': must be one of bce, squared_hinge"):
        make_head(loss="hinge")


def test_another_package_named_torch_sparse_is_refused(tmp_path, monkeypatch):
    def refuse(match):
        select_backend.cache_clear()
        monkeypatch.delitem(sys.modules, "torch_sparse", raising=False)
        monkeypatch.delitem(sys.modules, "xmc_trainer.kernels.torch_sparse_head", raising=False)
        monkeypatch.delattr("xmc_trainer.kernels.torch_sparse_head", raising=False)
        with pytest.raises(ValueError, match=match):
            select_backend("torch_sparse", torch.device("cpu"))
        select_backend.cache_clear()

    package = tmp_path / "torch_sparse"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    refuse("not PyG's but another package of that name, such as Spartex's kernels")
    (package / "tensor.py").write_text("")
    (package / "__init__.py").write_text("raise OSError('undefined symbol: _ZN3c10')")
    refuse("does not load with this torch .undefined symbol: _ZN3c10.; rebuild it")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refuse("PyG's torch_sparse is not installed; pip install")


def test_the_index_is_int16_for_few_features():
    assert FixedFanInHead(32768, 3, fan_in=4).index.dtype == torch.int16
    wide = FixedFanInHead(40000, 300, fan_in=4)
    assert wide.index.dtype == torch.int32 and wide.index.max() > 32768 and wide.index.min() >= 0
    narrow = FixedFanInHead(32768, 300, fan_in=4)
    assert 0 <= narrow.index.min() and narrow.index.max() <= 32767


@pytest.mark.gpu
@pytest.mark.parametrize("fan_in, group_size", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_gives_the_results_of_a_cpu(fan_in, group_size, dtype):
    heads = [
        make_head("adamw", fan_in=fan_in, group_size=group_size, weight_dtype=dtype, device=device)
        for device in ("cpu", "cuda")
    ]
    cpu, gpu = heads
    assert torch.equal(cpu.weight, gpu.weight.cpu())
    for feat, ids, counts in batches(4):
        grads = []
        for head in heads:
            x = feat.detach().to(head.weight.device).requires_grad_()
            head(x, ids.to(x.device), counts.to(x.device)).backward()
            grads.append(x.grad.cpu())
        torch.testing.assert_close(grads[1], grads[0], rtol=2e-2 if dtype == torch.bfloat16 else 1e-3, atol=1e-4)
        if fan_in is not None:
            reports = [head.rewire(RewireRule("fraction", 0.1)) for head in heads]
            assert reports[0] == reports[1]
    if dtype == torch.float32 and fan_in is not None:
        assert torch.equal(cpu.index, gpu.index.cpu())
    cpu.load_labels(range(LABELS), {name: getattr(gpu, name).cpu() for name in ("weight", "bias")})
    if fan_in is not None:
        cpu.load_labels(range(LABELS), {"index": gpu.index.cpu()})
    (score, label), (gpu_score, gpu_label) = (head.topk(feat.to(head.weight.device), 5) for head in heads)
    torch.testing.assert_close(gpu_score.cpu(), score, rtol=1e-3, atol=1e-4)
    assert (gpu_label.cpu() == label).float().mean() > 0.98


@pytest.mark.parametrize(
    "features, ids, counts, message",
    [
        ((2, 5), [0, 1], [1, 1], r"features of shape \[2, 5\]: the head reads \[texts, 6\]"),
        ((2, 6), [0, 9], [1, 1], "label_ids from 0 to 9: the head has labels 0 to 8"),
        ((2, 6), [-1, 3], [1, 1], "label_ids from -1 to 3"),
        ((2, 6), [0, 1, 2], [1, 1], "label_counts add up to 2, but there are 3 label_ids"),
        ((2, 6), [0], [1], r"label_counts of shape \[1\]: needs one number for each of the 2 texts"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused(features, ids, counts, message):
    head = FixedFanInHead(6, 9, fan_in=3)
    with pytest.raises(ValueError, match=message):
        head(torch.zeros(features), torch.tensor(ids), torch.tensor(counts))
    assert head.steps == 0
