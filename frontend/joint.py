"""Assembling entries with gradients: forward calls, backward calls in reverse, what follows them.

A traced entry says where gradients come from by markers: results of role `backward` (a loss that
`backward()` was called on; attribute `of` numbers the calls) and parameters of role `grad` (the
gradient of entry parameter `name` from call `of`). The markers pass through simplify and outline
like any value; `assemble` replaces them by the backward itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..ir.builder import Builder
from ..ir.errors import CompileError
from ..ir.module import Attr, Function, Module, Namer, Op, Value
from ..ir.types import FLOATS
from ..passes.outline import Outline
from ..passes.simplify import Simplify
from .aten import Lowering
from .grad import Differentiator, prune, split_ops
from .trace import drop_dead, drop_stops


def prepare(function: Function, wrt: frozenset[str]) -> Module:
    """What precedes differentiation: the program gets simpler, repeated blocks become functions.

    `wrt` names the values that gradients are taken of.
    """
    function = drop_dead(drop_stops(function, wrt))
    return Outline().run(Simplify().run(Module("logical", (function,))))


@dataclass(frozen=True)
class _Markers:
    """The markers of an entry, and its ops that do not and that do depend on gradients."""

    grads: Mapping[str, Mapping[str, Attr]]  #: value name -> attributes of a `grad` parameter
    sources: Mapping[str, Value]  #: value name of a `grad` parameter -> what it is the gradient of
    losses: Mapping[Attr, Value]
    before: list[Op]
    after: list[Op]

    @staticmethod
    def of(entry: Function) -> _Markers:
        """Raises CompileError W0304 when a loss depends on a gradient."""
        params = list(zip(entry.params, entry.param_attrs, strict=True))
        results = zip(entry.results, entry.result_attrs, strict=True)
        grads = {value.name: attrs for value, attrs in params if attrs.get("role") == "grad"}
        named = {a.get("name"): value for value, a in params
                 if a.get("role") not in ("grad", "updated")}  # fmt: skip
        losses = {attrs["of"]: value for value, attrs in results if attrs.get("role") == "backward"}
        before, after = split_ops(entry.ops, grads)
        late = {value.name for op in after for value in op.results}
        if any(value.name in late for value in losses.values()):
            raise CompileError(
                "W0304", "a second backward() depends on gradients of the first",
                hint="compile a step with one backward(), or several of independent losses",
            )  # fmt: skip
        sources = {name: named[attrs["name"]] for name, attrs in grads.items()}
        return _Markers(grads, sources, losses, before, after)


def settle(entry: Function) -> Function:
    """Drop gradients that are zero by structure, as torch leaves `grad` of such parameters None.

    Their markers become zeros where they are read; a result of role `grad` goes when no
    `backward()` gives its parameter a gradient. Raises CompileError W0304.
    """
    marks = _Markers.of(entry)
    search = Differentiator(Module("logical", (entry,)))
    active = search.active(marks.before, {value.name for value in marks.sources.values()})
    reached = {
        number: search.reached(marks.before, active, {loss.name})
        for number, loss in marks.losses.items()
    }
    zero = {name for name, attrs in marks.grads.items()
            if marks.sources[name].name not in reached[attrs["of"]]}  # fmt: skip
    alive = {marks.grads[name]["name"] for name in marks.grads if name not in zero}
    builder = Builder(Namer(tuple(v.name for op in entry.ops for v in op.results)))
    c, table = Lowering(builder), dict[str, Value]()
    for value, attrs in zip(entry.params, entry.param_attrs, strict=True):
        if value.name in zero:
            table[value.name] = c.constant(0, value.type.dtype, value.type.shape)
        else:
            builder.params.append(value)
            builder.param_attrs.append(attrs)
    for op in entry.ops:
        builder.append(op.with_(operands=tuple(table.get(v.name, v) for v in op.operands)))
    kept = [(table.get(value.name, value), attrs)
            for value, attrs in zip(entry.results, entry.result_attrs, strict=True)
            if attrs.get("role") != "grad" or attrs["name"] in alive]  # fmt: skip
    return drop_dead(
        builder.function(entry.name, [v for v, _ in kept], [a for _, a in kept], entry.attrs)
    )


def assemble(module: Module) -> Module:
    """Replace the markers of an entry by its backward. Raises CompileError W0302, W0304."""
    marks = _Markers.of(module.entry)
    wrt = {value.name for value in marks.sources.values()}
    seeds: dict[Attr, dict[str, Value | None]] = {
        number: {loss.name: None} for number, loss in marks.losses.items()
    }
    work = _Entry(module, marks.before, wrt, seeds)
    found = {number: work.gradients(seed) for number, seed in seeds.items()}
    env: dict[str, Value] = {}
    for name, attrs in marks.grads.items():
        source = marks.sources[name]
        grad = found[attrs["of"]].get(source.name)
        env[name] = grad or work.emitter.constant(0, source.type.dtype, source.type.shape)
    return work.finish(marks.after, env)


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
    return work.finish([], {}, extra, attrs)


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
        extra: Sequence[Value] = (),
        extra_attrs: Sequence[Mapping[str, Attr]] = (),
    ) -> Module:
        """The module, with markers replaced by `env`.

        Each op of `after` stands as early as it can, so that a gradient that was used is free
        while the backward goes on.
        """
        entry = self.module.entry
        ready = {v.name: i for i, op in enumerate(self.builder.ops) for v in op.results}
        behind: dict[int, list[Op]] = {}
        for op in after:
            op = op.with_(operands=tuple(env.get(value.name, value) for value in op.operands))
            place = max((ready.get(value.name, -1) for value in op.operands), default=-1)
            behind.setdefault(place, []).append(op)
            ready.update((value.name, place) for value in op.results)
        ops = behind.get(-1, [])
        for index, op in enumerate(self.builder.ops):
            ops += [op, *behind.get(index, ())]
        self.builder.ops = ops
        kept = [(env.get(value.name, value), attrs)
                for value, attrs in zip(entry.results, entry.result_attrs, strict=True)
                if attrs.get("role") != "backward"]  # fmt: skip
        function = self.builder.function(
            entry.name, [*(v for v, _ in kept), *extra], [*(a for _, a in kept), *extra_attrs],
            entry.attrs,
        )  # fmt: skip
        functions = (*self.module.functions[1:], *self.differentiator.made)
        cleaned = (drop_dead(drop_stops(f)) for f in (function, *functions))
        return prune(self.module.with_(functions=tuple(cleaned)))
