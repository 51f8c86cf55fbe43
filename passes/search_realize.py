"""Plans written down: the schedules of all stages, and their step in the event simulator."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ..costmodel.cluster import Cluster
from ..costmodel.collectives import collective_cost
from ..costmodel.simulate import Simulation, simulate
from ..ir.errors import CompileError
from ..ir.module import Attr, Function, Module
from ..ir.text import print_function, print_module
from ..ir.types import Mesh
from .apply import Choices, apply_phased
from .constraints import Constraints
from .micro import LOOP, TimeSplit, time_split
from .orders import Order, orders_of
from .place import MEMORY_SHARE, PlacementResult, search_mesh
from .recompute import recomputed
from .search_carry import Source, carried
from .search_evaluate import Pipeline, Stage
from .search_units import Units, units_of
from .stage_schedule import schedule_stages
from .stages import StageModule, cut

#: limit of the placement of one stage, after which it is the best found
PLACE_S = 20.0


def parts_of(split: TimeSplit, units: Units, pipeline: Pipeline) -> tuple[int, ...]:
    """The part of each op of the program, -1 where it follows others: what `stages.cut` takes."""
    return tuple(
        pipeline.unit_stage[unit] if unit >= 0 and phase in LOOP else -1
        for unit, phase in zip(units.stage_of, split.phases, strict=True)
    )


@dataclass(frozen=True)
class Realized:
    """A plan's program: cut, each part placed, schedules written.

    Attributes:
        split: the program over time, with what is computed again.
        parts: the part of each op, as for `stages.cut`.
        pieces, placed: each part, logical and placed.
        phases: for each part those of the ops of its placed entry.
        orders: the slots of each stage.
        schedules: of each stage.
    """

    split: TimeSplit
    parts: tuple[int, ...]
    pieces: tuple[StageModule, ...]
    placed: tuple[Module, ...]
    phases: tuple[tuple[str, ...] | None, ...]
    orders: tuple[Order, ...]
    schedules: tuple[Module, ...]


def realize(
    split: TimeSplit,
    units: Units,
    pipeline: Pipeline,
    cluster: Cluster | Sequence[Cluster],
    constraints: Constraints = Constraints(),
    *,
    enough: float = 0.0,
    source: Source | None = None,
) -> Realized:
    """Cut a program as a plan says and place each part; equal parts are placed once.

    Args:
        cluster: of one stage, or of each where they differ.
        enough: relative gap at which the placement of a large part stops.
        source: the placement that the plan was evaluated with, which is carried over; without it
            each part is searched as what it is.

    Raises CompileError W0402 where a stage has no legal placement.
    """
    again = [
        unit for unit, part in enumerate(pipeline.unit_stage)
        if pipeline.stages[part % len(pipeline.stages)].recompute
    ]  # fmt: skip
    if again:
        split = time_split(recomputed(split, units, again), split.count)
        units = units_of(split)
    parts = parts_of(split, units, pipeline)
    pieces = cut(split, parts)
    count = len(pipeline.stages)
    clusters = (cluster,) * count if isinstance(cluster, Cluster) else tuple(cluster)
    placer = _Placer(split, units, pipeline, clusters, constraints, enough, source)
    found = [placer.placed(piece) for piece in pieces]
    placed, phases = tuple(module for module, _ in found), tuple(own for _, own in found)
    orders = orders_of(pipeline.order, count, split.count, pipeline.chunks)
    costs = [
        collective_cost(clusters[part % count], module.mesh or Mesh())
        for part, module in enumerate(placed)
    ]
    schedules = schedule_stages(split, parts, placed, orders, cost=costs, phases=phases)
    return Realized(split, parts, pieces, placed, phases, tuple(orders), schedules)


def replayed(found: Realized, cluster: Cluster) -> Simulation:
    """The step of all ranks of a plan, event by event."""
    return simulate(found.schedules, cluster)


#: a placed part, and the phases of its entry's ops
_Placed = tuple[Module, tuple[str, ...] | None]


@dataclass
class _Placer:
    """Places the parts of a plan, those that are equal but for their names once."""

    split: TimeSplit
    units: Units
    pipeline: Pipeline
    clusters: tuple[Cluster, ...]  #: of each stage
    constraints: Constraints
    enough: float
    source: Source | None
    known: dict[Hashable, tuple[Function, Choices]] = field(default_factory=dict)

    def placed(self, piece: StageModule) -> _Placed:
        """A part under its placement. Raises CompileError W0402."""
        mesh = self._stage(piece).mesh
        if self.source is not None:
            choices = carried(piece, self.split, self.units, self.source, len(mesh.axes))
            if choices is not None:
                return apply_phased(piece.module, mesh, choices)
        # rules are about names, so names count where there are rules
        names = bool(self.constraints.rules)
        key = (structure(piece, names), mesh, self._cluster(piece), self._room_bytes(piece))
        if key in self.known:
            choices = _renamed(*self.known[key], piece)
            return apply_phased(piece.module, mesh, choices)
        found = self._search(piece, mesh)
        if not found.modes:
            self.known[key] = piece.module.entry, found.choices
        return found.placed, found.phases

    def _stage(self, piece: StageModule) -> Stage:
        return self.pipeline.stages[piece.stage % len(self.pipeline.stages)]

    def _cluster(self, piece: StageModule) -> Cluster:
        return self.clusters[piece.stage % len(self.clusters)]

    def _search(self, piece: StageModule, mesh: Mesh) -> PlacementResult:
        cluster = self._cluster(piece)
        device = replace(cluster.device, memory_bytes=self._room_bytes(piece) / MEMORY_SHARE)
        found = search_mesh(
            piece.module, mesh, replace(cluster, device=device), limit_s=PLACE_S,
            phases=piece.phases, micro=self.split.count,
            constraints=Constraints(self.constraints.rules), enough=self.enough,
        )  # fmt: skip
        if found is None:
            raise CompileError(
                "W0402", f"stage {piece.stage} has no legal placement on {mesh.axes}",
                reason="some op has no legal split", hint="use fewer devices a stage",
            )  # fmt: skip
        return found

    def _room_bytes(self, piece: StageModule) -> float:
        """What a part may hold with one micro-batch in flight: what it was evaluated with, and its
        share of what the stage has left."""
        stage, chunks = self._stage(piece), self.pipeline.chunks
        left = max(0.0, stage.memory_bytes - stage.peak_bytes)
        return stage.own_bytes[piece.stage // len(self.pipeline.stages)] + left / chunks


def structure(piece: StageModule, named: bool = False) -> Hashable:
    """What a part's placement depends on: equal for parts that differ in names only.

    Args:
        named: whether names of parameters and module paths count.
    """
    module = piece.module
    if named:
        return print_module(module), piece.phases
    entry = module.entry
    number: dict[str, int] = {}
    for value in (*entry.params, *(v for op in entry.ops for v in op.results)):
        number[value.name] = len(number)
    users = {
        str(attrs["name"]): number[value.name]
        for value, attrs in zip(entry.params, entry.param_attrs, strict=True) if "name" in attrs
    }  # fmt: skip
    params = tuple(
        (str(value.type), _plain(attrs, users, number))
        for value, attrs in zip(entry.params, entry.param_attrs, strict=True)
    )
    ops = tuple(
        (op.name, tuple(sorted((k, repr(v)) for k, v in op.attrs.items())),
         tuple(number[v.name] for v in op.operands), tuple(str(v.type) for v in op.results))
        for op in entry.ops
    )  # fmt: skip
    results = tuple(
        (number[value.name], _plain(attrs, users, number))
        for value, attrs in zip(entry.results, entry.result_attrs, strict=True)
    )
    callees = tuple(print_function(function) for function in module.functions[1:])
    return params, ops, results, callees, piece.phases


#: attributes of parameters and results that are names, or numbers of stages
_NAMES = frozenset({"name", "source", "to"})


def _plain(
    attrs: Mapping[str, Attr], users: Mapping[str, int], number: Mapping[str, int]
) -> tuple[tuple[str, str], ...]:
    """Attributes without names; references to values by their numbers."""
    found = []
    for key, value in sorted(attrs.items()):
        if key in _NAMES:
            continue
        if isinstance(value, str):
            found.append((key, str(number.get(value, users.get(value, value)))))
        else:
            found.append((key, repr(value)))
    return tuple(found)


def _renamed(entry: Function, choices: Choices, piece: StageModule) -> Choices:
    """Choices of one part for another one of the same structure."""
    own = piece.module.entry
    theirs = (*entry.params, *(v for op in entry.ops for v in op.results))
    ours = (*own.params, *(v for op in own.ops for v in op.results))
    names = {a.name: b.name for a, b in zip(theirs, ours, strict=True)}
    again = frozenset((names[name], op) for name, op in choices.again)
    return replace(choices, again=again)


def simulated(
    split: TimeSplit,
    units: Units,
    pipeline: Pipeline,
    stage_cluster: Cluster,
    cluster: Cluster,
) -> Simulation:
    """The step of all ranks of a plan, event by event."""
    return replayed(realize(split, units, pipeline, stage_cluster), cluster)


__all__ = ["Realized", "parts_of", "realize", "replayed", "simulated", "structure"]
