"""The accelerate/DeepSpeed engine: start a run, and refuse the known ways to start it wrongly.

`python`, `accelerate launch` and `deepspeed` all call `build_accelerator`. The DeepSpeed JSON holds only systems
settings. Precision, batch size, accumulation and clipping come from the configuration: the JSON says "auto" for them or
leaves them out, and a different value is refused.
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

# fp16's dynamic loss scale starts at 2^12, for both DeepSpeed's and torch's scaler.
_INITIAL_SCALE_POWER = 12
_LONGEST_JSON = 1 << 20  # bytes
_USES_DEEPSPEED = "ACCELERATE_USE_DEEPSPEED"  # variable of accelerate's launcher


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
    timeout_is: str = "its timeout",
) -> Accelerator:
    """Create this process's Accelerator and join the process group.

    Args:
        device: "auto", "cuda" or "cpu".
        mixed_precision: "no", "fp16" or "bf16".
        accumulation: micro-batches per optimizer step.
        micro_batch: texts per micro-batch, over all ranks.
        max_grad_norm: 0 for no clipping.
        deepspeed_config: path of a JSON file, for the `deepspeed` launcher. `accelerate launch` passes its own.
        timeout: how long another rank's heartbeat may be missing before this process exits.
        timeout_is: what the error calls it.
    Raises UserError for combinations that would train wrongly or not at all.
    """
    world_size = launched_processes()
    if micro_batch % world_size:
        raise UserError(
            f"`micro_batch`={micro_batch}: is not divisible by the {world_size} processes; change one of them"
        )
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("`device`=cuda: there is no usable GPU; set `device`=auto or cpu")
    on_cpu = device == "cpu" or not torch.cuda.is_available()
    path = _deepspeed_config_path(deepspeed_config)
    if on_cpu and mixed_precision == "fp16" and (path is None or not _cpu_takes_fp16()):
        raise UserError(
            "`mixed_precision=fp16`: needs a GPU (or DeepSpeed on a CPU that supports float16); set `mixed_precision=bf16` or "
            "`mixed_precision=no`"
        )
    settings = None
    if path is not None:
        rank_batch = micro_batch // world_size
        settings = deepspeed_settings(path, mixed_precision, accumulation, rank_batch, world_size, max_grad_norm)
    _refuse_other_flags(mixed_precision, accumulation, max_grad_norm, settings)
    if on_cpu and path is not None and torch.cuda.is_available():
        raise UserError("`device`=cpu: DeepSpeed ignores it; hide the GPUs with CUDA_VISIBLE_DEVICES= instead")
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    elif world_size == 1:
        use_gpu(cuda_device_id)
    elif cuda_device_id:
        raise UserError(
            f"`cuda_device_id`={cuda_device_id}: the launcher assigns the GPUs of several processes; set it to 0"
        )
    else:
        use_gpu(int(os.environ["LOCAL_RANK"]))

    handlers, plugin = [], None
    backend = "gloo" if on_cpu else "nccl"
    if path is not None or world_size > 1:
        # On a CPU, accelerate may run every rank alone unless the backend is named.
        handlers = [InitProcessGroupKwargs(backend=backend)]
    if mixed_precision == "fp16":
        # accelerate ignores this under DeepSpeed, which has its own scaler.
        handlers.append(GradScalerKwargs(init_scale=2.0**_INITIAL_SCALE_POWER))
    if path is not None and settings is not None:
        if on_cpu:
            _skip_shared_memory_build()
        if "LOCAL_RANK" not in os.environ:
            raise UserError(f"--deepspeed_config={path}: needs a launcher; start with deepspeed instead of python")
        _let_deepspeed_check(path, settings)
        plugin = DeepSpeedPlugin(hf_ds_config=settings)
    if plugin is not None or world_size > 1:
        # accelerate would use its own timeout, and DeepSpeed would print a traceback if the port is in use.
        form_process_group(backend, timeout, timeout_is)
    launched_by_accelerate = _USES_DEEPSPEED in os.environ
    accelerator = Accelerator(
        cpu=on_cpu and path is None,  # cpu=True makes accelerate ignore DeepSpeed
        mixed_precision=mixed_precision,
        deepspeed_plugin=plugin,
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=accumulation, sync_with_dataloader=False),
        kwargs_handlers=handlers,
    )
    if not launched_by_accelerate:
        # The Accelerator sets it for every plugin; this process's next training would seem launched by accelerate.
        os.environ.pop(_USES_DEEPSPEED, None)
    if accelerator.num_processes != world_size:
        raise UserError(
            f"{world_size} processes were started but would not train together; start them with accelerate launch "
            "--config_file launchers/accelerate_zero2.yaml, or with deepspeed launchers/train.py --deepspeed_config FILE"
        )
    return accelerator


def _cpu_takes_fp16() -> bool:
    """Whether DeepSpeed supports fp16 on this machine's CPU."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.accelerator import get_accelerator

    return bool(get_accelerator().is_fp16_supported())


