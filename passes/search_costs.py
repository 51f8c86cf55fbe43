"""What each unit costs on a mesh: read off a placed module of one micro-batch.

One placement of the whole program on a stage's mesh prices all units, and any stage is a sum of
units: so an 80-layer model needs as many searches as one of 8 layers. `search.py` prices the
stages that it takes once more as what they are.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from ..costmodel.cluster import Cluster
from ..ir.module import Function, Module, Op, Value
from ..ir.types import Mesh, local_bytes
from .micro import LOOP
from .place_model import PERSISTENT
from .price import Pricer, function_peak

Array = NDArray[np.float64]
#: rows of `UnitCosts.held_bytes`
_PARAM, _GRADIENT, _STATE = range(3)


@dataclass(frozen=True)
class UnitCosts:
    """Costs of the units on the ranks of a mesh, under one placement.

    Attributes:
        forward_us, backward_us: of one micro-batch, shape (units,).
        update_us: once a step: parameters gathered for all micro-batches, reductions of accumulated
            gradients, optimizer.
        persistent_bytes: parameters, optimizer states and accumulated gradients of a rank.
        saved_bytes: what a micro-batch in flight holds between its forward and its backward.
        kept_bytes: what it still holds where the unit is computed again in its backward.
        transient_bytes: the most that one unit's ops hold besides.
        moved_us: of forward and backward, what collectives take.
        moved_update_us: of the update, what collectives take.
        crossing: (value's bytes on a rank, unit that makes it, units that read it) of each
            activation that a unit reads from another one.
        held_bytes: of the persistent bytes, those of parameters, accumulated gradients and
            optimizer states, shape (3, units).
        tensors: parameters of each unit.
    """

    mesh: Mesh
    forward_us: Array
    backward_us: Array
    update_us: Array
    persistent_bytes: Array
    saved_bytes: Array
    kept_bytes: Array
    transient_bytes: Array
    moved_us: Array
    moved_update_us: Array
    crossing: tuple[tuple[float, int, frozenset[int]], ...]
    held_bytes: Array = field(default_factory=lambda: np.zeros((3, 0)))
    tensors: Array = field(default_factory=lambda: np.zeros(0))

    @property
    def loop_us(self) -> Array:
        """Forward and backward of a micro-batch."""
        return self.forward_us + self.backward_us

    def accumulating(self, cluster: Cluster) -> UnitCosts:
        """With the additions of gradients of several micro-batches: two are read, one written."""
        device = cluster.device
        added = 3 * self.held_bytes[_GRADIENT] / device.dram_bytes_per_s * 1e6
        return replace(self, backward_us=self.backward_us + added + self.tensors * device.launch_us)

    def spread(self, of: Sequence[int], edges: Collection[tuple[int, int]]) -> UnitCosts:
        """The costs of more units: unit i costs what unit `of[i]` does here; `edges` joins them."""
        rows = np.asarray(of)
        readers: dict[int, set[int]] = {}
        for i, j in edges:
            readers.setdefault(i, set()).add(j)
        crossing = [
            (size, i, found)
            for i, own in enumerate(of)
            for size, made, read in self.crossing
            if made == own and (found := frozenset(j for j in readers.get(i, ()) if of[j] in read))
        ]
        return UnitCosts(
            self.mesh, self.forward_us[rows], self.backward_us[rows], self.update_us[rows],
            self.persistent_bytes[rows], self.saved_bytes[rows], self.kept_bytes[rows],
            self.transient_bytes[rows], self.moved_us[rows], self.moved_update_us[rows],
            tuple(crossing), self.held_bytes[:, rows], self.tensors[rows],
        )  # fmt: skip


class _Pricer(Pricer):
    """Times and bytes of ops of a placed module, each function once."""

    def __init__(self, module: Module, cluster: Cluster) -> None:
        super().__init__(module, module.mesh or Mesh(), cluster)
        self.peaks: dict[str, int] = {}

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
    phases: Sequence[str],
    unit_of: Mapping[str, int],
    units: int,
    cluster: Cluster,
) -> UnitCosts:
    """Read the costs of all units off a placed module.

    Args:
        placed: the whole program for one micro-batch.
        phases: of each op of its entry: `before`, `forward`, `backward` or `update`.
        unit_of: by the first result of each op of the logical entry. Ops without a unit that are
            no updates are computed on each stage, and cost nothing here.
    """
    return _Reader(placed, phases, unit_of, units, cluster).read()


class _Reader:
    def __init__(
        self,
        placed: Module,
        phases: Sequence[str],
        unit_of: Mapping[str, int],
        units: int,
        cluster: Cluster,
    ) -> None:
        self.pricer = _Pricer(placed, cluster)
        self.entry, self.count = placed.entry, units
        self.phase_of = {
            op.results[0].name: phase for op, phase in zip(self.entry.ops, phases, strict=True)
        }
        self.unit_of = dict(unit_of)
        self.makers, self.readers = self.entry.defs(), self.entry.uses()
        self.owner = self._owners()
        self.held, self.tensors = np.zeros((3, units)), np.zeros(units)

    def read(self) -> UnitCosts:
        """All costs."""
        times = {phase: np.zeros(self.count) for phase in ("forward", "backward", "update")}
        moved = {phase: np.zeros(self.count) for phase in times}
        transient = np.zeros(self.count)
        for op in self.entry.ops:
            phase, unit = self._home(op)
            if unit < 0:
                continue
            computed, moves = self.pricer.op_us(op)
            own = computed + moves
            times[phase if phase in LOOP else "update"][unit] += own
            moved[phase if phase in LOOP else "update"][unit] += moves
            if phase in LOOP:
                transient[unit] = max(transient[unit], self.pricer.peak_bytes(op))
        saved, kept, crossing = self._values()
        held = self.held
        return UnitCosts(
            self.pricer.mesh, times["forward"], times["backward"], times["update"], held.sum(0),
            saved, kept, transient, moved["forward"] + moved["backward"], moved["update"], crossing,
            held, self.tensors,
        )  # fmt: skip

    def _home(self, op: Op) -> tuple[str, int]:
        """Phase and unit of an op; a reshard belongs to the unit that it is for."""
        name = op.results[0].name
        phase = self.phase_of[name]
        if op.name != "reshard":
            return phase, self._unit(op)
        for reader in self.readers.get(name, ()):
            unit = self._home(reader)[1]
            if unit >= 0:
                return phase, unit
        made = self._origin(op.operands[0])
        maker = self.makers.get(made.name)
        return phase, self.owner.get(made.name, -1) if maker is None else self._home(maker)[1]

    def _unit(self, op: Op) -> int:
        """The unit of a logical op: of updates, that of the parameter or gradient that they read."""
        name = op.results[0].name
        found = self.unit_of.get(name, -1)
        if found >= 0 or self.phase_of[name] != "update":
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
            phase = self.phase_of[name]
            if op.name == "reshard" or phase == "before":
                read = set().union(*(sources.get(v.name, set()) for v in op.operands), set())
                sources.update((v.name, read) for v in op.results)
            elif phase == "forward" and self.unit_of.get(name, -1) >= 0:
                for value in op.operands:
                    for source in sources.get(value.name, ()):
                        owner.setdefault(source, self.unit_of[name])
        for op in self.entry.ops:  # optimizer states live where their parameter does
            if self.phase_of[op.results[0].name] == "update":
                names = [name for v in op.operands for name in sources.get(v.name, ())]
                homes = [owner[n] for n in names if n in owner]
                if homes:
                    for name in names:
                        owner.setdefault(name, homes[0])
        return owner

    def _values(
        self,
    ) -> tuple[Array, Array, tuple[tuple[float, int, frozenset[int]], ...]]:
        saved, kept = np.zeros(self.count), np.zeros(self.count)
        for value, attrs in zip(self.entry.params, self.entry.param_attrs, strict=True):
            unit = self.owner.get(value.name, -1)
            if unit >= 0 and attrs.get("role") in PERSISTENT:
                state = attrs["role"] == "state"
                self.held[_STATE if state else _PARAM, unit] += self.pricer.bytes(value)
                self.tensors[unit] += not state
        crossing = []
        for op in self.entry.ops:
            phase, unit = self._home(op)
            if unit >= 0 and phase == "before" and op.name == "reshard":  # kept for the step
                self.held[_PARAM, unit] += self.pricer.bytes(op.result)
            if unit < 0 or phase not in LOOP:
                continue
            for value in op.results:
                where = self._reads(value)
                if phase == "backward":
                    if any(p == "update" for p, _ in where) and op.name != "reshard":
                        self.held[_GRADIENT, unit] += self.pricer.bytes(value)
                    continue
                outside = frozenset(u for p, u in where if p == "forward" and u != unit)
                if outside:
                    crossing.append((self.pricer.bytes(value), unit, outside))
                if any(p == "backward" for p, _ in where):
                    saved[unit] += self.pricer.bytes(value)
                    if outside:  # a boundary: the next unit begins with it when computed again
                        kept[unit] += self.pricer.bytes(value)
        return saved, kept, tuple(crossing)

    def _reads(self, value: Value) -> list[tuple[str, int]]:
        """Phase and unit of the ops that read a value, through reshards."""
        found = []
        for reader in self.readers.get(value.name, ()):
            found.append(self._home(reader))
            if reader.name == "reshard":
                found += self._reads(reader.result)
        return found
