"""Generates CUDA C++ functions for the warpgroup matrix instructions, which name every register and exist once for each width."""

from __future__ import annotations

_FUNCTION = """
template <{flags}>
__device__ __forceinline__ void multiply(float (&c)[{sums}][4], {a}, uint64_t b, bool add) {{
    asm volatile(
        "{{\\n.reg .pred p;\\nsetp.ne.b32 p, %{add}, 0;\\n"
        "wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.bf16.bf16 {{{c_names}}}, {a_names}, %{b}, p, 1, 1{transposed};\\n}}"
        : {outputs} : {a_inputs}, "l"(b), "r"(int(add)){constants});
}}
"""


def _function(columns: int, a_in_registers: bool) -> str:
    sums = columns // 2  # registers in each thread
    of_a = 4 if a_in_registers else 1
    b, add = sums + of_a, sums + of_a + 1
    flags = ["B_TRANSPOSED"] if a_in_registers else ["A_TRANSPOSED", "B_TRANSPOSED"]
    names = [f"%{i}" for i in range(add + 1 + len(flags))]
    a_names = ",".join(names[sums:b])
    return _FUNCTION.format(
        flags=", ".join(f"bool {flag}" for flag in flags), sums=columns // 8, columns=columns, add=add, b=b,
        a="const uint32_t (&a)[4]" if a_in_registers else "uint64_t a",
        c_names=",".join(names[:sums]), a_names=f"{{{a_names}}}" if a_in_registers else a_names,
        transposed="".join(f", {name}" for name in names[add + 1 :]),
        outputs=", ".join(f'"+f"(c[{i // 4}][{i % 4}])' for i in range(sums)),
        a_inputs=", ".join(f'"r"(a[{i}])' for i in range(4)) if a_in_registers else '"l"(a)',
        constants="".join(f', "n"(int({flag}))' for flag in flags),
    )  # fmt: skip


def header() -> str:
    """Return the text of wgmma.cuh: `multiply` adds A B to c, 64 rows, 16 deep.

    A and B are descriptors (`matrix` in operands.cuh). A may be in registers: each warp's 16 rows, laid out as for mma.m16n8k16.
    """
    return "".join([*(_function(columns, False) for columns in (64, 128, 192, 256)), _function(64, True)])
