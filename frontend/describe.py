"""What a plan says, as rows: the tables of `inspect`, `explain` and the report share them."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod

from ..costmodel.simulate_memory import MADE
from ..ir.module import Function, Location, Module, Op
from ..ir.opdef import OPS
from ..ir.text import print_module
from ..ir.types import DTYPES, Mesh, TensorType, local_bytes, local_shape
from .flat import flat


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
    """Collectives of one kind on one axis that carry one tensor, over a whole step.

    Those of repeated blocks share a row: `layers.*.mlp`.
    """

    name: str
    axis: str
    count: int
    bytes: int  #: of the largest rank's operand, times count
    tensor: str  #: type of the operand
    carries: str  #: `gradient of NAME`, the name of a parameter, or `result of OP`
    where: str


def collectives(module: Module) -> list[CollectiveRow]:
    """Collectives of an spmd or schedule module, heaviest first."""
    mesh = module.mesh or Mesh()
    entry = flat(module).entry
    carried = _Carried(entry, module)
    table: dict[tuple[str, ...], list[tuple[int, str, Location]]] = {}
    for op in entry.ops:
        if OPS[op.name].family != "collective":
            continue
        source = op.operands[0] if op.operands else op.results[0]
        what, loc = carried.name(op), carried.location(op)
        axis = str(op.attrs.get("axis", ""))
        key = (op.name, axis, str(source.type), star(what), star(loc.path), loc.file, str(loc.line))
        table.setdefault(key, []).append((local_bytes(source.type, mesh), what, loc))
    rows = []
    for (name, axis, tensor, what, path, *_), found in table.items():
        what = found[0][1] if len({f[1] for f in found}) == 1 else what
        path = found[0][2].path if len({f[2].path for f in found}) == 1 else path
        where = str(replace(found[0][2], path=path))
        size = sum(f[0] for f in found)
        rows.append(CollectiveRow(name, axis, len(found), size, tensor, what, where))
    return sorted(rows, key=lambda row: (-row.bytes, row.name, row.where))


def star(path: str) -> str:
    """A path with the numbers of repeated blocks as stars: `layers.*.mlp`."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", path)


class _Carried:
    """What the collectives of a flat function carry, in the user's terms."""

    def __init__(self, function: Function, module: Module) -> None:
        self.module = module
        self.defs, self.uses = function.defs(), function.uses()
        pairs = zip(function.params, function.param_attrs, strict=True)
        self.params = {value.name: str(a.get("name", value.name)) for value, a in pairs}

    def _source(self, name: str) -> tuple[str, Op | None]:
        """The value behind a chain of collectives and views, and its op."""
        while (found := self.defs.get(name)) is not None and _passes_on(found) and found.operands:
            name = found.operands[0].name
        return name, found

    def name(self, op: Op) -> str:
        """What a collective carries."""
        for value in op.results:
            if wanted := self._updated(value.name):
                return f"gradient of {wanted}"
        name, found = self._source((op.operands or op.results)[0].name)
        if found is None:
            return self.params.get(name, name)
        if found.name == "call":  # a kernel of several ops is known by its last
            *_, last = self.module.function(str(found.attrs["callee"])).ops
            return f"result of fused {last.name}"
        return f"result of {found.name}"

    def _updated(self, name: str) -> str:
        """The parameter whose update reads a value, perhaps through views and collectives."""
        for reader in self.uses.get(name, ()):
            if OPS[reader.name].family == "optimizer" and reader.operands[1].name == name:
                return self.params.get(self._source(reader.operands[0].name)[0], "")
            if _passes_on(reader) and (found := self._updated(reader.results[0].name)):
                return found
        return ""

    def location(self, op: Op) -> Location:
        """Where a collective comes from: its own place, or that of what it carries."""
        _, found = self._source((op.operands or op.results)[0].name)
        return op.loc if str(op.loc) or found is None else found.loc


def _passes_on(op: Op) -> bool:
    """Is the result the operand, perhaps moved between ranks or seen otherwise?"""
    moves = ("wait", "reshard", "reshape", "permute", "cast")
    return OPS[op.name].family == "collective" or op.name in moves


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


def memory_by_owner(at_peak: Sequence[tuple[str, str, int]]) -> list[tuple[str, str, int]]:
    """Bytes at the peak by owner, largest first: (kind, owner, bytes).

    Parameters, states and inputs are one row per kind; gradients, activations and transients one
    per module path, those of repeated blocks together.
    """
    table: Counter[tuple[str, str]] = Counter()
    for kind, owner, size in at_peak:
        table[kind, star(owner) if kind in MADE else ""] += size
    return [(kind, owner, size) for (kind, owner), size in table.most_common()]


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
    """Ops whose module path or name contains `path`, those of called functions at each call.

    Kernel functions, which stand for no one place, are their calls; an op's name finds them too.
    """
    whole = flat(module)
    for function, op in whole.walk():
        if op.name == "free" or (function is not whole.entry and path != op.name):
            continue
        if path in op.loc.path or path == op.name or any(path == v.name for v in op.results):
            yield function, op


def titled(op: Op) -> str:
    """An op's name, with the equation that names the dims of its split: `einsum[a k, k n -> a n]`."""
    return f"{op.name}[{op.attrs['spec']}]" if "spec" in op.attrs else op.name


def op_line(op: Op) -> str:
    """One op on one line, as people read it."""
    split = ", ".join(f"{axis}={dim}" for axis, dim in op.split.items())
    results = ", ".join(f"%{v.name}: {v.type}" for v in op.results)
    operands = ", ".join(f"%{v.name}" for v in op.operands)
    name = f"call @{op.attrs['callee']}" if op.name == "call" else titled(op)
    return f"{results} = {name}({operands})" + (f" split [{split}]" if split else "")


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
