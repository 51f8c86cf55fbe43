"""Devices of several kinds dealt out to stages: the blocks that a mixed cluster may be cut into.

The groups stand in a line, in each order; a stage takes whole hosts of one group, all of one host, or
half of one. So fast devices get more units than slow ones, on a mesh of their own, and the number of
devices differs from stage to stage. A placement is searched once for each group and size of a block
(as HexiScale and Alpa do for their device meshes).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations

from ..costmodel.cluster import Cluster, Group
from ..ir.types import Mesh

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
