"""Train steps on which the field agrees how to split them: for the tests of what the search finds."""

from __future__ import annotations

from collections.abc import Mapping

from tests.passes.place_programs import Entry, ein, f32

from weft.ir.module import Function, Module, Value
from weft.ir.opdef import OPS, full_attrs
from weft.ir.types import TensorType

#: what stays in float32: statistics that an op makes in that format whatever its operands are
_WIDE = ("lse", "r1", "r2")


def in_bf16(module: Module) -> Module:
    """A step in bfloat16; optimizer states stay as they are."""
    callees: dict[str, Function] = {}
    for function in module.functions[1:]:
        callees[function.name] = _narrow(function, {})
    entry = _narrow(module.entry, callees)
    return module.with_(functions=(entry, *callees.values()))


def _narrow(function: Function, callees: Mapping[str, Function]) -> Function:
    known: dict[str, Value] = {}
    for value, attrs in zip(function.params, function.param_attrs, strict=True):
        kept = attrs.get("role") == "state" or value.name in _WIDE
        known[value.name] = value if kept else Value(value.name, _half(value.type))
    ops = []
    for op in function.ops:
        operands = tuple(known[value.name] for value in op.operands)
        rule, types = OPS[op.name].types, [_half(value.type) for value in op.results]
        if op.name == "call":
            types = [value.type for value in callees[str(op.attrs["callee"])].results]
        elif rule is not None:
            types = list(rule(tuple(v.type for v in operands), full_attrs(op.name, op.attrs)))
        results = tuple(Value(v.name, t) for v, t in zip(op.results, types, strict=True))
        known.update((value.name, value) for value in results)
        ops.append(op.with_(operands=operands, results=results))
    ends = ([known[value.name] for value in values] for values in (function.params, function.results))
    params, results = map(tuple, ends)
    return function.with_(params=params, ops=tuple(ops), results=results)


def _half(type: TensorType) -> TensorType:
    return TensorType("bf16" if type.dtype == "f32" else type.dtype, type.shape)


def experts_step(
    *, groups: int, seq: int, experts: int, capacity: int, width: int, hidden: int
) -> Module:
    """A layer of experts behind a dense one (Lepikhin et al., GShard, 2021): groups of tokens give
    each expert `capacity` of them; the gates are an input."""
    e = Entry()
    b = e.b
    x = b.param(f32(groups, seq, width), "x", role="input", name="x")
    gates = b.param(f32(groups, seq, experts, capacity), "gates", role="input", name="gates")
    dense = e.weight("dense", width, width)
    up = e.weight("up", experts, width, hidden)
    down = e.weight("down", experts, hidden, width)
    tokens = ein(b, "g s k, k d -> g s d", x, dense)
    given = ein(b, "g s e c, g s d -> e g c d", gates, tokens)
    inner = b.one("relu", [ein(b, "e g c d, e d f -> e g c f", given, up)])
    made = ein(b, "e g c f, e f d -> e g c d", inner, down)
    out = ein(b, "g s e c, e g c d -> g s d", gates, made)
    loss = b.one("reduce_sum", [b.one("mul", [out, out])], {"dims": (0, 1, 2)})
    dout = b.one("mul", [out, b.constant(2.0, f32())])
    dmade = ein(b, "g s e c, g s d -> e g c d", gates, dout)
    ddown = ein(b, "e g c f, e g c d -> e f d", inner, dmade)
    dinner = b.one("relu_backward", [ein(b, "e g c d, e f d -> e g c f", dmade, down), inner])
    dup = ein(b, "e g c d, e g c f -> e d f", given, dinner)
    dgiven = ein(b, "e g c f, e d f -> e g c d", dinner, up)
    dtokens = ein(b, "g s e c, e g c d -> g s d", gates, dgiven)
    ddense = ein(b, "g s k, g s d -> k d", x, dtokens)
    for weight, grad in ((dense, ddense), (up, dup), (down, ddown)):
        e.adamw(weight, grad)
    return e.module(loss)


__all__ = ["experts_step", "in_bf16"]
