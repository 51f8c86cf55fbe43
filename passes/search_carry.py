"""A placement of the short program as one of a stage: op by op, without another search.

A stage's ops are those of some units of the whole program, and each unit has one of the short
program that it costs what. So each op of a stage has its counterpart there: in the same place of
the unit, of the same name where no unit owns it, or reading the counterparts of its operands
(updates). The plan that is written down is then the one that was evaluated.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..ir.module import Function, Module, Op, Value
from ..ir.types import B, Mesh, Placement, TensorType
from .apply import Choices, FunctionChoices, apply_phased
from .micro import LOOP, TimeSplit
from .reshard import Placements
from .search_program import Program
from .search_units import Units
from .stages import StageModule


@dataclass(frozen=True)
class Source:
    """What is carried over.

    Attributes:
        program: the short program.
        of: for each unit of the whole program that of the short one.
        choices: of the short program.
        placed: the short program under them.
    """

    program: Program
    of: Sequence[int]
    choices: Choices
    placed: Module

    @staticmethod
    def make(program: Program, of: Sequence[int], choices: Choices, mesh: Mesh) -> Source:
        """Raises CompileError W0401 or W0402 where the choices are not those of the program."""
        return Source(program, of, choices, apply_phased(program.module, mesh, choices)[0])


def carried(
    piece: StageModule, split: TimeSplit, units: Units, source: Source, axes: int
) -> Choices | None:
    """The choices of a stage; None where an op has no counterpart.

    Args:
        split, units: what the stage was cut from.
        axes: of the mesh.
    """
    return _Carrier(piece, split, units, source, axes).run()


def _ordered(
    ops: Sequence[Op], phases: Sequence[str], unit_of: Mapping[str, int]
) -> Iterator[tuple[Op, tuple[int, str, int]]]:
    """Ops of units: (unit, phase, position). What is computed again in the backward pass has the
    place of the forward op."""
    count: dict[tuple[int, str], int] = {}
    calls: dict[tuple[int, str], tuple[int, str, int]] = {}
    for op, phase in zip(ops, phases, strict=True):
        unit = unit_of.get(op.results[0].name, -1)
        if unit < 0 or phase not in LOOP:
            continue
        called = (unit, str(op.attrs.get("callee", "")))
        if phase == "backward" and op.name == "call" and called in calls:
            yield op, calls[called]
            continue
        at = count[unit, phase] = count.get((unit, phase), -1) + 1
        place = unit, phase, at
        if phase == "forward":
            calls[called] = place
        yield op, place


class _Carrier:
    def __init__(
        self, piece: StageModule, split: TimeSplit, units: Units, source: Source, axes: int
    ) -> None:
        self.piece, self.source = piece, source
        self.whole: Placements = (B,) * axes
        self.theirs: Function = source.program.module.entry
        self.index = {op.results[0].name: i for i, op in enumerate(self.theirs.ops)}
        self.readers = self.theirs.uses()
        entry = split.module.entry
        names = [op.results[0].name for op in entry.ops]
        ours = dict(zip(names, units.stage_of, strict=True))
        self.places = {
            op.results[0].name: (source.of[unit], phase, at)
            for op, (unit, phase, at) in _ordered(entry.ops, split.phases, ours)
        }
        program = source.program
        rows = list(_ordered(self.theirs.ops, program.phases, program.unit_of))
        self.known = {place: op for op, place in rows}
        self.unit_of = {value.name: place[0] for op, place in rows for value in op.results}
        #: name of a value of the stage -> its counterpart; inputs are what they are called
        given = _inputs(self.theirs)
        self.values = {
            value.name: given[key][0]
            for key, values in _inputs(piece.module.entry).items() if key in given
            for value in values
        }  # fmt: skip
        self.chosen = source.choices.functions.get(self.theirs.name, FunctionChoices())
        #: as they are read: (value, reader's index) -> placement
        self.read: dict[tuple[str, int], Placements] = {}
        made = {op.results[0].name: op for op in source.placed.entry.ops}
        for number, op in enumerate(self.theirs.ops):
            own = made[op.results[0].name]
            for value, placed in zip(op.operands, own.operands, strict=True):
                self.read[value.name, number] = placed.type.placement or self.whole

    def run(self) -> Choices | None:
        """See `carried`."""
        entry, choices = self.piece.module.entry, self.source.choices
        pairs: list[int] = []
        for op in entry.ops:
            other = self._counterpart(op)
            if other is None:
                return None
            pairs.append(self.index[other.results[0].name])
            for mine, their in zip(
                (*op.operands, *op.results), (*other.operands, *other.results), strict=True
            ):
                self.values.setdefault(mine.name, their)
        splits = tuple(
            self.chosen.splits[i] if i < len(self.chosen.splits) else () for i in pairs
        )
        readers = {
            value.name: i for i, op in reversed(list(enumerate(entry.ops))) for value in op.operands
        }
        params = tuple(
            self._param(value, pairs[readers[value.name]] if value.name in readers else None)
            for value in entry.params
        )
        results = tuple(map(self._result, entry.results))
        functions = {**choices.functions, entry.name: FunctionChoices(splits, params, results)}
        known = {function.name for function in self.piece.module.functions}
        callees = {at: name for at, name in choices.callees.items() if at[0] != self.theirs.name}
        for i, j in enumerate(pairs):
            name = choices.callees.get((self.theirs.name, j))
            if name is not None:
                callees[entry.name, i] = name
        again = frozenset(
            (value.name, i) for i, op in enumerate(entry.ops) for value in op.operands
            if (self.values[value.name].name, pairs[i]) in choices.again
        )  # fmt: skip
        return Choices(
            functions, {n: o for n, o in choices.clones.items() if o in known}, callees, again,
            self.piece.phases, choices.repeated,
        )  # fmt: skip

    def _counterpart(self, op: Op) -> Op | None:
        place = self.places.get(op.results[0].name)
        if place is not None:
            found = self.known.get(place)
            return found if found is not None and _alike(op, found) else None
        index = self.index.get(op.results[0].name)
        if index is not None and _alike(op, self.theirs.ops[index]):
            return self.theirs.ops[index]
        return self._reading(op)

    def _reading(self, op: Op) -> Op | None:
        """The op that reads the counterparts of what an op reads, as far as they are known."""
        wanted = [self.values.get(value.name) for value in op.operands]
        for value in wanted:
            for reader in self.readers.get(value.name, ()) if value is not None else ():
                if _alike(op, reader) and all(
                    w is None or w.name == own.name
                    for w, own in zip(wanted, reader.operands, strict=True)
                ):
                    return reader
        return None

    def _param(self, value: Value, reader: int | None) -> Placements:
        """The counterpart's placement; of what is received, that in which it is read."""
        their = self.values.get(value.name)
        if their is None or reader is None:
            return self.whole
        for number, param in enumerate(self.theirs.params):
            if param.name == their.name:
                rows = self.chosen.params
                return rows[number] if number < len(rows) and rows[number] else self.whole
        return tuple(map(_whole_sum, self.read[their.name, reader]))

    def _result(self, value: Value) -> Placements:
        """Results are given as they are; what is sent, as the counterpart is read."""
        their = self.values.get(value.name)
        if their is None:
            return self.whole
        for number, result in enumerate(self.theirs.results):
            if result.name == their.name:
                rows = self.chosen.results
                return rows[number] if number < len(rows) and rows[number] else self.whole
        uses = self.readers.get(their.name, ())
        own = self.unit_of.get(their.name, -1)
        other = [op for op in uses if self.unit_of.get(op.results[0].name, -1) != own]
        if not uses:
            return self.whole
        reader = self.index[(other or uses)[0].results[0].name]
        return tuple(map(_whole_sum, self.read[their.name, reader]))


def _inputs(entry: Function) -> dict[tuple[str, str, TensorType], list[Value]]:
    """What each stage may have: by role, the user's name and type."""
    found: dict[tuple[str, str, TensorType], list[Value]] = {}
    for value, attrs in zip(entry.params, entry.param_attrs, strict=True):
        if attrs.get("role") in ("input", "seed", "lr"):
            key = str(attrs["role"]), str(attrs.get("name", value.name)), value.type
            found.setdefault(key, []).append(value)
    return found


def _alike(one: Op, two: Op) -> bool:
    """The same op on tensors of the same types?"""
    return (
        one.name == two.name
        and one.attrs.get("callee") == two.attrs.get("callee")
        and [v.type for v in one.operands] == [v.type for v in two.operands]
        and [v.type for v in one.results] == [v.type for v in two.results]
    )


def _whole_sum(entry: Placement) -> Placement:
    """What is sent or stored is no partial sum."""
    return B if entry.kind == "P" else entry


__all__ = ["Source", "carried"]
