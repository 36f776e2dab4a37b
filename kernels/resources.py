"""What each kernel takes of a GPU, without one: registers, shared memory and spills, compiled ahead of time.

    python -m dgfast.kernels.resources        # prints the table; exits with 1 if anything spills

`programs` is how many of a kernel's programs the registers of one multiprocessor hold at a time.

The options are those that the launchers choose, for layers of the CIFAR-10 and ImageNet-64 networks, channels-last.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dgfast.kernels import group_norm, tokens
from dgfast.kernels.attention import attention_kernel
from dgfast.kernels.attention_backward import attention_backward_keys_kernel, attention_backward_queries_kernel
from dgfast.kernels.group_norm_silu import group_norm_silu_kernel
from dgfast.kernels.group_norm_silu_backward import group_norm_silu_backward_kernel
from dgfast.kernels.tuning import ATTENTION, ATTENTION_BACKWARD, BACKWARD, FORWARD

ARCHITECTURES = (80, 90, 100)
LAYERS = ((128, 32), (256, 16), (384, 16), (512, 8), (192, 64))
"""Channels and image side, all in 32 groups of 4 to 16 channels: tiles held whole and looped over."""
HEADS = ((2, 1024, 64), (4, 256, 128))
"""Heads, tokens and channels a head of the attention layers: of the discriminator's trunk, and the widest heads."""

_POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16"}
_REGISTERS = 65536  # of one multiprocessor, on all three
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")


@dataclass(frozen=True)
class Case:
    """A kernel, its warps and stages, and the arguments of one launch, in which a dtype stands for a pointer to it."""

    kernel: Any
    name: str
    how: dict[str, int]
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Usage:
    """One row: registers, stack and local memory a thread (spills lie in the last two), shared bytes a program."""

    kernel: str
    case: str
    sm: int
    warps: int
    registers: int
    shared: int
    stack: int
    local: int
    programs: int


def cases() -> Iterator[Case]:
    """Every kernel at the types and shapes in which it will mostly run."""
    for dtype in (torch.bfloat16, torch.float32):
        for channels, side in LAYERS:
            yield from _group_norm_cases(dtype, channels, side)
    for heads, count, channels in HEADS:
        yield from _attention_cases(torch.bfloat16, heads, count, channels)


def _group_norm_cases(dtype: torch.dtype, channels: int, side: int) -> Iterator[Case]:
    name = f"{str(dtype).removeprefix('torch.')} {channels} x {side} x {side}"
    big, rows = ("x", "y", "grad", "dx"), ("weight", "bias", "scale", "shift", "channel_bias")
    pointers = dict.fromkeys(big + rows, dtype) | dict.fromkeys(("mean", "rstd"), torch.float32)
    scalars = {"scale_stride": 2 * channels, "shift_stride": 2 * channels, "channel_bias_stride": channels, "EPS": 1e-5}
    for kernel, limits in ((group_norm_silu_kernel, FORWARD), (group_norm_silu_backward_kernel, BACKWARD)):
        fixed = group_norm.options((1, channels, side, side), 32, dtype.itemsize, True, True, limits)
        yield _case(kernel, name, pointers | scalars | fixed)


def _attention_cases(dtype: torch.dtype, heads: int, count: int, channels: int) -> Iterator[Case]:
    name = f"{str(dtype).removeprefix('torch.')} {heads} x {count} x {channels}"
    pointers = dict.fromkeys(("grad", "qkv", "y", "dqkv"), dtype) | dict.fromkeys(("lse", "delta"), torch.float32)
    strides = tokens.strides(torch.empty(1, count, heads, 3, channels, device="meta").permute(3, 0, 2, 1, 4))
    scalars = dict(zip(("three_stride", "batch_stride", "head_stride", "token_stride"), strides, strict=True))
    for kernel, tiles in (
        (attention_kernel, ATTENTION),
        (attention_backward_queries_kernel, ATTENTION_BACKWARD),
        (attention_backward_keys_kernel, ATTENTION_BACKWARD),
    ):
        yield _case(kernel, name, pointers | scalars | tokens.options((3, 1, heads, count, channels), tiles))


def _case(kernel: Any, name: str, arguments: dict[str, Any]) -> Case:
    how: dict[str, int] = {}
    for option in ("num_warps", "num_stages"):
        if option in arguments:
            how[option] = arguments.pop(option)
    return Case(kernel, name, how, arguments)


def measure(case: Case, sm: int) -> Usage:
    """Compile one case for one architecture and read the usage from its machine code."""
    source = _source(case)
    options = case.how | {"enable_fp_fusion": True}  # Triton 3.9 warns unless it is said
    compiled = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        command = [str(tool), "--dump-resource-usage", cubin.name]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = _USAGE.search(printed)
    assert found is not None, printed
    registers, stack, local = (int(group) for group in found.groups())
    shared, warps = compiled.metadata.shared, case.how["num_warps"]
    programs = _REGISTERS // (-(-registers // 8) * 8 * 32 * warps)  # a thread gets a multiple of 8
    return Usage(source.name, case.name, sm, warps, registers, shared, stack, local, programs)


def _source(case: Case) -> Any:
    """The kernel as its launch would specialise it: pointers and numbers that 16 divides are marked as such."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    hints: dict[tuple[int, ...], Any] = {}
    for index, parameter in enumerate(case.kernel.params):
        value = case.arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        kind = _POINTERS[value] if isinstance(value, torch.dtype) else "i32"
        signature[parameter.name] = kind
        if kind.startswith("*") or (kind == "i32" and value % 16 == 0):
            hints[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(case.kernel, signature, constants, hints)


def main() -> int:
    """Print the table; 1 if anything spills."""
    rows = [measure(case, sm) for case in cases() for sm in ARCHITECTURES]
    table = [tuple(field.name for field in fields(Usage)), *(tuple(map(str, astuple(row))) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    return int(any(row.stack or row.local for row in rows))


if __name__ == "__main__":
    sys.exit(main())
