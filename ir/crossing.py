"""What goes from rank to rank where stages have meshes of different shape.

A `send` to a stage of another shape names the mesh and the placement of its receiver, a `recv` those
of its sender (attributes `mesh` and `placement`). The pieces follow from the two placements: each
rank of the receiving stage gets each element of its shard once, from one rank that holds it. Copies
take turns by bytes sent, so that all holders send about as much. Partial values do not cross: they
are reduced, or scattered, before they are sent.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import prod

from .module import Op
from .type_text import TypeTextError, read_type
from .types import DTYPES, Mesh, Placement, TensorType, illegal_placement, local_range

#: (first element, element behind the last) of each dim of a whole tensor
Box = tuple[tuple[int, int], ...]
#: more ranks than any cluster has (`costmodel/cluster.py`)
_MOST_RANKS = 1 << 20
#: pieces are shown in dumps of meshes up to so many ranks
_SHOWN_RANKS = 64
#: attribute `mesh` of a stage of one rank
ALONE = "one rank"


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a tensor that one rank sends to another.

    Attributes:
        source, target: places on the meshes of the sending and of the receiving stage.
        box: the part, in the whole tensor.
    """

    source: int
    target: int
    box: Box

    def bytes(self, dtype: str) -> int:
        """Bytes that are sent."""
        return prod(stop - start for start, stop in self.box) * DTYPES[dtype]

    def __str__(self) -> str:
        parts = ", ".join(f"{start}:{stop}" for start, stop in self.box)
        return f"{self.source}>{self.target} [{parts}]"


def pieces(source: TensorType, mesh: Mesh, target: TensorType, other: Mesh) -> tuple[Piece, ...]:
    """The pieces of a value that goes from one mesh to another, by receiver.

    Args:
        source: its type on the sending stage, whose mesh is `mesh`.
        target: its type on the receiving stage, whose mesh is `other`.

    Neither placement may be partial.
    """
    return _pieces(source, mesh.sizes, target, other.sizes)


@lru_cache(maxsize=4096)
def _pieces(
    source: TensorType, sizes: tuple[int, ...], target: TensorType, others: tuple[int, ...]
) -> tuple[Piece, ...]:
    holders: dict[Box, list[int]] = {}
    for place, box in enumerate(_boxes(source, sizes)):
        holders.setdefault(box, []).append(place)
    cuts = [sorted(set(ranges)) for ranges in zip(*holders, strict=True)]
    sent = [0] * prod(sizes)
    out = []
    for place, wanted in enumerate(_boxes(target, others)):
        near = [
            [cut for cut in dim if cut[0] < stop and start < cut[1]]
            for dim, (start, stop) in zip(cuts, wanted, strict=True)
        ]
        for box in product(*near):
            common = tuple(
                (max(a, c), min(b, d)) for (a, b), (c, d) in zip(box, wanted, strict=True)
            )
            holder = min(holders[box], key=lambda rank: (sent[rank], rank))
            sent[holder] += prod(stop - start for start, stop in common)
            out.append(Piece(holder, place, common))
    return tuple(out)


def _boxes(type: TensorType, sizes: tuple[int, ...]) -> list[Box]:
    """The shard of each rank, in rank order."""
    mesh = Mesh(tuple((str(i), size) for i, size in enumerate(sizes)))
    return [box_of(type, mesh, coord) for coord in mesh.coords()]


def box_of(type: TensorType, mesh: Mesh, coord: tuple[int, ...]) -> Box:
    """The shard at a mesh coordinate, in the whole tensor."""
    ranges = [local_range(type, mesh, coord, dim) for dim in range(len(type.shape))]
    return tuple((start, start + size) for start, size in ranges)


def inside(box: Box, outer: Box) -> list[tuple[int, int]]:
    """(offset, size) of each dim of a box inside of another one."""
    return [(a - c, b - a) for (a, b), (c, _) in zip(box, outer, strict=True)]


# -- attributes ---------------------------------------------------------------------------------


