"""The accelerate/DeepSpeed engine: how a run is started, and every way of starting it wrongly that we know of.

`python`, `accelerate launch` and `deepspeed` end up in `build_accelerator`. The DeepSpeed JSON holds systems settings
only; what the configuration knows (precision, batch, accumulation, clipping) stands there as "auto", is filled in from
the configuration, and is refused where the JSON says something else.
"""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs
from accelerate.utils import GradientAccumulationPlugin, GradScalerKwargs
from torch import Tensor, nn

from xmc_trainer.errors import UserError, shown
from xmc_trainer.launch import launched_processes
from xmc_trainer.parallel import form_process_group, leave_process_group, use_gpu

# The dynamic loss scale of fp16 starts at 2^12, with DeepSpeed's scaler and with torch's.
_INITIAL_SCALE_POWER = 12
_LONGEST_JSON = 1 << 20  # bytes


def build_accelerator(
    *,
    device: str,
    cuda_device_id: int,
    mixed_precision: str,
    accumulation: int,
    micro_batch: int,
    max_grad_norm: float,
    deepspeed_config: str | None,
    timeout: timedelta,
) -> Accelerator:
    """The Accelerator of this process, with the process group set up.

    Args:
        device: "auto", "cuda" or "cpu".
        mixed_precision: "no", "fp16" or "bf16".
        accumulation: micro-batches an optimizer step.
        micro_batch: texts a micro-batch over all ranks.
        max_grad_norm: 0 for no clipping.
        deepspeed_config: JSON file, for the `deepspeed` launcher; `accelerate launch` names its own.
        timeout: without a sign of life of another rank, before this process ends.
    Raises UserError for combinations that would train wrongly or not at all.
    """
    world_size = launched_processes()
    if micro_batch % world_size:
        raise UserError(f"data.batch_size={micro_batch}: does not divide by the {world_size} processes; change either")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("environment.device=cuda: there is no usable GPU; set environment.device=auto or cpu")
    on_cpu = device == "cpu" or not torch.cuda.is_available()
    path = _deepspeed_config_path(deepspeed_config)
    if on_cpu and mixed_precision == "fp16" and (path is None or not _cpu_takes_fp16()):
        raise UserError(
            "training.amp.dtype=float16: needs a GPU (or DeepSpeed on a CPU that multiplies in float16); set bfloat16 or "
            "training.amp.enabled=false"
        )
    settings = None
    if path is not None:
        rank_batch = micro_batch // world_size
        settings = deepspeed_settings(path, mixed_precision, accumulation, rank_batch, world_size, max_grad_norm)
    _refuse_other_flags(mixed_precision, accumulation, max_grad_norm, settings)
    if on_cpu and path is not None and torch.cuda.is_available():
        raise UserError("environment.device=cpu: with DeepSpeed hide the GPUs instead (CUDA_VISIBLE_DEVICES= in front)")
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    elif world_size == 1:
        use_gpu(cuda_device_id)
    elif cuda_device_id:
        raise UserError("environment.cuda_device_id: leave it at 0 with several processes; the launcher assigns GPUs")
    else:
        use_gpu(int(os.environ["LOCAL_RANK"]))

    handlers, plugin = [], None
    backend = "gloo" if on_cpu else "nccl"
    if path is not None or world_size > 1:
        # Without a backend named, accelerate on a CPU may start every rank alone.
        handlers = [InitProcessGroupKwargs(backend=backend)]
    if mixed_precision == "fp16":
        # Under DeepSpeed, which scales by itself, accelerate leaves it out.
        handlers.append(GradScalerKwargs(init_scale=2.0**_INITIAL_SCALE_POWER))
    if settings is not None:
        if on_cpu:
            _skip_shared_memory_build()
        if "LOCAL_RANK" not in os.environ:
            raise UserError(f"--deepspeed_config={path}: needs a launcher; start with deepspeed instead of python")
        _let_deepspeed_check(path, settings)
        plugin = DeepSpeedPlugin(hf_ds_config=settings)
    if plugin is not None or world_size > 1:
        # accelerate would leave its own timeout, and DeepSpeed a traceback where the port is in use.
        form_process_group(backend, timeout)
    accelerator = Accelerator(
        cpu=on_cpu and path is None,  # accelerate drops DeepSpeed where it is told to use the CPU
        mixed_precision=mixed_precision,
        deepspeed_plugin=plugin,
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=accumulation, sync_with_dataloader=False),
        kwargs_handlers=handlers,
    )
    if accelerator.num_processes != world_size:
        raise UserError(
            f"{world_size} processes were started but would not train together; start them by accelerate launch "
            "--config_file launchers/accelerate_zero2.yaml, or by deepspeed launchers/train.py --deepspeed_config FILE"
        )
    return accelerator


