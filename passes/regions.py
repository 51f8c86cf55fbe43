"""Cuts a function into regions of ops that can share a kernel.

Ops join greedily, in program order: an op joins the region of the nearest producer of its operands
if the union has an iteration space (`passes/space.py`) and stays convex, that is, if no path leaves
the region and comes back. Then regions that read the same value are joined in the same way. Views
and constants belong to no region: each region that reads one takes a copy of it.

Convexity: `reach(c)` is the set of clusters that cluster c depends on, directly or not, kept as a
bit set. Joining a and b closes a cycle iff some other cluster that a depends on reaches b, or the
reverse. Cost: O(clusters) bit-set updates for each join, so O(n^2 / 64) words for n ops.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from itertools import accumulate

from ..ir.module import Attr, Function, Op, Value
from ..ir.opdef import OPS, full_attrs, signature_of
from ..ir.signature import SignatureError
from ..ir.types import DTYPES, FLOATS
from .space import VIEWS, NoSpace, Space, analyse, column_dims, parameters, row_sums

#: more ops than this make a kernel that needs too many registers, and a slow search for regions
MAX_OPS = 48
#: more tensors than this overflow what a launch can pass comfortably, and thrash the L1 cache
MAX_TENSORS = 20

#: Ops further apart than this, views aside, stay apart. A late op in an early kernel makes a tensor
#: that waits for its reader (the backward of a block would add to the saved activations of its
#: forward), and an early op in a late kernel keeps its readers waiting. In the train steps of small
#: Llama, GPT-2, BERT, ViT and ResNet models, 16 finds what no limit finds up to 6 % of the traffic.
NEAR = 16

ROW = frozenset({
    "softmax", "softmax_backward", "log_softmax", "log_softmax_backward", "logsumexp", "layer_norm",
    "layer_norm_backward", "rms_norm", "rms_norm_backward", "cross_entropy",
    "cross_entropy_backward",
})  # fmt: skip
REDUCTIONS = frozenset({"reduce_sum", "reduce_max", "reduce_min"})
OPTIMIZERS = frozenset({"adam_update", "adamw_update", "sgd_update", "momentum_update"})
JOINS = frozenset({"concat", "pad"})
#: pointwise ops that keep their meaning on integers; the others have float operands only
INTEGER = frozenset({
    "neg", "abs", "sign", "add", "sub", "mul", "maximum", "minimum", "eq", "ne", "lt", "le", "gt",
    "ge", "where", "cast", "logical_and", "logical_or", "logical_not", "bitwise_xor",
    "floor_divide", "remainder", "stop_gradient",
})  # fmt: skip
#: ops with bool results or operands
BOOLEAN = frozenset({
    "eq", "ne", "lt", "le", "gt", "ge", "where", "cast", "logical_and", "logical_or",
    "logical_not", "bitwise_xor", "isfinite", "stop_gradient",
})  # fmt: skip
#: exponents that are products and roots; others would need a power function of the device library
EXPONENTS = frozenset({-2.0, -1.0, -0.5, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0})
#: ops that are a kernel even alone: their reference is a sequence of ATen calls, or reads rows twice
WORTH_ALONE = OPTIMIZERS | ROW


def is_view(op: Op) -> bool:
    """Is this op only another index into its operand, or free to compute where it is read?

    A cast to a wider float is: reading the narrow operand again moves fewer bytes than the result.
    """
    if op.name == "cast":
        wide, narrow = op.result.type.dtype, op.operands[0].type.dtype
        return {wide, narrow} <= FLOATS and DTYPES[wide] > DTYPES[narrow]
    if op.name not in VIEWS:
        return False
    if op.name in ("constant", "iota"):
        placement = op.result.type.placement or ()
        return op.name == "constant" or all(p.kind != "S" for p in placement)
    shape, source = op.result.type.shape, op.operands[0].type.shape
    try:
        signature = signature_of(op)
    except SignatureError:
        return False
    if op.name == "slice":
        last = op.attrs["dim"] == len(shape) - 1
        return last and full_attrs(op.name, op.attrs)["step"] == 1 and shape[-1] > 1
    if op.name == "permute":
        dims = op.attrs["dims"]
        assert isinstance(dims, tuple)
        return [d for d in dims if source[int(str(d))] > 1][-1:] == [
            d for d, size in enumerate(source) if size > 1
        ][-1:]
    return all(
        size == 1 or sum(signature.size(name) > 1 for name in factors) == 1
        for tensor, sizes in ((signature.operands[0], source), (signature.results[0], shape))
        for factors, size in zip(tensor, sizes, strict=True)
    )


def constant_value(value: Value, defs: dict[str, Op]) -> Attr | None:
    """The number that fills a value, looked up through views; None where it is not one."""
    op = defs.get(value.name)
    while op is not None and op.name in ("expand", "reshape", "permute", "cast"):
        op = defs.get(op.operands[0].name)
    return op.attrs["value"] if op is not None and op.name == "constant" else None


def can_fuse(op: Op, defs: dict[str, Op], *, optimizers: bool) -> bool:
    """May a kernel contain this op, shapes aside?"""
    family = OPS[op.name].family
    if op.name in ROW:
        vocabulary = op.name.startswith("cross_entropy") and "n" in op.split.values()
        return not vocabulary and signature_of(op).size("n") > 1
    if op.name in REDUCTIONS or op.name in JOINS:
        try:
            return (row_sums(op) or bool(column_dims(op))) and op.result.type.dtype != "bool"
        except NoSpace:
            return False
    if family == "optimizer":
        return optimizers and op.name in OPTIMIZERS
    if family != "pointwise":
        return False
    return _pointwise_types(op) and _pointwise_attrs(op, defs)


def _pointwise_types(op: Op) -> bool:
    dtypes = [value.type.dtype for value in (*op.operands, *op.results)]
    if op.name not in INTEGER and any(d not in FLOATS and d != "bool" for d in dtypes):
        return False
    if op.name in ("floor_divide", "remainder") and any(d in FLOATS for d in dtypes):
        return False  # torch rounds the quotient in a way that a kernel would have to imitate
    return op.name in BOOLEAN or "bool" not in dtypes


def _pointwise_attrs(op: Op, defs: dict[str, Op]) -> bool:
    if op.name == "pow":
        exponent = constant_value(op.operands[1], defs)
        return isinstance(exponent, (int, float)) and float(exponent) in EXPONENTS
    return True


@dataclass(slots=True)
class Region:
    """Ops of one kernel: members and the views copied into it, in program order."""

    ops: tuple[Op, ...]
    members: tuple[int, ...]
    outputs: tuple[Value, ...]
    space: Space


@dataclass(slots=True)
class _Cluster:
    members: set[int]
    fusible: bool
    deps: set[int] = field(default_factory=set)  # other clusters that it reads
    reach: int = 0  # bit set of clusters that it depends on


class Regions:
    """The regions of one function.

    Args:
        optimizers: put optimizer updates into kernels.
        alone: a region of one op is worth a kernel.
    """

    def __init__(self, function: Function, *, optimizers: bool, alone: bool = False) -> None:
        self.alone = alone
        self.ops = function.ops
        self.index = {r.name: i for i, op in enumerate(self.ops) for r in op.results}
        defs = function.defs()
        self.views = {i for i, op in enumerate(self.ops) if is_view(op)}
        #: position of each op among those that are no views
        self.rank = list(accumulate(i not in self.views for i in range(len(self.ops))))
        self.fusible = {
            i
            for i, op in enumerate(self.ops)
            if i not in self.views and can_fuse(op, defs, optimizers=optimizers)
        }
        self.readers = self._readers(function)
        self.small = {  # values that cost nothing to read twice
            value.name
            for op in self.ops
            for value in (*op.operands, *op.results)
            if value.type.numel == 1
        } | {op.result.name for op in self.ops if op.name in ("constant", "iota")}
        self.late = _late(function)
        self.clusters: dict[int, _Cluster] = {}
        self.home: dict[int, int] = {}  # op -> its cluster

    def find(self) -> list[Region]:
        """The regions that are worth a kernel, in program order."""
        for i in range(len(self.ops)):
            if i not in self.views:
                self._add(i)
        self._join_siblings()
        regions = []
        for cluster in self.clusters.values():
            if cluster.fusible:
                region = self._region(cluster.members)
                if region is not None and region.space.points > 1 and _worthwhile(region, self.alone):
                    regions.append(region)
        return regions

    def sources(self, op: Op) -> set[int]:
        """Ops that compute what an op reads, looked up through views."""
        found: set[int] = set()
        stack = [value.name for value in op.operands]
        while stack:
            i = self.index.get(stack.pop())
            if i in self.views:
                stack += [value.name for value in self.ops[i].operands]
            elif i is not None:
                found.add(i)
        return found

    def _readers(self, function: Function) -> dict[str, set[int]]:
        """For each value, the ops that read it, through views; -1 stands for the function's end."""
        readers: dict[str, set[int]] = {result.name: {-1} for result in function.results}
        for i in reversed(range(len(self.ops))):
            op = self.ops[i]
            if i in self.views:
                who = set().union(*(readers.get(result.name, set()) for result in op.results))
            else:
                who = {i}
            for value in op.operands:
                readers.setdefault(value.name, set()).update(who)
        return readers

    def _add(self, i: int) -> None:
        sources = self.sources(self.ops[i])
        deps = {self.home[source] for source in sources}
        cluster = _Cluster({i}, i in self.fusible, deps)
        for dep in deps:
            cluster.reach |= 1 << dep | self.clusters[dep].reach
        self.clusters[i], self.home[i] = cluster, i
        if not cluster.fusible:
            return
        for source in sorted(sources, reverse=True):
            if self._near(self.clusters[self.home[source]].members, i):
                self._join(self.home[source], self.home[i])

    def _near(self, members: set[int], i: int) -> bool:
        return self.rank[i] - self.rank[max(j for j in members if j <= i)] <= NEAR

    def _join_siblings(self) -> None:
        """Join regions that read the same tensor, if they are close: far ones would wait."""
        for name, readers in self.readers.items():
            if name in self.small:
                continue
            fusible = sorted(i for i in readers if i in self.fusible)
            for left, right in zip(fusible, fusible[1:], strict=False):
                if self.rank[right] - self.rank[left] <= NEAR:
                    self._join(self.home[left], self.home[right])

    def _join(self, a: int, b: int) -> bool:
        """Make clusters a and b one, if that is allowed."""
        left, right = self.clusters[a], self.clusters[b]
        if a == b or not (left.fusible and right.fusible):
            return False
        if len(left.members) + len(right.members) > MAX_OPS or self._cyclic(a, b):
            return False
        if not left.members.isdisjoint(self.late) and not right.members <= self.late:
            return False  # one half runs before the gradients of the outputs are there
        if not right.members.isdisjoint(self.late) and not left.members <= self.late:
            return False
        if self._region(left.members | right.members) is None:
            return False
        left.members |= right.members
        left.deps = (left.deps | right.deps) - {a, b}
        left.reach = (left.reach | right.reach) & ~(1 << a | 1 << b)
        for i in right.members:
            self.home[i] = a
        del self.clusters[b]
        both = 1 << a | 1 << b
        for cluster in self.clusters.values():
            if b in cluster.deps:
                cluster.deps = cluster.deps - {b} | {a}
            if cluster.reach & both:
                cluster.reach = (cluster.reach | left.reach | 1 << a) & ~(1 << b)
        return True

    def _cyclic(self, a: int, b: int) -> bool:
        """Would a path leave the union of clusters a and b and come back?"""
        return any(
            d not in (a, b) and self.clusters[d].reach >> other & 1
            for one, other in ((a, b), (b, a))
            for d in self.clusters[one].deps
        )

    def _region(self, members: set[int]) -> Region | None:
        """The region of some ops, None where they have no space.

        Where the views that they read do not fit into the space (labels may be a slice along what
        is a row dim here), the slices stay outside.
        """
        outputs = tuple(
            result
            for i in sorted(members)
            for result in self.ops[i].results
            if not self.readers.get(result.name, set()) <= members
        )
        for cut in ((), ("slice",)):
            indices = self._with_views(members, cut)
            if indices is None:
                continue
            ops = tuple(self.ops[i] for i in indices)
            params = parameters(ops)
            if not params or not outputs or len(outputs) + len(params) > MAX_TENSORS:
                continue
            try:
                space = analyse(ops, [value.name for value in outputs])
            except NoSpace:
                continue
            return Region(ops, tuple(sorted(members)), outputs, space)
        return None

    def _with_views(self, members: set[int], cut: tuple[str, ...]) -> list[int] | None:
        """Members and the views that they read, in program order; views named in `cut` stay out.

        None where a view that stays out reads a member.
        """
        found = set(members)
        stack = list(members)
        while stack:
            for value in self.ops[stack.pop()].operands:
                i = self.index.get(value.name)
                if i is None or i not in self.views or i in found:
                    continue
                if self.ops[i].name not in cut:
                    found.add(i)
                    stack.append(i)
                elif self.sources(self.ops[i]) & members:
                    return None
        return sorted(found)


