"""Plans of several pipeline stages, or of a batch in micro-batches.

    logical program -> time_split -> balanced, cut -> place and lower each stage -> stage_schedule
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from ..costmodel.cluster import Cluster, meshes, parse_cluster
from ..costmodel.cluster_stages import stage_clusters
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
    staged = options.stages * options.chunks > 1 or options.micro > 1 or bool(options.meshes)
    if staged and options.pipeline:
        raise CompileError(
            "W1001", "a pass pipeline and stages or micro-batches exclude each other",
            reason="stages are placed and scheduled by passes of their own",
            hint="leave pipeline= out, or stages=, micro= and chunks=",
        )  # fmt: skip
    return staged


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
    grids = stage_meshes(options, mesh)
    sizes = [_size(grid) for grid in grids] if options.meshes else []
    shares = stage_clusters(cluster, len(grids), sizes)
    parts = balanced(split, shares * options.chunks)
    orders = orders_of(options.order, len(grids), split.count, options.chunks)
    if "backward" not in split.phases:
        orders = forward_only(orders)
    pieces = cut(split, parts)
    found = _placed(pieces, split.count, shares, grids)
    placed = [result.placed for result in found]
    phases = [result.phases for result in found]
    return written(split, parts, pieces, placed, orders, shares, phases)


def stage_meshes(options: Options, mesh: str) -> list[str]:
    """The mesh that is asked for each stage, or nothing. Raises CompileError W1001."""
    if not options.meshes:
        return [mesh] * options.stages
    grids = [grid.strip() for grid in options.meshes.split("+")]
    if mesh or options.stages not in (1, len(grids)):
        asked = f"mesh={mesh!r}" if mesh else f"stages={options.stages}"
        raise CompileError(
            "W1001", f"{asked} and meshes={options.meshes!r} do not fit together",
            reason=f"meshes names the mesh of each stage: {len(grids)}",
            hint="leave mesh= and stages= out where meshes= is given",
        )  # fmt: skip
    return grids


def _size(grid: str) -> int:
    """Devices of a mesh such as `2x2` or `dp=2,tp=2`. Raises CompileError W0501."""
    sizes = [part.rpartition("=")[2] for part in grid.split("," if "=" in grid else "x")]
    if not all(size.isascii() and size.isdigit() and 0 < int(size) for size in sizes):
        raise CompileError(
            "W0501", f"the mesh {grid!r} of a stage is not understood",
            reason="it has the sizes of its axes, or their names and sizes",
            hint='write for example meshes="2x2+4" or meshes="dp=2,tp=2+tp=4"',
        )  # fmt: skip
    return prod(map(int, sizes))


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
    pieces: Sequence[StageModule], micro: int, shares: Sequence[Cluster], grids: Sequence[str]
) -> list[PlacementResult]:
    """Each part on its stage's mesh. Stages of the same devices have the mesh on which the slowest of
    them is fastest; equal parts are searched once."""
    kinds: dict[tuple[Cluster, str], list[StageModule]] = {}
    for number, piece in enumerate(pieces):
        stage = number % len(shares)
        kinds.setdefault((shares[stage], grids[stage]), []).append(piece)
    found: dict[int, PlacementResult] = {}
    for (share, grid), own in kinds.items():
        best: list[PlacementResult] = []
        for mesh in Place(mesh=grid).candidates(share) or meshes(share):
            results = _on_mesh(own, micro, share, mesh)
            if results and (not best or _badness(results) < _badness(best)):
                best = results
        if not best:
            raise CompileError(
                "W0402", f"a stage has no legal placement on {share}",
                reason="some op has no legal split", hint="use fewer devices a stage",
            )  # fmt: skip
        found.update(zip((piece.stage for piece in own), best, strict=True))
    return [found[piece.stage] for piece in pieces]


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


__all__ = ["is_staged", "stage_meshes", "staged_dumps", "written"]
