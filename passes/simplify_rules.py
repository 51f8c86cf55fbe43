"""The rewrite rules of simplify, one function each, and the one list of them.

A rule gets an op whose operands are simplified, and returns the values that replace the op's
results, or None. What it emits is simplified in turn. The shape of a result never changes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ..ir.module import Attr, Op, Value
from ..ir.opdef import full_attrs
from ..ir.ops import OPS
from ..ir.ops.pointwise import broadcast
from ..ir.types import TensorType
from .simplify_affine import Affine, uniform
from .simplify_domain import Choice, Fact, Small


class Scope(Protocol):
    """What a rule may ask, and how it makes ops."""

    @property
    def facts(self) -> Mapping[str, Fact]:
        """What is known about values, by name."""

    def definition(self, value: Value) -> Op | None:
        """The op that defines a value; None for a parameter."""

    def emit(
        self, like: Op, name: str, operands: Sequence[Value], type: TensorType, **attrs: Attr
    ) -> Value:
        """A new op with one result, in place of `like`."""

    def emit_like(self, op: Op) -> tuple[Value, ...]:
        """An op with the results of the one that it replaces."""


Result = Value | tuple[Value, ...] | None
Apply = Callable[[Op, Scope], Result]


@dataclass(frozen=True)
class Rule:
    """A named rewrite of some ops."""

    name: str
    doc: str
    ops: tuple[str, ...]
    apply: Apply


RULES: list[Rule] = []
POINTWISE = tuple(name for name, entry in OPS.items() if entry.family == "pointwise")


def _rule(name: str, doc: str, *ops: str) -> Callable[[Apply], Apply]:
    def add(apply: Apply) -> Apply:
        RULES.append(Rule(name, doc, ops, apply))
        return apply

    return add


def _attrs(op: Op) -> Mapping[str, Any]:
    return full_attrs(op.name, op.attrs)


def _source(op: Op, scope: Scope, name: str) -> Op | None:
    """The op of that name which defines the first operand."""
    inner = scope.definition(op.operands[0])
    return inner if inner is not None and inner.name == name else None


def _number(value: Value, scope: Scope) -> bool | int | float | None:
    """The number that a tensor is filled with, if that is known."""
    fact = scope.facts.get(value.name)
    return fact.offset if isinstance(fact, Affine) and fact.uniform else None


# -- views -----------------------------------------------------------------------------------------


@_rule("identity-view", "a view or cast that changes nothing",
       "reshape", "expand", "cast", "permute", "slice", "pad", "concat", "flip", "reduce_sum",
       "reduce_max", "reduce_min")  # fmt: skip
def _identity(op: Op, scope: Scope) -> Result:
    x = op.operands[0]
    if x.type != op.results[0].type:
        return None
    attrs = _attrs(op)
    if op.name == "permute":
        same = list(attrs["dims"]) == sorted(attrs["dims"])
    elif op.name == "slice":
        same = attrs["step"] == 1
    elif op.name == "pad":
        same = not any(attrs["low"])
    elif op.name == "concat":
        same = len(op.operands) == 1
    elif op.name == "flip":
        same = x.type.shape[attrs["dim"]] == 1
    else:
        same = True
    return x if same else None


@_rule("reshape-of-reshape", "only the last shape counts", "reshape")
@_rule("expand-of-expand", "only the last shape counts", "expand")
def _last_shape(op: Op, scope: Scope) -> Result:
    inner = _source(op, scope, op.name)
    if inner is None:
        return None
    return scope.emit(op, op.name, inner.operands, op.results[0].type)


@_rule("permute-of-permute", "one permutation instead of two", "permute")
def _permutes(op: Op, scope: Scope) -> Result:
    inner = _source(op, scope, "permute")
    if inner is None:
        return None
    first = _attrs(inner)["dims"]
    dims = tuple(first[d] for d in _attrs(op)["dims"])
    return scope.emit(op, "permute", inner.operands, op.results[0].type, dims=dims)


@_rule(
    "permute-of-unit-dims", "a permutation that only moves dims of size 1 is a reshape", "permute"
)
def _unit_permute(op: Op, scope: Scope) -> Result:
    x = op.operands[0]
    moved = [d for d in _attrs(op)["dims"] if x.type.shape[d] != 1]
    return scope.emit(op, "reshape", [x], op.results[0].type) if moved == sorted(moved) else None


@_rule("expand-without-copies", "an expand that only adds dims of size 1 is a reshape", "expand")
def _unit_expand(op: Op, scope: Scope) -> Result:
    x = op.operands[0]
    same = x.type.numel == op.results[0].type.numel and x.type.numel
    return scope.emit(op, "reshape", [x], op.results[0].type) if same else None


#: dtype -> dtypes that hold all of its values
_WIDER = {
    "bool": ("u8", "i8", "i16", "i32", "i64", "f16", "bf16", "f32", "f64"),
    "u8": ("i16", "i32", "i64", "f16", "bf16", "f32", "f64"),
    "i8": ("i16", "i32", "i64", "f16", "bf16", "f32", "f64"),
    "i16": ("i32", "i64", "f32", "f64"), "i32": ("i64", "f64"), "i64": (),
    "f8e4m3": ("f16", "bf16", "f32", "f64"), "f8e5m2": ("f16", "bf16", "f32", "f64"),
    "bf16": ("f32", "f64"), "f16": ("f32", "f64"), "f32": ("f64",), "f64": (),
}  # fmt: skip


@_rule("cast-of-cast", "a cast to a wider dtype on the way loses nothing", "cast")
def _casts(op: Op, scope: Scope) -> Result:
    inner = _source(op, scope, "cast")
    if inner is None:
        return None
    (x,) = inner.operands
    if inner.results[0].type.dtype not in _WIDER[x.type.dtype]:
        return None
    return scope.emit(op, "cast", [x], op.results[0].type)


@_rule("slice-of-slice", "one slice instead of two of the same dim", "slice")
def _slices(op: Op, scope: Scope) -> Result:
    inner = _source(op, scope, "slice")
    if inner is None or _attrs(inner)["dim"] != _attrs(op)["dim"] or not op.results[0].type.numel:
        return None
    a, b = _attrs(inner), _attrs(op)
    dim, step = int(a["dim"]), int(a["step"]) * int(b["step"])
    start = int(a["start"]) + int(b["start"]) * int(a["step"])
    stop = start + (op.results[0].type.shape[dim] - 1) * step + 1
    return scope.emit(
        op, "slice", inner.operands, op.results[0].type, dim=dim, start=start, stop=stop, step=step
    )


@_rule("slice-of-concat", "a slice that lies in one part is a slice of that part", "slice")
def _slice_of_concat(op: Op, scope: Scope) -> Result:
    inner = _source(op, scope, "concat")
    if inner is None or _attrs(inner)["dim"] != _attrs(op)["dim"] or not op.results[0].type.numel:
        return None
    a = _attrs(op)
    dim, start, step = int(a["dim"]), int(a["start"]), int(a["step"])
    last = start + (op.results[0].type.shape[dim] - 1) * step
    first = 0
    for part in inner.operands:
        size = part.type.shape[dim]
        if first <= start and last < first + size:
            return scope.emit(
                op, "slice", [part], op.results[0].type,
                dim=dim, start=start - first, stop=last - first + 1, step=step,
            )  # fmt: skip
        first += size
    return None


@_rule("take-of-range", "a take of evenly spaced positions is a slice", "take")
def _take_range(op: Op, scope: Scope) -> Result:
    fact = scope.facts.get(op.operands[1].name)
    if not isinstance(fact, Affine) or len(fact.dims[0]) > 1:
        return None
    (factors,) = fact.dims
    count, step = factors[0] if factors else (1, 1)
    start = int(fact.offset)
    if step <= 0 or start < 0:
        return None
    dim = int(_attrs(op)["dim"])
    stop = start + (count - 1) * step + 1
    return scope.emit(
        op, "slice", op.operands[:1], op.results[0].type, dim=dim, start=start, stop=stop, step=step
    )


def _repeats(fact: Fact | None, size: int, count: int) -> bool:
    """Is a vector 0, 1, ... size - 1, each `count` times?"""
    if isinstance(fact, Small):
        values = [number for number in range(size) for _ in range(count)]
        return bool(fact.data.tolist() == values)
    return isinstance(fact, Affine) and fact.offset == 0 and fact.dims == (((size, 1), (count, 0)),)


@_rule("take-of-repeats", "a take of 0, 0, 1, 1, ... copies each element in place", "take")
def _take_repeats(op: Op, scope: Scope) -> Result:
    x, index = op.operands
    dim = int(_attrs(op)["dim"])
    shape, type = x.type.shape, op.results[0].type
    count = type.shape[dim] // max(shape[dim], 1)
    if not _repeats(scope.facts.get(index.name), shape[dim], count):
        return None
    before, after = shape[: dim + 1], shape[dim + 1 :]
    column = scope.emit(op, "reshape", [x], TensorType(type.dtype, (*before, 1, *after)))
    wide = scope.emit(op, "expand", [column], TensorType(type.dtype, (*before, count, *after)))
    return scope.emit(op, "reshape", [wide], type)


# -- arithmetic ------------------------------------------------------------------------------------


@_rule("double-negation", "neg of neg, not of not", "neg", "logical_not")
def _double(op: Op, scope: Scope) -> Result:
    inner = _source(op, scope, op.name)
    same = inner is not None and inner.operands[0].type == op.results[0].type
    return inner.operands[0] if inner is not None and same else None


#: op -> (number, does it also work as the first operand)
_NEUTRAL: dict[str, tuple[int, bool]] = {
    "mul": (1, True), "div": (1, False), "add": (0, True), "sub": (0, False), "pow": (1, False),
    "floor_divide": (1, False), "logical_and": (1, True), "logical_or": (0, True),
}  # fmt: skip


@_rule("neutral-operand", "x * 1, x / 1, x + 0, x - 0, x ** 1, x and true, x or false", *_NEUTRAL)
def _neutral(op: Op, scope: Scope) -> Result:
    neutral, both = _NEUTRAL[op.name]
    type = op.results[0].type
    if op.name == "floor_divide" and type.dtype[0] in "fb":
        return None  # it rounds
    x, y = op.operands
    if x.type == type and _number(y, scope) == neutral:
        return x
    return y if both and y.type == type and _number(x, scope) == neutral else None


@_rule("square", "x ** 2 is x * x", "pow")
def _square(op: Op, scope: Scope) -> Result:
    x, y = op.operands
    if x.type != op.results[0].type or _number(y, scope) != 2:
        return None
    return scope.emit(op, "mul", [x, x], x.type)


@_rule("remainder-in-range", "x mod n where 0 <= x < n", "remainder")
def _in_range(op: Op, scope: Scope) -> Result:
    x, y = op.operands
    fact, n = scope.facts.get(x.name), _number(y, scope)
    known = isinstance(fact, Affine) and n is not None and x.type == op.results[0].type
    if not known or not isinstance(fact, Affine) or n is None or isinstance(fact.offset, float):
        return None
    return x if fact.low >= 0 and fact.high < n else None


@_rule("same-operands", "x and x, x or x, max(x, x), min(x, x), where(c, x, x)",
       "logical_and", "logical_or", "maximum", "minimum", "where")  # fmt: skip
def _same(op: Op, scope: Scope) -> Result:
    *_, x, y = op.operands
    return x if x == y and x.type == op.results[0].type else None


@_rule("known-condition", "where of a condition that is the same everywhere", "where")
def _condition(op: Op, scope: Scope) -> Result:
    test, x, y = op.operands
    number = _number(test, scope)
    if number is None:
        return None
    chosen = x if number else y
    type = op.results[0].type
    return chosen if chosen.type == type else scope.emit(op, "expand", [chosen], type)


@_rule("no-dropout", "dropout with probability 0", "dropout")
def _dropout(op: Op, scope: Scope) -> Result:
    return op.operands[0] if _attrs(op)["p"] == 0 else None


@_rule("broadcast-operand", "a pointwise op repeats its operands itself", *POINTWISE)
def _broadcast(op: Op, scope: Scope) -> Result:
    if len(op.operands) < 2:
        return None
    operands = list(op.operands)
    shape = op.results[0].type.shape
    for index, value in enumerate(operands):
        inner = scope.definition(value)
        if inner is not None and inner.name == "expand":
            changed = [*operands[:index], inner.operands[0], *operands[index + 1 :]]
            if broadcast([v.type.shape for v in changed]) == shape:
                operands = changed
    if operands == list(op.operands):
        return None
    return scope.emit(op, op.name, operands, op.results[0].type, **op.attrs)


@_rule("reduction-of-unit-dims", "a reduction of dims of size 1 is a reshape",
       "reduce_sum", "reduce_max", "reduce_min", "reduce_prod")  # fmt: skip
def _unit_reduction(op: Op, scope: Scope) -> Result:
    (x,) = op.operands
    type = op.results[0].type
    if x.type.dtype != type.dtype or any(x.type.shape[d] != 1 for d in _attrs(op)["dims"]):
        return None
    return scope.emit(op, "reshape", [x], type)


# -- contractions ----------------------------------------------------------------------------------


@_rule("einsum-of-permute", "an einsum reads an operand in any order of its dims", "einsum")
def _einsum(op: Op, scope: Scope) -> Result:
    left, right = str(_attrs(op)["spec"]).split("->")
    terms = [term.split() for term in left.split(",")]
    operands = list(op.operands)
    for index, value in enumerate(operands):
        inner = scope.definition(value)
        if inner is not None and inner.name == "permute":
            names = dict(zip(_attrs(inner)["dims"], terms[index], strict=True))
            terms[index] = [names[d] for d in range(len(names))]
            operands[index] = inner.operands[0]
    if operands == list(op.operands):
        return None
    spec = ", ".join(" ".join(term) for term in terms) + " ->" + right
    return scope.emit(op, "einsum", operands, op.results[0].type, spec=spec)


#: positions of the queries and of the mask among the operands; the keys follow the queries
_QUERIES = {"attention": 0, "attention_backward": 1}
_MASKS = {"attention": 3, "attention_backward": 6}
#: an added score at or below which a probability is 0 in every dtype, f64 and f16's least included
_NEVER = -6e4


def _without_mask(op: Op, scope: Scope, **attrs: Attr) -> Result:
    position = _MASKS[op.name]
    operands = op.operands[:position] + op.operands[position + 1 :]
    kept = {name: value for name, value in op.attrs.items() if name != "mask"}
    return scope.emit_like(op.with_(operands=operands, attrs={**kept, **attrs}))


@_rule("mask-of-all", "a mask that hides nothing", *_MASKS)
def _all_seen(op: Op, scope: Scope) -> Result:
    if not _attrs(op)["mask"]:
        return None
    mask = op.operands[_MASKS[op.name]]
    number = _number(mask, scope)
    seen = number is not None and number == (1 if mask.type.dtype == "bool" else 0)
    return _without_mask(op, scope) if seen else None


@_rule("causal-mask", "a mask that is j <= i for query i and key j", *_MASKS)
def _causal(op: Op, scope: Scope) -> Result:
    if not _attrs(op)["mask"]:
        return None
    mask = op.operands[_MASKS[op.name]]
    fact = scope.facts.get(mask.name)
    if isinstance(fact, Choice):
        if fact.yes != 0 or fact.no > _NEVER:
            return None
        fact = fact.test
    queries, keys = mask.type.shape[-2:]
    if fact is None or isinstance(fact, Affine) or queries == 1 or keys == 1:
        return None
    causal = (*uniform(0, mask.type.shape[:-2]).dims, ((queries, -1),), ((keys, 1),))
    if getattr(fact, "of", None) != Affine(0, causal):
        return None
    q, k = op.operands[_QUERIES[op.name] :][:2]
    if (q.type.shape[-2], k.type.shape[-2]) != (queries, keys):
        return None
    return _without_mask(op, scope, causal=True)
