"""Writing choices down: a logical module becomes a placed one, with explicit reshards.

    %y = einsum(%x, %w) {...} : f32[8, 4]            logical
    %z = exp(%y) : f32[8, 4]

with the choice `k` for the einsum and `a0` for exp on the axis `tp` becomes

    %y = einsum(%x, %w) {...} split [tp = k] : f32[8, 4]{P(sum)}
    %y_1 = reshard(%y) : f32[8, 4]{S(0)}
    %z = exp(%y_1) split [tp = a0] : f32[8, 4]{S(0)}

A split fixes the placements of an op's operands and results (`Signature.placements`); calls take
those of the callee's parameters and results. Where an operand is held otherwise, a reshard stands
right before its first reader, and later readers with the same wish share it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..ir.errors import CompileError
from ..ir.module import NOWHERE, Attr, Function, Location, Module, Namer, Op, Value
from ..ir.opdef import OPS, signature_of
from ..ir.types import B, Mesh, illegal_placement
from .reshard import Placements


@dataclass(frozen=True)
class FunctionChoices:
    """Choices for one function. What is missing, or an empty tuple, means whole on every rank.

    Attributes:
        splits: for each op by its index, the state of each axis: an iteration dim, `partial(...)`,
            or '' where the axis is not used. Ops without a signature (calls, `aten`) have none.
        params: placement of each parameter.
        results: placement of each result. Ignored for the entry's `update` results, which take the
            placement of the parameter that they update.
    """

    splits: tuple[tuple[str, ...], ...] = ()
    params: tuple[Placements, ...] = ()
    results: tuple[Placements, ...] = ()


#: phases of the entry's ops that run once for each micro-batch
LOOP = frozenset({"forward", "backward"})
#: roles of the entry's parameters that each micro-batch has its own part of
BATCHED = frozenset({"input", "tangent"})


def batched(attrs: Mapping[str, Attr]) -> bool:
    """Has each micro-batch a value of its own of an entry's parameter with these attributes?"""
    return attrs.get("role") in BATCHED or attrs.get("phase") in LOOP


#: roles of the entry's results that are added up over the micro-batches, or made after them
ACCUMULATED = frozenset({"loss", "grad", "update"})

#: a reader of a value of the entry: the value's name and the op's index (~j for result j)
Again = tuple[str, int]


@dataclass(frozen=True)
class Choices:
    """All choices that make a logical module a placed one.

    Attributes:
        functions: function name -> its choices.
        clones: name of a copy of a function -> the function. Copies have choices of their own.
        callees: (caller, op index) -> the copy that is called there.
        again: readers in the entry that reshard for themselves what others need as well: a
            parameter that is gathered again in the backward pass.
        phases: of each op of the entry (`before`, `forward`, `backward`, `update`), where known.
        repeated: whether forward and backward ops run several times in a step. What runs once then
            shares no copies with them, unless they are kept for the step.
    """

    functions: Mapping[str, FunctionChoices] = field(default_factory=dict)
    clones: Mapping[str, str] = field(default_factory=dict)
    callees: Mapping[tuple[str, int], str] = field(default_factory=dict)
    again: frozenset[Again] = frozenset()
    phases: tuple[str, ...] | None = None
    repeated: bool = False


def apply(module: Module, mesh: Mesh, choices: Choices) -> Module:
    """The placed module that the choices describe.

    Raises CompileError W0401 for a split that an op does not allow, W0402 for a placement that a
    tensor cannot have.
    """
    return apply_phased(module, mesh, choices)[0]


def apply_phased(
    module: Module, mesh: Mesh, choices: Choices
) -> tuple[Module, tuple[str, ...] | None]:
    """The placed module, and the phases of its entry's ops if the choices have those."""
    copies: dict[str, list[Function]] = {}
    for name, original in choices.clones.items():
        copies.setdefault(original, []).append(module.function(original).with_(name=name))
    functions = [f for g in module.functions for f in (g, *copies.get(g.name, ()))]
    placed = {f.name: _Interface.of(f, mesh, choices) for f in functions}
    first = functions[0]
    appliers = [_Applier(f, mesh, choices, placed, entry=f is first) for f in functions]
    done = tuple(applier.run() for applier in appliers)
    phases = tuple(appliers[0].placed_phases) if choices.phases is not None else None
    return module.with_(level="placed", mesh=mesh, functions=done), phases


