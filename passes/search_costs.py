"""What each unit costs on a mesh: read off a placed module of one micro-batch.

One placement of the whole program on a stage's mesh prices all units, and any stage is a sum of
units: so an 80-layer model needs as many searches as one of 8 layers. `search.py` prices the
stages that it takes once more as what they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..costmodel.cluster import Cluster
from ..costmodel.collectives import collective_cost
from ..costmodel.estimate import op_time_us
from ..ir.module import Function, Module, Op, Value
from ..ir.types import Mesh, local_bytes
from .micro import LOOP
from .place_model import PERSISTENT
from .price import function_peak
from .reshard import reshard_cost_us

Array = NDArray[np.float64]


@dataclass(frozen=True)
class UnitCosts:
    """Costs of the units on the ranks of a mesh, under one placement.

    Attributes:
        forward_us, backward_us: of one micro-batch, shape (units,).
        update_us: once a step: reductions of accumulated gradients, optimizer.
        persistent_bytes: parameters, optimizer states and accumulated gradients of a rank.
        saved_bytes: what a micro-batch in flight holds between its forward and its backward.
        kept_bytes: what it still holds where the unit is computed again in its backward.
        transient_bytes: the most that one unit's ops hold besides.
        crossing: (value's bytes on a rank, unit that makes it, units that read it) of each
            activation that a unit reads from another one.
    """

    mesh: Mesh
    forward_us: Array
    backward_us: Array
    update_us: Array
    persistent_bytes: Array
    saved_bytes: Array
    kept_bytes: Array
    transient_bytes: Array
    crossing: tuple[tuple[float, int, frozenset[int]], ...]

    @property
    def loop_us(self) -> Array:
        """Forward and backward of a micro-batch."""
        return self.forward_us + self.backward_us


class _Pricer:
    """Times of ops and functions of a placed module, each function once."""

    def __init__(self, module: Module, cluster: Cluster) -> None:
        self.module, self.cluster = module, cluster
        self.mesh = module.mesh or Mesh()
        self.cost = collective_cost(cluster, self.mesh)
        self.functions: dict[str, float] = {}
        self.peaks: dict[str, int] = {}

    def time_us(self, op: Op) -> float:
        """Time of an op, a reshard or a call."""
        if op.name == "call":
            name = str(op.attrs["callee"])
            if name not in self.functions:
                inner = self.module.function(name).ops
                self.functions[name] = sum(map(self.time_us, inner))
            return self.functions[name]
        if op.name == "reshard":
            source, target = op.operands[0].type, op.result.type
            assert source.placement is not None and target.placement is not None
            return reshard_cost_us(
                source, self.mesh, source.placement, target.placement, self.cost
            )
        states = tuple(op.split.get(axis, "") for axis in self.mesh.names)
        return op_time_us(op, states, self.mesh, self.cluster)

    def peak_bytes(self, op: Op) -> float:
        """What an op holds while it runs: its results, or what its callee does at most."""
        if op.name == "call":
            return float(self._peak(str(op.attrs["callee"])))
        return sum(self.bytes(value) for value in op.results)

    def _peak(self, name: str) -> int:
        if name not in self.peaks:
            function = self.module.function(name)
            inner = {n: self._peak(n) for n in _callees(function)}
            self.peaks[name] = function_peak(function, self.mesh, inner)
        return self.peaks[name]

    def bytes(self, value: Value) -> float:
        """Bytes of a value on the largest rank."""
        return float(local_bytes(value.type, self.mesh))


def _callees(function: Function) -> list[str]:
    return [str(op.attrs["callee"]) for op in function.ops if op.name == "call"]


def unit_costs(
    placed: Module,
    phase_of: Mapping[str, str],
    unit_of: Mapping[str, int],
    units: int,
    cluster: Cluster,
) -> UnitCosts:
    """Read the costs of all units off a placed module.

    Args:
        placed: the whole program for one micro-batch.
        phase_of, unit_of: by the first result of each op of the logical entry. Ops without a unit
            that are not updates are computed on each stage, and cost nothing here.
    """
    return _Reader(placed, phase_of, unit_of, units, cluster).read()


class _Reader:
    def __init__(
        self,
        placed: Module,
        phase_of: Mapping[str, str],
        unit_of: Mapping[str, int],
        units: int,
        cluster: Cluster,
    ) -> None:
        self.pricer = _Pricer(placed, cluster)
        self.entry, self.count = placed.entry, units
        self.phase_of, self.unit_of = phase_of, dict(unit_of)
        self.makers = self.entry.defs()
        self.owner = self._owners()

    def read(self) -> UnitCosts:
        """All costs."""
        times = {phase: np.zeros(self.count) for phase in ("forward", "backward", "update")}
        transient = np.zeros(self.count)
        for op in self.entry.ops:
            phase, unit = self._home(op)
            if unit < 0:
                continue
            times[phase if phase in LOOP else "update"][unit] += self.pricer.time_us(op)
            if phase in LOOP:
                transient[unit] = max(transient[unit], self.pricer.peak_bytes(op))
        saved, kept, persistent, crossing = self._values()
        return UnitCosts(
            self.pricer.mesh, times["forward"], times["backward"], times["update"], persistent,
            saved, kept, transient, crossing,
        )  # fmt: skip

    def _home(self, op: Op) -> tuple[str, int]:
        """Phase and unit of an op; a reshard belongs to what it is for.

        It stands right before its first reader. One of an accumulated gradient runs once a step,
        since its reader is an update.
        """
        name = op.results[0].name
        if op.name != "reshard":
            return self.phase_of.get(name, "update"), self._unit(op)
        for reader in self.readers.get(name, ()):
            phase, unit = self._home(reader)
            if unit >= 0:
                return phase, unit
        made = self._origin(op.operands[0])
        maker = self.makers.get(made.name)
        return ("update", self.owner.get(made.name, -1)) if maker is None else self._home(maker)

    @property
    def readers(self) -> Mapping[str, Sequence[Op]]:
        """Ops that read each value."""
        if not hasattr(self, "_readers"):
            self._readers = self.entry.uses()
        return self._readers

    def _unit(self, op: Op) -> int:
        """The unit of a logical op: of updates, that of the parameter or gradient that they read."""
        name = op.results[0].name
        found = self.unit_of.get(name, -1)
        if found >= 0 or self.phase_of.get(name, "update") != "update":
            return found
        homes = [self.owner[o.name] for v in op.operands if (o := self._origin(v)).name in self.owner]
        if not homes:
            homes = [
                unit for v in op.operands
                if (maker := self.makers.get(self._origin(v).name)) is not None
                and maker is not op and (unit := self.unit_of.get(maker.results[0].name, -1)) >= 0
            ]  # fmt: skip
        found = homes[0] if homes else -1
        self.unit_of[name] = found
        return found

    def _origin(self, value: Value) -> Value:
        maker = self.makers.get(value.name)
        while maker is not None and maker.name == "reshard":
            value = maker.operands[0]
            maker = self.makers.get(value.name)
        return value

    def _owners(self) -> dict[str, int]:
        """Entry parameter -> the unit that reads it first in the forward pass; states as theirs."""
        owner: dict[str, int] = {}
        sources = {p.name: {p.name} for p in self.entry.params}
        for op in self.entry.ops:
            name = op.results[0].name
            phase = self.phase_of.get(name, "")
            if op.name == "reshard" or phase == "before":
                read = set().union(*(sources.get(v.name, set()) for v in op.operands), set())
                sources.update((v.name, read) for v in op.results)
            elif phase == "forward" and self.unit_of.get(name, -1) >= 0:
                for value in op.operands:
                    for source in sources.get(value.name, ()):
                        owner.setdefault(source, self.unit_of[name])
        for op in self.entry.ops:  # optimizer states live where their parameter does
            if self.phase_of.get(op.results[0].name) == "update":
                names = [name for v in op.operands for name in sources.get(v.name, ())]
                homes = [owner[n] for n in names if n in owner]
                if homes:
                    for name in names:
                        owner.setdefault(name, homes[0])
        return owner

    def _values(
        self,
    ) -> tuple[Array, Array, Array, tuple[tuple[float, int, frozenset[int]], ...]]:
        saved, kept, persistent = np.zeros(self.count), np.zeros(self.count), np.zeros(self.count)
        for value, attrs in zip(self.entry.params, self.entry.param_attrs, strict=True):
            unit = self.owner.get(value.name, -1)
            if unit >= 0 and attrs.get("role") in PERSISTENT:
                persistent[unit] += self.pricer.bytes(value)
        crossing = []
        for op in self.entry.ops:
            phase, unit = self._home(op)
            if unit < 0 or phase not in LOOP:
                continue
            for value in op.results:
                where = self._reads(value)
                if phase == "backward":
                    if any(p == "update" for p, _ in where) and op.name != "reshard":
                        persistent[unit] += self.pricer.bytes(value)
                    continue
                outside = frozenset(u for p, u in where if p == "forward" and u != unit)
                if outside:
                    crossing.append((self.pricer.bytes(value), unit, outside))
                if any(p == "backward" for p, _ in where):
                    saved[unit] += self.pricer.bytes(value)
                    if outside:  # a boundary: the next unit begins with it when computed again
                        kept[unit] += self.pricer.bytes(value)
        return saved, kept, persistent, tuple(crossing)

    def _reads(self, value: Value) -> list[tuple[str, int]]:
        """Phase and unit of the ops that read a value, through reshards."""
        found = []
        for reader in self.readers.get(value.name, ()):
            found.append(self._home(reader))
            if reader.name == "reshard":
                found += self._reads(reader.result)
        return found
