"""The ranks of a simulation: classes of equal ranks, process groups, and who shares which link.

Two ranks are equal when they run the same program on shards of the same size, their groups have
members of the same classes in the same order, on hosts in the same pattern, and their hosts hold
ranks of the same classes. Colour refinement finds the coarsest such classes (as the static check
of `runtime/` does); equal ranks do everything at the same time, so one of each is replayed.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from math import prod

from ..ir.crossing import crosses, far_end, own_type, pieces, wrong_ends
from ..ir.errors import RunError
from ..ir.module import Function, Op
from ..ir.stage_ranks import StageRanks
from ..ir.types import Mesh, TensorType
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


@dataclass(frozen=True, slots=True)
class Link:
    """What one rank sends to another in a transfer between meshes of different shape.

    Attributes:
        label: the transfer's number, and the link's among those of its sender and of its receiver:
            no two links of a rank have the same.
        source, target: the ranks.
        bytes: that are sent.
    """

    label: tuple[int, int, int]
    source: int
    target: int
    bytes: int


@dataclass
class World:
    """All ranks of a plan on a cluster.

    Args:
        programs: the entry function of each rank.
        ranks: the mesh of each pipeline stage, and the ranks that it owns.
        cluster: with a device for each rank.
        symmetric: replay one rank of each class; otherwise each rank is a class of its own.

    Attributes:
        colour: the class of each rank.
        sample: one rank of each class.
        hosts: the ranks of each host; `host` is that of each rank.
        kind: the device group of each host.
    """

    programs: Sequence[Function]
    ranks: StageRanks
    cluster: Cluster
    symmetric: bool = True
    colour: list[int] = field(init=False)
    sample: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.size, self.stages = len(self.programs), self.ranks.count
        self.kind = self.cluster.host_groups()
        ends = accumulate(self.cluster.groups[group].devices for group in self.kind)
        self.hosts = [range(a, b) for a, b in pairwise((0, *ends))]
        self.host = [number for number, ranks in enumerate(self.hosts) for _ in ranks]
        self.coords = [coord for mesh in self.ranks.meshes for coord in mesh.coords()]
        self._stage = [stage for stage, mesh in enumerate(self.ranks.meshes) for _ in range(mesh.size)]
        names = dict.fromkeys(name for mesh in self.ranks.meshes for name in mesh.names)
        self._groups = {axis: list(self._groups_of(axis)) for axis in names}
        self._crossings: dict[Hashable, dict[int, list[Link]]] = {}
        self._across = [self._stage_crossings(stage) for stage in range(self.stages)]
        self._group_of: dict[str, list[int]] = {}
        for axis, groups in self._groups.items():
            of = [-1] * self.size
            for number, ranks in enumerate(groups):
                for rank in ranks:
                    of[rank] = number
            self._group_of[axis] = of
        partners = {id(f): _partner_stages(f) for f in {id(f): f for f in self.programs}.values()}
        sizes = [mesh.sizes for mesh in self.ranks.meshes]
        self._partners = [
            [s for s in partners[id(f)]
             if 0 <= s < self.stages and sizes[s] == sizes[self._stage[rank]]]
            for rank, f in enumerate(self.programs)
        ]  # fmt: skip
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
        return self._stage[rank]

    def mesh(self, rank: int) -> Mesh:
        """The mesh of a rank's stage."""
        return self.ranks.meshes[self._stage[rank]]

    def coord(self, rank: int) -> tuple[int, ...]:
        """The mesh coordinate of a rank inside its stage."""
        return self.coords[rank]

    def partner(self, rank: int, stage: int) -> int:
        """The rank at the same coordinate of another stage."""
        return self.ranks.rank(stage, rank - self.ranks.firsts[self._stage[rank]])

    def group(self, rank: int, axis: str) -> range:
        """The ranks of a rank's process group along an axis."""
        return self._groups[axis][self._group_of[axis][rank]]

    def _groups_of(self, axis: str) -> Iterable[range]:
        for stage, mesh in enumerate(self.ranks.meshes):
            if axis not in mesh.names:
                continue
            position = mesh.axis(axis)
            stride = prod(mesh.sizes[position + 1 :])
            span = stride * mesh.sizes[position]
            own = self.ranks.ranks(stage)
            for base in range(own.start, own.stop, span):
                for first in range(base, base + stride):
                    yield range(first, first + span, stride)

    # -- transfers between meshes of different shape --------------------------------------------

    def links(self, op: Op, rank: int) -> list[Link]:
        """What a crossing `send` or `recv` moves from or to a rank. RunError W0802 for wrong ends."""
        reason = wrong_ends(op)
        here = self._stage[rank]
        there = int(op.attrs["to" if op.name == "send" else "source"])  # type: ignore[arg-type]
        if not reason and not (0 <= there < self.stages and there != here):
            reason = f"{op.name} with stage {there}, stages are 0 to {self.stages - 1}"
        if not reason and far_end(op)[0].axes != self.ranks.meshes[there].axes:
            reason = f"stage {there} has another mesh than {op.attrs['mesh']}"
        if reason:
            raise RunError("W0802", f"rank {rank}: {reason}", hint="plan again")
        far = far_end(op)[1]
        sends = op.name == "send"
        source, target = (here, there) if sends else (there, here)
        types = (own_type(op), far) if sends else (far, own_type(op))
        return self._crossing(source, target, *types).get(rank, [])

    def _crossing(
        self, source: int, target: int, sent: TensorType, got: TensorType
    ) -> dict[int, list[Link]]:
        """The links of each rank that takes part."""
        key = (source, target, sent, got)
        found = self._crossings.get(key)
        if found is None:
            found = self._crossings[key] = {}
            number = len(self._crossings)
            one, two = self.ranks.meshes[source], self.ranks.meshes[target]
            for piece in pieces(sent, one, got, two):
                a = self.ranks.rank(source, piece.source)
                b = self.ranks.rank(target, piece.target)
                ends = found.setdefault(a, []), found.setdefault(b, [])
                link = Link((number, len(ends[0]), len(ends[1])), a, b, piece.bytes(sent.dtype))
                ends[0].append(link)
                ends[1].append(link)
        return found

    def _stage_crossings(self, stage: int) -> list[Op]:
        """The distinct crossing ops of a stage's program."""
        found: dict[Hashable, Op] = {}
        for op in self.programs[self.ranks.firsts[stage]].ops:
            if crosses(op):
                stage_ = op.attrs.get("to"), op.attrs.get("source")
                ends = op.attrs["mesh"], op.attrs.get("placement")
                found.setdefault((op.name, own_type(op), *stage_, *ends), op)
        return list(found.values())

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
                for op in self._across[self._stage[rank]]:
                    for link in self.links(op, rank):
                        other = link.target if link.source == rank else link.source
                        near = self.host[rank] == self.host[other]
                        keys[rank].append((link.label, link.bytes, colour[other], near))
            for host, key in enumerate(self._host_keys(colour)):
                for rank in self.hosts[host]:
                    keys[rank].append(key)
            table: dict[Hashable, int] = {}
            colour = [table.setdefault(tuple(key), len(table)) for key in keys]
            if len(table) == count:
                return colour
            count = len(table)

    def _start(self) -> list[int]:
        """Ranks by program, mesh and kind of device, and by the sizes of their shards."""
        table: dict[Hashable, int] = {}
        keys: dict[Hashable, list[Hashable]] = {}
        out = []
        for rank, function in enumerate(self.programs):
            mesh, place = self.mesh(rank), rank - self.ranks.firsts[self._stage[rank]]
            own = (id(function), mesh)
            if own not in keys:
                keys[own] = self._shard_keys(function, mesh)
            key = (own, self.kind[self.host[rank]], keys[own][place])
            out.append(table.setdefault(key, len(table)))
        return out

    def _shard_keys(self, function: Function, mesh: Mesh) -> list[Hashable]:
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
                    parts *= mesh.sizes[axis]
                if value.type.shape[dim] % parts:
                    uneven.add((value.type.shape[dim], tuple(axes)))
        if not uneven:
            return [()] * mesh.size
        rows = sorted(uneven)
        return [
            tuple(_part(total, axes, mesh.sizes, coord) for total, axes in rows)
            for coord in mesh.coords()
        ]

    def _host_keys(self, colour: Sequence[int]) -> list[Hashable]:
        """For each host, the classes of its ranks and which of them share a group."""
        keys: list[Hashable] = []
        for ranks in self.hosts:
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
            here = self.hosts[host]
            total = 0.0
            for number in {self._group_of[axis][r] for r in here} - {-1}:
                group = self._groups[axis][number]
                if tuple(self.colour[r] for r in group) == around:
                    share = sum(self.host[r] == host for r in group) / len(here)
                    total += share
                    one = max(one, share)
            for way in ("nic out", "nic in"):
                uses[way, self.host_colour[host]] = total
        on_first = sum(self.host[r] == self.host[members[0]] for r in members)
        return Channel(axis, classes, tuple(members), tuple(uses.items()), one, on_first)

    def pair_channel(self, source: int, target: int) -> Channel:
        """The channel from a rank to one of another stage."""
        one, two = self.colour[source], self.colour[target]
        near, far = self.host[source], self.host[target]
        if near == far:
            uses: tuple[tuple[Resource, float], ...] = ((("out", one), 1.0), (("in", two), 1.0))
            return Channel("stage", (one, two), (source, target), uses, 1.0, 2)
        rates = [self.cluster.hardware[self.kind[h]].inter.bytes_per_s for h in (near, far)]
        shares = [  # of a host's card, where the slower card sets the speed
            min(rates) / rate / len(self.hosts[host]) for host, rate in zip((near, far), rates, strict=True)
        ]
        pairs = [
            sum(self.colour[r] == colour for r in self.hosts[host])
            for host, colour in ((near, one), (far, two))
        ]
        uses = (
            (("nic out", self.host_colour[near]), pairs[0] * shares[0]),
            (("nic in", self.host_colour[far]), pairs[1] * shares[1]),
        )
        return Channel("stage", (one, two), (source, target), uses, max(shares))


def _partner_stages(function: Function) -> tuple[int, ...]:
    found = {
        int(op.attrs["to" if op.name == "send" else "source"])  # type: ignore[arg-type]
        for op in function.ops
        if op.name in ("send", "recv") and not crosses(op)
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
