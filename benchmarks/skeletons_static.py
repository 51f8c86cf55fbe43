"""The skeletons of contractions, compiled for four architectures: matrix instructions and spills.

Each skeleton in its default configuration, at the shapes of a 7B model, for sm_80, sm_90, sm_100 and
gfx942. Expected are the architecture's matrix instruction, read from the binary, shared memory that
fits and, on sm_90, no spilled registers. No GPU is needed, so nothing is timed.

    python benchmarks/skeletons_static.py [--quick] [--json FILE]
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace

from rich.console import Console
from rich.table import Table
from rows import Row, arguments, finish, show

from weft.codegen import formats
from weft.codegen.attention import Attention, attention_source, default_attention_tile
from weft.codegen.binary import Resources
from weft.codegen.compile import compile_kernel
from weft.codegen.expr import Graph
from weft.codegen.gemm import Gemm, Result, default_tile, gemm_source
from weft.codegen.hole import Tensor, leaf
from weft.codegen.linear_loss import LinearLoss, linear_loss_gradient_source, linear_loss_source
from weft.codegen.pointwise import gelu
from weft.codegen.source import KernelSource
from weft.ir.errors import CompileError

#: matrix instructions: mma of Ampere, wgmma of Hopper, tcgen05 of Blackwell, mfma of CDNA 3
MATRIX = {"cuda:80": ("HMMA", "IMMA"), "cuda:90": ("HGMMA", "IGMMA", "QGMMA"),
          "cuda:100": ("UTCHMMA", "UTCIMMA", "UTCQMMA"), "hip:gfx942": ("v_mfma",)}  # fmt: skip
#: shared memory of a program, bytes: CUDA C++ programming guide, table of compute capabilities; CDNA 3
SHARED = {"cuda:80": 163 << 10, "cuda:90": 227 << 10, "cuda:100": 227 << 10, "hip:gfx942": 64 << 10}
#: skeletons that an architecture has no kernel for, and those with another instruction
REASONS = {
    ("cuda:80", "fp8"): "sm_80 has no e4m3",
    ("cuda:80", "fp8 weights"): "sm_80 has no e4m3",
    ("cuda:90", "decode"): "16 heads are a quarter of wgmma's rows: mma",
    ("cuda:100", "decode"): "16 heads are an eighth of tcgen05's rows: mma",
}
#: the gradients keep more tiles at once; their spills are shown
FORWARD_ONLY = ("dq", "dkdv")

Maker = Callable[[str], KernelSource]


def products() -> dict[str, Maker]:
    """The matrix products, by name."""
    graph = Graph()
    bias, residual = Tensor("bias", "bf16", rows=False), Tensor("residual", "bf16")
    rstd, gain = Tensor("rstd", "f32", column=False), Tensor("gain", "bf16", rows=False)
    value = gelu(graph, leaf(graph, "acc") + bias.load(graph), "tanh") + residual.load(graph)
    result = (Result("c", "bf16", value),)
    square = Gemm("product", 4096, 4096, 4096, "bf16", result, (bias, residual))
    few = replace(square, m=16)
    prologue = leaf(graph, "a") * rstd.load(graph) * gain.load(graph)
    specs = {
        "plain": replace(square, results=(*result, replace(result[0], name="d"))),
        "persistent": square,
        "prologue": replace(square, a_prologue=prologue, tensors=(bias, residual, rstd, gain)),
        "experts": replace(square, groups=8, indexed=True, b_order="kn"),
        "few rows": few,
        "int8 weights": replace(few, format=formats.INT8),
        "int4 weights": replace(few, format=formats.int4()),
        "int4 weights, 64 rows": replace(few, m=64, format=formats.int4()),
        "fp8 weights": replace(few, format=formats.FP8),
        "w8a8": replace(square, dtype="i8", format=formats.INT8, a_scaled=True),
        "fp8": replace(square, dtype="f8e4m3", format=formats.FP8, a_scaled=True),
    }
    made: dict[str, Maker] = {
        name: lambda target, spec=spec: gemm_source(spec, default_tile(spec, target))  # type: ignore[misc]
        for name, spec in specs.items()
    }
    made["split k"] = lambda target: gemm_source(few, replace(default_tile(few, target), splits=4))
    return made


def others() -> dict[str, Maker]:
    """Attention, and the linear layer with cross-entropy."""
    made: dict[str, Maker] = {}
    for kind in ("forward", "dq", "dkdv", "decode"):
        spec = Attention(kind, kind, "bf16", 32, 8, 4096, 4096, 128, 128, causal=kind != "decode")
        made[kind] = lambda target, spec=spec: attention_source(  # type: ignore[misc]
            spec, default_attention_tile(spec, target)
        )
    loss = LinearLoss("loss", 8192, 128256, 4096, "bf16")
    made["linear loss"] = lambda target: linear_loss_source(loss)
    made["linear loss, gradient"] = lambda target: linear_loss_gradient_source(loss)
    return made


def rows_of(name: str, target: str, needs: Resources) -> list[Row]:
    """What is expected of a kernel."""
    expected = MATRIX[target] if (target, name) not in REASONS else ("HMMA",)
    missing = int(not needs.matrix.startswith(expected))
    rows = [
        Row(f"{name}, {target}: without the matrix instruction", missing, "kernels", 0,
            " or ".join(expected)),
        Row(f"{name}, {target}: shared memory", needs.shared_bytes, "bytes", SHARED[target], target),
    ]  # fmt: skip
    strict = target == "cuda:90" and name not in FORWARD_ONLY
    limit = 0 if strict else None
    return [*rows, Row(f"{name}, {target}: spills", needs.spill_bytes, "bytes a thread", limit)]


def main() -> int:
    """Compile, print, write; 1 when a target is missed."""
    options = arguments(__doc__, "sm_90 only").parse_args()
    table = Table("skeleton", "target", "instruction", "registers", "spills", "shared", "copies")
    rows = []
    for name, make in {**products(), **others()}.items():
        for target in ("cuda:90",) if options.quick else MATRIX:
            try:
                needs = compile_kernel(make(target), target).resources
            except CompileError as error:
                reason = REASONS.get((target, name))
                table.add_row(name, target, reason or str(error.reason)[:60])
                if reason is None:
                    rows.append(Row(f"{name}, {target}: does not compile", 1, "kernels", 0))
                continue
            counts = (needs.registers, needs.spill_bytes, needs.shared_bytes, needs.async_copies)
            table.add_row(name, target, needs.matrix, *map(str, counts))
            rows += rows_of(name, target, needs)
    Console(width=130).print(table)
    show([row for row in rows if row.holds is False])
    return finish(rows, options.json)


if __name__ == "__main__":
    sys.exit(main())
