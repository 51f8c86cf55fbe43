"""Rules on shapes and dtypes: the op's signature, the op table's result types."""

from __future__ import annotations

from collections.abc import Sequence

from .module import Module, Op
from .opdef import full_attrs, signature_of
from .ops import OPS
from .rule import Rule, op_rule
from .signature import parse_signature
from .types import TensorType

#: What a signature or a type rule may raise on operands or attributes that make no sense.
_UNFIT = (ValueError, KeyError, IndexError, TypeError, AssertionError, ArithmeticError)
#: (operands, results) of ops without a signature; None: any number.
_COUNTS: dict[str, tuple[int | None, int | None]] = {
    "call": (None, None), "aten": (None, None), "free": (None, 0), "recv": (0, 1),
}  # fmt: skip
#: Families whose results have the dtype of their first operand where no rule says it.
_SAME_DTYPE = ("movement", "contraction", "indexing")


def _signature(module: Module, op: Op) -> str:
    if OPS[op.name].signature is None:
        wanted = _COUNTS.get(op.name, (1, 1))
        for what, values, count in (
            ("operands", op.operands, wanted[0]),
            ("results", op.results, wanted[1]),
        ):
            if count is not None and len(values) != count:
                return f"{op.name} has {count} {what}, not {len(values)}"
        return ""
    try:
        signature_of(op)
    except _UNFIT as error:
        shapes = ", ".join(str(list(value.type.shape)) for value in op.operands)
        return f"{op.name} of shapes {shapes or 'none'}: {error or type(error).__name__}"
    return ""


def _dtypes(module: Module, op: Op) -> str:
    reason = OPS[op.name].wrong_dtypes([value.type.dtype for value in op.operands])
    return f"{op.name}: {reason}" if reason else ""


def _broadcast(module: Module, op: Op) -> str:
    """Dims `a...` are the same in all tensors of an op; only pointwise ops broadcast them."""
    line = OPS[op.name].signature
    if not isinstance(line, str) or OPS[op.name].family == "pointwise" or "..." not in line:
        return ""
    template = parse_signature(line)
    known: dict[str, tuple[int, ...]] = {}
    rows = zip((*template.operands, *template.results), (*op.operands, *op.results), strict=True)
    for items, value in rows:
        shape = value.type.shape
        for position, item in enumerate(items):
            if item.variadic:
                part = shape[position : len(shape) - (len(items) - 1 - position)]
                if known.setdefault(item.names[0], part) != part:
                    return (
                        f"dims {item.names[0]}... of {op.name} are {list(known[item.names[0]])} in "
                        f"one tensor and {list(part)} in {value}"
                    )
    return ""


def _expected(op: Op) -> Sequence[TensorType] | str:
    """Result types by the op table, or why there are none."""
    rule = OPS[op.name].types
    assert rule is not None
    try:
        types = rule([value.type for value in op.operands], full_attrs(op.name, op.attrs))
    except _UNFIT as error:
        return f"the attributes of {op.name} do not fit its operands: {error}"
    if len(types) != len(op.results):
        return f"{op.name} has {len(types)} results, not {len(op.results)}"
    return types


def _results(module: Module, op: Op) -> str:
    entry = OPS[op.name]
    if entry.types is not None:
        expected = _expected(op)
        if isinstance(expected, str):
            return expected
        for value, type in zip(op.results, expected, strict=True):
            if (value.type.dtype, value.type.shape) != (type.dtype, type.shape):
                return f"{value} is {value.type.placed(None)}, {op.name} gives {type.placed(None)}"
    elif entry.family in _SAME_DTYPE and op.operands:
        for value in op.results:
            if value.type.dtype != op.operands[0].type.dtype:
                return f"{value} is {value.type.dtype}, {op.name} keeps {op.operands[0].type.dtype}"
    return ""


def _kept(module: Module, op: Op) -> str:
    """Ops that move a value between ranks, or wait for one, keep its dtype and global shape."""
    if OPS[op.name].signature is not None or not (op.operands and op.results):
        return ""
    if op.name in ("call", "aten"):
        return ""
    before, after = op.operands[0].type.placed(None), op.results[0].type.placed(None)
    return "" if before == after else f"{op.name} turns {before} into {after}"


RULES: tuple[Rule, ...] = (
    op_rule("signature", "operand and result shapes fit the op's signature", _signature, "W0202"),
    op_rule("dtypes", "operand dtypes are what the op takes", _dtypes, "W0202"),
    op_rule("broadcast", "only pointwise ops broadcast", _broadcast, "W0202"),
    op_rule("result-types", "results have the types that the op table gives", _results, "W0202"),
    op_rule("same-value", "reshards and collectives keep dtype and shape", _kept, "W0202"),
)
