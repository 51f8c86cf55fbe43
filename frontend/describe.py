"""What a plan says, as rows: the tables of `inspect`, `explain` and the report share them."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from ..ir.module import Function, Module, Op
from ..ir.opdef import OPS
from ..ir.text import print_module
from ..ir.types import DTYPES, Mesh, TensorType, local_bytes, local_shape


def executions(module: Module) -> dict[str, int]:
    """How often each function runs in one step, the entry once."""
    counts: Counter[str] = Counter()

    def visit(name: str, times: int) -> None:
        counts[name] += times
        calls = Counter(
            str(o.attrs["callee"]) for o in module.function(name).ops if o.name == "call"
        )
        for callee, repeats in calls.items():
            visit(callee, times * repeats)

    visit(module.entry.name, 1)
    return dict(counts)


@dataclass(frozen=True)
class CollectiveRow:
    """Collectives of one kind on one axis that carry one tensor, over a whole step."""

    name: str
    axis: str
    count: int
    bytes: int  #: of the largest rank's operand, times count
    tensor: str
    where: str


def collectives(module: Module) -> list[CollectiveRow]:
    """Collectives of an spmd or schedule module, heaviest first."""
    mesh = module.mesh or Mesh()
    times = executions(module)
    table: dict[tuple[str, str, str, str], tuple[int, int]] = {}
    for function, op in module.walk():
        if OPS[op.name].family != "collective":
            continue
        count = times.get(function.name, 0)
        source = op.operands[0] if op.operands else op.results[0]
        size = local_bytes(source.type, mesh) * count
        key = (op.name, str(op.attrs.get("axis", "")), str(source.type), str(op.loc))
        old = table.get(key, (0, 0))
        table[key] = (old[0] + count, old[1] + size)
    rows = [CollectiveRow(k[0], k[1], v[0], v[1], k[2], k[3]) for k, v in table.items()]
    return sorted(rows, key=lambda row: (-row.bytes, row.name, row.where))


@dataclass(frozen=True)
class ParamRow:
    """A parameter of the entry function: where it lives."""

    role: str
    name: str
    type: TensorType
    local: tuple[int, ...]
    bytes: int  #: of the largest rank


def parameters(module: Module) -> list[ParamRow]:
    """The entry's parameters, with the shard of rank 0."""
    mesh = module.mesh or Mesh()
    rows = []
    for value, attrs in zip(module.entry.params, module.entry.param_attrs, strict=True):
        shape = local_shape(value.type, mesh, (0,) * len(mesh.axes))
        size = prod(shape) * DTYPES[value.type.dtype]
        role = str(attrs.get("role", ""))
        rows.append(ParamRow(role, str(attrs.get("name", value.name)), value.type, shape, size))
    return rows


def memory_by_role(module: Module) -> dict[str, int]:
    """Bytes of the entry's parameters on the largest rank, by role."""
    table: Counter[str] = Counter()
    for row in parameters(module):
        table[row.role or "other"] += row.bytes
    return dict(table)


def fallbacks(module: Module) -> list[tuple[str, str, int]]:
    """Opaque ATen calls: (operator, where, executions)."""
    times = executions(module)
    return [
        (str(op.attrs["target"]), str(op.loc), times.get(function.name, 0))
        for function, op in module.walk()
        if op.name == "aten"
    ]


def replicated(module: Module) -> list[Op]:
    """Ops with work to share that no axis splits (placed and spmd levels)."""
    heavy = ("contraction", "row")
    return [
        op
        for _, op in module.walk()
        if OPS[op.name].family in heavy and not op.split and (module.mesh or Mesh()).size > 1
    ]


def matching(module: Module, path: str) -> Iterator[tuple[Function, Op]]:
    """Ops whose module path or name contains `path`."""
    for function, op in module.walk():
        if path in op.loc.path or path == op.name or any(path == v.name for v in op.results):
            yield function, op


def op_line(op: Op) -> str:
    """One op on one line, as people read it."""
    split = ", ".join(f"{axis}={dim}" for axis, dim in op.split.items())
    results = ", ".join(f"%{v.name}: {v.type}" for v in op.results)
    operands = ", ".join(f"%{v.name}" for v in op.operands)
    return f"{results} = {op.name}({operands})" + (f" split [{split}]" if split else "")


def diff(before: Module, after: Module, names: tuple[str, str]) -> str:
    """Unified diff of two dumps."""
    lines = difflib.unified_diff(
        print_module(before).splitlines(),
        print_module(after).splitlines(),
        *names,
        lineterm="",
        n=2,
    )
    return "\n".join(lines)


def human_bytes(count: float) -> str:
    """Bytes for people: 1.5 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(count) < 1024 or unit == "TiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")


def human_time(time_us: float) -> str:
    """Microseconds for people: 1.5 ms."""
    if time_us < 1000:
        return f"{time_us:.1f} us"
    return f"{time_us / 1000:.2f} ms" if time_us < 1e6 else f"{time_us / 1e6:.2f} s"
