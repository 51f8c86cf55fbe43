"""Time of gloo's collectives between CPUs, as weft's runtime calls them.

    time = base + hops * (2 delay + hop) + wire / (rate * efficiency) + bytes * copy

A hop costs twice the delay between two hosts: the receiver first tells the sender where to write.
The algorithms (measured with torch 2.13: 4.5, 15 and 31 ms for an all_reduce of 1 KiB on 2, 4 and 8
hosts 1 ms apart; none of them changes with the size):

    all_reduce                       a ring, 2 (p - 1) hops
    all_gather, lse_combine          a ring, p - 1 hops
    reduce_scatter, all_to_all,      every rank sends to every other at once, 1 hop; the runtime does
    permute_ranks                    reduce_scatter as all_to_all and a local sum. Inside a host, where
                                     nothing but the ranks' own work takes time, all_to_all and
                                     reduce_scatter take p - 1 hops
    broadcast                        the root sends to every other host, 1 hop

`wire` is what leaves a host's network card: a ring of p ranks crosses each card once, whatever the
number of ranks behind it. Where ranks outnumber cores, the parts that need a core take longer.
`benchmarks/cluster/network.py` fits the numbers of a machine.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from importlib.resources import files

from .cluster import Cluster
from .devices import DEVICES

#: name -> which of the fitted ops it is
FITTED = {
    "all_reduce": "all_reduce", "all_gather": "all_gather", "lse_combine": "lse_combine",
    "reduce_scatter": "reduce_scatter", "all_to_all": "all_to_all", "broadcast": "broadcast",
    "permute_ranks": "permute_ranks", "send": "permute_ranks", "recv": "permute_ranks",
}  # fmt: skip


@dataclass(frozen=True)
class Place:
    """Where a group meets.

    Attributes:
        ranks: members.
        per_host: of them, on one host.
        bytes_per_s: rate of a host's network card that is the group's, each direction.
        delay_s: one way, between two hosts.
        crowd: ranks of the machine over its cores, at least 1.
        hop_scale, copy_scale: of the inside of a host, against the machine that was fitted.
    """

    ranks: int
    per_host: int
    bytes_per_s: float
    delay_s: float
    crowd: float = 1.0
    hop_scale: float = 1.0
    copy_scale: float = 1.0

    @property
    def far(self) -> bool:
        """Does the group span hosts?"""
        return self.ranks > self.per_host


@dataclass(frozen=True)
class OpCosts:
    """Fitted numbers of one op.

    Attributes:
        base_us: fixed.
        near_us, far_us: of a hop inside a host, and between hosts beyond its delays.
        copy_ns_per_byte: processor time per byte that a rank handles.
        far_ns_per_byte: more for a byte that the network card takes part in.
        efficiency: of the network card's rate.
    """

    base_us: float
    near_us: float
    far_us: float
    copy_ns_per_byte: float
    far_ns_per_byte: float
    efficiency: float

    def time_us(self, name: str, bytes_per_rank: float, place: Place) -> float:
        """Time of the op."""
        steps, _, handled = volume(name, bytes_per_rank, place)
        copy = self.copy_ns_per_byte * place.crowd
        if place.far:
            hop = self.far_us + 2e6 * place.delay_s
            copy += self.far_ns_per_byte * far_share(name, place)
        else:
            hop, copy = self.near_us * place.crowd * place.hop_scale, copy * place.copy_scale
        on_wire = self.wire_us(name, bytes_per_rank, place)
        return self.base_us * place.crowd + steps * hop + on_wire + handled * copy * 1e-3

    def wire_us(self, name: str, bytes_per_rank: float, place: Place) -> float:
        """Of it, what the network card takes."""
        if not place.far:
            return 0.0
        rate = place.bytes_per_s * self.efficiency
        return volume(name, bytes_per_rank, place)[1] / rate * 1e6


def volume(name: str, bytes_per_rank: float, place: Place) -> tuple[float, float, float]:
    """Hops, bytes that leave a host, bytes that a rank sends."""
    p, n, b = place.ranks, min(place.per_host, place.ranks), bytes_per_rank
    hosts = p / n
    if name == "all_reduce":
        return 2.0 * (p - 1), 2 * b * (p - 1) / p, 2 * b * (p - 1) / p
    if name in ("all_gather", "lse_combine"):
        return p - 1.0, b * (p - 1), b * (p - 1)
    if name in ("reduce_scatter", "all_to_all"):
        return (1.0 if place.far else p - 1.0), b * n * (p - n) / p, b * (p - 1) / p
    if name == "broadcast":
        return 1.0, b * (hosts - 1), b
    return 1.0, b, b


def far_share(name: str, place: Place) -> float:
    """Part of the bytes that the ranks send which goes to other hosts. Ranks of a host share its cores,
    so what counts is the mean over them: of a ring's links one per host leaves it."""
    p, n = place.ranks, min(place.per_host, place.ranks)
    if name in ("all_reduce", "all_gather", "lse_combine", "permute_ranks"):
        return 1 / n
    return (p - n) / (p - 1)


@dataclass(frozen=True)
class GlooCosts:
    """Fitted numbers of a machine, by op."""

    ops: Mapping[str, OpCosts]

    def time_us(self, name: str, bytes_per_rank: float, place: Place) -> float:
        """Time of a transfer of `bytes_per_rank` before it, on each of the group's ranks. Never
        falls when bytes or ranks double. Raises KeyError."""
        op = FITTED[name]
        if place.ranks <= 1:
            return 0.0
        time_us = self.ops[op].time_us(op, bytes_per_rank, place)
        if place.ranks >= 4:  # half of the members, on as many ranks of a host
            half = replace(place, ranks=place.ranks // 2)
            time_us = max(time_us, self.time_us(name, bytes_per_rank, half))
        return time_us

    def wire_us(self, name: str, bytes_per_rank: float, place: Place) -> float:
        """What the network cards take of a transfer."""
        op = FITTED[name]
        return self.ops[op].wire_us(op, bytes_per_rank, place) if place.ranks > 1 else 0.0

    def to_json(self) -> str:
        """Text of a file."""
        return json.dumps({name: vars(op) for name, op in self.ops.items()}, indent=1) + "\n"

    @staticmethod
    def from_json(text: str) -> GlooCosts:
        """The numbers of a file's text."""
        return GlooCosts({name: OpCosts(**row) for name, row in json.loads(text).items()})


@cache
def gloo_costs() -> GlooCosts:
    """The numbers that the package ships: torch 2.13 on a 2-core x86 server."""
    path = files(__package__) / "weights" / "collectives_gloo.json"
    return GlooCosts.from_json(path.read_text(encoding="utf-8"))


@lru_cache(maxsize=4096)
def place_of(cluster: Cluster, ranks: int, per_host: int, crowd: float = 1.0) -> Place:
    """A group on a cluster. All groups of a mesh axis run at once: of a host's network card a group
    has the part of its members there."""
    members, usual = min(ranks, per_host), DEVICES["cpu"].intra
    hop = cluster.intra.latency_s / usual.latency_s
    copy = usual.bytes_per_s / cluster.intra.bytes_per_s
    rate, delay = cluster.inter.bytes_per_s * members, cluster.inter.latency_s
    return Place(ranks, per_host, rate, delay, crowd, hop, copy)


def gloo_time_us(name: str, bytes_per_rank: float, ranks: int, per_host: int, cluster: Cluster) -> float:
    """Time of a transfer on a cluster of CPUs, with the numbers that the package ships."""
    return gloo_costs().time_us(name, bytes_per_rank, place_of(cluster, ranks, per_host))
