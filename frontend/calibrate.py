"""`weft calibrate`: measure this machine, and write what plans for it are priced with.

Rates first (seconds), then at most 64 kernels unlike each other (`costmodel/calibrate_choose.py`), all
within three minutes. The file goes to the cache of the user, by device kind, unless a path is given.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from ..costmodel.calibrate_choose import candidates, choose
from ..costmodel.calibration import MOST_SAMPLES, Calibration, write_calibration
from ..costmodel.datasheet import Datasheet, find_datasheet
from ..costmodel.devices import DEVICES
from ..runtime.microbench import DeviceRates, measure_kernel, measure_rates
from .options import OPTIONS
from .world import device_kind

#: longest kernel that is measured, and the time that all may take
LONGEST_US, BUDGET_S = 2e5, 120.0


def calibrate(
    device: torch.device,
    count: int = MOST_SAMPLES,
    budget_s: float = BUDGET_S,
    say: Callable[[str], None] = lambda text: None,
    sheet: Datasheet | None = None,
) -> Calibration:
    """Measure a device.

    Args:
        device: a CPU or a CUDA device of this machine.
        count: kernels to measure, at most 64.
        budget_s: seconds after which no further kernel is begun.
        say: told of progress.
        sheet: its datasheet, where the package knows none.
    """
    kind = device_kind(device)
    say(f"rates of {kind}")
    rates = measure_rates(device)
    known = DEVICES[kind]
    sheet = _measured_sheet(sheet or find_datasheet(known.sheet), rates)
    chosen = choose(sheet, candidates(sheet, LONGEST_US), min(count, MOST_SAMPLES))
    end, samples = time.perf_counter() + budget_s, []
    for number, sample in enumerate(chosen):
        if time.perf_counter() > end:
            break
        say(
            f"kernel {number + 1} of {len(chosen)}: {sample.op} {sample.dtype} {dict(sample.sizes)}"
        )
        each_s = max(budget_s / len(chosen) / 2, 0.01)
        took = measure_kernel(sample.family, sample.op, sample.dtype, sample.sizes, device, each_s)
        samples.append(replace(sample, time_us=took))
    cpu = device.type == "cpu"
    # the executor adds what the table says over a bare call (2.9 us)
    launch_us = (
        rates.launch_us + (known.launch_us - 2.9) if cpu else max(known.launch_us, rates.launch_us)
    )
    found = {"flops_per_s": rates.flops_per_s, "half_flops_per_s": rates.half_flops_per_s,
             "dram_bytes_per_s": rates.dram_bytes_per_s, "cache_bytes_per_s": rates.cache_bytes_per_s,
             "launch_us": rates.launch_us}  # fmt: skip
    return Calibration(kind, sheet, launch_us, _cores() if cpu else 0, found, tuple(samples))


def _measured_sheet(sheet: Datasheet, rates: DeviceRates) -> Datasheet:
    """A CPU's numbers are what was measured; an accelerator keeps its datasheet."""
    if sheet.vendor != "CPU":
        return sheet
    half = rates.half_flops_per_s * 1e-12
    return replace(sheet, f32=rates.flops_per_s * 1e-12, f16=half, bf16=half,
                   mem_gbs=rates.dram_bytes_per_s * 1e-9)  # fmt: skip


def _cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def default_path(kind: str) -> Path:
    """Where the calibration of a device kind is kept for a user."""
    return OPTIONS.cache / "calibration" / f"{kind}.json"


def store(found: Calibration, out: Path | None) -> Path:
    """Write a calibration to a file, by default that of its device kind. Raises CompileError."""
    path = out or default_path(found.kind)
    write_calibration(found, path)
    return path
