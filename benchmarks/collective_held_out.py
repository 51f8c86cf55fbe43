"""Collectives: errors and coverage on devices and between hosts that a fit of this run has not seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from collective_intervals import DEVICES, Missed, fit_spread, scored
from costmodel_collectives import query_of, read_rows
from rows import Row
from train_collectives import fit, refits, thin, untrained

from weft.costmodel.collectives_query import Query


def _apart(query: Query) -> bool:
    """A library that one device alone was measured with; nothing is known of it without that."""
    return query.impl.startswith("nvlink")


#: what is judged, which rows, and the target; boosting reaches 15 to 60 % and 72 to 82 %
_VIEWS: tuple[tuple[str, Callable[[Query], bool], float], ...] = (
    ("NCCL through switches", lambda q: q.impl == "nccl" and q.shape == "switch" and q.hosts == 1, 20),
    ("custom all-reduces through switches",
     lambda q: q.impl.startswith("custom") and q.shape == "switch", 20),
    ("DeepEP", lambda q: q.impl.startswith("deepep"), 20),
    ("PCIe, bridges, direct links", lambda q: q.shape != "switch" and q.hosts == 1, 20),
    ("two hosts", lambda q: q.hosts > 1, 25),
    ("all", lambda q: True, 20),
)  # fmt: skip


def held_out(folder: Path) -> list[Row]:
    """Rows of the report: each device in turn is left out."""
    table = read_rows(folder)
    data = thin([query_of(row) for row in table], [float(row["time_us"]) for row in table])
    _, start = fit(data, untrained(), 8)
    found = refits(data, start, [q.device for q in data.queries], DEVICES, False)
    scores = scored([m for m in found if not _apart(m.query)], DEVICES)
    spread = fit_spread(scores)
    out = []
    for name, belongs, target in _VIEWS:
        out += _rows(name, [(m, s) for m, s in scores if belongs(m.query)], spread, target)
    return out


def _rows(name: str, scores: Sequence[tuple[Missed, float]], spread: float, target: float) -> list[Row]:
    if not scores:
        return []
    sizes = 100 * np.abs(np.expm1([missed.error for missed, _ in scores]))
    outside = 100 * np.mean([score > spread for _, score in scores])
    title = f"collectives, a device left out, {name}"
    return [
        Row(f"{title}: MAPE of {len(scores)} rows", float(sizes.mean()), "%", target),
        Row(f"{title}: median error", float(np.median(sizes)), "%"),
        Row(f"{title}: outside the 90 % interval", float(outside), "%", 13.0),
    ]
