"""Assembling entries with gradients: forward calls, backward calls in reverse, what follows them.

A traced entry says where gradients come from by markers: results of role `backward` (a loss that
`backward()` was called on; attribute `of` numbers the calls) and parameters of role `grad` (the
gradient of entry parameter `name` from call `of`). The markers pass through simplify and outline
like any value; `assemble` replaces them by the backward itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..ir.builder import Builder
from ..ir.errors import CompileError
from ..ir.module import Attr, Function, Module, Namer, Op, Value
from ..ir.opdef import OPS
from ..ir.types import FLOATS
from ..passes.outline import Outline
from .aten import Lowering
from .grad import Differentiator, prune, split_ops
from .trace import drop_dead, drop_stops


def prepare(function: Function, wrt: frozenset[str]) -> Module:
    """What precedes differentiation: dead ops go, repeated blocks become functions.

    `wrt` names the values that gradients are taken of.
    """
    function = drop_dead(drop_stops(function, wrt))
    return Outline().run(Module("logical", (function,)))


def assemble(module: Module) -> Module:
    """Replace the markers of an entry by its backward.

    Gradients that are zero by structure: a result of role `grad` that would be one is left out.
    Raises CompileError W0304 when a loss depends on a gradient.
    """
    entry = module.entry
    marks = {value.name: attrs for value, attrs in zip(entry.params, entry.param_attrs, strict=True)
             if attrs.get("role") == "grad"}  # fmt: skip
    losses = {attrs["of"]: value for value, attrs in zip(entry.results, entry.result_attrs,
                                                         strict=True)
              if attrs.get("role") == "backward"}  # fmt: skip
    before, after = split_ops(entry.ops, marks)
    late = {value.name for op in after for value in op.results}
    if any(value.name in late for value in losses.values()):
        raise CompileError(
            "W0304", "a second backward() depends on gradients of the first",
            hint="compile a step with one backward(), or several of independent losses",
        )  # fmt: skip
    by_name = {attrs.get("name"): value for value, attrs in
               zip(entry.params, entry.param_attrs, strict=True)
               if attrs.get("role") != "grad"}  # fmt: skip
    wrt = {by_name[attrs["name"]].name for attrs in marks.values()}
    seeds: dict[Attr, dict[str, Value | None]] = {
        number: {loss.name: None} for number, loss in losses.items()
    }
    work = _Entry(module, before, wrt, seeds)
    found = {number: work.gradients(seed) for number, seed in seeds.items()}
    env: dict[str, Value] = {}
    for name, attrs in marks.items():
        grad = found[attrs["of"]].get(by_name[attrs["name"]].name)
        if grad is not None:
            env[name] = grad
    return work.finish(after, env, marks)


def joint(module: Module, wrt: Sequence[str]) -> Module:
    """Add a backward to a forward entry: tangents in, gradients out.

    A parameter of role `tangent` is added for each output of floating point that depends on the
    values `wrt` (attribute `of` is the output's number); then a result of role `grad` for each of
    them that has one, named as the entry parameter is.
    """
    entry = module.entry
    work = _Entry(module, list(entry.ops), set(wrt), {0: {
        value.name: None for value, attrs in zip(entry.results, entry.result_attrs, strict=True)
        if attrs.get("role") == "output"}})  # fmt: skip
    seed: dict[str, Value | None] = {}
    numbers = [i for i, a in enumerate(entry.result_attrs) if a.get("role") == "output"]
    for number, index in enumerate(numbers):
        value = entry.results[index]
        if value.name not in work.plan.reached or value.type.dtype not in FLOATS:
            continue
        tangent = work.builder.param(value.type, f"d_{value.name}", role="tangent", of=number,
                                     name=f"tangent.{number}")  # fmt: skip
        known = seed.get(value.name)
        seed[value.name] = tangent if known is None else work.emitter.emit("add", [known, tangent])
    grads = work.gradients(seed)
    extra: list[Value] = []
    attrs: list[Mapping[str, Attr]] = []
    for param, described in zip(entry.params, entry.param_attrs, strict=True):
        if param.name in wrt and param.name in grads:
            extra.append(grads[param.name])
            attrs.append({"role": "grad", "name": described["name"]})
    return work.finish([], {}, {}, extra, attrs)


class _Entry:
    """An entry under construction: its forward is there, backwards are appended."""

    def __init__(
        self, module: Module, ops: list[Op], wrt: set[str],
        seeds: Mapping[Attr, Mapping[str, Value | None]],
    ) -> None:  # fmt: skip
        self.module, self.source = module, ops
        entry = module.entry
        names = [p.name for p in entry.params]
        names += [v.name for op in entry.ops for v in op.results]
        self.builder = Builder(Namer(tuple(names)))
        for value, attrs in zip(entry.params, entry.param_attrs, strict=True):
            if attrs.get("role") != "grad":
                self.builder.params.append(value)
                self.builder.param_attrs.append(attrs)
        self.differentiator = Differentiator(module)
        of = {name for seed in seeds.values() for name in seed}
        forward, self.plan = self.differentiator.forward(ops, wrt, of, self.builder.namer)
        for op in forward:
            self.builder.append(op)
        self.emitter = Lowering(self.builder)

    def gradients(self, seed: Mapping[str, Value | None]) -> dict[str, Value]:
        """Append a backward from cotangents (None: 1) of values; cotangents of the parameters."""
        defs = {value.name: value for op in self.source for value in op.results}
        defs.update((value.name, value) for value in self.builder.params)
        cts = {}
        for name, ct in seed.items():
            type = defs[name].type
            cts[name] = ct or self.emitter.constant(1, type.dtype, type.shape)
        return self.differentiator.backward(self.emitter, self.source, self.plan, cts)

    def finish(
        self,
        after: Sequence[Op],
        env: Mapping[str, Value],
        marks: Mapping[str, Mapping[str, Attr]],
        extra: Sequence[Value] = (),
        extra_attrs: Sequence[Mapping[str, Attr]] = (),
    ) -> Module:
        """The module: `after` follows, markers are replaced by `env` or by zeros."""
        entry, table = self.module.entry, dict(env)
        read = {value.name for op in after for value in op.operands}
        for value in entry.params:
            if value.name in marks and value.name not in env and value.name in read:
                table[value.name] = self.emitter.constant(0, value.type.dtype, value.type.shape)
        skipped: set[str] = set()  # as torch does with a parameter whose gradient is None
        for op in after:
            if OPS[op.name].family == "optimizer" and _without_gradient(op, marks, env):
                skipped.update(value.name for value in op.results)
                continue
            operands = tuple(table.get(value.name, value) for value in op.operands)
            self.builder.append(op.with_(operands=operands))
        results: list[Value] = []
        attrs: list[Mapping[str, Attr]] = []
        for value, described in zip(entry.results, entry.result_attrs, strict=True):
            missing = value.name in marks and value.name not in table
            missing = missing or value.name in skipped
            if described.get("role") != "backward" and not missing:
                results.append(table.get(value.name, value))
                attrs.append(described)
        function = self.builder.function(
            entry.name, [*results, *extra], [*attrs, *extra_attrs], entry.attrs
        )
        functions = (*self.module.functions[1:], *self.differentiator.made)
        cleaned = (drop_dead(drop_stops(f)) for f in (function, *functions))
        return prune(self.module.with_(functions=tuple(cleaned)))


def _without_gradient(op: Op, marks: Mapping[str, object], env: Mapping[str, Value]) -> bool:
    """Is an update's gradient a marker of a parameter that the loss does not depend on?"""
    name = op.operands[1].name
    return name in marks and name not in env
