"""Configurations of a row kernel, chosen without a GPU.

Tiles and warps around the default are compiled. What spills, does not fit the device or leaves an SM
without a program is dropped; the others are ranked by what the compiler's report says of them:

    time = bytes moved / bandwidth * waves / (programs / programs that run at the same time)

where the last wave of programs takes as long as a full one, and among equal ones (2 %) the first has
most bytes on their way in an SM. Long rows that are read again count once: the L2 cache has them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path

from ..costmodel.datasheet import Datasheet
from ..ir.errors import CompileError
from ..ir.module import Function
from ..ir.types import DTYPES, Mesh
from .compile import Binary, compile_kernels
from .kernel import Kernel, build
from .layout import Layout, column_length, layout, local_size
from .source import KernelSource, generate

#: of an SM of compute capability 8.0 and 9.0 (CUDA C++ programming guide, technical specifications)
_REGISTERS, _THREADS, _PROGRAMS = 65536, 2048, 32
#: times that are the same to the model
_EQUAL = 0.02


@dataclass(frozen=True)
class Candidate:
    """A configuration that may be the best.

    Attributes:
        source, binary: the kernel.
        programs: that run on an SM at the same time.
        bytes_in_flight: of loads in an SM.
        predicted_us: time on the largest rank.
    """

    source: KernelSource
    binary: Binary
    programs: int
    bytes_in_flight: int
    predicted_us: float

    def described(self) -> dict[str, object]:
        """What the manifest says of it."""
        needs = self.binary.resources
        return {
            "constants": self.source.constants, "warps": self.source.warps,
            "registers": needs.registers, "shared_bytes": needs.shared_bytes,
            "programs_of_an_sm": self.programs, "bytes_in_flight": self.bytes_in_flight,
            "predicted_us": round(self.predicted_us, 3),
        }  # fmt: skip


def candidates(
    function: Function, mesh: Mesh | None, target: str, sheet: Datasheet, *, keep: int = 3,
    cache: Path | None = None,
) -> list[Candidate]:  # fmt: skip
    """The best configurations of a row kernel, best first; [] where none compiles without spills.

    Raises CompileError W0901 where the kernel cannot be generated.
    """
    kernel = build(function)
    plans = list(dict.fromkeys(_around(layout(kernel, mesh))))
    sources = [generate(function, mesh, plan=plan) for plan in plans]
    found = []
    compiled = compile_kernels(sources, target, cache)
    for plan, source, binary in zip(plans, sources, compiled, strict=True):
        if isinstance(binary, CompileError) or binary.resources.spill_bytes:
            continue
        if candidate := _candidate(kernel, plan, source, binary, mesh, sheet):
            found.append(candidate)
    if not found:
        return []
    least = min(c.predicted_us for c in found)

    def rank(c: Candidate) -> tuple[int, int]:
        return int((c.predicted_us / least - 1) / _EQUAL), -c.bytes_in_flight

    return sorted(found, key=rank)[:keep]


def _around(plan: Layout) -> Iterator[Layout]:
    """Layouts like the default with more and with fewer rows, columns and warps."""
    for more in (1, 2, 4):
        for warps in (4, 8, 16):
            if plan.kind in ("persistent", "tile"):
                yield replace(plan, block_m=plan.block_m * more, warps=warps)
            else:
                yield replace(plan, block_n=plan.block_n * more, warps=warps)


def _candidate(
    kernel: Kernel, plan: Layout, source: KernelSource, binary: Binary, mesh: Mesh | None,
    sheet: Datasheet,
) -> Candidate | None:  # fmt: skip
    """A compiled configuration with its time; None where no program fits an SM."""
    needs = binary.resources
    limits = [_PROGRAMS, _THREADS // binary.threads]
    limits.append(_REGISTERS // max(1, needs.registers * binary.threads))
    if needs.shared_bytes:
        limits.append(int(sheet.smem_kb * 1024) // needs.shared_bytes)
    resident = min(limits)
    if not resident:
        return None
    rows = 1
    for dims in plan.groups:
        for dim in dims:
            rows *= local_size(kernel.space.rows[dim], mesh)
    blocks = ceil(rows / plan.block_m)
    programs = min(plan.strips, blocks) if plan.strips else blocks
    if plan.kind in ("flat", "tile"):
        programs *= ceil(plan.columns / plan.block_n)
    loaded = sum(
        DTYPES[value.type.dtype] * plan.block_m * plan.block_n
        for _, value in kernel.params
        if column_length(kernel, value)
    )
    share = programs / (resident * sheet.sms)
    moved = source.bytes_moved / (mesh.size if mesh is not None else 1)
    time_us = moved / (sheet.mem_gbs * 1e3) * ceil(share) / share
    return Candidate(source, binary, resident, resident * loaded, time_us)
