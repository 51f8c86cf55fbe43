"""Types: dtypes, meshes, placements, and the arithmetic of shards.

A placement says, for each mesh axis in mesh order, how the ranks along that axis hold a tensor:
`S(dim)` a contiguous part of a dim, `B` the whole (broadcast), `P(combine)` a term that still has
to be combined over the axis. Uneven shards are balanced: `n` over `p` gives the first `n mod p`
ranks one element more. Several axes on one dim nest, the earlier mesh axis being the outer one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from math import prod

#: dtype name -> bytes per element
DTYPES: dict[str, int] = {
    "f64": 8, "f32": 4, "f16": 2, "bf16": 2, "f8e4m3": 1, "f8e5m2": 1,
    "i64": 8, "i32": 4, "i16": 2, "i8": 1, "u8": 1, "bool": 1,
}  # fmt: skip
FLOATS = frozenset({"f64", "f32", "f16", "bf16", "f8e4m3", "f8e5m2"})
#: how partial values are combined over an axis
COMBINES = ("sum", "max", "min")


@dataclass(frozen=True, slots=True)
class Placement:
    """How one mesh axis holds a tensor: kind `S` (with `dim`), `B`, or `P` (with `combine`)."""

    kind: str
    dim: int = -1
    combine: str = ""

    def __str__(self) -> str:
        if self.kind == "S":
            return f"S({self.dim})"
        return "B" if self.kind == "B" else f"P({self.combine})"


B = Placement("B")


@lru_cache(maxsize=None)
def S(dim: int) -> Placement:
    """Split of tensor dim `dim` (>= 0) into contiguous parts."""
    return Placement("S", dim=dim)


@lru_cache(maxsize=None)
def P(combine: str = "sum") -> Placement:
    """Partial value, to be combined by `combine` (one of `COMBINES`)."""
    return Placement("P", combine=combine)


@dataclass(frozen=True, slots=True)
class TensorType:
    """A tensor's dtype, *global* shape and, from the placed level on, its placement per mesh axis.

    At the spmd and schedule levels the shape stays global: the local shape at a mesh coordinate is
    `local_shape(type, mesh, coord)`. So one program serves every rank, uneven shards included.
    """

    dtype: str
    shape: tuple[int, ...]
    placement: tuple[Placement, ...] | None = None

    @property
    def numel(self) -> int:
        """Number of elements of the global tensor."""
        return prod(self.shape)

    @property
    def bytes(self) -> int:
        """Bytes of the global tensor."""
        return self.numel * DTYPES[self.dtype]

    def placed(self, placement: Sequence[Placement] | None) -> TensorType:
        """The same tensor under another placement."""
        return replace(self, placement=None if placement is None else tuple(placement))

    def __str__(self) -> str:
        text = f"{self.dtype}[{', '.join(map(str, self.shape))}]"
        if self.placement is None:
            return text
        return text + "{" + ", ".join(map(str, self.placement)) + "}"


@dataclass(frozen=True, slots=True)
class Mesh:
    """Ranks arranged in a grid with named axes, row-major: the last axis varies fastest.

    `device` is the device kind (`cpu`, `h100`, ...). An empty mesh is a single rank.
    """

    axes: tuple[tuple[str, int], ...] = ()
    device: str = "cpu"

    @property
    def names(self) -> tuple[str, ...]:
        """Axis names in mesh order."""
        return tuple(name for name, _ in self.axes)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Axis sizes in mesh order."""
        return tuple(size for _, size in self.axes)

    @property
    def size(self) -> int:
        """Number of ranks."""
        return prod(self.sizes)

    def axis(self, name: str) -> int:
        """Position of the axis called `name`; raises KeyError."""
        try:
            return self.names.index(name)
        except ValueError:
            raise KeyError(f"mesh has no axis {name!r}, only {', '.join(self.names)}") from None

    def coords(self) -> Iterator[tuple[int, ...]]:
        """Coordinates of all ranks, in rank order."""
        return product(*(range(size) for size in self.sizes))

    def coord(self, rank: int) -> tuple[int, ...]:
        """Coordinate of a rank."""
        out = []
        for size in reversed(self.sizes):
            rank, digit = divmod(rank, size)
            out.append(digit)
        return tuple(reversed(out))

    def rank(self, coord: Sequence[int]) -> int:
        """Rank at a coordinate."""
        rank = 0
        for size, digit in zip(self.sizes, coord, strict=True):
            rank = rank * size + digit
        return rank

    def group(self, rank: int, axes: Sequence[str]) -> tuple[int, ...]:
        """Ranks that differ from `rank` only along `axes`, ordered by their coordinates there."""
        base = list(self.coord(rank))
        positions = [self.axis(name) for name in axes]
        ranks = []
        for digits in product(*(range(self.sizes[p]) for p in positions)):
            for position, digit in zip(positions, digits, strict=True):
                base[position] = digit
            ranks.append(self.rank(base))
        return tuple(ranks)


