"""Plans written down: the schedules of all stages, and their step in the event simulator."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from ..costmodel.cluster import Cluster
from ..costmodel.simulate import Simulation, simulate
from ..ir.errors import CompileError
from ..ir.module import Module
from ..ir.text import print_module
from .constraints import Constraints
from .micro import LOOP, TimeSplit, time_split
from .orders import Order, orders_of
from .place import search_mesh
from .recompute import recomputed
from .search_evaluate import Pipeline
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
    """A plan's program: cut, and each part placed.

    Attributes:
        split: the program over time, with what is computed again.
        parts: the part of each op, as for `stages.cut`.
        pieces, placed: each part, logical and placed.
        orders: the slots of each stage.
    """

    split: TimeSplit
    parts: tuple[int, ...]
    pieces: tuple[StageModule, ...]
    placed: tuple[Module, ...]
    orders: tuple[Order, ...]


def realize(
    split: TimeSplit,
    units: Units,
    pipeline: Pipeline,
    cluster: Cluster,
    constraints: Constraints = Constraints(),
) -> Realized:
    """Cut a program as a plan says and place each part as what it is; equal parts are placed once.

    Args:
        cluster: of one stage.

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
    placed = _placed(pieces, split.count, pipeline, cluster, constraints)
    orders = orders_of(pipeline.order, len(pipeline.stages), split.count, pipeline.chunks)
    return Realized(split, parts, pieces, tuple(placed), orders)


def schedules(found: Realized) -> tuple[Module, ...]:
    """The schedule of each stage."""
    return schedule_stages(found.split, found.parts, found.placed, found.orders)


def _placed(
    stages: Sequence[StageModule],
    micro: int,
    pipeline: Pipeline,
    cluster: Cluster,
    constraints: Constraints,
) -> list[Module]:
    known: dict[Hashable, Module] = {}
    out = []
    for stage in stages:
        key = print_module(stage.module)
        if key not in known:
            mesh = pipeline.stages[stage.stage % len(pipeline.stages)].mesh
            found = search_mesh(
                stage.module, mesh, cluster, limit_s=PLACE_S, phases=stage.phases, micro=micro,
                constraints=constraints,
            )  # fmt: skip
            if found is None:
                raise CompileError(
                    "W0402", f"stage {stage.stage} has no legal placement on {mesh.axes}",
                    reason="some op has no legal split", hint="use fewer devices a stage",
                )  # fmt: skip
            known[key] = found.placed
        out.append(known[key])
    return out


def simulated(
    split: TimeSplit,
    units: Units,
    pipeline: Pipeline,
    stage_cluster: Cluster,
    cluster: Cluster,
) -> Simulation:
    """The step of all ranks of a plan, event by event."""
    return simulate(schedules(realize(split, units, pipeline, stage_cluster)), cluster)
