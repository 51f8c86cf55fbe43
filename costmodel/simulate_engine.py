"""The event loop: compute streams, queues of transfers, shared links, mutual slowdown.

A rank's compute stream runs its steps in order. A transfer is queued when its last member arrives
at its start; each channel runs its queue in order, a few at a time. While it runs, a transfer has a
rate (`simulate_rates`), which changes when transfers on its links come and go. Compute is slower
while a transfer runs on the rank, and where the ranks of a host compute on fewer cores than ranks.
All events of one instant are handled before rates are set again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import NoReturn

from ..ir.errors import RunError
from .simulate_program import COMPUTE, START, WAIT, Job, Replay
from .simulate_rates import fair_rates
from .simulate_world import Resource


@dataclass(frozen=True)
class Settings:
    """What a replay assumes about the devices and the communication backend.

    Attributes:
        at_once: transfers that one process group runs at the same time. gloo runs two (its thread
            pool has two threads), NCCL has one stream for each communicator.
        compute_slowdown: factor on the time of compute while a transfer runs on the rank.
        transfer_slowdown: factor on the time of a transfer while a member computes.
        cores_per_host: cores for the ranks of a host to compute on; None for one or more each.
    """

    at_once: int = 1
    compute_slowdown: float = 1.0
    transfer_slowdown: float = 1.0
    cores_per_host: float | None = None


@dataclass
class Run:
    """What happened: for each class and step when it began and ended."""

    start_us: list[list[float]]
    end_us: list[list[float]]


class Engine:
    """One replay. Use `run` once.

    Heap entries are (time, serial number, what, version): `what` is a class of ranks whose compute
    step ends, or a job; an entry with an old version is void.
    """

    def __init__(self, replay: Replay, settings: Settings) -> None:
        self.replay, self.settings, self.steps = replay, settings, replay.steps
        world, count = replay.world, len(replay.steps)
        self.now = 0.0
        self.heap: list[tuple[float, int, int | Job, int]] = []
        self.serial = 0
        self.at = [0] * count  #: class -> the next step, or the one that runs
        self.start = [[0.0] * len(steps) for steps in replay.steps]
        self.end = [[0.0] * len(steps) for steps in replay.steps]
        self.computing = [False] * count
        self.remaining = [0.0] * count  #: of a compute step, in us at full speed
        self.rate = [0.0] * count
        self.updated = [0.0] * count
        self.version = [0] * count
        self.transfers = [0] * count  #: transfers that run on a rank of the class
        self.next = [0] * len(replay.channels)  #: channel -> the first job that has not started
        self.running = [0] * len(replay.channels)
        self.on: dict[Resource, dict[Job, None]] = {}
        self.active: list[dict[Job, None]] = [{} for _ in range(count)]
        # class -> its host's class, and how many of the host's ranks are of the class
        self.host = [world.host_colour[world.host[rank]] for rank in world.sample]
        self.ranks_here = [
            sum(world.host[r] == world.host[rank] for r in world.ranks_of[colour])
            for colour, rank in enumerate(world.sample)
        ]
        self.of_host: dict[int, list[int]] = {}
        for colour, host in enumerate(self.host):
            self.of_host.setdefault(host, []).append(colour)
        self.busy_ranks = dict.fromkeys(self.of_host, 0)
        self.dirty_classes: dict[int, None] = {}
        self.dirty_hosts: dict[int, None] = {}
        self.dirty_jobs: dict[Job, None] = {}
        self.dirty_resources: dict[Resource, None] = {}

    def run(self) -> Run:
        """Replay to the end. Raises RunError W0802 for a deadlock."""
        for colour in range(len(self.steps)):
            self._advance(colour)
        self._settle()
        heap, version = self.heap, self.version
        while heap:
            self.now = heap[0][0]
            while heap and heap[0][0] <= self.now:
                _, _, what, number = heappop(heap)
                if isinstance(what, int):
                    if version[what] == number:
                        self._compute_done(what)
                elif what.version == number:
                    self._job_done(what)
            self._settle()
        if any(at < len(steps) for at, steps in zip(self.at, self.steps, strict=True)):
            self._deadlock()
        return Run(self.start, self.end)

    # -- ranks ----------------------------------------------------------------------------------

    def _advance(self, colour: int) -> None:
        """Go on with a class's steps until one takes time."""
        steps, starts, ends = self.steps[colour], self.start[colour], self.end[colour]
        at, now, count = self.at[colour], self.now, len(self.steps[colour])
        while at < count:
            kind, _, time_us, job = steps[at]
            starts[at] = now
            if kind == COMPUTE:
                self.at[colour] = at
                self._compute(colour, time_us)
                return
            assert job is not None
            if kind != WAIT:
                self.at[colour] = at
                self._arrive(job, colour)
            if kind != START and job.end_us < 0:
                self.at[colour] = at
                job.waiting.append(colour)
                return
            ends[at] = now
            at += 1
        self.at[colour] = at

    def _compute(self, colour: int, time_us: float) -> None:
        if not self.computing[colour]:
            self.computing[colour] = True
            self._toggled(colour, self.ranks_here[colour])
        self.remaining[colour] = time_us
        self.updated[colour] = self.now
        self.version[colour] += 1
        self.rate[colour] = rate = self._speed(colour)
        self._push(self.now + time_us / rate, colour, self.version[colour])

    def _compute_done(self, colour: int) -> None:
        at = self.at[colour]
        self.end[colour][at] = self.now
        self.at[colour] = at + 1
        following = self.steps[colour]
        if at + 1 == len(following) or following[at + 1][0] != COMPUTE:
            self.computing[colour] = False
            self._toggled(colour, -self.ranks_here[colour])
        self._advance(colour)

    def _toggled(self, colour: int, ranks: int) -> None:
        """A class has begun or ended to compute: that may change other rates."""
        if self.settings.cores_per_host is not None:
            self.busy_ranks[self.host[colour]] += ranks
            self.dirty_hosts[self.host[colour]] = None
        if self.settings.transfer_slowdown != 1.0:
            self.dirty_jobs.update(self.active[colour])

    def _speed(self, colour: int) -> float:
        settings = self.settings
        speed = 1.0 / settings.compute_slowdown if self.transfers[colour] else 1.0
        if settings.cores_per_host is not None:
            busy = self.busy_ranks[self.host[colour]]
            if busy > settings.cores_per_host:
                speed *= settings.cores_per_host / busy
        return speed

    # -- transfers ------------------------------------------------------------------------------

    def _arrive(self, job: Job, colour: int) -> None:
        job.arrived += 1
        if job.arrived == job.need:
            job.ready_us = self.now
            job.last = colour, self.at[colour]
            self._start_next(job.channel, None)

    def _start_next(self, channel: int, ended: Job | None) -> None:
        """Start what the channel's order and width allow."""
        jobs, classes = self.replay.jobs[channel], self.replay.channels[channel].classes
        width = self.settings.at_once if self.replay.channels[channel].axis != "copy" else 1
        while self.running[channel] < width and self.next[channel] < len(jobs):
            job = jobs[self.next[channel]]
            if job.ready_us < 0:
                return
            if ended is not None and job.ready_us < self.now:
                job.after = ended
            elif job.number and jobs[job.number - 1].start_us == self.now > job.ready_us:
                job.after = jobs[job.number - 1].after
            self.next[channel] += 1
            self.running[channel] += 1
            job.start_us = job.updated_us = self.now
            job.remaining_us = job.time_us
            self.dirty_jobs[job] = None
            for resource, _ in job.uses:
                self.on.setdefault(resource, {})[job] = None
                self.dirty_resources[resource] = None
            if self.replay.channels[channel].axis != "copy":
                for colour in classes:
                    self.active[colour][job] = None
                    self._count(colour, 1)

    def _count(self, colour: int, change: int) -> None:
        before = self.transfers[colour]
        self.transfers[colour] = before + change
        if (before == 0) != (before + change == 0):
            self.dirty_classes[colour] = None

    def _job_done(self, job: Job) -> None:
        job.end_us = self.now
        job.version += 1
        channel = self.replay.channels[job.channel]
        self.running[job.channel] -= 1
        for resource, _ in job.uses:
            del self.on[resource][job]
            self.dirty_resources[resource] = None
        if channel.axis != "copy":
            for colour in channel.classes:
                del self.active[colour][job]
                self._count(colour, -1)
        self.dirty_jobs.pop(job, None)
        self._start_next(job.channel, job)
        for colour in job.waiting:
            self.end[colour][self.at[colour]] = self.now
            self.at[colour] += 1
            self._advance(colour)

    # -- rates ----------------------------------------------------------------------------------

    def _settle(self) -> None:
        """Set the rates anew where what they depend on has changed."""
        if self.dirty_hosts:
            for host in self.dirty_hosts:
                self.dirty_classes.update(dict.fromkeys(self.of_host[host]))
            self.dirty_hosts.clear()
        if self.dirty_classes:
            for colour in self.dirty_classes:
                if self.computing[colour]:
                    self._set_speed(colour)
            self.dirty_classes.clear()
        if self.dirty_jobs or self.dirty_resources:
            jobs = self._touched()
            self.dirty_jobs.clear()
            self.dirty_resources.clear()
            self._set_rates(jobs)

    def _set_speed(self, colour: int) -> None:
        rate = self._speed(colour)
        if rate == self.rate[colour]:
            return
        done = (self.now - self.updated[colour]) * self.rate[colour]
        self.remaining[colour] = max(0.0, self.remaining[colour] - done)
        self.updated[colour], self.rate[colour] = self.now, rate
        self.version[colour] += 1
        self._push(self.now + self.remaining[colour] / rate, colour, self.version[colour])

    def _touched(self) -> list[Job]:
        """The running transfers whose rates depend on what has changed, through any links."""
        jobs, resources = dict(self.dirty_jobs), dict(self.dirty_resources)
        todo = list(resources)
        for job in jobs:
            todo += [resource for resource, _ in job.uses if resource not in resources]
        seen = set(todo)
        while todo:
            for job in self.on.get(todo.pop(), ()):
                if job not in jobs:
                    jobs[job] = None
                    fresh = [resource for resource, _ in job.uses if resource not in seen]
                    seen.update(fresh)
                    todo += fresh
        return list(jobs)

    def _set_rates(self, jobs: Sequence[Job]) -> None:
        slow = 1.0 / self.settings.transfer_slowdown
        for job in jobs:
            classes = self.replay.channels[job.channel].classes
            job.cap = slow if slow != 1.0 and self._any_computes(classes) else 1.0
        if len(jobs) == 1 and all(use <= 1.0 for _, use in jobs[0].uses):
            rates = [jobs[0].cap]
        else:
            rates = fair_rates(
                [job.uses for job in jobs], [job.weight for job in jobs], [job.cap for job in jobs]
            )
        for job, rate in zip(jobs, rates, strict=True):
            if rate == job.rate:
                continue
            done = (self.now - job.updated_us) * job.rate
            job.remaining_us = max(0.0, job.remaining_us - done)
            job.updated_us, job.rate = self.now, rate
            job.version += 1
            self._push(self.now + job.remaining_us / rate, job, job.version)

    def _any_computes(self, classes: Iterable[int]) -> bool:
        return any(self.computing[colour] for colour in classes)

    def _push(self, time_us: float, what: int | Job, version: int) -> None:
        self.serial += 1
        heappush(self.heap, (time_us, self.serial, what, version))

    # -- deadlock -------------------------------------------------------------------------------

    def _deadlock(self) -> NoReturn:
        world, lines = self.replay.world, []
        for colour, steps in enumerate(self.steps):
            if self.at[colour] < len(steps):
                _, index, _, job = steps[self.at[colour]]
                rank = world.sample[colour]
                op = world.programs[rank].ops[index]
                assert job is not None
                place = f", from {op.loc}" if str(op.loc) else ""
                lines.append(f"rank {rank} waits in action {index}, {op.name} "
                             f"({', '.join(map(str, op.results))}){place}")  # fmt: skip
        raise RunError(
            "W0802", "the schedules deadlock: no rank can go on", reason="\n       ".join(lines[:8]),
            hint="start transfers in the same order on both sides, or asynchronously",
        )  # fmt: skip
