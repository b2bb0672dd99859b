"""The encoder's full training state, independent of engine and number of ranks.

DeepSpeed shards a parameter's float32 values and optimizer state over the ranks. This module gathers them, one
parameter at a time, and shards them again. Training can therefore resume with another ZeRO stage, another number of
processes, or without DeepSpeed. Names and shapes are the encoder's own, even if the engine uses flat parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional

from xmc_trainer.encoder.flat import named_parts

# The per-parameter state of torch's optimizers, apart from the step count.
_STATES = {
    torch.optim.AdamW: ("exp_avg", "exp_avg_sq"),
    torch.optim.Adam: ("exp_avg", "exp_avg_sq"),
    torch.optim.SGD: ("momentum_buffer",),
}


class EncoderState:
    """Access to the trained parameters of `encoder` and their state in `optimizer`.

    Args:
        encoder, optimizer: the results of `accelerator.prepare`.
    """

    def __init__(self, accelerator: Accelerator, encoder: nn.Module, optimizer: Any) -> None:
        self._accelerator = accelerator
        self._parts = list(named_parts(accelerator.unwrap_model(encoder)))
        # accelerate's wrapper holds torch's optimizer, or DeepSpeed's, which holds torch's.
        self._engine = optimizer.optimizer
        self._torch = getattr(self._engine, "optimizer", self._engine)
        first = self._parts[0][0]
        self._partitioned = hasattr(first, "ds_id")  # ZeRO 3: parameters are sharded too
        self._sharded = self._partitioned or hasattr(first, "_hp_mapping")
        # ZeRO 0 with bfloat16 keeps a float32 copy of each parameter.
        pairs = (
            zip(getattr(self._engine, "fp16_groups", []), getattr(self._engine, "fp32_groups", []))
            if not self._sharded
            else ()
        )
        self._copies = {id(low): high for lows, highs in pairs for low, high in zip(lows, highs)}

    def _flat(self) -> list[Tensor]:
        """Return the tensors that torch's optimizer updates."""
        if self._partitioned:
            return self._engine.fp32_partitioned_groups_flat
        return [parameter for group in self._torch.param_groups for parameter in group["params"]]

    def names(self) -> tuple[str, ...]:
        """Return the names of the optimizer states of a parameter, or () before the first step."""
        flat = self._flat()
        return _STATES[type(self._torch)] if any(self._torch.state.get(each) for each in flat) else ()

    def steps(self) -> float:
        """Return the optimizer's step count, which Adam's bias correction needs."""
        counts = [float(state["step"]) for state in self._torch.state.values() if "step" in state]
        return max(counts, default=0.0)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield ("weight/<name>" or "<state>/<name>", float32 tensor) for each parameter. Collective: exhaust it."""
        if self.names():
            self._link()
        for parameter, members in self._parts:
            for state in (None, *self.names()):
                parts = self._get(parameter, state).reshape(-1).split([shape.numel() for _, shape in members])
                for (name, shape), part in zip(members, parts):
                    yield f"{state or 'weight'}/{name}", part.view(shape)

    def _get(self, parameter: Tensor, state: str | None) -> Tensor:
        if self._sharded:
            from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

            return (
                safe_get_full_fp32_param(parameter)
                if state is None
                else safe_get_full_optimizer_state(parameter, state)
            )
        own = self._copies.get(id(parameter), parameter)
        return own.detach() if state is None else self._torch.state[own][state]

    @torch.no_grad()
    def load(self, get: Callable[[str], Tensor], states: tuple[str, ...], steps: float) -> None:
        """Load what `tensors`, `names` and `steps` returned in another process. Collective.

        Args:
            get: name of `tensors` -> tensor.
        Raises ValueError if a parameter's shape or the optimizer differs.
        """
        if states:
            if states != _STATES[type(self._torch)]:
                raise ValueError(f"it has the optimizer states {', '.join(states)}")
            self._make_states(states, steps)
        for parameter, members in self._parts:
            whole = getattr(parameter, "ds_shape", parameter.shape)
            for state in (None, *states):
                values = []
                for name, shape in members:
                    value = get(f"{state or 'weight'}/{name}").to(self._accelerator.device)
                    if value.shape != shape:
                        raise ValueError(
                            f"{name} has the shape {list(value.shape)}, but the encoder needs {list(shape)}"
                        )
                    values.append(value.reshape(-1))
                self._set(parameter, torch.cat(values).view(whole), state)

    def _make_states(self, names: tuple[str, ...], steps: float) -> None:
        """Create the optimizer states, which torch's optimizers otherwise create in their first step."""
        fused = bool(self._torch.param_groups[0].get("fused"))
        for each in self._flat():
            state: dict[str, Tensor] = {name: torch.zeros_like(each) for name in names}
            if "exp_avg" in names:
                state["step"] = torch.tensor(steps, dtype=torch.float32, device=each.device if fused else "cpu")
            self._torch.state[each] = state
        self._link()

    def _link(self) -> None:
        """Under ZeRO 1 and 2, link the parameters to their optimizer states."""
        if self._sharded and not self._partitioned:
            # DeepSpeed 0.19 links them once, after the first parameter group's first step; other groups have no state
            # then.
            self._engine._hp_optimizer_states_linked = False
            self._engine._lazy_init_hp_params_optimizer_state()

    def _set(self, parameter: Any, value: Tensor, state: str | None) -> None:
        if not self._sharded:
            own = self._copies.get(id(parameter), parameter)
            (own if state is None else self._torch.state[own][state]).copy_(value)
        elif self._partitioned:
            from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

            # DeepSpeed's functions for full values require a size that is divisible by the number of ranks.
            size = parameter.ds_tensor.numel()
            own = value.reshape(-1)[size * self._accelerator.process_index :][:size]
            own = functional.pad(own, (0, size - own.numel()))
            if state is not None:
                safe_set_local_optimizer_state(parameter, own, state)
                return
            safe_set_local_fp32_param(parameter, own)
        else:
            from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

            if state is not None:
                safe_set_full_optimizer_state(parameter, value, state)
                return
            safe_set_full_fp32_param(parameter, value)
        if state is not None:
            return
        # Also set the weights that the forward pass uses, in their own precision.
        if self._partitioned:
            from deepspeed.runtime.zero import GatheredParameters

            with GatheredParameters([parameter], modifier_rank=0):
                parameter.data.copy_(value)
        else:
            parameter.data.copy_(value)

    def loss_scale(self) -> dict[str, float] | None:
        """Return fp16's loss scale and the number of steps since it changed or overflowed, or None without a scaler."""
        if (ours := self._accelerator.scaler) is not None:
            state = ours.state_dict()
            return {"scale": state["scale"], "good_steps": state["_growth_tracker"]}
        theirs = getattr(self._engine, "loss_scaler", None)
        if theirs is None or not theirs.dynamic:
            return None
        good = theirs.cur_iter - theirs.last_overflow_iter - 1
        return {"scale": theirs.cur_scale, "good_steps": good, "hysteresis": theirs.cur_hysteresis}

    def load_loss_scale(self, state: dict[str, float] | None) -> None:
        if state is None or self.loss_scale() is None:
            return
        if (ours := self._accelerator.scaler) is not None:
            ours.load_state_dict(
                ours.state_dict() | {"scale": state["scale"], "_growth_tracker": int(state["good_steps"])}
            )
            return
        theirs = self._engine.loss_scaler
        theirs.cur_scale = state["scale"]
        theirs.cur_iter = theirs.last_overflow_iter + 1 + int(state["good_steps"])
        theirs.cur_hysteresis = int(state.get("hysteresis", theirs.cur_hysteresis))
