"""Devices of several kinds dealt out to stages: the blocks that a mixed cluster may be cut into.

The groups stand in a line, in each order; a stage takes whole hosts of one group, all of one host, or
half of one. So fast devices get more units than slow ones, on a mesh of their own, and the number of
devices differs from stage to stage. A placement is searched once for each group and size of a block
(as HexiScale and Alpa do for their device meshes).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import permutations
from math import inf

from ..costmodel.cluster import Cluster, Group
from ..ir.errors import CompileError
from ..ir.types import Mesh
from .micro import time_split
from .place import PlacementResult
from .search_costs import UnitCosts
from .search_cuts import Block, Cutter
from .search_evaluate import evaluate
from .search_layouts import Layout, part_of
from .search_realize import realize, replayed
from .search_result import Replay, SearchResult
from .search_state import State
from .search_units import units_of

#: numbers of micro-batches
_MICROS = (1, 2, 4, 8, 16, 32, 64)
#: orders of more groups than this are not all tried: the given one only
_FEW_GROUPS = 3


@dataclass(frozen=True)
class Share:
    """Some devices of one group: what a stage may have, wherever it stands.

    Attributes:
        group: number of the group in the cluster.
        own: the devices as a group.
        mesh: of the devices: hosts by devices.
    """

    group: int
    own: Group
    mesh: Mesh


def shares_of(cluster: Cluster) -> list[Share]:
    """The sizes of blocks of each group: half a host, one host, 2, 4, ... hosts, all hosts."""
    out = []
    for number, group in enumerate(cluster.groups):
        halves = [Group(group.kind, 1, group.devices // 2)] if group.devices % 2 == 0 else []
        hosts, counts = 1, []
        while hosts < group.hosts:
            counts += [hosts] if group.hosts % hosts == 0 else []
            hosts *= 2
        wholes = [Group(group.kind, count, group.devices) for count in (*counts, group.hosts)]
        for own in (*halves, *wholes):
            axes = (("host", own.hosts), ("dev", own.devices))
            out.append(Share(number, own, Mesh(tuple((n, s) for n, s in axes if s > 1), own.kind)))
    return out


def lines_of(cluster: Cluster) -> Iterator[tuple[int, ...]]:
    """Orders of the groups."""
    numbers = range(len(cluster.groups))
    if len(cluster.groups) > _FEW_GROUPS:
        yield tuple(numbers)
    else:
        yield from permutations(numbers)


def places_of(cluster: Cluster, line: tuple[int, ...], share: Share) -> range:
    """Where in a line of groups blocks of a share may begin."""
    start = sum(cluster.groups[g].ranks for g in line[: line.index(share.group)])
    return range(start, start + cluster.groups[share.group].ranks, share.own.ranks)


def most_stages(cluster: Cluster) -> int:
    """Stages of the smallest blocks."""
    return sum(
        group.hosts * (2 if group.devices % 2 == 0 else 1) for group in cluster.groups
    )


def search_mixed(state: State) -> SearchResult:
    """The fastest plan of stages of different devices. See `search.search_plan`."""
    shares = shares_of(state.cluster)
    most = min(state.programs.units.count, most_stages(state.cluster))
    wanted = state.wishes.micro
    micros = [wanted] if wanted else [m for m in _MICROS if state.programs.can_split(m)]
    first = micros[len(micros) // 2] if micros else 1
    placed: dict[Share, tuple[Layout, PlacementResult]] = {}
    for share in shares:
        if state.over():
            break
        part = part_of(state.cluster.part(share.group), share.own)
        layout = Layout(most, share.mesh, part, share.own.ranks)
        placement = state.place(layout, first, inf)
        if placement is not None:
            placed[share] = layout, placement
    bound = inf
    for micro in micros or [1]:
        costs = _costs(state, placed, micro)
        for line in lines_of(state.cluster):
            bound = min(bound, _line(state, line, costs, micro, most))
    if not state.found:
        raise state.nothing(len(placed) == len(shares))
    best = state.best
    split = time_split(state.programs.module, best.pipeline.micro)
    units = units_of(split)
    realized, final = None, best
    if not state.over():
        realized = realize(
            split, units, best.pipeline, best.layout.clusters, state.wishes.constraints,
            enough=state.enough,
        )  # fmt: skip
        step = replayed(realized, state.cluster.in_order(best.layout.line))
        final = replace(best, replay=Replay.of(step))
        bound = min(bound, step.step_us)
    return SearchResult(
        final, split, units, tuple(state.rejected(best)), len(shares), 0, 0,
        state.evaluated, min(bound, best.pipeline.step_us), state.seconds,
        len(placed) == len(shares), realized,
    )  # fmt: skip


def _costs(
    state: State, placed: Mapping[Share, tuple[Layout, PlacementResult]], micro: int
) -> dict[Share, UnitCosts]:
    """Costs of the units on each share, of those whose splits a micro-batch has rows for."""
    out = {}
    for share, (layout, placement) in placed.items():
        try:
            out[share] = state.costs(layout, placement, micro)
        except CompileError as error:
            if error.code not in ("W0401", "W0402"):
                raise
    return out


def _line(
    state: State, line: tuple[int, ...], costs: Mapping[Share, UnitCosts], micro: int, most: int
) -> float:
    """Evaluate the cuts over an order of the groups; no plan with these blocks is faster than
    what is returned: a step has `micro` times its slowest stage."""
    blocks, clusters, shares = [], {}, {}
    for share, own in costs.items():
        part = part_of(state.cluster.part(share.group), share.own)
        for start in places_of(state.cluster, line, share):
            block = Block(start, start + share.own.ranks, own, state.room_bytes(part))
            blocks.append(block)
            clusters[start, start + share.own.ranks] = part
            shares[id(block)] = share
    cuts = Cutter(state.programs.units, micro, state.wishes.recompute).best(blocks, most) if blocks else []
    for cut in cuts:
        if state.wishes.stages not in (None, len(cut.parts)):
            continue
        used = [shares[id(part.block)] for part in cut.parts]
        own_clusters = {p.block.start: clusters[p.block.start, p.block.stop] for p in cut.parts}
        layout = Layout(
            len(used), used[0].mesh, own_clusters[cut.parts[0].block.start], used[0].own.ranks,
            tuple(str(share.own) for share in used),
            tuple(own_clusters[part.block.start] for part in cut.parts), line,
        )  # fmt: skip
        for order in ("1f1b", "gpipe"):
            if state.wishes.order in ("", order):
                plan = evaluate(
                    cut.parts, state.programs.units.names, own_clusters, micro, order
                )
                state.add(plan, layout, None)
    return min((micro * c.bottleneck_us for c in cuts), default=inf)
