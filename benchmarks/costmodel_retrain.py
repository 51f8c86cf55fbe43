"""Rows held back from networks that are trained for it: configurations, large shapes, devices.

The networks are those from which `train_costmodel.py` takes its intervals; with its `--work` folder
they are there already. Coverage is judged where it was not set: of unseen configurations and large
shapes one half sets the intervals and the other is judged, and the widths for a device come from
the others that were left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from costmodel_data import read_table
from costmodel_kernels import AFTER, CONFIG, MOST_SAMPLES, TARGETS, Judged, of_one_impl
from costmodel_splits import config
from numpy.typing import NDArray
from rows import Row
from train_costmodel import (
    Held,
    Work,
    fit_intervals,
    hardness_of,
    on_devices,
    planned,
    quantiles_of,
)

from weft.costmodel.kernel_fewshot import adapt
from weft.costmodel.kernel_interval import CONFIG as CONFIG_CASE
from weft.costmodel.kernel_interval import FAR, LARGE, SIBLING
from weft.costmodel.kernel_model import Family, Model
from weft.costmodel.kernel_net import Net

Mask = NDArray[np.bool_]

#: rows of a device that are judged
MOST_JUDGED = 5000


def retrained(folder: Path, names: Sequence[str], steps: int | None, work: Path) -> list[Row]:
    """Rows of the report, table by table; `steps` of a final network, without them as shipped."""
    out: list[Row] = []
    work.mkdir(exist_ok=True)
    for name in names:
        table = read_table(folder, name)
        if table is not None:
            training = Work(name, table, work, planned(name, steps))
            held = training.held_out()
            out += _shapes(training, held) + _devices(training, held)
    return out


def _shapes(training: Work, held: Held) -> list[Row]:
    """Unseen configurations and larger shapes."""
    name, table = training.name, training.table
    *_, nets = training.without_shapes()
    half = config(table, seed=1, share=0.5)
    set_by = {**held, **{case: (held[case][0] & half, held[case][1]) for case in (CONFIG_CASE, LARGE)}}
    family = Family(nets, fit_intervals(table, set_by, nets[0]))
    model = Model({table.batch.family: family}, {})
    out = []
    for case, title in ((CONFIG_CASE, "unseen"), (LARGE, "large")):
        own = table.take(np.flatnonzero(held[case][0] & ~half))
        found = model.estimates(own.batch)
        target = TARGETS[2][1:] if case == LARGE else CONFIG[name]
        out += Judged.of(found, own.time_us).rows(f"{name} {title}", *target)
        if name == "gemm":
            out += of_one_impl(own, found, title, target)
    return out


def _devices(training: Work, held: Held) -> list[Row]:
    """Each device without its siblings, and one of each cluster with the others known."""
    out, table = [], training.table
    for away, net in training.without_clusters():
        judge = _Devices(training, held, net, FAR, [name for group in away for name in group])
        for group in away:
            for name in group:
                out += judge.rows(name, on_devices(table, group))
    names, net = training.without_siblings()
    if net is not None:
        judge = _Devices(training, held, net, SIBLING, names)
        for name in names:
            out += judge.rows(name, on_devices(table, [name]))
    return out


class _Devices:
    """Devices `gone` from the training of a network, judged as one case."""

    def __init__(self, training: Work, held: Held, net: Net, case: str, gone: Sequence[str]) -> None:
        self.training, self.case, self.net, self.held = training, case, net, held[case]
        intervals = fit_intervals(training.table, held, net)
        self.scale = hardness_of(training.table, held, net)[1]
        self.intervals = replace(
            intervals,
            seen={k: v for k, v in intervals.seen.items() if v[0] not in gone},
            devices={k: v for k, v in intervals.devices.items() if k not in gone},
        )

    def rows(self, name: str, own_case: Mask) -> list[Row]:
        """A device, without and with samples of it; widths are set by devices outside `own_case`."""
        table = self.training.table
        own = table.take(np.flatnonzero(on_devices(table, [name])))
        if len(own) < 4 * MOST_SAMPLES:
            return []
        rows, values = self.held
        others = rows & ~own_case
        cases = dict(self.intervals.cases)
        if others.any():
            cases[self.case] = quantiles_of(table, self.case, others, values / self.scale)
        family = Family((self.net,), replace(self.intervals, cases=cases))
        model = Model({table.batch.family: family}, {})
        picks = np.random.default_rng(0).permutation(len(own))
        few, rest = own.take(picks[:MOST_SAMPLES]), own.take(picks[MOST_SAMPLES:][:MOST_JUDGED])
        label = f"{self.training.name} {self.case} {name}"
        far = self.case == FAR
        target = TARGETS[1][1:] if far else TARGETS[0][1:]
        out = Judged.of(model.estimates(rest.batch), rest.time_us).rows(label, *target)
        after = adapt(model, [(few.batch.compact(), few.time_us)]).estimates(rest.batch)
        target = AFTER if far else (TARGETS[0][1], "must not hurt")
        return out + Judged.of(after, rest.time_us).rows(f"{label}, with samples", *target)
