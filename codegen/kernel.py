"""From a kernel function to expressions: what each of its results is at one point of its space.

A column that was cut, joined or padded costs nothing: `slice` reads its operand at a shifted
column, `concat` and `pad` choose by the column. So every value is a function of a *shift*: the node
of value v at shift s is v at (row, column + s).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from keyword import iskeyword

from ..ir.errors import CompileError
from ..ir.module import Function, Namer, Op, Value
from ..ir.opdef import full_attrs
from ..passes.space import COLUMN, NoSpace, Space, analyse
from .expr import Graph, Node, compute_dtype
from .pointwise import OPTIMIZER, POINTWISE

#: names that the text of a kernel uses itself
RESERVED = (
    "tl", "torch", "triton", "launch", "kernel", "pid", "row", "col", "start", "blocks", "n_rows",
    "n_cols", "BLOCK_M", "BLOCK_N", "NUM_WARPS", "n_strips", "block", "in_rows", "in_cols",
    "strided", "size", "grid", "sums_f32", "sums_f64",
    "n", *(f"d{i}" for i in range(16)),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Output:
    """A result of a kernel: its name in the text, its type, and what it is at each point."""

    name: str
    value: Value
    node: Node


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel function as expressions.

    Attributes:
        function: where it comes from.
        space: its iteration space.
        params: names in the text, and values, of the parameters.
        outputs: the results.
    """

    function: Function
    space: Space
    params: tuple[tuple[str, Value], ...]
    outputs: tuple[Output, ...]

    @property
    def name(self) -> str:
        """The kernel's name."""
        return str(self.function.attrs["kernel"])


def build(function: Function) -> Kernel:
    """The kernel that a kernel function asks for.

    Raises CompileError W0901 where its ops do not share an iteration space, or one of them cannot
    be expressed.
    """
    try:
        space = analyse(function.ops, [value.name for value in function.results])
    except (NoSpace, KeyError) as error:
        raise CompileError(
            "W0901",
            f"kernel {function.name} cannot be generated",
            reason=str(error),
            hint="the plan calls ATen for these ops; `weft opt --pass fuse` makes legal kernels",
        ) from error
    return _Builder(function, space).run()


def identifier(name: str) -> str:
    """A value's name as a Python name."""
    text = re.sub(r"\W+", "_", name)
    return f"v{text}" if not text or text[0].isdigit() or iskeyword(text) else text


class _Builder:
    def __init__(self, function: Function, space: Space) -> None:
        self.function, self.space = function, space
        self.graph = Graph()
        self.defs = function.defs()
        namer = Namer(RESERVED)
        self.params = {value.name: namer(identifier(value.name)) for value in function.params}
        self.namer = namer
        self.memo: dict[tuple[str, int], Node] = {}

    def run(self) -> Kernel:
        outputs = tuple(
            Output(self.namer(identifier(value.name)), value, self.node(value, 0))
            for value in self.function.results
        )
        params = tuple((self.params[value.name], value) for value in self.function.params)
        return Kernel(self.function, self.space, params, outputs)

    def has_column(self, value: Value) -> bool:
        """Does a value vary along the column?"""
        return COLUMN in self.space.maps[value.name]

    def node(self, value: Value, shift: int) -> Node:
        """The node of a value at (row, column + shift)."""
        if not self.has_column(value):
            shift = 0
        key = (value.name, shift)
        if key not in self.memo:
            if value.name in self.params:
                self.memo[key] = self.load(value, shift)
            else:
                op = self.defs[value.name]
                for result, node in zip(op.results, self.expand(op, shift), strict=True):
                    self.memo[result.name, shift] = self.store_form(node, result)
        return self.memo[key]

    def load(self, value: Value, shift: int) -> Node:
        """A parameter, read where it is needed."""
        dims = self.space.maps[value.name]
        return self.graph.make(
            "load", (), compute_dtype(value.type.dtype), (self.params[value.name], shift),
            rows=any(d not in (None, COLUMN) for d in dims), column=COLUMN in dims,
        )  # fmt: skip

    def store_form(self, node: Node, result: Value) -> Node:
        """A node in the dtype of its value; fp8 rounds here too, as it is meant to."""
        dtype = result.type.dtype
        node = self.graph.cast(node, compute_dtype(dtype))
        if dtype in ("f8e4m3", "f8e5m2") and node.op != "round":
            return self.graph.make("round", (node,), node.dtype, (dtype,))
        return node

    def expand(self, op: Op, shift: int) -> tuple[Node, ...]:
        """The nodes of an op's results at a shift."""
        attrs = full_attrs(op.name, op.attrs)
        if op.name in _SHIFTED:
            return _SHIFTED[op.name](self, op, shift)
        rule = POINTWISE.get(op.name) or OPTIMIZER.get(op.name)
        if rule is None:
            raise CompileError(
                "W0901", f"kernel {self.function.name}: {op.name} has no expression",
                hint="the plan calls ATen for these ops",
            )  # fmt: skip
        return rule(self.graph, tuple(self.node(x, shift) for x in op.operands), attrs)