def _late(function: Function) -> set[int]:
    """Ops that wait for the gradients of the function's outputs (parameters of role `tangent`)."""
    pairs = zip(function.params, function.param_attrs, strict=True)
    names = {value.name for value, attrs in pairs if attrs.get("role") == "tangent"}
    late: set[int] = set()
    for i, op in enumerate(function.ops):
        if any(value.name in names for value in op.operands):
            names.update(value.name for value in op.results)
            late.add(i)
    return late


def _worthwhile(region: Region, alone: bool) -> bool:
    """Does a kernel save memory traffic or launches?"""
    counted = [op.name for op in region.ops if op.name not in VIEWS | JOINS]
    return len(counted) >= (1 if alone else 2) or any(name in WORTH_ALONE for name in counted)


def topological(
    nodes: Sequence[tuple[int, Sequence[str], Sequence[str]]],
) -> Iterator[int]:
    """Order nodes `(priority, values read, values written)` by their values, smallest first.

    Yields positions in `nodes`. The order is a function of the priorities alone, so it is the same
    wherever the same program is compiled.
    """
    from_value = {name: n for n, (_, _, writes) in enumerate(nodes) for name in writes}
    users: list[list[int]] = [[] for _ in nodes]
    waits = [0] * len(nodes)
    for n, (_, reads, _) in enumerate(nodes):
        for source in {from_value[name] for name in reads if name in from_value} - {n}:
            users[source].append(n)
            waits[n] += 1
    ready = [(nodes[n][0], n) for n, count in enumerate(waits) if not count]
    heapify(ready)
    while ready:
        _, n = heappop(ready)
        yield n
        for user in users[n]:
            waits[user] -= 1
            if not waits[user]:
                heappush(ready, (nodes[user][0], user))
