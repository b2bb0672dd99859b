"""Every engine and ZeRO stage, launched with several processes, trains as one process does (in low precision approximately).

With each launcher, a rank that dies ends the job within a minute, and its own error comes first (see `train_in_turn`). A rank
killed under deepspeed: test_resume. accelerate and torchrun share one agent that watches the processes; deepspeed has its own.
"""

from __future__ import annotations

import shutil
import signal
import sys

import pytest

from tests.encoders import save_encoder
from tests.integration.test_launchers import (
    FLOAT16,
    assert_ended,
    assert_same,
    losses_of,
    needs_float16,
    outcome,
    outcome_of,
    records_of,
    settings_value,
    train_here,
    train_in_turn,
)
from xmc_trainer.commands import clusters
from xmc_trainer.config import load_config
from xmc_trainer.model import XMCModel

pytestmark = pytest.mark.slow

STAGES = ["0", "1", "2", "3", "2_offload", "3_offload"]
# No process count divides 41 labels; the last step of an epoch has 15 of 18 texts, in three micro-batches.
UNEVEN = ["data.batch_size=6", "training.optimization.grad_accum_step=3", "data.train_sample=105"]
FROM_TEXTS = ["model.ffi.index_init=discriminant", "model.ffi.weight_init=centroid"]
LOW = [("bfloat16", "0"), ("bfloat16", "1"), ("bfloat16", "2_offload"), ("float16", "1"), ("float16", "3_offload")]
# Others: one process below; interrupted, test_resume.


def amp(dtype):
    return ["training.amp.enabled=true", f"training.amp.dtype={dtype}"]


def failing(settings, launcher, how):
    """A training whose last rank fails."""
    return {"settings": [*settings, f"log_fname={launcher}-{how}"], "fails": [how, 5]}


@pytest.fixture(scope="module")
def short(toy_settings_in, tmp_path_factory):
    return [*toy_settings_in(tmp_path_factory.mktemp("engines")), "training.optimization.max_steps=16"]


@pytest.fixture(scope="module")
def one(short):
    """Train in one process without DeepSpeed."""
    found = outcome([*short, *UNEVEN], "here")
    assert [step for step, _ in found["moved"]] == [5, 10]
    return found


@pytest.fixture(scope="module")
def folder(short):
    """Of the runs."""
    return load_config(short).run_folder.parent


@pytest.fixture(scope="module")
def two_under_deepspeed(short, tmp_path_factory):
    """Train with two processes at each stage and precision (the run's name has both), and with a head that starts from texts."""
    cases = [("float32", stage, UNEVEN) for stage in STAGES]
    cases += [(dtype, stage, amp(dtype)) for dtype, stage in LOW if dtype == "bfloat16" or FLOAT16]
    trainings = [
        {"settings": [*short, *more, f"log_fname={dtype}-{stage}"], "deepspeed_config": f"ds_configs/zero{stage}.json"}
        for dtype, stage, more in cases
    ]
    recompute = [*short, *UNEVEN, "model.encoder.gradient_checkpointing=true", "log_fname=recompute"]
    trainings.append({"settings": recompute, "deepspeed_config": "ds_configs/zero3.json"})
    trainings.append(
        {"settings": [*short, *FROM_TEXTS, "log_fname=start-3"], "deepspeed_config": "ds_configs/zero3.json"}
    )
    # Compiled code expects parameters at fixed addresses.
    compiled = {
        "settings": [*short, "model.encoder.use_torch_compile=true"],
        "deepspeed_config": "ds_configs/zero3.json",
    }
    trainings.append(compiled | {"refused": "model.encoder.use_torch_compile=true: does not work under ZeRO stage 3"})
    trainings.append(failing(short, "deepspeed", "raise") | {"deepspeed_config": "ds_configs/zero1.json"})
    train_in_turn("deepspeed", 2, trainings, tmp_path_factory.mktemp("deepspeed"))


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_train_as_one_at_every_stage(two_under_deepspeed, one, folder, stage):
    assert_same(one, outcome_of(folder / f"float32-{stage}", 2))


def test_layers_that_are_computed_again_train_as_before(two_under_deepspeed, one, folder):
    assert_same(one, outcome_of(folder / "recompute", 2))


@pytest.fixture(scope="module")
def plain(short, folder):
    """Return a function of the precision: the losses of one process without DeepSpeed."""
    found = {}

    def losses(dtype):
        if dtype not in found:
            # Without a GPU, only DeepSpeed supports float16.
            train_here([*short, *(amp(dtype) if dtype == "bfloat16" else []), f"log_fname=plain-{dtype}"])
            found[dtype] = losses_of(folder / f"plain-{dtype}")
        return found[dtype]

    return losses


@pytest.mark.parametrize(
    ("dtype", "stage"), [pytest.param(*case, marks=needs_float16 if case[0] == "float16" else ()) for case in LOW]
)
def test_low_precision_trains_about_as_without_deepspeed(two_under_deepspeed, plain, folder, dtype, stage):
    found = losses_of(folder / f"{dtype}-{stage}")
    assert found == pytest.approx(plain(dtype), rel=0.05) and found[-1] < 0.95 * found[0]