def _attr(op: Op, key: str) -> int:
    value = full_attrs(op.name, op.attrs)[key]
    assert isinstance(value, int)
    return value


def _alias(b: _Builder, op: Op, shift: int) -> tuple[Node, ...]:
    return (b.node(op.operands[0], shift),)


def _constant(b: _Builder, op: Op, shift: int) -> tuple[Node, ...]:
    value = op.attrs["value"]
    assert isinstance(value, (bool, int, float))
    return (b.graph.const(value, compute_dtype(op.result.type.dtype)),)


def _iota(b: _Builder, op: Op, shift: int) -> tuple[Node, ...]:
    attrs = full_attrs(op.name, op.attrs)
    start, step = attrs["start"], attrs["step"]
    assert isinstance(start, (int, float)) and isinstance(step, (int, float))
    place = b.space.maps[op.result.name][_attr(op, "dim")]
    dtype = compute_dtype(op.result.type.dtype)
    if place is None:
        return (b.graph.const(start, dtype),)
    index = _column(b, shift) if place == COLUMN else b.graph.make(
        "row", (), "i32", (place,), rows=True, column=False
    )  # fmt: skip
    return (index.to(dtype) * step + start,)


def _column(b: _Builder, shift: int) -> Node:
    return b.graph.make("column", (), "i32", (shift,), rows=False, column=True)


def _slice(b: _Builder, op: Op, shift: int) -> tuple[Node, ...]:
    return (b.node(op.operands[0], shift + _attr(op, "start")),)


def _concat(b: _Builder, op: Op, shift: int) -> tuple[Node, ...]:
    ends = []
    offset = 0
    for part in op.operands:
        ends.append((b.node(part, shift - offset), offset := offset + part.type.shape[-1]))
    result, _ = ends[-1]
    for node, end in reversed(ends[:-1]):
        result = b.graph.where(_column(b, shift) < end, node, result)
    return (result,)


def _pad(b: _Builder, op: Op, shift: int) -> tuple[Node, ...]:
    attrs = full_attrs(op.name, op.attrs)
    low, value = attrs["low"], attrs["value"]
    assert isinstance(low, tuple) and isinstance(low[-1], int)
    assert isinstance(value, (int, float))
    (operand,) = op.operands
    column, first = _column(b, shift), low[-1]
    inside = b.graph.both(column >= first, column < first + operand.type.shape[-1])
    return (b.graph.where(inside, b.node(operand, shift - first), value),)


def _reduce(kind: str) -> Callable[[_Builder, Op, int], tuple[Node, ...]]:
    def rule(b: _Builder, op: Op, shift: int) -> tuple[Node, ...]:
        (operand,) = op.operands
        x = b.node(operand, 0).to(compute_dtype(op.result.type.dtype))
        if op.result.name in b.space.row_sums:
            return (b.graph.make("row_sum", (x,), x.dtype, rows=False, column=True),)
        length = next(
            size
            for size, place in zip(operand.type.shape, b.space.maps[operand.name], strict=True)
            if place == COLUMN
        )
        result = b.graph.reduce(kind, x, length)
        if kind != "sum" and x.dtype.startswith("f"):  # torch keeps NaN, the device's max drops it
            missing = b.graph.sum(x.differs(x).to("i32"), length)
            result = b.graph.where(missing > 0, float("nan"), result)
        return (result,)

    return rule


def _softmax(b: _Builder, op: Op, shift: int) -> tuple[Node, ...]:
    top, total = _exp_sum(b, op.operands[0])
    x = b.node(op.operands[0], shift)
    if op.name == "softmax":
        return (b.graph.unary("exp", x - top) / total,)
    return (x - top - b.graph.unary("log", total),)


def _exp_sum(b: _Builder, value: Value, *, finite: bool = False) -> tuple[Node, Node]:
    """(maximum, sum of exp(x - maximum)) of a value's rows; `finite` replaces infinite maxima."""
    x, length = b.node(value, 0), value.type.shape[-1]
    top = b.graph.reduce("max", x, length)
    if finite:
        top = b.graph.where(b.graph.unary("abs", top) < float("inf"), top, 0.0)
    return top, b.graph.sum(b.graph.unary("exp", x - top), length)


def _lse(b: _Builder, value: Value) -> Node:
    top, total = _exp_sum(b, value, finite=True)
    return top + b.graph.unary("log", total)


