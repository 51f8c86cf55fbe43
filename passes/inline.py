"""Inline: calls become the ops of their callee."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from ..ir.module import Function, Location, Module, Namer, Op, Value
from .base import Pass


def rebase(path: str, old: str, new: str) -> str:
    """`path` with its leading components `old` replaced by `new`; `path` itself if it has others.

    >>> rebase("model.layers.0.mlp", "model.layers.0", "model.layers.3")
    'model.layers.3.mlp'
    """
    if not old or not new:
        return path
    if path == old:
        return new
    return new + path[len(old) :] if path.startswith(old + ".") else path


def is_kernel(function: Function) -> bool:
    """Does a function stand for a kernel (`docs/architecture.md`, schedule level)?"""
    return "kernel" in function.attrs


@dataclass(frozen=True)
class Inline(Pass):
    """Calls become the ops of their callee; the functions that nobody calls any more go.

    before:  %1 = call(%x) {callee = "block"} : f32[4] @1      // loc @1 = "model.layers.3"
             func @block(%a: f32[4]) -> (f32[4]) attrs {path = "model.layers.0"} {
               %b = neg(%a) : f32[4] ...}
    after:   %1 = neg(%x) : f32[4] @2                          // loc @2 = "model.layers.3.act"

    Names stay unique: a result keeps the name that it has in the caller, another value keeps its
    own with a number. Kernel functions stay calls.
    """

    name = "inline"
    summary = "calls become the ops of their callee"
    levels = ("logical", "placed", "spmd")

    def run(self, module: Module) -> Module:
        return inline(module)


def inline(module: Module, keep: Callable[[Function], bool] = is_kernel) -> Module:
    """Inline all calls but those of functions for which `keep` holds.

    Kept functions stay in the module if a call of them is left, and are flat themselves. Takes
    time linear in the size of the flat program.
    """
    table = {function.name: function for function in module.functions}
    flat: dict[str, Function] = {}
    for name in callees_first(table, module.entry.name):
        flat[name] = _flatten(table[name], flat, keep)
    entry = flat[module.entry.name]
    reached = set(callees_first(flat, entry.name))
    rest = (flat[f.name] for f in module.functions[1:] if f.name in reached)
    return module.with_(functions=(entry, *rest))


def callees_first(table: Mapping[str, Function], entry: str) -> list[str]:
    """Names of the functions that `entry` reaches, each after those that it calls.

    Raises KeyError for a callee that does not exist; the verifier has ruled recursion out.
    """
    order: list[str] = []
    seen: set[str] = set()

    def visit(name: str) -> None:
        if name in seen:
            return
        seen.add(name)
        for op in table[name].ops:
            if op.name == "call":
                visit(str(op.attrs["callee"]))
        order.append(name)

    visit(entry)
    return order


def _flatten(
    function: Function, flat: Mapping[str, Function], keep: Callable[[Function], bool]
) -> Function:
    """`function` with its calls replaced by the ops of its callees, which are flat already."""
    if not any(op.name == "call" for op in function.ops):
        return function
    taken = [value.name for value in function.params]
    taken += [value.name for op in function.ops for value in op.results]
    namer = Namer(tuple(taken))
    ops: list[Op] = []
    env: dict[str, Value] = {}
    for op in function.ops:
        operands = tuple(env.get(value.name, value) for value in op.operands)
        callee = flat[str(op.attrs["callee"])] if op.name == "call" else None
        if callee is None or keep(callee):
            ops.append(op if operands == op.operands else replace(op, operands=operands))
            continue
        results = _splice(callee, op, operands, namer, ops)
        env.update(zip((value.name for value in op.results), results, strict=True))
    results = tuple(env.get(value.name, value) for value in function.results)
    return replace(function, ops=tuple(ops), results=results)


def _splice(
    callee: Function, call: Op, operands: tuple[Value, ...], namer: Namer, ops: list[Op]
) -> tuple[Value, ...]:
    """Append the ops of `callee` to `ops` and return what the call's results are."""
    old_path = str(callee.attrs.get("path", ""))
    env = {param.name: value for param, value in zip(callee.params, operands, strict=True)}
    wanted: dict[str, str] = {}  # a callee's value -> the name of the call's result that it is
    for inner, outer in zip(callee.results, call.results, strict=True):
        wanted.setdefault(inner.name, outer.name)
    for op in callee.ops:
        results = []
        for value in op.results:
            name = wanted.get(value.name) or namer(value.name)
            env[value.name] = Value(name, value.type)
            results.append(env[value.name])
        path = rebase(op.loc.path, old_path, call.loc.path)
        loc = op.loc if path == op.loc.path else Location(path, op.loc.file, op.loc.line)
        inner_operands = tuple([env[value.name] for value in op.operands])
        # constructors: a flat program has tens of thousands of ops, and `replace` takes thrice as long
        ops.append(Op(op.name, inner_operands, tuple(results), op.attrs, op.split, loc))
    return tuple(env[value.name] for value in callee.results)
