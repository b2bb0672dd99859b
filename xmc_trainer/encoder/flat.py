"""The encoder as the engine sees it: one long parameter per optimizer group instead of hundreds of short ones.

DeepSpeed (ZeRO 0 to 2) and DDP run Python code, copies and collectives for every parameter. For a BERT the host needs more
time for them than the GPU for the whole step. `FlatEncoder` gives the engine two to four long tensors. The encoder's own
parameters are views of these with their own names and shapes, so the passes are those of the plain module, compiled or not.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from xmc_trainer.encoder.captured import EagerPass, Pass, Recorder
from xmc_trainer.encoder.text_encoder import TextEncoder


class _Encode(torch.autograd.Function):
    """Both passes of the encoder as one autograd operation on the flat parameters."""

    @staticmethod
    def forward(ctx: Any, flat_encoder: FlatEncoder, inputs: tuple[Tensor, ...], *flat: Tensor) -> Tensor:
        ctx.run = flat_encoder.run(inputs)
        return ctx.run.features

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        run = ctx.run
        del ctx.run
        return None, None, *run.gradients(grad)


class FlatEncoder(nn.Module):
    """An encoder whose trained parameters are one flat tensor per optimizer group.

    Build the optimizer from `groups`, give both to the engine, then call `attach`.

    Args:
        groups: as `TextEncoder.parameter_groups` returns them.
    Attributes:
        encoder: the wrapped module. It is not a submodule, so the engine does not find its parameters.
        groups: the optimizer groups, each with its flat parameter.
        members: for each group, the encoder's parameters in their order within the flat one.
    """

    encoder: TextEncoder
    _recorder: Recorder | None

    def __init__(self, encoder: TextEncoder, groups: list[dict[str, Any]]) -> None:
        super().__init__()
        object.__setattr__(self, "encoder", encoder)
        self.members = [list(group["params"]) for group in groups]
        self.flat = nn.ParameterList(torch.cat([p.detach().reshape(-1) for p in group]) for group in self.members)
        self.groups = [group | {"params": [flat]} for group, flat in zip(groups, self.flat)]
        self.attach()

    @torch.no_grad()
    def attach(self) -> None:
        """Make the encoder's parameters views of the flat ones, on the engine's device and in its dtype."""
        self._recorder = None  # its graphs hold the old addresses of the parameters
        for flat, members in zip(self.flat, self.members):
            parts = flat.detach().split([p.numel() for p in members])
            for parameter, part in zip(members, parts):
                parameter.grad = None
                parameter.data = part.view(parameter.shape)
        # Move buffers and frozen parameters too.
        own = {id(p) for members in self.members for p in members}
        dtype, device = self.flat[0].dtype, self.flat[0].device
        for tensor in (*self.encoder.parameters(), *self.encoder.buffers()):
            if id(tensor) not in own:
                tensor.data = tensor.to(device, dtype if tensor.is_floating_point() else None)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """See `TextEncoder.forward`."""
        if not torch.is_grad_enabled():
            return self.encoder(input_ids, attention_mask)
        return _Encode.apply(self, (input_ids, attention_mask), *self.flat)

    def run(self, inputs: tuple[Tensor, ...]) -> Pass:
        """Run the forward pass. The result runs the backward pass."""
        if self._recorder is not None and self.training:
            return self._recorder.run(inputs)
        return EagerPass(self.encoder, self.members, inputs)

    def capture(self, shapes: list[tuple[Tensor, ...]], *, used_up: bool = False) -> None:
        """Record the passes of training as CUDA graphs for inputs of these shapes, largest first. Raises CannotCapture.

        Args:
            used_up: whether a step has one backward pass and its gradients are not kept after the step.
        """
        recorder = Recorder(self.encoder, self.members, used_up=used_up)
        recorder.record(shapes)
        self._recorder = recorder

    @property
    def captured_bytes(self) -> int:
        """GPU memory of the recorded graphs, which the allocator does not count as in use."""
        return 0 if self._recorder is None else self._recorder.bytes

    def train(self, mode: bool = True) -> FlatEncoder:
        self.encoder.train(mode)
        return super().train(mode)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the encoder's state dict, with copies of its tensors."""
        return {name: value.clone() for name, value in self.encoder.state_dict(*args, **kwargs).items()}


def named_parts(module: nn.Module) -> Iterator[tuple[Tensor, list[tuple[str, torch.Size]]]]:
    """Yield each parameter that the engine trains, with the (name, shape) of the encoder's parameters in it.

    In a module other than a FlatEncoder every parameter stands for itself. Under ZeRO 3 it is empty, and the shape is that of
    the full parameter.

    Args:
        module: unwrapped from the engine.
    """
    if not isinstance(module, FlatEncoder):
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                yield parameter, [(name, getattr(parameter, "ds_shape", parameter.shape))]
        return
    names = {id(parameter): name for name, parameter in module.encoder.named_parameters()}
    for flat, members in zip(module.flat, module.members):
        yield flat, [(names[id(parameter)], parameter.shape) for parameter in members]