def _softmax_backward(b: _Builder, op: Op, shift: int) -> tuple[Node, ...]:
    (dy0, y0), length = [b.node(x, 0) for x in op.operands], op.result.type.shape[-1]
    dy, y = [b.node(x, shift) for x in op.operands]
    if op.name == "softmax_backward":
        return (y * (dy - b.graph.sum(dy0 * y0, length)),)
    return (dy - b.graph.unary("exp", y) * b.graph.sum(dy0, length),)


def _norm(b: _Builder, op: Op, shift: int) -> tuple[Node, ...]:
    """layer_norm and rms_norm; their statistics are results too."""
    value, weight, *bias = op.operands
    length = value.type.shape[-1]
    eps = full_attrs(op.name, op.attrs)["eps"]
    assert isinstance(eps, (int, float))
    x0, x = b.node(value, 0), b.node(value, shift)
    statistics: tuple[Node, ...] = ()
    if op.name == "layer_norm":
        mean = b.graph.sum(x0, length) * (1.0 / length)
        x0, x = x0 - mean, x - mean
        statistics = (mean,)
    rstd = b.graph.unary("rsqrt", b.graph.sum(x0 * x0, length) * (1.0 / length) + eps)
    y = x * rstd * b.node(weight, shift)
    for term in bias:
        y = y + b.node(term, shift)
    return (y, *statistics, rstd)


def _norm_backward(b: _Builder, op: Op, shift: int) -> tuple[Node, ...]:
    """Gradients of layer_norm and rms_norm; those of weight and bias are sums over the rows."""
    *_, rstd = op.operands
    length = op.results[0].type.shape[-1]

    def at(shift: int) -> tuple[Node, Node, Node]:
        """dy, the normalized x, and dy * weight at a shift."""
        dy, x, weight, *mean = (b.node(value, shift) for value in op.operands[:-1])
        hat = (x - mean[0] if mean else x) * b.node(rstd, shift)
        return dy, hat, dy * weight

    (_, hat0, g0), (dy, hat, g) = at(0), at(shift)
    dx = g - hat * (b.graph.sum(g0 * hat0, length) * (1.0 / length))
    if op.name == "layer_norm_backward":
        dx = dx - b.graph.sum(g0, length) * (1.0 / length)
    sums = (dy * hat, dy)[: len(op.results) - 1]
    if b.space.row_sums:
        sums = tuple(b.graph.make("row_sum", (x,), x.dtype, rows=False, column=True) for x in sums)
    return (b.node(rstd, shift) * dx, *sums)


def _cross_entropy(b: _Builder, op: Op, shift: int) -> tuple[Node, ...]:
    logits, labels = op.operands
    label = b.node(labels, 0)
    lse = _lse(b, logits)
    hit = _column(b, 0).equals(label)
    picked = b.graph.sum(b.graph.where(hit, b.node(logits, 0), 0.0), logits.type.shape[-1])
    ignored = label.equals(_attr(op, "ignore_index"))
    return b.graph.where(ignored, 0.0, lse - picked), lse


def _cross_entropy_backward(b: _Builder, op: Op, shift: int) -> tuple[Node, ...]:
    dloss, logits, label, lse = (b.node(x, shift) for x in op.operands)
    hit = _column(b, shift).equals(label).to(logits.dtype)
    scale = b.graph.where(label.equals(_attr(op, "ignore_index")), 0.0, dloss)
    return ((b.graph.unary("exp", logits - lse) - hit) * scale,)


#: ops that look at the column
_SHIFTED: dict[str, Callable[[_Builder, Op, int], tuple[Node, ...]]] = {
    "cast": _alias, "constant": _constant, "iota": _iota, "expand": _alias,
    "reshape": _alias, "permute": _alias, "stop_gradient": _alias,
    "slice": _slice, "concat": _concat, "pad": _pad,
    "reduce_sum": _reduce("sum"), "reduce_max": _reduce("max"), "reduce_min": _reduce("min"),
    "softmax": _softmax, "log_softmax": _softmax, "softmax_backward": _softmax_backward,
    "log_softmax_backward": _softmax_backward, "logsumexp": lambda b, op, s: (
        _lse(b, op.operands[0]),),
    "layer_norm": _norm, "rms_norm": _norm, "layer_norm_backward": _norm_backward,
    "rms_norm_backward": _norm_backward, "cross_entropy": _cross_entropy,
    "cross_entropy_backward": _cross_entropy_backward,
}  # fmt: skip
#: ops that kernels can hold
SUPPORTED = frozenset(POINTWISE) | frozenset(OPTIMIZER) | frozenset(_SHIFTED)
