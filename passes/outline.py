"""Outline: repeated blocks of the entry become one function that is called many times.

Blocks are found by structure; module paths only break ties and give names. Four steps:

1. `layout`: ops that many blocks may share (on parameters or on inputs, not on both: masks,
   rotary tables, seeds) move to the front, ops on parameters alone (casts, transposes of weights)
   to their only user. Constants leave the sequence: each function gets copies of its own.
2. `outline_find`: repeats of the remaining word of ops, the largest saving first; of the rotations
   of a repeat, the one whose boundaries fewest bytes cross.
3. Copies with the same internal dataflow, checked op by op, become calls of one function.
4. `_extend`: a neighbour that is a copy but for foreign ops in between (what the first layer
   computes for all of them) becomes a call as well, the foreign ops go before or behind it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..ir.module import Function, Location, Module, Namer, Op, Value
from ..ir.ops import OPS
from .base import Pass
from .outline_find import Colors, Costs, best_cut, occurrences, repeats

#: creation ops without operands: copied into each function that reads them
CONSTANTS = frozenset({"constant", "literal", "iota"})
#: repeats looked at before giving up; the useful ones come first
_CANDIDATES = 100
#: for each role of an entry parameter: does a value that depends on it depend on (weights, inputs)?
_ROLES = {"param": 1, "state": 1, "input": 2, "buffer": 0, "lr": 0, "seed": 0}


@dataclass(frozen=True)
class Outline(Pass):
    """Repeated blocks of the entry become one function that is called many times.

    before:  %1 = einsum(%x, %w0) {...} : f32[8, 4]    // model.layers.0.fc
             %2 = relu(%1) : f32[8, 4]
             %3 = einsum(%2, %w1) {...} : f32[8, 4]    // model.layers.1.fc
             %4 = relu(%3) : f32[8, 4]
    after:   %2 = call(%x, %w0) {callee = "layers"} : f32[8, 4]    // model.layers.0
             %4 = call(%2, %w1) {callee = "layers"} : f32[8, 4]    // model.layers.1
             func @layers(%x: f32[8, 4], %w0: f32[4, 4]) -> (f32[8, 4])
               attrs {path = "model.layers.0"} { ... }

    `min_ops` is the least number of ops of a block whose copies feed each other, `min_apart` of one
    whose copies do not: a short pattern that happens to occur twice is no block. Optimizer updates
    need not feed each other: those of each layer are a block.
    """

    min_ops: int = 3
    min_apart: int = 12

    name = "outline"
    summary = "repeated blocks become functions, found by structure"
    levels = ("logical",)

    def run(self, module: Module) -> Module:
        entry = module.entry
        front, core = layout(entry)
        blocks = _Finder(entry, front, core).find(self.min_ops, self.min_apart)
        if not blocks:
            return module
        return _Writer(module, front, core, blocks).write()


def layout(function: Function) -> tuple[list[Op], list[Op]]:
    """(constants and ops shared by blocks; the ops that may form blocks), both in valid order."""
    ops = function.ops
    users: dict[str, list[int]] = {}
    for index, op in enumerate(ops):
        for name in {value.name for value in op.operands}:
            users.setdefault(name, []).append(index)
    depends: dict[str, int] = {}
    for value, attrs in zip(function.params, function.param_attrs, strict=True):
        depends[value.name] = _ROLES.get(str(attrs.get("role", "")), 3)
    fixed = []
    for op in ops:
        mask = 0
        for value in op.operands:
            mask |= depends[value.name]
        depends.update((value.name, mask) for value in op.results)
        fixed.append(mask == 3)
    if 2 * sum(fixed) < len(
        ops
    ):  # a program without weights, or without inputs, is all of one kind
        fixed = [True] * len(ops)
    returned = {value.name for value in function.results}
    anchor = list(range(len(ops)))  # -1: to the front
    for index in reversed(range(len(ops))):
        op = ops[index]
        if op.name in CONSTANTS or op.name == "fold_seed":
            anchor[index] = -1
        elif not fixed[index] and not any(value.name in returned for value in op.results):
            readers = {user for value in op.results for user in users.get(value.name, ())}
            if readers:
                anchor[index] = anchor[readers.pop()] if len(readers) == 1 else -1
    order = sorted(range(len(ops)), key=lambda index: (anchor[index], index))
    front = [ops[index] for index in order if anchor[index] < 0]
    return front, [ops[index] for index in order if anchor[index] >= 0]


def color_key(op: Op) -> object:
    """What two ops must share to be the same but for the values they read."""
    return (
        op.name,
        tuple(sorted((name, repr(attr)) for name, attr in op.attrs.items())),
        tuple(sorted(op.split.items())),
        tuple(value.type for value in op.operands),
        tuple(value.type for value in op.results),
    )


def is_update(op: Op) -> bool:
    """Is it an optimizer update?"""
    return OPS[op.name].family == "optimizer"


#: positions in the core, one for each op of the block, in the block's order
Instance = tuple[int, ...]
#: for each op of a block, for each operand: (op of the block, result) that it is, or None
Wiring = tuple[tuple[tuple[int, int] | None, ...], ...]


def wiring(core: Sequence[Op], instance: Instance) -> Wiring:
    """The dataflow inside of an instance."""
    made: dict[str, tuple[int, int]] = {}
    rows = []
    for number, position in enumerate(instance):
        op = core[position]
        rows.append(tuple(made.get(value.name) for value in op.operands))
        made.update((value.name, (number, k)) for k, value in enumerate(op.results))
    return tuple(rows)


class _Finder:
    """Finds the blocks of a sequence of ops: lists of instances with equal dataflow."""

    def __init__(self, function: Function, front: Sequence[Op], core: Sequence[Op]) -> None:
        self.core = core
        table: dict[object, int] = {}
        colors = [table.setdefault(color_key(op), len(table)) for op in core]
        self.colors: Colors = np.array(colors, dtype=np.int32)
        self.covered = 0
        self.crossing, self.widths = self._live()
        self.agreement = self._agreement()

    def _live(self) -> tuple[Costs, list[int]]:
        """Bytes and number of the values that are live before each position, and at the end."""
        made: dict[str, int] = {}
        last: dict[str, int] = {}
        size: dict[str, int] = {}
        for position, op in enumerate(self.core):
            for value in op.operands:
                last[value.name] = position
            for value in op.results:
                made[value.name], size[value.name] = position, value.type.bytes
        steps = np.zeros((2, len(self.core) + 2), dtype=np.int64)
        for name, position in made.items():
            if name in last:
                steps[:, position + 1] += (size[name], 1)
                steps[:, last[name] + 1] -= (size[name], 1)
        total = np.cumsum(steps, axis=1)
        return total[0], total[1].tolist()

    def _agreement(self) -> Costs:
        """Leading module path components that the ops around each position share."""
        shared = np.zeros(len(self.core) + 2, dtype=np.int64)
        paths = [op.loc.path.split(".") if op.loc.path else [] for op in self.core]
        for position in range(1, len(paths)):
            shared[position] = len(_common(paths[position - 1 : position + 1]))
        return shared

    def find(self, min_ops: int, min_apart: int) -> list[list[Instance]]:
        """The instances of each block, in program order."""
        blocks: list[list[Instance]] = []
        rejected: set[bytes] = set()
        while True:
            found: list[list[Instance]] = []
            for repeat in repeats(self.colors, min_ops, min_apart)[:_CANDIDATES]:
                start, stop = best_cut(repeat, self.crossing, self.agreement, self.widths)
                word = self.colors[start:stop].copy()
                if word.tobytes() in rejected:
                    continue
                found = self._groups(word, min_apart)
                if found:
                    break
                rejected.add(word.tobytes())
            if not found:
                return blocks
            for group in found:
                for instance in group:
                    self._cover(instance)
            blocks += [self._extend(word, group) for group in found]

    def _groups(self, word: Colors, min_apart: int) -> list[list[Instance]]:
        """Copies of a word, grouped by their dataflow."""
        classes: dict[Wiring, list[Instance]] = {}
        for start in occurrences(self.colors, word):
            instance = tuple(range(start, start + len(word)))
            classes.setdefault(wiring(self.core, instance), []).append(instance)
        return [
            group
            for group in classes.values()
            if len(group) > 1
            and (len(word) >= min_apart or self._updates(group[0]) or self._chained(group))
        ]

    def _updates(self, instance: Instance) -> bool:
        return all(is_update(self.core[position]) for position in instance)

    def _chained(self, group: Sequence[Instance]) -> bool:
        """Does each copy read a result of an earlier one?"""
        made: set[str] = set()
        for instance in group:
            read = {value.name for position in instance for value in self.core[position].operands}
            if made and not made & read:
                return False
            made |= {value.name for position in instance for value in self.core[position].results}
        return True

    def _cover(self, instance: Iterable[int]) -> None:
        for position in instance:
            self.covered += 1
            self.colors[position] = -self.covered

    def _extend(self, word: Colors, group: list[Instance]) -> list[Instance]:
        """Add neighbours that are copies but for foreign ops in between."""
        target = wiring(self.core, group[0])
        group = list(group)
        for step, start in ((-1, group[0][0] - 1), (1, group[-1][-1] + 1)):
            while True:
                instance = self._match(word, start, step)
                if instance is None or wiring(self.core, instance) != target:
                    break
                if foreign(self.core, instance) is None:
                    break
                hull = range(instance[0], instance[-1] + 1)
                self._cover(hull)
                group.append(instance)
                start = hull[0] - 1 if step < 0 else hull[-1] + 1
        return sorted(group)

    def _match(self, word: Colors, start: int, step: int) -> Instance | None:
        """The word as a subsequence from `start` on, read in the direction of `step`."""
        wanted = word[::step].tolist()
        slack = len(wanted) // 2 + 8  # more foreign ops than that make it another block
        out: list[int] = []
        position = start
        while len(out) < len(wanted):
            if not 0 <= position < len(self.colors) or slack < 0 or self.colors[position] < 0:
                return None
            if self.colors[position] == wanted[len(out)]:
                out.append(position)
            else:
                slack -= 1
            position += step
        return tuple(out[::step])


def foreign(core: Sequence[Op], instance: Instance) -> tuple[list[int], list[int]] | None:
    """Positions between the ops of an instance: (those that go before it, those that go behind).

    None when an op of the instance reads a foreign op that itself reads the instance.
    """
    own = set(instance)
    made: set[str] = set()
    behind_made: set[str] = set()
    before, behind = [], []
    for position in range(instance[0], instance[-1] + 1):
        op = core[position]
        read = {value.name for value in op.operands}
        results = {value.name for value in op.results}
        if position in own:
            if read & behind_made:
                return None
            made |= results
        elif read & (made | behind_made):
            behind.append(position)
            behind_made |= results
        else:
            before.append(position)
    return before, behind


class _Writer:
    """Writes the module in which the instances of blocks are calls."""

    def __init__(
        self,
        module: Module,
        front: Sequence[Op],
        core: Sequence[Op],
        blocks: Sequence[Sequence[Instance]],
    ) -> None:
        self.module, self.front, self.core, self.blocks = module, front, core, blocks
        self.constants = {op.results[0].name: op for op in front if op.name in CONSTANTS}
        readers: dict[str, set[int]] = {}
        for position, op in enumerate(core):
            for value in op.operands:
                readers.setdefault(value.name, set()).add(position)
        for value in module.entry.results:
            readers.setdefault(value.name, set()).add(-1)
        self.readers = readers
        self.names = Namer(tuple(function.name for function in module.functions))

    def write(self) -> Module:
        """The new module; the functions of blocks follow those that it had."""
        calls: dict[int, tuple[Instance, Op]] = {}
        functions = []
        for block in self.blocks:
            function, ops = self._block(block)
            functions.append(function)
            calls.update((b[0], (b, op)) for b, op in zip(block, ops, strict=True))
        body: list[Op] = []
        position = 0
        while position < len(self.core):
            if position not in calls:
                body.append(self.core[position])
                position += 1
                continue
            instance, call = calls[position]
            sides = foreign(self.core, instance)
            assert sides is not None  # `_extend` has checked it
            body += [self.core[p] for p in sides[0]]
            body.append(call)
            body += [self.core[p] for p in sides[1]]
            position = instance[-1] + 1
        entry = self.module.entry
        read = {value.name for value in entry.results}
        read.update(value.name for op in (*self.front, *body) for value in op.operands)
        front = [op for op in self.front if op.name not in CONSTANTS or op.result.name in read]
        entry = replace(entry, ops=tuple(front + body))
        return self.module.with_(functions=(entry, *self.module.functions[1:], *functions))

    def _block(self, block: Sequence[Instance]) -> tuple[Function, list[Op]]:
        """The function of a block and the calls of its instances."""
        inner = wiring(self.core, block[0])
        slots: dict[tuple[object, ...], list[tuple[int, int]]] = {}
        for number, row in enumerate(inner):
            for k, source in enumerate(row):
                if source is None:
                    key = tuple(self._key(self.core[i[number]].operands[k]) for i in block)
                    slots.setdefault(key, []).append((number, k))
        results = self._results(block)
        path = common_path(self.core[position] for position in block[0])
        function, params = self._function(block[0], slots, results, path)
        calls = []
        for instance in block:
            operands = tuple(self.core[instance[n]].operands[k] for n, k in params)
            outs = tuple(self.core[instance[n]].results[k] for n, k in results)
            first = self.core[instance[0]].loc
            loc = Location(
                common_path(self.core[position] for position in instance), first.file, first.line
            )
            calls.append(Op("call", operands, outs, {"callee": function.name}, loc=loc))
        return function, calls

    def _key(self, value: Value) -> object:
        """Identity of an operand: a constant is what it says, any other value is its name."""
        constant = self.constants.get(value.name)
        return value.name if constant is None else color_key(constant)

    def _results(self, block: Sequence[Instance]) -> list[tuple[int, int]]:
        """(op, result) of the values that something outside of their instance reads."""
        out: set[tuple[int, int]] = set()
        for instance in block:
            own = set(instance)
            for number, position in enumerate(instance):
                for k, value in enumerate(self.core[position].results):
                    if self.readers.get(value.name, set()) - own:
                        out.add((number, k))
        return sorted(out)

    def _function(
        self,
        instance: Instance,
        slots: dict[tuple[object, ...], list[tuple[int, int]]],
        results: Sequence[tuple[int, int]],
        path: str,
    ) -> tuple[Function, list[tuple[int, int]]]:
        """The function, and for each of its parameters one of the operands that it stands for."""
        ops = [self.core[position] for position in instance]
        namer = Namer(tuple(value.name for op in ops for value in op.results))
        operands = [list(op.operands) for op in ops]
        copies: list[Op] = []
        params: list[Value] = []
        sources: list[tuple[int, int]] = []
        for key, places in slots.items():
            number, k = places[0]
            value = Value(namer(operands[number][k].name), operands[number][k].type)
            if len(set(key)) == 1 and not isinstance(key[0], str):
                copies.append(replace(self.constants[operands[number][k].name], results=(value,)))
            else:
                params.append(value)
                sources.append(places[0])
            for n, j in places:
                operands[n][j] = value
        body = [replace(op, operands=tuple(o)) for op, o in zip(ops, operands, strict=True)]
        stem = next((part for part in path.split(".")[::-1] if part.isidentifier()), "block")
        function = Function(
            self.names(f"{stem}_update" if all(map(is_update, ops)) else stem),
            tuple(params),
            (*copies, *body),
            tuple(ops[number].results[k] for number, k in results),
            attrs={"path": path} if path else {},
        )
        return function, sources


def common_path(ops: Iterable[Op]) -> str:
    """The longest module path that all located ops share."""
    return ".".join(_common([op.loc.path.split(".") for op in ops if op.loc.path]))


def _common(paths: Sequence[Sequence[str]]) -> list[str]:
    out: list[str] = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        out.append(parts[0])
    return out