def _cpu_takes_fp16() -> bool:
    """Whether DeepSpeed trains in fp16 on this machine's CPU."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.accelerator import get_accelerator

    return bool(get_accelerator().is_fp16_supported())


def _deepspeed_config_path(argument: str | None) -> str | None:
    launched = os.environ.get("ACCELERATE_CONFIG_DS_FIELDS") is not None or (
        os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    )
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise UserError("FSDP is not supported: use an accelerate configuration with distributed_type: DEEPSPEED")
    from_accelerate = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if argument is not None:
        if launched and from_accelerate not in ("none", argument):
            raise UserError(
                f"--deepspeed_config={argument}: accelerate launch already hands over {from_accelerate}; drop one"
            )
        return argument
    if launched and from_accelerate == "none":
        raise UserError("the accelerate configuration names no deepspeed_config_file; take one of ds_configs/")
    return from_accelerate if launched else None


def _refuse_other_flags(
    mixed_precision: str, accumulation: int, max_grad_norm: float, deepspeed: dict[str, Any] | None
) -> None:
    """What `accelerate launch`, or its YAML, was told beside the configuration and the JSON would be ignored."""
    flags = {
        "mixed_precision": (mixed_precision, "training.amp"),
        "gradient_accumulation_steps": (accumulation, "training.optimization.grad_accum_step"),
        "gradient_clipping": (max_grad_norm, "training.optimization.max_grad_norm"),
    }
    if deepspeed is not None:
        zero = deepspeed["zero_optimization"]
        flags["deepspeed_zero_stage"] = (zero["stage"], "zero_optimization.stage of the DeepSpeed JSON")
        for part in ("offload_optimizer", "offload_param"):
            device = (zero.get(part) or {}).get("device", "none")
            flags[f"deepspeed_{part}_device"] = (device, f"zero_optimization.{part} of the DeepSpeed JSON")
    in_yaml = os.environ.get("ACCELERATE_CONFIG_DS_FIELDS", "").split(",")
    for name, (ours, field) in flags.items():
        theirs, flag = os.environ.get(f"ACCELERATE_{name.upper()}"), name.removeprefix("deepspeed_")
        # Where nothing is said of the precision, accelerate says "no".
        unsaid = (None, "no") if flag == "mixed_precision" else (None,)
        if flag in in_yaml or theirs not in (*unsaid, str(ours)):
            raise UserError(
                f"accelerate launch was told {flag}={theirs}; drop it from the command or its YAML: {field} decides "
                f"({ours})"
            )


def _skip_shared_memory_build() -> None:
    # On CPU DeepSpeed compiles a shared-memory communication extension on first use: half a minute, it needs g++, and a
    # stale lock file of a killed build blocks every later run. Gloo does the same work.
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _read_json(path: str) -> Any:
    """What a JSON file holds. UserError, with the line where there is one, for what is not JSON to the letter."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise UserError(f"{path}: {shown(repr(twice))} stands there twice in one object; remove one")
        return found

    def finite(word: str) -> float:
        number = float(word)
        if not math.isfinite(number):
            raise UserError(f"{path}: {shown(word)} is not a number of JSON; write a finite one")
        return number

    try:
        with open(path, "rb") as file:
            content = file.read(_LONGEST_JSON + 1)
        if len(content) > _LONGEST_JSON:
            raise UserError(
                f"--deepspeed_config={path}: larger than {_LONGEST_JSON >> 10} KiB; begin with one of ds_configs/"
            )
        return json.loads(content.decode("utf-8"), object_pairs_hook=unique, parse_float=finite, parse_constant=finite)
    except OSError as error:
        raise UserError(f"--deepspeed_config={path}: {error.strerror}; name a file of ds_configs/") from None
    except UserError:
        raise
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not valid JSON ({error.msg})") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8; convert the file") from None
    except RecursionError:
        raise UserError(f"{path}: nested too deeply; begin with one of ds_configs/") from None
    except ValueError:  # more digits than Python reads, or a file name that cannot be
        raise UserError(
            f"--deepspeed_config={path}: cannot be read, or holds a number of thousands of digits"
        ) from None


