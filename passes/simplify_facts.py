"""Inferring facts: an op's follow from its operands', by formulas where they last, else by data.

`Affine` (`simplify_affine.py`) knows integer tensors of any size by a formula, `Below` bool tensors
that compare one with 0, `Choice` float masks made of one; `Small` tensors are known by their data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import numpy as np

from ..ir.module import Op
from ..ir.opdef import full_attrs
from ..ir.types import FLOATS, TensorType
from . import simplify_affine as affine
from .simplify_affine import Affine
from .simplify_data import DATA, by_data, fact_of
from .simplify_domain import EXACT, NUMPY, SMALL, Below, Choice, Fact, rounded


def _constant(op: Op, a: Mapping[str, Any], known: Sequence[Any]) -> Fact | None:
    type = op.results[0].type
    value = rounded(a["value"], type.dtype)
    return None if value is None else affine.uniform(value, type.shape)


def _literal(op: Op, a: Mapping[str, Any], known: Sequence[Any]) -> Fact | None:
    type = op.results[0].type
    if type.dtype not in NUMPY or type.numel > SMALL:
        return None
    return fact_of(np.array(a["values"], dtype=NUMPY[type.dtype]).reshape(type.shape))


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
        exact = type.dtype in ("f32", "f64") and max(-fact.low, fact.high) <= EXACT
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
    """floor_divide and remainder by a positive number."""
    x, y = known
    type = op.results[0].type
    plain = isinstance(x, Affine) and isinstance(y, Affine) and y.uniform
    if not plain or type.dtype in FLOATS or type.dtype == "bool" or int(y.offset) <= 0:
        return None
    parts = affine.divide(x, int(y.offset))
    if parts is None:
        return None
    return _checked(affine.expand(parts[op.name == "remainder"], type.shape), type)


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
    if x.offset % 1 or abs(x.offset) * count > EXACT:
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


def infer(op: Op, facts: Mapping[str, Fact]) -> Fact | None:
    """What is known about the only result of an op; None for ops with several results."""
    if len(op.results) != 1 or op.name not in _RULES and op.name not in DATA:
        return None
    known = [facts.get(value.name) for value in op.operands]
    if None in known or not op.results[0].type.numel:
        return None
    fact: Fact | None = None
    if op.name in _RULES:
        fact = _RULES[op.name](op, full_attrs(op.name, op.attrs), known)
    return fact if fact is not None else by_data(op, known)
