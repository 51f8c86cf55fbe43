"""The public face of kernel times: `estimate(op, shapes, dtypes, device)`, one call or many.

    >>> estimate("gemm", [(4096, 8192), (8192, 8192)], ["bf16"], "h100").time_us

Shapes are the local ones, operand by operand:

    gemm, linear, bmm          (..., M, K), (..., K, N); batch dims in front
    attn_prefill, attn_decode, attn_encoder    q (B, heads, sq, dim), k (B, kv_heads, skv, dim)
    mla_prefill, mla_decode    q (B, heads, sq, 576), k (B, 1, skv, 576)
    moe                        x (tokens, hidden), w (experts, hidden, inter); topk=, moe_tp=, moe_ep=
    conv2d_fwd                 x (B, Cin, H, H), w (Cout, Cin, k, k); stride=, pad=
    anything else              operands of any shape, streamed once; n_out= results
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, prod

import numpy as np

from ..ir.errors import CompileError
from .datasheet import Datasheet, find_datasheet
from .kernel_context import Context
from .kernel_model import kernel_times
from .kernel_query import Batch

Shape = Sequence[int]

#: a size from here on is a mistake: kernels index with 32 bits
_TOO_LARGE = 2**31


@dataclass(frozen=True)
class Estimate:
    """Time of a kernel in us, and an interval that holds 9 of 10 measurements."""

    time_us: float
    low_us: float
    high_us: float


@dataclass(frozen=True)
class Kernel:
    """One query of `estimate_all`; see `estimate`."""

    op: str
    shapes: Sequence[Shape]
    dtypes: Sequence[str]
    device: str | Datasheet
    impl: str = ""
    timing: str = "cudagraph"
    options: Mapping[str, float] | None = None


def estimate(
    op: str,
    shapes: Sequence[Shape],
    dtypes: Sequence[str],
    device: str | Datasheet,
    *,
    impl: str = "",
    timing: str = "cudagraph",
    **options: float,
) -> Estimate:
    """Time of one kernel on local shapes.

    Args:
        op: name of the op, see the module.
        shapes: of the operands.
        dtypes: the number format, and for attention that of keys and values.
        device: a known device or its datasheet.
        impl: `framework:kernel` of the measurements; '' for a typical one.
        timing: how time would be taken; cudagraph is the kernel and about 2 us.
        options: sizes that shapes do not tell (topk, stride, window, causal, ...).

    Raises CompileError W1301 for an unknown device, a shape that does not fit, or a size of zero
    or of 2^31 and more.
    """
    return estimate_all([Kernel(op, shapes, dtypes, device, impl, timing, options)])[0]


def estimate_all(kernels: Sequence[Kernel]) -> list[Estimate]:
    """Times of many kernels, a batch for each family."""
    groups: dict[str, list[int]] = {}
    prepared = []
    for number, kernel in enumerate(kernels):
        family, sizes = _sizes(kernel)
        prepared.append(sizes)
        groups.setdefault(family, []).append(number)
    out: list[Estimate | None] = [None] * len(kernels)
    for family, members in groups.items():
        times = kernel_times(
            _batch(family, [kernels[i] for i in members], [prepared[i] for i in members])
        )
        for i, *values in zip(members, times.time_us, times.low_us, times.high_us, strict=True):
            out[i] = Estimate(*(float(value) for value in values))
    return [found for found in out if found is not None]


def _batch(family: str, kernels: Sequence[Kernel], sizes: Sequence[Mapping[str, float]]) -> Batch:
    contexts: dict[Context, int] = {}
    index = np.empty(len(kernels), np.intp)
    for i, kernel in enumerate(kernels):
        device = find_datasheet(kernel.device) if isinstance(kernel.device, str) else kernel.device
        dtype, kv = kernel.dtypes[0], ""
        if family == "attention":
            kv = kernel.dtypes[min(1, len(kernel.dtypes) - 1)]
        context = Context(kernel.op, device, _NAMES.get(dtype, dtype), _NAMES.get(kv, kv), kernel.impl,
                          kernel.timing)  # fmt: skip
        index[i] = contexts.setdefault(context, len(contexts))
    columns = {name: np.array([row[name] for row in sizes], float) for name in sizes[0]}
    return Batch(family, tuple(contexts), index, columns)


#: weft's names of formats -> those of the measurements
_NAMES = {
    "bf16": "bfloat16",
    "f16": "fp16",
    "f32": "fp32",
    "f64": "fp64",
    "f8e4m3": "fp8",
    "f8e5m2": "fp8",
}


def _sizes(kernel: Kernel) -> tuple[str, dict[str, float]]:
    """The family of a query and its sizes. Raises CompileError W1301."""
    if not kernel.dtypes or not kernel.shapes:
        raise _bad(kernel, "needs at least one shape and one dtype")
    shapes = [tuple(shape) for shape in kernel.shapes]
    options = dict(kernel.options or {})
    for size in (size for shape in shapes for size in shape):
        if (
            not isinstance(size, (int, np.integer))
            or isinstance(size, bool)
            or not 0 < size < _TOO_LARGE
        ):
            raise _bad(kernel, f"has the size {size!r}, which no kernel has")
    for name, value in options.items():
        if (
            not isinstance(value, (int, float))
            or not isfinite(value)
            or not 0 <= value < _TOO_LARGE
        ):
            raise _bad(kernel, f"has {name}={value!r}, which no kernel has")
    builder = _BUILDERS.get(kernel.op, ("rowwise", _rowwise))
    try:
        return builder[0], builder[1](kernel, shapes, options)
    except (ValueError, IndexError):
        raise _bad(kernel, f"does not take operands of shapes {shapes}") from None


def _bad(kernel: Kernel, message: str) -> CompileError:
    return CompileError(
        "W1301", f"{kernel.op} {message}",
        reason="sizes are whole numbers from 1 to 2^31 - 1, shapes fit the op",
        hint="give the shapes of one rank, operand by operand",
    )  # fmt: skip


def _product(
    kernel: Kernel, shapes: Sequence[tuple[int, ...]], options: dict[str, float]
) -> dict[str, float]:
    a, b = shapes[:2]
    *batch, m, k = a
    if b[-2] != k or (len(b) > 2 and list(b[:-2]) != batch):
        raise ValueError
    if len(b) == 2:  # one weight for the whole batch: its rows are more rows of the product
        return {"B": 1, "M": m * prod(batch), "N": b[-1], "K": k}
    return {"B": prod(batch), "M": m, "N": b[-1], "K": k}


def _attention(
    kernel: Kernel, shapes: Sequence[tuple[int, ...]], options: dict[str, float]
) -> dict[str, float]:
    (b, heads, sq, dim), (_, kv_heads, skv, _) = shapes[:2]
    causal = options.get("causal", float(kernel.op.endswith("prefill")))
    return {"B": b, "heads": heads, "kv_heads": kv_heads, "head_dim": dim, "sq": sq, "skv": skv,
            "window": options.get("window", 0.0), "causal": causal,
            "mla": float(kernel.op.startswith("mla")),
            "decode": float(kernel.op.endswith("decode"))}  # fmt: skip


def _moe(
    kernel: Kernel, shapes: Sequence[tuple[int, ...]], options: dict[str, float]
) -> dict[str, float]:
    (tokens, hidden), (experts, _, inter) = shapes[:2]
    return {"tokens": tokens, "hidden": hidden, "inter": inter, "experts": experts,
            "topk": options.get("topk", 1.0), "moe_tp": options.get("moe_tp", 1.0),
            "moe_ep": options.get("moe_ep", 1.0), "gated": options.get("gated", 1.0),
            "skew": options.get("skew", 0.0)}  # fmt: skip


def _conv(
    kernel: Kernel, shapes: Sequence[tuple[int, ...]], options: dict[str, float]
) -> dict[str, float]:
    (b, cin, side, _), (cout, _, k, _) = shapes[:2]
    return {"B": b, "Cin": cin, "Cout": cout, "k": k, "H": side, "stride": options.get("stride", 1.0),
            "pad": options.get("pad", 0.0)}  # fmt: skip


def _rowwise(
    kernel: Kernel, shapes: Sequence[tuple[int, ...]], options: dict[str, float]
) -> dict[str, float]:
    largest = max(shapes, key=prod)
    points = prod(largest)
    cols = largest[-1] if largest else 1
    return {"rows": points / cols, "cols": cols, "n_in": sum(map(prod, shapes)) / points,
            "n_out": options.get("n_out", 1.0)}  # fmt: skip


_BUILDERS = {
    **dict.fromkeys(("gemm", "linear", "bmm"), ("gemm", _product)),
    **dict.fromkeys(("attn_prefill", "attn_decode", "attn_encoder", "mla_prefill", "mla_decode"),
                    ("attention", _attention)),
    "moe": ("moe", _moe),
    "conv2d_fwd": ("conv", _conv),
}  # fmt: skip
