"""How much of a plan's memory traffic and arithmetic goes through generated kernels, block by block.

Traffic counts each tensor of an op, or of a kernel, once; views and constants move nothing. Rows are
the pointwise, row-wise, reduction and optimizer ops, joins and pads. Their lower bound is that of
*regions*: rows that are connected and have as many other ops (products, collectives) on the longest
path to them, so that one kernel could hold them, with each input read once and each output written
once.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..ir.module import Function, Module, Op, Value
from ..ir.opdef import OPS, flops_of
from ..ir.signature import SignatureError
from ..ir.types import Mesh, local_bytes
from .regions import JOINS, is_view

#: ops that move their operands to their results element by element, or reduce rows of them
ROWS = frozenset({"pointwise", "row", "reduction", "optimizer"})
#: families that move nothing by themselves
_FREE = frozenset({"creation", "collective", "structure"})
#: operands of which only the rows that appear in the result are read
_SPARSE = {"embedding": 1, "take": 0, "gather": 0}


@dataclass
class Traffic:
    """What the ops of a block do on one rank, in bytes of memory traffic and in FLOPs.

    Attributes:
        kernels: number of kernel calls.
        moved, moved_in_kernels: traffic of everything; of the kernels.
        flops, flops_in_kernels: likewise.
        rows, rows_in_kernels: traffic of the rows as if each op ran alone, all of them; those that
            are in kernels.
        rows_moved: traffic of kernels, and of rows outside of them.
        rows_bound: least traffic of the regions of rows.
    """

    kernels: int = 0
    moved: int = 0
    moved_in_kernels: int = 0
    flops: float = 0.0
    flops_in_kernels: float = 0.0
    rows: int = 0
    rows_in_kernels: int = 0
    rows_moved: int = 0
    rows_bound: int = 0

    def add(self, other: Traffic) -> None:
        """Count another block too."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


def block_of(path: str) -> str:
    """The block that a module path belongs to: repeated ones are one, `model.layers.*`."""
    match = re.match(r"(.*?)\.\d+(?:\.|$)", path + ".")
    if match:
        return f"{match[1]}.*"
    return path.split(".")[0] or "(none)"


def traffic_of(module: Module) -> dict[str, Traffic]:
    """Traffic by block, in program order; calls of other functions count at each call."""
    found: dict[str, Traffic] = {}
    _walk(module, module.entry, 1, found)
    return found


def leftovers(module: Module) -> dict[str, int]:
    """Bytes of the rows outside of kernels, by op name."""
    found: dict[str, int] = defaultdict(int)
    for function in module.functions:
        if "kernel" not in function.attrs:
            for op in function.ops:
                alone = _op_traffic(op, module.mesh)
                if alone.rows > alone.rows_in_kernels:
                    found[op.name] += alone.rows
    return dict(found)


def _walk(module: Module, function: Function, times: int, found: dict[str, Traffic]) -> None:
    for op in function.ops:
        if op.name == "call":
            callee = module.function(str(op.attrs["callee"]))
            if "kernel" not in callee.attrs:
                _walk(module, callee, times, found)
                continue
            block = _kernel_traffic(op, callee, module.mesh)
        else:
            block = _op_traffic(op, module.mesh)
        found.setdefault(block_of(op.loc.path), Traffic()).add(block)
    for path, size in _bounds(module, function):
        found.setdefault(block_of(path), Traffic()).rows_bound += size


def _is_row(op: Op) -> bool:
    if op.name not in OPS or is_view(op):
        return False
    return OPS[op.name].family in ROWS or op.name in JOINS


def _size(values: Iterable[Value], mesh: Mesh | None) -> int:
    each = {value.name: value.type for value in values}.values()
    return sum(local_bytes(t, mesh) if mesh is not None else t.bytes for t in each)


def _bytes(op: Op, mesh: Mesh | None) -> int:
    """Traffic of an op that runs alone."""
    if is_view(op) or OPS[op.name].family in _FREE or op.name in ("free", "wait"):
        return 0
    sparse = _SPARSE.get(op.name)
    read = [value for i, value in enumerate(op.operands) if i != sparse]
    written = _size(op.results, mesh)
    return _size(read, mesh) + written * (2 if sparse is not None else 1)


def _flops(op: Op) -> float:
    try:
        return flops_of(op) if OPS[op.name].family not in _FREE and not is_view(op) else 0.0
    except (SignatureError, KeyError):
        return 0.0


def _op_traffic(op: Op, mesh: Mesh | None) -> Traffic:
    size = _bytes(op, mesh)
    rows = size if _is_row(op) else 0
    if op.name in OPS and OPS[op.name].family == "optimizer" and mesh is not None:
        if mesh.device != "cpu":  # a kernel runs those of many parameters (`codegen/update.py`)
            return Traffic(0, size, size, _flops(op), _flops(op), rows, rows, rows)
    return Traffic(moved=size, flops=_flops(op), rows=rows, rows_moved=rows)


