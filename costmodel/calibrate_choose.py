"""Which kernels a calibration measures: as unlike each other as 64 can be.

Candidates are the sizes of common models; each next one is that farthest from all chosen (Gonzalez,
Clustering to minimize the maximum intercluster distance, 1985) in the model's rising inputs, families
in turn. Kernels that would take long are left out, so that the whole takes less than three minutes.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np

from .calibration import Sample, batch_of
from .datasheet import Datasheet
from .kernel_fewshot import place
from .kernel_model import shipped


def candidates(device: Datasheet, longest_us: float) -> list[Sample]:
    """Kernels of all sizes that the device is expected to finish in time."""
    cpu = device.vendor == "CPU"
    dtypes = ("fp32",) if cpu else ("bfloat16", "fp32")
    out = []
    for dtype in dtypes:
        graph = dtype == "bfloat16"
        impl, timing = (
            ("vllm:torch.nn.functional.linear", "cudagraph") if graph else ("torch", "eager_events")
        )
        sizes = (64, 256, 512, 1024, 2048, 4096, 8192)
        for m, n, k in product((1, 16, 128, 512, 2048, 8192), sizes, sizes):
            shape = {"B": 1.0, "M": float(m), "N": float(n), "K": float(k)}
            out.append(
                Sample("gemm", "gemm" if graph else "linear", dtype, "", impl, timing, shape, 0.0)
            )
        impl, timing = ("vllm/add", "kineto_kernel") if graph else ("torch", "eager_events")
        name = "fp16" if graph else dtype
        for op, inputs in (("add", 2.0), ("gelu", 1.0), ("softmax", 1.0), ("layernorm", 1.0)):
            for rows, cols in product((1, 64, 1024, 16384), (64, 512, 4096, 16384)):
                shape = {"rows": float(rows), "cols": float(cols), "n_in": inputs, "n_out": 1.0}
                out.append(Sample("rowwise", op, name, "", impl, timing, shape, 0.0))
    if not cpu:
        for b, heads, s in product((1, 4, 16), (8, 32), (128, 512, 2048, 4096)):
            shape = {"B": float(b), "heads": float(heads), "kv_heads": float(heads), "head_dim": 128.0,
                     "sq": float(s), "skv": float(s), "window": 0.0, "causal": 1.0, "mla": 0.0,
                     "decode": 0.0}  # fmt: skip
            out.append(
                Sample(
                    "attention", "attn_prefill", "bfloat16", "bfloat16", "", "cudagraph", shape, 0.0
                )
            )
    model, kept = shipped(), []
    for family in dict.fromkeys(s.family for s in out):
        own = [s for s in out if s.family == family]
        times = model.centre_us(batch_of(device, own)[0])
        kept += [s for s, time_us in zip(own, times, strict=True) if time_us <= longest_us]
    return kept


def choose(device: Datasheet, pool: Sequence[Sample], count: int) -> list[Sample]:
    """At most `count` kernels of the pool; half of them products."""
    families = list(dict.fromkeys(s.family for s in pool))
    out = []
    for number, family in enumerate(families):
        own = [s for s in pool if s.family == family]
        share = count // 2 if number == 0 else (count - count // 2) // max(len(families) - 1, 1)
        out += [
            own[i]
            for i in _spread(place(shipped(), batch_of(device, own)[0]), min(share, len(own)))
        ]
    return out


def _spread(points: np.ndarray, count: int) -> list[int]:
    chosen = [int(np.argmin(points.sum(1)))]
    away = ((points - points[chosen[0]]) ** 2).sum(1)
    away[chosen] = -1.0  # kernels that the model cannot tell apart are still not taken twice
    while len(chosen) < count:
        chosen.append(int(np.argmax(away)))
        away = np.minimum(away, ((points - points[chosen[-1]]) ** 2).sum(1))
        away[chosen] = -1.0
    return chosen
