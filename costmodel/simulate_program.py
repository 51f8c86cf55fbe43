"""A schedule as what its replay needs: for each class of ranks a list of steps, for each channel
its transfers in order, matched over the ranks that take part."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

from ..ir.crossing import crosses, far_end, own_type
from ..ir.errors import RunError
from ..ir.module import Function, Op
from ..ir.opdef import OPS
from ..ir.types import Mesh
from .collectives import LOCAL
from .simulate_cost import Costs, Transfer, local_bytes_at
from .simulate_world import Channel, Link, Resource, World

#: kinds of steps
COMPUTE, START, WAIT, SYNC = range(4)
#: families of ops that give the same result in each step, so that a plan computes them once when
#: they depend on constants alone
_PURE = frozenset({"pointwise", "reduction", "row", "movement", "indexing", "contraction"})
#: results of such ops that are kept from step to step are at most this large (as in `runtime/`)
HOIST_BYTES = 1 << 20
_HINT = "plan again; a schedule that was written by hand needs equal sequences on all members"


@dataclass(eq=False, slots=True)
class Job:
    """A transfer, or an action of a copy stream, and what happened to it.

    Attributes:
        op: the action of the first rank that was seen to take part.
        number: its place in the channel's order.
        channel: position of the channel.
        size: most bytes that a member holds before it.
        time_us: its time with its links for itself.
        uses: share of each resource at full speed.
        weight: the bandwidth that one group takes, for fairness.
        waiting: classes of ranks that wait for its end.
        ready_us: when the last member arrived.
        last: (class, position of the step) of that member.
        after: the transfer before it on the channel, where it had to wait for that one's end.
    """

    op: Op
    number: int
    channel: int
    need: int
    size: int = 0
    time_us: float = 0.0
    uses: tuple[tuple[Resource, float], ...] = ()
    weight: float = 0.0
    arrived: int = 0
    seen: list[int] = field(default_factory=list)
    waiting: list[int] = field(default_factory=list)
    ready_us: float = -1.0
    start_us: float = -1.0
    end_us: float = -1.0
    last: tuple[int, int] = (-1, -1)
    after: Job | None = None
    remaining_us: float = 0.0
    rate: float = 0.0
    cap: float = 1.0
    updated_us: float = 0.0
    version: int = 0


#: (kind, position of the action in the entry function, time in us of a COMPUTE, else its job)
Step = tuple[int, int, float, Job | None]


@dataclass
class Replay:
    """All that the engine runs.

    Attributes:
        steps: for each class of ranks, its steps.
        channels: the channels.
        jobs: for each channel, its transfers in order.
    """

    world: World
    steps: list[list[Step]]
    channels: list[Channel]
    jobs: list[list[Job]]


class _Reader:
    """Reads the programs of all classes."""

    def __init__(
        self, world: World, costs: Sequence[Costs], functions: Mapping[str, Function]
    ) -> None:
        self.world, self.costs, self.functions = world, costs, functions
        self.channels: list[Channel] = []
        self.jobs: list[list[Job]] = []
        self.numbers: dict[Hashable, int] = {}

    def read(self) -> Replay:
        steps = [self._steps(colour) for colour in range(len(self.world.sample))]
        for number, jobs in enumerate(self.jobs):
            channel = self.channels[number]
            for job in jobs:
                if len(job.seen) < job.need:
                    self._missing(channel, job)
                if channel.axis != "copy":
                    self._price(channel, job)
        return Replay(self.world, steps, self.channels, self.jobs)

    def _price(self, channel: Channel, job: Job) -> None:
        transfer = Transfer(
            job.op.name, job.size, len(channel.members), channel.per_host, channel.axis
        )
        ends = {self.world.stage(rank) for rank in (channel.members[0], channel.members[-1])}
        # between devices of two kinds: as slow as the slower one
        job.time_us, empty_us = max(self.costs[stage].transfer_us(transfer) for stage in ends)
        if job.time_us > 0:
            busy = max(0.0, 1.0 - empty_us / job.time_us)  # the rest is latency: no bandwidth
            job.uses = tuple((resource, use * busy) for resource, use in channel.uses)
            job.weight = channel.one * busy

    def _steps(self, colour: int) -> list[Step]:
        world = self.world
        rank = world.sample[colour]
        coord, function = world.coord(rank), world.programs[rank]
        costs, counts = self.costs[world.stage(rank)], dict[int, int]()
        steps: list[Step] = []
        handles: dict[str, list[Job]] = {}
        constant: set[str] = set()
        for index, op in enumerate(function.ops):
            name = op.name
            if name == "free":
                continue
            if name == "wait":
                for job in handles.pop(op.operands[0].name, ()):
                    steps.append((WAIT, index, 0.0, job))
                continue
            family = OPS[name].family
            if family == "collective" or op.attrs.get("async"):
                jobs = self._jobs(op, index, rank, counts)
                later = bool(op.attrs.get("async"))
                if later:
                    handles[op.results[0].name] = jobs
                # what is not asynchronous starts all of its pieces, then waits for them
                alone = not later and len(jobs) == 1
                steps += [(SYNC if alone else START, index, 0.0, job) for job in jobs]
                steps += [] if later or alone else [(WAIT, index, 0.0, job) for job in jobs]
                continue
            if self._hoisted(op, constant, world.mesh(rank), coord):
                constant.update(value.name for value in op.results)
                continue
            time_us = costs.action_us(op, coord)
            if time_us > 0:
                steps.append((COMPUTE, index, time_us, None))
        return steps

    def _hoisted(self, op: Op, constant: set[str], mesh: Mesh, coord: tuple[int, ...]) -> bool:
        """Is the action done once, when the plan is loaded?"""
        if op.operands and (not constant or any(v.name not in constant for v in op.operands)):
            return False
        body = self.functions[str(op.attrs["callee"])].ops if op.name == "call" else (op,)
        for inner in body:
            family = OPS[inner.name].family
            if family not in _PURE and not (family == "creation" and not inner.operands):
                return False
        return all(local_bytes_at(v.type, mesh, coord) <= HOIST_BYTES for v in op.results)

    def _jobs(self, op: Op, index: int, rank: int, counts: dict[int, int]) -> list[Job]:
        """The transfers that an action takes part in; none on a group of one rank."""
        world, mesh = self.world, self.world.mesh(rank)
        colour = world.colour[rank]
        held = (op.operands or op.results)[0]
        size = local_bytes_at(held.type, mesh, world.coord(rank))
        if OPS[op.name].family != "collective":
            number = self._channel(("copy", colour), Channel("copy", (colour,), (rank,)))
        elif crosses(op):
            return [
                self._job(op, index, rank, self._across(link), link.bytes, counts)
                for link in world.links(op, rank)
            ]
        elif op.name in ("send", "recv"):
            number = self._pair(op, index, rank)
        else:
            axis = str(op.attrs.get("axis", ""))
            if axis not in mesh.names:
                known = ", ".join(mesh.names) or "no axes"
                self._disagree(f"rank {rank}: {op.name} over axis {axis!r}, the mesh has {known}",
                               _where(op, index))  # fmt: skip
            group = world.group(rank, axis)
            if len(group) == 1 or op.name in LOCAL:
                return []
            key = (axis, tuple(world.colour[r] for r in group))
            found = self.numbers.get(key)
            number = self._channel(key, world.group_channel(rank, axis)) if found is None else found
        return [self._job(op, index, rank, number, size, counts)]

    def _job(
        self, op: Op, index: int, rank: int, number: int, size: int, counts: dict[int, int]
    ) -> Job:
        """The next transfer of a rank on a channel."""
        place = counts.get(number, 0)
        counts[number] = place + 1
        jobs = self.jobs[number]
        if place == len(jobs):
            jobs.append(Job(op, place, number, len(self.channels[number].classes)))
        job = jobs[place]
        job.seen.append(self.world.colour[rank])
        if job.op is not op:
            self._match(job, op, index, rank)
        if self.channels[number].axis == "copy":
            stage = self.world.stage(rank)
            job.time_us = self.costs[stage].action_us(op, self.world.coord(rank))
        else:
            job.size = max(job.size, size)
        return job

    def _across(self, link: Link) -> int:
        """The channel of a link between meshes of different shape."""
        colour = self.world.colour
        key = ("stage", colour[link.source], colour[link.target], link.label)
        found = self.numbers.get(key)
        if found is not None:
            return found
        return self._channel(key, self.world.pair_channel(link.source, link.target))

    def _pair(self, op: Op, index: int, rank: int) -> int:
        world = self.world
        stage = int(op.attrs["to" if op.name == "send" else "source"])  # type: ignore[arg-type]
        if not 0 <= stage < world.stages or stage == world.stage(rank):
            own = "its own" if stage == world.stage(rank) else f"not one of {world.stages}"
            self._disagree(
                f"rank {rank}: {op.name} with stage {stage}, which is {own}", _where(op, index)
            )
        if world.ranks.meshes[stage].sizes != world.mesh(rank).sizes:
            self._disagree(
                f"rank {rank}: {op.name} with stage {stage}, whose mesh has another shape",
                _where(op, index),
            )
        other = world.partner(rank, stage)
        source, target = (rank, other) if op.name == "send" else (other, rank)
        key = ("stage", world.colour[source], world.colour[target])
        found = self.numbers.get(key)
        if found is not None:
            return found
        return self._channel(key, world.pair_channel(source, target))

    def _channel(self, key: Hashable, channel: Channel) -> int:
        number = self.numbers.get(key)
        if number is None:
            number = self.numbers[key] = len(self.channels)
            self.channels.append(channel)
            self.jobs.append([])
        return number

    # -- agreement ------------------------------------------------------------------------------

    def _match(self, job: Job, op: Op, index: int, rank: int) -> None:
        """Raise RunError W0802 where two ranks mean different transfers."""
        first = job.op
        one: tuple[object, ...]
        two: tuple[object, ...]
        if {first.name, op.name} == {"send", "recv"}:
            one, two = _ends(first), _ends(op)
        else:
            one = (first.name, first.results[0].name, first.operands[0].type, _facts(first))
            two = (op.name, op.results[0].name, op.operands[0].type, _facts(op))
        if one != two:
            other = self.world.sample[job.seen[0]]
            self._disagree(
                f"ranks {other} and {rank} differ in transfer {job.number} of "
                f"{self.channels[job.channel].axis}",
                f"rank {other}: {_text(first)}\n       rank {rank}: {_where(op, index)}",
            )

    def _missing(self, channel: Channel, job: Job) -> NoReturn:
        absent = next(c for c in channel.classes if c not in job.seen)
        self._disagree(
            f"rank {self.world.sample[absent]} does not take part in transfer {job.number} of "
            f"{channel.axis}, ranks {', '.join(map(str, channel.members[:8]))}",
            f"rank {self.world.sample[job.seen[0]]}: {_text(job.op)}",
        )

    @staticmethod
    def _disagree(message: str, reason: str) -> NoReturn:
        raise RunError("W0802", message, reason=reason, hint=_HINT)


def _ends(op: Op) -> tuple[object, ...]:
    """What both ends of a transfer between two ranks agree on: tag, and the types that it has."""
    own = own_type(op)
    types = (own, far_end(op)[1]) if crosses(op) else (own,)
    return op.attrs.get("tag", 0), types if op.name == "send" else types[::-1]


def _facts(op: Op) -> list[tuple[str, object]]:
    return sorted((k, v) for k, v in op.attrs.items() if k != "async")


def _text(op: Op) -> str:
    left = ", ".join(map(str, op.results))
    place = f", from {op.loc}" if str(op.loc) else ""
    return f"{left} = {op.name}({', '.join(map(str, op.operands))}){place}"


def _where(op: Op, index: int) -> str:
    return f"action {index}: {_text(op)}"


def read_programs(
    world: World, costs: Sequence[Costs], functions: Mapping[str, Function]
) -> Replay:
    """The steps of all classes and the transfers of all channels.

    Args:
        costs: those of each stage.
        functions: kernel functions by name.

    Raises RunError W0802 where ranks do not agree on their transfers.
    """
    return _Reader(world, costs, functions).read()
