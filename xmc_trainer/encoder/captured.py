"""An encoder's forward and backward passes as CUDA graphs.

A step of BERT makes some 1,500 kernel launches, and launching them takes longer than running them. A graph is a single launch.
Each graph serves inputs of one shape. Frequent shapes are recorded before training; other shapes run without a graph.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Protocol

import torch
from torch import Tensor, nn

# A replay runs the same kernels on the same numbers. A frozen branch or random draw makes a far larger difference.
_TOLERANCE = 1e-2
# Settings of backbones that skip layers at random. Python draws them, so a graph would repeat one draw.
_DRAWS = ("layerdrop", "encoder_layerdrop")


class CannotCapture(RuntimeError):
    """The encoder's passes cannot be recorded; the message says why."""


class Pass(Protocol):
    """A forward pass that waits for its backward pass."""

    features: Tensor

    def gradients(self, grad: Tensor) -> tuple[Tensor, ...]:
        """One flat tensor a group of parameters."""


class EagerPass:
    """A forward pass as ordinary launches. `gradients` runs its backward pass, once."""

    def __init__(self, encoder: nn.Module, members: list[list[nn.Parameter]], inputs: tuple[Tensor, ...]) -> None:
        with torch.enable_grad():
            self._of_graph = encoder(*inputs)
        self.features, self._members = self._of_graph.detach(), members

    def gradients(self, grad: Tensor, into: Sequence[Tensor | None] | None = None) -> tuple[Tensor, ...]:
        """Return one flat gradient per group of parameters. `into`: tensors to write them to; default: new ones."""
        parameters = [parameter for group in self._members for parameter in group]
        # The gradient of a parameter that the features do not depend on is zero.
        grads = iter(torch.autograd.grad(self._of_graph, parameters, grad, allow_unused=True, materialize_grads=True))
        del self._of_graph
        places = into or [None] * len(self._members)
        return tuple(
            torch.cat([next(grads).reshape(-1) for _ in group], out=place)
            for group, place in zip(self._members, places)
        )


@contextmanager
def _recorded(graph: torch.cuda.CUDAGraph, pool: Any, stream: torch.cuda.Stream) -> Iterator[None]:
    """Record the block's launches as `graph`, with its memory in `pool`. After an error other launches work as before."""
    with torch.cuda.stream(stream):
        # thread_local: loader and NCCL threads may call CUDA during the recording.
        graph.capture_begin(pool, capture_error_mode="thread_local")
        try:
            yield
            graph.capture_end()
        except BaseException:
            _abandon(graph, pool)
            raise


def _abandon(graph: torch.cuda.CUDAGraph, pool: Any) -> None:
    """End a recording that failed."""
    device = torch.cuda.current_device()
    try:
        graph.capture_end()
    except RuntimeError:  # torch raises at the first thing that went wrong, and leaves the rest undone
        with suppress(RuntimeError):  # if it came that far
            torch._C._cuda_endAllocateToPool(device, pool)
            torch._C._cuda_releasePool(device, pool)
    # The generator still takes every draw for a recorded one. A copy of its state does not.
    generator = torch.cuda.default_generators[device]
    generator.graphsafe_set_state(generator.clone_state())


class _Recording:
    """The graphs of both passes for inputs of one shape. Their input and output tensors keep their addresses."""

    def __init__(self, recorder: Recorder, inputs: tuple[Tensor, ...]) -> None:
        self.inputs = tuple(tensor.clone() for tensor in inputs)
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with _recorded(self.forward, recorder.pool, recorder.stream):
            run = EagerPass(recorder.encoder, recorder.members, self.inputs)
        self.features, self.grad = run.features, torch.empty_like(run.features)
        with _recorded(self.backward, recorder.pool, recorder.stream):
            run.gradients(self.grad, into=recorder.gradients)


