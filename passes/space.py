"""The iteration space of a region: which ops can share the loops of one kernel.

A region is a set of ops without a call or a collective. Its space is `rows x column`: row dims,
each of which a program handles independently, and one column dim, along which a row may be reduced,
cut or joined. The space follows from the dimension algebra alone: every iteration dim of every op
is a variable, a tensor dim that two ops touch makes their variables equal, and what is left are the
dims of the space. `passes/fuse.py` asks whether a region has a space before it makes a kernel of
it; `codegen/` asks for it again when it prints that kernel.

Tensor dims of global size 1 are in no dim of the space: they broadcast.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from math import prod

from ..ir.module import Op, Value
from ..ir.opdef import OPS, full_attrs, signature_of
from ..ir.signature import SignatureError

#: the column, where a map names dims of the space
COLUMN = -1
#: ops without arithmetic that a kernel absorbs as index expressions
VIEWS = frozenset({"constant", "iota", "expand", "reshape", "permute", "slice"})
#: Longest column along which rows may be summed. The sums are kept in registers while a program
#: walks its rows, so the whole column has to fit, as for a row that is kept in registers.
ROW_SUM_COLUMNS = 8192
#: Longest single row that a kernel reduces: one program walks it, at the bandwidth of one SM (about
#: 25 GB/s of an H100's 3.3 TB/s over 132), in 2.6 us at 4 bytes each, less than another launch.
ONE_ROW_COLUMNS = 16384
#: ops whose results behind the first are sums over all rows
NORM_BACKWARD = frozenset({"layer_norm_backward", "rms_norm_backward"})
#: ops whose operands and results have columns of different length
RESIZING = frozenset({"slice", "concat", "pad"})


class NoSpace(ValueError):
    """The ops cannot share one iteration space; the message says why."""


@dataclass(frozen=True, slots=True)
class Extent:
    """A dim of the space: its global size, and the positions of the mesh axes that split it."""

    size: int
    axes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Space:
    """The space of a region.

    Attributes:
        rows: the row dims, outermost first.
        column: the column dim; None where every value has row dims only.
        maps: for each value, and each of its dims: an index into `rows`, `COLUMN`, or None where
            the dim has size 1. A value whose column is shorter or longer than the space's (a
            `slice` was taken, or is to be) has `COLUMN` as well.
        reduces: some op reduces the column or needs it whole.
        row_sums: the results that are sums over all rows.
    """

    rows: tuple[Extent, ...]
    column: Extent | None
    maps: Mapping[str, tuple[int | None, ...]]
    reduces: bool
    row_sums: frozenset[str] = frozenset()

    @property
    def points(self) -> int:
        """Number of points of the (global) space."""
        return prod(r.size for r in self.rows) * (self.column.size if self.column else 1)


def parameters(ops: Iterable[Op]) -> list[Value]:
    """Values that the ops read and do not define, in the order of their first use."""
    defined: set[str] = set()
    found: dict[str, Value] = {}
    for op in ops:
        for value in op.operands:
            if value.name not in defined:
                found.setdefault(value.name, value)
        defined.update(result.name for result in op.results)
    return list(found.values())


def row_sums(op: Op) -> tuple[Value, ...]:
    """The results that are sums over all dims but the last one: gradients of biases and norm weights."""
    shape = op.operands[0].type.shape if op.operands else ()
    present = [d for d, size in enumerate(shape) if size > 1]
    if op.name in NORM_BACKWARD:
        return op.results[1:] if present != [len(shape) - 1] else ()
    if op.name != "reduce_sum":
        return ()
    dims = op.attrs["dims"]
    assert isinstance(dims, tuple)
    sums = len(present) > 1 and [d for d in present if d not in dims] == present[-1:]
    return op.results if sums else ()


def column_dims(op: Op) -> tuple[str, ...]:
    """Iteration dims that make the column: reduced, needed whole, cut or joined. Raises NoSpace."""
    attrs = full_attrs(op.name, op.attrs)
    family = OPS[op.name].family
    if family == "row":
        return ("n",)
    if family == "reduction" and not row_sums(op):
        dims, shape = attrs["dims"], op.operands[0].type.shape
        assert isinstance(dims, tuple)
        names = tuple(f"a{d}" for d in dims if shape[int(str(d))] > 1)
        if len(names) != 1:
            raise NoSpace(f"{op.name} over {len(names)} dims")
        return names
    if op.name in RESIZING:
        rank = len(op.result.type.shape)
        last = f"_{rank - 1}"
        whole = tuple(name for name, dim in signature_of(op).dims.items() if dim.whole)
        if not all(name.endswith(last) for name in whole):
            raise NoSpace(f"{op.name} of a dim other than the last")
        return whole
    return ()


@dataclass
class _Classes:
    """Union-find over variables: `(value name, dim)` and `(op position, iteration dim)`."""

    parent: dict[Hashable, Hashable] = field(default_factory=dict)

    def find(self, key: Hashable) -> Hashable:
        """The representative of a variable's class."""
        path = []
        while (up := self.parent.setdefault(key, key)) != key:
            path.append(key)
            key = up
        for item in path:
            self.parent[item] = key
        return key

    def union(self, left: Hashable, right: Hashable) -> None:
        """Make two variables equal."""
        self.parent[self.find(left)] = self.find(right)


