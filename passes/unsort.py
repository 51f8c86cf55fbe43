"""Rows that are sorted, worked on one by one, and put back in order need not be sorted.

A mixture of experts sorts its tokens by expert for the grouped product, whose op takes rows in any
order. A sort needs all rows on a rank; without it, tokens stay where the batch was split.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..ir.module import Function, Namer, Op, Value
from ..ir.opdef import OPS, full_attrs, signature_of
from .dead_code import without_dead_ops

#: ops that treat rows alike wherever they stand, besides the pointwise ones
_ROW_WISE = frozenset({
    "reshape", "permute", "expand", "slice", "concat", "take", "gather", "einsum",
    "grouped_product", "softmax", "log_softmax", "logsumexp", "rms_norm", "layer_norm",
    "reduce_sum", "reduce_max", "reduce_min", "reduce_prod",
})  # fmt: skip


@dataclass(frozen=True)
class _Rows:
    """A value with rows in the order of a sort.

    Attributes:
        sort: the name of the sort's second result, the order.
        origin: the value with its rows in their first order.
        dim: the dim of the rows.
    """

    sort: str
    origin: Value
    dim: int


def unsort(function: Function) -> Function:
    """The function without the sorts of rows that are undone again.

    before:  %k, %p = sort(%e) {dim = 0}          after:  %y = exp(%x)
             %a = take(%x, %p) {dim = 0}
             %b = exp(%a)
             %q = scatter(%z, %p, %iota) {dim = 0}
             %y = take(%b, %q) {dim = 0}
    """
    sorts = {op.results[1].name for op in function.ops if _is_sort(op)}
    while sorts:
        out = without_dead_ops(_Unsorter(function, sorts).run())
        alive = {op.results[1].name for op in out.ops if _is_sort(op)} & sorts
        if not alive:
            return out
        sorts -= alive  # these stay: keep what was made of them as it was
    return function


def _is_sort(op: Op) -> bool:
    return op.name == "sort" and len(op.operands[0].type.shape) == 1


class _Unsorter:
    """One walk: next to each value with sorted rows, the same value unsorted."""

    def __init__(self, function: Function, sorts: set[str]) -> None:
        self.function, self.sorts = function, sorts
        names = [v.name for v in function.params]
        self.namer = Namer((*names, *(v.name for op in function.ops for v in op.results)))
        self.ops: list[Op] = []
        self.defs: dict[str, Op] = {}
        self.rows: dict[str, _Rows] = {}

    def run(self) -> Function:
        """The function with each reordering back replaced by what is in order."""
        env: dict[str, Value] = {}
        for op in self.function.ops:
            operands = tuple(env.get(v.name, v) for v in op.operands)
            op = op if operands == op.operands else op.with_(operands=operands)
            found = self._in_order(op)
            if found is not None:
                env[op.result.name] = found
                continue
            self.ops.append(op)
            self.defs.update((v.name, op) for v in op.results)
            self._follow(op)
        results = tuple(env.get(v.name, v) for v in self.function.results)
        return self.function.with_(ops=tuple(self.ops), results=results)

    def _in_order(self, op: Op) -> Value | None:
        """What an op gives that takes rows back to their first order."""
        if op.name != "take":
            return None
        rows = self.rows.get(op.operands[0].name)
        if rows is None or op.attrs["dim"] != rows.dim:
            return None
        return rows.origin if self._inverse(op.operands[1]) == rows.sort else None

    def _follow(self, op: Op) -> None:
        """Note what an op makes of sorted rows."""
        if _is_sort(op) and op.results[1].name in self.sorts:
            keys, order = op.results
            self.rows[keys.name] = _Rows(order.name, op.operands[0], 0)
            line = Value(self.namer(order.name), order.type)
            self._add(Op("iota", (), (line,), {"dim": 0}, loc=op.loc))
            self.rows[order.name] = _Rows(order.name, line, 0)
        elif any(v.name in self.rows for v in op.operands):
            self._row_wise(op)

    def _add(self, op: Op) -> None:
        self.ops.append(op)
        self.defs.update((v.name, op) for v in op.results)

    def _row_wise(self, op: Op) -> None:
        """An op on sorted rows that treats them alike: do the same to the unsorted ones."""
        if OPS[op.name].family != "pointwise" and op.name not in _ROW_WISE:
            return
        known = [self.rows.get(v.name) for v in op.operands]
        sorts = {rows.sort for rows in known if rows is not None}
        signature = signature_of(op)
        dims = {
            tensor[rows.dim]
            for tensor, rows in zip(signature.operands, known, strict=True) if rows is not None
        }  # fmt: skip
        if len(sorts) != 1 or len(dims) != 1:
            return
        (sort,), (factors,) = sorts, dims
        others = [t for t, rows in zip(signature.operands, known, strict=True) if rows is None]
        if len(factors) != 1 or signature.dims[factors[0]].whole:
            return
        if any(factors[0] in dim for tensor in others for dim in tensor):
            return
        places = [signature.position(tensor, factors[0]) for tensor in signature.results]
        if any(place is None or tensor[place] != factors
               for place, tensor in zip(places, signature.results, strict=True)):  # fmt: skip
            return
        operands = tuple(v if rows is None else rows.origin
                         for v, rows in zip(op.operands, known, strict=True))  # fmt: skip
        results = tuple(Value(self.namer(v.name), v.type) for v in op.results)
        self._add(op.with_(operands=operands, results=results))
        for old, new, place in zip(op.results, results, places, strict=True):
            self.rows[old.name] = _Rows(sort, new, place or 0)

    # -- the way back -----------------------------------------------------------------------------

    def _inverse(self, index: Value) -> str | None:
        """The sort whose order `index` undoes: 0, 1, ... scattered to it, or its own sort."""
        index = self._same(index)
        op = self.defs.get(index.name)
        if op is None:
            return None
        if _is_sort(op) and index == op.results[1]:
            return self._order(op.operands[0])
        if op.name != "scatter" or op.attrs["dim"] != 0:
            return None
        base, where, line = op.operands
        counts = self.defs.get(self._same(line).name)
        if base.type.numel != where.type.numel or base.type.shape[0] != base.type.numel:
            return None
        if counts is None or counts.name != "iota" or not base.type.numel:
            return None
        attrs = full_attrs("iota", counts.attrs)
        whole = counts.result.type.shape[int(attrs["dim"])] == base.type.numel  # type: ignore[arg-type]
        plain = (attrs["start"], attrs["step"]) == (0, 1)
        return self._order(where) if whole and plain else None

    def _order(self, index: Value) -> str | None:
        """The sort of which a vector is the order."""
        name = self._same(index).name
        op = self.defs.get(name)
        return name if op is not None and name in self.sorts else None

    def _same(self, index: Value) -> Value:
        """The first value with the same positions: without views, casts, and remainders of what
        is small."""
        while True:
            op = self.defs.get(index.name)
            if op is None or op.name not in ("reshape", "cast", "remainder"):
                return index
            if op.operands[0].type.dtype != "i64" or index.type.dtype != "i64":
                return index
            if op.name == "remainder" and not self._at_least(op.operands[1], index.type.numel):
                return index
            index = op.operands[0]

    def _at_least(self, x: Value, least: int) -> bool:
        op = self.defs.get(x.name)
        value = op.attrs["value"] if op is not None and op.name == "constant" else None
        return isinstance(value, int) and value >= least
