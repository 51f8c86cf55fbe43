"""Expressions over one point of a kernel's iteration space: a DAG, equal nodes being one node.

Dtypes of nodes are compute dtypes: f64 and f32 for floats (narrower floats are widened when they
are loaded), the storage dtype for the rest. `a * b`, `a < b` and so on build nodes; numbers are
lifted to the dtype of the other side, and sides of different dtypes are promoted.
"""

from __future__ import annotations

from dataclasses import dataclass

#: dtypes of nodes, in the order in which they are promoted
RANK = ("bool", "u8", "i8", "i16", "i32", "i64", "f32", "f64")
COMPARISONS = frozenset({"eq", "ne", "lt", "le", "gt", "ge"})
#: reductions over the column, with what they start from
NEUTRAL = {"sum": 0.0, "max": float("-inf"), "min": float("inf")}
_LIMITS = {"u8": (0, 255), "i8": (-(2**7), 2**7 - 1), "i16": (-(2**15), 2**15 - 1),
           "i32": (-(2**31), 2**31 - 1), "i64": (-(2**63), 2**63 - 1)}  # fmt: skip

Number = bool | int | float


def compute_dtype(dtype: str) -> str:
    """The dtype in which values of a storage dtype are computed."""
    return "f32" if dtype in ("f16", "bf16", "f8e4m3", "f8e5m2") else dtype


def promote(left: str, right: str) -> str:
    """The dtype that holds both."""
    return max(left, right, key=RANK.index)


def neutral(kind: str, dtype: str) -> Number:
    """What a reduction starts from."""
    if dtype.startswith("f"):
        return NEUTRAL[kind]
    if kind == "sum":
        return 0
    return _LIMITS[dtype][0 if kind == "max" else 1]


@dataclass(frozen=True, eq=False, slots=True)
class Node:
    """A value at each point of the space.

    Attributes:
        op: `load`, `const`, `column`, `row`, `reduce`, `row_sum`, `cast`, `round`, or a key of
            `printer.SOURCES`.
        args: operands.
        dtype: compute dtype.
        rows, column: does the value vary along rows, along the column?
        data: of a load: (parameter, shift of the column); of a constant: (number,); of `column`:
            (shift,); of `row`: (row dim,); of a reduction: (kind, length of its column); of
            `round`: (storage dtype,).
        depth: number of reductions on the longest path to the node.
    """

    graph: Graph
    op: str
    args: tuple[Node, ...]
    dtype: str
    rows: bool
    column: bool
    data: tuple[Number | str, ...] = ()
    depth: int = 0

    def __add__(self, other: Node | Number) -> Node:
        return self.graph.binary("add", self, other)

    def __radd__(self, other: Number) -> Node:
        return self.graph.binary("add", other, self)

    def __sub__(self, other: Node | Number) -> Node:
        return self.graph.binary("sub", self, other)

    def __rsub__(self, other: Number) -> Node:
        return self.graph.binary("sub", other, self)

    def __mul__(self, other: Node | Number) -> Node:
        return self.graph.binary("mul", self, other)

    def __rmul__(self, other: Number) -> Node:
        return self.graph.binary("mul", other, self)

    def __truediv__(self, other: Node | Number) -> Node:
        return self.graph.binary("div", self, other)

    def __rtruediv__(self, other: Number) -> Node:
        return self.graph.binary("div", other, self)

    def __neg__(self) -> Node:
        return self.graph.unary("neg", self)

    def __lt__(self, other: Node | Number) -> Node:
        return self.graph.binary("lt", self, other)

    def __le__(self, other: Node | Number) -> Node:
        return self.graph.binary("le", self, other)

    def __gt__(self, other: Node | Number) -> Node:
        return self.graph.binary("gt", self, other)

    def __ge__(self, other: Node | Number) -> Node:
        return self.graph.binary("ge", self, other)

    def equals(self, other: Node | Number) -> Node:
        """Where both are equal."""
        return self.graph.binary("eq", self, other)

    def differs(self, other: Node | Number) -> Node:
        """Where they are not equal."""
        return self.graph.binary("ne", self, other)

    def to(self, dtype: str) -> Node:
        """Converted to another compute dtype."""
        return self.graph.cast(self, dtype)


