"""Rules on collectives and transfers, and on values that hold a term of a log-sum-exp on each rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from .crossing import crosses, wrong_ends
from .module import Attr, Function, Module, Op
from .opdef import full_attrs, signature_of
from .ops import OPS
from .rule import Rule, Violation, op_rule
from .rules_placed import mesh_of
from .types import B, Mesh, P, Placement, S

_Change = Callable[[dict[str, Attr], Placement], tuple[Placement, Placement]]


def _split(attrs: dict[str, Attr], name: str) -> Placement:
    return S(int(attrs[name]))  # type: ignore[arg-type]


def _partial(attrs: dict[str, Attr]) -> Placement:
    return P(str(attrs["combine"]))


def _to_partial(attrs: dict[str, Attr], held: Placement) -> tuple[Placement, Placement]:
    padded = held.kind == "S" and attrs["combine"] == "sum"
    return (held if padded else B), _partial(attrs)


#: collective -> (attributes, the operand's placement on the axis) -> the placement that the operand
#: must have there, and that of the result
_CHANGES: dict[str, _Change] = {
    "all_reduce": lambda a, held: (_partial(a), B),
    "all_gather": lambda a, held: (_split(a, "dim"), B),
    "reduce_scatter": lambda a, held: (_partial(a), _split(a, "dim")),
    "all_to_all": lambda a, held: (_split(a, "source"), _split(a, "target")),
    "broadcast": lambda a, held: (B, B),
    "permute_ranks": lambda a, held: (held, held),
    "shard": lambda a, held: (B, _split(a, "dim")),
    "partial": _to_partial,
    "lse_combine": lambda a, held: (B, B),
}  # fmt: skip


def _collective(module: Module, op: Op) -> str:
    change = _CHANGES.get(op.name)
    if change is None:
        return ""
    mesh, attrs = mesh_of(module), full_attrs(op.name, op.attrs)
    name = str(attrs["axis"])
    if name not in mesh.names:
        return f"{op.name} over the axis {name!r}, the mesh has {', '.join(mesh.names) or 'none'}"
    axis = mesh.axis(name)
    before, after = op.operands[0].type.placement or (), op.results[0].type.placement or ()
    source, target = change(attrs, before[axis])
    if before[axis] != source:
        return f"{op.name} wants {source} on axis {name}, {op.operands[0]} has {before[axis]}"
    if after[axis] != target:
        return f"{op.name} gives {target} on axis {name}, {op.results[0]} has {after[axis]}"
    for other, its_name in enumerate(mesh.names):
        if other != axis and before[other] != after[other]:
            return f"{op.name} over {name} changes the placement on {its_name}"
    if op.name == "all_to_all" and source == target:
        return f"all_to_all over {name} has {source} as its source and its target"
    if op.name == "permute_ranks":
        return ""
    for moved in (source, target):
        # parts of an outer axis are not contiguous in a dim that an inner axis splits further
        if moved.kind == "S" and moved in before[axis + 1 :]:
            inner = mesh.names[axis + 1 + before[axis + 1 :].index(moved)]
            return f"{op.name} over {name} moves dim {moved.dim}, which {inner} splits further in"
    return ""


def lse_axes(op: Op, mesh: Mesh) -> frozenset[str]:
    """The axes, of more than one rank, over which an op splits a dim that combines by `lse`."""
    if not op.split or OPS[op.name].signature is None:
        return frozenset()
    dims = signature_of(op).dims
    lse = {name for name, dim in dims.items() if dim.combine == "lse"}
    sizes = dict(mesh.axes)
    return frozenset(axis for axis, state in op.split.items() if state in lse and sizes[axis] > 1)


@dataclass(frozen=True, slots=True)
class _Term:
    """A value that is not yet what its type says.

    `kind` is `lse`, a rank's own log-sum-exp; `weight`, what is derived from it; `mul` or `add`, a
    term of a sum that still lacks its weight, or the total log-sum-exp.
    """

    kind: str
    axes: frozenset[str]


_Results = tuple[_Term | None, ...]


def _read(op: Op, terms: Sequence[_Term | None]) -> _Term | str | None:
    """The result of an op that reads terms: a term, a finished value, or why it may not."""
    first = terms[0]
    match op.name, tuple("" if term is None else term.kind for term in terms):
        case ("lse_combine", ("lse",)):
            assert first is not None
            left = first.axes - {str(op.attrs["axis"])}
            if left == first.axes:
                return f"lse_combine over {op.attrs['axis']}, the terms lie on {sorted(left)}"
            return _Term("lse", left) if left else None
        case ("sub", ("lse", "")):
            assert first is not None
            return _Term("weight", first.axes)
        case ("exp" | "reshape" | "cast", ("weight",)) | ("cast", ("mul" | "add",)) | ("wait", _):
            return first
        case ("mul", ("mul", "weight")) if first is not None and terms[1] is not None:
            return None if first.axes == terms[1].axes else "the weight is of other axes"
        case ("add", ("add", "")):
            return None
        case ("lse_combine", ("",)):
            return f"{op.operands[0]} holds one value, not one term per rank"
    index = next(index for index, term in enumerate(terms) if term is not None)
    term = terms[index]
    assert term is not None
    return (
        f"{op.name} reads {op.operands[index]}, which holds one term per rank of "
        f"{', '.join(sorted(term.axes))}: its log-sum-exp fix-up comes first"
    )


class _Terms:
    """Follows unfinished values through the functions."""

    def __init__(self, module: Module) -> None:
        self.mesh = mesh_of(module)
        self.functions = {function.name: function for function in module.functions}
        self.kernels: dict[tuple[str, _Results], _Results | None] = {}

    def function(
        self, function: Function, known: Sequence[_Term | None]
    ) -> Iterator[Violation | _Results]:
        """Violations, and last what the results are."""
        table: dict[str, _Term | None] = {}
        table.update((v.name, term) for v, term in zip(function.params, known, strict=True))
        for index, op in enumerate(function.ops):
            terms = [table.get(value.name) for value in op.operands]
            if op.name == "free":
                continue
            if op.name == "call" and (outs := self._kernel(op, terms)) is not None:
                table.update((v.name, term) for v, term in zip(op.results, outs, strict=True))
            elif any(terms) or op.name == "lse_combine":
                after = _read(op, terms)
                if isinstance(after, str):
                    yield Violation(after, function, index, "W0203")
                elif after is not None:
                    table.update((value.name, after) for value in op.results)
            if axes := lse_axes(op, self.mesh):
                *others, own = op.results
                kind = "mul" if op.name == "attention" else "add"
                table.update((value.name, _Term(kind, axes)) for value in others)
                table[own.name] = _Term("lse", axes)
        yield tuple(table.get(value.name) for value in function.results)

    def _kernel(self, op: Op, terms: Sequence[_Term | None]) -> _Results | None:
        """What a kernel returns: it may hold a part of a fix-up. None where it misuses a term."""
        callee = self.functions[str(op.attrs["callee"])]
        if "kernel" not in callee.attrs:
            return None
        key = (callee.name, tuple(terms))
        if key not in self.kernels:
            *violations, results = self.function(callee, terms)
            valid = not violations and isinstance(results, tuple)
            self.kernels[key] = results if valid else None  # type: ignore[assignment]
        return self.kernels[key]

    def check(self) -> Iterator[Violation]:
        """Violations in all functions; kernels may take and return terms, others may not."""
        for function in self.functions.values():
            for item in self.function(function, [None] * len(function.params)):
                if isinstance(item, Violation):
                    yield item
                    continue
                for value, term in zip(function.results, item, strict=True):
                    if term is not None and "kernel" not in function.attrs:
                        message = f"{value} is returned, but its log-sum-exp fix-up is missing"
                        yield Violation(message, function, len(function.ops), "W0203")


RULES: tuple[Rule, ...] = (
    op_rule("collective", "a collective changes its axis as its op says, no other", _collective,
            "W0203"),
    op_rule("crossing", "a transfer between meshes of different shape says its other end",
            lambda module, op: wrong_ends(op) if crosses(op) else "", "W0203"),
    Rule("lse-terms", "terms of a log-sum-exp are read by their fix-up only",
         lambda module: _Terms(module).check()),
)  # fmt: skip