def test_one_process_trains_in_bfloat16_under_deepspeed(short, plain, folder, tmp_path):
    stages = ["2", "3_offload"]
    trainings = [
        {
            "settings": [*short, *amp("bfloat16"), f"log_fname=one-{stage}"],
            "deepspeed_config": f"ds_configs/zero{stage}.json",
        }
        for stage in stages
    ]
    # Signal the process and both launchers, which end at once.
    ending = {
        "settings": [*short, "log_fname=signal"],
        "deepspeed_config": "ds_configs/zero2.json",
        "signal": [signal.SIGUSR1, "group", 5],
    }
    assert_ended(train_in_turn("deepspeed", 1, [*trainings, ending], tmp_path), signal.SIGUSR1, 5)
    for stage in stages:
        found = losses_of(folder / f"one-{stage}")
        assert found == pytest.approx(plain("bfloat16"), rel=0.05) and found[-1] < 0.95 * found[0], stage


def test_a_head_starts_from_texts_under_zero_3(two_under_deepspeed, short, folder):
    # The head starts before the engine gets the encoder, but ZeRO 3 partitions weights when they are created.
    train_here([*short, *FROM_TEXTS, "log_fname=start-here"])
    assert_same(outcome_of(folder / "start-here", 1), outcome_of(folder / "start-3", 2))


@pytest.fixture(scope="module")
def groups(short, tmp_path_factory):
    """Return settings with label groups, meta branch, split head and informed starts together, with a cluster file from the command."""
    root = tmp_path_factory.mktemp("groups")
    settings = [*short, *UNEVEN, "model.ffi.group_size=4", f"dataset_path={root}"]
    shutil.copytree(f"{settings_value(short, 'dataset_path=')}/toy", root / "toy")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(sys, "argv", ["clusters", "--clusters", "4", *settings])
        clusters.main()
    settings += ["model.ffi.semantic_groups=true", "model.auxiliary.use_meta_branch=true", "model.ffi.head_ratio=0.2"]
    return [*settings, *FROM_TEXTS, "model.ffi.bias_init=frequency", "model.ffi.growth_mode=gradient",
            "model.ffi.prune_mode=fraction", "model.ffi.rewire_fraction=0.3"]  # fmt: skip


@pytest.fixture(scope="module")
def unused(short, tiny_encoder, tmp_path_factory):
    """Settings of an encoder with weights that get no gradient: Longformer's of global attention. No process may wait for them."""
    encoder = save_encoder(
        "longformer",
        tmp_path_factory.mktemp("longformer"),
        vocab_size=94,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    names = [f"model.encoder.encoder_model={encoder}", f"model.encoder.encoder_tokenizer={tiny_encoder}"]
    return [*short, *UNEVEN, *names, "training.optimization.max_steps=4"]


@pytest.fixture(scope="module")
def moving(short):
    return [*short, *UNEVEN, "training.checkpoint_interval=2", "training.resume=true", "log_fname=three-one"]


@pytest.fixture(scope="module")
def three(short, groups, unused, moving, tmp_path_factory):
    """Train with three processes, by which neither 256, the evaluation's batch size, nor 10 is divisible."""
    zero3 = {"deepspeed_config": "ds_configs/zero3.json"}
    trainings = [
        {"settings": [*short, *UNEVEN, "data.test_batch_size=10", "log_fname=three"]},  # the last batch has one text
        {"settings": [*short, *UNEVEN, "log_fname=three-3"]} | zero3,
        {"settings": [*groups, "log_fname=groups-3"]},
        {"settings": [*unused, "log_fname=unused-3"]},
        {"settings": moving, "cut": 9} | zero3,
        failing([*short, *UNEVEN], "torchrun", "kill"),
    ]
    train_in_turn("torchrun", 3, trainings, tmp_path_factory.mktemp("torchrun"))


@pytest.mark.parametrize("name", ["three", "three-3"])
def test_three_processes_train_as_one(three, one, folder, name):
    assert_same(one, outcome_of(folder / name, 3))


def test_one_process_resumes_what_three_began(three, one, folder, moving):
    train_here(moving)
    assert [record["step"] for record in records_of(folder / "three-one") if record["event"] == "resume"] == [8]
    assert_same(one, outcome_of(folder / "three-one", 1))


def test_weights_without_gradient_do_not_stop_the_others(three, folder, unused):
    train_here([*unused, "log_fname=unused-here"])
    assert losses_of(folder / "unused-3") == pytest.approx(losses_of(folder / "unused-here"), rel=1e-5)


def test_groups_meta_branch_and_split_head_train_as_on_one_process(three, folder, groups):
    train_here([*groups, "log_fname=groups-here"])
    assert_same(outcome_of(folder / "groups-here", 1), outcome_of(folder / "groups-3", 3))
    first, second = (
        [
            [label.id for label in labels]
            for labels in XMCModel.load(folder / name / "model").predict(["w3 w50", "w7"], k=3)
        ]
        for name in ("groups-here", "groups-3")
    )
    assert first == second and len(first) == 2
