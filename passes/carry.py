"""carry: the placement of a program, for the same program at other sizes.

Ops are matched by function and by the name of their first result, parameters and results by
position. What cannot be split so at the new sizes (three rows over four ranks, a reshape that
joins an uneven dim) is whole on the axes that forbid it; `apply` then adds the reshards.

A carried placement is kept where no search could be much better, or where the sizes are near:

    time(new) <= LIMIT * work(new) / ranks                              no placement is LIMIT faster
    time(new) <= LIMIT * time(old) * max(1, growth), growth <= GROWTH   growth = work(new) / work(old)

with work the predicted time of all ops on one device. Otherwise a placement is searched again.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..costmodel.cluster import Cluster, parse_cluster
from ..costmodel.estimate import op_time_us
from ..ir.module import Function, Module, Op, Value
from ..ir.opdef import OPS
from ..ir.types import B, Mesh, illegal_placement
from .apply import Choices, FunctionChoices, apply
from .base import Pass
from .place_runs import executions
from .price import price
from .random_place import legal_split
from .reshard import Placements

log = logging.getLogger("weft.place")

#: a step may take this much longer than it might before another placement is searched: uneven parts
#: alone cost up to a factor of two (5 rows on 4 ranks are as slow as 8)
LIMIT = 2.0
#: with more work than this times that of the searched size, what was not worth splitting may be
GROWTH = 4.0
#: attribute of a module whose placement was carried
CARRIED = "carried"


@dataclass(frozen=True)
class Carry(Pass):
    """A placement that is known, at other sizes; searched again where it does not suit them.

    Before (logical; a known module has the same op on f32[8, 4], split [dev = a0]):

        %z = exp(%y) : f32[7, 4]

    After:

        %z = exp(%y) split [dev = a0] : f32[7, 4]{S(0)}
    """

    name: ClassVar[str] = "carry"
    summary: ClassVar[str] = "take the placement of the same program at other sizes"
    levels: ClassVar[tuple[str, ...]] = ("logical",)

    search: Pass
    known: tuple[Module, ...]

    def run(self, module: Module) -> Module:
        """The placed module. Raises what `search` raises."""
        best, best_us = None, 0.0
        for placed in self.known:
            found = carried(module, placed)
            time_us = self._suits(found, placed)
            if time_us is not None and (best is None or time_us < best_us):
                best, best_us = found, time_us
        if best is not None:
            return best
        log.info("the placement of other sizes does not suit these, another one is searched")
        return self.search.run(module)

    @staticmethod
    def _suits(found: Module, placed: Module) -> float | None:
        """Predicted time of a carried placement, or None where a search should do better."""
        text = str(placed.attrs.get("cluster", ""))
        if not text:
            return 0.0  # placed at random or by hand: nothing to compare
        cluster = parse_cluster(text)
        work = work_us(found, cluster)
        time_us = price(found, cluster).total_us
        ranks = found.mesh.size if found.mesh else 1
        growth = work / max(1e-9, work_us(placed, cluster))
        near = growth <= GROWTH and time_us <= LIMIT * max(1.0, growth) * price(placed, cluster).total_us
        return time_us if near or time_us <= LIMIT * work / ranks else None


def work_us(module: Module, cluster: Cluster) -> float:
    """Predicted time of a placed module's ops on one device."""
    counts = executions(module)
    alone = Mesh((), module.mesh.device) if module.mesh else Mesh()
    return sum(counts[f.name] * op_time_us(op, (), alone, cluster) for f, op in module.walk())


def carried(module: Module, placed: Module) -> Module:
    """A logical module with the splits and placements of a placed one."""
    mesh = placed.mesh or Mesh()
    twins = {function.name: function for function in placed.functions}
    choices = {f.name: _choices(f, twins.get(f.name), mesh) for f in module.functions}
    return apply(module, mesh, Choices(choices)).with_(attrs={**placed.attrs, CARRIED: True})


def _choices(function: Function, twin: Function | None, mesh: Mesh) -> FunctionChoices:
    if twin is None:
        return FunctionChoices()
    ops = {op.results[0].name: op for op in twin.ops if op.results}
    return FunctionChoices(
        splits=tuple(_split(op, ops, mesh) for op in function.ops),
        params=_placements(function.params, twin.params, mesh),
        results=_placements(function.results, twin.results, mesh),
    )


def _split(op: Op, twins: dict[str, Op], mesh: Mesh) -> tuple[str, ...]:
    """The states of an op's twin, without those that its sizes forbid."""
    twin = twins.get(op.results[0].name) if op.results else None
    if twin is None or twin.name != op.name or OPS[op.name].signature is None:
        return ()
    states: tuple[str, ...] = ()
    for axis, name in enumerate(mesh.names):
        rest = ("",) * (len(mesh.axes) - axis - 1)
        state = twin.split.get(name, "")
        states += (state if legal_split(op, mesh, (*states, state, *rest)) else "",)
    return states


def _placements(
    values: Sequence[Value], twins: Sequence[Value], mesh: Mesh
) -> tuple[Placements, ...]:
    if len(values) != len(twins):
        return ()
    return tuple(_placement(v, t, mesh) for v, t in zip(values, twins, strict=True))


def _placement(value: Value, twin: Value, mesh: Mesh) -> Placements:
    """The placement of a value's twin, whole on the axes where its sizes forbid it."""
    kept: Placements = ()
    for axis, state in enumerate(twin.type.placement or ()):
        rest = (B,) * (len(mesh.axes) - axis - 1)
        legal = not illegal_placement(value.type, mesh, (*kept, state, *rest))
        kept += (state if legal else B,)
    return kept


__all__ = ["CARRIED", "Carry", "carried", "work_us"]