def _let_deepspeed_check(path: str, settings: dict[str, Any]) -> None:
    """UserError for what DeepSpeed would refuse of the file, which it reads only after the model is loaded."""
    from deepspeed.runtime.config import DeepSpeedConfig

    def chosen(value: Any) -> Any:
        # accelerate fills in what is left to be chosen; the batch is of all ranks, of which DeepSpeed knows nothing yet.
        if not isinstance(value, dict):
            return copy.deepcopy(value)
        return {name: chosen(each) for name, each in value.items() if each != "auto" and name != "train_batch_size"}

    try:
        DeepSpeedConfig(chosen(settings))
    except Exception as error:  # the file is all that it was given: whatever it dislikes stands there
        said = " ".join(str(error).split("[type=")[0].split())
        raise UserError(
            f"{path}: DeepSpeed refuses it: {said or type(error).__name__}; begin with one of ds_configs/"
        ) from None


def deepspeed_settings(
    path: str, mixed_precision: str, accumulation: int, rank_batch: int, ranks: int, max_grad_norm: float
) -> dict[str, Any]:
    """The DeepSpeed JSON with the configuration's values in place of "auto". UserError where they contradict.

    Args: rank_batch: texts a micro-batch of one of the `ranks`.
    """
    settings = _read_json(path)
    sections = ("fp16", "bf16", "zero_optimization")
    if not isinstance(settings, dict) or not all(isinstance(settings.get(name, {}), dict) for name in sections):
        raise UserError(
            f"{path}: the file, and {', '.join(sections)} in it, must be JSON objects; begin with one of ds_configs/"
        )
    # The last three set a precision that nothing else here knows of, or none at all.
    for block, field in {
        "optimizer": "training.optimization",
        "scheduler": "training.optimization",
        "torch_autocast": "training.amp",
        "amp": "training.amp",
        "bfloat16": "training.amp (and DeepSpeed's name is bf16)",
    }.items():
        if block in settings:
            raise UserError(f"{path}: remove the {block!r} block; {field} sets it")

    def fill(section: dict[str, Any], key: str, value: Any, field: str) -> None:
        if section.get(key, "auto") not in ("auto", value):
            raise UserError(f'{path}: {key}={shown(section[key])} contradicts {field}={value}; write "auto" there')
        section[key] = value

    fill(settings, "gradient_accumulation_steps", accumulation, "training.optimization.grad_accum_step")
    fill(settings, "train_micro_batch_size_per_gpu", rank_batch, "data.batch_size / processes")
    fill(settings, "train_batch_size", rank_batch * ranks * accumulation, "data.batch_size x grad_accum_step")
    fill(settings, "gradient_clipping", max_grad_norm, "training.optimization.max_grad_norm")
    for name in ("fp16", "bf16"):
        fill(settings.setdefault(name, {}), "enabled", mixed_precision == name, "(training.amp) " + name)
    settings["fp16"].setdefault("initial_scale_power", _INITIAL_SCALE_POWER)
    zero = settings.setdefault("zero_optimization", {})
    stage = zero.setdefault("stage", 0)
    if type(stage) is not int or stage not in (0, 1, 2, 3):
        raise UserError(f"{path}: zero_optimization.stage={shown(stage)}: write 0, 1, 2 or 3")
    for part in ("offload_optimizer", "offload_param"):
        if not isinstance(zero.get(part, {}), dict):
            raise UserError(f'{path}: zero_optimization.{part} must be a JSON object such as {{"device": "cpu"}}')
    if stage in (1, 2) and not max_grad_norm and "offload_optimizer" not in zero:
        zero.setdefault("compute_grad_norm", False)  # nobody asks for it
    if stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True  # or saving fails, after all of the training
    # torch's optimizers with offloading too: DeepSpeed's own for the host is another one, and has to be compiled.
    settings.setdefault("zero_force_ds_cpu_optimizer", False)
    if mixed_precision == "fp16" and stage == 0:
        raise UserError(
            f"{path}: fp16 at ZeRO stage 0 trains wrongly; take stage 1, 2 or 3, or training.amp.dtype=bfloat16"
        )
    # It would wait for the GPU twice a step to tell the rate that we tell without.
    settings.setdefault("timers", {}).setdefault("throughput", {}).setdefault("enabled", False)
    # Our learning rates are set from outside, and torch's optimizers are exact at every stage.
    settings.setdefault("zero_allow_untested_optimizer", True)
    return settings


