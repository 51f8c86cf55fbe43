"""What a simulation found: times, waiting, memory and the critical path of each class of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from ..ir.module import Function, Op
from ..ir.types import Mesh
from .simulate_engine import Run
from .simulate_memory import Memory, Owner, held_at, memory_of
from .simulate_program import COMPUTE, START, SYNC, WAIT, Job, Replay
from .simulate_world import Channel, Link


@dataclass
class Timeline:
    """A predicted step of one rank.

    Attributes:
        slices: (track, name, path, start_us, duration_us).
        step_us: when the last action of any rank ends.
        exposed_us: time that the compute stream waits for communication, per axis.
        peak_bytes: largest sum of live values, parameters included.
        memory: (time_us, bytes) at each change.
        at_peak: what is held at the peak: (kind, owner, bytes), where the kind is the role of an
            entry parameter, or what a value is for, and the owner its name or a module path.
    """

    slices: list[tuple[str, str, str, float, float]] = field(default_factory=list)
    step_us: float = 0.0
    exposed_us: dict[str, float] = field(default_factory=dict)
    peak_bytes: int = 0
    memory: list[tuple[float, int]] = field(default_factory=list)
    at_peak: list[Owner] = field(default_factory=list)


@dataclass(frozen=True)
class Waiting:
    """Where the time of a rank goes; the parts add up to the step.

    Attributes:
        busy_us: its compute stream computes.
        exposed_us: it waits for a transfer that is under way or queued, per axis.
        bubble_us: it waits for another rank to take part, or has nothing left to do.
    """

    busy_us: float
    exposed_us: dict[str, float]
    bubble_us: float


@dataclass(frozen=True)
class PathStep:
    """An action on the critical path.

    Attributes:
        rank: the rank that it runs on, one of them for a collective.
        index: position of the action in the rank's program.
        op: the action.
        axis: mesh axis, `stage` or `copy` of a transfer; empty for compute.
        start_us: when it began.
        duration_us: how long it took.
    """

    rank: int
    index: int
    op: Op
    axis: str
    start_us: float
    duration_us: float


class Result:
    """A replayed step of all ranks.

    Attributes:
        step_us: when the last action ends.
    """

    def __init__(self, replay: Replay, run: Run) -> None:
        self._replay, self._run = replay, run
        ends = [end[-1] for end in run.end_us if end]
        self.step_us = max(ends, default=0.0)

    # -- ranks ----------------------------------------------------------------------------------

    def mesh(self, rank: int) -> Mesh:
        """The mesh of a rank's stage."""
        return self._replay.world.mesh(rank)

    def links(self, rank: int, op: Op) -> list[Link]:
        """What a `send` or `recv` between meshes of different shape moves from or to a rank."""
        return self._replay.world.links(op, rank)

    def partner(self, rank: int, stage: int) -> int:
        """The rank at the same mesh coordinate of another stage."""
        return self._replay.world.partner(rank, stage)

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        return self._replay.world.size

    @property
    def classes(self) -> list[list[int]]:
        """The ranks of each class: ranks of one class do the same at the same time."""
        return self._replay.world.ranks_of

    def program(self, rank: int) -> Function:
        """The program that a rank runs."""
        return self._replay.world.programs[rank]

    def coord(self, rank: int) -> tuple[int, ...]:
        """The mesh coordinate of a rank inside its stage."""
        return self._replay.world.coord(rank)

    def members(self, rank: int, axis: str) -> Sequence[int]:
        """The ranks of a rank's process group along an axis."""
        return self._replay.world.group(rank, axis)

    def actions(self, rank: int) -> list[tuple[int, float, float]]:
        """(position, start_us, end_us) of a rank's actions that take time, wait, or start a
        transfer, in order."""
        colour = self._replay.world.colour[rank]
        rows = zip(
            self._replay.steps[colour], self._run.start_us[colour], self._run.end_us[colour],
            strict=True,
        )  # fmt: skip
        return [(step[1], start, end) for step, start, end in rows]

    def transfers(self, rank: int) -> list[tuple[int, Channel, float, float]]:
        """(position of the start, channel, start_us, end_us) of the transfers of a rank."""
        colour = self._replay.world.colour[rank]
        return [
            (index, self._replay.channels[job.channel], job.start_us, job.end_us)
            for kind, index, _, job in self._replay.steps[colour]
            if job is not None and kind in (START, SYNC)
        ]

    @cached_property
    def waiting(self) -> list[Waiting]:
        """Where the time goes, for each class of ranks."""
        out = []
        for steps, starts, ends in zip(
            self._replay.steps, self._run.start_us, self._run.end_us, strict=True
        ):
            busy = bubble = 0.0
            exposed: dict[str, float] = {}
            for (kind, _, _, job), start, end in zip(steps, starts, ends, strict=True):
                if kind == COMPUTE:
                    busy += end - start
                elif job is not None and end > start:
                    alone = max(0.0, min(job.ready_us, end) - start)
                    bubble += alone
                    axis = self._replay.channels[job.channel].axis
                    exposed[axis] = exposed.get(axis, 0.0) + end - start - alone
            bubble += self.step_us - (ends[-1] if ends else 0.0)
            out.append(Waiting(busy, {a: t for a, t in exposed.items() if t > 0}, bubble))
        return out

    @cached_property
    def slowest(self) -> int:
        """A rank of the class that is the last to end."""
        ends = [end[-1] if end else 0.0 for end in self._run.end_us]
        return self._replay.world.sample[ends.index(max(ends, default=0.0))]

    @property
    def exposed_us(self) -> dict[str, float]:
        """Time that compute waits for communication, per axis: mean over ranks."""
        return self._mean([row.exposed_us for row in self.waiting])

    @property
    def bubble(self) -> float:
        """Share of the step in which a rank has nothing to do but wait for others: mean over ranks."""
        if not self.step_us:
            return 0.0
        return self._mean([{"": row.bubble_us} for row in self.waiting])[""] / self.step_us

    def _mean(self, rows: Sequence[dict[str, float]]) -> dict[str, float]:
        total: dict[str, float] = {}
        for row, ranks in zip(rows, self.classes, strict=True):
            for key, value in row.items():
                total[key] = total.get(key, 0.0) + value * len(ranks) / self.ranks
        return total

    # -- memory ---------------------------------------------------------------------------------

    def memory(self, rank: int) -> Memory:
        """Live bytes of a rank by action."""
        return self._memories[self._replay.world.colour[rank]]

    @cached_property
    def _memories(self) -> list[Memory]:
        world = self._replay.world
        return [
            memory_of(world.programs[rank], world.mesh(rank), world.coord(rank))
            for rank in world.sample
        ]

    @property
    def peak_bytes(self) -> int:
        """The most memory that any rank needs."""
        return max(memory.peak_bytes for memory in self._memories)

    @property
    def fullest(self) -> int:
        """A rank that needs this much."""
        peaks = [memory.peak_bytes for memory in self._memories]
        return self._replay.world.sample[peaks.index(max(peaks))]

    @property
    def at_peak(self) -> list[Owner]:
        """What the fullest rank holds at its peak: (kind, owner, bytes)."""
        return self._held(self.fullest)

    def _held(self, rank: int) -> list[Owner]:
        world = self._replay.world
        function, coord = self.program(rank), world.coord(rank)
        return held_at(function, world.mesh(rank), coord, self.memory(rank).peak_at)

    # -- views ----------------------------------------------------------------------------------

    def timeline(self, rank: int | None = None) -> Timeline:
        """One rank's step, by default that of a rank that needs most memory."""
        rank = self.fullest if rank is None else rank
        world = self._replay.world
        colour, ops = world.colour[rank], self.program(rank).ops
        timeline = Timeline(step_us=self.step_us)
        timeline.exposed_us = dict(self.waiting[colour].exposed_us)
        rows = zip(
            self._replay.steps[colour], self._run.start_us[colour], self._run.end_us[colour],
            strict=True,
        )  # fmt: skip
        times: list[tuple[int, float, float]] = []
        for (kind, index, _, job), start, end in rows:
            op = ops[index]
            times.append((index, start, end))
            name = str(op.attrs.get("callee", op.name))
            if kind == COMPUTE:
                timeline.slices.append(("compute", name, op.loc.path, start, end - start))
            elif job is not None and kind != WAIT and job.end_us > job.start_us:
                axis = self._replay.channels[job.channel].axis
                span = job.end_us - job.start_us
                timeline.slices.append((f"axis {axis}", name, op.loc.path, job.start_us, span))
        memory = self.memory(rank)
        timeline.peak_bytes, timeline.at_peak = memory.peak_bytes, self._held(rank)
        timeline.memory = self._memory_times(memory, times)
        return timeline

    def _memory_times(
        self, memory: Memory, times: Sequence[tuple[int, float, float]]
    ) -> list[tuple[float, int]]:
        out: list[tuple[float, int]] = []
        at, now = 0, 0.0
        for index, size in memory.changes:
            while at < len(times) and times[at][0] < index:
                now = times[at][2]
                at += 1
            out.append((now, size))
        return [*out, (self.step_us, memory.changes[-1][1])]

    # -- critical path --------------------------------------------------------------------------

    @cached_property
    def critical_path(self) -> list[PathStep]:
        """The actions that the step's time is made of, in order: each began when the one before it
        ended. Their durations add up to the step."""
        world = self._replay.world
        colour = world.colour[self.slowest]
        at = len(self._replay.steps[colour]) - 1
        path: list[PathStep] = []
        while at >= 0:
            kind, index, _, job = self._replay.steps[colour][at]
            start, end = self._run.start_us[colour][at], self._run.end_us[colour][at]
            if kind == COMPUTE:
                rank = world.sample[colour]
                op = self.program(rank).ops[index]
                path.append(PathStep(rank, index, op, "", start, end - start))
            elif end > start:
                assert job is not None
                first = job
                while True:
                    path.append(self._path_job(first))
                    if first.after is None:
                        break
                    first = first.after
                colour, at = first.last
            at -= 1
        return path[::-1]

    def _path_job(self, job: Job) -> PathStep:
        colour, at = job.last
        index = self._replay.steps[colour][at][1]
        axis = self._replay.channels[job.channel].axis
        duration = job.end_us - job.start_us
        rank = self._replay.world.sample[colour]
        return PathStep(rank, index, job.op, axis, job.start_us, duration)
