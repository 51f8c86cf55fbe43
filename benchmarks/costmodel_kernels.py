"""Kernel rows of the cost model's report: errors and coverage on a folder of measurements.

Rows are grouped by the column `split` and the table. Rows whose split begins with `fewshot_` are not
judged: where a device has some, its other rows are judged twice, without and with them. Without a
column `split` the shipped weights have seen the rows, and the report says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from costmodel_data import FILES, Table, read_table
from rows import Row

from weft.costmodel.kernel_fewshot import Adapter, adapt
from weft.costmodel.kernel_model import Estimates, Model, shipped

#: words of a split's name -> most MAPE in %, and what others reach; the first that fits counts
TARGETS = (
    ("sibling", 9.0, "boosting 9"),
    ("far", 22.0, "CDMPP 10.85 after sampling, NeuSight 13.8 to 57, boosting 35"),
    ("large", 12.0, "boosting 17, CDMPP 14.03 cross-model"),
    ("bigger", 12.0, "boosting 17, CDMPP 14.03 cross-model"),
)
#: with samples of the device
AFTER = (13.0, "boosting 18; CDMPP 10.85")
#: unseen configurations, by table
CONFIG = {"gemm": (6.0, "noise about 4, boosting 5.2"), "attention": (12.0, ""), "moe": (12.0, ""),
          "eltwise": (12.0, ""), "conv": (12.0, "")}  # fmt: skip
#: samples of a device and table that the calibrator takes
MOST_SAMPLES = 64


@dataclass(frozen=True)
class Judged:
    """Errors of some rows in percent, and how many measurements lie inside their interval."""

    errors: np.ndarray
    inside: np.ndarray

    @staticmethod
    def of(found: Estimates, time_us: np.ndarray) -> Judged:
        """Compare estimates with measurements."""
        errors = 100 * np.abs(found.time_us / time_us - 1)
        return Judged(errors, (found.low_us <= time_us) & (time_us <= found.high_us))

    def rows(self, name: str, target: float | None, against: str) -> list[Row]:
        """Three lines of the report."""
        outside = 100 * (1 - self.inside.mean())
        return [
            Row(
                f"{name}: MAPE of {len(self.errors)}",
                float(self.errors.mean()),
                "%",
                target,
                against,
            ),
            Row(f"{name}: median error", float(np.median(self.errors)), "%"),
            Row(f"{name}: outside the 90 % interval", float(outside), "%", 13.0, "7 to 13"),
        ]


def rows(folder: Path, model: Model | None = None) -> list[Row]:
    """The report's rows for a folder."""
    out: list[Row] = []
    for name in FILES:
        table = read_table(folder, name)
        if table is not None:
            out += _of_table(name, table, model or shipped())
    return out


def _of_table(name: str, table: Table, model: Model) -> list[Row]:
    splits = table.text.get("split")
    if splits is None:
        print(
            f"{name}: no column `split`; the shipped weights have seen such rows, so this is no test"
        )
        splits = np.full(len(table), "seen", object)
    adapters = _adapters(table, splits, model)
    out = []
    for split in dict.fromkeys(splits):
        if split.startswith("fewshot_"):
            continue
        chosen = table.take(np.flatnonzero(splits == split))
        target, against = _target(name, split)
        found = model.estimates(chosen.batch)
        out += Judged.of(found, chosen.time_us).rows(f"{name} {split}", target, against)
        if name == "gemm" and "seen" in split:
            out += of_one_impl(chosen, found, split, CONFIG[name])
        known = np.array([d in adapters for d in chosen.text["device"]])
        if known.any():
            out += _after(name, split, chosen.take(np.flatnonzero(known)), adapters)
    return out


def _target(name: str, split: str) -> tuple[float | None, str]:
    for word, target, against in TARGETS:
        if word in split.lower():
            return target, against
    if split == "seen":
        return None, "seen in training"
    return (None, "all formats and implementations") if name == "gemm" else CONFIG[name]


def of_one_impl(
    table: Table, found: Estimates, title: str, target: tuple[float | None, str]
) -> list[Row]:
    """bf16 products of each implementation and device by device, and the mean over these."""
    error = 100 * np.abs(found.time_us / table.time_us - 1)
    bf16 = (table.text["dtype"] == "bfloat16") & (table.text["timing"] == "cudagraph")
    device, impl = table.text["device"], table.text["impl"]
    out, means = [], []
    for name in dict.fromkeys(device[bf16]):
        own = bf16 & (device == name)
        each = [float(error[own & (impl == one)].mean()) for one in dict.fromkeys(impl[own])]
        means += each
        text = f"gemm {title}: MAPE, bf16, {name}, mean of {len(each)} implementations"
        out.append(Row(text, float(np.mean(each)), "%", *target))
    if means:
        text = f"gemm {title}: MAPE, bf16, mean of {len(means)} implementations and devices"
        out.append(Row(text, float(np.mean(means)), "%", *target))
    return out


def _adapters(table: Table, splits: np.ndarray, model: Model) -> dict[str, Adapter]:
    """The model shifted by the samples of each device that has some."""
    offered = np.array([split.startswith("fewshot_") for split in splits])
    out = {}
    for device in dict.fromkeys(table.text["device"][offered]):
        chosen = np.flatnonzero(offered & (table.text["device"] == device))[:MOST_SAMPLES]
        samples = table.take(chosen)
        out[device] = adapt(model, [(samples.batch.compact(), samples.time_us)])
    return out


def _after(name: str, split: str, table: Table, adapters: dict[str, Adapter]) -> list[Row]:
    parts: list[Judged] = []
    for device in dict.fromkeys(table.text["device"]):
        own = table.take(np.flatnonzero(table.text["device"] == device))
        parts.append(Judged.of(adapters[device].estimates(own.batch), own.time_us))
    target, against = AFTER if "sibling" not in split else (TARGETS[0][1], "must not hurt")
    return joined(parts).rows(f"{name} {split}, with samples", target, against)


def joined(parts: Sequence[Judged]) -> Judged:
    """Several judgements as one."""
    return Judged(
        np.concatenate([p.errors for p in parts]), np.concatenate([p.inside for p in parts])
    )
