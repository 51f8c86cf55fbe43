"""Simplify: constant folding, common subexpressions, dead code, views and masks cleaned up.

One walk in program order: each op is folded if its result is known (`simplify_facts.py`), else
rewritten by the first rule that applies (`simplify_rules.py`), else shared with an equal earlier op.
Rules see simplified operands, so one walk reaches almost everything; walks are repeated until
nothing changes, at most `rounds` times. Linear in the number of ops for each walk.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ..ir.module import Attr, Function, Module, Namer, Op, Value
from ..ir.ops import OPS
from ..ir.types import TensorType
from .base import Pass
from .dead_code import eliminate_dead, without_dead_ops
from .inline import callees_first, is_kernel
from .simplify_affine import Affine
from .simplify_domain import Fact, Small
from .simplify_facts import infer
from .simplify_rules import RULES, Rule
from .unsort import unsort

#: elements that are written out as a literal
_LITERAL = 64
#: op name -> its rules, in the order of the list
_BY_OP: dict[str, list[Rule]] = {name: [rule for rule in RULES if name in rule.ops] for name in OPS}


@dataclass(frozen=True)
class Simplify(Pass):
    """The same results from fewer ops.

    before:  %one = constant() {value = 1.0} : f32[]
             %a = mul(%x, %one) : f32[4, 8]
             %b = reshape(%a) : f32[32]
             %c = reshape(%b) : f32[8, 4]
             %d = reshape(%a) : f32[8, 4]
             %e = add(%c, %d) : f32[8, 4]
    after:   %c = reshape(%x) : f32[8, 4]
             %e = add(%c, %c) : f32[8, 4]

    A result known to be one number becomes a scalar `constant`, expanded; evenly spaced integers
    become an `iota`. Results differ from the original ones in the sign of zero at most.
    """

    rounds: int = 4

    name = "simplify"
    summary = "constant folding, common subexpressions, dead code, view and mask clean-up"
    levels = ("logical",)

    def run(self, module: Module) -> Module:
        return simplify(module, self.rounds)


def simplify(module: Module, rounds: int = 4, applied: Counter[str] | None = None) -> Module:
    """Simplify all functions but kernels, callers first. `applied` counts the rules by name.

    What is known about an argument in every call of a function is known in the function.
    """
    applied = Counter() if applied is None else applied
    module = eliminate_dead(module)
    table = {function.name: function for function in module.functions}
    arguments: dict[str, dict[int, Fact | None]] = {}
    for name in callees_first(table, module.entry.name)[::-1]:
        if is_kernel(table[name]):
            continue
        known = arguments.get(name, {})
        params = table[name].params
        facts = {params[i].name: fact for i, fact in known.items() if fact is not None}
        table[name] = unsort(table[name])
        for _ in range(rounds):
            before = sum(applied.values())
            walk = _Walk(table[name], applied, facts)
            table[name] = walk.run()
            if sum(applied.values()) == before:
                break
        for op in table[name].ops:
            if op.name == "call":
                known = arguments.setdefault(str(op.attrs["callee"]), {})
                for i, value in enumerate(op.operands):
                    fact = walk.facts.get(value.name)
                    known[i] = fact if known.get(i, fact) == fact else None
    functions = tuple(table[function.name] for function in module.functions)
    return eliminate_dead(module.with_(functions=functions))


class _Walk:
    """One walk over a function; the `Scope` of the rules."""

    def __init__(
        self, function: Function, applied: Counter[str], facts: Mapping[str, Fact]
    ) -> None:
        self.function, self.applied = function, applied
        names = [value.name for value in function.params]
        names += [value.name for op in function.ops for value in op.results]
        self.namer = Namer(tuple(names))
        self.used: set[str] = set()
        self.ops: list[Op] = []
        self.facts: dict[str, Fact] = dict(facts)
        self.defs: dict[str, Op] = {}
        self.seen: dict[object, tuple[Value, ...]] = {}

    def run(self) -> Function:
        """The simplified function, without its dead ops."""
        env: dict[str, Value] = {}
        for op in self.function.ops:
            operands = tuple(env.get(value.name, value) for value in op.operands)
            results = self._visit(op if operands == op.operands else replace(op, operands=operands))
            for old, new in zip(op.results, results, strict=True):
                if old.name != new.name:
                    env[old.name] = new
        results = tuple(env.get(value.name, value) for value in self.function.results)
        function = replace(self.function, ops=tuple(self.ops), results=results)
        return without_dead_ops(function)

    def definition(self, value: Value) -> Op | None:
        return self.defs.get(value.name)

    def emit(
        self, like: Op, name: str, operands: Sequence[Value], type: TensorType, **attrs: Attr
    ) -> Value:
        return self._emit(
            like.results[0].name, Op(name, tuple(operands), (), attrs, loc=like.loc), type
        )

    def emit_like(self, op: Op) -> tuple[Value, ...]:
        return self._visit(op)

    def _emit(self, hint: str, op: Op, type: TensorType) -> Value:
        """A new op. It takes the name of the op that it replaces, the first time."""
        name = self.namer(hint) if hint in self.used else hint
        self.used.add(name)
        return self._visit(replace(op, results=(Value(name, type),)))[0]

    def _visit(self, op: Op) -> tuple[Value, ...]:
        """Simplify an op whose operands are simplified; returns what its results are."""
        fact = infer(op, self.facts)
        if fact is not None:
            folded = self._fold(op, fact)
            if folded is not None:
                self.applied["fold"] += 1
                return (folded,)
        for rule in _BY_OP[op.name]:
            found = rule.apply(op, self)
            if found is not None:
                self.applied[rule.name] += 1
                values = found if isinstance(found, tuple) else (found,)
                for old, new in zip(op.results, values, strict=True):
                    assert old.type == new.type, f"{rule.name}: {old.type} became {new.type}"
                return values
        key = sharing_key(op)
        if key is not None:
            if key in self.seen:
                self.applied["common-subexpression"] += 1
                return self.seen[key]
            self.seen[key] = op.results
        self.ops.append(op)
        self.defs.update((value.name, op) for value in op.results)
        if fact is not None:
            self.facts[op.results[0].name] = fact
        return op.results

    def _fold(self, op: Op, fact: Fact) -> Value | None:
        """A known result in its canonical form; None if it has none, or has it already."""
        type = op.results[0].type
        if isinstance(fact, Small):
            if op.name == "literal" or type.numel > _LITERAL:
                return None
            values = tuple(fact.data.reshape(-1).tolist())
            return self.emit(op, "literal", (), type, values=values)
        if not isinstance(fact, Affine):
            return None
        name, attrs, shape = _canonical(fact, type)
        if not name:
            return None
        if op.name == "constant":  # as it was written, not as the dtype rounds it
            attrs = dict(op.attrs)
        if shape == type.shape:
            same = op.name == name and (name == "constant" or dict(op.attrs) == attrs)
            return None if same else self.emit(op, name, (), type, **attrs)
        if op.name == "expand" and op.operands[0].type.shape == shape:
            return None
        core = self._emit(
            self.namer(name), Op(name, (), (), attrs, loc=op.loc), TensorType(type.dtype, shape)
        )
        return self.emit(op, "expand", [core], type)


def _canonical(fact: Affine, type: TensorType) -> tuple[str, dict[str, Attr], tuple[int, ...]]:
    """(op, attributes, shape) of the smallest op that gives a known tensor when expanded."""
    if fact.uniform:
        value: Attr = fact.offset
        if type.dtype == "bool":
            value = bool(value)
        elif type.dtype[0] in "iu":
            value = int(fact.offset)
        else:
            value = float(fact.offset)
        return "constant", {"value": value}, type.shape if type.numel == 1 else ()
    steps = [(d, f) for d, factors in enumerate(fact.dims) for f in factors if f[1]]
    if len(steps) != 1 or len(fact.dims[steps[0][0]]) != 1:
        return "", {}, ()
    dim, (size, step) = steps[0]
    shape = tuple(size if d == dim else 1 for d in range(len(fact.dims)))
    attrs: dict[str, Attr] = {"dim": dim}
    if fact.offset:
        attrs["start"] = int(fact.offset)
    if step != 1:
        attrs["step"] = step
    return "iota", attrs, shape


def sharing_key(op: Op) -> object:
    """Ops with equal keys have equal results; None for ops that must not be shared."""
    family = OPS[op.name].family
    if family in ("opaque", "collective") or op.name in ("call", "free", "wait"):
        return None
    return (
        op.name,
        tuple(value.name for value in op.operands),
        tuple(sorted((name, repr(value)) for name, value in op.attrs.items())),
        tuple(value.type for value in op.results),
    )
