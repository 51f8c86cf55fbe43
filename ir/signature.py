"""The dimension algebra: one line per op, from which everything about its splits is derived.

Grammar of a signature:  `operand, operand -> result, result ; k=sum, t=lse`

    b           an iteration dim, shared by name between tensors
    a...        zero or more dims, aligned to the right; size 1 broadcasts
    b?          a dim that may be of size 1 (broadcast)
    n!          a dim that must be whole on a rank
    (g r)       a factored tensor dim, major factor first
    (y*p)       a windowed tensor dim; its factors must be whole
    _           a tensor without dims: a scalar
    ; k=sum     how terms are combined when `k`, absent from a result, is split

The one rule (`Signature.placements`): let a mesh axis split iteration dim x. A tensor that has x is
`S(its position)`, an operand without x is `B`, a result without x is `P(combine of x)`. OneFlow's
SBP table follows from it (methods: SBP; Yuan et al., OneFlow, 2021). An op that is linear in some
operands also passes partial sums through: the state `partial(i, ...)`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from math import prod

from .types import B, P, Placement, S

Shape = tuple[int, ...]
#: for each tensor dim, the iteration dims it is made of, major first; () is a broadcast dim
DimMap = tuple[tuple[str, ...], ...]

_ITEM = re.compile(r"\(([^)]*)\)([!?]*)|([A-Za-z_]\w*)(\.\.\.)?([!?]*)")


class SignatureError(ValueError):
    """Shapes that do not fit a signature, or a split that it does not allow."""


@dataclass(frozen=True, slots=True)
class Item:
    """One tensor dim of a pattern."""

    names: tuple[str, ...]
    variadic: bool = False
    optional: bool = False
    whole: bool = False


@dataclass(frozen=True, slots=True)
class Template:
    """A parsed signature, before it meets shapes."""

    operands: tuple[tuple[Item, ...], ...]
    results: tuple[tuple[Item, ...], ...]
    combine: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Dim:
    """An iteration dim: `combine` is empty where a split of a reduced dim is not defined."""

    name: str
    size: int
    whole: bool = False
    combine: str = ""


def _parse_side(text: str) -> tuple[tuple[Item, ...], ...]:
    tensors = []
    depth, current, parts = 0, "", []
    for char in text:
        depth += (char == "(") - (char == ")")
        if char == "," and depth == 0:
            parts.append(current)
            current = ""
        else:
            current += char
    parts.append(current)
    for part in parts:
        items, position = [], 0
        part = "" if part.strip() == "_" else part.strip()
        while position < len(part):
            if part[position].isspace():
                position += 1
                continue
            match = _ITEM.match(part, position)
            if match is None:
                raise SignatureError(f"cannot read {part[position:]!r} in signature {text!r}")
            group, group_flags, name, dots, flags = match.groups()
            position = match.end()
            flags = flags or group_flags or ""
            if group is None:
                names = (name,)
            else:
                names = tuple(group.replace("*", " ").split())
            whole = "!" in flags or (group is not None and "*" in group)
            items.append(Item(names, bool(dots), "?" in flags, whole))
        tensors.append(tuple(items))
    return tuple(tensors)


@lru_cache(maxsize=None)
def parse_signature(text: str) -> Template:
    """Parse a signature line; an empty side means no tensors. Raises SignatureError."""
    body, _, tail = text.partition(";")
    left, arrow, right = body.partition("->")
    if not arrow:
        raise SignatureError(f"no '->' in signature {text!r}")
    combine = []
    for part in filter(None, (p.strip() for p in tail.split(","))):
        name, equals, how = part.partition("=")
        if not equals or how.strip() not in ("sum", "max", "min", "lse"):
            raise SignatureError(f"cannot read combine {part!r} in signature {text!r}")
        combine.append((name.strip(), how.strip()))
    operands = () if not left.strip() else _parse_side(left)
    results = () if not right.strip() else _parse_side(right)
    return Template(operands, results, tuple(combine))


@dataclass(frozen=True)
class Signature:
    """A signature that met the shapes of one op."""

    dims: Mapping[str, Dim]
    operands: tuple[DimMap, ...]
    results: tuple[DimMap, ...]
    linear: tuple[tuple[int, ...], ...] = ()
    #: result placements that replace P(lse): a fix-up in `lower` leaves ordinary values
    lse_results: tuple[Placement, ...] = field(default=())

    @cached_property
    def points(self) -> int:
        """Size of the iteration space."""
        return prod(dim.size for dim in self.dims.values())

    @cached_property
    def chunkable(self) -> tuple[str, ...]:
        """Dims that may be cut into chunks: not whole, and combinable where reduced."""
        return tuple(name for name in self.dims if not self._never(name) and self.size(name) > 1)

    def size(self, name: str) -> int:
        """Size of an iteration dim."""
        return self.dims[name].size

    def position(self, tensor: DimMap, name: str) -> int | None:
        """The tensor dim that contains iteration dim `name`, or None."""
        for position, factors in enumerate(tensor):
            if name in factors:
                return position
        return None

    @cached_property
    def states(self) -> tuple[str, ...]:
        """All states one axis may take, legality for its size aside: dims, then partials."""
        dims = tuple(name for name in self.dims if not self._never(name))
        return dims + tuple(f"partial({', '.join(map(str, group))})" for group in self.linear)

    def _never(self, name: str) -> str:
        """Why a dim can never be split; empty when it can."""
        dim = self.dims[name]
        if dim.whole:
            return f"dim {name} must be whole on a rank"
        for tensor in self.results:
            if self.position(tensor, name) is None and not dim.combine:
                return f"dim {name} is reduced and has no combine"
        for tensor in self.operands + self.results:
            for factors in tensor:
                if name in factors:
                    before = factors[: factors.index(name)]
                    if any(self.dims[other].size > 1 for other in before):
                        return f"dim {name} is not the major factor of ({' '.join(factors)})"
        return ""

    def illegal(self, state: str, parts: int) -> str:
        """Why `state` cannot be cut into `parts` parts in total; empty when it can."""
        if state.startswith("partial("):
            return "" if state in self.states else f"the op is not linear: {state}"
        if state not in self.dims:
            return f"the op has no dim {state}, only {', '.join(self.dims)}"
        reason = self._never(state)
        if reason:
            return reason
        size = self.dims[state].size
        if size < parts:
            return f"dim {state} of size {size} cannot be cut into {parts} parts"
        if size % parts:
            for tensor in self.operands + self.results:
                for factors in tensor:
                    if state in factors and any(
                        self.dims[other].size > 1 for other in factors if other != state
                    ):
                        return (
                            f"dim {state} of size {size}, a factor of ({' '.join(factors)}), "
                            f"does not divide into {parts} equal parts"
                        )
        return ""

    def check(self, states: Sequence[str], sizes: Sequence[int]) -> str:
        """Why the states (one per axis, '' for none) are illegal together; empty when legal."""
        parts: dict[str, int] = {}
        for state, size in zip(states, sizes, strict=True):
            if state:
                parts[state] = parts.get(state, 1) * size
        for state, count in parts.items():
            reason = self.illegal(state, count)
            if reason:
                return reason
        return ""

    def placements(
        self, states: Sequence[str]
    ) -> tuple[tuple[tuple[Placement, ...], ...], tuple[tuple[Placement, ...], ...]]:
        """Placements of operands and of results, each per axis, for one state per axis."""
        per_axis = [self._axis(state) for state in states]
        operands = tuple(
            tuple(axis[0][i] for axis in per_axis) for i in range(len(self.operands))
        )
        results = tuple(tuple(axis[1][i] for axis in per_axis) for i in range(len(self.results)))
        return operands, results

    @lru_cache(maxsize=4096)
    def _axis(self, state: str) -> tuple[tuple[Placement, ...], tuple[Placement, ...]]:
        if not state:
            return (B,) * len(self.operands), (B,) * len(self.results)
        if state.startswith("partial("):
            group = {int(index) for index in state[8:-1].split(",")}
            operands = tuple(P() if i in group else B for i in range(len(self.operands)))
            return operands, (P(),) * len(self.results)
        positions = [self.position(tensor, state) for tensor in self.operands]
        ins = tuple(B if position is None else S(position) for position in positions)
        outs = []
        for index, tensor in enumerate(self.results):
            position = self.position(tensor, state)
            if position is not None:
                outs.append(S(position))
            elif self.dims[state].combine == "lse":
                outs.append(self.lse_results[index])
            else:
                outs.append(P(self.dims[state].combine))
        return ins, tuple(outs)

    def __hash__(self) -> int:
        return id(self)


class _Binder:
    """Matches a template with shapes."""

    def __init__(self, template: Template, ins: Sequence[Shape], outs: Sequence[Shape]) -> None:
        self.template = template
        if len(ins) != len(template.operands) or len(outs) != len(template.results):
            raise SignatureError(
                f"expected {len(template.operands)} operands and {len(template.results)} results, "
                f"got {len(ins)} and {len(outs)}"
            )
        self.tensors = [*zip(template.operands, ins, strict=True)]
        self.tensors += [*zip(template.results, outs, strict=True)]
        self.variadic: dict[str, int] = {}
        for items, shape in self.tensors:
            fixed = sum(not item.variadic for item in items)
            has = any(item.variadic for item in items)
            if len(shape) < fixed or (len(shape) > fixed and not has):
                raise SignatureError(f"rank {len(shape)} does not fit {_show(items)}")
            for item in items:
                if item.variadic:
                    count = len(shape) - fixed
                    name = item.names[0]
                    self.variadic[name] = max(self.variadic.get(name, 0), count)

    def expand(self, items: tuple[Item, ...], rank: int) -> list[Item]:
        """One item per tensor dim."""
        fixed = sum(not item.variadic for item in items)
        out: list[Item] = []
        for item in items:
            if item.variadic:
                total = self.variadic[item.names[0]]
                start = total - (rank - fixed)
                for number in range(start, total):
                    name = f"{item.names[0]}{number}"
                    out.append(Item((name,), optional=True, whole=item.whole))
            else:
                out.append(item)
        return out

    def bind(
        self, linear: tuple[tuple[int, ...], ...], lse_results: tuple[Placement, ...]
    ) -> Signature:
        rows = [(self.expand(items, len(shape)), shape) for items, shape in self.tensors]
        count = len(self.template.operands)
        sizes: dict[str, int] = {}
        for items, shape in rows:
            for item, size in zip(items, shape, strict=True):
                if len(item.names) == 1 and not (item.optional and size == 1):
                    self._set(sizes, item.names[0], size)
        for items, shape in rows:  # dims that are of size 1 everywhere
            for item, size in zip(items, shape, strict=True):
                if len(item.names) == 1:
                    sizes.setdefault(item.names[0], size)
        for _ in range(2):  # a factor may be known only through another group
            for items, shape in rows:
                for item, size in zip(items, shape, strict=True):
                    if len(item.names) > 1 and not item.whole:
                        self._solve(sizes, item, size)
        for items, shape in rows[count:]:
            for item, size in zip(items, shape, strict=True):
                if len(item.names) == 1 and sizes[item.names[0]] != size:
                    raise SignatureError(
                        f"result dim {item.names[0]} is {size}, expected {sizes[item.names[0]]}"
                    )
        whole = {n for items, _ in rows for item in items if item.whole for n in item.names}
        combine = self._combines(sizes)
        dims = {n: Dim(n, s, n in whole, combine.get(n, "")) for n, s in sizes.items()}
        maps = [self._map(items, shape, sizes) for items, shape in rows]
        return Signature(dims, tuple(maps[:count]), tuple(maps[count:]), linear, lse_results)

    def _combines(self, sizes: Iterable[str]) -> dict[str, str]:
        table: dict[str, str] = {}
        for name, how in self.template.combine:
            if name in self.variadic:
                table.update({f"{name}{i}": how for i in range(self.variadic[name])})
            else:
                table[name] = how
        return {name: how for name, how in table.items() if name in sizes}

    @staticmethod
    def _map(items: list[Item], shape: Shape, sizes: Mapping[str, int]) -> DimMap:
        out: list[tuple[str, ...]] = []
        for item, size in zip(items, shape, strict=True):
            wanted = prod(sizes.get(name, 1) for name in item.names)
            broadcast = item.optional and size == 1 and wanted != 1
            out.append(() if broadcast else item.names)
        return tuple(out)

    @staticmethod
    def _set(sizes: dict[str, int], name: str, size: int) -> None:
        if sizes.setdefault(name, size) != size:
            raise SignatureError(f"dim {name} is {sizes[name]} in one tensor and {size} in another")

    @staticmethod
    def _solve(sizes: dict[str, int], item: Item, size: int) -> None:
        unknown = [name for name in item.names if name not in sizes]
        known = prod(sizes[name] for name in item.names if name in sizes)
        if item.optional and size == 1:
            return
        if len(unknown) == 1 and known and size % known == 0:
            sizes[unknown[0]] = size // known
        elif not unknown and known != size:
            raise SignatureError(f"({' '.join(item.names)}) is {known}, but the tensor dim is {size}")
        elif len(unknown) == 1:
            raise SignatureError(f"({' '.join(item.names)}): {size} is not a multiple of {known}")


def _show(items: Iterable[Item]) -> str:
    return "[" + " ".join("(" + " ".join(i.names) + ")" for i in items) + "]"


def instantiate(
    text: str,
    operand_shapes: Sequence[Shape],
    result_shapes: Sequence[Shape],
    linear: tuple[tuple[int, ...], ...] = (),
    lse_results: tuple[Placement, ...] = (),
) -> Signature:
    """Bind a signature to shapes. Raises SignatureError where they do not fit."""
    return _Binder(parse_signature(text), operand_shapes, result_shapes).bind(linear, lse_results)


def reshape_signature(operand: Shape, result: Shape) -> tuple[DimMap, DimMap, dict[str, int]]:
    """Common refinement of two shapes with the same number of elements.

    Returns the factors of each operand dim and of each result dim, and the factors' sizes. Where
    the boundaries of a group do not divide each other, its factors cannot be told apart, and the
    caller must keep the group whole: it then is one factor named `w*`.
    """
    if prod(operand) != prod(result):
        raise SignatureError(f"reshape of {list(operand)} to {list(result)} changes the size")
    ins: list[list[str]] = [[] for _ in operand]
    outs: list[list[str]] = [[] for _ in result]
    sizes: dict[str, int] = {}
    i = j = 0
    # leading dims that stay are factors of their own, those of size 1 as well: an axis of one rank
    # may split them, and the split must have a name behind the reshape too
    named = 0
    while i < min(len(operand), len(result)) and operand[i] == result[i] != 0:
        name = f"u{i}" if operand[i] == 1 else f"r{named}"
        named += operand[i] != 1
        ins[i].append(name)
        outs[i].append(name)
        sizes[name] = operand[i]
        i = j = i + 1
    left = right = 1  # what is left of the current operand dim and of the current result dim
    left_i = right_j = -1
    while True:
        while left == 1 and i < len(operand):
            left, left_i, i = operand[i], i, i + 1
        while right == 1 and j < len(result):
            right, right_j, j = result[j], j, j + 1
        if left == 1 or right == 1 or 0 in (left, right):
            break
        small = min(left, right)
        if left % small or right % small:
            name = f"w{named}"  # no common factor boundary: one opaque factor for both groups
            ins[left_i].append(name)
            outs[right_j].append(name)
            total_in, total_out = left, right
            while total_in != total_out:
                if total_in < total_out:
                    ins[i].append(name)
                    total_in, i = total_in * operand[i], i + 1
                else:
                    outs[j].append(name)
                    total_out, j = total_out * result[j], j + 1
            sizes[name] = total_in
            named += 1
            left = right = 1
            continue
        name = f"r{named}"
        sizes[name] = small
        named += 1
        ins[left_i].append(name)
        outs[right_j].append(name)
        left, right = left // small, right // small
    return tuple(map(tuple, ins)), tuple(map(tuple, outs)), sizes
