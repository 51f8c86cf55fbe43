"""Times of a schedule's actions on this machine: fitted to traces, and to transfers.

Local actions: for each family of ops a non-negative line in (calls, ops, FLOPs, bytes), fitted to
traces of other plans than those that are judged, with as many ranks on the machine's cores: so the
contention of ranks that share cores is in it. Transfers: `network.py`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np

from weft.costmodel.cluster import Cluster
from weft.costmodel.collectives_gloo import GlooCosts, place_of
from weft.costmodel.estimate import local_flops
from weft.costmodel.simulate_cost import Coord, Transfer, local_bytes_at
from weft.ir.module import Module, Op
from weft.ir.opdef import OPS, signature_of
from weft.ir.types import Mesh

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
    return found


@dataclass(frozen=True)
class ComputeCosts:
    """Fitted lines by family; '' for ops of a family that was not seen."""

    lines: Mapping[str, Array]

    def time_us(self, op: Op, module: Module, mesh: Mesh, coord: Coord) -> float:
        """Time of an action."""
        line = self.lines.get(family(op), self.lines[""])
        return float(line @ np.array(work(op, module, mesh, coord)))


def fit_compute(traces: Iterable[tuple[Module, Mapping[str, float]]]) -> ComputeCosts:
    """Lines from (schedule, action -> us on the first rank)."""
    rows: dict[str, list[tuple[float, ...]]] = defaultdict(list)
    times: dict[str, list[float]] = defaultdict(list)
    for module, measured in traces:
        mesh = module.mesh or Mesh()
        origin = (0,) * len(mesh.axes)
        for action, time_us in measured.items():
            op = module.entry.ops[int(action)]
            for name in (family(op), ""):
                rows[name].append(work(op, module, mesh, origin))
                times[name].append(max(time_us, 0.1))
    return ComputeCosts({n: nonnegative(np.array(rows[n]), np.array(times[n])) for n in rows})


class Costs:
    """What the simulator asks (`weft.costmodel.simulate_cost.Costs`).

    Args:
        crowd: ranks on this machine over its cores, at least 1.
    """

    def __init__(
        self, module: Module, cluster: Cluster, compute: ComputeCosts, gloo: GlooCosts, crowd: float
    ) -> None:
        self.module, self.mesh = module, module.mesh or Mesh()
        self.cluster, self.compute, self.gloo, self.crowd = cluster, compute, gloo, crowd
        self._action = cache(self._action_us)

    def action_us(self, op: Op, coord: Coord) -> float:
        """Time of a local action on the rank at a mesh coordinate."""
        if op.name in ("free", "wait"):
            return 0.0
        return self._action(id(op), coord)

    def _action_us(self, key: int, coord: Coord) -> float:
        return self.compute.time_us(self._ops[key], self.module, self.mesh, coord)

    @property
    def _ops(self) -> Mapping[int, Op]:
        return {id(op): op for op in self.module.entry.ops}

    def transfer_us(self, transfer: Transfer) -> tuple[float, float]:
        """Time of a transfer, and that of one of no bytes."""
        place = place_of(self.cluster, transfer.members, transfer.per_host, self.crowd)
        whole, empty = (
            self.gloo.time_us(transfer.name, size, place) for size in (transfer.bytes, 0)
        )
        return whole, min(whole, empty)