def far_attrs(mesh: Mesh, type: TensorType) -> dict[str, str]:
    """The attributes that say where the other end of a transfer is."""
    axes = ", ".join(f"{name}={size}" for name, size in mesh.axes) or ALONE
    return {"mesh": axes, "placement": ", ".join(map(str, type.placement or ()))}


def crosses(op: Op) -> bool:
    """Is an op a `send` or `recv` between meshes of different shape?"""
    return bool(op.attrs.get("mesh")) and op.name in ("send", "recv")


def own_type(op: Op) -> TensorType:
    """The type of what a `send` or `recv` moves, on its own stage."""
    return (op.operands or op.results)[0].type


def far_end(op: Op) -> tuple[Mesh, TensorType]:
    """The mesh at the other end of a transfer, and the value's type there.

    Raises ValueError that says what is wrong with the attributes.
    """
    mesh = _mesh(str(op.attrs["mesh"]))
    own = own_type(op)
    return mesh, own.placed(_placements(str(op.attrs.get("placement", ""))))


def op_pieces(op: Op, mesh: Mesh) -> tuple[Piece, ...]:
    """The pieces that a crossing `send` or `recv` of a stage on `mesh` moves. ValueError as above."""
    other, far = far_end(op)
    if op.name == "send":
        return pieces(own_type(op), mesh, far, other)
    return pieces(far, other, own_type(op), mesh)


def wrong_ends(op: Op) -> str:
    """Why a crossing `send` or `recv` cannot be; empty when it can."""
    try:
        other, far = far_end(op)
    except ValueError as error:
        return str(error)
    reason = illegal_placement(far, other, far.placement or ())
    if reason:
        return f"{far} cannot be at the other end: {reason}"
    for type in (own_type(op), far):
        if any(placement.kind == "P" for placement in type.placement or ()):
            return f"{op.name} moves {type} to a mesh of another shape: its sum comes first"
    return ""


@lru_cache(maxsize=1024)
def _mesh(text: str) -> Mesh:
    if text == ALONE:
        return Mesh()
    axes = []
    for part in text.split(","):
        name, _, size = part.strip().partition("=")
        if not name or not size.isascii() or not size.isdigit() or len(size) > 9 or not int(size):
            raise ValueError(f"{text!r} is no mesh: write its axes as dp=2, tp=4")
        axes.append((name, int(size)))
    if len({name for name, _ in axes}) < len(axes):
        raise ValueError(f"{text!r} has an axis twice")
    if prod(size for _, size in axes) > _MOST_RANKS:
        raise ValueError(f"{text!r} has more than {_MOST_RANKS} ranks")
    return Mesh(tuple(axes))


@lru_cache(maxsize=1024)
def _placements(text: str) -> tuple[Placement, ...]:
    if not text:
        return ()
    try:
        return tuple(read_type(f"f32[]{{{text}}}").placement or ())
    except TypeTextError:
        raise ValueError(f"{text!r} are no placements: write S(0), B") from None


def comments(ops: Iterable[Op], mesh: Mesh, most: int = 12) -> list[str]:
    """Lines that say the pieces of the crossing ops of a stage, once for each kind of transfer."""
    lines: dict[str, None] = {}
    for op in ops:
        if not crosses(op) or wrong_ends(op):
            continue
        other, far = far_end(op)
        if max(mesh.size, other.size) > _SHOWN_RANKS:
            continue
        found = op_pieces(op, mesh)
        shown = ", ".join(map(str, found[:most]))
        more = f", and {len(found) - most} more" if len(found) > most else ""
        types = (own_type(op), far) if op.name == "send" else (far, own_type(op))
        stage = op.attrs["to" if op.name == "send" else "source"]
        way = f"to stage {stage}" if op.name == "send" else f"from stage {stage}"
        lines[f"{way}: {types[0]} -> {types[1]}: {shown}{more}"] = None
    return list(lines)


__all__ = [
    "Box", "Piece", "box_of", "comments", "crosses", "far_attrs", "far_end", "inside", "op_pieces",
    "own_type", "pieces", "wrong_ends",
]  # fmt: skip
