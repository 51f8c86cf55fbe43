"""Micro-benchmarks of the device at hand: rates, the cost of a call, and the time of given kernels.

A time is that of one call in a loop: the loop is run until it has lasted long enough, five loops are
timed, and the fastest counts, for whatever else the machine does only adds. On an accelerator loops
end with a synchronisation inside the timed region.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

#: shortest loop, and most calls in it
_LOOP_S, _MOST_CALLS = 0.01, 2000
_LOOPS = 5


@dataclass(frozen=True)
class DeviceRates:
    """Rates of one device.

    Attributes:
        flops_per_s: sustained f32 products.
        half_flops_per_s: sustained bf16 products.
        dram_bytes_per_s: a copy far larger than the caches, read and write counted.
        cache_bytes_per_s: a copy that stays in the caches.
        launch_us: a call on 64 elements.
    """

    flops_per_s: float
    half_flops_per_s: float
    dram_bytes_per_s: float
    cache_bytes_per_s: float
    launch_us: float


def time_us(run: Callable[[], object], device: torch.device, budget_s: float = 0.5) -> float:
    """Microseconds of one call; stops early where the budget is used up."""
    cuda = device.type == "cuda"

    def loop(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            run()
        if cuda:
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    end = time.perf_counter() + budget_s
    loop(1)
    once = loop(1)
    calls = max(1, min(_MOST_CALLS, int(_LOOP_S / max(once, 1e-7))))
    best = once
    for _ in range(_LOOPS):
        best = min(best, loop(calls) / calls)
        if time.perf_counter() > end:
            break
    return best * 1e6


@torch.no_grad()
def measure_rates(device: torch.device) -> DeviceRates:
    """Rates of a device, in a few seconds. On a CPU those of one process as it runs now."""
    big = 8192 if device.type == "cuda" else 1024
    flops = []
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(big, big, device=device, dtype=dtype)
        flops.append(2 * big**3 / time_us(lambda a=a: a @ a, device) * 1e6)  # type: ignore[misc]
    rates = []
    for count in (1 << 28, 1 << 22) if device.type == "cuda" else (1 << 25, 1 << 15):
        x = torch.ones(count, device=device)
        y = torch.empty_like(x)
        rates.append(8 * count / time_us(lambda x=x, y=y: y.copy_(x), device) * 1e6)  # type: ignore[misc]
    small = torch.ones(64, device=device)
    return DeviceRates(
        flops[0], flops[1], rates[0], rates[1], time_us(lambda: small + small, device)
    )


_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bfloat16": torch.bfloat16}


@torch.no_grad()
def measure_kernel(
    family: str,
    op: str,
    dtype: str,
    sizes: Mapping[str, float],
    device: torch.device,
    budget_s: float,
) -> float:
    """Microseconds of a kernel of the cost model: gemm, attention or rowwise. Raises KeyError."""
    n = {name: int(value) for name, value in sizes.items()}
    kind = _DTYPES[dtype]

    def ones(*shape: int) -> torch.Tensor:
        return torch.ones(shape, device=device, dtype=kind)

    if family == "gemm":
        a, b = ones(n["M"], n["K"]), ones(n["K"], n["N"])
        return time_us(lambda: a @ b, device, budget_s)
    if family == "attention":
        q = ones(n["B"], n["heads"], n["sq"], n["head_dim"])
        k = ones(n["B"], n["kv_heads"], n["skv"], n["head_dim"])
        attend = torch.nn.functional.scaled_dot_product_attention
        causal = bool(n["causal"])
        return time_us(lambda: attend(q, k, k, is_causal=causal), device, budget_s)
    x = ones(n["rows"], n["cols"])
    return time_us(_ROWWISE[op](x), device, budget_s)


_ROWWISE: Mapping[str, Callable[[torch.Tensor], Callable[[], torch.Tensor]]] = {
    "add": lambda x: lambda: x + x,
    "gelu": lambda x: lambda: torch.nn.functional.gelu(x),
    "softmax": lambda x: lambda: torch.softmax(x, -1),
    "layernorm": lambda x: lambda: torch.nn.functional.layer_norm(x, x.shape[-1:]),
}
