"""Collectives: errors of the cost model on a folder of measurements.

`collectives.csv.gz` of the folder has the columns collective, bytes, ranks, ranks_per_node, device,
interconnect, inter_gbps_per_gpu (GB/s), dtype, impl, timing, time_us, and perhaps split. Rows whose
split begins with `fewshot_` calibrate the model for their device and are not judged.
"""

from __future__ import annotations

import csv
import gzip
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median

from rows import Row, arguments, finish, show

from weft.costmodel.collectives_model import CollectiveModel, Sample, collective_model
from weft.costmodel.collectives_query import Query, fabric_of, network_of

#: bytes of an element where they matter
_BYTES = {"fp32": 4.0, "fp8": 1.0, "int8": 1.0, "nvfp4": 0.5}
#: MAPE by what is held back (boosting: 15 to 60 % and 72 to 82 %)
_TARGETS = {"device": 20.0, "node": 25.0}


def read_rows(folder: Path) -> list[dict[str, str]]:
    """Rows of the folder's collectives file, plain or gzipped; none where there is no such file."""
    for name, opened in (("collectives.csv.gz", gzip.open), ("collectives.csv", open)):
        if (folder / name).exists():
            with opened(folder / name, "rt", encoding="utf-8") as file:  # type: ignore[operator]
                return list(csv.DictReader(file))
    return []


def query_of(row: Mapping[str, str]) -> Query:
    """What a row measured."""
    text, device = row["impl"], row["device"]
    impl, sms, experts = text.lower(), 0.0, 0.0
    if text.startswith("custom:"):
        impl = "custom:" + text.removeprefix("custom:").split("_")[0].lower()
    elif match := re.fullmatch(r"deepep:sms(\d+)", text):
        impl, sms = "deepep", float(match[1])
    elif match := re.search(r"experts(\d+)", text):
        impl, experts = "deepep_ll", float(match[1])
    elif text.startswith(("NCCL", "RCCL")):
        impl = "nccl"
    ranks, per_host = int(row["ranks"]), int(row["ranks_per_node"])
    fabric, network = fabric_of(row["interconnect"], device), float(row["inter_gbps_per_gpu"] or 0)
    if match := re.match(r"IB-(\d+)Gb", row["interconnect"]):
        network = float(match[1]) / 8
    return Query(
        row["collective"], float(row["bytes"]), ranks, ranks if fabric == "nvl72" else per_host,
        device, fabric, network, impl, row["timing"], sms, experts,
        _BYTES.get(row["dtype"], 2.0), joined=network_of(row["interconnect"]),
    )  # fmt: skip


@dataclass(frozen=True)
class Judged:
    """Errors of some rows."""

    errors: Sequence[float]
    inside: Sequence[bool]

    @property
    def mape(self) -> float:
        """Mean absolute error in percent."""
        return 100 * fmean(self.errors)

    @property
    def middle(self) -> float:
        """Median absolute error in percent."""
        return 100 * median(self.errors)

    @property
    def coverage(self) -> float:
        """Percent of the rows inside their 90 % interval."""
        return 100 * fmean(self.inside)


def judge(model: CollectiveModel, rows: Sequence[Mapping[str, str]]) -> Judged:
    """Compare estimates with measurements."""
    errors, inside = [], []
    for row in rows:
        time_us = float(row["time_us"])
        span = model.estimate(query_of(row))
        errors.append(abs(span.time_us / time_us - 1))
        inside.append(span.low_us <= time_us <= span.high_us)
    return Judged(errors, inside)


def calibrated(rows: Sequence[Mapping[str, str]], base: CollectiveModel) -> dict[str, CollectiveModel]:
    """A model for each device with few-shot rows."""
    samples: dict[str, list[Sample]] = defaultdict(list)
    for row in rows:
        if row.get("split", "").startswith("fewshot_"):
            samples[row["device"]].append(Sample(query_of(row), float(row["time_us"])))
    return {device: base.calibrated(found[:256]) for device, found in samples.items()}


def rows(data_dir: Path, model: CollectiveModel | None = None) -> list[Row]:
    """The report's rows, three for each split; of the whole file where it has no splits."""
    model = model or collective_model()
    table = read_rows(Path(data_dir))
    special = calibrated(table, model)
    groups: dict[tuple[str, str], list[Mapping[str, str]]] = defaultdict(list)
    for row in table:
        split = row.get("split", "")
        if not split.startswith("fewshot_"):
            groups[split, row["device"]].append(row)
    out = []
    for split in dict.fromkeys(split for split, _ in groups):
        errors: list[float] = []
        inside: list[bool] = []
        for (of, device), found in groups.items():
            if of == split:
                judged = judge(special.get(device, model), found)
                errors += judged.errors
                inside += judged.inside
        total = Judged(errors, inside)
        name = f"collectives {split}".strip()
        target = next((value for key, value in _TARGETS.items() if key in split), None)
        out += [
            Row(f"{name}: MAPE", total.mape, "%", target, "boosting 15 to 60, 72 to 82"),
            Row(f"{name}: median error", total.middle, "%"),
            Row(f"{name}: outside the 90 % interval", 100 - total.coverage, "%", 13.0),
        ]
    return out


if __name__ == "__main__":
    parser = arguments(__doc__, "the same: it takes seconds")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR")
    options = parser.parse_args()
    found_rows = rows(options.data)
    show(found_rows)
    raise SystemExit(finish(found_rows, options.json))
