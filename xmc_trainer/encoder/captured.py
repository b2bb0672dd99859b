"""Forward and backward passes of an encoder as CUDA graphs.

A BERT is some 1,500 launches a step, and the host takes longer to make them than the GPU to run them. A graph is one launch. It
belongs to inputs of one shape: the shapes that come often are recorded before the training, any other one runs as it would without.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

# The replay makes the same numbers with the same kernels; a frozen branch or draw would be far off.
_TOLERANCE = 1e-2
# Settings of a backbone that leaves out whole layers at random, which Python draws: a graph would repeat one draw.
_DRAWS = ("layerdrop", "encoder_layerdrop")


class CannotCapture(RuntimeError):
    """Why an encoder's passes are no graphs."""


class Pass(Protocol):
    """A forward pass that waits for its backward pass."""

    features: Tensor

    def gradients(self, grad: Tensor) -> tuple[Tensor, ...]:
        """One flat tensor a group of parameters."""


class EagerPass:
    """A forward pass, and on demand its backward pass: `gradients` gives one flat tensor a group of parameters."""

    def __init__(self, encoder: nn.Module, members: list[list[nn.Parameter]], inputs: tuple[Tensor, ...]) -> None:
        with torch.enable_grad():
            self._of_graph = encoder(*inputs)
        self.features, self._members = self._of_graph.detach(), members

    def gradients(self, grad: Tensor, into: Sequence[Tensor | None] | None = None) -> tuple[Tensor, ...]:
        """`into`: the tensors to write them to, or new ones."""
        parameters = [parameter for group in self._members for parameter in group]
        # A parameter that the features do not depend on counts as one with a gradient of zero.
        grads = iter(torch.autograd.grad(self._of_graph, parameters, grad, allow_unused=True, materialize_grads=True))
        del self._of_graph
        places = into or [None] * len(self._members)
        return tuple(
            torch.cat([next(grads).reshape(-1) for _ in group], out=place)
            for group, place in zip(self._members, places)
        )


class _Recording:
    """The two graphs of inputs of one shape. What they read and write stays in its place."""

    def __init__(self, recorder: Recorder, inputs: tuple[Tensor, ...]) -> None:
        self.inputs = tuple(tensor.clone() for tensor in inputs)
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        # Threads of the loaders and of NCCL call CUDA meanwhile.
        capture = partial(
            torch.cuda.graph, pool=recorder.pool, stream=recorder.stream, capture_error_mode="thread_local"
        )
        with capture(self.forward):
            run = EagerPass(recorder.encoder, recorder.members, self.inputs)
        self.features, self.grad = run.features, torch.empty_like(run.features)
        with capture(self.backward):
            run.gradients(self.grad, into=recorder.gradients)


class _Replay:
    """A pass of recorded graphs."""

    def __init__(self, recorder: Recorder, recording: _Recording, inputs: tuple[Tensor, ...]) -> None:
        self._recorder, self._recording = recorder, recording
        for own, given in zip(recording.inputs, inputs):
            own.copy_(given)
        recording.forward.replay()
        # Whoever keeps them must not see the next batch's.
        self.features = recording.features.clone()

    def gradients(self, grad: Tensor) -> tuple[Tensor, ...]:
        self._recording.grad.copy_(grad)
        self._recording.backward.replay()
        made = self._recorder.gradients
        return tuple(made) if self._recorder.used_up else tuple(flat.clone() for flat in made)


class Recorder:
    """Passes of `encoder`, as graphs where inputs of their shape were recorded.

    All recordings share their memory: between a forward pass and its backward pass no other one may run, and none does.

    Args:
        encoder: its parameters stay where they are; in training mode.
        members: its trained parameters, in groups.
        used_up: whoever gets gradients is through with them before the next backward pass, which writes over them.
    Raises CannotCapture for an encoder that is known to change from call to call.
    """

    def __init__(self, encoder: nn.Module, members: list[list[nn.Parameter]], *, used_up: bool = False) -> None:
        settings = getattr(getattr(encoder, "backbone", None), "config", None)
        if any(getattr(settings, name, 0) for name in _DRAWS):
            raise CannotCapture("it leaves out layers at random")
        self.encoder, self.members, self.used_up = encoder, members, used_up
        self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        self.gradients = [torch.cat([torch.empty_like(p).reshape(-1) for p in group]) for group in members]
        self.bytes = 0  # of GPU memory that the recordings share
        self._recordings: dict[tuple[torch.Size, ...], _Recording] = {}
        self._open: weakref.ref[_Replay] | None = None

    def run(self, inputs: tuple[Tensor, ...]) -> Pass:
        """The forward pass of `inputs`."""
        recording = self._recordings.get(tuple(tensor.shape for tensor in inputs))
        waiting = (
            self._open is not None and self._open() is not None
        )  # for its backward pass, whose memory another would take
        if recording is None or waiting:
            return EagerPass(self.encoder, self.members, inputs)
        replay = _Replay(self, recording, inputs)
        self._open = weakref.ref(replay)
        return replay

    @torch.no_grad()
    def record(self, shapes: list[tuple[Tensor, ...]]) -> None:
        """Record inputs of these shapes, the largest first. Raises CannotCapture."""
        for inputs in shapes:  # the first pass of a shape loads and plans what a recording must find ready
            run = EagerPass(self.encoder, self.members, inputs)
            run.gradients(torch.zeros_like(run.features), into=self.gradients)
            del run
        stream = torch.cuda.current_stream()
        try:
            for inputs in shapes:  # in the largest's memory the others find room
                self._recordings[tuple(tensor.shape for tensor in inputs)] = _Recording(self, inputs)
        except RuntimeError as error:
            raise CannotCapture(str(error).strip().splitlines()[0]) from error
        finally:
            torch.cuda.set_stream(stream)  # after an error it is still the recorder's
        self._compare(shapes[-1])
        self.bytes = sum(
            segment["total_size"]
            for segment in torch.cuda.memory_snapshot()
            if tuple(segment["segment_pool_id"]) == tuple(self.pool)
        )

    def _compare(self, inputs: tuple[Tensor, ...]) -> None:
        """CannotCapture if a replay, draws included, is not what it repeats."""
        features = []
        draws = torch.cuda.get_rng_state()
        for run in (lambda: EagerPass(self.encoder, self.members, inputs), lambda: self.run(inputs)):
            torch.cuda.set_rng_state(draws)
            features.append(run().features.float())
        off = (features[1] - features[0]).norm() / features[0].norm()
        if not off <= _TOLERANCE:  # nan is refused too
            raise CannotCapture(f"a replay is off by {float(off):.2g}")
