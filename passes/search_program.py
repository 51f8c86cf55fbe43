"""The program that the outer search places: shortened, for each number of micro-batches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf

import numpy as np

from ..costmodel.cluster import Cluster
from ..costmodel.estimate import VIEWS, launch_of, op_time_us
from ..ir.errors import CompileError
from ..ir.module import Module, Op
from ..ir.types import Mesh, local_bytes
from .micro import LOOP, time_split
from .place_body import PERSISTENT
from .search_costs import Array
from .search_layouts import Layout
from .search_short import FIRST, LAST, Short, shorten
from .search_units import units_of
from .stages import cut


@dataclass(frozen=True)
class Program:
    """The shortened program for one number of micro-batches.

    Attributes:
        module: logical, of one micro-batch.
        phases: of each op of its entry.
        unit_of: by the first result of each op, -1 for those that follow others.
        units: their number.
    """

    module: Module
    phases: tuple[str, ...]
    unit_of: Mapping[str, int]
    units: int


class Programs:
    """A train step, its units, its short form, and the micro-batches of that.

    Args:
        first, last: blocks that are kept at the ends of a chain of equal ones.

    Attributes:
        module: the whole program.
        units: of the whole program.
        rows: of the whole batch.
        short: what is placed in its stead.
    """

    def __init__(self, module: Module, first: int = FIRST, last: int = LAST) -> None:
        self.module = module
        whole = time_split(module, 1)
        self.units, self.rows = units_of(whole), whole.batch
        short = shorten(whole, self.units, first, last)
        self.short = short or Short(module, tuple(range(self.units.count)), 1.0)
        self._known: dict[int, Program | CompileError] = {}
        self._alone: Array | None = None

    def of(self, micro: int) -> Program:
        """The short program of one of `micro` micro-batches. Raises CompileError W0404."""
        if micro not in self._known:
            try:
                self._known[micro] = self._split(micro)
            except CompileError as error:
                self._known[micro] = error
        found = self._known[micro]
        if isinstance(found, CompileError):
            raise found
        return found

    def can_split(self, micro: int) -> bool:
        """Are there so many micro-batches?"""
        try:
            self.of(micro)
        except CompileError as error:
            if error.code != "W0404":
                raise
            return False
        return True

    def _split(self, micro: int) -> Program:
        split = time_split(self.short.module, micro)
        units = units_of(split)
        stage = cut(split, [0] * len(split.phases))[0]
        ops = split.module.entry.ops
        unit_of = {op.results[0].name: unit for op, unit in zip(ops, units.stage_of, strict=True)}
        return Program(stage.module, stage.phases, unit_of, units.count)

    def stored_bytes(self) -> float:
        """Parameters, buffers and optimizer states of the whole program."""
        rows = zip(self.module.entry.params, self.module.entry.param_attrs, strict=True)
        kept = (value.type for value, attrs in rows if attrs.get("role") in PERSISTENT)
        return float(sum(local_bytes(t, Mesh()) for t in kept))

    def bound_us(self, layout: Layout, micros: tuple[int, ...]) -> float:
        """No plan of a layout is faster, its collectives left out.

        With work w_s of stage s per micro-batch, a step takes at least m w_s + w_0 + ... + w_(s-1)
        for each s. Over all w of sum W the largest of them is least where all are equal, which is
        W / (1 - (1 - 1/m)^p). W has each op of the whole batch on one device, in as many parts as
        there are ranks and micro-batches: parts of an op are together no faster than the op.
        """
        if self._alone is None:
            self._alone = _alone_us(self.of(1), self.short.of, layout.cluster)
        least_us = launch_of(layout.cluster)
        bounds = []
        for micro in micros:
            work = np.maximum(self._alone / (layout.ranks * micro), least_us).sum()
            bounds.append(float(work) / (1 - (1 - 1 / micro) ** layout.stages))
        return min(bounds, default=inf)


def _alone_us(program: Program, of: tuple[int, ...], cluster: Cluster) -> Array:
    """Times of the whole program's forward and backward ops on one device; views left out."""
    module = program.module
    functions: dict[str, list[float]] = {}

    def times(op: Op) -> list[float]:
        if op.name != "call":
            return [] if op.name in VIEWS else [op_time_us(op, (), Mesh(), cluster)]
        name = str(op.attrs["callee"])
        if name not in functions:
            functions[name] = [t for inner in module.function(name).ops for t in times(inner)]
        return functions[name]

    by_unit: list[list[float]] = [[] for _ in range(program.units)]
    for op, phase in zip(module.entry.ops, program.phases, strict=True):
        unit = program.unit_of.get(op.results[0].name, -1)
        if phase in LOOP and unit >= 0:
            by_unit[unit] += times(op)
    flat = [time_us for unit in of for time_us in by_unit[unit] if time_us > 0]
    return np.array(flat, dtype=np.float64)


__all__ = ["Program", "Programs"]
