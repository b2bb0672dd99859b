"""The engine's setup. Starts that would train wrongly, or not together, are refused with a remedy."""

from __future__ import annotations

import json
import os
import socket
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from xmc_trainer.builders.engine import accelerator_of
from xmc_trainer.config import load_config
from xmc_trainer.engine import accelerator as engine
from xmc_trainer.engine.accelerator import build_accelerator, deepspeed_settings, own_weights
from xmc_trainer.errors import NothingToDo, UserError, naming
from xmc_trainer.launch import launched_processes
from xmc_trainer.parallel import form_process_group

ROOT = Path(__file__).parents[2]
ZERO2 = str(ROOT / "ds_configs/zero2.json")
# What accelerate launch sets with the shipped YAML files.
ACCELERATE = {
    "WORLD_SIZE": "1",
    "RANK": "0",
    "LOCAL_RANK": "0",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_CONFIG_DS_FIELDS": "deepspeed_config_file,zero3_init_flag",
    "ACCELERATE_DEEPSPEED_CONFIG_FILE": ZERO2,
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false",
    "ACCELERATE_MIXED_PRECISION": "no",
}


# What every launcher sets for two processes.
TWO = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Return a function that sets variables, after removing those of launchers."""
    for name in list(os.environ):
        if name.startswith(("ACCELERATE_", "SLURM_", "OMPI_", "PMI_")) or name in TWO:
            monkeypatch.delenv(name)

    def put(variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return put


@pytest.fixture
def started(monkeypatch):
    """Return the arguments of process group and Accelerator; the fake Accelerator reports one process."""
    arguments = {}
    monkeypatch.setattr(engine, "form_process_group", lambda *given: arguments.update(group=given))

    def accelerator(**given):
        arguments.update(given)
        return SimpleNamespace(num_processes=1)

    monkeypatch.setattr(engine, "Accelerator", accelerator)
    monkeypatch.setattr(engine, "DeepSpeedPlugin", lambda hf_ds_config: hf_ds_config)
    return arguments


def build(**change):
    arguments = dict(
        device="auto", cuda_device_id=0, mixed_precision="no", accumulation=2, micro_batch=12, max_grad_norm=0.0,
        deepspeed_config=None, timeout=timedelta(minutes=7),
    )  # fmt: skip
    return build_accelerator(**arguments | change)


def test_the_shipped_configurations_pass(environment, started):
    environment(ACCELERATE)
    build()
    settings = started["deepspeed_plugin"]
    assert (settings["train_batch_size"], settings["train_micro_batch_size_per_gpu"]) == (24, 12)
    environment({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "2", "ACCELERATE_GRADIENT_CLIPPING": "0.5"})
    build(max_grad_norm=0.5)  # given twice, with equal values


def test_processes_that_would_train_alone_are_refused(environment, started):
    environment(TWO)
    with pytest.raises(
        UserError, match="2 processes were started but would not train together; start them with accelerate"
    ):
        build()
    assert started["group"] == ("gloo", timedelta(minutes=7), "its timeout")


def test_a_batch_that_is_not_divisible_is_refused(environment, started):
    environment(TWO)
    with pytest.raises(UserError, match="`micro_batch`=33: is not divisible by the 2 processes; change one"):
        build(micro_batch=33)
    assert not started


@pytest.mark.parametrize(
    "variables, argument, message",
    [
        (
            {"ACCELERATE_MIXED_PRECISION": "bf16"},
            None,
            r"mixed_precision=bf16, but `mixed_precision` decides \(no\); remove it",
        ),
        (
            {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"},
            None,
            r"gradient_accumulation_steps=4, .*accumulation` decides \(2\)",
        ),
        ({"ACCELERATE_GRADIENT_CLIPPING": "1.0"}, None, r"gradient_clipping=1.0, .*max_grad_norm` decides \(0.0\)"),
        ({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, None, r"zero_stage=3, .*DeepSpeed JSON decides \(2\)"),
        (
            {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"},
            None,
            r"offload_optimizer_device=cpu, .*decides \(none\)",
        ),
        ({"ACCELERATE_CONFIG_DS_FIELDS": "deepspeed_config_file,mixed_precision"}, None, "mixed_precision=no, but"),
        (
            {"ACCELERATE_DEEPSPEED_CONFIG_FILE": "none"},
            None,
            "names no deepspeed_config_file; name a file of ds_configs/",
        ),
        ({}, "other.json", f"--deepspeed_config=other.json: accelerate launch already passes {ZERO2}; remove one"),
        ({"ACCELERATE_USE_FSDP": "true"}, None, "FSDP is not supported"),
    ],
)
def test_contradicting_accelerate_options_are_refused(environment, started, variables, argument, message):
    environment(ACCELERATE | variables)
    with pytest.raises(UserError, match=message):
        build(deepspeed_config=argument)
    assert not started


@pytest.mark.parametrize(
    "variables, message",
    [
        (
            {"SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2"},
            r"2 processes were started \(SLURM_STEP_NUM_TASKS\) .* one per machine",
        ),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "4 processes were started"),
        ({"PMI_SIZE": "4"}, "4 processes were started"),
        ({"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1"}, "started only one process"),
    ],
)
def test_processes_without_a_common_group_are_refused(environment, variables, message):
    environment(variables)
    with pytest.raises(UserError, match=message):
        launched_processes()
    environment(TWO)  # a launcher within the task
    assert launched_processes() == 2


@pytest.mark.parametrize(
    "variables, message",
    [
        (
            {"WORLD_SIZE": "2"},
            "WORLD_SIZE=2 without RANK, LOCAL_RANK, MASTER_PORT, MASTER_ADDR: start with accelerate launch",
        ),
        ({"RANK": "0"}, "RANK=0 without WORLD_SIZE, .*unset them for one process"),
        (TWO | {"RANK": "2"}, "RANK=2: must be below WORLD_SIZE=2"),
        (
            TWO | {"LOCAL_RANK": "-1"},
            "LOCAL_RANK='-1' in the environment: must be a whole number of at least 0; correct or unset it",
        ),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two' in the environment: must be a whole number of at least 1"),
        (TWO | {"MASTER_PORT": "70000"}, "MASTER_PORT=70000: must be below 65536"),
        ({"SLURM_STEP_NUM_TASKS": "2(x3)"}, r"SLURM_STEP_NUM_TASKS='2\(x3\)' in the environment"),
    ],
)
def test_invalid_launcher_variables_are_refused(environment, variables, message):
    environment(variables)
    with pytest.raises(UserError, match=message):
        launched_processes()


def test_a_port_in_use(environment):
    with socket.create_server(("", 0)) as other:
        port = str(other.getsockname()[1])
        environment(TWO | {"MASTER_PORT": port})
        with pytest.raises(
            UserError, match=f"port {port} is in use on this machine: choose another with --master_port"
        ):
            form_process_group("gloo", timedelta(seconds=3))


def test_one_process_is_accepted_with_any_variables(environment):
    for variables in ({}, {"SLURM_NTASKS": "4"}, {"SLURM_STEP_NUM_TASKS": "1"}, {"ACCELERATE_USE_CPU": "False"}):
        environment(variables)
        assert launched_processes() == 1


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"gradient_accumulation_steps": 4},
            'gradient_accumulation_steps=4 contradicts .*accumulation`=2; write "auto"',
        ),
        ({"gradient_clipping": 1.0}, "gradient_clipping=1.0 contradicts"),
        (
            {"train_micro_batch_size_per_gpu": 8},
            "train_micro_batch_size_per_gpu=8 contradicts `rank_batch`=4",
        ),
        ({"train_batch_size": 8}, "train_batch_size=8 contradicts `step_batch`=24"),
        ({"bf16": {"enabled": True}}, "enabled=True contradicts"),
        ({"bf16": True}, "bf16, zero_optimization in it, must be JSON objects"),
        ({"optimizer": {"type": "Adam"}}, "remove the 'optimizer' block; `optimizer` sets it"),
        ({"scheduler": {"type": "WarmupLR"}}, "remove the 'scheduler' block"),
        ({"torch_autocast": {"enabled": True}}, "remove the 'torch_autocast' block; `mixed_precision` sets it"),
        ({"amp": {"enabled": True}}, "remove the 'amp' block; `mixed_precision`"),
        ({"bfloat16": {"enabled": True}}, "remove the 'bfloat16' block; `mixed_precision`"),
        (
            {"zero_optimization": {"stage": "auto"}},
            "zero_optimization.stage=auto: is not a ZeRO stage; write 0, 1, 2 or 3",
        ),
    ],
)
def test_a_contradicting_deepspeed_json_is_refused(tmp_path, change, message):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(json.loads(Path(ZERO2).read_text()) | change))
    with pytest.raises(UserError, match=message):
        deepspeed_settings(str(path), "no", 2, 4, 3, 0.0)


def test_an_invalid_deepspeed_json_is_refused(tmp_path):
    path = tmp_path / "ds.json"
    for text, message in [("[]", "must be JSON objects; start from"), ("{", "line 1: not valid JSON")]:
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            deepspeed_settings(str(path), "no", 1, 4, 1, 0.0)
    for content, message in [
        (b"[" * 10_000, "nested too deeply"),
        (b'{"a": \xff}', "not UTF-8"),
        (b'{"a": NaN}', "NaN is not a JSON number"),
        (b'{"a": 1e999}', "1e999 is not a JSON number"),
        (b'{"a": ' + b"9" * 5000 + b"}", "thousands of digits"),
        (b'{"a": 1, "a": 2}', "'a' occurs twice"),
        (b" " * (2 << 20), "larger than 1024 KiB"),
        (b'{"zero_optimization": {"stage": true}}', "stage=True: is not a ZeRO stage; write 0, 1, 2 or 3"),
        (b'{"zero_optimization": {"offload_optimizer": "cpu"}}', "offload_optimizer must be a JSON object"),
    ]:
        path.write_bytes(content)
        with pytest.raises(UserError, match=message):
            deepspeed_settings(str(path), "no", 1, 4, 1, 0.0)
    path.write_text("{}")
    settings = deepspeed_settings(str(path), "bf16", 1, 4, 2, 0.5)
    assert not settings["timers"]["throughput"]["enabled"]  # it synchronises host and GPU
    assert (
        settings["zero_optimization"] == {"stage": 0}
        and settings["bf16"]["enabled"]
        and settings["train_batch_size"] == 8
    )


@pytest.mark.parametrize("change, message", [
    ({"zero_optimization": {"stage": 2, "overlap_comm": "perhaps"}}, r"zero2.json: DeepSpeed refuses it \(.* overlap_comm"),
    ({"zero_optimization": {"stage": 2, "overlap_com": True}}, "overlap_com Extra inputs are not permitted"),
    ({"fp16": {"initial_scale_power": []}}, "initial_scale_power"),
])  # fmt: skip
def test_deepspeeds_own_refusals_come_before_the_model_is_loaded(change, message, tmp_path, environment, started):
    path = tmp_path / "zero2.json"
    path.write_text(json.dumps(json.loads(Path(ZERO2).read_text()) | change))
    environment(ACCELERATE | {"LOCAL_RANK": "0", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path)})
    with pytest.raises(UserError, match=message) as error:
        build()
    assert str(error.value).isprintable() and not started


def test_the_shipped_deepspeed_files_pass(tmp_path, environment, started):
    for path in (ROOT / "ds_configs").glob("*.json"):
        environment(ACCELERATE | {"LOCAL_RANK": "0", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path)})
        build()
        assert "zero_optimization" in started["deepspeed_plugin"]
    # Values that accelerate takes from the model.
    path = tmp_path / "auto.json"
    path.write_text('{"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}}')
    environment({"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path)})
    build()


def test_fp16_needs_hardware(environment, started, monkeypatch):
    with pytest.raises(UserError, match="`mixed_precision=fp16`: needs a GPU .* set `mixed_precision=bf16` or"):
        build(mixed_precision="fp16")
    environment(ACCELERATE)
    monkeypatch.setattr(engine, "_cpu_takes_fp16", lambda: False)
    with pytest.raises(UserError, match="`mixed_precision=fp16`: needs a GPU .* DeepSpeed on a CPU"):
        build(mixed_precision="fp16")
    monkeypatch.setattr(engine, "_cpu_takes_fp16", lambda: True)
    build(mixed_precision="fp16")
    assert started["deepspeed_plugin"]["fp16"]["enabled"]


def test_fp16_needs_a_zero_stage():
    with pytest.raises(UserError, match="zero0.json: fp16 at ZeRO stage 0 trains wrongly; choose stage 1, 2 or 3"):
        deepspeed_settings(str(ROOT / "ds_configs/zero0.json"), "fp16", 1, 4, 1, 0.0)
    assert deepspeed_settings(ZERO2, "fp16", 1, 4, 1, 0.0)["fp16"]["enabled"]


ON_A_GPU = dict(
    device="cuda", cuda_device_id=0, accumulation=1, micro_batch=8, max_grad_norm=0.0, deepspeed_config=None,
    timeout=timedelta(minutes=10),
)  # fmt: skip


@pytest.mark.parametrize("precision, first_scale", [("fp16", 4096.0), ("bf16", None)])
def test_the_loss_scale_starts_at_4096_with_and_without_deepspeed(precision, first_scale, monkeypatch, tmp_path):
    given = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(
        engine, "Accelerator", lambda **kwargs: given.update(kwargs) or SimpleNamespace(num_processes=1)
    )
    build_accelerator(mixed_precision=precision, **ON_A_GPU)
    scales = [handler.to_kwargs()["init_scale"] for handler in given["kwargs_handlers"]]
    assert scales == ([first_scale] if first_scale else [])

    (tmp_path / "zero1.json").write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    settings = deepspeed_settings(str(tmp_path / "zero1.json"), precision, 1, 8, 1, 0.0)
    assert not first_scale or 2 ** settings["fp16"]["initial_scale_power"] == first_scale


def test_the_gpu_is_chosen_by_number_without_a_launcher(environment, monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(engine, "Accelerator", lambda **kwargs: SimpleNamespace(num_processes=1))
    build_accelerator(mixed_precision="no", **ON_A_GPU | {"cuda_device_id": 3})
    assert chosen == [3]
    with pytest.raises(UserError, match="GPU 4: this machine has 4, counted from 0"):
        build_accelerator(mixed_precision="no", **ON_A_GPU | {"cuda_device_id": 4})
    environment(TWO)
    with pytest.raises(UserError, match="`cuda_device_id`=3: the launcher assigns the GPUs of several processes"):
        build_accelerator(mixed_precision="no", **ON_A_GPU | {"cuda_device_id": 3})


@pytest.mark.gpu
def test_the_scaler_on_a_gpu_starts_at_4096(fresh_accelerator):
    assert build_accelerator(mixed_precision="fp16", **ON_A_GPU).scaler.get_scale() == 4096.0


def test_padding_of_zero_3_partitions_is_not_a_weight():
    """DeepSpeed does not initialise the padding. If it were checked, a training could be refused for non-finite weights."""
    layer, expected = torch.nn.Linear(5, 1), torch.arange(5.0)
    for rank, (weights, biases) in enumerate([(2, 1), (2, 0), (1, 0)]):
        for parameter in layer.parameters():
            whole = torch.full((3 * -(-parameter.numel() // 3),), torch.nan)
            whole[: parameter.numel()] = expected[: parameter.numel()]
            parameter.ds_numel, parameter.ds_tensor = parameter.numel(), whole.chunk(3)[rank]
        found = dict(own_weights(layer, rank))
        torch.testing.assert_close(found["weight"], expected[2 * rank : 2 * rank + weights])
        torch.testing.assert_close(found["bias"], expected[:biases])


@pytest.mark.parametrize(
    "words, message",
    [
        (["environment.device=cpu", "training.amp.enabled=true", "training.amp.dtype=float16"],
         "training.amp.dtype=float16: needs a GPU .* set training.amp.dtype=bfloat16 or training.amp.enabled=false"),
        (["environment.device=cpu", "data.batch_size=33"], "data.batch_size=33: is not divisible by the 2 processes"),
    ],
)  # fmt: skip
def test_builders_name_the_settings(environment, started, words, message):
    environment(TWO)
    with pytest.raises(UserError, match=message):
        accelerator_of(load_config(["dataset=wordnet", "data.micro_batches=1", *words]))


def test_only_known_parameters_get_the_name_of_a_setting():
    with pytest.raises(NothingToDo) as caught, naming({"size": "data.size", "mode=a": "data.mode=b"}):
        raise NothingToDo("`size`=3: `other`, size, `mode=a`; {size}")
    assert str(caught.value) == "data.size=3: `other`, size, data.mode=b; {size}"
