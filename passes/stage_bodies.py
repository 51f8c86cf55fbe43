"""A lowered stage as one flat function for each phase.

What lowering added to a stage (collectives, fix-ups) belongs to the phase of its first reader. What
is done once a step and needs values of other stages comes in levels: level 0 reads what the stage
has, level l + 1 what others sent at level l. So all stages can run level by level without waiting
in a circle.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from ..ir.module import Function, Module, Value
from ..ir.types import B, Mesh, Placement
from .coalesce import coalesced, limits_of
from .fuse import fuse
from .inline import inline
from .joined import updates_last
from .lower import module_cost
from .micro import LOOP, PHASES
from .reshard import StepCost
from .stages import StageModule

#: phases that are computed once a step
ONCE = tuple(phase for phase in PHASES if phase not in LOOP)


class When(NamedTuple):
    """A phase, by its number in `PHASES`, and a level of it (0 in the loop)."""

    phase: int
    level: int = 0

    @property
    def name(self) -> str:
        """The phase."""
        return PHASES[self.phase]


@dataclass(frozen=True)
class Part:
    """One stage (or virtual stage) for one size of micro-batch, ready to be repeated.

    Attributes:
        stage: the logical stage.
        entry: the lowered entry: parameters and results with their placements.
        bodies: a flat function for each phase and level; its parameters are values of the entry by
            name.
        outputs: the values of the entry that the results of each body are.
        held: the placement over time of each value.
    """

    stage: StageModule
    entry: Function
    bodies: Mapping[When, Function]
    outputs: Mapping[When, tuple[str, ...]]
    held: Mapping[str, Placement]
    mesh: Mesh


#: phase -> value -> level, of what is made or received once a step
Levels = Mapping[str, Mapping[str, int]]


def levels_of(stages: Sequence[StageModule]) -> list[Levels]:
    """The levels of each stage's values."""
    tables = {phase: _phase_levels(stages, phase) for phase in ONCE}
    return [
        {phase: tables[phase][number] for phase in ONCE} for number in range(len(stages))
    ]


def _phase_levels(stages: Sequence[StageModule], phase: str) -> list[dict[str, int]]:
    found: list[dict[str, int]] = [{} for _ in stages]
    changed = True
    while changed:
        changed = False
        for known, stage in zip(found, stages, strict=True):
            before = dict(known)
            for transfer in stage.receives:
                if transfer.phase == phase:
                    known[transfer.value] = found[transfer.source].get(transfer.value, 0) + 1
            for op, own in zip(stage.module.entry.ops, stage.phases, strict=True):
                if own == phase:
                    level = max((known.get(v.name, 0) for v in op.operands), default=0)
                    known.update((value.name, level) for value in op.results)
            changed |= known != before
    return found


def whens(
    spmd: Function, stage: StageModule, levels: Levels, meant: Mapping[str, int]
) -> list[When]:
    """The phase and level of each op of a lowered entry."""
    known = dict(meant) | {
        value.name: PHASES.index(phase)
        for op, phase in zip(stage.module.entry.ops, stage.phases, strict=True)
        for value in op.results
    }
    needed: dict[str, int] = {}

    def need(name: str, phase: int) -> None:
        needed[name] = min(phase, needed.get(name, phase))

    logical = stage.module.entry.results
    for value, attrs, meant_as in zip(spmd.results, spmd.result_attrs, logical, strict=True):
        last = 3
        if attrs["role"] == "sent":
            last = PHASES.index(str(attrs["phase"]))
        elif stage.held[meant_as.name].kind == "S":  # a part in each micro-batch
            last = known.get(meant_as.name, last)
        need(value.name, last)
    phases: list[int] = [0] * len(spmd.ops)
    for index in reversed(range(len(spmd.ops))):
        op = spmd.ops[index]
        names = [value.name for value in op.results]
        phases[index] = next((known[n] for n in names if n in known),
                             min((needed[n] for n in names if n in needed), default=3))  # fmt: skip
        for value in op.operands:
            need(value.name, phases[index])
    return _forwards(spmd, stage, levels, known, phases)


