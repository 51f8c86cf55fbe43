"""Facts about small tensors by their data, where no formula says them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import isnan
from typing import Any

import numpy as np

from ..ir.module import Op
from ..ir.opdef import full_attrs
from ..ir.types import FLOATS, TensorType
from .simplify_affine import Affine, uniform
from .simplify_domain import EXACT, NUMPY, SMALL, Array, Below, Fact, Small


def data_of(fact: Fact | None, type: TensorType) -> Array | None:
    """The elements of a small tensor, from any fact."""
    if isinstance(fact, Small):
        return fact.data
    if type.numel > SMALL or type.dtype not in NUMPY:
        return None
    if isinstance(fact, Below):
        inner = data_of(fact.of, TensorType("i64", type.shape))
        return None if inner is None else inner <= 0
    if not isinstance(fact, Affine):
        return None
    out = np.full((1,) * len(type.shape), 0, dtype=np.int64)
    if fact.uniform:
        return np.full(type.shape, fact.offset, dtype=NUMPY[type.dtype])
    for d, factors in enumerate(fact.dims):
        line = np.zeros(1, dtype=np.int64)
        for size, step in factors:
            line = (line[:, None] + np.arange(size) * step).reshape(-1)
        out = out + line.reshape([-1 if k == d else 1 for k in range(len(type.shape))])
    return (out + int(fact.offset)).astype(NUMPY[type.dtype])


def fact_of(data: Array) -> Fact | None:
    """The simplest fact that says these elements."""
    first = data.reshape(-1)[0].item()
    if isinstance(first, float) and isnan(first):
        return None
    if bool((data == first).all()):
        return uniform(first, data.shape)
    return Small(data)


def by_data(op: Op, known: Sequence[Fact | None]) -> Fact | None:
    type = op.results[0].type
    evaluate = DATA.get(op.name)
    if evaluate is None or type.dtype not in NUMPY or type.numel > SMALL:
        return None
    if {value.type.dtype for value in op.operands} & FLOATS and op.name not in _EXACT_FLOATS:
        return None
    arrays = []
    for value, fact in zip(op.operands, known, strict=True):
        array = data_of(fact, value.type)
        if array is None:
            return None
        arrays.append(array)
    with np.errstate(all="ignore"):  # infinities and wrapped integers are results like others
        out = evaluate(full_attrs(op.name, op.attrs), type, *arrays)
    return None if out is None else fact_of(np.asarray(out, dtype=NUMPY[type.dtype]))


def _cumsum(a: Mapping[str, Any], type: TensorType, x: Array) -> Array:
    return np.cumsum(x, axis=a["dim"])


def _divide(name: str) -> Callable[..., Array | None]:
    def evaluate(a: Mapping[str, Any], type: TensorType, x: Array, y: Array) -> Array | None:
        return None if (y == 0).any() else getattr(np, name)(x, y)

    return evaluate


def _plain(name: str) -> Callable[..., Array]:
    return lambda a, type, *xs: getattr(np, name)(*xs)


def _cast_data(a: Mapping[str, Any], type: TensorType, x: Array) -> Array | None:
    whole = type.dtype not in FLOATS and type.dtype != "bool" and x.dtype.kind == "f"
    if whole and not (np.abs(x) < EXACT).all():
        return None  # out of range: left to the device
    return x.astype(NUMPY[type.dtype])


def _slice_data(a: Mapping[str, Any], type: TensorType, x: Array) -> Array:
    index = [slice(None)] * x.ndim
    index[a["dim"]] = slice(a["start"], a["stop"], a["step"])
    return x[tuple(index)]


def _reduce(name: str) -> Callable[..., Array]:
    return lambda a, type, x: getattr(np, name)(x, axis=a["dims"], keepdims=a["keepdim"])


DATA: dict[str, Callable[..., Array | None]] = {
    "add": _plain("add"), "sub": _plain("subtract"), "mul": _plain("multiply"),
    "neg": _plain("negative"), "abs": _plain("abs"), "maximum": _plain("maximum"),
    "minimum": _plain("minimum"), "eq": _plain("equal"), "ne": _plain("not_equal"),
    "lt": _plain("less"), "le": _plain("less_equal"), "gt": _plain("greater"),
    "ge": _plain("greater_equal"), "logical_and": _plain("logical_and"),
    "logical_or": _plain("logical_or"), "logical_not": _plain("logical_not"),
    "where": _plain("where"), "floor_divide": _divide("floor_divide"),
    "remainder": _divide("remainder"), "cumsum": _cumsum, "slice": _slice_data,
    "reduce_sum": _reduce("sum"), "reduce_max": _reduce("max"), "reduce_min": _reduce("min"),
    "cast": _cast_data,
    "reshape": lambda a, type, x: x.reshape(type.shape),
    "expand": lambda a, type, x: np.broadcast_to(x, type.shape),
    "permute": lambda a, type, x: x.transpose(a["dims"]),
    "flip": lambda a, type, x: np.flip(x, a["dim"]),
    "concat": lambda a, type, *xs: np.concatenate(xs, a["dim"]),
    "take": lambda a, type, x, index: np.take(x, index, axis=a["dim"]),
    "gather": lambda a, type, x, index: np.take_along_axis(x, index, axis=a["dim"]),
}  # fmt: skip
#: ops whose float results do not depend on who computes them (IEEE 754, or no arithmetic at all)
_EXACT_FLOATS = frozenset({
    "add", "sub", "mul", "neg", "abs", "maximum", "minimum", "eq", "ne", "lt", "le", "gt", "ge",
    "where", "slice", "reshape", "expand", "permute", "flip", "concat", "take", "gather",
    "reduce_max", "reduce_min", "cast",
})  # fmt: skip
