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
from ..ir.types import B, Placement
from .inline import callees_first, inline
from .micro import LOOP, TimeSplit, span_of
from .micro_shapes import sized

#: roles of entry parameters that each stage may have a copy of
_COPIED = frozenset({"input", "seed", "lr", "tangent"})
#: roles of what a step keeps
_KEPT = frozenset({"param", "buffer", "state"})


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
    program = _Program(split, stage_of)
    program.check()
    stages = [_Stage(program, number, split.sizes[micro]) for number in range(program.count)]
    received = [stage.received() for stage in stages]
    return tuple(stage.build(received) for stage in stages)


class _Program:
    """The program with a stage for each op of its entry."""

    def __init__(self, split: TimeSplit, stage_of: Sequence[int]) -> None:
        self.split = split
        self.held = dict(split.held[split.module.entry.name])
        entry = split.module.entry
        self.count = max((stage for stage in stage_of), default=0) + 1
        self.states = {op.results[0].name: s for op, s in zip(
            entry.ops, split.states[entry.name], strict=True)}  # fmt: skip
        self.phase = {op.results[0].name: p for op, p in zip(entry.ops, split.phases, strict=True)}
        self.given = {op.results[0].name: s for op, s in zip(entry.ops, stage_of, strict=True)}
        self.module = split.module
        self._assign()
        while straddling := self._straddling():
            self.module = inline(self.module, keep=lambda f: f.name not in straddling)
            self._assign()

    @property
    def entry(self) -> Function:
        """The entry, with calls inlined that would belong to several stages."""
        return self.module.entry

    # -- assignment -----------------------------------------------------------------------------

    def _assign(self) -> None:
        """Give each op a phase and a stage."""
        entry = self.entry
        self.makers, self.readers = entry.defs(), entry.uses()
        for op in entry.ops:
            for value in op.results:
                self.held.setdefault(value.name, B)
        self.copied = self._copied()
        self.stage: dict[str, int] = {}  # by the first result of an op
        self.owner: dict[str, int] = {}
        self.seen: dict[str, set[int]] = {}
        forward = [op for op in entry.ops if self._phase(op) == "forward"]
        for op in reversed(forward):
            self._place_forward(op)
        self._own(forward)
        for op in entry.ops:
            if self._phase(op) == "backward" and not self._is_copied(op):
                self._place(op, self._backward_stage(op))
        self._late_sums()
        for op in entry.ops:
            if self._phase(op) in ("before", "update") and not self._is_copied(op):
                self._place(op, self._owned_or_near(op))

    def _phase(self, op: Op) -> str:
        return self.phase.get(op.results[0].name, "update")

    def _is_copied(self, op: Op) -> bool:
        return op.results[0].name in self.copied

    def _place(self, op: Op, otherwise: int) -> None:
        given = self.given.get(op.results[0].name, -1)
        self.stage[op.results[0].name] = otherwise if given < 0 else given

    def _place_forward(self, op: Op) -> None:
        """Forward ops that are left open go to the first stage that reads them."""
        if self._is_copied(op):
            return
        readers = [
            self.stage[reader.results[0].name]
            for value in op.results
            for reader in self.readers.get(value.name, ())
            if reader.results[0].name in self.stage
        ]
        self._place(op, min(readers, default=self.count - 1))

    def _own(self, forward: Sequence[Op]) -> None:
        """Each updated parameter lives where the forward reads it first."""
        updated = self._updated()
        for op in forward:
            for value in self._through(op):
                if value in updated and not self._is_copied(op):
                    self.owner.setdefault(value, self.stage[op.results[0].name])

    def _through(self, op: Op) -> set[str]:
        """Entry parameters that an op reads, directly or through ops ahead of the loop."""
        found: set[str] = set()
        pending = [value.name for value in op.operands]
        while pending:
            name = pending.pop()
            maker = self.makers.get(name)
            if maker is None:
                found.add(name)
            elif self._phase(maker) == "before":
                pending += [value.name for value in maker.operands]
        return found

    def _updated(self) -> set[str]:
        """Names of the parameters that a step replaces, but for copies that each stage updates."""
        return {
            str(attrs["updates"])
            for value, attrs in zip(self.entry.results, self.entry.result_attrs, strict=True)
            if "updates" in attrs and value.name not in self.copied
        }

    def _backward_stage(self, op: Op) -> int:
        """Where the gradients are that a backward op reads, or the last stage before it that has
        all that the forward pass left for it."""
        latest, here = self.count - 1, set(range(self.count))
        for value in op.operands:
            maker = self.makers.get(value.name)
            if maker is not None and self._is_copied(maker):
                continue
            if maker is not None and self._phase(maker) == "backward":
                latest = min(latest, self.stage[maker.results[0].name])
            elif maker is not None or value.name in self.owner:
                here &= self._seen(value)
        return max((stage for stage in here if stage <= latest), default=min(latest, self._near(op)))

    def _seen(self, value: Value) -> set[int]:
        """The stages that have a value in the forward pass: made, kept or received there."""
        if value.name not in self.seen:
            maker = self.makers.get(value.name)
            found = {self.owner[value.name]} if value.name in self.owner else set()
            makers = [] if maker is None else [maker]
            for op in (*makers, *self.readers.get(value.name, ())):
                if self._phase(op) == "forward" and op.results[0].name in self.stage:
                    found.add(self.stage[op.results[0].name])
            self.seen[value.name] = found or set(range(self.count))
        return self.seen[value.name]

    def _near(self, op: Op) -> int:
        """The first of the stages where the operands are."""
        found = [
            self.stage[maker.results[0].name]
            for value in op.operands
            if (maker := self.makers.get(value.name)) is not None
            and maker.results[0].name in self.stage
        ]
        found += [self.owner[value.name] for value in op.operands if value.name in self.owner]
        return min(found, default=0)

    def _owned_or_near(self, op: Op) -> int:
        owned = [self.owner[v.name] for v in op.operands if v.name in self.owner]
        stage = owned[0] if owned else self._near(op)
        for value in op.operands:  # optimizer states live where their parameter does
            if value.name not in self.makers and value.name in self._updated():
                self.owner.setdefault(value.name, stage)
        return stage

    def _copied(self) -> set[str]:
        """Values that each stage may compute for itself: inputs and the like alone decide them."""
        entry = self.entry
        kept = {
            value.name for value, attrs in zip(entry.params, entry.param_attrs, strict=True)
            if attrs.get("role") in ("buffer", "state")
        }  # fmt: skip
        base = {
            value.name for value, attrs in zip(entry.params, entry.param_attrs, strict=True)
            if attrs.get("role") in _COPIED
        }  # fmt: skip
        new = {
            str(attrs["updates"]): value.name
            for value, attrs in zip(entry.results, entry.result_attrs, strict=True)
            if "updates" in attrs
        }
        while True:
            found = base | kept
            for op in entry.ops:
                if all(value.name in found for value in op.operands):
                    found.update(value.name for value in op.results)
            wrong = {name for name in kept if name in new and new[name] not in found}
            if not wrong:
                return found
            kept -= wrong

    def _late_sums(self) -> None:
        """Sums over the batch whose terms are made on several stages are taken in the update."""
        late: set[str] = set()
        for op in self.entry.ops:
            if self._phase(op) not in LOOP or self._is_copied(op):
                continue
            here = self.stage[op.results[0].name]
            for value in op.operands:
                maker = self.makers.get(value.name)
                if maker is None or self.held[value.name].kind != "P":
                    continue
                if value.name in late or self.stage.get(maker.results[0].name, here) != here:
                    late.update(v.name for v in op.results)
        for op in self.entry.ops:
            if op.results[0].name in late:
                self.phase[op.results[0].name] = "update"
                self.given[op.results[0].name] = -1
                del self.stage[op.results[0].name]
                for value in op.results:
                    self.held[value.name] = B
                self.states[op.results[0].name] = ""

    def _straddling(self) -> set[str]:
        """Functions called outside of the loop on values of several stages."""
        found = set()
        for op in self.entry.ops:
            if op.name != "call" or self._phase(op) in LOOP or self._is_copied(op):
                continue
            homes = {self.owner[v.name] for v in op.operands if v.name in self.owner}
            for value in op.operands:
                maker = self.makers.get(value.name)
                if maker is not None and maker.results[0].name in self.stage:
                    homes.add(self.stage[maker.results[0].name])
            if len(homes) > 1:
                found.add(str(op.attrs["callee"]))
        return found

    # -- checks ---------------------------------------------------------------------------------

    def check(self) -> None:
        """Raises CompileError W0404 where stages are empty or not convex."""
        used = {self.stage[op.results[0].name] for op in self.entry.ops
                if self._phase(op) in LOOP and not self._is_copied(op)}  # fmt: skip
        empty = [stage for stage in range(self.count) if stage not in used]
        if empty:
            raise CompileError(
                "W0404", f"stage {empty[0]} of {self.count} has nothing to compute",
                reason="the program has fewer parts than stages", hint="ask for fewer stages",
            )  # fmt: skip
        for op in self.entry.ops:
            phase = self._phase(op)
            if phase not in LOOP or self._is_copied(op):
                continue
            here = self.stage[op.results[0].name]
            for value in op.operands:
                maker = self.makers.get(value.name)
                if maker is None or self._is_copied(maker) or self._phase(maker) != phase:
                    continue
                there = self.stage[maker.results[0].name]
                if (there > here) if phase == "forward" else (there < here):
                    raise CompileError(
                        "W0404", f"the stages are not convex: {op.name} of stage {here} reads "
                        f"{value} of stage {there} in the {phase} pass",
                        span=span_of(op.loc),
                        reason="a stage would have to wait for one that waits for it",
                        hint="give an op the same stage as what it reads, or a later one",
                    )  # fmt: skip

    # -- what a stage has -----------------------------------------------------------------------

    def home(self, name: str) -> int | None:
        """The stage where a value is; None where each stage has it."""
        maker = self.makers.get(name)
        if maker is None:
            return self.owner.get(name)
        return None if self._is_copied(maker) else self.stage[maker.results[0].name]

    def transfer_phase(self, name: str) -> str:
        """When a value is sent."""
        maker = self.makers.get(name)
        if maker is None:
            return "before"
        return "update" if self.held[name].kind == "P" else self._phase(maker)

    def phase_of(self, op: Op) -> str:
        """The phase of an op of the entry."""
        return self._phase(op)


class _Stage:
    """Builds the module of one stage."""

    def __init__(self, program: _Program, number: int, rows: int) -> None:
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

