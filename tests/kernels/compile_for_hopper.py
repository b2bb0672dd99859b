"""Started by test_compiles.py: compiles what a head's step and ranking launch on an H100, without one, and runs nothing.

Prints a line for each launch that fails: the case, the kernel, the compiler's error; then how many kernels there were.
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
DENSE, SPREAD, GROUPS, LARGE_GROUPS = (None, 1), (12, 1), (12, 16), (128, 200)  # (fan_in, group_size)
CASES = [
    # A tile of features or less, and texts of a tile; many tiles; a last one that is short. Where the chip spreads rows they are
    # trained as dense ones: by the same kernels.
    *itertools.product([DENSE, SPREAD, GROUPS], [(48, 37)], [torch.float32, torch.bfloat16]),
    *itertools.product([SPREAD, GROUPS, LARGE_GROUPS], [(768, 128)], [torch.bfloat16]),
    *itertools.product([DENSE, SPREAD], [(1021, 300)], [torch.bfloat16]),
    *itertools.product([DENSE], [(64, 256), (4096, 32)], [torch.bfloat16]),
]
OPTIMIZERS = {37: SGD(), 128: SGD(momentum=0.9), 256: AdamW(), 300: RowwiseRMSprop(), 32: SGD(momentum=0.9)}  # by texts


class Hopper:
    """What Triton asks of a driver before it launches."""

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
        # What was never computed holds any numbers, block numbers too: ranks, but for the kernels, mean nothing.
        head.topk(feat, 5, labels, counts)
        # With nothing to skip it is the same kernel less a part, but for the larger tile of 256 texts.
        if texts in (37, 256):
            head.topk(feat, 5)
    print(len(kernels), "kernels")


if __name__ == "__main__":
    triton.knobs.runtime.interpret = False
    os.environ["TRITON_INTERPRET"] = "1"  # without a GPU the backend is for the interpreter alone
    main()
