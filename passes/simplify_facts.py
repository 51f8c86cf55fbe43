"""What is known about values without running the program: the domain of constant folding.

`Affine` (`simplify_affine.py`) knows integer tensors of any size by a formula, `Below` bool tensors
that compare one with 0, `Choice` float masks made of one; `Small` tensors are known by their data.
An op's facts follow from its operands' (`infer`), by the formulas where they last, else by data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isnan, prod
from typing import Any

import numpy as np
import numpy.typing as npt

from ..ir.module import Op
from ..ir.opdef import full_attrs
from ..ir.types import FLOATS, TensorType
from . import simplify_affine as affine
from .simplify_affine import Affine

Array = npt.NDArray[Any]
#: elements of a tensor that is known by its data
SMALL = 256
#: integers up to this size are exact in f32 and f64
_EXACT = 1 << 24
_NUMPY = {"f64": np.float64, "f32": np.float32, "i64": np.int64, "i32": np.int32, "i16": np.int16,
          "i8": np.int8, "u8": np.uint8, "bool": np.bool_}  # fmt: skip


@dataclass(frozen=True)
class Below:
    """True where `of` <= 0."""

    of: Affine


@dataclass(frozen=True)
class Choice:
    """`yes` where `test` holds, else `no`."""

    test: Below
    yes: float
    no: float


@dataclass(frozen=True, eq=False)
class Small:
    """A tensor by its data."""

    data: Array


Fact = Affine | Below | Choice | Small


def rounded(value: bool | int | float, dtype: str) -> bool | int | float | None:
    """A number as `dtype` holds it; None for those that are not folded (f8, NaN, overflow)."""
    if dtype == "bool":
        return bool(value)
    if dtype not in FLOATS:
        info = np.iinfo(_NUMPY[dtype])
        return int(value) if info.min <= int(value) <= info.max else None
    number = float(value)
    if isnan(number):
        return None
    with np.errstate(over="ignore"):
        if dtype == "f64":
            return number
        if dtype in ("f32", "f16"):
            return float(np.float32(number) if dtype == "f32" else np.float16(number))
        if dtype == "bf16" and np.isfinite(number):  # round half to even on the upper 16 bits
            bits = int(np.float32(number).view(np.uint32))
            bits = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
            return float(np.uint32(bits).view(np.float32))
    return number if dtype == "bf16" else None


def infer(op: Op, facts: Mapping[str, Fact]) -> Fact | None:
    """What is known about the only result of an op; None for ops with several results."""
    if len(op.results) != 1 or op.name not in _RULES and op.name not in _DATA:
        return None
    known = [facts.get(value.name) for value in op.operands]
    if None in known or not op.results[0].type.numel:
        return None
    fact: Fact | None = None
    if op.name in _RULES:
        fact = _RULES[op.name](op, full_attrs(op.name, op.attrs), known)
    return fact if fact is not None else _by_data(op, known)


# -- by data ---------------------------------------------------------------------------------------


def data_of(fact: Fact | None, type: TensorType) -> Array | None:
    """The elements of a small tensor, from any fact."""
    if isinstance(fact, Small):
        return fact.data
    if type.numel > SMALL or type.dtype not in _NUMPY:
        return None
    if isinstance(fact, Below):
        inner = data_of(fact.of, TensorType("i64", type.shape))
        return None if inner is None else inner <= 0
    if not isinstance(fact, Affine):
        return None
    out = np.full((1,) * len(type.shape), 0, dtype=np.int64)
    if fact.uniform:
        return np.full(type.shape, fact.offset, dtype=_NUMPY[type.dtype])
    for d, factors in enumerate(fact.dims):
        line = np.zeros(1, dtype=np.int64)
        for size, step in factors:
            line = (line[:, None] + np.arange(size) * step).reshape(-1)
        out = out + line.reshape([-1 if k == d else 1 for k in range(len(type.shape))])
    return (out + int(fact.offset)).astype(_NUMPY[type.dtype])


def fact_of(data: Array) -> Fact | None:
    """The simplest fact that says these elements."""
    first = data.reshape(-1)[0].item()
    if isinstance(first, float) and isnan(first):
        return None
    if bool((data == first).all()):
        return affine.uniform(first, data.shape)
    return Small(data)


def _by_data(op: Op, known: Sequence[Fact | None]) -> Fact | None:
    type = op.results[0].type
    evaluate = _DATA.get(op.name)
    if evaluate is None or type.dtype not in _NUMPY or type.numel > SMALL:
        return None
    if {value.type.dtype for value in op.operands} & FLOATS and op.name not in _EXACT_FLOATS:
        return None
    arrays = []
    for value, fact in zip(op.operands, known, strict=True):
        array = data_of(fact, value.type)
        if array is None:
            return None
        arrays.append(array)
    out = evaluate(full_attrs(op.name, op.attrs), type, *arrays)
    return None if out is None else fact_of(np.asarray(out, dtype=_NUMPY[type.dtype]))


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
    if whole and not (np.abs(x) < _EXACT).all():
        return None  # out of range: left to the device
    return x.astype(_NUMPY[type.dtype])


def _slice_data(a: Mapping[str, Any], type: TensorType, x: Array) -> Array:
    index = [slice(None)] * x.ndim
    index[a["dim"]] = slice(a["start"], a["stop"], a["step"])
    return x[tuple(index)]


def _reduce(name: str) -> Callable[..., Array]:
    return lambda a, type, x: getattr(np, name)(x, axis=a["dims"], keepdims=a["keepdim"])


_DATA: dict[str, Callable[..., Array | None]] = {
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


# -- by formula ------------------------------------------------------------------------------------


def _constant(op: Op, a: Mapping[str, Any], known: Sequence[Any]) -> Fact | None:
    type = op.results[0].type
    value = rounded(a["value"], type.dtype)
    return None if value is None else affine.uniform(value, type.shape)


def _literal(op: Op, a: Mapping[str, Any], known: Sequence[Any]) -> Fact | None:
    type = op.results[0].type
    if type.dtype not in _NUMPY or type.numel > SMALL:
        return None
    return fact_of(np.array(a["values"], dtype=_NUMPY[type.dtype]).reshape(type.shape))


def _iota(op: Op, a: Mapping[str, Any], known: Sequence[Any]) -> Fact | None:
    type = op.results[0].type
    if not isinstance(a["start"], int) or not isinstance(a["step"], int):
        return None
    return _checked(affine.ramp(a["start"], a["step"], a["dim"], type.shape), type)


def _checked(fact: Affine | None, type: TensorType) -> Affine | None:
    """The fact if its elements are exact in the type."""
    if fact is None or fact.uniform:
        value = None if fact is None else rounded(fact.offset, type.dtype)
        return None if value is None else affine.uniform(value, type.shape)
    if type.dtype in FLOATS:
        exact = type.dtype in ("f32", "f64") and max(-fact.low, fact.high) <= _EXACT
        return fact if exact else None
    low, high = rounded(fact.low, type.dtype), rounded(fact.high, type.dtype)
    return None if type.dtype == "bool" or low is None or high is None else fact


def _view(change: Callable[[Op, Mapping[str, Any], Affine], Affine | None]) -> Callable[..., Any]:
    """A view of a formula; a view of a comparison is the comparison of the view."""

    def rule(op: Op, a: Mapping[str, Any], known: Sequence[Any]) -> Fact | None:
        (x,) = known
        if isinstance(x, Choice):
            inner = change(op, a, x.test.of)
            return None if inner is None else Choice(Below(inner), x.yes, x.no)
        if isinstance(x, Below):
            inner = change(op, a, x.of)
            return None if inner is None else Below(inner)
        return change(op, a, x) if isinstance(x, Affine) else None

    return rule


def _flip(op: Op, a: Mapping[str, Any], x: Affine) -> Affine:
    factors = x.dims[a["dim"]]
    moved = sum(step * (size - 1) for size, step in factors)
    turned = tuple((size, -step) for size, step in factors)
    offset = int(x.offset) + moved if moved else x.offset
    return Affine(offset, (*x.dims[: a["dim"]], turned, *x.dims[a["dim"] + 1 :]))


def _concat(op: Op, a: Mapping[str, Any], known: Sequence[Any]) -> Fact | None:
    if not all(isinstance(x, Affine) for x in known):
        return None
    return affine.concat(known, a["dim"])


def _cast(op: Op, a: Mapping[str, Any], known: Sequence[Any]) -> Fact | None:
    (x,) = known
    type = op.results[0].type
    if isinstance(x, Affine):
        if isinstance(x.offset, float) and type.dtype not in FLOATS and x.offset % 1:
            return None  # out of range or to be cut off: left to the device
        return _checked(x, type)
    return x if isinstance(x, Choice) and type.dtype in FLOATS else None


def _add(sign: int) -> Callable[..., Fact | None]:
    def rule(op: Op, a: Mapping[str, Any], known: Sequence[Any]) -> Fact | None:
        x, y = known
        type = op.results[0].type
        if not (isinstance(x, Affine) and isinstance(y, Affine)) or type.dtype == "bool":
            return None
        if x.uniform and y.uniform:
            return _uniform(type, lambda p, q: p + sign * q, x, y)
        if x.offset % 1 or y.offset % 1:
            return None
        return _checked(affine.combine(x, y, 1, sign, int(x.offset) + sign * int(y.offset)), type)

    return rule


def _uniform(type: TensorType, compute: Callable[..., Any], *xs: Affine) -> Fact | None:
    """Arithmetic on filled tensors, in the precision in which torch computes it."""
    if type.dtype in FLOATS:
        wide = np.float64 if type.dtype == "f64" else np.float32
        with np.errstate(all="ignore"):
            value = compute(*(wide(x.offset) for x in xs)).item()
    else:
        value = compute(*(x.offset for x in xs))
    result = rounded(value, type.dtype)
    return None if result is None else affine.uniform(result, type.shape)


def _mul(op: Op, a: Mapping[str, Any], known: Sequence[Any]) -> Fact | None:
    x, y = known
    type = op.results[0].type
    if not (isinstance(x, Affine) and isinstance(y, Affine)) or type.dtype == "bool":
        return None
    if x.uniform and y.uniform:
        return _uniform(type, lambda p, q: p * q, x, y)
    if y.uniform:
        x, y = y, x
    if not x.uniform or x.offset % 1 or y.offset % 1:
        return None
    return _checked(affine.expand(affine.scale(y, int(x.offset)), type.shape), type)


def _div(op: Op, a: Mapping[str, Any], known: Sequence[Any]) -> Fact | None:
    x, y = known
    type = op.results[0].type
    plain = isinstance(x, Affine) and isinstance(y, Affine) and x.uniform and y.uniform
    if not plain or type.dtype not in FLOATS or y.offset == 0:
        return None
    return _uniform(type, lambda p, q: p / q, x, y)


def _neg(op: Op, a: Mapping[str, Any], known: Sequence[Any]) -> Fact | None:
    (x,) = known
    if not isinstance(x, Affine) or op.results[0].type.dtype == "bool":
        return None
    if x.uniform:
        return _uniform(op.results[0].type, lambda p: -p, x)
    return _checked(affine.scale(x, -1), op.results[0].type) if x.offset % 1 == 0 else None


def _wrap(op: Op, a: Mapping[str, Any], known: Sequence[Any]) -> Fact | None:
    """floor_divide and remainder by a number that the operand stays below."""
    x, y = known
    type = op.results[0].type
    plain = isinstance(x, Affine) and isinstance(y, Affine) and y.uniform
    if not plain or type.dtype in FLOATS or type.dtype == "bool" or int(y.offset) <= 0:
        return None
    if x.low < 0 or x.high >= y.offset:
        return None
    whole = affine.expand(x, type.shape)
    return whole if op.name == "remainder" else affine.uniform(0, type.shape)


#: comparison -> (scale of x, scale of y, added): x op y is (scale_x x + scale_y y + added <= 0)
_COMPARE = {"le": (1, -1, 0), "lt": (1, -1, 1), "ge": (-1, 1, 0), "gt": (-1, 1, 1)}


def _compare(op: Op, a: Mapping[str, Any], known: Sequence[Any]) -> Fact | None:
    x, y = known
    if not (isinstance(x, Affine) and isinstance(y, Affine)):
        return None
    shape = op.results[0].type.shape
    if x.uniform and y.uniform:
        tests = {"eq": "__eq__", "ne": "__ne__", "le": "__le__", "lt": "__lt__", "ge": "__ge__",
                 "gt": "__gt__"}  # fmt: skip
        return affine.uniform(getattr(float(x.offset), tests[op.name])(float(y.offset)), shape)
    if x.offset % 1 or y.offset % 1:
        return None
    p, q, add = _COMPARE.get(op.name, (1, -1, 0))
    difference = affine.combine(x, y, p, q, p * int(x.offset) + q * int(y.offset) + add)
    if difference is None:
        return None
    difference = affine.expand(difference, shape)
    low, high = difference.low, difference.high
    if op.name in ("eq", "ne"):
        if low == high == 0 or low > 0 or high < 0:
            return affine.uniform((low == high == 0) == (op.name == "eq"), shape)
        return None
    if high <= 0 or low > 0:
        return affine.uniform(high <= 0, shape)
    return Below(difference)


def _logical(op: Op, a: Mapping[str, Any], known: Sequence[Any]) -> Fact | None:
    """and, or: a filled operand decides, or leaves the other one."""
    if any(value.type.dtype != "bool" for value in op.operands):
        return None
    shape = op.results[0].type.shape
    deciding = op.name == "logical_or"
    for x, y in (known, known[::-1]):
        if isinstance(x, Affine) and x.uniform:
            if bool(x.offset) == deciding:
                return affine.uniform(deciding, shape)
            if isinstance(y, Below):
                return Below(affine.expand(y.of, shape))
            if isinstance(y, Affine):
                return affine.expand(y, shape)
    return known[0] if known[0] == known[1] and isinstance(known[0], Below) else None


def _not(op: Op, a: Mapping[str, Any], known: Sequence[Any]) -> Fact | None:
    (x,) = known
    if isinstance(x, Below):  # not (x <= 0) is -x + 1 <= 0
        flipped = affine.scale(x.of, -1)
        return Below(Affine(int(flipped.offset) + 1, flipped.dims))
    if isinstance(x, Affine) and x.uniform:
        return affine.uniform(not x.offset, op.results[0].type.shape)
    return None


def _where(op: Op, a: Mapping[str, Any], known: Sequence[Any]) -> Fact | None:
    test, x, y = known
    type = op.results[0].type
    if isinstance(test, Affine) and test.uniform:
        chosen = x if test.offset else y
        return affine.expand(chosen, type.shape) if isinstance(chosen, Affine) else None
    plain = isinstance(x, Affine) and isinstance(y, Affine) and x.uniform and y.uniform
    if isinstance(test, Below) and plain and type.dtype in FLOATS:
        inner = Below(affine.expand(test.of, type.shape))
        return Choice(inner, float(x.offset), float(y.offset))
    return None


def _cumsum_fact(op: Op, a: Mapping[str, Any], known: Sequence[Any]) -> Fact | None:
    (x,) = known
    if not isinstance(x, Affine) or not x.uniform or x.offset % 1:
        return None
    step, type = int(x.offset), op.results[0].type
    return _checked(affine.ramp(step, step, a["dim"], type.shape), type)


def _reduce_fact(op: Op, a: Mapping[str, Any], known: Sequence[Any]) -> Fact | None:
    (x,) = known
    type = op.results[0].type
    if not isinstance(x, Affine) or not x.uniform or type.dtype == "bool":
        return None
    if op.name != "reduce_sum":
        return affine.uniform(x.offset, type.shape)
    count = prod(op.operands[0].type.shape[d] for d in a["dims"])
    if x.offset % 1 or abs(x.offset) * count > _EXACT:
        return None
    return _checked(affine.uniform(int(x.offset) * count, type.shape), type)


def _take(op: Op, a: Mapping[str, Any], known: Sequence[Any]) -> Fact | None:
    x, index = known
    type = op.results[0].type
    if isinstance(x, Affine) and x.uniform:
        return affine.uniform(x.offset, type.shape)
    if not (isinstance(x, Affine) and isinstance(index, Affine)) or index.low < 0:
        return None
    found = affine.compose(x.dims[a["dim"]], index)
    if found is None:
        return None
    added, inner = found
    dims = (*x.dims[: a["dim"]], *inner, *x.dims[a["dim"] + 1 :])
    return _checked(Affine(int(x.offset) + added, dims), type)


_RULES: dict[str, Callable[[Op, Mapping[str, Any], Sequence[Any]], Fact | None]] = {
    "constant": _constant, "literal": _literal, "iota": _iota, "cast": _cast, "concat": _concat,
    "reshape": _view(lambda op, a, x: affine.reshape(x, op.results[0].type.shape)),
    "expand": _view(lambda op, a, x: affine.expand(x, op.results[0].type.shape)),
    "permute": _view(lambda op, a, x: Affine(x.offset, tuple(x.dims[d] for d in a["dims"]))),
    "slice": _view(lambda op, a, x: affine.slice_dim(
        x, a["dim"], a["start"], a["step"], op.results[0].type.shape[a["dim"]])),
    "flip": _view(_flip), "add": _add(1), "sub": _add(-1), "mul": _mul, "div": _div, "neg": _neg,
    "floor_divide": _wrap, "remainder": _wrap, "eq": _compare, "ne": _compare, "lt": _compare,
    "le": _compare, "gt": _compare, "ge": _compare, "logical_and": _logical,
    "logical_or": _logical, "logical_not": _not, "where": _where, "cumsum": _cumsum_fact,
    "reduce_sum": _reduce_fact, "reduce_max": _reduce_fact, "reduce_min": _reduce_fact,
    "take": _take,
}  # fmt: skip
