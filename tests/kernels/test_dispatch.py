"""The dispatch table: the kernel of each shipped configuration on a faked Hopper GPU, and the reason for every refusal."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="the Triton backend needs triton")
from tests.kernels.cuda_helpers import make_head  # noqa: E402
from xmc_trainer.config import load_config, shipped_configs  # noqa: E402
from xmc_trainer.kernels.cuda import source  # noqa: E402
from xmc_trainer.kernels.dispatch import RANKINGS, STEPS, Problem, choose, describe  # noqa: E402

# These configurations turn mixed precision off. float32 products run in "dense, Triton", for the step and for rankings.
IN_FLOAT32 = {"lfyso", "sidgnd", "wordnet"}


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(source, "can_compile", lambda device: True)


@pytest.mark.parametrize("name", sorted(shipped_configs()))
def test_shipped_configurations_get_the_cuda_kernels(name, hopper):
    config = load_config([f"dataset={name}"])
    model, optimization = config.model, config.training.optimization
    features = (
        model.penultimate.penultimate_size if model.penultimate.use_penultimate_layer else model.encoder.encoder_ftr_dim
    )
    optimizer = {"rowwise_rmsprop": "rowwise"}.get(optimization.xmc_optimizer, optimization.xmc_optimizer)
    head = make_head(
        "cpu",
        features,
        model.ffi.fan_in,
        model.ffi.group_size,
        optimizer,
        weight_dtype=getattr(torch, model.ffi.weight_dtype),
    )
    dtype = torch.bfloat16 if config.training.amp.enabled else torch.float32
    problem = Problem.of(head.tensors(), dtype)
    expected = "dense, Triton" if name in IN_FLOAT32 else "densify, CUDA"
    assert (choose(STEPS, problem).name, choose(RANKINGS, problem).name) == (expected, expected)


@pytest.mark.parametrize("fan_in, group_size, optimizer, step, ranking", [
    (None, 1, "sgd", "dense, Triton", "dense, Triton"), (128, 8, "sgd", "densify, CUDA", "densify, CUDA"),
    (128, 16, "adamw", "densify, CUDA", "densify, CUDA"), (128, 32, "adamw", "group, CUDA", "densify, CUDA"),
    (128, 64, "rowwise", "densify, CUDA", "densify, CUDA"), (128, 64, "adamw_8bit", "densify, CUDA", "densify, CUDA"),
    (100, 64, "sgd", "densify, CUDA", "densify, CUDA"), (256, 64, "sgd", "densify, CUDA", "densify, CUDA"),
])  # fmt: skip
def test_groups_dense_heads_and_what_group_kernels_do_not_take(fan_in, group_size, optimizer, step, ranking, hopper):
    problem = Problem.of(make_head("cpu", 768, fan_in, group_size, optimizer).tensors(), torch.bfloat16)
    assert (choose(STEPS, problem).name, choose(RANKINGS, problem).name) == (step, ranking)


def test_each_condition_is_named():
    problem = Problem(32, 128, bf16=True, plain_states=True, deterministic=False, cuda=True)
    group, densify, dense = STEPS
    for change, reason in [
        ({"cuda": False}, "needs nvcc, ninja and a GPU of capability 9.0"), ({"group_size": None}, "needs an index"),
        ({"group_size": 16}, "needs group_size >= 32"), ({"fan_in": 136}, "needs fan_in <= 128"),
        ({"fan_in": 100}, "needs a fan_in that is a multiple of 8"), ({"bf16": False, "fan_in": 64}, "needs bfloat16 or float16 features"),
        ({"deterministic": True}, "is not deterministic"),
        ({"plain_states": False}, "needs an optimizer whose states are like the weights"),
    ]:  # fmt: skip
        assert group.refuses(problem._replace(**change)) == reason
    assert group.refuses(problem) is None
    assert choose(STEPS, problem._replace(cuda=False)) == choose(STEPS, problem._replace(bf16=False)) == dense
    assert (
        describe(STEPS, problem._replace(group_size=1))
        == "densify, CUDA, 64 labels x 128 texts (group, CUDA: needs group_size >= 32)"
    )


def test_a_head_says_which_kernels_it_gets(hopper):
    said = make_head("cpu", 768, 128, 1).describe_kernels()
    assert said.startswith("head: densify, CUDA, 64 labels x 128 texts (") and "; best labels: densify, CUDA" in said
    assert (
        make_head("cpu", 768, 128, 1, backend="reference").describe_kernels() == "head: reference, tiles of 4096 labels"
    )