def _pick(table: Sequence[Placements], index: int, mesh: Mesh) -> Placements:
    chosen = table[index] if index < len(table) else ()
    return chosen or (B,) * len(mesh.axes)


def _place(value: Value, placement: Placements, mesh: Mesh, what: str) -> Value:
    reason = illegal_placement(value.type, mesh, placement)
    if reason:
        text = ", ".join(map(str, placement))
        raise CompileError(
            "W0402", f"{what} {value} : {value.type} cannot be placed {{{text}}}", reason=reason
        )
    return Value(value.name, value.type.placed(placement))


@dataclass(frozen=True)
class _Interface:
    """Placements of a function's parameters and results, which its call sites must match."""

    params: tuple[Placements, ...]
    results: tuple[Placements, ...]

    @staticmethod
    def of(function: Function, mesh: Mesh, choices: Choices) -> _Interface:
        chosen = choices.functions.get(function.name, FunctionChoices())
        params = tuple(_pick(chosen.params, i, mesh) for i in range(len(function.params)))
        by_name = {p.name: placement for p, placement in zip(function.params, params, strict=True)}
        results = []
        for index, attrs in enumerate(function.result_attrs):
            updated = attrs.get("updates")
            if updated is None:
                results.append(_pick(chosen.results, index, mesh))
            else:
                results.append(by_name[str(updated)])
        return _Interface(params, tuple(results))


