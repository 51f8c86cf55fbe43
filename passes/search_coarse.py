"""Coarse estimates of layouts, so that the promising ones are placed first and hopeless ones never.

On most meshes the outer ranks share the batch and the inner ones the model. So the program of a
part of the batch is placed on the inner axis alone, at a price of memory (a handful of placements
for all layouts: one for each inner size, taken over from one number of rows to the next), and what
the outer axis adds has closed forms: gradients are reduced, optimizer states divided (ZeRO-1), or
parameters as well, gathered for each micro-batch (ZeRO-3). Stages are taken to be equal. Nothing
here is the cost of a plan; it says in which order layouts are placed as what they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import inf, prod

import numpy as np

from ..costmodel.cluster import Cluster, Group
from ..costmodel.collectives import Spread, collective_time_us
from ..ir.errors import CompileError
from ..ir.types import Mesh
from .apply import Choices
from .constraints import Constraints
from .place_model import Runs
from .place_task import JOINT_AXES, Task
from .search_costs import Array, UnitCosts
from .search_layout import micros_of, orders_of_layout
from .search_layouts import Layout, part_of
from .search_program import Programs
from .search_state import State

#: price of memory of the inner placement: its peak costs as much as this share of its time
_PRICE = 1.0
#: blocks that are kept at the ends of a chain
_KEPT = (1, 1)
#: limit of an inner placement
_LIMIT_S = 5.0


@dataclass(frozen=True)
class Estimate:
    """Of a layout.

    Attributes:
        step_us: of its best plan that fits; infinite where none does.
        micro: its number of micro-batches.
    """

    step_us: float = inf
    micro: int | None = None


class Coarse:
    """Estimates the layouts of a cluster."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.programs = Programs(state.programs.module, *_KEPT)
        self.rows = self.programs.rows
        self._choices: dict[int, list[Choices]] = {}
        self._costs: dict[tuple[int, int], UnitCosts | None] = {}

    def estimate(self, layout: Layout) -> Estimate:
        """The best over the ways to read a mesh as data-parallel ranks and the rest."""
        best = Estimate()
        for outer, inner in self._readings(layout):
            for micro in micros_of(self.state, layout):
                step_us = self._step_us(layout, outer, inner, micro)
                if step_us < best.step_us:
                    best = Estimate(step_us, micro)
        return best

    def _readings(self, layout: Layout) -> Iterator[tuple[int, int]]:
        """(ranks that share the batch, ranks that share the model): cuts of the list of axes."""
        sizes, per_host = layout.mesh.sizes, layout.cluster.devices_per_host
        for k in range(len(sizes) + 1):
            outer, inner = prod(sizes[:k]), prod(sizes[k:])
            # the model over hosts only where there are not enough rows
            if outer <= self.rows and (inner <= per_host or 2 * outer > self.rows):
                yield outer, inner

    def _step_us(self, layout: Layout, outer: int, inner: int, micro: int) -> float:
        if outer * micro > self.rows:
            return inf
        costs = self._inner(inner, outer * micro, layout.cluster)
        if costs is None:
            return inf
        if micro > 1:
            costs = costs.accumulating(layout.cluster)
        found = inf
        for sharded in (False, True) if outer > 1 else (False,):
            own = _shared(costs, outer, inner, micro, sharded, layout.cluster)
            found = min(found, self._pipeline_us(own, layout, micro))
            if found < inf:
                break  # with less memory it is slower
        return found

    def _pipeline_us(self, costs: UnitCosts, layout: Layout, micro: int) -> float:
        """The step where stages are as equal as units allow; infinite where it does not fit."""
        stages, room = layout.stages, self.state.room_bytes(layout.cluster)
        flight = min(micro, stages)
        held = _equal(costs.persistent_bytes, stages) + float(costs.transient_bytes.max(initial=0))
        loop = _equal(costs.loop_us, stages)
        if held + flight * _equal(costs.saved_bytes, stages) > room:
            most = float(costs.saved_bytes.max(initial=0))
            held += most + flight * _equal(costs.kept_bytes, stages)
            if held > room or not self.state.wishes.recompute:
                return inf
            loop += _equal(costs.forward_us, stages)
        sent = max((size for size, _, _ in costs.crossing), default=0.0)
        per_host = layout.cluster.devices_per_host
        link = Spread(2, 2 if 2 * layout.ranks <= per_host else 1)
        hop_us = collective_time_us("send", sent, link, self.state.cluster)
        ends = []
        for _, chunks in orders_of_layout(self.state, stages, micro):
            fill = (stages - 1) * (loop / chunks + 2 * hop_us)
            ends.append(micro * max(loop, 2 * chunks * hop_us * (stages > 1)) + fill)
        return min(ends) + _equal(costs.update_us, stages)

    # -- the inner axis -------------------------------------------------------------------------

    def _inner(self, ranks: int, parts: int, cluster: Cluster) -> UnitCosts | None:
        """Units of one of `parts` parts of the batch on some ranks; None where there are none."""
        key = ranks, parts
        if key not in self._costs:
            self._costs[key] = self._placed(ranks, parts, cluster)
        return self._costs[key]

    def _placed(self, ranks: int, parts: int, cluster: Cluster) -> UnitCosts | None:
        if not self.programs.can_split(parts):
            return None
        kind, per_host = cluster.device.kind, cluster.devices_per_host
        hosts = max(1, ranks // per_host)
        part = part_of(cluster, Group(kind, hosts, ranks // hosts))
        mesh = Mesh((("inner", ranks),) if ranks > 1 else (), kind)
        layout = Layout(1, mesh, part, ranks)
        known = self._choices.setdefault(ranks, [])
        # what is legal for two rows is so for more
        fewest = self.rows // 2 if parts <= self.rows // 2 else parts
        for number in dict.fromkeys((fewest, parts)):
            for choices in known:
                costs = self._read(layout, choices, parts)
                if costs is not None:
                    return costs
            if self.programs.can_split(number):
                found = self._search(layout, number)
                known += [found] if found is not None else []
        return self._read(layout, known[-1], parts) if known else None

    def _search(self, layout: Layout, parts: int) -> Choices | None:
        program, part = self.programs.of(parts), layout.cluster
        roomy = replace(part, device=replace(part.device, memory_bytes=inf))
        task = Task(
            program.module, layout.mesh, roomy, _LIMIT_S, JOINT_AXES, Runs(program.phases, parts),
            Constraints(), self.state.enough,
        )  # fmt: skip
        self.state.placements += 1
        found = task.attempt(self._price(layout, parts) if layout.ranks > 1 else 0.0)
        return found.choices if found is not None else None

    def _price(self, layout: Layout, parts: int) -> float:
        """us per byte: what the program takes on the ranks over what it stores."""
        time_us = self.programs.bound_us(layout, (parts,))
        return _PRICE * time_us * layout.ranks / max(1.0, self.programs.stored_bytes())

    def _read(self, layout: Layout, choices: Choices, parts: int) -> UnitCosts | None:
        try:
            costs = self.state.read(self.programs, parts, layout, choices)
        except CompileError as error:
            if error.code not in ("W0401", "W0402"):
                raise
            return None
        return costs


def _equal(row: Array, stages: int) -> float:
    """The largest of `stages` sums that are as equal as units allow, from below."""
    return max(float(row.sum()) / stages, float(row.max(initial=0.0)))


def _shared(
    costs: UnitCosts, outer: int, inner: int, micro: int, sharded: bool, cluster: Cluster
) -> UnitCosts:
    """The costs of units whose batch `outer` groups share; `sharded`: parameters as well."""
    if outer == 1:
        return costs
    parameters, gradients, states = costs.held_bytes
    spread = Spread(outer, max(1, min(outer, cluster.devices_per_host // inner)))

    def times(name: str, total: Array, share: float) -> Array:
        each = np.maximum(costs.tensors, 1)
        rows = [
            count * collective_time_us(name, size * share / count, spread, cluster) if size else 0.0
            for size, count in zip(total, each, strict=True)
        ]
        return np.array(rows)

    # without accumulated gradients none are counted; they have the parameters' size
    reduced = times("reduce_scatter", np.maximum(gradients, parameters), 1.0)
    gathered = times("all_gather", parameters, 1 / outer)
    computed = (costs.update_us - costs.moved_update_us) / outer
    update = computed + costs.moved_update_us + reduced
    grads = gradients if micro > 1 else gradients / outer
    if not sharded:
        return replace(
            costs, update_us=update + gathered, persistent_bytes=parameters + grads + states / outer
        )
    return replace(
        costs, update_us=update, forward_us=costs.forward_us + gathered,
        backward_us=costs.backward_us + gathered,
        persistent_bytes=parameters / outer + grads + states / outer,
        transient_bytes=costs.transient_bytes + parameters,
    )  # fmt: skip


def estimates(state: State, layouts: Sequence[Layout], share: float) -> list[Estimate]:
    """Of each layout; those for which the share of the budget does not last have none."""
    coarse = Coarse(state)
    return [Estimate() if state.over(share) else coarse.estimate(layout) for layout in layouts]


__all__ = ["Coarse", "Estimate", "estimates"]
