"""The generated kernels of a Llama block's train step: what they move and what they need.

Traces forward and backward of one block at 7B shapes (bf16, batch 1, 2,048 tokens) without weights,
fuses it, and compiles every kernel for sm_90. Traffic is compared with the same ops run one by one,
each of which reads and writes memory, as eager PyTorch does for composed ops. No GPU is needed, so
nothing is timed.

    python benchmarks/kernels_static.py [--quick] [--json FILE]
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from llama import LLAMAS, Shape, on_meta
from rich.console import Console
from rich.table import Table
from rows import Row, arguments, finish, show, timed

from weft.codegen.compile import Binary, available, compile_kernel
from weft.codegen.contraction import contraction_of, contraction_source
from weft.codegen.emit import emit_kernels, kernel_functions
from weft.codegen.source import KernelSource, generate
from weft.frontend.train_step import trace_module_train
from weft.ir.module import Module
from weft.ir.types import Mesh
from weft.passes.fuse import fuse
from weft.passes.simplify import Simplify

TARGET = "cuda:90"
#: a thread may use at most 255 registers; at 128, 512 threads still fill a quarter of an SM
MAX_REGISTERS = 128
ROW_KINDS = ("flat", "tile", "persistent", "looped")
#: stack that the argument reduction of libdevice's sin and cos takes for itself
TRIGONOMETRY = 40
#: fused traffic of the whole block, as a part of the traffic of its ops one by one
MAX_TRAFFIC = 0.5


@dataclass(frozen=True)
class Kernel:
    """One kernel of the block, and how often the train step calls it."""

    source: KernelSource
    calls: int
    binary: Binary | None


def block(shape: Shape, tokens: int) -> Module:
    """The training-level program of a Llama with one block."""
    model, inputs = on_meta(shape, 1, tokens, torch.bfloat16)
    traced = trace_module_train(model, (), inputs, optimizer="adamw")
    return fuse(Simplify().run(traced.module).with_(mesh=Mesh((), "h100")))


def kernels_of(module: Module) -> list[Kernel]:
    """The kernels of a fused module, the ones that move most first."""
    calls: dict[str, int] = {}
    for _, op in module.walk():
        if op.name == "call":
            calls[str(op.attrs["callee"])] = calls.get(str(op.attrs["callee"]), 0) + 1
    out = []
    for function in kernel_functions(module):
        made = contraction_of(function) is not None
        source = contraction_source(function, module.mesh, TARGET) if made else generate(
            function, module.mesh
        )
        binary = compile_kernel(source, TARGET) if available() else None
        out.append(Kernel(source, calls[function.name], binary))
    return sorted(out, key=lambda kernel: -kernel.calls * kernel.source.bytes_moved)


def rows_of_block(kernels: list[Kernel]) -> list[Row]:
    """Traffic of the whole block."""
    moved = sum(k.calls * k.source.bytes_moved for k in kernels)
    unfused = sum(k.calls * k.source.bytes_unfused for k in kernels)
    reference = f"{unfused / 1e6:.0f} MB when each op is a kernel of its own"
    return [
        Row("block: fused traffic", moved / unfused, "of unfused", MAX_TRAFFIC, reference),
        Row("block: kernels", len(kernels), "kernels"),
    ]


def rows_of_time(module: Module) -> list[Row]:
    """Seconds to write the artifact's kernels for one architecture, and again from the cache."""
    rows = []
    with TemporaryDirectory() as name:
        for what, target in (("generate and compile", 60.0), ("from the cache", 5.0)):
            seconds, _ = timed(lambda: emit_kernels(
                module, Path(name, "kernels"), "h100", cache=Path(name, "cache")))  # fmt: skip
            rows.append(Row(f"block: {what}", seconds, "s", target, "the project's target"))
    return rows


def rows_of_kernels(kernels: list[Kernel]) -> list[Row]:
    """Traffic and, where Triton can build them, the needs of each kernel."""
    rows = []
    for kernel in kernels:
        source, name = kernel.source, kernel.source.name
        ratio = source.bytes_moved / source.bytes_unfused
        rows.append(Row(f"{name}: traffic", ratio, "of unfused", 1.0,
                        f"{source.bytes_unfused / 1e6:.0f} MB unfused"))  # fmt: skip
        if kernel.binary is not None:
            needs = kernel.binary.resources
            most = MAX_REGISTERS if source.kind in ROW_KINDS else 255  # sums fill the registers
            rows.append(Row(f"{name}: registers", needs.registers, "a thread", most,
                            "255 at most on sm_90"))  # fmt: skip
            allowed = TRIGONOMETRY if "tl.sin(" in source.text or "tl.cos(" in source.text else 0
            rows.append(Row(f"{name}: stack and spills", needs.spill_bytes, "bytes a thread",
                            allowed, TARGET))  # fmt: skip
    return rows


def show_kernels(kernels: list[Kernel]) -> None:
    """Print all kernels for people."""
    table = Table("kernel", "walks", "calls", "MB", "MB unfused", "registers", "spills", "shared")
    for kernel in kernels:
        source, needs = kernel.source, kernel.binary.resources if kernel.binary else None
        table.add_row(
            source.name, source.kind, str(kernel.calls), f"{source.bytes_moved / 1e6:.1f}",
            f"{source.bytes_unfused / 1e6:.1f}",
            *(map(str, (needs.registers, needs.spill_bytes, needs.shared_bytes)) if needs
              else ("no triton", "", "")),
        )  # fmt: skip
    Console(width=130).print(table)


def main() -> int:
    """Measure, print, write; 1 when a target is missed."""
    options = arguments(__doc__, "a small block").parse_args()
    full, small = LLAMAS["7B"]._replace(layers=1), Shape(512, 1376, 1, 8, 8, 32000)
    module = block(small, 256) if options.quick else block(full, 2048)
    times = rows_of_time(module) if available() else []
    kernels = kernels_of(module)
    show_kernels(kernels)
    block_rows, kernel_rows = rows_of_block(kernels) + times, rows_of_kernels(kernels)
    show([*block_rows, *(row for row in kernel_rows if row.holds is False)])
    return finish([*block_rows, *kernel_rows], options.json)


if __name__ == "__main__":
    sys.exit(main())