class _Applier:
    """Rewrites one function."""

    def __init__(
        self,
        function: Function,
        mesh: Mesh,
        choices: Choices,
        interfaces: Mapping[str, _Interface],
        *,
        entry: bool,
    ) -> None:
        self.function, self.mesh, self.interfaces = function, mesh, interfaces
        self.callees = choices.callees
        self.again = choices.again if entry else frozenset()
        self.phases, self.repeated = choices.phases if entry else None, choices.repeated
        self.placed_phases: list[str] = []
        self.made = {v.name: i for i, op in enumerate(function.ops) for v in op.results}
        self.chosen = choices.functions.get(function.name, FunctionChoices())
        taken = [p.name for p in function.params]
        taken += [result.name for op in function.ops for result in op.results]
        self.namer = Namer(tuple(taken))
        self.values: dict[str, Value] = {}
        self.copies: dict[tuple[str, Placements, str, int | None], Value] = {}
        self.ops: list[Op] = []

    def run(self) -> Function:
        """The placed function."""
        function, interface = self.function, self.interfaces[self.function.name]
        params = tuple(
            _place(value, placement, self.mesh, f"parameter of @{function.name}")
            for value, placement in zip(function.params, interface.params, strict=True)
        )
        self.values.update((value.name, value) for value in params)
        for index, op in enumerate(function.ops):
            self._op(index, op)
        for value, placement in zip(function.results, interface.results, strict=True):
            _place(value, placement, self.mesh, f"result of @{function.name}")
        made_at = {value.name: op.loc for op in function.ops for value in op.results}
        results = tuple(
            self._read(value, placement, made_at.get(value.name, NOWHERE), ~j)
            for j, (value, placement) in enumerate(
                zip(function.results, interface.results, strict=True)
            )
        )
        return function.with_(params=params, ops=tuple(self.ops), results=results)

    def _op(self, index: int, op: Op) -> None:
        states, ins, outs = self._placements(index, op)
        operands = tuple(
            self._read(value, placement, op.loc, index)
            for value, placement in zip(op.operands, ins, strict=True)
        )
        results = tuple(
            Value(value.name, value.type.placed(placement))
            for value, placement in zip(op.results, outs, strict=True)
        )
        self.values.update((value.name, value) for value in results)
        split = {name: state for name, state in zip(self.mesh.names, states, strict=True) if state}
        callee = self.callees.get((self.function.name, index))
        attrs = op.attrs if callee is None else {**op.attrs, "callee": callee}
        self._append(
            op.with_(operands=operands, results=results, split=split, attrs=attrs),
            self.phases[index] if self.phases is not None else "",
        )

    def _append(self, op: Op, phase: str) -> None:
        self.ops.append(op)
        self.placed_phases.append(phase)

    def _placements(
        self, index: int, op: Op
    ) -> tuple[tuple[str, ...], Sequence[Placements], Sequence[Placements]]:
        """States, and placements of operands and results, of the op at an index."""
        axes = len(self.mesh.axes)
        nothing = ("",) * axes
        states = self.chosen.splits[index] if index < len(self.chosen.splits) else ()
        states = states or nothing
        if op.name == "call":
            name = self.callees.get((self.function.name, index), str(op.attrs["callee"]))
            callee = self.interfaces[name]
            return nothing, callee.params, callee.results
        if OPS[op.name].signature is None:
            if states != nothing:
                raise CompileError(
                    "W0401", f"{op.name} cannot be split", reason="it has no signature",
                    hint="leave its split empty: it runs on whole operands",
                )  # fmt: skip
            whole = (B,) * axes
            return nothing, [whole] * len(op.operands), [whole] * len(op.results)
        signature = signature_of(op)
        reason = (
            signature.check(states, self.mesh.sizes)
            if len(states) == axes
            else f"{len(states)} states for {axes} axes"
        )
        if reason:
            raise CompileError(
                "W0401", f"{op.name} cannot be split by [{', '.join(states)}]", reason=reason,
                hint=f"its states are {', '.join(signature.states) or 'none'}",
            )  # fmt: skip
        ins, outs = signature.placements(states)
        for value, placement in zip((*op.operands, *op.results), (*ins, *outs), strict=True):
            _place(value, placement, self.mesh, f"value of {op.name}")
        return states, ins, outs

    def _read(self, value: Value, placement: Placements, loc: Location, reader: int) -> Value:
        """The value under a placement, resharded where it is held otherwise.

        Args:
            reader: index of the op that reads it, ~j for result j.
        """
        held = self.values[value.name]
        if held.type.placement == placement:
            return held
        own = (value.name, reader) in self.again
        group, phase = self._phase(value, reader, own)
        key = (value.name, placement, group, reader if own else None)
        if key not in self.copies:
            copy = Value(self.namer(f"{value.name}_r"), held.type.placed(placement))
            self._append(Op("reshard", (held,), (copy,), loc=loc), phase)
            self.copies[key] = copy
        return self.copies[key]

    def _phase(self, value: Value, reader: int, own: bool) -> tuple[str, str]:
        """(which readers share a copy, the phase of its reshard)."""
        if self.phases is None:
            return "", ""
        made = self.made.get(value.name)
        if reader >= 0:
            phase = self.phases[reader]
            in_loop = phase in LOOP
        else:
            in_loop = self.function.result_attrs[~reader].get("role") not in ACCUMULATED
            there = "before" if made is None else self.phases[made]
            phase = there if in_loop else "update"
        if not self.repeated:
            return "", phase
        if not in_loop:
            return "late", phase
        if made is None:
            (own_attrs,) = (a for p, a in zip(
                self.function.params, self.function.param_attrs, strict=True)
                if p.name == value.name)  # fmt: skip
            constant = not batched(own_attrs)
        else:
            constant = self.phases[made] not in LOOP
        if constant and not own and phase in LOOP:
            return "loop", "before"
        return "loop", phase


__all__ = [
    "ACCUMULATED", "LOOP", "Again", "Choices", "FunctionChoices", "apply", "apply_phased", "batched",
]  # fmt: skip
