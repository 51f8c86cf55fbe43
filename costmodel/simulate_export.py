"""A simulated step as a timeline in the form of measured ones (`ir/trace_events.py`)."""

from __future__ import annotations

from collections.abc import Iterable

from ..ir.trace_events import COMPUTE, PAIR_TRACK, Event, RankEvents, group_track
from .simulate_result import Result


def rank_events(result: Result, rank: int) -> list[Event]:
    """A rank's actions and transfers: the tracks and slices that a measured step has."""
    log = RankEvents(rank, predicted=True)
    ops = result.program(rank).ops
    for index, start, end in result.actions(rank):
        log.slice(COMPUTE, ops[index], index, 0, start, end - start)
    lanes: dict[str, list[float]] = {}
    for index, channel, start, end in sorted(result.transfers(rank), key=lambda t: t[2]):
        if channel.axis == "stage":
            track = PAIR_TRACK
        elif channel.axis == "copy":
            track = "copy"
        else:
            track = group_track(channel.axis, result.members(rank, channel.axis))
        free = lanes.setdefault(track, [])
        lane = next((i for i, until in enumerate(free) if until <= start), len(free))
        free[lane:] = [end, *free[lane + 1 :]]
        track = f"{track}, lane {lane + 1}" if lane else track
        log.slice(track, ops[index], index, 0, start, end - start)
    return log.all_events()


def trace_events(result: Result, ranks: Iterable[int] | None = None) -> list[Event]:
    """The events of some ranks, by default of one of each class: the others do the same."""
    chosen = [members[0] for members in result.classes] if ranks is None else ranks
    return [event for rank in chosen for event in rank_events(result, rank)]
