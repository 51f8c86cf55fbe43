"""How a kernel walks its space: which dims are walked as one, and how large its tiles are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from ..ir.module import Value
from ..ir.types import Mesh
from ..passes.space import COLUMN, Extent
from .expr import Node
from .kernel import Kernel

#: Elements of a tile per program: 8 for each of 128 threads, two 16-byte accesses of bf16.
TILE = 1024
#: Rows up to this length are kept in registers; at 512 threads that is 16 elements a thread for
#: each live tensor, and a kernel with 6 of them stays below the 128 registers a thread may use.
PERSISTENT = 8192
#: Most programs that share the rows where each keeps sums over its rows: two for each of the 132 SMs of
#: an H100. It is a constant so that sums come out the same on every device.
STRIPS = 264
#: Columns per step of a row that is read in a loop.
STEP = 2048


@dataclass(frozen=True)
class Layout:
    """How a kernel walks its space.

    Attributes:
        kind: `flat` (all dims are one), `tile` (rows and columns in tiles, no reduction),
            `persistent` (whole rows in registers) or `looped` (rows read once per reduction).
        groups: row dims in groups that are walked as one, outermost first.
        tail: row dims that are walked together with the column.
        block_m, block_n: rows and columns of a tile.
        columns: length of the column on the rank that has most of it.
        warps: warps of a program.
        strips: most programs that share the rows where sums over rows are kept, each walking a
            part of them; 0 where there are no such sums.
    """

    kind: str
    groups: tuple[tuple[int, ...], ...]
    tail: tuple[int, ...]
    block_m: int
    block_n: int
    columns: int
    warps: int
    strips: int = 0


def nodes_of(kernel: Kernel) -> Iterator[Node]:
    """Every node of a kernel, once, operands first."""
    seen: set[int] = set()
    stack = [(output.node, False) for output in reversed(kernel.outputs)]
    while stack:
        node, done = stack.pop()
        if done:
            yield node
        elif id(node) not in seen:
            seen.add(id(node))
            stack.append((node, True))
            stack += [(arg, False) for arg in reversed(node.args)]


def tensors_of(kernel: Kernel) -> list[Value]:
    """Parameters, then results."""
    return [value for _, value in kernel.params] + [out.value for out in kernel.outputs]


def places(kernel: Kernel, value: Value) -> list[int]:
    """The dims of the space that a tensor has, in the tensor's order."""
    return [place for place in kernel.space.maps[value.name] if place is not None]


def column_length(kernel: Kernel, value: Value) -> int:
    """Global length of a tensor's column; 0 without one."""
    dims = zip(value.type.shape, kernel.space.maps[value.name], strict=True)
    return next((size for size, place in dims if place == COLUMN), 0)


def _adjacent(kernel: Kernel, left: int, right: int) -> bool:
    """Does every tensor have both dims, one right behind the other, or none of them?"""
    for value in tensors_of(kernel):
        have = places(kernel, value)
        if (left in have) != (right in have):
            return False
        if left in have and have.index(right) != have.index(left) + 1:
            return False
    return True


def _plain_column(kernel: Kernel) -> bool:
    """Is the column only an index, so that it may be walked together with rows?"""
    if kernel.space.reduces or kernel.space.row_sums or kernel.space.column is None:
        return False
    size = kernel.space.column.size
    if any(column_length(kernel, value) not in (0, size) for value in tensors_of(kernel)):
        return False
    return not any(
        node.op == "column" or (node.op == "load" and node.data[1]) for node in nodes_of(kernel)
    )


def local_size(extent: Extent, mesh: Mesh | None) -> int:
    """Size of an extent on the rank that has most of it."""
    parts = prod(mesh.sizes[axis] for axis in extent.axes) if mesh is not None else 1
    return -(-extent.size // parts)


def power_of_two(size: int) -> int:
    """The smallest power of two that is not below `size`."""
    return 1 << max(0, size - 1).bit_length()


def layout(kernel: Kernel, mesh: Mesh | None = None, persistent: int = PERSISTENT) -> Layout:
    """Choose a kernel's layout.

    Args:
        mesh: tells how long a split column is on a rank.
        persistent: longest row that is kept in registers.
    """
    space = kernel.space
    fixed = {node.data[0] for node in nodes_of(kernel) if node.op == "row"}
    groups: list[list[int]] = []
    for dim in range(len(space.rows)):
        joined = groups and dim not in fixed and groups[-1][-1] not in fixed
        if joined and _adjacent(kernel, dim - 1, dim):
            groups[-1].append(dim)
        else:
            groups.append([dim])
    tail: list[int] = []
    if groups and _plain_column(kernel) and not fixed & set(groups[-1]):
        if _adjacent(kernel, groups[-1][-1], COLUMN):
            tail = groups.pop()
    shape = (tuple(map(tuple, groups)), tuple(tail))
    columns = local_size(space.column, mesh) if space.column is not None else 1
    columns *= prod(local_size(space.rows[dim], mesh) for dim in tail)
    if not groups and _plain_column(kernel):
        return Layout("flat", *shape, 1, TILE, columns, 4)
    width = power_of_two(columns)
    strips = STRIPS if space.row_sums else 0
    if not space.reduces:
        width = min(width, TILE)
        return Layout("tile", *shape, TILE // width, width, columns, 4, strips)
    if columns > persistent and not strips:
        return Layout("looped", *shape, 1, min(STEP, width), columns, 8)
    warps = 4 * max(1, min(4, width // TILE))
    return Layout("persistent", *shape, max(1, TILE // width), width, columns, warps, strips)
