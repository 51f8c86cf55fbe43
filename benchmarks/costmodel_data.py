"""Measured kernels as batches of the cost model: one folder of CSV files, one schema.

Files, each optional: gemm, attention, moe, eltwise, conv (`.csv` or `.csv.gz`), and `devices.csv` with
the datasheet numbers of devices that the package does not know. A column `split` groups the report.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from weft.costmodel.datasheet import Datasheet, datasheets, read_datasheets
from weft.costmodel.kernel_context import Context
from weft.costmodel.kernel_query import Batch

#: file -> family of the model
FILES = {
    "gemm": "gemm",
    "attention": "attention",
    "moe": "moe",
    "eltwise": "rowwise",
    "conv": "conv",
}


@dataclass(frozen=True)
class Table:
    """Rows of one file: the queries, what was measured, and the columns as text."""

    batch: Batch
    time_us: NDArray[np.float64]
    text: Mapping[str, NDArray[np.object_]]

    def __len__(self) -> int:
        return len(self.time_us)

    def take(self, rows: NDArray[np.intp]) -> Table:
        """Some of the rows."""
        text = {name: column[rows] for name, column in self.text.items()}
        return Table(self.batch.take(rows), self.time_us[rows], text)


def path_of(folder: Path, name: str) -> Path | None:
    """The file of a table, packed or not."""
    return next(
        (p for p in (folder / f"{name}.csv", folder / f"{name}.csv.gz") if p.exists()), None
    )


def devices_of(folder: Path) -> dict[str, Datasheet]:
    """The package's devices, and those of the folder that it does not know."""
    path = folder / "devices.csv"
    more = read_datasheets(path.read_text(encoding="utf-8")) if path.exists() else {}
    return {**more, **datasheets()}


def digest(folder: Path) -> str:
    """SHA-256 over the tables, in order."""
    total = hashlib.sha256()
    for name in FILES:
        if path := path_of(folder, name):
            total.update(path.read_bytes())
    return total.hexdigest()


def read_table(folder: Path, name: str) -> Table | None:
    """The rows of one file, or None where it is absent. Rows without a time are left out."""
    path = path_of(folder, name)
    if path is None:
        return None
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8", newline="") as stream:
        reader = csv.reader(stream)
        header = next(reader)
        rows = [row for row in reader if row[header.index("time_us")]]
    text = {
        h: np.array(column, object)
        for h, column in zip(header, zip(*rows, strict=True), strict=True)
    }
    return Table(_batch(FILES[name], text, devices_of(folder)), text["time_us"].astype(float), text)


def _batch(
    family: str, text: dict[str, NDArray[np.object_]], devices: Mapping[str, Datasheet]
) -> Batch:
    count = len(text["device"])
    blank = np.full(count, "", object)
    if family == "moe":
        text["op"] = np.full(count, "moe", object)
    keys = [
        text.get(name, blank) for name in ("op", "device", "dtype", "kv_dtype", "impl", "timing")
    ]
    numbers: dict[tuple[str, ...], int] = {}
    index = np.array(
        [numbers.setdefault(key, len(numbers)) for key in zip(*keys, strict=True)], np.intp
    )
    contexts = tuple(
        Context(op, devices[device], dtype, kv, impl, timing)
        for op, device, dtype, kv, impl, timing in numbers
    )
    sizes = {name: _numbers(column) for name, column in text.items() if name in _SIZES[family]}
    if family == "attention":
        sizes["mla"] = np.array([op.startswith("mla") for op in text["op"]], float)
        sizes["decode"] = np.array([op.endswith("decode") for op in text["op"]], float)
    if family == "moe":
        sizes["gated"] = np.array(["nongated" not in impl for impl in text["impl"]], float)
        sizes["skew"] = np.array([_skew(routing) for routing in text["routing"]])
    return Batch(family, contexts, index, sizes)


_SIZES = {
    "gemm": {"B", "M", "N", "K"},
    "attention": {"B", "heads", "kv_heads", "head_dim", "sq", "skv", "window", "causal"},
    "moe": {"tokens", "hidden", "inter", "topk", "experts", "moe_tp", "moe_ep"},
    "rowwise": {"rows", "cols", "n_in", "n_out"},
    "conv": {"B", "Cin", "Cout", "k", "H", "stride", "pad"},
}


def _numbers(column: NDArray[np.object_]) -> NDArray[np.float64]:
    return np.array([float(value) if value else 0.0 for value in column])


def _skew(routing: str) -> float:
    head, _, power = routing.rpartition("_")
    return float(power) if head == "power_law" else 0.0
