"""Time of collectives: alpha-beta per mesh axis, ring algorithms.

With `b` bytes held by each of `p` ranks, a rank sends (Thakur, Rabenseifner and Gropp, 2005):
all_reduce 2 b (p-1)/p in 2 (p-1) steps, reduce_scatter and all_to_all b (p-1)/p, all_gather
b (p-1), each in p-1 steps; broadcast and permute_ranks b. gloo's all_reduce of small tensors is a
ring as well. `lse_combine` gathers all terms.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache

from ..ir.types import Mesh
from .cluster import Cluster
from .devices import Link

#: name -> (p, bytes per rank) -> (bytes sent per rank, steps)
_VOLUMES: Mapping[str, Callable[[int, float], tuple[float, int]]] = {
    "all_reduce": lambda p, b: (2 * b * (p - 1) / p, 2 * (p - 1)),
    "reduce_scatter": lambda p, b: (b * (p - 1) / p, p - 1),
    "all_gather": lambda p, b: (b * (p - 1), p - 1),
    "all_to_all": lambda p, b: (b * (p - 1) / p, p - 1),
    "lse_combine": lambda p, b: (b * (p - 1), p - 1),
    "broadcast": lambda p, b: (b, p - 1),
    "permute_ranks": lambda p, b: (b, 1),
    "send": lambda p, b: (b, 1),
    "recv": lambda p, b: (b, 1),
    # local: a view, and zeros beside a view
    "shard": lambda p, b: (0.0, 0),
    "partial": lambda p, b: (0.0, 0),
}
LOCAL = ("shard", "partial")


def volume(name: str, bytes_per_rank: float, axis_size: int) -> float:
    """Bytes that each rank sends in a collective, given the bytes that each rank holds before."""
    return _VOLUMES[name](axis_size, bytes_per_rank)[0] if axis_size > 1 else 0.0


def collective_time_us(name: str, bytes_per_rank: float, axis_size: int, link: Link) -> float:
    """Time of a collective over `axis_size` ranks that hold `bytes_per_rank` each before it.

    0 for one rank and for `shard`; never falls when bytes or ranks grow. Raises KeyError for a
    name that is no collective.
    """
    sent, steps = _VOLUMES[name](axis_size, bytes_per_rank)
    if axis_size <= 1 or name in LOCAL:
        return 0.0
    return (link.base_s + steps * link.latency_s + sent / link.bytes_per_s) * 1e6


@lru_cache(maxsize=256)
def collective_cost(cluster: Cluster, mesh: Mesh) -> Callable[[str, float, int, str], float]:
    """The cost function of the reshard planner: (step, bytes per rank, axis size, axis) -> us.

    Local steps cost a launch, so that of two plans with the same traffic the shorter one wins;
    `partial` also writes zeros.
    """
    links = {axis: cluster.axis_link(mesh, axis) for axis in mesh.names}
    device = cluster.device

    def cost(name: str, bytes_per_rank: float, axis_size: int, axis: str) -> float:
        if name == "shard":
            return device.launch_us
        if name == "partial":
            return device.launch_us + bytes_per_rank / device.dram_bytes_per_s * 1e6
        return device.launch_us + collective_time_us(name, bytes_per_rank, axis_size, links[axis])

    return cost