def _forwards(
    spmd: Function,
    stage: StageModule,
    levels: Levels,
    known: Mapping[str, int],
    phases: list[int],
) -> list[When]:
    """Ops that lowering added ahead of the loop where they can be; levels from operands."""
    in_loop = {
        value.name for value in stage.module.entry.params if stage.held[value.name].kind == "S"
    }
    in_loop |= {t.value for t in stage.receives if t.phase in LOOP}
    at = {phase: dict(levels[phase]) for phase in ONCE}
    out: list[When] = []
    for op, phase in zip(spmd.ops, phases, strict=True):
        names = [value.name for value in op.results]
        if PHASES[phase] in LOOP:
            if not any(n in known for n in names) and op.operands and not any(
                v.name in in_loop for v in op.operands
            ):
                phase = 0  # a parameter that is gathered for the loop: once
            else:
                in_loop.update(names)
        level = 0
        if PHASES[phase] not in LOOP:
            table = at[PHASES[phase]]
            level = max((table.get(v.name, 0) for v in op.operands), default=0)
            for name in names:
                table.setdefault(name, level)
        out.append(When(phase, level))
    return out


def make_parts(
    lowered: Sequence[tuple[StageModule, Module, Levels, Mapping[str, int]]],
    costs: Sequence[StepCost | None],
) -> tuple[list[Part], tuple[Function, ...]]:
    """The bodies of stages that share a device group, and the kernel functions that they call.

    Args:
        lowered: (stage, spmd module, levels of its values, numbers of the phases that the search meant
            for reshards), for each part and size of micro-batch.
        costs: of each the times of its collectives, which say how many small ones are joined; None
            for those of the module's cluster.
    """
    functions: list[Function] = []
    pieces: list[dict[When, str]] = []
    held: list[dict[str, Placement]] = []
    for number, (stage, spmd, levels, meant) in enumerate(lowered):
        when = whens(spmd.entry, stage, levels, meant)
        held.append(_held(spmd.entry, stage, when))
        names: dict[When, str] = {}
        for piece in sorted(set(when)):
            names[piece] = f"p{number}.{piece.name}{piece.level}"
            functions.append(_piece(spmd.entry, when, piece, names[piece]))
        pieces.append(names)
        functions += spmd.functions[1:]
        suffix = f".p{number}"
        start = len(functions) - len(spmd.functions[1:]) - len(names)
        functions[start:] = [_suffixed(f, suffix, names.values()) for f in functions[start:]]
    module = fuse(replace(lowered[0][1], functions=tuple(functions)))
    kernels: dict[str, Function] = {}
    parts = []
    table = {function.name: function for function in module.functions}
    for number, ((stage, spmd, _, _), cost) in enumerate(zip(lowered, costs, strict=True)):
        bodies, outputs = {}, {}
        mesh = spmd.mesh or Mesh()
        limits = limits_of(mesh, cost or module_cost(spmd))
        for piece, name in pieces[number].items():
            rest = (f for f in module.functions if f.name != name)
            flat = inline(module.with_(functions=(table[name], *rest)))
            apart = flat.entry.with_(ops=updates_last(flat))
            bodies[piece] = coalesced(apart, mesh, limits)
            outputs[piece] = tuple(value.name for value in table[name].results)
            kernels.update((f.name, f) for f in flat.functions[1:])
        parts.append(Part(stage, spmd.entry, bodies, outputs, held[number], mesh))
    return parts, tuple(kernels.values())


def _suffixed(function: Function, suffix: str, own: Iterable[str]) -> Function:
    """A function under a name of its own, with the calls of the others of its stage."""
    ops = tuple(
        op.with_(attrs={**op.attrs, "callee": f"{op.attrs['callee']}{suffix}"})
        if op.name == "call" else op
        for op in function.ops
    )  # fmt: skip
    name = function.name if function.name in own else function.name + suffix
    return function.with_(name=name, ops=ops)


def _held(
    entry: Function, stage: StageModule, when: Sequence[When]
) -> dict[str, Placement]:
    """Placements over time, of what lowering added as well."""
    held = dict(stage.held)
    for op, at in zip(entry.ops, when, strict=True):
        first = held.get(op.operands[0].name, B) if op.operands and at.name in LOOP else B
        for value in op.results:
            held.setdefault(value.name, first)
    return held


def _piece(entry: Function, when: Sequence[When], piece: When, name: str) -> Function:
    """The ops of one phase and level as a function of the values that others make."""
    ops = tuple(op for op, at in zip(entry.ops, when, strict=True) if at == piece)
    others = [op for op, at in zip(entry.ops, when, strict=True) if at != piece]
    made = {value.name for op in ops for value in op.results}
    read = dict.fromkeys(v for op in ops for v in op.operands if v.name not in made)
    wanted = {v.name for op in others for v in op.operands} | {v.name for v in entry.results}
    results: dict[str, Value] = {
        v.name: v for op in ops for v in op.results if v.name in wanted
    }
    return Function(name, tuple(read), ops, tuple(results.values()))


__all__ = ["ONCE", "Levels", "Part", "When", "levels_of", "make_parts", "whens"]

