"""Which kernels an op of the IR runs on a rank, as calls that the learned model can price.

A matrix product is a `gemm`, attention a fused kernel (products and a softmax where no fused kernel
takes the dtype), a convolution the product it is computed as; everything else streams its bytes once
(`rowwise`). Times were measured with the launch in them, more or less of it by the mode of timing: the
time of the smallest call of the same context is that launch, and is taken off.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from ..ir.module import Op
from ..ir.signature import Signature
from ..ir.types import FLOATS
from .calibration import Calibration
from .datasheet import Datasheet
from .kernel_context import Context
from .kernel_model import shipped
from .kernel_query import Batch

#: columns of a call's sizes, by family
COLUMNS = {
    "gemm": ("B", "M", "N", "K"),
    "attention": (
        "B",
        "heads",
        "kv_heads",
        "head_dim",
        "sq",
        "skv",
        "window",
        "causal",
        "mla",
        "decode",
    ),
    "rowwise": ("rows", "cols", "n_in", "n_out"),
}
#: smallest sizes; the time of such a call is the launch
_LEAST = {"gemm": (1.0,) * 4, "attention": (1.0, 1.0, 1.0, 64.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0),
          "rowwise": (1.0, 1.0, 1.0, 1.0)}  # fmt: skip
#: formats of which products were measured back to back in a graph; others one by one, with events
_GRAPH = frozenset({"bf16", "f16", "f8e4m3", "f8e5m2"})
_MEASURED = {"f8e4m3": "fp8", "f8e5m2": "fp8", "bf16": "bfloat16", "f16": "bfloat16", "f32": "fp32"}
#: names of ops in the measurements
_ROWS = {
    "add": "add", "sub": "add", "mul": "mul", "div": "div", "pow": "pow", "relu": "relu", "tanh": "tanh",
    "gelu": "gelu", "softmax": "softmax", "log_softmax": "softmax", "layer_norm": "layernorm",
    "rms_norm": "rmsnorm", "embedding": "embedding",
}  # fmt: skip
#: work of the gradient of attention over that of attention: five products instead of two
#: (Dao, FlashAttention-2, 2023)
_BACKWARD = 2.5


@dataclass(frozen=True)
class Call:
    """A kernel: family, context, sizes in the order of COLUMNS, and how often it runs."""

    family: str
    context: Context
    sizes: tuple[float, ...]
    runs: float = 1.0


def product_call(device: Datasheet, dtype: str, b: float, m: float, n: float, k: float) -> Call:
    """b products [m, k] x [k, n] as a library computes them."""
    if dtype in _GRAPH:
        context = Context("gemm", device, _MEASURED[dtype], "", _LIBRARY[dtype], "cudagraph")
    else:
        op = "linear" if b == 1 else "bmm"
        context = Context(op, device, _MEASURED.get(dtype, dtype), "", "torch", "eager_events")
    return Call("gemm", context, (b, m, n, k))


_LIBRARY = {
    "bf16": "vllm:torch.nn.functional.linear",
    "f16": "vllm:torch.nn.functional.linear",
    "f8e4m3": "trtllm:torch_flow",
    "f8e5m2": "trtllm:torch_flow",
}


def stream_call(
    device: Datasheet, op: str, dtype: str, bytes_in: float, bytes_out: float, cols: int
) -> Call:
    """A kernel that reads and writes some bytes, `cols` elements to a row."""
    wide = dtype not in ("bf16", "f16")
    if wide:
        context = Context(_ROWS.get(op, op), device, "fp32", "", "torch", "eager_events")
    else:
        context = Context(_ROWS.get(op, op), device, "fp16", "", "vllm/add", "kineto_kernel")
    width = context.formats().act
    points = max(bytes_out, bytes_in / 4, 1.0) / width
    cols = max(min(cols, int(points)), 1)
    return Call("rowwise", context, (max(points / cols, 1.0), float(cols), bytes_in / (points * width),
                                     bytes_out / (points * width)))  # fmt: skip


def calls_of(
    op: Op, signature: Signature, sizes: Mapping[str, int], bytes_in: float, bytes_out: float,
    device: Datasheet,
) -> list[Call]:  # fmt: skip
    """The kernels of an op on a rank with these sizes of the iteration dims."""
    dtype = op.results[0].type.dtype
    if op.name == "einsum":
        return [_einsum(op, signature, sizes, dtype, device)]
    if op.name in ("attention", "attention_backward"):
        return _attention(op, signature, sizes, dtype, device)
    if op.name.startswith("convolution"):
        return [_convolution(op, signature, sizes, dtype, device)]
    if op.name.startswith("grouped"):
        experts = sizes.get("e", 1)
        rows = max(sizes["t"] / experts, 1.0)
        return [product_call(device, dtype, experts, rows, sizes["n"], sizes["k"])]
    shape = max((v.type.shape for v in (*op.operands, *op.results)), key=prod, default=())
    cols = shape[-1] if shape else 1
    kind = dtype if dtype in FLOATS else "f32"
    return [stream_call(device, op.name, kind, bytes_in, bytes_out, cols)]


def _einsum(
    op: Op, signature: Signature, sizes: Mapping[str, int], dtype: str, device: Datasheet
) -> Call:
    left, right = ({n for dim in tensor for n in dim} for tensor in signature.operands)
    out = {n for dim in signature.results[0] for n in dim}
    b = prod(sizes[n] for n in left & right & out)
    m, n = (prod(sizes[x] for x in side & out) for side in (left - right, right - left))
    k = prod(sizes[x] for x in (left | right) - out)
    return product_call(device, dtype, b, m, n, k)


def _attention(
    op: Op, signature: Signature, sizes: Mapping[str, int], dtype: str, device: Datasheet
) -> list[Call]:
    b, groups, repeat = sizes["b"], sizes["g"], sizes["r"]
    skv, dim = sizes["t"], sizes["d"]
    sq: float = sizes["s"]
    runs = _BACKWARD if op.name == "attention_backward" else 1.0
    heads = groups * repeat
    if dtype not in ("bf16", "f16"):
        products = [product_call(device, dtype, b * heads, sq, skv, dim),
                    product_call(device, dtype, b * heads, sq, sizes["e"], skv)]  # fmt: skip
        scores = 4.0 * b * heads * sq * skv
        softmax = stream_call(device, "softmax", "f32", scores, scores, skv)
        return [Call(c.family, c.context, c.sizes, runs) for c in (*products, softmax)]
    causal = bool(op.attrs.get("causal"))
    decode = sq == 1
    if causal and skv < sq:  # a part of the keys: of the first ones every later query sees all
        causal, sq = False, sq - skv / 2
    name = "attn_decode" if decode else "attn_prefill" if causal else "attn_encoder"
    context = Context(name, device, "bfloat16", "bfloat16", "", "cudagraph")
    values = (b, heads, groups, dim, sq, skv, 0.0, float(causal and not decode), 0.0, float(decode))
    return [Call("attention", context, tuple(map(float, values)), runs)]


def _convolution(
    op: Op, signature: Signature, sizes: Mapping[str, int], dtype: str, device: Datasheet
) -> Call:
    out = sizes.get("co", sizes.get("cg", 1))
    rest = {name: size for name, size in sizes.items() if name not in ("n", "co", "ci", "cg")}
    pixels = prod(size for name, size in rest.items() if name.startswith("y"))
    taps = prod(size for name, size in rest.items() if name.startswith("p"))
    depth = sizes.get("ci", sizes.get("cg", 1)) * taps
    return product_call(device, dtype, 1, sizes.get("n", 1) * pixels, out, depth)


#: calls whose times are kept: a plan of a large model asks for some thousands
_MOST_KNOWN = 1 << 17
_Key = tuple[str, Context, tuple[float, ...], Calibration | None]
_known: dict[_Key, float] = {}


def times_us(calls: Sequence[Call], calibration: Calibration | None = None) -> list[float]:
    """Microseconds beyond the launch of each call; unknown ones are priced in one batch a family."""
    keys = [(c.family, c.context, c.sizes, calibration) for c in calls]
    missing = {key: None for key in keys if key not in _known}
    if missing:
        if len(_known) > _MOST_KNOWN:
            _known.clear()
            missing = dict.fromkeys(keys)
        _price(list(missing))
    return [_known[key] * call.runs for key, call in zip(keys, calls, strict=True)]


def _price(keys: Sequence[_Key]) -> None:
    for family in dict.fromkeys(key[0] for key in keys):
        own = [key for key in keys if key[0] == family]
        least = [Call(family, c, _LEAST[family]) for c in dict.fromkeys(key[1] for key in own)]
        calls = [Call(f, context, sizes) for f, context, sizes, _ in own]
        calibration = own[0][3]
        times = (calibration or shipped()).centre_us(batch_of(family, calls + least))
        launches = {c.context: float(t) for c, t in zip(least, times[len(own) :], strict=True)}
        for key, time_us in zip(own, times, strict=False):
            _known[key] = max(float(time_us) - launches[key[1]], 0.0)


def batch_of(family: str, calls: Sequence[Call]) -> Batch:
    """Calls of one family as a batch."""
    numbers: dict[Context, int] = {}
    index = np.array([numbers.setdefault(c.context, len(numbers)) for c in calls], np.intp)
    table = np.array([call.sizes for call in calls], float)
    sizes = {
        name: np.ascontiguousarray(column)
        for name, column in zip(COLUMNS[family], table.T, strict=True)
    }
    return Batch(family, tuple(numbers), index, sizes)
