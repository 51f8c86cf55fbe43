"""Rows held back from networks that this run trains: configurations, large shapes, devices.

Networks are short and single, so the errors are above those of the shipped weights; what matters is how
they compare with each other and between versions of the model. Coverage uses half of the held-out
rows, by their configuration, to set the intervals, and judges the other half.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from costmodel_data import Table, read_table
from costmodel_kernels import AFTER, CONFIG, MOST_SAMPLES, TARGETS, Judged
from costmodel_splits import config, device, large
from rows import Row
from train_costmodel import Fit, clusters_of, fit_intervals, residuals, train_table

from weft.costmodel.kernel_fewshot import adapt
from weft.costmodel.kernel_interval import CONFIG as CONFIG_CASE
from weft.costmodel.kernel_interval import FAR, LARGE, SIBLING
from weft.costmodel.kernel_model import Estimates, Family, Model, shipped
from weft.costmodel.kernel_net import Net


def retrained(folder: Path, names: Sequence[str], steps: int) -> list[Row]:
    """Rows of the report, table by table."""
    out: list[Row] = []
    for name in names:
        table = read_table(folder, name)
        if table is not None:
            out += _shapes(name, table, steps) + _devices(name, table, steps)
    return out


def _shapes(name: str, table: Table, steps: int) -> list[Row]:
    """Unseen configurations and larger shapes."""
    unseen, big = config(table), large(table)
    net = train_table(table, np.flatnonzero(~(unseen | big)), Fit(steps=steps))
    half = config(table, seed=1, share=0.5)
    values = residuals(table, net)
    held = {CONFIG_CASE: (unseen & ~big & half, values), LARGE: (big & half, values)}
    model = _model(table, net, held)
    out = []
    for case, rows in (("unseen", unseen & ~big & ~half), ("large", big & ~half)):
        judged = _judge(table, rows, model.estimates(table.take(np.flatnonzero(rows)).batch))
        target = TARGETS[2][1:] if case == "large" else CONFIG[name]
        out += judged.rows(f"{name} {case}", *target)
    return out


def _devices(name: str, table: Table, steps: int) -> list[Row]:
    """Each device without its siblings, and one of each pair with the other kept."""
    out = []
    for group in clusters_of(table):
        for siblings in (False, True) if len(group) > 1 else (True,):
            chosen = group[0]
            gone = device(table, chosen, siblings)
            kept = np.flatnonzero(~gone)
            rows = np.flatnonzero(device(table, chosen, False))
            if len(kept) == 0 or len(rows) < 4 * MOST_SAMPLES:
                continue
            net = train_table(table, kept, Fit(steps=steps))
            values = residuals(table, net)
            model = _model(table, net, {CONFIG_CASE: (~gone, values)})
            case = "far" if siblings else "sibling"
            own = table.take(rows)
            target = TARGETS[1][1:] if siblings else TARGETS[0][1:]
            out += Judged.of(model.estimates(own.batch), own.time_us).rows(
                f"{name} {case} {chosen}", *target
            )
            picks = np.random.default_rng(0).permutation(len(own))
            few = own.take(picks[:MOST_SAMPLES])
            rest = own.take(picks[MOST_SAMPLES:][:20000])
            after = adapt(model, [(few.batch.compact(), few.time_us)]).estimates(rest.batch)
            target = AFTER if siblings else (TARGETS[0][1], "must not hurt")
            out += Judged.of(after, rest.time_us).rows(
                f"{name} {case} {chosen}, with samples", *target
            )
    return out


def _judge(table: Table, rows: np.ndarray, found: Estimates) -> Judged:
    return Judged.of(found, table.time_us[rows])


def _model(table: Table, net: Net, held: dict) -> Model:  # type: ignore[type-arg]
    """A model of one family; cases without held-out rows have the widths of the shipped weights."""
    family = table.batch.family
    intervals = fit_intervals(table, held, net)
    known = shipped().families[family].intervals.cases
    cases = {**intervals.cases, **{c: known[c] for c in (LARGE, SIBLING, FAR) if c not in held}}
    return Model({family: Family((net,), replace(intervals, cases=cases))}, {})
