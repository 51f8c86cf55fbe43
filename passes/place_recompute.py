"""Recompute: blocks whose saved values are computed again before the backward pass reads them.

    %y, %s, %t = call(%x, %w) {callee = "f"}                     forward pass
    %dx, %dw = call(%x, %w, %s, %t, %dy) {callee = "g"}          backward pass

becomes, where all of f is computed again (`full`),

    %y = call(%x, %w) {callee = "f_lean"}
    %s, %t = call(%x, %w) {callee = "f_again"}
    %dx, %dw = call(%x, %w, %s, %t, %dy) {callee = "g"}

(Chen et al., Training deep nets with sublinear memory cost, 2016). `selective` keeps the results of
contractions, which cost much to compute again, and computes the rest again (Korthikanti et al.,
Reducing activation recomputation in large transformer models, 2022): f_again then takes what is
kept as well. Functions are pruned to what they return. Results are equal to the bit: ops have no
state, and random numbers depend on seed and position.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..ir.module import Function, Module, Namer, Op, Value
from ..ir.opdef import OPS

MODES = ("none", "selective", "full")


@dataclass(frozen=True)
class Block:
    """A call of the entry, and the one call that reads values which it saves.

    Attributes:
        forward, backward: indices of the two ops in the entry.
        saved: numbers of the results that nothing else reads.
    """

    forward: int
    backward: int
    saved: tuple[int, ...]


def blocks(module: Module) -> tuple[Block, ...]:
    """The blocks that can be computed again, in the order of the entry."""
    entry = module.entry
    readers: dict[str, set[int]] = {}
    for index, op in enumerate(entry.ops):
        for value in op.operands:
            readers.setdefault(value.name, set()).add(index)
    for value in entry.results:
        readers.setdefault(value.name, set()).add(-1)
    found = []
    for index, op in enumerate(entry.ops):
        if op.name != "call":
            continue
        saved: dict[int, list[int]] = {}
        for j, value in enumerate(op.results):
            only = readers.get(value.name, set())
            if len(only) == 1 and (reader := min(only)) >= 0 and entry.ops[reader].name == "call":
                saved.setdefault(reader, []).append(j)
        if not saved:
            continue
        reader, numbers = max(saved.items(), key=lambda item: len(item[1]))
        others = {v.name for j, v in enumerate(op.results) if j not in numbers}
        if _leads_to(entry.ops[index + 1 : reader + 1], others):
            found.append(Block(index, reader, tuple(numbers)))
    late = {block.backward for block in found}  # what an update reads of a backward pass stays
    return tuple(block for block in found if block.forward not in late)


def _leads_to(ops: Sequence[Op], names: set[str]) -> bool:
    """Does the last op depend on one of these values, directly or not?

    So a backward pass depends on its forward's output: what is saved waits for it.
    """
    reached = set(names)
    for op in ops[:-1]:
        if any(value.name in reached for value in op.operands):
            reached.update(value.name for value in op.results)
    return any(value.name in reached for value in ops[-1].operands)


def recompute(
    module: Module, modes: Mapping[int, str], phases: Sequence[str] | None = None
) -> tuple[Module, tuple[str, ...] | None]:
    """The module with some blocks computed again, and the phases of its entry's ops.

    Args:
        modes: index of a block's forward op -> `none`, `selective` or `full`.
        phases: of each op of the entry; what is computed again belongs to the reader's.

    Raises KeyError for a mode that there is not.
    """
    return _Recompute(module, modes, phases).run()


@dataclass(frozen=True)
class _Parts:
    """A function in two: what the forward pass runs, and what is run again."""

    lean: Function
    again: Function
    results: tuple[int, ...]  #: of the original that the lean function still returns
    kept: tuple[Value, ...]  #: further results of the lean function, that the other takes
    passed: tuple[int, ...]  #: results of the original that the other takes as well
    made: tuple[int, ...]  #: results of the original that the other returns


class _Recompute:
    def __init__(
        self, module: Module, modes: Mapping[int, str], phases: Sequence[str] | None
    ) -> None:
        self.module, self.phases = module, phases
        self.chosen = {
            block.forward: block for block in blocks(module)
            if MODES.index(modes.get(block.forward, "none"))
        }  # fmt: skip
        self.modes = modes
        self.names = Namer(tuple(function.name for function in module.functions))
        entry = module.entry
        taken = [value.name for value in entry.params]
        taken += [value.name for op in entry.ops for value in op.results]
        self.values = Namer(tuple(taken))
        self.parts: dict[tuple[str, str, tuple[int, ...]], _Parts] = {}

    def run(self) -> tuple[Module, tuple[str, ...] | None]:
        """The module and the phases."""
        ops: list[Op] = []
        phases: list[str] = []
        waiting: dict[int, list[Op]] = {}
        for index, op in enumerate(self.module.entry.ops):
            phase = self.phases[index] if self.phases is not None else ""
            again = waiting.pop(index, [])
            ops += again
            phases += [phase] * (len(again) + 1)
            if index in self.chosen:
                op, seconds = self._split(op, self.chosen[index])
                waiting.setdefault(self.chosen[index].backward, []).extend(seconds)
            ops.append(op)
        used = {str(op.attrs["callee"]) for op in ops if op.name == "call"}
        new = [f for parts in self.parts.values() if parts.made for f in (parts.lean, parts.again)]
        inner = {
            str(op.attrs["callee"])
            for f in (*self.module.functions[1:], *new) for op in f.ops if op.name == "call"
        }  # fmt: skip
        rest = [f for f in (*self.module.functions[1:], *new) if f.name in used | inner]
        entry = self.module.entry.with_(ops=tuple(ops))
        done = self.module.with_(functions=(entry, *rest))
        return done, tuple(phases) if self.phases is not None else None

    def _split(self, call: Op, block: Block) -> tuple[Op, tuple[Op, ...]]:
        """The call in the forward pass, and the one ahead of the backward if there is any."""
        callee = str(call.attrs["callee"])
        mode = self.modes[block.forward]
        key = (callee, mode, block.saved)
        if key not in self.parts:
            self.parts[key] = self._cut(self.module.function(callee), mode, block.saved)
        parts = self.parts[key]
        if not parts.made:
            return call, ()
        kept = tuple(Value(self.values(f"{value.name}_kept"), value.type) for value in parts.kept)
        first = call.with_(
            results=(*(call.results[j] for j in parts.results), *kept),
            attrs={**call.attrs, "callee": parts.lean.name},
        )
        second = call.with_(
            operands=(*call.operands, *(call.results[j] for j in parts.passed), *kept),
            results=tuple(call.results[j] for j in parts.made),
            attrs={**call.attrs, "callee": parts.again.name},
        )
        return first, (second,)

    def _cut(self, function: Function, mode: str, saved: tuple[int, ...]) -> _Parts:
        """What `_Parts` says. Saved contractions stay results of the forward function."""
        made = function.defs()

        def stays(name: str) -> bool:
            return mode == "selective" and name in made and OPS[made[name].name].family in _COSTLY

        names = [value.name for value in function.results]
        given = {value.name for value in function.params}
        results = tuple(
            j for j, name in enumerate(names)
            if j not in saved or stays(name) or name in given
        )  # fmt: skip
        returned = {names[j] for j in saved if j in results}
        wanted = {names[j] for j in saved if j not in results}
        needed, ops = set(wanted), list[Op]()
        stopped: dict[str, Value] = {}
        for op in reversed(function.ops):
            if not any(value.name in needed for value in op.results):
                continue
            for value in op.results:
                if value.name in needed and stays(value.name):
                    stopped[value.name] = value
            if all(value.name in stopped for value in op.results if value.name in needed):
                continue
            ops.append(op)
            needed.update(value.name for value in op.operands)
        kept = tuple(value for name, value in stopped.items() if name not in returned)
        lean_results = (*(function.results[j] for j in results), *kept)
        lean = _pruned(function, self.names(f"{function.name}_lean"), function.params, lean_results)
        passed = {names[j]: j for j in saved if j in results and names[j] not in given}
        numbers = tuple(passed.values())
        made_again = tuple(j for j in saved if j not in results)
        again = Function(
            self.names(f"{function.name}_again"),
            (*function.params, *(function.results[j] for j in numbers), *kept),
            tuple(reversed(ops)), tuple(function.results[j] for j in made_again),
            attrs=function.attrs,
        )  # fmt: skip
        return _Parts(lean, again, results, kept, numbers, made_again)


#: families of ops whose results `selective` keeps
_COSTLY = frozenset({"contraction"})


def _pruned(
    function: Function, name: str, params: tuple[Value, ...], results: tuple[Value, ...]
) -> Function:
    """A copy that returns something else, without the ops that it does not need."""
    needed, ops = {value.name for value in results}, []
    for op in reversed(function.ops):
        if any(value.name in needed for value in op.results):
            ops.append(op)
            needed.update(value.name for value in op.operands)
    return Function(name, params, tuple(reversed(ops)), results, attrs=function.attrs)


__all__ = ["MODES", "Block", "blocks", "recompute"]
