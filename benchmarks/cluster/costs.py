"""Times of a schedule's actions on this machine: fitted to traces, and to transfers.

Local actions: the median where the same op on the same local shapes was traced, else for each family
of ops a non-negative line in (calls, ops, FLOPs, bytes). The traces are of other plans than those
that are judged, with as many ranks on the machine's cores: so the contention of ranks that share
cores is in them. Transfers: `network.py`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np

from weft.costmodel.cluster import Cluster
from weft.costmodel.collectives_gloo import GlooCosts, Place, place_of
from weft.costmodel.estimate import local_flops
from weft.costmodel.simulate_cost import Coord, Transfer, local_bytes_at
from weft.ir.module import Module, Op
from weft.ir.opdef import OPS, signature_of
from weft.ir.types import Mesh, local_shape

Array = np.typing.NDArray[np.float64]


def family(op: Op) -> str:
    """Ops whose times follow one line."""
    entry = OPS[op.name]
    return "call" if op.name == "call" else op.name if entry.family == "contraction" else entry.family


def work(op: Op, module: Module, mesh: Mesh, coord: Coord) -> tuple[float, float, float, float]:
    """(1, ops, FLOPs, bytes) of an action on a rank."""
    moved = sum(local_bytes_at(v.type, mesh, coord) for v in (*op.operands, *op.results))
    body = module.function(str(op.attrs["callee"])).ops if op.name == "call" else (op,)
    flops = 0.0
    for inner in body:
        if OPS[inner.name].signature is not None:
            states = [inner.split.get(name, "") for name in mesh.names]
            flops += local_flops(inner, signature_of(inner), states, mesh)
    return 1.0, float(len(body)), flops, float(moved)


def nonnegative(rows: Array, times: Array) -> Array:
    """Least squares with relative weights and coefficients of at least 0, by coordinate descent."""
    scale = 1 / np.sqrt(times)  # between relative and absolute errors
    a, b = rows * scale[:, None], times * scale
    norm = np.sqrt((a**2).sum(0)) + 1e-30
    a = a / norm
    gram, right, x = a.T @ a, a.T @ b, np.zeros(rows.shape[1])
    for _ in range(2000):
        for i in range(len(x)):
            x[i] = max(0.0, x[i] + (right[i] - gram[i] @ x) / gram[i, i]) if gram[i, i] > 0 else 0.0
    found: Array = x / norm
    found *= times.sum() / max(float((rows @ found).sum()), 1e-9)  # a step is a sum of times
    return found


def local_text(op: Op, module: Module, mesh: Mesh, coord: Coord) -> Hashable:
    """The same for actions that do the same on equal local shapes."""
    if op.name == "call":
        return tuple(local_text(inner, module, mesh, coord)
                     for inner in module.function(str(op.attrs["callee"])).ops)  # fmt: skip
    shapes = tuple(local_shape(v.type, mesh, coord) for v in (*op.operands, *op.results))
    return op.name, str(op.attrs.get("spec", "")), shapes


@dataclass(frozen=True)
class ComputeCosts:
    """What traces say.

    Attributes:
        lines: fitted lines by family; '' for ops of a family that was not seen.
        traced: medians by `local_text`.
    """

    lines: Mapping[str, Array]
    traced: Mapping[Hashable, float]

    def time_us(self, op: Op, module: Module, mesh: Mesh, coord: Coord) -> float:
        """Time of an action."""
        known = self.traced.get(local_text(op, module, mesh, coord))
        if known is not None:
            return known
        line = self.lines.get(family(op), self.lines[""])
        return float(line @ np.array(work(op, module, mesh, coord)))


def fit_compute(traces: Iterable[tuple[Module, Mapping[str, float]]]) -> ComputeCosts:
    """Lines from (schedule, action -> us on the first rank)."""
    rows: dict[str, list[tuple[float, ...]]] = defaultdict(list)
    times: dict[str, list[float]] = defaultdict(list)
    same: dict[Hashable, list[float]] = defaultdict(list)
    for module, measured in traces:
        mesh = module.mesh or Mesh()
        origin = (0,) * len(mesh.axes)
        for action, time_us in measured.items():
            op = module.entry.ops[int(action)]
            same[local_text(op, module, mesh, origin)].append(time_us)
            for name in (family(op), ""):
                rows[name].append(work(op, module, mesh, origin))
                times[name].append(max(time_us, 0.1))
    lines = {n: nonnegative(np.array(rows[n]), np.array(times[n])) for n in rows}
    return ComputeCosts(lines, {text: float(np.median(found)) for text, found in same.items()})


class Costs:
    """What the simulator asks (`weft.costmodel.simulate_cost.Costs`).

    Args:
        crowd: ranks on this machine over its cores, at least 1.
        stretch: how much longer all but the wire of a transfer takes in a step than in a loop.
    """

    def __init__(
        self,
        module: Module,
        cluster: Cluster,
        compute: ComputeCosts,
        gloo: GlooCosts,
        crowd: float,
        stretch: float = 1.0,
    ) -> None:
        self.module, self.mesh = module, module.mesh or Mesh()
        self.cluster, self.compute, self.gloo = cluster, compute, gloo
        self.crowd, self.stretch = crowd, stretch
        self._ops = {id(op): op for op in module.entry.ops}
        self._action = cache(self._action_us)

    def action_us(self, op: Op, coord: Coord) -> float:
        """Time of a local action on the rank at a mesh coordinate."""
        if op.name in ("free", "wait"):
            return 0.0
        return self._action(id(op), coord)

    def _action_us(self, key: int, coord: Coord) -> float:
        return self.compute.time_us(self._ops[key], self.module, self.mesh, coord)

    def transfer_us(self, transfer: Transfer) -> tuple[float, float]:
        """Time of a transfer, and that of one of no bytes."""
        place = place_of(self.cluster, transfer.members, transfer.per_host, self.crowd)
        whole, empty = (self._stretched(transfer.name, size, place) for size in (transfer.bytes, 0))
        return whole, min(whole, empty)

    def _stretched(self, name: str, size: float, place: Place) -> float:
        wire = self.gloo.wire_us(name, size, place)
        return wire + self.stretch * (self.gloo.time_us(name, size, place) - wire)