def shard_size(total: int, parts: int, index: int) -> int:
    """Size of part `index` of a dim of size `total` cut into `parts` balanced parts."""
    return total // parts + (index < total % parts)


def shard_offset(total: int, parts: int, index: int) -> int:
    """First element of part `index` of a dim of size `total` cut into `parts` balanced parts."""
    return index * (total // parts) + min(index, total % parts)


@lru_cache(maxsize=65536)
def local_range(
    type: TensorType, mesh: Mesh, coord: tuple[int, ...], dim: int
) -> tuple[int, int]:
    """(offset, size) of the part of `dim` that the rank at `coord` holds."""
    offset, size = 0, type.shape[dim]
    for placement, parts, index in zip(type.placement or (), mesh.sizes, coord, strict=False):
        if placement.kind == "S" and placement.dim == dim:
            offset += shard_offset(size, parts, index)
            size = shard_size(size, parts, index)
    return offset, size


@lru_cache(maxsize=65536)
def local_shape(type: TensorType, mesh: Mesh, coord: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the shard that the rank at `coord` holds."""
    return tuple(local_range(type, mesh, coord, dim)[1] for dim in range(len(type.shape)))


def local_bytes(type: TensorType, mesh: Mesh) -> int:
    """Bytes of the largest shard (rank 0 holds it: the first parts are never smaller)."""
    coord = (0,) * len(mesh.axes)
    return prod(local_shape(type, mesh, coord)) * DTYPES[type.dtype]


def parts_of(type: TensorType, mesh: Mesh, dim: int) -> int:
    """Number of parts that `dim` is cut into."""
    pairs = zip(type.placement or (), mesh.sizes, strict=False)
    return prod(size for placement, size in pairs if placement == S(dim))


def illegal_placement(type: TensorType, mesh: Mesh, placement: Sequence[Placement]) -> str:
    """Why a tensor cannot be placed so; empty when it can.

    There is one entry for each axis, a dim needs an element for each of its parts, partial values
    have one combine, and only numbers can be summed.
    """
    if len(placement) != len(mesh.axes):
        return f"{len(placement)} placements for {len(mesh.axes)} axes"
    return illegal_parts(type.dtype, type.shape, mesh.sizes, tuple(placement))


@lru_cache(maxsize=65536)
def illegal_parts(
    dtype: str, shape: tuple[int, ...], sizes: tuple[int, ...], placement: tuple[Placement, ...]
) -> str:
    """`illegal_placement` on the parts of its arguments, one placement for each axis size."""
    parts: dict[int, int] = {}
    combines = set()
    for entry, size in zip(placement, sizes, strict=True):
        if entry.kind == "S":
            parts[entry.dim] = parts.get(entry.dim, 1) * size
        elif entry.kind == "P":
            combines.add(entry.combine)
    for dim, count in parts.items():
        if not 0 <= dim < len(shape):
            return f"there is no dim {dim}"
        if shape[dim] < count:
            return f"dim {dim} of size {shape[dim]} cannot be cut into {count} parts"
    if not combines.issubset(COMBINES):
        return f"partial in {', '.join(sorted(combines))}, known: {', '.join(COMBINES)}"
    if len(combines) > 1:
        return f"partial in {' and '.join(sorted(combines))} at once"
    if "sum" in combines and dtype == "bool":
        return "a bool tensor cannot be a sum"
    return ""
