"""The encoder as an engine is to see it: one long parameter an optimizer group instead of hundreds of short ones.

DeepSpeed (ZeRO 0 to 2) and DDP run Python code, copies and collectives for every parameter. For a BERT that takes the host
longer than the GPU needs for the whole step. `FlatEncoder` hands them two to four long tensors. The encoder's own parameters
are views of these, under their own names and in their own shapes, so that forward and backward pass are those of the plain
module, compiled or not.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from xmc_trainer.encoder.captured import EagerPass, Pass, Recorder
from xmc_trainer.encoder.text_encoder import TextEncoder


class _Encode(torch.autograd.Function):
    """The encoder's forward and backward pass as one operation on the flat parameters."""

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
    """An encoder whose trained parameters are one flat tensor an optimizer group.

    Give it and `groups` to the optimizer and the engine, then call `attach`.

    Args: groups: of `TextEncoder.parameter_groups`.
    Attributes:
        encoder: the module itself. It is no submodule, or the engine would find its parameters.
        groups: the same optimizer groups, with the flat parameter of each.
        members: for each group, the encoder's own parameters in the order of the flat one.
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
        """Lay the encoder's parameters over the flat ones, wherever the engine has put these and in whatever dtype."""
        self._recorder = None  # its graphs know where the parameters were
        for flat, members in zip(self.flat, self.members):
            parts = flat.detach().split([p.numel() for p in members])
            for parameter, part in zip(members, parts):
                parameter.grad = None
                parameter.data = part.view(parameter.shape)
        # What is not trained follows.
        own = {id(p) for members in self.members for p in members}
        dtype, device = self.flat[0].dtype, self.flat[0].device
        for tensor in (*self.encoder.parameters(), *self.encoder.buffers()):
            if id(tensor) not in own:
                tensor.data = tensor.to(device, dtype if tensor.is_floating_point() else None)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """As the encoder's."""
        if not torch.is_grad_enabled():
            return self.encoder(input_ids, attention_mask)
        return _Encode.apply(self, (input_ids, attention_mask), *self.flat)

    def run(self, inputs: tuple[Tensor, ...]) -> Pass:
        """The forward pass of `inputs`, which waits for its backward pass."""
        if self._recorder is not None and self.training:
            return self._recorder.run(inputs)
        return EagerPass(self.encoder, self.members, inputs)

    def capture(self, shapes: list[tuple[Tensor, ...]], *, used_up: bool = False) -> None:
        """Let the passes of training be CUDA graphs for inputs of these shapes, the largest first. Raises CannotCapture.

        Args: used_up: gradients are not kept beyond the step's end, and a step has one backward pass.
        """
        recorder = Recorder(self.encoder, self.members, used_up=used_up)
        recorder.record(shapes)
        self._recorder = recorder

    @property
    def captured_bytes(self) -> int:
        """Memory of the GPU that the recorded passes share, and that its allocator does not count as in use."""
        return 0 if self._recorder is None else self._recorder.bytes

    def train(self, mode: bool = True) -> FlatEncoder:
        self.encoder.train(mode)
        return super().train(mode)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The encoder's: its names and shapes, each tensor in memory of its own."""
        return {name: value.clone() for name, value in self.encoder.state_dict(*args, **kwargs).items()}


def named_parts(module: nn.Module) -> Iterator[tuple[Tensor, list[tuple[str, torch.Size]]]]:
    """Each parameter that the engine trains of `module` (without the engine around it), and what it is made of: names and shapes.

    A parameter of any other module than a FlatEncoder is made of itself. Under ZeRO 3 it is empty and remembers its shape.
    """
    if not isinstance(module, FlatEncoder):
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                yield parameter, [(name, getattr(parameter, "ds_shape", parameter.shape))]
        return
    names = {id(parameter): name for name, parameter in module.encoder.named_parameters()}
    for flat, members in zip(module.flat, module.members):
        yield flat, [(names[id(parameter)], parameter.shape) for parameter in members]
