"""Plans of several pipeline stages, or of a batch in micro-batches.

    logical program -> time_split -> balanced, cut -> place and lower each stage -> stage_schedule
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..costmodel.cluster import Cluster, Group, meshes, parse_cluster
from ..costmodel.collectives import collective_cost
from ..ir.errors import CompileError
from ..ir.module import Attr, Module
from ..ir.text import print_module
from ..ir.types import Mesh
from ..passes.lower import lower
from ..passes.micro import TimeSplit, time_split
from ..passes.orders import Order, forward_only, orders_of
from ..passes.place import Place, PlacementResult, search_mesh
from ..passes.stage_balance import balanced
from ..passes.stage_schedule import schedule_stages
from ..passes.stages import StageModule, cut
from ..runtime.stage_map import FED
from .options import Options
from .report import Dump


def is_staged(options: Options) -> bool:
    """Do options ask for stages or micro-batches? Raises CompileError W1001 with a pipeline."""
    staged = options.stages * options.chunks > 1 or options.micro > 1
    if staged and options.pipeline:
        raise CompileError(
            "W1001", "a pass pipeline and stages or micro-batches exclude each other",
            reason="stages are placed and scheduled by passes of their own",
            hint="leave pipeline= out, or stages=, micro= and chunks=",
        )  # fmt: skip
    return staged


def stage_cluster(cluster: Cluster, stages: int) -> Cluster:
    """The devices of one stage: whole hosts, or an equal part of one. Raises CompileError W0404."""
    group = cluster.homogeneous()
    ranks, rest = divmod(group.ranks, stages)
    if rest == 0 and ranks % group.devices == 0:
        return replace(cluster, groups=(Group(group.kind, ranks // group.devices, group.devices),))
    if rest == 0 and group.devices % ranks == 0:
        return replace(cluster, groups=(Group(group.kind, 1, ranks),))
    raise CompileError(
        "W0404", f"{stages} stages cannot share the {group.ranks} devices of {cluster}",
        reason="a stage has whole hosts, or an equal part of one",
        hint="use a number of stages that divides the hosts, or the devices",
    )  # fmt: skip


def staged_dumps(
    module: Module, kind: str, cluster_text: str, mesh: str, options: Options
) -> list[tuple[str, Dump]]:
    """(what made it, dump) of each stage at each level; the schedules come last.

    Args:
        module: the logical program.
        kind: `train` or `forward`.

    Raises CompileError W0404 for what cannot be cut so, W0402 for a stage without a placement.
    """
    if kind == "joint":
        raise CompileError(
            "W0404", "a module whose loss is computed outside cannot be cut into stages",
            reason="its gradients come from the caller, for the whole batch at once",
            hint="compile the train step: a function (model, optimizer, *batch)",
        )  # fmt: skip
    cluster = parse_cluster(cluster_text)
    split = time_split(module, options.micro)
    share = stage_cluster(cluster, options.stages)
    parts = balanced(split, options.stages * options.chunks, share)
    orders = orders_of(options.order, options.stages, split.count, options.chunks)
    if "backward" not in split.phases:
        orders = forward_only(orders)
    pieces = cut(split, parts)
    found = _placed(pieces, split.count, share, mesh)
    placed = [result.placed for result in found]
    phases = [result.phases for result in found]
    return written(split, parts, pieces, placed, orders, [share] * options.stages, phases)


def written(
    split: TimeSplit,
    parts: Sequence[int],
    pieces: Sequence[StageModule],
    placed: Sequence[Module],
    orders: Sequence[Order],
    shares: Sequence[Cluster],
    phases: Sequence[Sequence[str] | None] = (),
    schedules: Sequence[Module] = (),
) -> list[tuple[str, Dump]]:
    """The dumps of placed stages, down to their schedules.

    Args:
        shares: the cluster of each stage.
        phases: for each part those of the ops of its placed entry, as the search meant them.
        schedules: of the stages, where they are known.
    """
    entry = split.module.entry
    fed = tuple(
        (str(attrs["role"]), str(attrs.get("name", value.name)))
        for value, attrs in zip(entry.params, entry.param_attrs, strict=True)
        if attrs.get("role") in ("input", "lr")
    )
    costs = [
        collective_cost(shares[part % len(shares)], module.mesh or Mesh())
        for part, module in enumerate(placed)
    ]
    if not schedules:
        schedules = schedule_stages(split, parts, placed, orders, cost=costs, phases=phases)
    out: list[tuple[str, Dump]] = []
    for number, (piece, module) in enumerate(zip(pieces, placed, strict=True)):
        about: dict[str, Attr] = {"part": number}
        for name, level in (
            ("cut", piece.module), ("place", module), ("lower", lower(module, costs[number]))
        ):  # fmt: skip
            dump = Dump(f"part{number}-{name}", level.with_(attrs={**level.attrs, **about}))
            out.append((name, dump))
    for number, module in enumerate(schedules):
        attrs = {**module.attrs, FED: tuple(dict.fromkeys(fed))}
        out.append(("schedule", Dump(f"stage{number}-schedule", module.with_(attrs=attrs))))
    return out


def _placed(
    pieces: Sequence[StageModule], micro: int, share: Cluster, mesh: str
) -> list[PlacementResult]:
    """Each part on the mesh on which the slowest is fastest; equal parts are searched once."""
    candidates = Place(mesh=mesh).candidates(share) or meshes(share)
    best: list[PlacementResult] = []
    for grid in candidates:
        found = _on_mesh(pieces, micro, share, grid)
        if found and (not best or _badness(found) < _badness(best)):
            best = found
    if not best:
        raise CompileError(
            "W0402", "a stage has no legal placement on its devices",
            reason="some op has no legal split", hint="use fewer devices a stage",
        )  # fmt: skip
    return best


def _on_mesh(
    pieces: Sequence[StageModule], micro: int, share: Cluster, grid: Mesh
) -> list[PlacementResult]:
    known: dict[str, PlacementResult | None] = {}
    out = []
    for piece in pieces:
        key = print_module(piece.module)
        if key not in known:
            known[key] = search_mesh(piece.module, grid, share, phases=piece.phases, micro=micro)
        result = known[key]
        if result is None:
            return []
        out.append(result)
    return out


def _badness(results: Sequence[PlacementResult]) -> tuple[bool, float]:
    over = any(not result.report[0].fits for result in results)
    return over, max(result.objective_us for result in results)


__all__ = ["is_staged", "stage_cluster", "staged_dumps", "written"]
