"""The vocabulary of outline: the sequence in which blocks are looked for, and what makes ops equal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..ir.module import Function, Op
from ..ir.ops import OPS

#: creation ops without operands: copied into each function that reads them
CONSTANTS = frozenset({"constant", "literal", "iota"})
#: for each role of an entry parameter: does a value that depends on it depend on (weights, inputs)?
_ROLES = {"param": 1, "state": 1, "input": 2, "buffer": 0, "lr": 0, "seed": 0}


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
        elif not fixed[index]:
            readers = {user for value in op.results for user in users.get(value.name, ())}
            if any(anchor[user] < 0 for user in readers):
                anchor[index] = -1  # what the front reads is in front
            elif readers and not any(value.name in returned for value in op.results):
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


def common_path(ops: Iterable[Op]) -> str:
    """The longest module path that all located ops share."""
    return ".".join(common_prefix([op.loc.path.split(".") for op in ops if op.loc.path]))


def common_prefix(paths: Sequence[Sequence[str]]) -> list[str]:
    out: list[str] = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        out.append(parts[0])
    return out
