"""Reverse-mode differentiation of logical modules, function by function.

Each distinct function is differentiated once, however often it is called: a *pair* of a forward
function, which also returns what its backward saves, and a backward function, which takes those
values and the cotangents of the results and returns the cotangents of the parameters. The entry
calls the forwards, then the backwards in reverse order, and adds up the gradients of values that
were used several times (tied weights). The cost does not depend on depth.

A backward saves little: what follows from other saved values, parameters or constants by moving or
converting elements, or by cheap pointwise ops, is computed again (`_Recompute`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ..ir.builder import Builder
from ..ir.module import Function, Module, Namer, Op, Value
from ..ir.opdef import OPS
from ..ir.types import FLOATS
from .aten import Lowering
from .vjp import differentiable, pull_back

Mask = tuple[bool, ...]


@dataclass(frozen=True)
class Pair:
    """The two halves of a differentiated function.

    Attributes:
        forward: returns the function's results, then what is saved.
        backward: takes `taken` parameters, `saved` results of the forward, cotangents.
        taken: the parameters that the backward reads, by position.
        saved: the forward's results that the backward reads, by position.
        grads: the parameters whose cotangents the backward returns, by position.
    """

    forward: Function
    backward: Function
    taken: tuple[int, ...]
    saved: tuple[int, ...]
    grads: tuple[int, ...]


@dataclass
class _Plan:
    """What is known of one differentiated function body before its backward is written.

    Attributes:
        active: values that depend on what is differentiated by.
        reached: active values that the differentiated results depend on.
        pairs: for a call (by its first result's name), its pair and the forward call.
    """

    active: set[str]
    reached: set[str]
    pairs: dict[str, tuple[Pair, Op]] = field(default_factory=dict)


class Differentiator:
    """Differentiates functions of a module; keeps the functions that it makes.

    d = Differentiator(module)
    tape = d.forward(module.entry.ops, wrt={"w"}, of={"loss"}, namer)
    tape.ops                                    # the forward, calls saving what they must
    d.backward(tape, lowering, {"loss": one})   # appends the backward; cotangents by name
    """

    def __init__(self, module: Module) -> None:
        self.table = {function.name: function for function in module.functions}
        self.made: list[Function] = []
        self._names = Namer(tuple(self.table))
        self._pairs: dict[tuple[str, Mask, Mask], Pair] = {}
        self._active: dict[tuple[str, Mask], set[str]] = {}
        self._reached: dict[tuple[str, Mask, Mask], set[str]] = {}

    # -- which values matter ----------------------------------------------------------------------

    def active(self, ops: Iterable[Op], wrt: Iterable[str]) -> set[str]:
        """Names of the values that change with the values `wrt`."""
        names = set(wrt)
        for op in ops:
            mask = tuple(value.name in names for value in op.operands)
            if not any(mask):
                continue
            if op.name == "call":
                callee = self.table[str(op.attrs["callee"])]
                inner = self._function_active(callee, mask)
                for outer, value in zip(op.results, callee.results, strict=True):
                    if value.name in inner:
                        names.add(outer.name)
            elif differentiable(op):
                names.update(v.name for v in op.results if v.type.dtype in FLOATS)
        return names

    def _function_active(self, function: Function, mask: Mask) -> set[str]:
        key = (function.name, mask)
        if key not in self._active:
            wrt = [p.name for p, on in zip(function.params, mask, strict=True) if on]
            self._active[key] = self.active(function.ops, wrt)
        return self._active[key]

    def reached(self, ops: Sequence[Op], active: set[str], of: Iterable[str]) -> set[str]:
        """Names of the active values that the values `of` depend on."""
        names = {name for name in of if name in active}
        for op in reversed(ops):
            results = tuple(value.name in names for value in op.results)
            if not any(results):
                continue
            mask = tuple(value.name in active for value in op.operands)
            if op.name == "call":
                callee = self.table[str(op.attrs["callee"])]
                inner = self._function_reached(callee, mask, results)
                for value, param in zip(op.operands, callee.params, strict=True):
                    if param.name in inner:
                        names.add(value.name)
            else:
                names.update(v.name for v, on in zip(op.operands, mask, strict=True) if on)
        return names

    def _function_reached(self, function: Function, mask: Mask, results: Mask) -> set[str]:
        key = (function.name, mask, results)
        if key not in self._reached:
            active = self._function_active(function, mask)
            of = [v.name for v, on in zip(function.results, results, strict=True) if on]
            self._reached[key] = self.reached(function.ops, active, of)
        return self._reached[key]

    # -- bodies -----------------------------------------------------------------------------------

    def forward(
        self, ops: Sequence[Op], wrt: Iterable[str], of: Iterable[str], namer: Namer
    ) -> tuple[list[Op], _Plan]:
        """The ops with calls replaced by calls of forward functions, and the plan for `backward`."""
        active = self.active(ops, wrt)
        plan = _Plan(active, self.reached(ops, active, of))
        out: list[Op] = []
        for op in ops:
            results = tuple(value.name in plan.reached for value in op.results)
            if op.name != "call" or not any(results):
                out.append(op)
                continue
            mask = tuple(value.name in active for value in op.operands)
            pair = self.pair(self.table[str(op.attrs["callee"])], mask, results)
            extra = pair.forward.results[len(op.results) :]
            saved = tuple(Value(namer("saved"), value.type) for value in extra)
            call = replace(op, results=op.results + saved, attrs={"callee": pair.forward.name})
            plan.pairs[op.results[0].name] = pair, call
            out.append(call)
        return out, plan

    def backward(
        self, c: Lowering, ops: Sequence[Op], plan: _Plan, cts: Mapping[str, Value]
    ) -> dict[str, Value]:
        """Append the backward of `ops` to the emitter `c`.

        `cts` maps names of values to cotangents. Returns the cotangents of what `ops` reads and
        does not define.
        """
        sums = _Sums(c, cts)
        for op in reversed(ops):
            given = [sums.take(value.name) for value in op.results]
            wants = [value.name in plan.active for value in op.operands]
            if not any(wants) or all(ct is None for ct in given):
                continue
            c.loc = op.loc
            if op.name == "call":
                grads = self._call_backward(c, plan, op, given)
            elif differentiable(op):
                grads = list(pull_back(c, op, given, wants))
            else:
                continue
            for value, grad in zip(op.operands, grads, strict=True):
                if grad is not None:
                    sums.add(value.name, grad)
        return sums.rest()

    @staticmethod
    def _call_backward(
        c: Lowering, plan: _Plan, op: Op, cts: Sequence[Value | None]
    ) -> list[Value | None]:
        pair, call = plan.pairs[op.results[0].name]
        operands = [op.operands[i] for i in pair.taken]
        operands += [call.results[i] for i in pair.saved]
        for value, ct in zip(op.results, cts, strict=True):
            if value.name in plan.reached:
                operands.append(ct or c.constant(0, value.type.dtype, value.type.shape))
        types = [value.type for value in pair.backward.results]
        results = c.many("call", operands, {"callee": pair.backward.name}, types)
        grads: list[Value | None] = [None] * len(op.operands)
        for position, result in zip(pair.grads, results, strict=True):
            grads[position] = result
        return grads

    # -- functions --------------------------------------------------------------------------------

    def pair(self, function: Function, mask: Mask, results: Mask) -> Pair:
        """Forward and backward of a function, for active parameters and reached results."""
        key = (function.name, mask, results)
        if key not in self._pairs:
            made = self._pair(function, mask, results)
            self._pairs[key] = made
            self.made += [made.forward, made.backward]
        return self._pairs[key]

    def _pair(self, function: Function, mask: Mask, results: Mask) -> Pair:
        taken_names = [p.name for p in function.params]
        taken_names += [v.name for op in function.ops for v in op.results]
        namer = Namer(tuple(taken_names))
        wrt = [p.name for p, on in zip(function.params, mask, strict=True) if on]
        of = [v.name for v, on in zip(function.results, results, strict=True) if on]
        ops, plan = self.forward(function.ops, wrt, of, namer)
        builder = Builder(namer)
        c = Lowering(builder)
        cts: dict[str, Value] = {}
        for value, on in zip(function.results, results, strict=True):
            if on:
                ct = builder.param(value.type, f"d_{value.name}")
                cts[value.name] = c.emit("add", [cts[value.name], ct]) if value.name in cts else ct
        cts = self.backward(c, function.ops, plan, cts)
        grads = [i for i, p in enumerate(function.params) if p.name in plan.reached]
        outs = []
        for i in grads:
            param = function.params[i]
            found = cts.get(param.name)
            outs.append(found or c.constant(0, param.type.dtype, param.type.shape))
        return self._assemble(function, ops, builder, grads, outs)

    def _assemble(
        self, function: Function, ops: list[Op], builder: Builder, grads: list[int],
        outs: list[Value],
    ) -> Pair:  # fmt: skip
        """Decide what is saved, and close both functions over it."""
        repeated, needed = _Recompute(function, ops, builder.ops, outs).solve()
        results = list(function.results)
        position = {value.name: i for i, value in reversed(list(enumerate(results)))}
        taken = tuple(i for i, p in enumerate(function.params) if p.name in needed)
        params = {p.name for p in function.params}
        kept = [v for op in ops for v in op.results if v.name in needed and v.name not in params]
        for value in kept:
            if value.name not in position:
                position[value.name] = len(results)
                results.append(value)
        forward = replace(
            function, name=self._names(f"{function.name}_forward"), ops=tuple(ops),
            results=tuple(results), result_attrs=tuple({} for _ in results),
        )  # fmt: skip
        leading = [*(function.params[i] for i in taken), *kept]
        backward = Function(
            self._names(f"{function.name}_backward"), (*leading, *builder.params),
            (*repeated, *builder.ops), tuple(outs), attrs=function.attrs,
        )  # fmt: skip
        saved = tuple(position[value.name] for value in kept)
        return Pair(forward, backward, taken, saved, tuple(grads))


class _Sums:
    """Cotangents under way, summed as they come.

    The gradient of a slice is a pad; where slices take a tensor apart (rotary halves, heads of one
    projection), the sum of the pads is one concatenation.
    """

    def __init__(self, c: Lowering, cts: Mapping[str, Value]) -> None:
        self.c, self.sums = c, dict(cts)
        self.pads: dict[str, list[Op]] = {}

    def add(self, name: str, grad: Value) -> None:
        """One more contribution to the cotangent of a value."""
        op = self.c.definition(grad)
        if op is not None and op.name == "pad" and op.attrs.get("value", 0) == 0:
            self.pads.setdefault(name, []).append(op)
        else:
            self._sum(name, grad)

    def take(self, name: str) -> Value | None:
        """The cotangent of a value, once its last reader was seen; None when there is none."""
        pads = self.pads.pop(name, [])
        joined = self._joined(pads)
        for grad in [op.result for op in pads] if joined is None else [joined]:
            self._sum(name, grad)
        return self.sums.pop(name, None)

    def rest(self) -> dict[str, Value]:
        """The cotangents of what is left."""
        found = {name: self.take(name) for name in dict.fromkeys([*self.sums, *self.pads])}
        return {name: grad for name, grad in found.items() if grad is not None}

    def _sum(self, name: str, grad: Value) -> None:
        known = self.sums.get(name)
        self.sums[name] = grad if known is None else self.c.emit("add", [known, grad])

    def _joined(self, pads: Sequence[Op]) -> Value | None:
        """The sum of pads that tile a dim without gap or overlap."""
        if len(pads) < 2:
            return None
        parts: list[tuple[int, Value]] = []
        dims: set[int] = set()
        for op in pads:
            low, high = op.attrs["low"], op.attrs["high"]
            assert isinstance(low, tuple) and isinstance(high, tuple)
            touched = {d for d in range(len(low)) if low[d] or high[d]}
            dims |= touched
            if len(touched) != 1 or len(dims) != 1:
                return None
            (dim,) = dims
            parts.append((int(low[dim]), op.operands[0]))  # type: ignore[arg-type]
        parts.sort(key=lambda part: part[0])
        end = 0
        for start, value in parts:
            if start != end:
                return None
            end += value.type.shape[dim]
        if end != pads[0].result.type.shape[dim]:
            return None
        return self.c.emit("concat", [value for _, value in parts], {"dim": dim})


class _Recompute:
    """Chooses which forward values a backward gets and which it computes again.

    Going through the forward from its end, a value that the backward needs is computed again when
    that is free (constants), when it only moves or converts one smaller or equal operand, or when
    it is a cheap pointwise op whose operands the backward has anyway. Everything else is saved.
    """

    #: at most this many operations per element, so never an exponential
    CHEAP_FLOPS = 1.0

    def __init__(
        self, function: Function, ops: Sequence[Op], backward: Sequence[Op], outs: Iterable[Value]
    ) -> None:
        self.ops = ops
        self.defs = {value.name: op for op in ops for value in op.results}
        self.params = {value.name for value in function.params}
        inside = {value.name for op in backward for value in op.results}
        reads = [v.name for op in backward for v in op.operands] + [v.name for v in outs]
        self.needed = {
            name for name in reads if name not in inside and (name in self.defs
                                                              or name in self.params)
        }  # fmt: skip

    def solve(self) -> tuple[list[Op], set[str]]:
        """The forward ops to repeat, in order, and the names of the values to hand over."""
        repeated: list[Op] = []
        for op in reversed(self.ops):
            if any(v.name in self.needed for v in op.results) and self._again(op):
                repeated.append(op)
                self.needed.difference_update(v.name for v in op.results)
                self.needed.update(v.name for v in op.operands)
        return repeated[::-1], self.needed

    def _again(self, op: Op) -> bool:
        entry = OPS[op.name]
        if entry.family == "creation" or op.name == "fold_seed":
            return True
        if op.name == "cast" or (entry.family == "movement" and len(op.operands) == 1):
            source = op.operands[0]
            return source.type.bytes <= op.result.type.bytes or self._at_hand(source)
        cheap = entry.family == "pointwise" and entry.flops_per_point <= self.CHEAP_FLOPS
        return (cheap or entry.family == "movement") and all(map(self._at_hand, op.operands))

    def _at_hand(self, value: Value) -> bool:
        """Will the backward have a value (or make it from nothing)?"""
        if value.name in self.params or value.name in self.needed:
            return True
        op = self.defs.get(value.name)
        return op is not None and OPS[op.name].family == "creation"


def prune(module: Module) -> Module:
    """Drop the functions that the entry does not reach."""
    table = {function.name: function for function in module.functions}
    seen: dict[str, Function] = {}
    stack = [module.entry]
    while stack:
        function = stack.pop()
        if function.name not in seen:
            seen[function.name] = function
            stack += [table[str(op.attrs["callee"])] for op in function.ops if op.name == "call"]
    return module.with_(functions=tuple(f for f in module.functions if f.name in seen))


def split_ops(ops: Sequence[Op], late: Mapping[str, object]) -> tuple[list[Op], list[Op]]:
    """(ops that do not depend on the values `late`, ops that do), each in order."""
    names = set(late)
    before: list[Op] = []
    after: list[Op] = []
    for op in ops:
        if any(value.name in names for value in op.operands):
            names.update(value.name for value in op.results)
            after.append(op)
        else:
            before.append(op)
    return before, after
