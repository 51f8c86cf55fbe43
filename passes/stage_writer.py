"""The flat entry of one pipeline stage, as it is written: values of its parts, copies of their bodies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..ir.module import Attr, Function, Namer, Op, Value
from ..ir.types import B, Mesh, P, Placement, TensorType
from .micro import TimeSplit
from .micro_shapes import at_row
from .stage_bodies import Part, When

_JOIN = {"sum": "add", "max": "maximum", "min": "minimum"}
End = tuple[Mesh, TensorType]
#: (rows of a micro-batch, value, part that sends it, part that receives it) -> mesh and type there
Ends = dict[tuple[int, str, int, int], tuple[End, End]]


@dataclass(frozen=True)
class _Key:
    """Where a value belongs: a part, and a micro-batch or -1."""

    part: int
    micro: int


class Writer:
    """The flat entry of one stage while it is written."""

    def __init__(
        self,
        split: TimeSplit,
        stage: int,
        stages: int,
        parts: Mapping[tuple[int, int], Part],
        kernels: Sequence[Function],
        ends: Ends,
    ) -> None:
        self.split, self.stage, self.stages, self.ends = split, stage, stages, ends
        self.parts, self.kernels = parts, {f.name: f for f in kernels}
        self.numbers = sorted({part for _, part in parts})
        self.mesh = Mesh()
        self.namer = Namer()
        self.params: dict[str, tuple[Value, Mapping[str, Attr]]] = {}
        self.ops: list[Op] = []
        self.known: dict[_Key, dict[str, Value]] = {}
        self.sums: dict[tuple[int, str], Value] = {}

    def part(self, number: int, micro: int = -1) -> Part:
        """A part as it is for a micro-batch."""
        rows = self.split.sizes[max(micro, 0)]
        return self.parts[rows, number]

    # -- values ---------------------------------------------------------------------------------

    def get(self, part: int, micro: int, name: str) -> Value:
        """A value of a part."""
        for key in (_Key(part, micro), _Key(part, -1)):
            found = self.known.get(key, {}).get(name)
            if found is not None:
                return found
        return self._param(part, micro, name)

    def put(self, part: int, micro: int, name: str, value: Value) -> None:
        """Record a value of a part."""
        self.known.setdefault(_Key(part, micro), {})[name] = value

    def _param(self, number: int, micro: int, name: str) -> Value:
        """An entry parameter of a part: of the stage once, or in parts for the micro-batches."""
        part = self.part(number, micro)
        position = [v.name for v in part.entry.params].index(name)
        value, attrs = part.entry.params[position], dict(part.entry.param_attrs[position])
        held = part.held[name]
        key = name
        if held.kind == "S":
            total = self._total(name, held.dim)
            start = total * self.split.start(micro) // self.split.batch
            attrs["part"] = (held.dim, start, total)
            key = f"{name}.m{micro}"
        known = self.params.get(key)
        while known is not None and known[0].type != value.type:
            key += "_"  # another chunk holds a copy of it otherwise
            known = self.params.get(key)
        if known is None:
            known = self.params[key] = Value(self.namer(key), value.type), attrs
        self.put(number, micro if held.kind == "S" else -1, name, known[0])
        return known[0]

    def _total(self, name: str, dim: int) -> int:
        entry = self.split.module.entry
        return next(v.type.shape[dim] for v in entry.params if v.name == name)

    # -- actions --------------------------------------------------------------------------------

    def emit(
        self, name: str, operands: Iterable[Value], type_of: Value, hint: str,
        attrs: Mapping[str, Attr] | None = None, split: Mapping[str, str] | None = None,
    ) -> Value:  # fmt: skip
        """Append an op with one result of a value's type."""
        result = Value(self.namer(hint), type_of.type)
        self.ops.append(Op(name, tuple(operands), (result,), dict(attrs or {}), dict(split or {})))
        return result

    def run(self, number: int, micro: int, when: When) -> None:
        """Splice the body of a phase of a part."""
        part = self.part(number, micro)
        body = part.bodies.get(when)
        if body is None:
            return
        row = self.split.start(micro) if micro >= 0 else 0
        move = at_row(row, self.split.batch)
        inner = {v.name: self.get(number, micro, v.name) for v in body.params}
        for op in body.ops:
            results = tuple(Value(self.namer(v.name), v.type) for v in op.results)
            operands = tuple(inner[v.name] for v in op.operands)
            inner.update((old.name, new) for old, new in zip(op.results, results, strict=True))
            op = op.with_(operands=operands, results=results)
            self.ops.append(self._kernel(op, row) if op.name == "call" else move(op))
        for name, value in zip(part.outputs[when], body.results, strict=True):
            self.put(number, micro, name, inner[value.name])

    def _kernel(self, op: Op, row: int) -> Op:
        """A call of a kernel at a row of the batch."""
        callee = self.kernels[str(op.attrs["callee"])]
        move = at_row(row, self.split.batch)
        ops = tuple(map(move, callee.ops))
        if ops == callee.ops:
            return op
        name = f"{callee.name}_row{row}"
        self.kernels[name] = callee.with_(name=name, ops=ops, attrs={**callee.attrs, "kernel": name})
        return op.with_(attrs={**op.attrs, "callee": name})

    def add_up(self, number: int, micro: int, when: When) -> None:
        """Add a micro-batch's terms to the sums."""
        part = self.part(number, micro)
        for name in self._sums(part):
            if name not in part.outputs.get(when, ()):
                continue
            whole = self.get(number, micro, name)
            term = self._joinable(whole, part.held[name])
            before = self.sums.get((number, name))
            if before is not None:
                term = self._added(before, term, part.held[name])
            self.sums[number, name] = term
            self.put(number, -1, name, self._rejoined(term, whole))

    def _joinable(self, term: Value, held: Placement) -> Value:
        """A term without what is partial in another way over an axis of the mesh: (B + B) is what
        (max of ranks) + (max of ranks) means."""
        for axis, placement in enumerate(term.type.placement or ()):
            if placement.kind == "P" and not placement == held == P("sum"):
                placements = list(term.type.placement or ())
                placements[axis] = B
                like = Value(term.name, term.type.placed(placements))
                attrs = {"axis": self.mesh.names[axis], "combine": placement.combine}
                term = self.emit("all_reduce", (term,), like, term.name, attrs)
        return term

    def _rejoined(self, total: Value, like: Value) -> Value:
        """A sum placed as its terms were."""
        for axis, placement in enumerate(like.type.placement or ()):
            if (total.type.placement or ())[axis] != placement:
                placements = list(total.type.placement or ())
                placements[axis] = placement
                one = Value(total.name, total.type.placed(placements))
                attrs = {"axis": self.mesh.names[axis], "combine": placement.combine}
                total = self.emit("partial", (total,), one, total.name, attrs)
        return total

    def _added(self, one: Value, two: Value, held: Placement) -> Value:
        op = _JOIN[held.combine]
        split: dict[str, str] = {}
        for axis, placement in zip(self.mesh.names, one.type.placement or (), strict=True):
            if placement.kind == "S":
                split[axis] = f"a{placement.dim}"
            elif placement.kind == "P" and op == "add":
                split[axis] = "partial(0, 1)"
        return self.emit(op, (one, two), one, one.name, split=split)

    def _sums(self, part: Part) -> list[str]:
        """What is added up: read in the update, sent in it, or a result of the step."""
        late = [v.name for w, body in part.bodies.items() if w.name == "update" for v in body.params]
        late += [value.name for value in part.entry.results]
        return [name for name in dict.fromkeys(late) if part.held.get(name, B).kind == "P"]

    # -- results --------------------------------------------------------------------------------

    def results(self) -> tuple[list[Value], list[Mapping[str, Attr]]]:
        """The results of the step and their attributes."""
        results: list[Value] = []
        attrs: list[Mapping[str, Attr]] = []
        for number in self.numbers:
            part = self.part(number)
            for value, record in zip(part.entry.results, part.entry.result_attrs, strict=True):
                if record["role"] == "sent":
                    continue
                held = part.held[value.name]
                if held.kind == "S":
                    self._parts_of(number, value.name, held.dim, record, results, attrs)
                    continue
                found = self.get(number, -1, value.name)
                if "updates" in record:
                    target = self.get(number, -1, str(record["updates"])).name
                    if any(a.get("updates") == target for a in attrs):
                        continue  # another chunk has updated its copy
                    record = {**record, "updates": target}
                results.append(found)
                attrs.append(record)
        return results, attrs

    def _parts_of(
        self, number: int, name: str, dim: int, record: Mapping[str, Attr],
        results: list[Value], attrs: list[Mapping[str, Attr]],
    ) -> None:  # fmt: skip
        """A result in parts, one for each micro-batch."""
        values = [self.get(number, k, name) for k in range(self.split.count)]
        total = sum(value.type.shape[dim] for value in values)
        start = 0
        for value in values:
            results.append(value)
            attrs.append({**record, "part": (dim, start, total)})
            start += value.type.shape[dim]
