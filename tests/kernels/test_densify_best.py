"""logits.cu as the kernel of rankings: each block's largest logit, and the rankings made from them, against float64.

It runs on a GPU under the mark `gpu`, else on the CPU emulator (cuda_on_cpu).
"""

import dataclasses

import pytest
import torch

pytestmark = pytest.mark.slow

triton = pytest.importorskip("triton")

from tests.kernels.cuda_helpers import DEVICES, LABELS, batch, dense_of, make_head, use  # noqa: E402
from xmc_trainer.kernels.arguments import Batch  # noqa: E402
from xmc_trainer.kernels.cuda import densify  # noqa: E402
from xmc_trainer.kernels.triton import topk  # noqa: E402

# (features, fan_in, group_size): slots are read one, two and four at a time; a row has fewer chunks than a warp has lanes, or more; X fits
# in registers, or does not.
HEADS = [(48, 18, 1), (200, 33, 3), (640, 64, 1), (768, 128, 1), (700, 100, 5), (1600, 40, 1)]


@pytest.fixture(autouse=True, params=DEVICES)
def device(request, monkeypatch):
    """The device that the kernel runs on. A test fails if it did not launch the kernel."""
    launched = use(request.param, densify, "find_best", monkeypatch)
    yield request.param
    assert launched


def labels_on(device):
    return LABELS if device == "cpu" else 128 * 500 + 11  # several tiles for each thread block


@pytest.mark.parametrize("number, texts, weight_dtype", [
    (0, 37, torch.bfloat16), (1, 300, torch.float32), (2, 128, torch.bfloat16), (3, 130, torch.bfloat16), (4, 5, torch.bfloat16),
    (5, 37, torch.bfloat16),
])  # fmt: skip
def test_the_largest_logit_of_every_block(number, texts, weight_dtype, device):
    head = make_head(device, *HEADS[number], labels=labels_on(device), weight_dtype=weight_dtype)
    head.bias.normal_()
    tensors = head.tensors()
    feat, _, _ = batch(device, HEADS[number][0], texts)
    sample = Batch.of(feat.bfloat16(), densify.TEXTS)
    labels, columns = head.num_labels, sample.columns
    z = dense_of(head)[0].bfloat16().double() @ sample.rows.double().T + head.bias.double()[:, None]
    none = torch.empty(0, dtype=torch.int64, device=device)

    def assert_best(tensors, z, label_P=none, row_P=none):
        best = torch.full((-(-labels // topk.BLOCK), columns), torch.nan, device=device)
        densify.find_best(tensors, sample, best, label_P, row_P)
        z = torch.nn.functional.pad(z, (0, 0, 0, -labels % topk.BLOCK), value=-torch.inf)
        torch.testing.assert_close(best.double(), z.unflatten(0, (-1, topk.BLOCK)).amax(1), rtol=1e-5, atol=1e-5)

    assert_best(tensors, z)
    if number == 4:
        assert_best(dataclasses.replace(tensors, bias_L=None), z - head.bias.double()[:, None])
    # Leave out the best label of one block for each text; some pairs repeat. The other blocks leave nothing out.
    first = topk.BLOCK
    best, text = z[first : 2 * first, :texts].argmax(0) + first, torch.arange(texts, device=device)
    z[best, text] = -torch.inf
    assert_best(tensors, z, torch.cat([best, best[:3]]), torch.cat([text, text[:3]]))


@pytest.mark.parametrize("chunks", [False, True])
def test_rankings_leave_out_what_texts_have(chunks, device, monkeypatch):
    texts, labels, number = (37, LABELS, 1) if device == "cpu" else (130, 128 * 500 + 11, 3)
    head = make_head(device, *HEADS[number], "adamw_8bit", labels=labels)  # a ranking must accept any optimizer
    feat, ids, counts = batch(device, HEADS[number][0], texts, labels=labels)
    z = feat.double() @ dense_of(head)[0].bfloat16().double().T + head.bias.double()
    # Each text leaves out its own labels and its three best ones. Other texts leave out none in those blocks.
    row = torch.arange(texts, device=device).repeat_interleave(counts)
    best = z.topk(3).indices
    ids = torch.cat([torch.cat([ids[row == text], best[text]]) for text in range(texts)])
    z[torch.arange(texts, device=device).repeat_interleave(counts + 3), ids] = -torch.inf
    # Without spare blocks, a wrong block changes the result.
    monkeypatch.setattr(topk, "SPARE", 0)
    if chunks:
        monkeypatch.setattr(densify, "WORKSPACE", 1)  # one block in each chunk
    score, label = head.topk(feat, 2, ids, counts + 3)
    torch.testing.assert_close(score.double(), z.topk(2).values, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(z.gather(1, label), score.double(), rtol=1e-5, atol=1e-5)
    assert (label.sort().values.diff() > 0).all()