class _Replay:
    """A forward pass by a recorded graph. `gradients` replays the backward pass."""

    def __init__(self, recorder: Recorder, recording: _Recording, inputs: tuple[Tensor, ...]) -> None:
        self._recorder, self._recording = recorder, recording
        for own, given in zip(recording.inputs, inputs):
            own.copy_(given)
        recording.forward.replay()
        # The next replay overwrites the recording's tensor.
        self.features = recording.features.clone()

    def gradients(self, grad: Tensor) -> tuple[Tensor, ...]:
        self._recording.grad.copy_(grad)
        self._recording.backward.replay()
        made = self._recorder.gradients
        return tuple(made) if self._recorder.used_up else tuple(flat.clone() for flat in made)


class Recorder:
    """Runs an encoder's passes, as graphs if inputs of their shape were recorded.

    All recordings share one memory pool. So while a replay waits for its backward pass, other forward passes run
    without a graph.

    Args:
        encoder: in training mode. Its parameters must keep their addresses.
        members: its trained parameters, in groups.
        used_up: whether callers are done with gradients before the next backward pass; it overwrites them.
    Raises CannotCapture for an encoder that skips layers at random.
    """

    def __init__(self, encoder: nn.Module, members: list[list[nn.Parameter]], *, used_up: bool = False) -> None:
        settings = getattr(getattr(encoder, "backbone", None), "config", None)
        if any(getattr(settings, name, 0) for name in _DRAWS):
            raise CannotCapture("it skips layers at random")
        self.encoder, self.members, self.used_up = encoder, members, used_up
        self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        self.gradients = [torch.cat([torch.empty_like(p).reshape(-1) for p in group]) for group in members]
        self.bytes = 0  # GPU memory of the pool that the recordings share
        self._recordings: dict[tuple[torch.Size, ...], _Recording] = {}
        self._open: weakref.ref[_Replay] | None = None

    def run(self, inputs: tuple[Tensor, ...]) -> Pass:
        """Run the forward pass."""
        recording = self._recordings.get(tuple(tensor.shape for tensor in inputs))
        # A replay that still waits for its backward pass would lose its memory to another replay.
        waiting = self._open is not None and self._open() is not None
        if recording is None or waiting:
            return EagerPass(self.encoder, self.members, inputs)
        replay = _Replay(self, recording, inputs)
        self._open = weakref.ref(replay)
        return replay

    @torch.no_grad()
    def record(self, shapes: list[tuple[Tensor, ...]]) -> None:
        """Record graphs for inputs of these shapes, given largest first. Raises CannotCapture."""
        for inputs in shapes:  # the first pass of a shape loads and tunes kernels, which a recording cannot do
            run = EagerPass(self.encoder, self.members, inputs)
            run.gradients(torch.zeros_like(run.features), into=self.gradients)
            del run
        torch.cuda.synchronize()
        gc.collect()  # an older graph that is destroyed during a recording ends it
        torch.cuda.empty_cache()  # leave the memory to the graphs
        try:
            for inputs in shapes:  # largest first: the others reuse its memory
                self._recordings[tuple(tensor.shape for tensor in inputs)] = _Recording(self, inputs)
        except RuntimeError as error:
            raise CannotCapture(str(error).strip().splitlines()[0]) from error
        self._compare(shapes[-1])
        self.bytes = sum(
            segment["total_size"]
            for segment in torch.cuda.memory_snapshot()
            if tuple(segment["segment_pool_id"]) == tuple(self.pool)
        )

    def _compare(self, inputs: tuple[Tensor, ...]) -> None:
        """Raise CannotCapture if a replay with the same random state gives other features."""
        features = []
        draws = torch.cuda.get_rng_state()
        for run in (lambda: EagerPass(self.encoder, self.members, inputs), lambda: self.run(inputs)):
            torch.cuda.set_rng_state(draws)
            features.append(run().features.float())
        off = (features[1] - features[0]).norm() / features[0].norm()
        if not off <= _TOLERANCE:  # refuses nan too
            raise CannotCapture(f"a replay differs by {float(off):.2g}")
