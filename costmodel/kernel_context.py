"""What surrounds a kernel: device, number format, implementation, and how time was taken.

A context becomes a row of numbers (datasheet ratios; no device has a number of its own, so that an
unseen one is placed by what it is) and a set of tokens (op, format, framework, kernel, timing). Tokens
that the weights do not know are left out: the network was trained with tokens dropped at random.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .datasheet import Datasheet
from .kernel_features import Rates
from .kernel_formats import Format, format_of


@dataclass(frozen=True)
class Context:
    """Everything about a kernel call but its sizes.

    Attributes:
        op: its name in the measurements: gemm, linear, bmm, attn_decode, moe, softmax, ...
        device: the device's datasheet.
        dtype: number format, see `kernel_formats`.
        kv_dtype: format of keys and values; '' where there are none.
        impl: `framework:kernel`; '' if unknown.
        timing: how time was taken: cudagraph, eager_events, kineto_kernel, ...
    """

    op: str
    device: Datasheet
    dtype: str
    kv_dtype: str = ""
    impl: str = ""
    timing: str = "cudagraph"

    def formats(self) -> Format:
        """Bytes per element and unit; the second operand of attention is the KV cache."""
        name = self.dtype
        form = format_of(name.split("->")[0])
        if self.kv_dtype:
            return Format(form.act, format_of(self.kv_dtype).act, form.out, form.unit)
        if "->" in name:
            return Format(form.act, form.weight, format_of(name.split("->")[1]).act, form.unit)
        if self.op not in _CONTRACTIONS:
            return Format(form.act, form.weight, form.act, form.unit)
        return form

    def tokens(self) -> tuple[str, ...]:
        """Names that the network may know."""
        parts = re.split(r"[:/]", self.impl, maxsplit=1)
        framework, kernel = parts[0], parts[-1]
        out = [f"op={self.op}", f"dtype={self.dtype}", f"timing={self.timing}"]
        if self.kv_dtype:
            out.append(f"kv={self.kv_dtype}")
        if self.impl:
            # other vendors' kernels share no more than the name
            home = "" if self.device.vendor == "NVIDIA" else f"@{self.device.vendor}"
            out += [f"impl={self.impl}{home}", f"framework={framework}{home}"]
            out += [f"has={word}" for word in _WORDS if word in kernel]
        if self.timing == "tuner_best":
            out.append(f"tuner={self.impl}")
        return tuple(out)


_CONTRACTIONS = frozenset({"gemm", "linear", "bmm", "conv2d_fwd", "moe"})
#: what kernel names have in common across frameworks
_WORDS = ("flash", "fa2", "fa3", "fa4", "triton", "cutlass", "deepgemm", "trtllm", "flashinfer",
          "marlin", "mla", "nongated", "latency", "linear", "scaled_mm", "default", "torch")  # fmt: skip


def rates(context: Context) -> tuple[float, ...]:
    """The numbers of `Rates`, in its order."""
    device, form = context.device, context.formats()
    clock = device.boost_mhz
    # 64 bytes per cycle and multiprocessor: Volta to Hopper white papers and microbenchmarks
    l2 = device.sms * 64 * clock
    return (
        float(device.sms), device.peak_flops_per_s(form.unit) * 1e-6, device.f32 * 1e6,
        device.mem_gbs * 1e3, l2, device.l2_mb * 1e6, clock, form.act, form.weight, form.out,
    )  # fmt: skip


def rates_of(contexts: Sequence[Context], index: NDArray[np.intp]) -> Rates:
    """Rates per row, `index` giving each row's context."""
    table = np.array([rates(c) for c in contexts], float)
    return Rates(*(np.ascontiguousarray(column[index]) for column in table.T))


def numbers(context: Context) -> list[float]:
    """Datasheet ratios of a context, all of order 1: what a multiprocessor can do in a cycle.

    Bandwidth, clock and number of multiprocessors are left out: they enter as times. So a device that
    differs from a known one only there (H200 from H100) is computed as that one with other times.
    """
    d, form = context.device, context.formats()
    clock = d.sms * d.boost_mhz * 1e6
    unit = d.peak_flops_per_s(form.unit)
    f16, f32 = d.peak_flops_per_s("f16"), d.f32 * 1e12
    nvidia = d.vendor == "NVIDIA"
    log = np.log2
    return [
        log(f16 / clock / 1024) / 2, log(f32 / clock / 256), log(unit / clock / 1024) / 2,
        log(unit / f16), log(d.l2_mb / d.sms) / 2,
        # mma, its asynchronous form of Hopper, and that of Blackwell; consumer parts of 12.x have mma
        float(nvidia and d.cc >= 7), float(nvidia and d.cc >= 8), float(nvidia and 9 <= d.cc < 12),
        float(nvidia and 10 <= d.cc < 12), float(d.vendor == "AMD"), float(d.vendor == "Intel"),
        log(form.act), log(form.weight), log(form.out),
    ]  # fmt: skip
