"""Writing outlined modules: a function for each block, a call for each of its instances."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..ir.module import Function, Location, Module, Namer, Op, Value
from .outline_core import CONSTANTS, Instance, color_key, common_path, foreign, is_update, wiring


class Writer:
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
        self.taken = {function.name for function in module.functions}

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
        function = Function(
            self._name(path, all(map(is_update, ops))),
            tuple(params),
            (*copies, *body),
            tuple(ops[number].results[k] for number, k in results),
            attrs={"path": path} if path else {},
        )
        return function, sources

    def _name(self, path: str, update: bool) -> str:
        """`layers`, or as much of the path in front of it as makes the name unique."""
        parts = [part for part in path.split(".") if part.isidentifier()] or ["block"]
        tails = ("_".join(parts[-count:]) for count in range(1, len(parts) + 1))
        names = [f"{tail}_update" if update else tail for tail in tails]
        name = next((name for name in names if name not in self.taken), "")
        name = name or Namer(tuple(self.taken))(names[-1])
        self.taken.add(name)
        return name
