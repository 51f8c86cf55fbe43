"""What `weft calibrate` measured on a machine, as a file, and as a shift of the model.

The file is JSON with a SHA-256 over its content: rates of the device, the cost of a launch, and at
most 64 kernels with their times. Applied to a cluster it replaces the device's rates, and the samples
shift kernel times towards what was measured (`kernel_fewshot.py`).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ..ir.errors import CompileError
from .datasheet import Datasheet
from .kernel_context import Context
from .kernel_features import FAMILIES
from .kernel_fewshot import Adapter, adapt
from .kernel_model import shipped
from .kernel_net import Array
from .kernel_query import Batch

FORMAT = "weft-calibration-1"
#: samples that a calibration may have
MOST_SAMPLES = 64


@dataclass(frozen=True)
class Sample:
    """A measured kernel: family, context without the device, sizes by name, and its time."""

    family: str
    op: str
    dtype: str
    kv_dtype: str
    impl: str
    timing: str
    sizes: Mapping[str, float]
    time_us: float


@dataclass(frozen=True, eq=False)
class Calibration:
    """Measurements of a machine.

    Attributes:
        kind: device kind, as clusters name it.
        device: datasheet numbers, with the measured rates in place of the peaks on a CPU.
        launch_us: cost of one action.
        cores: cores that the ranks of a host share; 0 for an accelerator.
        rates: what the micro-benchmarks found, for people: flops_per_s, dram_bytes_per_s, ...
        samples: measured kernels.
    """

    kind: str
    device: Datasheet
    launch_us: float
    cores: int
    rates: Mapping[str, float]
    samples: Sequence[Sample]

    @cached_property
    def adapter(self) -> Adapter:
        """The shipped model, shifted by the samples."""
        return adapt(
            shipped(), [batch_of(self.device, group) for group in _by_family(self.samples)]
        )

    def centre_us(self, batch: Batch) -> Array:
        """Times of a batch in us, without intervals."""
        return self.adapter.estimates(batch).time_us


def _by_family(samples: Sequence[Sample]) -> list[list[Sample]]:
    return [
        [s for s in samples if s.family == family]
        for family in dict.fromkeys(s.family for s in samples)
    ]


def batch_of(device: Datasheet, samples: Sequence[Sample]) -> tuple[Batch, Array]:
    """Samples of one family as a batch, and their times."""
    contexts: dict[Context, int] = {}
    index = np.array(
        [
            contexts.setdefault(
                Context(s.op, device, s.dtype, s.kv_dtype, s.impl, s.timing), len(contexts)
            )
            for s in samples
        ],
        np.intp,
    )
    sizes = {name: np.array([s.sizes[name] for s in samples], float) for name in samples[0].sizes}
    times = np.array([s.time_us for s in samples])
    return Batch(samples[0].family, tuple(contexts), index, sizes), times


def to_text(calibration: Calibration) -> str:
    """The file's text."""
    body = {
        "format": FORMAT, "kind": calibration.kind, "device": asdict(calibration.device),
        "launch_us": calibration.launch_us, "cores": calibration.cores, "rates": dict(calibration.rates),
        "samples": [{**asdict(s), "sizes": dict(s.sizes)} for s in calibration.samples],
    }  # fmt: skip
    return json.dumps({**body, "sha256": _digest(body)}, indent=1, sort_keys=True) + "\n"


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def write_calibration(calibration: Calibration, path: Path) -> None:
    """Write a calibration file, whole or not at all. Raises CompileError W1302."""
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(to_text(calibration), encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise CompileError(
            "W1302", f"{path}: the calibration cannot be written", reason=str(error)
        ) from None


def read_calibration(path: Path) -> Calibration:
    """A calibration from its file. Raises CompileError W1302 for one that is damaged or foreign."""
    try:
        return _parse(path.read_text(encoding="utf-8"), path)
    except (OSError, ValueError, RecursionError) as error:
        raise _bad(path, "the calibration cannot be read", str(error)[:200]) from None


def _bad(path: Path, message: str, reason: str) -> CompileError:
    return CompileError("W1302", f"{path}: {message}", reason=reason,
                        hint="measure again: weft calibrate --out FILE")  # fmt: skip


@lru_cache(maxsize=16)
def _parse(text: str, path: Path) -> Calibration:
    """The same object for the same text: times that it gave are remembered by it."""

    def bad(message: str, reason: str) -> CompileError:
        return _bad(path, message, reason)

    data = json.loads(text)
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise bad("this is no calibration", f"its format is not {FORMAT}")
    digest = data.pop("sha256", "")
    if digest != _digest(data):
        raise bad("the calibration was modified", "its SHA-256 does not fit its content")
    try:
        device = Datasheet(**data["device"])
        samples = tuple(_sample(Sample(**row)) for row in data["samples"])
        found = Calibration(str(data["kind"]), device, float(data["launch_us"]), int(data["cores"]),
                            {str(k): float(v) for k, v in data["rates"].items()}, samples)  # fmt: skip
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise bad(
            "the calibration has other fields than this version writes", str(error)[:200]
        ) from None
    _check(found, bad)
    return found


def _sample(sample: Sample) -> Sample:
    if sample.family not in FAMILIES:
        raise ValueError(f"unknown family {sample.family!r}")
    sizes = {str(name): float(value) for name, value in sample.sizes.items()}
    if not all(math.isfinite(v) and v >= 0 for v in sizes.values()):
        raise ValueError("a size is not a number")
    return Sample(**{**{f.name: getattr(sample, f.name) for f in fields(sample)}, "sizes": sizes,
                     "time_us": float(sample.time_us)})  # fmt: skip


def _check(found: Calibration, bad: Any) -> None:
    if len(found.samples) > MOST_SAMPLES:
        raise bad(
            "the calibration has too many samples",
            f"there are {len(found.samples)}, not {MOST_SAMPLES}",
        )
    numbers = [found.launch_us, *(s.time_us for s in found.samples)]
    if not all(math.isfinite(x) and x > 0 for x in numbers):
        raise bad("the calibration has a time that is not positive", "times are microseconds")
