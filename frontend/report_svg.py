"""The pictures of the report as inline SVG: memory over time, and the timeline of a rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from ..costmodel.simulate import Timeline
from .describe import human_bytes, human_time

#: units of the view box across the page; the page stretches it to its width
_WIDTH = 1000
#: boxes and points in a picture: a page stays quick, and far below 3 MB
_MAX_BOXES, _MAX_POINTS = 4000, 3000
_ROW, _GAP, _HEIGHT = 24, 6, 200


def memory_svg(timeline: Timeline, resident_bytes: int) -> str:
    """Live bytes of a rank over the step: what stays from step to step, and what comes on top."""
    points = _thinned(timeline.memory)
    top, end = max(timeline.peak_bytes, 1) * 1.05, max(timeline.step_us, 1e-9)

    def place(time_us: float, size: float) -> str:
        return f"{_WIDTH * time_us / end:.1f},{_HEIGHT * (1 - size / top):.1f}"

    path, last = [f"M0,{_HEIGHT}"], 0
    for time_us, size in points:
        path += [f"L{place(time_us, last)}", f"L{place(time_us, size)}"]
        last = size
    path.append(f"L{_WIDTH},{_HEIGHT}Z")
    peak_us = max(timeline.memory, key=lambda p: p[1], default=(0.0, 0))[0]
    floor = _HEIGHT * (1 - resident_bytes / top)
    x, y = place(peak_us, timeline.peak_bytes).split(",")
    label = f"peak {human_bytes(timeline.peak_bytes)} at {human_time(peak_us)}"
    return (
        f'<svg class="memory" viewBox="0 0 {_WIDTH} {_HEIGHT}" preserveAspectRatio="none">'
        f'<path class="live" d="{"".join(path)}"><title>{label}</title></path>'
        f'<rect class="resident" x="0" y="{floor:.1f}" width="{_WIDTH}" '
        f'height="{_HEIGHT - floor:.1f}"><title>parameters, states and inputs: '
        f"{human_bytes(resident_bytes)}</title></rect>"
        f'<line class="peak" x1="{x}" x2="{x}" y1="{y}" y2="{_HEIGHT}"/></svg>'
    )


def _thinned(points: Sequence[tuple[float, int]]) -> list[tuple[float, int]]:
    """The points, or the largest of each stretch where there are too many."""
    step = -(-len(points) // _MAX_POINTS)
    chunks = [points[i : i + step] for i in range(0, len(points), max(1, step))]
    return [max(chunk, key=lambda p: p[1]) for chunk in chunks]


@dataclass(frozen=True)
class Track:
    """One row of the timeline: its name, and the share of the step that it is busy."""

    name: str
    busy: str


def timeline_svg(timeline: Timeline) -> tuple[str, list[Track]]:
    """Boxes of compute and of each axis over the step, and the names of the rows."""
    names = sorted({s[0] for s in timeline.slices}, key=lambda n: (n != "compute", n))
    end = max(timeline.step_us, 1e-9)
    boxes: list[str] = []
    tracks = []
    for row, track in enumerate(names):
        slices = [s for s in timeline.slices if s[0] == track]
        busy = sum(s[4] for s in slices) / end
        tracks.append(Track(track, f"{busy:.0%} busy"))
        y = row * (_ROW + _GAP)
        for name, path, start, duration, count in _merged(slices, _MAX_BOXES // len(names)):
            text = name if count == 1 else f"{count} short actions, the longest {name}"
            tip = f"{text}\n{path}\n{human_time(duration)} from {human_time(start)}"
            boxes.append(
                f'<rect class="{_kind(track, name)}" x="{_WIDTH * start / end:.2f}" y="{y}" '
                f'width="{max(0.05, _WIDTH * duration / end):.2f}" height="{_ROW}">'
                f"<title>{escape(tip)}</title></rect>"
            )
    height = max(1, len(names) * (_ROW + _GAP) - _GAP)
    head = f'<svg class="timeline" viewBox="0 0 {_WIDTH} {height}" preserveAspectRatio="none"'
    return f'{head} style="height:{height}px">{"".join(boxes)}</svg>', tracks


def _merged(
    slices: Sequence[tuple[str, str, str, float, float]], most: int
) -> list[tuple[str, str, float, float, int]]:
    """Slices as (name, path, start, duration, count), neighbours joined where there are too many."""
    step = -(-len(slices) // max(1, most))
    out = []
    for i in range(0, len(slices), max(1, step)):
        group = slices[i : i + step]
        _, name, path, _, _ = max(group, key=lambda s: s[4])
        start, last = group[0][3], group[-1]
        out.append((name, path, start, last[3] + last[4] - start, len(group)))
    return out


def _kind(track: str, name: str) -> str:
    if track != "compute":
        return "comm"
    if name in ("einsum", "convolution") or name.startswith("attention"):
        return "matmul"
    return "update" if name.endswith("_update") else "other"
