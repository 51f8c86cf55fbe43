"""How far a device is from those that the weights have seen, by their datasheets."""

from __future__ import annotations

from functools import cache

import numpy as np

from .datasheet import Datasheet


@cache
def _place(device: Datasheet) -> tuple[float, ...]:
    """A device as a point: log2 of its rates and of their ratios, each of order 1, and its kind."""
    d, log = device, np.log2
    clock = d.sms * d.boost_mhz * 1e6
    f16, bf16, f32 = d.peak_flops_per_s("f16"), d.peak_flops_per_s("bf16"), d.f32 * 1e12
    dram = d.mem_gbs * 1e9
    nvidia = d.vendor == "NVIDIA"
    return (
        log(d.sms / 100), log(f16 / clock / 1024) / 2, log(f32 / clock / 256),
        log(bf16 / clock / 1024) / 2, log(bf16 / f16), log(f16 / dram / 200) / 2,
        log(bf16 / dram / 200) / 2, log(f32 / dram / 20) / 2, log(dram / 2e12),
        log(d.boost_mhz / 1700) * 2, log(d.l2_mb / 40) / 2, log(d.l2_mb / d.sms) / 2,
        log(d.smem_kb / 128) if d.smem_kb else 0.0,
        log(d.tdp_w * 1e9 / clock) / 2 if d.tdp_w else 0.0, log(bf16 / 4e14) / 2,
        float(nvidia and d.cc >= 7), float(nvidia and d.cc >= 8), float(nvidia and 9 <= d.cc < 12),
        float(nvidia and 10 <= d.cc), float(d.vendor == "AMD"), float(d.vendor == "Intel"),
    )  # fmt: skip


def distance(a: Datasheet, b: Datasheet) -> float:
    """Datasheet distance: 0 for equal numbers, below 1 for siblings, above 2 across generations."""
    return float(np.linalg.norm(np.subtract(_place(a), _place(b))))
