"""The reshard planner: any placement to any placement on one mesh, by the cheapest steps.

States are placements (one entry per axis), edges are the steps below, weights come from a cost
function; a plan is a shortest path (Dijkstra, 1959). With `a` axes and tensors of rank `r` there
are at most (r + 2)^a states, so a plan takes microseconds to milliseconds, and is cached.

    all_reduce      P(c) -> B        all_gather  S(d) -> B       shard    B    -> S(d)   (local)
    reduce_scatter  P(c) -> S(d)     all_to_all  S(d) -> S(e)    partial  B, S -> P(c)   (local)

Several axes on one dim nest in mesh order (`ir/types.py`), so a rank's part of a dim is contiguous
only along the innermost axis that splits it: a step may add or remove a split of dim d on an axis
only if no later axis splits d. Steps create partial values only where the target is partial, from a
part only for sums, and a tensor never is partial in two different combines at once: sums and maxima
do not commute.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import inf, prod

import numpy as np
from numpy.typing import NDArray

from ..costmodel.collectives import volume
from ..ir.errors import CompileError
from ..ir.module import Attr
from ..ir.types import (
    COMBINES,
    DTYPES,
    B,
    Mesh,
    P,
    Placement,
    S,
    TensorType,
    illegal_parts,
    illegal_placement,
    shard_size,
)

Placements = tuple[Placement, ...]
#: (step's op name, bytes of the operand on the largest rank, ranks of the axis, axis name) -> us
StepCost = Callable[[str, float, int, str], float]

#: start-up time of a collective in us and bandwidth of a rank in bytes/s: fit to NCCL on 8 H200
#: (apex_plus profiles, `profile/comm/H200-SXM*`), used where no cluster is known
_ALPHA_US = {"all_reduce": 17.0, "all_gather": 12.0, "reduce_scatter": 12.0, "all_to_all": 14.5}
_BYTES_PER_S = 300e9


@dataclass(frozen=True, slots=True)
class Step:
    """One op of a plan: its name (`ir/ops/collective.py`), attributes and resulting placement."""

    op: str
    axis: str
    attrs: Mapping[str, Attr]
    placement: Placements


def default_cost(step: str, bytes_in: float, ranks: int, axis: str) -> float:
    """Microseconds of a step on 8 GPUs of one host; local steps are free."""
    if ranks == 1 or step not in _ALPHA_US:
        return 0.0
    return _ALPHA_US[step] + volume(step, bytes_in, ranks) / _BYTES_PER_S * 1e6


def legal_placements(
    type: TensorType, mesh: Mesh, combines: Sequence[str] = ("sum",)
) -> tuple[Placements, ...]:
    """All legal placements of a tensor on a mesh; P entries for the given combines only."""
    entries = (B, *(S(d) for d in range(len(type.shape))), *(P(c) for c in combines))
    every = product(entries, repeat=len(mesh.axes))
    return tuple(p for p in every if not illegal_placement(type, mesh, p))


def _local_bytes(type: TensorType, sizes: tuple[int, ...], placement: Placements) -> float:
    shape = list(type.shape)
    for entry, size in zip(placement, sizes, strict=True):
        if entry.kind == "S":
            shape[entry.dim] = shard_size(shape[entry.dim], size, 0)
    return float(prod(shape) * DTYPES[type.dtype])


@lru_cache(maxsize=65536)
def _steps(
    dtype: str,
    shape: tuple[int, ...],
    mesh: Mesh,
    state: Placements,
    partial: tuple[str, ...],
) -> tuple[tuple[int, Step], ...]:
    """(axis position, step) of each legal step out of `state`.

    `partial[i]` is the combine that axis i may become partial in, or ''.
    """
    out, sizes, names = [], mesh.sizes, mesh.names
    for axis, entry in enumerate(state):
        inner = {p.dim for p in state[axis + 1 :] if p.kind == "S"}
        if entry.kind == "S" and entry.dim in inner:
            continue
        for op, attrs, after in _axis_steps(entry, len(shape), inner, partial[axis]):
            placement = (*state[:axis], after, *state[axis + 1 :])
            if not illegal_parts(dtype, shape, sizes, placement):
                attrs["axis"] = names[axis]
                out.append((axis, Step(op, names[axis], attrs, placement)))
    return tuple(out)


def _axis_steps(
    entry: Placement, rank: int, inner: set[int], partial: str
) -> Iterator[tuple[str, dict[str, Attr], Placement]]:
    """(op, attributes, new entry) of the steps of one axis; `inner` dims are split further in."""
    targets = [d for d in range(rank) if d not in inner and entry != S(d)]
    if entry.kind == "P":
        yield "all_reduce", {"combine": entry.combine}, B
        for dim in targets:
            yield "reduce_scatter", {"combine": entry.combine, "dim": dim}, S(dim)
        return
    if entry.kind == "S":
        yield "all_gather", {"dim": entry.dim}, B
        for dim in targets:
            yield "all_to_all", {"source": entry.dim, "target": dim}, S(dim)
    else:
        for dim in targets:
            yield "shard", {"dim": dim}, S(dim)
    if partial and (entry == B or partial == "sum"):  # zeros beside a part are neutral in sums only
        yield "partial", {"combine": partial}, P(partial)


def _partial_axes(target: Placements) -> tuple[str, ...]:
    return tuple(entry.combine for entry in target)


def plan_from(
    type: TensorType,
    mesh: Mesh,
    sources: Sequence[Placements],
    target: Placements,
    cost: StepCost = default_cost,
) -> tuple[int, tuple[Step, ...], float]:
    """The cheapest way to `target` from any of several placements that a value is held in.

    Args:
        type: dtype and global shape; its own placement is ignored.
        sources: placements at hand, all of the same value; on a tie the first wins.

    Returns:
        (index of the source taken, the steps, their time in us).

    Raises:
        CompileError: W0402 where a placement is illegal for the type on this mesh.
    """
    for placement in (*sources, target):
        reason = illegal_placement(type, mesh, placement)
        if reason:
            text = ", ".join(map(str, placement))
            raise CompileError("W0402", f"{type.placed(None)} cannot be placed {{{text}}}",
                               reason=reason)  # fmt: skip
    return _search(type.dtype, type.shape, mesh, tuple(sources), target, cost)


@lru_cache(maxsize=65536)
def _search(
    dtype: str,
    shape: tuple[int, ...],
    mesh: Mesh,
    sources: tuple[Placements, ...],
    target: Placements,
    cost: StepCost,
) -> tuple[int, tuple[Step, ...], float]:
    type, sizes, partial = TensorType(dtype, shape), mesh.sizes, _partial_axes(target)
    # (time, steps, order of discovery): equal times prefer fewer steps, then a fixed order
    heap: list[tuple[float, int, int, Placements]] = []
    best: dict[Placements, tuple[float, int]] = {}
    came: dict[Placements, tuple[Placements, Step] | int] = {}
    for number, source in reversed(list(enumerate(sources))):
        best[source], came[source] = (0.0, 0), number
        heap.append((0.0, 0, number, source))
    heapq.heapify(heap)
    order, done = len(heap), set()
    while heap:
        time_us, count, _, state = heapq.heappop(heap)
        if state == target:
            break
        if state in done:
            continue
        done.add(state)
        bytes_in = _local_bytes(type, sizes, state)
        for axis, step in _steps(dtype, shape, mesh, state, partial):
            after = time_us + cost(step.op, bytes_in, sizes[axis], step.axis)
            if (after, count + 1) < best.get(step.placement, (inf, 0)):
                best[step.placement] = (after, count + 1)
                came[step.placement] = (state, step)
                order += 1
                heapq.heappush(heap, (after, count + 1, order, step.placement))
    steps: list[Step] = []
    origin = came[target]
    while not isinstance(origin, int):
        steps.append(origin[1])
        origin = came[origin[0]]
    return origin, tuple(reversed(steps)), best[target][0]


def plan_reshard(
    type: TensorType,
    mesh: Mesh,
    source: Placements,
    target: Placements,
    cost: StepCost = default_cost,
) -> tuple[Step, ...]:
    """The cheapest steps from one placement to another; none when they are equal.

    Raises CompileError W0402 where a placement is illegal for the type on this mesh.
    """
    return plan_from(type, mesh, (source,), target, cost)[1]


def reshard_cost_us(
    type: TensorType,
    mesh: Mesh,
    source: Placements,
    target: Placements,
    cost: StepCost = default_cost,
) -> float:
    """Time of the cheapest plan in us. Cached. Raises CompileError as `plan_reshard`."""
    return plan_from(type, mesh, (source,), target, cost)[2]


def reshard_table_us(
    type: TensorType,
    mesh: Mesh,
    sources: Sequence[Placements],
    targets: Sequence[Placements],
    cost: StepCost = default_cost,
) -> NDArray[np.float64]:
    """`reshard_cost_us` for all pairs: an array (sources, targets) of us.

    All-pairs shortest paths over the whole state graph (Floyd and Warshall, 1962), once for each
    set of axes that become partial: much faster than a search per pair. Illegal placements give
    inf.
    """
    out = np.full((len(sources), len(targets)), inf)
    used = {p.combine for t in (*sources, *targets) for p in t if p.kind == "P"}
    combines = tuple(c for c in COMBINES if c in used)
    for partial in dict.fromkeys(map(_partial_axes, targets)):
        index, times = _all_pairs(type.dtype, type.shape, mesh, combines, partial, cost)
        rows = [(i, index[s]) for i, s in enumerate(sources) if s in index]
        columns = [
            (j, index[t])
            for j, t in enumerate(targets)
            if t in index and _partial_axes(t) == partial
        ]
        if rows and columns:
            to_i, from_i = zip(*rows, strict=True)
            to_j, from_j = zip(*columns, strict=True)
            out[np.ix_(to_i, to_j)] = times[np.ix_(from_i, from_j)]
    return out


@lru_cache(maxsize=1024)
def _all_pairs(
    dtype: str,
    shape: tuple[int, ...],
    mesh: Mesh,
    combines: tuple[str, ...],
    partial: tuple[str, ...],
    cost: StepCost,
) -> tuple[dict[Placements, int], NDArray[np.float64]]:
    type = TensorType(dtype, shape)
    states = legal_placements(type, mesh, combines)
    index = {state: i for i, state in enumerate(states)}
    times = np.full((len(states), len(states)), inf)
    np.fill_diagonal(times, 0.0)
    for state, i in index.items():
        bytes_in = _local_bytes(type, mesh.sizes, state)
        for axis, step in _steps(dtype, shape, mesh, state, partial):
            j = index.get(step.placement)
            if j is not None:
                time_us = cost(step.op, bytes_in, mesh.sizes[axis], step.axis)
                times[i, j] = min(times[i, j], time_us)
    for k in range(len(states)):
        np.minimum(times, times[:, k : k + 1] + times[k], out=times)
    return index, times