class _Analysis:
    """Works out the space of one region; see `analyse`."""

    def __init__(self, ops: Sequence[Op], outputs: Iterable[str]) -> None:
        self.ops, self.outputs = ops, frozenset(outputs)
        self.params = parameters(ops)
        self.values: dict[str, Value] = {}
        self.classes = _Classes()
        self.marks: set[Hashable] = set()  # classes that have to be the column
        self.wanted: set[Hashable] = set()  # of these, the ones that a loop runs over
        self.extents: dict[Hashable, Extent] = {}

    def run(self) -> Space:
        self.unify()
        self.measure()
        if self.align():
            self.extents.clear()
            self.measure()
        self.mark_columns()
        column = self.pick_column()
        rows = self.order_rows()
        index = {cls: position for position, cls in enumerate(rows)}
        maps = {
            name: tuple(
                None if size == 1 else index.get(self.classes.find((name, d)), COLUMN)
                for d, size in enumerate(value.type.shape)
            )
            for name, value in self.values.items()
        }
        sums = frozenset(value.name for op in self.ops for value in row_sums(op))
        extents = tuple(self.extents[cls] for cls in rows)
        space = Space(extents, column, maps, bool(self.wanted), sums)
        self.check(space)
        return space

    def unify(self) -> None:
        """Tensor dims made of one iteration dim are equal to it."""
        for position, op in enumerate(self.ops):
            try:
                signature = signature_of(op)
            except SignatureError as error:
                raise NoSpace(str(error)) from error
            tensors = (*op.operands, *op.results)
            for value, factors in zip(tensors, signature.operands + signature.results, strict=True):
                self.values[value.name] = value
                for d, size in enumerate(value.type.shape):
                    if size == 1:
                        continue
                    names = [name for name in factors[d] if signature.size(name) > 1]
                    if len(names) != 1:
                        raise NoSpace(f"{op.name} splits or joins dims")
                    self.classes.union((value.name, d), (position, names[0]))

    def measure(self) -> None:
        """Size and mesh axes of each class: they must agree, also on shards."""
        for name, value in self.values.items():
            for d, size in enumerate(value.type.shape):
                if size == 1:
                    continue
                placements = value.type.placement or ()
                axes = tuple(
                    axis for axis, p in enumerate(placements) if p.kind == "S" and p.dim == d
                )
                cls = self.classes.find((name, d))
                extent = Extent(size, axes)
                if self.extents.setdefault(cls, extent) != extent:
                    raise NoSpace(f"%{name} is split in another way than its neighbours")

    def align(self) -> bool:
        """Make dims of unrelated results equal where they have the same extents in the same order.

        Queries and keys of a rotary embedding share positions and columns, but not their heads; as
        one space they are one kernel that reads sine and cosine once.
        """
        first: list[Hashable] = []
        changed = False
        for op in self.ops:
            for result in op.results:
                dims = self.dims_of(result.name) if result.name in self.outputs else []
                first = first or dims
                if len(dims) != len(first):
                    continue
                for left, right in zip(first, dims, strict=True):
                    left, right = self.classes.find(left), self.classes.find(right)
                    if left == right or self.extents[left] != self.extents[right]:
                        continue
                    if not any({left, right} <= {*self.dims_of(name)} for name in self.values):
                        self.classes.union(left, right)
                        extent = self.extents[left]
                        self.extents[self.classes.find(left)] = extent
                        changed = True
        return changed

    def mark_columns(self) -> None:
        """Which classes are the column, and which of them a loop has to run over."""
        for position, op in enumerate(self.ops):
            names = column_dims(op)
            for name in names:
                cls = self.classes.find((position, name))
                if cls in self.extents:
                    self.marks.add(cls)
            if names and op.name not in RESIZING:
                self.wanted.update(self.classes.find((position, name)) for name in names)
        self.wanted &= self.extents.keys()
        if not self.marks:
            return
        # a class that only ever stands where the column would, and has its size, is the column
        size = {self.extents[cls] for cls in self.marks}
        for name, value in self.values.items():
            present = self.dims_of(name)
            if present and present[-1] not in self.marks and self.extents[present[-1]] in size:
                candidate = present[-1]
                if all(
                    candidate not in dims or (dims[-1] == candidate and not self.marks & {*dims})
                    for dims in map(self.dims_of, self.values)
                ):
                    self.marks.add(candidate)

    def dims_of(self, name: str) -> list[Hashable]:
        """Classes of a value's dims, in order."""
        shape = self.values[name].type.shape
        return [self.classes.find((name, d)) for d, size in enumerate(shape) if size > 1]

    def pick_column(self) -> Extent | None:
        if not self.marks:
            last = [dims[-1] for name in self.outputs if (dims := self.dims_of(name))]
            if not last:
                return None
            self.marks = {max(last, key=lambda cls: (last.count(cls), str(cls)))}
        loops = set(self.wanted)
        for name in self.outputs:
            loops |= self.marks & set(self.dims_of(name))
        if not loops:
            return None
        extents = {self.extents[cls] for cls in self.marks}
        if len(extents) > 1 and any(extent.axes for extent in extents):
            raise NoSpace("columns of several lengths, some of which are split")
        return max((self.extents[cls] for cls in loops), key=lambda extent: extent.size)

    def order_rows(self) -> list[Hashable]:
        """Row classes in the order in which the results of the ops have them."""
        rows = [cls for cls in self.extents if cls not in self.marks]
        after: dict[Hashable, set[Hashable]] = {cls: set() for cls in rows}
        for op in self.ops:
            if op.name in VIEWS:
                continue
            for result in op.results:
                dims = self.dims_of(result.name)
                if any(cls in self.marks for cls in dims[:-1]):
                    raise NoSpace(f"%{result.name} does not have the column as its last dim")
                dims = [cls for cls in dims if cls not in self.marks]
                for left, right in zip(dims, dims[1:], strict=False):
                    after[left].add(right)
        rank = {cls: position for position, cls in enumerate(rows)}
        waits = {cls: sum(cls in later for later in after.values()) for cls in rows}
        ready = [rank[cls] for cls in rows if not waits[cls]]
        heapify(ready)
        order: list[Hashable] = []
        while ready:
            cls = rows[heappop(ready)]
            order.append(cls)
            for later in after[cls]:
                waits[later] -= 1
                if not waits[later]:
                    heappush(ready, rank[later])
        if len(order) != len(rows):
            raise NoSpace("the ops order their dims in different ways")
        return order

    def check(self, space: Space) -> None:
        every = list(range(len(space.rows)))
        for op in self.ops:
            if column_dims(op) and op.name not in RESIZING:
                rows = {row for row in space.maps[op.operands[0].name] if row is not None}
                if not every and (space.column is None or space.column.size > ONE_ROW_COLUMNS):
                    raise NoSpace(f"{op.name} of one long row, which one program would walk")
                if not rows >= set(every):
                    raise NoSpace(f"{op.name} of fewer rows than the kernel has")
        self.check_row_sums(space)
        for name in self.outputs - space.row_sums:
            if [row for row in space.maps[name] if row not in (None, COLUMN)] != every:
                raise NoSpace(f"%{name} is smaller than the space")
        for value in self.params:
            present = [row for row in space.maps[value.name] if row is not None]
            if COLUMN in present[:-1]:
                raise NoSpace(f"%{value.name} does not have the column as its last dim")
        carried = {row for value in self.params for row in space.maps[value.name]}
        if not carried >= set(every):
            raise NoSpace("a row dim is in no operand")
        if space.column is not None and space.column.axes and COLUMN not in carried:
            raise NoSpace("the column is in no operand")

    def check_row_sums(self, space: Space) -> None:
        """Sums over rows are of all rows, of the whole column, and read outside only."""
        if not space.row_sums:
            return
        column = space.column
        if column is None or not space.rows or column.size > ROW_SUM_COLUMNS:
            raise NoSpace("a column too long for sums over rows")
        for op in self.ops:
            if any(value.name in space.row_sums for value in op.operands):
                raise NoSpace(f"{op.name} reads a sum over all rows")
            if row_sums(op):
                value = op.operands[0]
                have = [place for place in space.maps[value.name] if place is not None]
                if sorted(have) != [COLUMN, *range(len(space.rows))]:
                    raise NoSpace(f"%{value.name} is summed over fewer rows than the kernel has")
                if value.type.shape[space.maps[value.name].index(COLUMN)] != column.size:
                    raise NoSpace(f"%{value.name} has a column of another length")


def analyse(ops: Sequence[Op], outputs: Iterable[str]) -> Space:
    """The space of a region.

    Args:
        ops: the ops in program order; each has a signature.
        outputs: names of the results that are read outside of the region. Each must have all row
            dims, so that every element is stored once.

    Raises NoSpace where the ops do not share one.
    """
    return _Analysis(ops, outputs).run()
