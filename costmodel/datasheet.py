"""Datasheet numbers of device kinds: all that a kernel-time model may know of a device.

Peaks are dense; `None` where the device has no such unit. Sources: vendors' datasheets and
architecture white papers, one row per device in `datasheets.csv`.
"""

from __future__ import annotations

import csv
import io
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..ir.errors import CompileError

#: rate of which a missing one is a fraction: a device without the unit computes in the next format
_NEXT = {"f4": "f8", "f8": "bf16", "i8": "bf16", "bf16": "f16", "f16": "f32", "tf32": "f32"}


@dataclass(frozen=True)
class Datasheet:
    """Numbers of a device's datasheet.

    Attributes:
        name: the device.
        vendor: NVIDIA, AMD, Intel; `cpu` for a processor without accelerator.
        cc: compute capability (NVIDIA), else 0.
        sms: streaming multiprocessors, compute units, Xe cores or CPU cores.
        boost_mhz: clock.
        f32, tf32, f16, bf16, f8, i8, f4: peak TFLOP/s (TOP/s) of matrix products; 0 where absent.
        mem_gbs: memory bandwidth in GB/s.
        mem_gb: memory in GB.
        l2_mb: level-2 cache in MB.
        smem_kb: shared memory per multiprocessor in KiB.
        tdp_w: board power in W.
    """

    name: str
    vendor: str
    cc: float
    sms: int
    boost_mhz: float
    f32: float
    tf32: float
    f16: float
    bf16: float
    f8: float
    i8: float
    f4: float
    mem_gbs: float
    mem_gb: float
    l2_mb: float
    smem_kb: float
    tdp_w: float

    def peak_flops_per_s(self, key: str) -> float:
        """Peak rate for a compute format: f64, f32, tf32, f16, bf16, f8, i8 or f4."""
        if key == "f64":
            return self.f32 * 1e12 / 2
        rate = getattr(self, key)
        return float(rate) * 1e12 if rate else self.peak_flops_per_s(_NEXT[key])


def _number(text: str) -> float:
    return float(text) if text else 0.0


@cache
def datasheets() -> Mapping[str, Datasheet]:
    """All known devices by name."""
    return read_datasheets((files(__package__) / "datasheets.csv").read_text(encoding="utf-8"))


def read_datasheets(text: str) -> dict[str, Datasheet]:
    """Devices of a CSV text with the columns of `datasheets.csv`; unknown columns are left alone."""
    out = {}
    for row in csv.DictReader(io.StringIO(text)):
        cc = row["cc"] if row["cc"].replace(".", "").isdigit() else "0"
        values = [_number(row[column]) for column in _COLUMNS]
        name = row["name"]
        out[name] = Datasheet(name, row["vendor"], float(cc), int(values[0]), *values[1:])
    return out


_COLUMNS = (
    "sms", "boost_mhz", "fp32_tflops", "tf32_tflops", "fp16_tflops", "bf16_tflops", "fp8_tflops",
    "int8_tops", "fp4_tflops", "mem_gbs", "mem_gb", "l2_mb", "smem_kb_per_sm", "tdp_w",
)  # fmt: skip

#: short names of clusters and of everyday speech -> the datasheet
_ALIASES = {
    "v100": "V100-SXM2-32GB", "a100": "A100-SXM4-80GB", "h100": "H100-SXM5-80GB", "h200": "H200-SXM-141GB",
    "b200": "B200-SXM", "b300": "B300-SXM", "l40s": "L40S", "mi250": "MI250", "mi300x": "MI300X",
    "p100": "P100-PCIE-16GB",
}  # fmt: skip


def find_datasheet(name: str) -> Datasheet:
    """The datasheet of a device by its name, in any case. Raises CompileError W1301."""
    known = datasheets()
    by_lower = {key.lower(): key for key in known} | _ALIASES
    key = by_lower.get(name.lower())
    if key is None:
        near = [by_lower[n] for n in get_close_matches(name.lower(), by_lower, 3, cutoff=0.4)]
        raise CompileError(
            "W1301",
            f"the cost model does not know the device {name[:80]!r}",
            reason="it has no datasheet of it",
            hint=(f"did you mean {' or '.join(dict.fromkeys(near))}? " if near else "")
            + "a file with datasheet numbers adds a device: --device-file",
        )
    return known[key]


#: keys of a device file: those of `Datasheet`, of which these must be there
_REQUIRED = ("name", "sms", "boost_mhz", "f32", "f16", "mem_gbs", "l2_mb")
_TEXTS = ("name", "vendor")


def read_device_file(path: Path) -> Datasheet:
    """A device from a TOML file with keys of `Datasheet`. Raises CompileError W1302."""

    def bad(message: str, reason: str = "") -> CompileError:
        hint = f"give {', '.join(_REQUIRED)}, and bf16, f8, mem_gb where known"
        return CompileError("W1302", f"{path}: {message}", reason=reason, hint=hint)

    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise bad("the device file cannot be read", str(error)) from None
    names = [f.name for f in fields(Datasheet)]
    for key, value in data.items():
        if key not in names:
            near = get_close_matches(key, names, 1)
            raise bad(f"unknown key {key!r}", f"did you mean {near[0]!r}?" if near else "")
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if key in _TEXTS:
            if not isinstance(value, str):
                raise bad(f"{key} must be a text")
        elif not number or not 0 <= value < 1e9 or (key in _REQUIRED and not value):
            raise bad(f"{key} must be a positive number, got {value!r}")
    missing = [key for key in _REQUIRED if key not in data]
    if missing:
        raise bad(f"{', '.join(missing)} missing")
    defaults: dict[str, Any] = {name: 0.0 for name in names}
    defaults |= {"vendor": "NVIDIA", "smem_kb": 100.0}
    return Datasheet(**{**defaults, **data})