def _deepspeed_config_path(argument: str | None) -> str | None:
    launched = os.environ.get("ACCELERATE_CONFIG_DS_FIELDS") is not None or (
        os.environ.get(_USES_DEEPSPEED, "false").lower() == "true"
    )
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise UserError("FSDP is not supported; use an accelerate configuration with distributed_type: DEEPSPEED")
    from_accelerate = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if argument is not None:
        if launched and from_accelerate not in ("none", argument):
            raise UserError(
                f"--deepspeed_config={argument}: accelerate launch already passes {from_accelerate}; remove one of them"
            )
        return argument
    if launched and from_accelerate == "none":
        raise UserError("the accelerate configuration names no deepspeed_config_file; name a file of ds_configs/ there")
    return from_accelerate if launched else None


def _refuse_other_flags(
    mixed_precision: str, accumulation: int, max_grad_norm: float, deepspeed: dict[str, Any] | None
) -> None:
    """Raise UserError for options of `accelerate launch` or its YAML that would be ignored.

    The configuration and the DeepSpeed JSON decide these options.
    """
    flags = {
        "mixed_precision": (mixed_precision, "`mixed_precision`"),
        "gradient_accumulation_steps": (accumulation, "`accumulation`"),
        "gradient_clipping": (max_grad_norm, "`max_grad_norm`"),
    }
    if deepspeed is not None:
        zero = deepspeed["zero_optimization"]
        flags["deepspeed_zero_stage"] = (zero["stage"], "zero_optimization.stage of the DeepSpeed JSON")
        for part in ("offload_optimizer", "offload_param"):
            device = (zero.get(part) or {}).get("device", "none")
            flags[f"deepspeed_{part}_device"] = (device, f"zero_optimization.{part} of the DeepSpeed JSON")
    in_yaml = os.environ.get("ACCELERATE_CONFIG_DS_FIELDS", "").split(",")
    for name, (value, field) in flags.items():
        given, flag = os.environ.get(f"ACCELERATE_{name.upper()}"), name.removeprefix("deepspeed_")
        # accelerate passes "no" if the precision is not given.
        defaults = (None, "no") if flag == "mixed_precision" else (None,)
        if flag in in_yaml or given not in (*defaults, str(value)):
            raise UserError(
                f"accelerate launch was given {flag}={given}, but {field} decides ({value}); remove it from the "
                "command or its YAML"
            )


