"""Time of collectives on a cluster: what passes and the simulator ask.

Between GPUs the learned model answers (`collectives_model.py`), between CPUs that of gloo
(`collectives_gloo.py`). Both take the cluster's links, so a cluster file that changes a link changes
the times.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

from ..ir.types import Mesh
from .cluster import Cluster
from .collectives_gloo import gloo_time_us
from .collectives_model import Curve, collective_model
from .collectives_query import FABRICS, Query
from .devices import DEVICES, LINK_EFFICIENCY


def _nothing(ranks: int, held: float) -> float:
    return 0.0


#: name -> (ranks, bytes per rank) -> bytes that each rank sends at least, whatever the algorithm
#: (Thakur, Rabenseifner and Gropp, 2005)
_VOLUMES: Mapping[str, Callable[[int, float], float]] = {
    "all_reduce": lambda p, b: 2 * b * (p - 1) / p,
    "reduce_scatter": lambda p, b: b * (p - 1) / p,
    "all_gather": lambda p, b: b * (p - 1),
    "all_to_all": lambda p, b: b * (p - 1) / p,
    "lse_combine": lambda p, b: b * (p - 1),
    "broadcast": lambda p, b: b,
    "permute_ranks": lambda p, b: b,
    "send": lambda p, b: b,
    "recv": lambda p, b: b,
    # local: a view, and zeros beside a view
    "shard": _nothing,
    "partial": _nothing,
}
LOCAL = ("shard", "partial")
#: name -> the collective of the learned model, and its bytes from the bytes that a rank holds
_ASKED: Mapping[str, tuple[str, Callable[[int, float], float]]] = {
    "all_reduce": ("all_reduce", lambda p, b: b),
    "reduce_scatter": ("reduce_scatter", lambda p, b: b),
    "all_gather": ("all_gather", lambda p, b: b * p),
    "all_to_all": ("alltoall", lambda p, b: b),
    "lse_combine": ("all_gather", lambda p, b: b * p),
    # a ring passes the buffer on, as two ranks that gather twice as much do
    "broadcast": ("all_gather", lambda p, b: 2 * b),
    "permute_ranks": ("send_recv", lambda p, b: b),
    "send": ("send_recv", lambda p, b: b),
    "recv": ("send_recv", lambda p, b: b),
}
#: device kind of a cluster -> its name in the learned model, and its fabric
_KINDS = {
    "v100": ("V100-SXM2-32GB", "nvlink2"), "a100": ("A100-SXM4-80GB", "nvlink3"),
    "h100": ("H100-SXM5-80GB", "nvlink4"), "h200": ("H200-SXM-141GB", "nvlink4"),
    "b200": ("B200-SXM", "nvlink5"), "l40s": ("L40S", "pcie4"), "mi250": ("MI250", "xgmi2"),
    "mi300x": ("MI300X", "xgmi3"),
}  # fmt: skip


class Spread(NamedTuple):
    """How the members of a group are spread over hosts."""

    ranks: int
    per_host: int

    @property
    def far(self) -> bool:
        """Does the group span hosts?"""
        return self.ranks > self.per_host


def spread_of(cluster: Cluster, mesh: Mesh, axis: str) -> Spread:
    """The groups along a mesh axis: members, and how many of them share a host."""
    return _spread_of(cluster, mesh, axis)


@lru_cache(maxsize=4096)
def _spread_of(cluster: Cluster, mesh: Mesh, axis: str) -> Spread:
    hosts = cluster.axis_hosts(mesh, axis)
    return Spread(len(hosts), hosts.count(hosts[0]))


def volume(name: str, bytes_per_rank: float, axis_size: int) -> float:
    """Bytes that each rank sends in a collective, given the bytes that each rank holds before."""
    return _VOLUMES[name](axis_size, bytes_per_rank) if axis_size > 1 else 0.0


def collective_time_us(name: str, bytes_per_rank: float, spread: Spread, cluster: Cluster) -> float:
    """Time of a collective over a group whose members hold `bytes_per_rank` each before it.

    0 for one rank and for `shard` and `partial`; never falls when bytes or ranks double. Raises
    KeyError for a name that is no collective.
    """
    return _times(cluster, spread)(name, bytes_per_rank)


class _Times:
    """Times of the collectives of a group."""

    def __init__(self, cluster: Cluster, spread: Spread) -> None:
        self.spread, self.cluster = spread, cluster
        self.gloo = cluster.device.kind == "cpu"
        self._curves: dict[str, Curve] = {}

    def __call__(self, name: str, bytes_per_rank: float) -> float:
        if _VOLUMES[name] is _nothing or self.spread.ranks <= 1:
            return 0.0
        if self.gloo:
            return gloo_time_us(name, bytes_per_rank, *self.spread, self.cluster)
        asked, size_of = _ASKED[name]
        time_us = self._curve(asked)(size_of(self.spread.ranks, bytes_per_rank))
        if name == "all_reduce":  # may be done in two
            parts = (self._curve(part) for part in ("reduce_scatter", "all_gather"))
            time_us = min(time_us, sum(part(bytes_per_rank) for part in parts))
        return time_us

    def _curve(self, collective: str) -> Curve:
        found = self._curves.get(collective)
        if found is None:
            query = replace(_query(self.cluster, self.spread), collective=collective)
            found = self._curves[collective] = collective_model().curve(query)
        return found


@lru_cache(maxsize=4096)
def _times(cluster: Cluster, spread: Spread) -> _Times:
    return _Times(cluster, spread)


@lru_cache(maxsize=1024)
def _query(cluster: Cluster, spread: Spread) -> Query:
    """What the learned model knows of a cluster. A device kind that it does not know has the fabric
    nearest to its link: NVLink-like from 100 GB/s, else PCIe."""
    kind, intra, inter = cluster.device.kind, cluster.intra, cluster.inter
    peak = intra.bytes_per_s / LINK_EFFICIENCY / 1e9
    device, fabric = _KINDS.get(kind, (kind, "nvlink4" if peak >= 100 else "pcie4"))
    fabric = cluster.fabric or fabric
    usual = DEVICES.get(kind, cluster.device)
    link, base = (inter, usual.inter) if spread.far else (intra, usual.intra)
    latency = link.latency_s / base.latency_s if base.latency_s > 0 else 1.0
    return Query(
        "all_reduce", 0.0, *spread, device, fabric, inter.bytes_per_s / LINK_EFFICIENCY / 1e9,
        bandwidth_scale=peak / FABRICS[fabric].gb_per_s, latency_scale=max(latency, 1e-3),
    )  # fmt: skip


@lru_cache(maxsize=256)
def collective_cost(cluster: Cluster, mesh: Mesh) -> Callable[[str, float, int, str], float]:
    """The cost function of the reshard planner: (step, bytes per rank, axis size, axis) -> us.

    Local steps cost a launch, so that of two plans with the same traffic the shorter one wins;
    `partial` also writes zeros.
    """
    times = {axis: _times(cluster, spread_of(cluster, mesh, axis)) for axis in mesh.names}
    device = cluster.device

    def cost(name: str, bytes_per_rank: float, axis_size: int, axis: str) -> float:
        if name == "shard":
            return device.launch_us
        if name == "partial":
            return device.launch_us + bytes_per_rank / device.dram_bytes_per_s * 1e6
        return device.launch_us + times[axis](name, bytes_per_rank)

    return cost
