"""Which stage each op of a program belongs to, and what has to hold of it."""

from __future__ import annotations

from collections.abc import Sequence

from ..ir.errors import CompileError
from ..ir.module import Function, Op, Value
from ..ir.types import B
from .inline import inline
from .micro import LOOP, TimeSplit, span_of

#: roles of entry parameters that each stage may have a copy of
_COPIED = frozenset({"input", "seed", "lr", "tangent"})


class Program:
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
