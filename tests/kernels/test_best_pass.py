"""The CUDA kernel that finds every block's largest logit where few labels share an index row: against float64, and rankings against Triton's.

Natively under `gpu`. On a CPU the same source is compiled by the C++ compiler, with cuda_on_cpu in the place of CUDA.
"""

import pytest
import torch

triton = pytest.importorskip("triton")

from tests.kernels.cuda_helpers import DEVICES, LABELS, batch, dense_of, make_head, use  # noqa: E402
from xmc_trainer.kernels import best_pass, topk, triton_head  # noqa: E402

# (features, fan_in, group_size): slots are read two, one and four together, rows by some lanes or by all and more; what registers
# hold of X, and what not.
HEADS = [(48, 18, 1), (200, 33, 3), (640, 64, 1), (768, 128, 1), (700, 100, 5)]


@pytest.fixture(autouse=True, params=DEVICES)
def device(request, monkeypatch):
    """Where the kernel runs; fails a test in which it was not launched."""
    launched = use(request.param, best_pass, "launch", monkeypatch)
    yield request.param
    assert launched


def labels_on(device):
    return LABELS if device == "cpu" else 128 * 500 + 11  # some tiles for each block


@pytest.mark.parametrize("number, texts, weight_dtype", [
    (0, 37, torch.bfloat16), (1, 300, torch.float32), (2, 128, torch.bfloat16), (3, 130, torch.bfloat16), (4, 5, torch.bfloat16),
])  # fmt: skip
def test_the_largest_logit_of_every_block(number, texts, weight_dtype, device):
    head = make_head(device, *HEADS[number], labels=labels_on(device), weight_dtype=weight_dtype)
    head.bias.normal_()
    feat, _, _ = batch(device, HEADS[number][0], texts)
    rows = triton_head.Batch.of(feat.bfloat16()).rows
    best = torch.full((-(-head.num_labels // topk.BLOCK), rows.shape[0]), torch.nan, device=device)
    best_pass.launch(head.tensors(), rows, 0, head.num_labels, best, None, None)
    weight = dense_of(head)[0].bfloat16().double()
    z = weight @ rows.double().T + head.bias.double()[:, None]
    z = torch.nn.functional.pad(z, (0, 0, 0, -z.shape[0] % topk.BLOCK), value=-torch.inf)
    torch.testing.assert_close(best.double(), z.unflatten(0, (-1, topk.BLOCK)).amax(1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("number, texts", [(0, 130), (1, 37)])
def test_rankings_are_triton_s(number, texts, device, monkeypatch):
    labels = labels_on(device)
    head = make_head(device, *HEADS[number], labels=labels)
    feat, ids, counts = batch(device, HEADS[number][0], texts, labels=labels)
    # What a text has, and what is best for it, in blocks of labels where others have neither.
    row = torch.arange(texts, device=device).repeat_interleave(counts)
    best = head.topk(feat, 3)[1]
    ids = torch.cat([torch.cat([ids[row == text], best[text]]) for text in range(texts)])
    lists = {False: (), True: (ids, counts + 3)}
    found = {skips: head.topk(feat, 7, *some) for skips, some in lists.items()}
    monkeypatch.setattr(triton_head, "_WORKSPACE", 200 * 4 * -(-texts // 32))  # chunks of one block
    found["chunks"] = head.topk(feat, 7, *lists[True])
    monkeypatch.setattr(best_pass, "takes", lambda head, rows: False)
    for skips, (score, label) in found.items():
        expected_score, expected_label = head.topk(feat, 7, *lists[bool(skips)])
        assert torch.equal(label, expected_label) and torch.equal(score, expected_score)
    assert not (found[True][1][:, :, None] == best[:, None]).any()