class Graph:
    """Makes nodes, each distinct one once."""

    def __init__(self) -> None:
        self._nodes: dict[object, Node] = {}

    def make(
        self,
        op: str,
        args: tuple[Node, ...],
        dtype: str,
        data: tuple[Number | str, ...] = (),
        *,
        rows: bool | None = None,
        column: bool | None = None,
    ) -> Node:
        """The node with these fields; it varies along what its operands vary along."""
        # repr tells 0.0 from -0.0, from 0 and from False
        key = (op, tuple(id(arg) for arg in args), dtype, repr(data), rows, column)
        if key not in self._nodes:
            rows = any(arg.rows for arg in args) if rows is None else rows
            column = any(arg.column for arg in args) if column is None else column
            depth = max((arg.depth for arg in args), default=0) + (op == "reduce")
            self._nodes[key] = Node(self, op, args, dtype, rows, column, data, depth)
        return self._nodes[key]

    def const(self, value: Number, dtype: str) -> Node:
        """A number."""
        if dtype.startswith("f"):
            value = float(value)
        elif dtype == "bool":
            value = bool(value)
        else:
            value = int(value)
        return self.make("const", (), dtype, (value,))

    def lift(self, value: Node | Number, like: str) -> Node:
        """A number as a node; a node as it is. An integer dtype becomes f32 beside a fraction."""
        if isinstance(value, Node):
            return value
        if isinstance(value, float) and not like.startswith("f"):
            like = "f32"
        return self.const(value, like)

    def binary(self, op: str, left: Node | Number, right: Node | Number) -> Node:
        """A node of two operands, which are promoted; one of them may be a number."""
        like = left.dtype if isinstance(left, Node) else right.dtype  # type: ignore[union-attr]
        left, right = self.lift(left, like), self.lift(right, like)
        dtype = promote(left.dtype, right.dtype)
        args = (self.cast(left, dtype), self.cast(right, dtype))
        return self.make(op, args, "bool" if op in COMPARISONS else dtype)

    def unary(self, op: str, x: Node) -> Node:
        """A node of one operand."""
        return self.make(op, (x,), x.dtype)

    def where(self, condition: Node, yes: Node | Number, no: Node | Number) -> Node:
        """`yes` where the condition holds, else `no`; at most one of them may be a number."""
        like = yes.dtype if isinstance(yes, Node) else no.dtype  # type: ignore[union-attr]
        yes, no = self.lift(yes, like), self.lift(no, like)
        dtype = promote(yes.dtype, no.dtype)
        args = (self.truth(condition), self.cast(yes, dtype), self.cast(no, dtype))
        return self.make("where", args, dtype)

    def truth(self, x: Node) -> Node:
        """x as a condition."""
        return x if x.dtype == "bool" else x.differs(0)

    def both(self, x: Node, y: Node) -> Node:
        """Where both conditions hold."""
        return self.make("and", (self.truth(x), self.truth(y)), "bool")

    def cast(self, x: Node, dtype: str) -> Node:
        """x in another compute dtype."""
        if x.dtype == dtype:
            return x
        if dtype == "bool":
            return self.truth(x)
        if x.op == "const":
            return self.const(x.data[0], dtype)  # type: ignore[arg-type]
        return self.make("cast", (x,), dtype)

    def reduce(self, kind: str, x: Node, length: int) -> Node:
        """Sum, max or min of x over the first `length` columns."""
        return self.make("reduce", (x,), x.dtype, (kind, length), rows=True, column=False)

    def sum(self, x: Node, length: int) -> Node:
        """Sum of x over the first `length` columns."""
        return self.reduce("sum", x, length)