def set_accumulation(accelerator: Accelerator, accumulation: int) -> None:
    """Cut the texts of a step into another number of micro-batches; before `accelerator.prepare`."""
    before = accelerator.gradient_accumulation_steps
    accelerator.gradient_accumulation_steps = accumulation
    if (plugin := accelerator.state.deepspeed_plugin) is not None:
        settings = plugin.deepspeed_config
        settings["gradient_accumulation_steps"] = accumulation
        settings["train_micro_batch_size_per_gpu"] = settings["train_micro_batch_size_per_gpu"] * before // accumulation


def step_was_applied(accelerator: Accelerator, encoder: Any, optimizer: Any) -> bool:
    """Whether the step just made changed the encoder (fp16 skips overflowing ones). Ask right after the step only."""
    if not accelerator.sync_gradients:
        return False
    if hasattr(encoder, "was_step_applied"):
        return encoder.was_step_applied()
    return not optimizer.step_was_skipped


@contextmanager
def whole_weights(module: nn.Module) -> Iterator[None]:
    """Inside, the weights of a module that no engine has yet are whole, on every process, which all must come here.

    Under ZeRO 3 transformers makes a model in parts, and only the engine's forward pass would put them together.
    """
    parameters = list(module.parameters())
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        yield
        return
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters(parameters):
        yield


def own_weights(module: nn.Module, rank: int) -> Iterator[tuple[str, Tensor]]:
    """(name, what this process holds of it) of every parameter; under ZeRO 3 that is a part, flat."""
    for name, parameter in module.named_parameters():
        part = getattr(parameter, "ds_tensor", None)
        if part is None:
            yield name, parameter
        else:
            # The last part is filled up to the size of the others with memory that nobody sets.
            yield name, part[: max(0, parameter.ds_numel - rank * part.numel())]


def zero_stage(accelerator: Accelerator) -> int | None:
    """DeepSpeed's; None without DeepSpeed."""
    plugin = accelerator.state.deepspeed_plugin
    return None if plugin is None else plugin.zero_stage


def engine_name(accelerator: Accelerator) -> str:
    """What drives the encoder, for people."""
    stage = zero_stage(accelerator)
    return "without DeepSpeed" if stage is None else f"DeepSpeed ZeRO {stage}"


def leave(accelerator: Accelerator) -> None:
    """End this process's part in the training. Who holds what `accelerator.prepare` gave lets go of it first."""
    # Were DDP the last to hold the process group, gloo's thread and this one could wait for each other for ever.
    accelerator.free_memory()
    leave_process_group()
