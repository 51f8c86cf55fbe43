"""The static check of all ranks' schedules, before anything runs.

A backend does not notice when ranks disagree: under gloo a swapped pair of equal-shaped
all_reduces, SUM against MAX, or fp32 against int32 give silently wrong numbers. So this check is
the only defence. It proves, for the programs of all ranks together:

1. *lifetimes* (`lifetimes.py`): each value is defined before it is read, not read, freed or waited
   for twice after its end, not overwritten before its last use, and no transfer is left open;
2. *agreement*: the members of a process group run the same sequence of (id, op, dtype, shape,
   reduce-op, root, ...); the id of a collective is the name of its result;
3. *partners*: between two ranks the sends and the receives are the same sequence of (tag, dtype,
   shape), each tag once; between stages whose meshes have different shapes they are the same
   sequence of (tag, type and mesh of both ends), and all ranks of a stage run one program;
4. *progress*: no cycle in the graph below, so that no rank waits for ever.

The graph of (4) has, for each transfer, start nodes, one `done` node, and wait nodes. Edges: the
program order of each rank; all starts -> done; done of the transfer before on the same group (its
stream) -> done; done -> waits. The starts of a collective on all its members are one node: issuing
two groups' collectives in different orders is a deadlock hazard even when asynchronous (NCCL user
guide, "Using multiple NCCL communicators concurrently"). A send is a rendezvous with its receive.

Scale: ranks that run one function object, in groups whose members do alike, are equivalent (the
classes are found by colour refinement), and the graph is built on the classes. Each edge of the
class graph lifts to every rank of the class, so the class graph has a cycle exactly when the graph
over all ranks has one. The cost is O(ranks * axes) plus the length of the *distinct* programs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

from ..ir.crossing import crosses, far_end, own_type, wrong_ends
from ..ir.errors import RunError
from ..ir.module import Function, Module, Op
from ..ir.stage_ranks import StageRanks
from ..ir.types import Mesh
from .lifetimes import check_lifetimes, describe, show_ranks
from .progress import Event, Progress

_HINT = "plan again; if the plan is as weft made it, please report it with the artifact"
#: ops that act on a whole process group
COLLECTIVES = frozenset({
    "all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "permute_ranks",
    "lse_combine",
})  # fmt: skip


@dataclass
class Program:
    """A distinct program: its function, its mesh, the ranks that run it, and its communication."""

    function: Function
    mesh: Mesh
    ranks: list[int] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    transfers: dict[str | tuple[str, int], list[int]] = field(default_factory=dict)

    def op(self, index: int) -> Op:
        """The action at a position."""
        return self.function.ops[index]


def check(
    programs: Mapping[int, Function] | Module, mesh: Mesh | Sequence[Mesh] | None = None
) -> None:
    """Prove that the schedules of all ranks fit together. Raises RunError W0802.

    Args:
        programs: the entry function of each rank, ranks being `0 .. n - 1`; or a schedule-level
            module, whose entry all ranks of its mesh run.
        mesh: that of each pipeline stage (see `StageRanks`), or the one mesh that all stages have;
            the module's own by default.
    """
    if isinstance(programs, Module):
        mesh = mesh or programs.mesh or Mesh()
        programs = dict.fromkeys(range(StageRanks.of(mesh).size), programs.entry)
    mesh = mesh or Mesh()
    if isinstance(mesh, Mesh):
        mesh = (mesh,) * max(1, len(programs) // mesh.size)
    ranks = StageRanks.of(mesh)
    if not programs or sorted(programs) != list(range(ranks.size)):
        raise RunError(
            "W0802", f"the plan has programs for {len(programs)} ranks, its meshes have {ranks.size}",
            hint="give each rank of the mesh, and of each pipeline stage, a program",
        )  # fmt: skip
    classes, of_rank = _distinct(programs, ranks)
    for program in classes:
        check_lifetimes(program.function, show_ranks(program.ranks))
        _communication(program, program.mesh)
    world = _World(ranks, classes, of_rank)
    world.check_groups()
    world.check_partners()
    world.check_progress()


def _distinct(
    programs: Mapping[int, Function], ranks: StageRanks
) -> tuple[list[Program], list[int]]:
    """The distinct programs, and for each rank the position of its own among them."""
    classes: list[Program] = []
    by_id: dict[tuple[int, Mesh], int] = {}
    by_size: dict[int, list[int]] = {}
    of_rank = []
    for stage, mesh in enumerate(ranks.meshes):
        for rank in ranks.ranks(stage):
            function = programs[rank]
            found = by_id.get((id(function), mesh))
            if found is None:
                alike = by_size.setdefault(len(function.ops), [])
                same = (c for c in alike if classes[c].mesh == mesh and classes[c].function == function)
                found = next(same, len(classes))
                if found == len(classes):
                    classes.append(Program(function, mesh))
                    alike.append(found)
                by_id[id(function), mesh] = found
            classes[found].ranks.append(rank)
            of_rank.append(found)
    return classes, of_rank


def _communication(program: Program, mesh: Mesh) -> None:
    """Fill in the events and transfers of a program."""
    started: dict[str, Event] = {}
    for index, op in enumerate(program.function.ops):
        if op.name == "wait":
            begun = started.get(op.operands[0].name)
            if begun is not None:
                program.events.append(Event(index, False, begun.group, begun.number))
            continue
        group = _group_of(op, mesh, program, index)
        if group is None:
            continue
        transfers = program.transfers.setdefault(group, [])
        event = Event(index, True, group, len(transfers))
        transfers.append(index)
        program.events.append(event)
        if op.attrs.get("async"):
            started[op.results[0].name] = event
        else:
            program.events.append(Event(index, False, group, event.number))


def _group_of(op: Op, mesh: Mesh, program: Program, index: int) -> str | tuple[str, int] | None:
    if op.name in COLLECTIVES:
        axis = str(op.attrs.get("axis", ""))
        if axis not in mesh.names:
            raise RunError(
                "W0802", f"{show_ranks(program.ranks)}: a collective over axis {axis!r}, "
                f"the mesh has {', '.join(mesh.names) or 'no axes'}",
                reason=describe(program.function, index),
            )  # fmt: skip
        return axis
    across = " across" if crosses(op) else ""
    if op.name == "send":
        return ("send" + across, int(op.attrs["to"]))  # type: ignore[arg-type]
    if op.name == "recv":
        return ("recv" + across, int(op.attrs["source"]))  # type: ignore[arg-type]
    return None


def _facts(op: Op) -> dict[str, object]:
    """What all members of a group must agree on."""
    value, result = op.operands[0], op.results[0]
    facts: dict[str, object] = {
        "op": op.name, "dtype": value.type.dtype, "shape": value.type.shape,
        "placement": _show_placement(value.type.placement),
        "result dtype": result.type.dtype, "result shape": result.type.shape,
        "result placement": _show_placement(result.type.placement),
    }  # fmt: skip
    facts.update((k, v) for k, v in op.attrs.items() if k not in ("async", "axis"))
    if op.name in ("all_reduce", "reduce_scatter"):
        facts.setdefault("combine", "sum")
    if op.name == "broadcast":
        facts.setdefault("root", 0)
    if op.name == "permute_ranks":
        facts.setdefault("shift", 1)
    facts["id"] = result.name
    return facts


def _ends_differ(send: Op, mesh: Mesh, recv: Op, other: Mesh) -> str:
    """What the two ends of a transfer between meshes of different shape mean differently."""
    for op, own, there in ((send, mesh, recv), (recv, other, send)):
        reason = wrong_ends(there)
        if reason:
            return reason
        far_mesh, far_type = far_end(there)
        if far_mesh.axes != own.axes or far_type != own_type(op):
            return (f"{op.name} has {own_type(op)} on {dict(own.axes)}, its other end says "
                    f"{far_type} on {dict(far_mesh.axes)}")  # fmt: skip
    return ""


def _show_placement(placement: Iterable[object] | None) -> str:
    return "{" + ", ".join(map(str, placement or ())) + "}"


class _World:
    """All ranks with their programs, and the checks that need more than one of them."""

    def __init__(self, ranks: StageRanks, classes: list[Program], of_rank: list[int]) -> None:
        self.ranks, self.classes, self.of_rank = ranks, classes, of_rank
        self.stages = ranks.count
        self.axes = tuple(dict.fromkeys(name for mesh in ranks.meshes for name in mesh.names))

    def groups(self, axis: str) -> Iterable[range]:
        """The ranks of each process group of an axis, in all stages that have it."""
        for stage, mesh in enumerate(self.ranks.meshes):
            if axis not in mesh.names:
                continue
            position = mesh.axis(axis)
            size, stride = mesh.sizes[position], prod(mesh.sizes[position + 1 :])
            every = self.ranks.ranks(stage)
            for base in range(every.start, every.stop, stride * size):
                for first in range(base, base + stride):
                    yield range(first, first + stride * size, stride)

    def partner(self, rank: int, stage: int) -> int:
        """The rank at the same mesh coordinate in another stage."""
        return self.ranks.rank(stage, self.ranks.place(rank))

    # -- agreement --------------------------------------------------------------------------

    def check_groups(self) -> None:
        """The members of each process group run the same sequence of collectives."""
        for axis in self.axes:
            seen: set[frozenset[int]] = set()
            for ranks in self.groups(axis):
                members = frozenset(self.of_rank[rank] for rank in ranks)
                if len(members) == 1 or members in seen:
                    continue
                seen.add(members)
                first = ranks[0]
                done = {self.of_rank[first]}
                for rank in ranks:
                    if self.of_rank[rank] not in done:
                        done.add(self.of_rank[rank])
                        self._same_sequence(axis, first, rank)

    def _same_sequence(self, axis: str, first: int, second: int) -> None:
        left, right = self.classes[self.of_rank[first]], self.classes[self.of_rank[second]]
        lefts, rights = left.transfers.get(axis, []), right.transfers.get(axis, [])
        for number, (i, j) in enumerate(zip(lefts, rights, strict=False)):
            one, two = _facts(left.op(i)), _facts(right.op(j))
            if one == two:
                continue
            keys = [key for key in (*one, *two) if one.get(key) != two.get(key)]
            key = keys[0]
            raise RunError(
                "W0802",
                f"ranks {first} and {second} differ in collective {number} of axis {axis}: "
                f"{key} {one.get(key)} against {two.get(key)}",
                reason=f"rank {first}: {describe(left.function, i)}\n"
                f"       rank {second}: {describe(right.function, j)}",
                hint=_HINT,
            )
        if len(lefts) != len(rights):
            longer, rank = (left, first) if len(lefts) > len(rights) else (right, second)
            index = longer.transfers[axis][min(len(lefts), len(rights))]
            raise RunError(
                "W0802",
                f"on axis {axis} rank {first} runs {len(lefts)} collectives and rank {second} "
                f"{len(rights)}",
                reason=f"only rank {rank} runs {describe(longer.function, index)}",
                hint=_HINT,
            )

    # -- partners ---------------------------------------------------------------------------

    def check_partners(self) -> None:
        """Each send has its receive, in the same order between two ranks."""
        if not any(isinstance(group, tuple) for c in self.classes for group in c.transfers):
            return
        seen: set[tuple[int, int, int, int]] = set()
        for here in range(self.stages):
            for rank in self.ranks.ranks(here):
                for group, indices in self.classes[self.of_rank[rank]].transfers.items():
                    if not isinstance(group, tuple):
                        continue
                    kind, stage = group
                    other = self._other(rank, here, kind, stage, indices[0])
                    sends = kind.startswith("send")
                    source, target = (rank, other) if sends else (other, rank)
                    low, high = sorted((here, stage))
                    key = (self.of_rank[source], self.of_rank[target], low, high)
                    if key not in seen:
                        seen.add(key)
                        self._same_channel(source, target, kind[4:])

    def _other(self, rank: int, here: int, kind: str, stage: int, index: int) -> int:
        """A rank that one exchanges values with. Raises RunError W0802 where there is none."""
        function = self.classes[self.of_rank[rank]].function
        if not 0 <= stage < self.stages or stage == here:
            raise RunError(
                "W0802", f"rank {rank}: {kind} with stage {stage}, which is "
                + ("its own" if stage == here else f"not one of {self.stages}"),
                reason=describe(function, index),
            )  # fmt: skip
        if not kind.endswith("across"):
            if self.ranks.meshes[stage].sizes == self.ranks.meshes[here].sizes:
                return self.partner(rank, stage)
            raise RunError(
                "W0802", f"rank {rank}: {kind} with stage {stage}, whose mesh has another shape",
                reason=describe(function, index), hint=_HINT,
            )  # fmt: skip
        for number in (here, stage):
            ranks = self.ranks.ranks(number)
            odd = [r for r in ranks if self.of_rank[r] != self.of_rank[ranks.start]]
            if odd:
                raise RunError(
                    "W0802", f"ranks {ranks.start} and {odd[0]} of stage {number} run different "
                    "programs, which exchange values with a mesh of another shape",
                    reason=describe(function, index), hint=_HINT,
                )  # fmt: skip
        return self.ranks.firsts[stage]

    def _same_channel(self, source: int, target: int, across: str = "") -> None:
        left, right = self.classes[self.of_rank[source]], self.classes[self.of_rank[target]]
        sends = left.transfers.get(("send" + across, self.ranks.stage(target)), [])
        recvs = right.transfers.get(("recv" + across, self.ranks.stage(source)), [])
        where = f"from rank {source} to rank {target}"
        if across:
            where = f"from stage {self.ranks.stage(source)} to stage {self.ranks.stage(target)}"
        tags: set[object] = set()
        for number, (i, j) in enumerate(zip(sends, recvs, strict=False)):
            one, two = left.op(i), right.op(j)
            pair = (f"rank {source}: {describe(left.function, i)}\n"
                    f"       rank {target}: {describe(right.function, j)}")  # fmt: skip
            tag = one.attrs.get("tag", 0)
            sent, received = one.operands[0].type, two.results[0].type
            if tag != two.attrs.get("tag", 0):
                what = f"tag {tag} is sent, tag {two.attrs.get('tag', 0)} is expected"
            elif across and (wrong := _ends_differ(one, left.mesh, two, right.mesh)):
                what = wrong
            elif not across and sent != received:
                what = f"{sent} is sent, {received} is expected"
            elif tag in tags:
                what = f"tag {tag} is used twice, so an exchange of the two would go unnoticed"
            else:
                tags.add(tag)
                continue
            raise RunError("W0802", f"transfer {number} {where}: {what}", reason=pair, hint=_HINT)
        if len(sends) != len(recvs):
            longer, index = (left, sends) if len(sends) > len(recvs) else (right, recvs)
            extra = index[min(len(sends), len(recvs))]
            raise RunError(
                "W0802", f"{where}: {len(sends)} sends and {len(recvs)} receives",
                reason=f"without a partner: {describe(longer.function, extra)}", hint=_HINT,
            )  # fmt: skip

    # -- progress ---------------------------------------------------------------------------

    def _colours(self) -> list[int]:
        """Equivalence classes of ranks: same program, and neighbours of the same classes."""
        colour, count = list(self.of_rank), len(self.classes)
        while True:
            keys: list[list[object]] = [[c] for c in colour]
            for axis in self.axes:
                for ranks in self.groups(axis):
                    around = tuple(colour[rank] for rank in ranks)
                    around = around[:1] if len(set(around)) == 1 else around
                    for rank in ranks:
                        keys[rank].append(around)
            for rank, number in enumerate(self.of_rank):
                for group in self.classes[number].transfers:
                    if isinstance(group, tuple):
                        across = group[0].endswith("across")
                        near = self.ranks.stage(rank) if across else colour[self.partner(rank, group[1])]
                        keys[rank].append((group, near))
            table: dict[tuple[object, ...], int] = {}
            colour = [table.setdefault(tuple(key), len(table)) for key in keys]
            if len(table) == count:
                return colour
            count = len(table)

    def check_progress(self) -> None:
        """No cycle among starts, transfers and waits: every rank gets to its end."""
        colour = self._colours()
        sample: dict[int, int] = {}
        for rank, c in enumerate(colour):
            sample.setdefault(c, rank)
        around: dict[tuple[str, int], tuple[int, ...]] = {}
        for axis in self.axes:
            for ranks in self.groups(axis):
                members = tuple(colour[rank] for rank in ranks)
                for rank in ranks:
                    if sample[colour[rank]] == rank:
                        around[axis, rank] = members
        edges = Progress()
        for rank in sample.values():
            program = self.classes[self.of_rank[rank]]

            def channel(event: Event, rank: int = rank) -> tuple[object, ...]:
                if isinstance(event.group, str):
                    return (event.group, around[event.group, rank])
                kind, stage = event.group
                if kind.endswith("across"):
                    ends = (self.ranks.stage(rank), stage)
                    return ("across", *(ends if kind.startswith("send") else ends[::-1]))
                pair = (colour[rank], colour[self.partner(rank, stage)])
                return ("p2p", *(pair if kind == "send" else pair[::-1]))

            edges.add_program(rank, program.events, channel)
        cycle = edges.cycle()
        if not cycle:
            return
        lines = []
        for rank, event in cycle:
            function = self.classes[self.of_rank[rank]].function
            verb = "starts" if event.start else "waits for"
            lines.append(f"rank {rank} {verb} {describe(function, event.index)}")
        raise RunError(
            "W0802", "the schedules deadlock: each of these waits for the next, the last for the "
            "first", reason="\n       ".join(lines), hint=_HINT,
        )  # fmt: skip