def _skip_shared_memory_build() -> None:
    # On a CPU, DeepSpeed compiles a shared-memory communication extension on first use. That takes half a minute and
    # g++, and a stale lock file of a killed build blocks every later run. Gloo does the same work.
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _read_json(path: str) -> Any:
    """Parse the DeepSpeed JSON strictly. UserError, with the line if it is known, for anything else."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise UserError(f"{path}: {shown(repr(twice))} occurs twice in one object; remove one")
        return found

    def finite(word: str) -> float:
        number = float(word)
        if not math.isfinite(number):
            raise UserError(f"{path}: {shown(word)} is not a JSON number; write a finite number")
        return number

    try:
        with open(path, "rb") as file:
            content = file.read(_LONGEST_JSON + 1)
        if len(content) > _LONGEST_JSON:
            raise UserError(
                f"--deepspeed_config={path}: is larger than {_LONGEST_JSON >> 10} KiB; start from a file of ds_configs/"
            )
        return json.loads(content.decode("utf-8"), object_pairs_hook=unique, parse_float=finite, parse_constant=finite)
    except OSError as error:
        raise UserError(f"--deepspeed_config={path}: {error.strerror}; name a file of ds_configs/") from None
    except UserError:
        raise
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not valid JSON ({error.msg}); correct the line") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8; convert the file to UTF-8") from None
    except RecursionError:
        raise UserError(f"{path}: nested too deeply; start from a file of ds_configs/") from None
    except ValueError:  # a number with more digits than Python parses, or an invalid file name
        raise UserError(
            f"--deepspeed_config={path}: is not a valid file name, or the file has a number of thousands of digits; "
            "correct it"
        ) from None


def _let_deepspeed_check(path: str, settings: dict[str, Any]) -> None:
    """Raise UserError if DeepSpeed would refuse the settings. It would check them only after the model is loaded."""
    from deepspeed.runtime.config import DeepSpeedConfig

    def explicit(value: Any) -> Any:
        # accelerate replaces "auto" later. train_batch_size covers all ranks, whose number DeepSpeed does not know yet.
        if not isinstance(value, dict):
            return copy.deepcopy(value)
        return {name: explicit(each) for name, each in value.items() if each != "auto" and name != "train_batch_size"}

    try:
        DeepSpeedConfig(explicit(settings))
    except Exception as error:  # any error is due to the file, the only input
        cause = " ".join(str(error).split("[type=")[0].split())
        raise UserError(
            f"{path}: DeepSpeed refuses it ({cause or type(error).__name__}); start from a file of ds_configs/"
        ) from None


def deepspeed_settings(
    path: str, mixed_precision: str, accumulation: int, rank_batch: int, ranks: int, max_grad_norm: float
) -> dict[str, Any]:
    """Read the DeepSpeed JSON and fill in the configuration's values. UserError for values that contradict them.

    Args:
        rank_batch: texts per micro-batch on one of the `ranks` ranks.
    """
    settings = _read_json(path)
    sections = ("fp16", "bf16", "zero_optimization")
    if not isinstance(settings, dict) or not all(isinstance(settings.get(name, {}), dict) for name in sections):
        raise UserError(
            f"{path}: the file, and {', '.join(sections)} in it, must be JSON objects; start from a file of ds_configs/"
        )
    # The last three set a precision behind the configuration's back, or have no effect.
    for block, field in {
        "optimizer": "`optimizer`",
        "scheduler": "`optimizer`",
        "torch_autocast": "`mixed_precision`",
        "amp": "`mixed_precision`",
        "bfloat16": "`mixed_precision` (and DeepSpeed's name is bf16)",
    }.items():
        if block in settings:
            raise UserError(f"{path}: remove the {block!r} block; {field} sets it")

    def fill(section: dict[str, Any], key: str, value: Any, field: str) -> None:
        if section.get(key, "auto") not in ("auto", value):
            raise UserError(f'{path}: {key}={shown(section[key])} contradicts {field}={value}; write "auto" there')
        section[key] = value

    fill(settings, "gradient_accumulation_steps", accumulation, "`accumulation`")
    fill(settings, "train_micro_batch_size_per_gpu", rank_batch, "`rank_batch`")
    fill(settings, "train_batch_size", rank_batch * ranks * accumulation, "`step_batch`")
    fill(settings, "gradient_clipping", max_grad_norm, "`max_grad_norm`")
    for name in ("fp16", "bf16"):
        fill(settings.setdefault(name, {}), "enabled", mixed_precision == name, "(`mixed_precision`) " + name)
    settings["fp16"].setdefault("initial_scale_power", _INITIAL_SCALE_POWER)
    zero = settings.setdefault("zero_optimization", {})
    stage = zero.setdefault("stage", 0)
    if type(stage) is not int or stage not in (0, 1, 2, 3):
        raise UserError(f"{path}: zero_optimization.stage={shown(stage)}: is not a ZeRO stage; write 0, 1, 2 or 3")
    for part in ("offload_optimizer", "offload_param"):
        if not isinstance(zero.get(part, {}), dict):
            raise UserError(f'{path}: zero_optimization.{part} must be a JSON object such as {{"device": "cpu"}}')
    if stage in (1, 2) and not max_grad_norm and "offload_optimizer" not in zero:
        zero.setdefault("compute_grad_norm", False)  # unused without clipping
    if stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True  # otherwise saving fails after training
    # Use torch's optimizers with offloading too: DeepSpeed's CPU optimizer computes differently and must be compiled.
    settings.setdefault("zero_force_ds_cpu_optimizer", False)
    if mixed_precision == "fp16" and stage == 0:
        raise UserError(
            f"{path}: fp16 at ZeRO stage 0 trains wrongly; choose stage 1, 2 or 3, or `mixed_precision=bf16`"
        )
    # DeepSpeed's throughput timer waits for the GPU twice per step.
    settings.setdefault("timers", {}).setdefault("throughput", {}).setdefault("enabled", False)
    # torch's optimizers are exact at every stage, although DeepSpeed has not tested them all.
    settings.setdefault("zero_allow_untested_optimizer", True)
    return settings


def set_accumulation(accelerator: Accelerator, accumulation: int) -> None:
    """Change the number of micro-batches per step, keeping the texts per step. Call before `accelerator.prepare`."""
    before = accelerator.gradient_accumulation_steps
    accelerator.gradient_accumulation_steps = accumulation
    if (plugin := accelerator.state.deepspeed_plugin) is not None:
        settings = plugin.deepspeed_config
        settings["gradient_accumulation_steps"] = accumulation
        settings["train_micro_batch_size_per_gpu"] = settings["train_micro_batch_size_per_gpu"] * before // accumulation


def step_was_applied(accelerator: Accelerator, encoder: Any, optimizer: Any) -> bool:
    """Whether the last step changed the encoder: fp16 skips steps that overflow. Valid only right after the step."""
    if not accelerator.sync_gradients:
        return False
    if hasattr(encoder, "was_step_applied"):
        return encoder.was_step_applied()
    return not optimizer.step_was_skipped


@contextmanager
def whole_weights(module: nn.Module) -> Iterator[None]:
    """Gather a module's full weights on every rank in the block, before an engine has the module. Collective.

    Under ZeRO 3, transformers creates a model with sharded weights, which otherwise only the engine's forward pass
    gathers.
    """
    parameters = list(module.parameters())
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        yield
        return
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters(parameters):
        yield


def own_weights(module: nn.Module, rank: int) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, this rank's values) of each parameter. Under ZeRO 3 these are a flat shard."""
    parameter: Any  # DeepSpeed adds attributes
    for name, parameter in module.named_parameters():
        part = getattr(parameter, "ds_tensor", None)
        if part is None:
            yield name, parameter
        else:
            # The last shard is padded to the others' size with uninitialised memory.
            yield name, part[: max(0, parameter.ds_numel - rank * part.numel())]


def zero_stage(accelerator: Accelerator) -> int | None:
    """Return DeepSpeed's ZeRO stage, or None without DeepSpeed."""
    plugin = accelerator.state.deepspeed_plugin
    return None if plugin is None else plugin.zero_stage


def engine_name(accelerator: Accelerator) -> str:
    """Describe the engine for logs."""
    stage = zero_stage(accelerator)
    return "without DeepSpeed" if stage is None else f"DeepSpeed ZeRO {stage}"


def leave(accelerator: Accelerator) -> None:
    """Leave the training's process group. Drop all references to the results of `accelerator.prepare` first."""
    # If DDP were the last to hold the process group, gloo's thread and this one could deadlock.
    accelerator.free_memory()
    leave_process_group()