def _kernel_traffic(call: Op, body: Function, mesh: Mesh | None) -> Traffic:
    size = _size(call.operands, mesh) + _size(call.results, mesh)
    rows = sum(_bytes(op, mesh) for op in body.ops)
    flops = sum(_flops(op) for op in body.ops)
    # what a product or attention in the kernel reads is no traffic of rows
    other = [v for op in body.ops if not (_is_row(op) or is_view(op)) for v in op.operands]
    read = {value.name for value in other} & {value.name for value in body.params}
    own = sum(_size([value], mesh) for value in body.params if value.name not in read)
    moved = own + _size(body.results, mesh) if rows else 0
    return Traffic(1, size, size, flops, flops, rows, rows, moved, 0)


def _bounds(module: Module, function: Function) -> list[tuple[str, int]]:
    """(path, least traffic) of each region of a function, kernels taken apart again."""
    ops = _flat(module, function)
    levels = _levels(function, ops, module.mesh)
    made = {value.name: i for i, op in enumerate(ops) for value in op.results}
    parent: dict[object, object] = {}

    def root(key: object) -> object:
        while parent.setdefault(key, key) != key:
            key = parent[key]
        return key

    for i, op in enumerate(ops):
        row = _is_row(op)
        if not row and not is_view(op):
            continue
        for value in op.operands:
            source = made.get(value.name)
            if source is not None and levels[source] == levels[i]:
                if _is_row(ops[source]) or is_view(ops[source]):
                    parent[root(source)] = root(i)
            if row and value.type.numel > 1:  # neighbours that read one tensor could share a kernel
                parent[root((value.name, levels[i]))] = root(i)
    members: dict[object, list[Op]] = defaultdict(list)
    for i, op in enumerate(ops):
        if _is_row(op):
            members[root(i)].append(op)
    return _sizes(function, ops, list(members.values()), module.mesh)


def _levels(function: Function, ops: Sequence[Op], mesh: Mesh | None) -> list[int]:
    """For each op, how many other ops are on the longest path to it; what makes more bytes than it
    reads, as late as its readers are, so that regions that are connected are convex."""
    depth: dict[str, int] = {}
    levels = []
    for op in ops:
        levels.append(max((depth.get(value.name, 0) for value in op.operands), default=0))
        step = 0 if _is_row(op) or is_view(op) else 1
        depth.update((value.name, levels[-1] + step) for value in op.results)
    needed = {value.name: 0 for value in function.results}
    for i in reversed(range(len(ops))):
        op = ops[i]
        if _is_row(op) or is_view(op):
            late = min((needed[v.name] for v in op.results if v.name in needed), default=levels[i])
            if late > levels[i] and _size(op.operands, mesh) <= _size(op.results, mesh):
                levels[i] = late
        for value in op.operands:
            needed[value.name] = min(needed.get(value.name, levels[i]), levels[i])
    return levels


def _flat(module: Module, function: Function) -> list[Op]:
    """The ops of a function with its kernels' bodies in the place of their calls."""
    ops: list[Op] = []
    for number, op in enumerate(function.ops):
        callee = module.function(str(op.attrs["callee"])) if op.name == "call" else None
        if callee is None or "kernel" not in callee.attrs:
            ops.append(op)
            continue
        names = dict(zip((v.name for v in callee.params), op.operands, strict=True))
        names |= dict(zip((v.name for v in callee.results), op.results, strict=True))

        def renamed(value: Value, names: dict[str, Value] = names, n: int = number) -> Value:
            return names.get(value.name) or Value(f"{n}/{value.name}", value.type)

        ops += [
            inner.with_(operands=tuple(map(renamed, inner.operands)),
                        results=tuple(map(renamed, inner.results)))
            for inner in callee.ops
        ]  # fmt: skip
    return ops


def _sizes(
    function: Function, ops: Sequence[Op], regions: Sequence[list[Op]], mesh: Mesh | None
) -> list[tuple[str, int]]:
    """Bytes that regions read and write at least; what they read is looked up through views."""
    views = {op.result.name: op for op in ops if is_view(op)}
    readers: dict[str, set[int]] = defaultdict(set)
    for value in function.results:
        readers[_source(value, views).name].add(-1)
    home = {id(op): number for number, region in enumerate(regions) for op in region}
    for op in ops:
        if op.name == "free" or op.name in OPS and is_view(op):
            continue
        for value in op.operands:
            readers[_source(value, views).name].add(home.get(id(op), -1))
    out = []
    for number, region in enumerate(regions):
        made = {value.name for op in region for value in op.results}
        read = {_source(value, views).name: _source(value, views)
                for op in region for value in op.operands}  # fmt: skip
        needed = [v for name, v in read.items() if name not in made]
        kept = [v for op in region for v in op.results if readers[v.name] - {number}]
        out.append((region[0].loc.path, _size(needed, mesh) + _size(kept, mesh)))
    return out


def _source(value: Value, views: dict[str, Op]) -> Value:
    while (op := views.get(value.name)) is not None and op.operands:
        value = op.operands[0]
    return value
