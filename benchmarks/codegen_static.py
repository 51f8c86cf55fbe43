"""Kernels of twenty regions next to what torch.compile's Inductor emits for them, without a GPU.

    python benchmarks/codegen_static.py [--quick] [--json FILE]

Ten regions of Llama-7B, GPT-2, Mixtral and ViT between their matrix products, forward and backward (the
gradients of the inputs from inputs and cotangents, so that both compilers are free in what they
compute again). Counted are kernel launches, library calls among them, and bytes moved, each tensor
of a kernel once; compiled for sm_90 are registers, spills and shared memory, the most of any kernel.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from inductor_triton import emit, pretend
from regions import REGIONS, Region, backward_of, outputs_of, weft_module
from rich.console import Console
from rich.table import Table
from rows import Row, arguments, finish, show

from weft.codegen.binary import Resources
from weft.codegen.compile import compile_kernels
from weft.codegen.emit import kernel_functions
from weft.codegen.source import KernelSource, generate
from weft.ir.errors import CompileError
from weft.ir.module import Module
from weft.passes.traffic import Traffic, traffic_of

TARGET = "cuda:90"


@dataclass(frozen=True)
class Made:
    """What a compiler makes of a region."""

    launches: int
    bytes_moved: int
    needs: tuple[Resources, ...]


def by_weft(region: Region, *, backward: bool) -> Made:
    """What weft launches: kernels, the library's sums behind kernels, ops outside of kernels."""
    module = weft_module(region, backward=backward)
    calls = [str(op.attrs["callee"]) for op in module.entry.ops if op.name == "call"]
    sources = {f.name: generate(f) for f in kernel_functions(module)}
    traffic = Traffic()
    for found in traffic_of(module).values():
        traffic.add(found)
    outside = sum(bool(t) for t in outside_of(module))
    launches = outside + sum(1 + sources[name].launches_behind for name in calls)
    moved = traffic.moved + sum(sources[name].bytes_behind for name in calls)
    return Made(launches, moved, needs_of([sources[name] for name in dict.fromkeys(calls)]))


def outside_of(module: Module) -> list[int]:
    """Bytes of each op that runs by itself."""
    rest = module.entry.with_(ops=())
    out = []
    for op in module.entry.ops:
        if op.name != "call":
            alone = module.with_(functions=(rest.with_(ops=(op,)),))
            out.append(sum(t.moved for t in traffic_of(alone).values()))
    return out


def needs_of(sources: Sequence[KernelSource]) -> tuple[Resources, ...]:
    """The needs of kernels. Raises CompileError where one cannot be built."""
    found = []
    for binary in compile_kernels(list(sources), TARGET):
        if isinstance(binary, CompileError):
            raise binary
        found.append(binary.resources)
    return tuple(found)


def by_inductor(region: Region, *, backward: bool) -> Made:
    """What Inductor launches."""
    inputs = region.inputs()
    if not backward:
        emitted = emit(region.function, [x.detach() for x in inputs])
    else:
        outputs = outputs_of(region.function(*inputs))
        cotangents = [torch.empty_like(x).detach() for x in outputs]
        emitted = emit(backward_of(region), [x.detach() for x in (*inputs, *cotangents)])
    return Made(emitted.launches, emitted.bytes_moved, emitted.needs)


def most(needs: Sequence[Resources], field: str) -> int:
    return max((getattr(need, field) for need in needs), default=0)


def main() -> int:
    """Compare, print, write; 1 when a target is missed."""
    parser = arguments(__doc__, "four regions")
    parser.add_argument("--only", default="", metavar="NAME", help="regions whose name begins so")
    options = parser.parse_args()
    table = Table("region", *(f"{what}{who}" for what in ("launches", "MB", "registers", "spills",
                                                          "shared") for who in (" weft", " Ind.")))
    rows, fewer = [], 0
    named = [region for region in REGIONS if region.function.__name__.startswith(options.only)]
    regions = [(region, back) for region in named for back in (False, True)]
    regions = regions[:4] if options.quick else regions
    ours = [by_weft(region, backward=back) for region, back in regions]
    pretend()  # from here on torch believes that there is a GPU
    for (region, back), mine in zip(regions, ours, strict=True):
        name = f"{region.function.__name__} {'backward' if back else 'forward'}"
        theirs = by_inductor(region, backward=back)
        cells = [str(mine.launches), str(theirs.launches),
                 f"{mine.bytes_moved / 1e6:.1f}", f"{theirs.bytes_moved / 1e6:.1f}"]  # fmt: skip
        for field in ("registers", "spill_bytes", "shared_bytes"):
            cells += [str(most(mine.needs, field)), str(most(theirs.needs, field))]
        table.add_row(name, *cells)
        fewer += mine.launches < theirs.launches or mine.bytes_moved < 0.99 * theirs.bytes_moved
        rows.append(Row(f"{name}: launches", mine.launches, "", theirs.launches, "Inductor"))
        # 1 %: scalars and paddings are counted in different ways
        rows.append(Row(f"{name}: bytes", mine.bytes_moved / theirs.bytes_moved, "of Inductor's",
                        1.01, f"{theirs.bytes_moved / 1e6:.1f} MB"))  # fmt: skip
    count = len(rows) // 2
    rows.append(Row("regions without fewer launches or bytes", (count - fewer) / count,
                    "of all", 0.5, "Inductor"))  # fmt: skip
    Console(width=190).print(table)
    show([row for row in rows if row.holds is False])
    return finish(rows, options.json)


if __name__ == "__main__":
    sys.exit(main())
