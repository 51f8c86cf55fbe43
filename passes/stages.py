"""Pipeline stages: a program whose micro-batches are computed is cut over groups of devices.

A stage is a set of ops that is convex in each phase: no path leaves it and comes back. It need not
be a piece of a line: encoder and decoder, two towers, layers with connections over several stages
are cut by the same rule. Each stage becomes an ordinary logical module for one micro-batch, with
what it receives as further parameters and what it sends as further results:

* activations go from a forward op to its readers, gradients of them come back, each micro-batch;
* a parameter lives where it is updated; another stage that reads it (tied embeddings) receives it
  once a step, and sends its part of the gradient once, when all micro-batches are added up;
* norms of gradients and the like are sent once a step, among the updates;
* what inputs, seeds and learning rates alone decide is computed on each stage that reads it, and
  a parameter that is never updated lives on each stage that reads it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..ir.errors import CompileError
from ..ir.module import Attr, Function, Module, Op, Value
from ..ir.types import Placement
from .inline import callees_first
from .micro import TimeSplit
from .micro_shapes import sized
from .stage_program import Program


@dataclass(frozen=True)
class Transfer:
    """A value that one stage sends to another.

    Attributes:
        value: its name, the same in both stages' modules.
        phase: when it is made: `forward` and `backward` in each micro-batch, `before` and `update`
            once a step (a sum over the micro-batches is sent in `update`, when it is complete).
    """

    value: str
    phase: str
    source: int
    target: int


@dataclass(frozen=True)
class StageModule:
    """One stage of a pipeline.

    Attributes:
        stage: its number.
        module: logical, for the first micro-batch. Parameters that it receives have the role
            `received`, results that it sends the role `sent`, both with `name` and `phase`.
        phases: the phase of each op of the entry.
        held: the placement over time of each value of the entry.
        receives, sends: what it exchanges with other stages, in the order of the program.
    """

    stage: int
    module: Module
    phases: tuple[str, ...]
    held: Mapping[str, Placement]
    receives: tuple[Transfer, ...]
    sends: tuple[Transfer, ...]


def cut(split: TimeSplit, stage_of: Sequence[int], micro: int = 0) -> tuple[StageModule, ...]:
    """Cut a program into stages.

    Args:
        split: the program over time.
        stage_of: the stage of each op of `split.module.entry`, from 0 on without a gap; -1 lets an
            op follow: backward ops go where their operands are, updates where their parameter
            lives, the rest to its first reader.
        micro: the micro-batch whose size the modules get; names and ops are the same for all.

    Raises CompileError W0404 for an assignment that is not convex, or leaves a stage without ops.
    """
    if len(stage_of) != len(split.phases):
        raise CompileError(
            "W0404", f"{len(stage_of)} stages are given for {len(split.phases)} ops of the program"
        )
    program = Program(split, stage_of)
    program.check()
    stages = [_Stage(program, number, split.sizes[micro]) for number in range(program.count)]
    received = [stage.received() for stage in stages]
    return tuple(stage.build(received) for stage in stages)


class _Stage:
    """Builds the module of one stage."""

    def __init__(self, program: Program, number: int, rows: int) -> None:
        self.program, self.number, self.rows = program, number, rows
        self.ops = self._ops()
        self.made = {value.name for op in self.ops for value in op.results}

    def _ops(self) -> list[Op]:
        """Ops of the stage, and copies of what it needs for itself."""
        program, entry = self.program, self.program.entry
        wanted = {
            op.results[0].name for op in entry.ops
            if program.stage.get(op.results[0].name) == self.number
        }  # fmt: skip
        needed = {value.name for op in entry.ops if op.results[0].name in wanted for value in op.operands}
        if self.number == 0:  # what no stage needs more than another
            needed.update(v.name for v in entry.results if program.home(v.name) is None)
        new = {
            str(attrs["updates"]): value.name
            for value, attrs in zip(entry.results, entry.result_attrs, strict=True)
            if "updates" in attrs
        }
        while True:
            before = len(needed)
            for op in reversed(entry.ops):
                name = op.results[0].name
                if name in program.copied and any(v.name in needed for v in op.results):
                    wanted.add(name)
                    needed.update(value.name for value in op.operands)
            # a copy of a state is updated on each stage that has it
            needed.update(new[n] for n in list(needed) if n in new and new[n] in program.copied)
            if len(needed) == before:
                break
        return [op for op in entry.ops if op.results[0].name in wanted]

    def build(self, all_received: Sequence[Sequence[tuple[str, int]]]) -> StageModule:
        """The stage; `all_received` is what `received` gives for all stages."""
        program, split = self.program, self.program.split
        received, sent = all_received[self.number], self._sent(all_received)
        params, param_attrs = self._params(received)
        results, result_attrs = self._results(sent)
        function = Function(
            program.entry.name, tuple(params), tuple(self.ops), tuple(results), tuple(param_attrs),
            tuple(result_attrs), program.entry.attrs,
        )  # fmt: skip
        states = [program.states.get(op.results[0].name, "") for op in self.ops]
        functions = [sized(function, program.held, states, self.rows, split.batch)]
        table = {f.name: f for f in (function, *program.module.functions[1:])}
        for name in callees_first(table, function.name)[::-1]:
            if name != function.name:
                functions.append(
                    sized(table[name], split.held[name], split.states[name], self.rows, split.batch)
                )
        module = program.module.with_(functions=tuple(functions))
        names = [v.name for v in function.params] + [v.name for op in self.ops for v in op.results]
        return StageModule(
            self.number,
            module,
            tuple(program.phase_of(op) for op in self.ops),
            {name: program.held[name] for name in names},
            tuple(Transfer(v, program.transfer_phase(v), s, self.number) for v, s in received),
            tuple(Transfer(v, program.transfer_phase(v), self.number, t) for v, t in sent),
        )

    def received(self) -> list[tuple[str, int]]:
        """(value, stage it comes from), in the order in which values are made."""
        names = dict.fromkeys(value.name for op in self.ops for value in op.operands)
        found = []
        for name in names:
            home = self.program.home(name)
            if name not in self.made and home is not None and home != self.number:
                found.append((name, home))
        return self._in_order(found)

    def _sent(self, received: Sequence[Sequence[tuple[str, int]]]) -> list[tuple[str, int]]:
        """(value, stage it goes to), in the order in which values are made."""
        found = [
            (name, stage)
            for stage, values in enumerate(received)
            for name, home in values
            if home == self.number
        ]
        return self._in_order(found)

    def _in_order(self, pairs: Iterable[tuple[str, int]]) -> list[tuple[str, int]]:
        place = {v.name: i for i, v in enumerate(self.program.entry.params)}
        for op in self.program.entry.ops:
            for value in op.results:
                place[value.name] = len(place)
        return sorted(pairs, key=lambda pair: (place[pair[0]], pair[1]))

    def _params(
        self, received: Sequence[tuple[str, int]]
    ) -> tuple[list[Value], list[Mapping[str, Attr]]]:
        program, entry = self.program, self.program.entry
        read = {value.name for op in self.ops for value in op.operands}
        returned = {str(a.get("updates", "")) for v, a in zip(
            entry.results, entry.result_attrs, strict=True) if self._gives(v.name)}  # fmt: skip
        anywhere = {value.name for op in entry.ops for value in op.operands}
        params: list[Value] = []
        attrs: list[Mapping[str, Attr]] = []
        values = {v.name: v for v in entry.params}
        for value, record in zip(entry.params, entry.param_attrs, strict=True):
            mine = program.owner.get(value.name, self.number) == self.number
            idle = value.name not in anywhere and value.name not in program.owner and self.number == 0
            if mine and (value.name in read or value.name in returned or idle):
                params.append(value)
                attrs.append(record)
        values.update((v.name, v) for op in entry.ops for v in op.results)
        for name, source in received:
            params.append(values[name])
            phase = program.transfer_phase(name)
            attrs.append({"role": "received", "name": name, "source": source, "phase": phase})
        return params, attrs

    def _gives(self, name: str) -> bool:
        """Is an entry result given by this stage?"""
        home = self.program.home(name)
        return home == self.number if home is not None else name in self.made or self.number == 0

    def _results(
        self, sent: Sequence[tuple[str, int]]
    ) -> tuple[list[Value], list[Mapping[str, Attr]]]:
        program, entry = self.program, self.program.entry
        results: list[Value] = []
        attrs: list[Mapping[str, Attr]] = []
        for index, (value, record) in enumerate(
            zip(entry.results, entry.result_attrs, strict=True)
        ):
            home = program.home(value.name)
            if home is None and "updates" not in record:
                mine = self.number == 0  # copies: one stage gives it
            else:
                mine = self._gives(value.name)
            if mine:
                results.append(value)
                attrs.append(record if "updates" in record else {**record, "number": index})
        values = {v.name: v for v in entry.params}
        values.update((v.name, v) for op in entry.ops for v in op.results)
        for name, target in sent:
            results.append(values[name])
            phase = program.transfer_phase(name)
            attrs.append({"role": "sent", "name": name, "to": target, "phase": phase})
        return results, attrs


__all__ = ["StageModule", "Transfer", "cut"]

