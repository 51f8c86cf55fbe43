"""Which sizes of a program's inputs may vary, as the user says it.

Two ways to say it, both torch's own: marks on the tensors (`torch._dynamo.mark_dynamic`,
`maybe_mark_dynamic`, `mark_static`), and `dynamic_shapes` with `torch.export.Dim` in the form that
`torch.export.export` takes. Input tensors without a word about them follow: their dims of the size
of a dynamic dim may vary too, since a batch has one size in all its tensors.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim

from ..ir.errors import CompileError
from .capture import VaryingDims

_MARKS = ("_dynamo_dynamic_indices", "_dynamo_weak_dynamic_indices", "_dynamo_unbacked_indices")
_FIXED = "_dynamo_static_indices"


@dataclass(frozen=True)
class Bounds:
    """What the user says of one dim.

    Attributes:
        low, high: least and largest size; None is any.
        name: dims of one name have one size; empty for none.
        value: the size that follows from that of the dim called `name`; itself by default.
    """

    low: int = 0
    high: int | None = None
    name: str = ""
    value: Callable[[int], int] | None = None

    def hold(self, size: int) -> bool:
        """Is a size within the bounds?"""
        return self.low <= size and (self.high is None or size <= self.high)

    def __str__(self) -> str:
        return f"at least {self.low}" if self.high is None else f"{self.low} to {self.high}"


@dataclass(frozen=True)
class DynamicDims:
    """The dynamic dims of the inputs of one call.

    Attributes:
        names: the user's names of the input tensors.
        dims: for each input, its dynamic dims.
        fixed: for each input, the dims that the user wants static; None where nothing was said of
            the input.
    """

    names: tuple[str, ...]
    dims: tuple[Mapping[int, Bounds], ...]
    fixed: tuple[frozenset[int] | None, ...]

    def __bool__(self) -> bool:
        return any(self.dims)

    def check(self, shapes: Sequence[tuple[int, ...]]) -> None:
        """Raise CompileError W0306 for a size out of its bounds, or two for one name."""
        known: dict[str, tuple[int, str]] = {}
        for name, shape, row in zip(self.names, shapes, self.dims, strict=True):
            for dim, bounds in row.items():
                size, what = shape[dim], f"{name}.shape[{dim}]"
                if not bounds.hold(size):
                    raise CompileError(
                        "W0306", f"{what} is {size}, out of its bounds",
                        reason=f"it is dynamic with sizes {bounds}",
                        hint="widen `min` and `max`, or split or pad the batch",
                    )  # fmt: skip
                if bounds.name and bounds.value is None:
                    known.setdefault(bounds.name, (size, what))
        for name, shape, row in zip(self.names, shapes, self.dims, strict=True):
            for dim, bounds in row.items():
                if bounds.name in known:
                    self._equal(f"{name}.shape[{dim}]", shape[dim], bounds, *known[bounds.name])

    @staticmethod
    def _equal(what: str, size: int, bounds: Bounds, root: int, first: str) -> None:
        wanted = root if bounds.value is None else bounds.value(root)
        if size != wanted:
            raise CompileError(
                "W0306", f"{what} is {size}, but {first} is {root}",
                reason=f"both are made of Dim({bounds.name!r}), which makes it {wanted}",
                hint="give dims that differ names of their own",
            )  # fmt: skip

    def varying(self, shapes: Sequence[tuple[int, ...]]) -> VaryingDims:
        """What to trace with symbols: the dynamic dims, and those of other inputs that follow.

        Sizes 0 and 1 are no symbols: operators treat them in another way (broadcasting).
        """
        sizes = {shape[dim] for shape, row in zip(shapes, self.dims, strict=True) for dim in row}
        rows: list[dict[int, tuple[int, int | None]]] = []
        for shape, row, fixed in zip(shapes, self.dims, self.fixed, strict=True):
            wanted: dict[int, tuple[int, int | None]]
            if fixed is None:
                wanted = {d: (0, None) for d, size in enumerate(shape) if size in sizes}
            else:
                wanted = {d: (bounds.low, bounds.high) for d, bounds in row.items()}
            rows.append({d: limits for d, limits in wanted.items() if shape[d] > 1})
        return rows


@dataclass
class Declared:
    """What is known of dynamic dims for one compiled program, over all its calls.

    Args:
        shapes: `dynamic_shapes` of `weft.compile`.

    Attributes:
        version: how often a mark was new.
    """

    shapes: Any = None
    version: int = field(default=0, init=False)
    _marked: dict[str, dict[int, Bounds]] = field(default_factory=dict)

    def of(
        self, program: Callable[..., Any], names: Sequence[str], tensors: Sequence[Tensor]
    ) -> DynamicDims:
        """The dynamic dims of a call. Marks hold for later calls as well.

        Raises CompileError W1001 for `dynamic_shapes` that do not fit the program's inputs.
        """
        said = self._from_shapes(program, names, tensors)
        dims: list[dict[int, Bounds]] = []
        fixed: list[frozenset[int] | None] = []
        for name, tensor in zip(names, tensors, strict=True):
            known = self._marked.get(name, {})
            marks = {**known, **marks_of(tensor)}
            if marks != known:
                self._marked[name] = marks
                self.version += 1
            static = frozenset(getattr(tensor, _FIXED, ()))
            row = {**marks, **said.get(name, {})}
            row = {d: b for d, b in row.items() if d not in static and 0 <= d < tensor.ndim}
            mentioned = name in said or bool(marks) or bool(static)
            dims.append(row)
            fixed.append(frozenset(range(tensor.ndim)) - row.keys() if mentioned else None)
        return DynamicDims(tuple(names), tuple(dims), tuple(fixed))

    def _from_shapes(
        self, program: Callable[..., Any], names: Sequence[str], tensors: Sequence[Tensor]
    ) -> dict[str, dict[int, Bounds]]:
        if self.shapes is None:
            return {}
        table = _by_argument(program, self.shapes)
        found: dict[str, dict[int, Bounds]] = {}
        used: set[str] = set()
        for name, tensor in zip(names, tensors, strict=True):
            for argument, spec in table.items():
                rest = _rest(name, argument)
                if rest is not None and spec is not None:
                    used.add(argument)
                    found[name] = _tensor_spec(_walk(spec, rest, name), name, tensor)
        arguments = {name.partition(".")[0] for name in names}
        for argument, spec in table.items():
            if spec is not None and argument not in used:
                near = get_close_matches(argument, sorted(arguments), 1)
                raise CompileError(
                    "W1001", f"dynamic_shapes: the program has no tensor input {argument!r}",
                    reason=f"its inputs are {', '.join(names) or 'none'}",
                    hint=f"did you mean {near[0]!r}?" if near else "name its parameters",
                )  # fmt: skip
        return found


def marks_of(tensor: Tensor) -> dict[int, Bounds]:
    """What `mark_dynamic` and `maybe_mark_dynamic` left on a tensor."""
    found = {
        dim % tensor.ndim if tensor.ndim else dim: Bounds()
        for name in _MARKS
        for dim in getattr(tensor, name, ())
    }
    for limits in getattr(tensor, "_dynamo_dynamic_range", ()):
        if limits.dim % max(1, tensor.ndim) in found:
            found[limits.dim % tensor.ndim] = Bounds(limits.min or 0, limits.max)
    return found


def _by_argument(program: Callable[..., Any], shapes: Any) -> dict[str, Any]:
    """`dynamic_shapes` by argument names; positions are named by the program's signature."""
    target = program.forward if isinstance(program, torch.nn.Module) else program
    parameters = list(inspect.signature(target).parameters.values())
    if isinstance(shapes, Mapping):
        table = {str(name): spec for name, spec in shapes.items()}
    elif isinstance(shapes, (tuple, list)):
        table = dict(zip((p.name for p in parameters), shapes, strict=False))
    else:
        raise CompileError(
            "W1001", f"dynamic_shapes is {type(shapes).__name__}",
            hint="give a dict from input names, or a tuple in the order of the inputs",
        )  # fmt: skip
    for position, parameter in enumerate(parameters):
        rest = table.get(parameter.name)
        if parameter.kind is parameter.VAR_POSITIONAL and isinstance(rest, (tuple, list)):
            del table[parameter.name]  # inputs behind the named ones are called `args.POSITION`
            table |= {f"args.{position + i}": spec for i, spec in enumerate(rest)}
        if parameter.kind is parameter.VAR_KEYWORD and isinstance(rest, Mapping):
            del table[parameter.name]
            table |= {str(name): spec for name, spec in rest.items()}
    return table


