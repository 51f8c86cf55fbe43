"""The ranks of a simulation: classes of equal ranks, process groups, and who shares which link.

Two ranks are equal when they run the same program on shards of the same size, their groups have
members of the same classes in the same order, on hosts in the same pattern, and their hosts hold
ranks of the same classes. Colour refinement finds the coarsest such classes (as the static check
of `runtime/` does); equal ranks do everything at the same time, so one of each is replayed.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field

from ..ir.module import Function
from ..ir.types import Mesh
from .cluster import Cluster

#: what a transfer takes a share of: ("out" | "in", class of ranks) is a device's port inside its
#: host, ("nic out" | "nic in", class of hosts) the network interface of a host
Resource = tuple[str, int]


@dataclass(frozen=True)
class Channel:
    """A queue that runs its transfers in order: a process group, a pair of ranks, or a copy stream.

    Attributes:
        axis: the mesh axis, `stage` between pipeline stages, `copy` for a copy stream.
        classes: the classes of ranks that take part in each transfer.
        members: the ranks of one such group, in the order of their coordinate.
        uses: share of each resource that all groups of this channel take together while they
            transfer at full speed.
        one: the largest share that a single group takes of any resource.
        per_host: members on a host.
    """

    axis: str
    classes: tuple[int, ...]
    members: tuple[int, ...]
    uses: tuple[tuple[Resource, float], ...] = ()
    one: float = 1.0
    per_host: int = 1


@dataclass
class World:
    """All ranks of a plan on a cluster.

    Args:
        programs: the entry function of each rank; pipeline stage i owns the ranks
            `i * mesh.size ...`.
        mesh: the mesh of one stage.
        symmetric: replay one rank of each class; otherwise each rank is a class of its own.

    Attributes:
        colour: the class of each rank.
        sample: one rank of each class.
    """

    programs: Sequence[Function]
    mesh: Mesh
    cluster: Cluster
    symmetric: bool = True
    colour: list[int] = field(init=False)
    sample: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.size = len(self.programs)
        self.stages = self.size // self.mesh.size
        per_host = self.cluster.devices_per_host
        self.per_host = per_host
        self.host = [rank // per_host for rank in range(self.size)]
        self.coords = list(self.mesh.coords())
        self._groups = {axis: list(self._groups_of(axis)) for axis in self.mesh.names}
        self._group_of: dict[str, list[int]] = {}
        for axis, groups in self._groups.items():
            of = [0] * self.size
            for number, ranks in enumerate(groups):
                for rank in ranks:
                    of[rank] = number
            self._group_of[axis] = of
        partners = {id(f): _partner_stages(f) for f in {id(f): f for f in self.programs}.values()}
        self._partners = [
            [s for s in partners[id(f)] if 0 <= s < self.stages] for f in self.programs
        ]
        self.colour = self._refine() if self.symmetric else list(range(self.size))
        self.sample = [0] * (max(self.colour) + 1)
        for rank in range(self.size - 1, -1, -1):
            self.sample[self.colour[rank]] = rank
        self.ranks_of: list[list[int]] = [[] for _ in self.sample]
        for rank, colour in enumerate(self.colour):
            self.ranks_of[colour].append(rank)
        hosts: dict[Hashable, int] = {}
        self.host_colour = [
            hosts.setdefault(key if self.symmetric else host, len(hosts))
            for host, key in enumerate(self._host_keys(self.colour))
        ]

    def stage(self, rank: int) -> int:
        """The pipeline stage that a rank belongs to."""
        return rank // self.mesh.size

    def coord(self, rank: int) -> tuple[int, ...]:
        """The mesh coordinate of a rank inside its stage."""
        return self.coords[rank % self.mesh.size]

    def partner(self, rank: int, stage: int) -> int:
        """The rank at the same coordinate of another stage."""
        return stage * self.mesh.size + rank % self.mesh.size

    def group(self, rank: int, axis: str) -> range:
        """The ranks of a rank's process group along an axis."""
        return self._groups[axis][self._group_of[axis][rank]]

    def _groups_of(self, axis: str) -> Iterable[range]:
        position = self.mesh.axis(axis)
        stride = 1
        for size in self.mesh.sizes[position + 1 :]:
            stride *= size
        span = stride * self.mesh.sizes[position]
        for base in range(0, self.size, span):
            for first in range(base, base + stride):
                yield range(first, first + span, stride)

    # -- classes --------------------------------------------------------------------------------

    def _refine(self) -> list[int]:
        """The coarsest colouring under which ranks of one colour do the same at the same time."""
        colour = self._start()
        count = len(set(colour))
        patterns: dict[Hashable, int] = {}
        spread = {
            axis: [
                patterns.setdefault(_pattern([self.host[r] for r in ranks]), len(patterns))
                for ranks in groups
            ]
            for axis, groups in self._groups.items()
        }
        while True:
            keys: list[list[Hashable]] = [[c] for c in colour]
            for axis, groups in self._groups.items():
                for number, ranks in enumerate(groups):
                    around = tuple(colour[rank] for rank in ranks)
                    if len(set(around)) == 1:
                        around = around[:1]
                    for rank in ranks:
                        keys[rank].append((around, spread[axis][number]))
            for rank in range(self.size):
                for stage in self._partners[rank]:
                    other = self.partner(rank, stage)
                    near = self.host[rank] == self.host[other]
                    keys[rank].append((colour[other], near))
            for host, key in enumerate(self._host_keys(colour)):
                for rank in range(host * self.per_host, min(self.size, (host + 1) * self.per_host)):
                    keys[rank].append(key)
            table: dict[Hashable, int] = {}
            colour = [table.setdefault(tuple(key), len(table)) for key in keys]
            if len(table) == count:
                return colour
            count = len(table)

    def _start(self) -> list[int]:
        """Ranks by program and by the sizes of their shards."""
        table: dict[Hashable, int] = {}
        keys: dict[int, list[Hashable]] = {}
        out = []
        for rank, function in enumerate(self.programs):
            if id(function) not in keys:
                keys[id(function)] = self._shard_keys(function)
            key = (id(function), keys[id(function)][rank % self.mesh.size])
            out.append(table.setdefault(key, len(table)))
        return out

    def _shard_keys(self, function: Function) -> list[Hashable]:
        """For each coordinate, what tells its shards' sizes from those of other coordinates."""
        uneven: set[tuple[int, tuple[int, ...]]] = set()
        seen: set[int] = set()
        values = [*function.params, *(v for op in function.ops for v in op.results)]
        for value in values:
            if id(value.type) in seen:
                continue
            seen.add(id(value.type))
            split: dict[int, list[int]] = {}
            for axis, placement in enumerate(value.type.placement or ()):
                if placement.kind == "S":
                    split.setdefault(placement.dim, []).append(axis)
            for dim, axes in split.items():
                parts = 1
                for axis in axes:
                    parts *= self.mesh.sizes[axis]
                if value.type.shape[dim] % parts:
                    uneven.add((value.type.shape[dim], tuple(axes)))
        if not uneven:
            return [()] * self.mesh.size
        rows = sorted(uneven)
        return [
            tuple(_part(total, axes, self.mesh.sizes, coord) for total, axes in rows)
            for coord in self.coords
        ]

    def _host_keys(self, colour: Sequence[int]) -> list[Hashable]:
        """For each host, the classes of its ranks and which of them share a group."""
        keys: list[Hashable] = []
        for first in range(0, self.size, self.per_host):
            ranks = range(first, min(self.size, first + self.per_host))
            shared = tuple(_pattern([of[r] for r in ranks]) for of in self._group_of.values())
            keys.append((tuple(colour[r] for r in ranks), shared))
        return keys

    # -- channels -------------------------------------------------------------------------------

    def group_channel(self, rank: int, axis: str) -> Channel:
        """The channel of a rank's process group along an axis."""
        members = self.group(rank, axis)
        classes = tuple(sorted({self.colour[r] for r in members}))
        hosts = {self.host[r] for r in members}
        if len(hosts) == 1:
            ports = tuple(((way, c), 1.0) for c in classes for way in ("out", "in"))
            return Channel(axis, classes, tuple(members), ports, 1.0, len(members))
        around = tuple(self.colour[r] for r in members)
        uses: dict[Resource, float] = {}
        one = 0.0
        for host in sorted(hosts):
            here = range(host * self.per_host, min(self.size, (host + 1) * self.per_host))
            total = 0.0
            for number in {self._group_of[axis][r] for r in here}:
                group = self._groups[axis][number]
                if tuple(self.colour[r] for r in group) == around:
                    share = sum(self.host[r] == host for r in group) / self.per_host
                    total += share
                    one = max(one, share)
            for way in ("nic out", "nic in"):
                uses[way, self.host_colour[host]] = total
        on_first = sum(self.host[r] == self.host[members[0]] for r in members)
        return Channel(axis, classes, tuple(members), tuple(uses.items()), one, on_first)

    def pair_channel(self, source: int, target: int) -> Channel:
        """The channel from a rank to the rank at its coordinate of another stage."""
        one, two = self.colour[source], self.colour[target]
        near, far = self.host[source], self.host[target]
        if near == far:
            uses: tuple[tuple[Resource, float], ...] = ((("out", one), 1.0), (("in", two), 1.0))
            return Channel("stage", (one, two), (source, target), uses, 1.0, 2)
        here = range(near * self.per_host, min(self.size, (near + 1) * self.per_host))
        stage = self.stage(target)
        pairs = sum(
            self.colour[r] == one and self.colour[self.partner(r, stage)] == two for r in here
        )
        share = pairs / self.per_host
        uses = (
            (("nic out", self.host_colour[near]), share),
            (("nic in", self.host_colour[far]), share),
        )
        return Channel("stage", (one, two), (source, target), uses, 1 / self.per_host)


def _partner_stages(function: Function) -> tuple[int, ...]:
    found = {
        int(op.attrs["to" if op.name == "send" else "source"])  # type: ignore[arg-type]
        for op in function.ops
        if op.name in ("send", "recv")
    }
    return tuple(sorted(found))


def _pattern(items: Sequence[int]) -> tuple[int, ...]:
    """Which of the items are equal: numbers in the order of first appearance."""
    table: dict[int, int] = {}
    return tuple(table.setdefault(item, len(table)) for item in items)


def _part(
    total: int, axes: tuple[int, ...], sizes: Sequence[int], coord: Sequence[int]
) -> int:
    """Size of the part of a dim that a coordinate holds: balanced, the first parts larger."""
    for axis in axes:
        total = total // sizes[axis] + (coord[axis] < total % sizes[axis])
    return total
