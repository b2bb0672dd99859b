"""Compiles the Triton kernels that a head's step and ranking launch on an H100, without a GPU. test_compiles.py starts it.

Prints a line for each launch that fails (case, kernel, compiler's error), then the number of kernels compiled.
"""

from __future__ import annotations

import itertools
import os

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import jit
from triton.runtime.driver import driver

from xmc_trainer.head import SGD, AdamW, FixedFanInHead, RowwiseRMSprop

SHARED_MEMORY = 227 << 10  # bytes a block may have
DENSE, SPARSE, GROUPS, LARGE_GROUPS = (None, 1), (12, 1), (12, 16), (128, 200)  # (fan_in, group_size)
CASES = [
    # At most one tile of features and texts; many tiles; a short last tile. Sparse rows of many features use the kernels of dense ones.
    *itertools.product([DENSE, SPARSE, GROUPS], [(48, 37)], [torch.float32, torch.bfloat16]),
    *itertools.product([SPARSE, GROUPS, LARGE_GROUPS], [(768, 128)], [torch.bfloat16]),
    *itertools.product([DENSE, SPARSE], [(1021, 300)], [torch.bfloat16]),
    *itertools.product([DENSE], [(64, 256), (4096, 32)], [torch.bfloat16]),
]
OPTIMIZERS = {37: SGD(), 128: SGD(momentum=0.9), 256: AdamW(), 300: RowwiseRMSprop(), 32: SGD(momentum=0.9)}  # by texts


class Hopper:
    """The part of a Triton driver that a launch needs."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def main() -> None:
    driver.set_active(Hopper())
    launch, kernels, case = jit.JITFunction.run, set(), None

    def compile_only(self, *arguments, grid, warmup=False, **options):
        try:
            kernel = launch(self, *arguments, grid=grid, warmup=True, **options)
        except Exception as error:
            print(f"{case}: {self.__name__}: {type(error).__name__}: {error}", flush=True)
            return
        kernels.add((self.__name__, kernel.hash))
        if kernel.metadata.shared > SHARED_MEMORY:
            print(f"{case}: {self.__name__}: {kernel.metadata.shared} bytes of shared memory", flush=True)

    jit.JITFunction.run = compile_only
    for case in CASES:
        (fan_in, group_size), (features, texts), dtype = case
        head = FixedFanInHead(
            features, 300, fan_in=fan_in, group_size=group_size, backend="triton", product_dtype=dtype, weight_dtype=dtype,
            optimizer=OPTIMIZERS[texts], loss="squared_hinge" if texts == 37 else "bce",
        )  # fmt: skip
        feat = torch.zeros(texts, features)
        labels, counts = torch.zeros(texts, dtype=torch.int64), torch.ones(texts, dtype=torch.int64)
        head(feat, labels, counts)
        # Nothing is computed, so the ranks mean nothing; only the launches count.
        head.topk(feat, 5, labels, counts)
        # Without labels to skip, a ranking differs much only at 256 texts, where the tile is larger.
        if texts in (37, 256):
            head.topk(feat, 5)
    print(len(kernels), "kernels")


if __name__ == "__main__":
    triton.knobs.runtime.interpret = False
    os.environ["TRITON_INTERPRET"] = "1"  # without a GPU, dispatch accepts "triton" only for the interpreter
    main()
