"""Matrix products that take the region behind them as an epilogue: one kernel writes its results.

A product joins a region when the region alone reads its result, element by element, so that what
follows the product happens to its sums in registers. No path leaves the union and comes back: all
paths from the product go through the region.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..ir.module import Function, Op, Value
from ..ir.signature import parse_signature
from .regions import Region
from .space import COLUMN, Space, parameters

#: dtypes that matrix units multiply and sum in f32; f32 itself is exact in libraries alone
DTYPES = frozenset({"bf16", "f16"})
#: ops of a region that stay within a point of the tile
_NOT_POINTWISE = frozenset({"slice", "concat", "pad", "iota", "permute"})


@dataclass(frozen=True)
class Orders:
    """How an einsum is one product `c[m, n]` of `a` and `b`.

    Attributes:
        a, b: positions of the operands: b has the last dims of the result.
        a_order, b_order: `mk` or `km`, `nk` or `kn`: dims as stored.
    """

    a: int
    b: int
    a_order: str
    b_order: str


def orders(op: Op) -> Orders | None:
    """The product that an einsum is on matrices whose last dim is one dim; None where it is none."""
    if op.name != "einsum" or op.result.type.dtype not in DTYPES:
        return None
    template = parse_signature(str(op.attrs["spec"]))
    left, right = ([item.names[0] for item in tensor] for tensor in template.operands)
    out = [item.names[0] for item in template.results[0]]
    for a, b in ((left, right), (right, left)):
        k = [name for name in a if name in b]
        m, n = ([name for name in own if name not in k] for own in (a, b))
        if not k or set(k) & set(out) or out != m + n or len(n) != 1 or not m:
            continue
        a_order = "mk" if a == m + k and len(k) == 1 else "km" if a == k + m and len(m) == 1 else ""
        b_order = "nk" if b == n + k and len(k) == 1 else "kn" if b == k + n else ""
        if a_order and b_order:
            return Orders(int(a is right), int(b is right), a_order, b_order)
    return None


def is_epilogue(result: Value, ops: Sequence[Op], outputs: Iterable[Value], space: Space) -> bool:
    """Can a region happen to the sums of a product with this result?"""
    if space.reduces or space.row_sums or any(op.name in _NOT_POINTWISE for op in ops):
        return False
    rows = list(range(len(space.rows)))

    def places(value: Value) -> list[int]:
        return [place for place in space.maps[value.name] if place is not None]

    whole = [*rows, COLUMN]
    if places(result) != whole or any(places(value) != whole for value in outputs):
        return False
    allowed: list[list[int]] = [whole, rows, [COLUMN], []]
    return all(places(value) in allowed for value in parameters(ops))


def join_products(
    function: Function, regions: Sequence[Region], readers: Mapping[str, set[int]]
) -> list[Region]:
    """The regions of a function, each with one product in front of it where one fits.

    `readers` are the ops that read a value, through views; -1 is the function's end.
    """
    products = {op.result.name: i for i, op in enumerate(function.ops) if orders(op) is not None}
    joined = []
    for region in regions:
        fitting = (
            value for value in parameters(region.ops)
            if value.name in products and readers[value.name] <= set(region.members)
            and is_epilogue(value, region.ops, region.outputs, region.space)
        )  # fmt: skip
        found = next(fitting, None)
        if found is not None:
            i = products[found.name]
            members = tuple(sorted((i, *region.members)))
            region = Region((function.ops[i], *region.ops), members, region.outputs, region.space)
        joined.append(region)
    return joined


def attentions(function: Function) -> list[Region]:
    """The ops of attention that a kernel computes, each a region of its own."""
    nothing = Space((), None, {}, False)
    return [
        Region((op,), (i,), op.results, nothing)
        for i, op in enumerate(function.ops)
        if op.name == "attention" and is_kernel(op)
    ]


def is_kernel(op: Op) -> bool:
    """Is there a kernel for an attention? It has no dropout, and knows no part of a causal sequence."""
    q, k = op.operands[:2]
    places = [place for value in (q, k) for place in value.type.placement or ()]
    part = op.attrs.get("causal") and any(p.kind == "S" and p.dim == 2 for p in places)
    return not op.attrs.get("dropout") and not part and q.type.dtype in ("bf16", "f16", "f32")


__all__ = ["Orders", "attentions", "is_epilogue", "is_kernel", "join_products", "orders"]