def _rest(name: str, prefix: str) -> str | None:
    """What follows a prefix in the dotted name of an input; None where it does not begin so."""
    if name == prefix:
        return ""
    return name[len(prefix) + 1 :] if name.startswith(f"{prefix}.") else None


def _walk(spec: Any, path: str, name: str) -> Any:
    """The entry of an input in the spec of the argument that holds it."""
    if not path or spec is None:
        return spec
    entries: Any = ()
    if isinstance(spec, Mapping):
        entries = spec.items()
    elif isinstance(spec, (tuple, list)):
        entries = enumerate(spec)
    for key, inner in entries:
        rest = _rest(path, str(key))
        if rest is not None:
            return _walk(inner, rest, name)
    return None


def _tensor_spec(spec: Any, name: str, tensor: Tensor) -> dict[int, Bounds]:
    """The dynamic dims of one tensor. Raises CompileError W1001."""
    if spec is None:
        return {}
    table: Any = dict(enumerate(spec)) if isinstance(spec, (tuple, list)) else spec
    known = range(tensor.ndim)
    if not isinstance(table, Mapping) or not all(key in known for key in table):
        raise CompileError(
            "W1001", f"dynamic_shapes of {name}: {spec!r} does not fit {tensor.ndim} dims",
            hint=f"write {{0: torch.export.Dim('{name}_0')}}, or one entry for each dim",
        )  # fmt: skip
    found = {dim: _bounds(entry, name) for dim, entry in table.items()}
    return {dim: bounds for dim, bounds in found.items() if bounds is not None}


def _bounds(entry: Any, name: str) -> Bounds | None:
    """One dim of `dynamic_shapes`; None for a static one."""
    if entry is None or isinstance(entry, int):
        return None
    if isinstance(entry, type(Dim.AUTO)):
        if entry.type == Dim.STATIC.type:
            return None
        return Bounds(entry.min or 0, entry.max)
    if not isinstance(entry, Dim):
        raise CompileError(
            "W1001", f"dynamic_shapes of {name}: {entry!r} is no dim",
            hint="use torch.export.Dim('name'), Dim.DYNAMIC, Dim.AUTO, Dim.STATIC, or None",
        )  # fmt: skip
    low = entry.min if isinstance(entry.min, int) else 0
    high = entry.max if isinstance(entry.max, int) else None
    root, derive = getattr(entry, "root", None), getattr(entry, "fn", None)
    if root is None or derive is None:
        return Bounds(low, high, entry.__name__)
    return Bounds(low, high, root.__name__, lambda size: int(derive(size)))
