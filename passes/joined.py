"""What small collectives cost where `coalesce` joins them with others, and which of them it can.

A joined collective bears its share of the start-up of its bucket in place of one of its own. Search,
price and lowering ask here, so that they agree; what is joined in the end is decided op by op.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

from ..ir.module import Function, Module, Op
from ..ir.opdef import OPS
from ..ir.types import FLOATS
from .reshard import StepCost

#: A bucket takes so many bytes that its transfer lasts so many start-ups. Of reductions: from there on
#: more saves less than 1 / 8 of the time, and less of it could overlap with the backward. A gathered
#: bucket is waited for at the beginning of a step, where little is there to overlap with.
STARTUPS: Mapping[str, float] = {"all_reduce": 8.0, "reduce_scatter": 8.0, "all_gather": 2.0}
#: sizes from which the line through a collective's times is taken, in bytes
_EMPTY, _FULL = 4, 1 << 24
#: families whose ops stand between the gradients and the end of a step
_LIGHT = frozenset({"pointwise", "reduction", "movement", "optimizer", "control", "creation"})


def bucket_bytes(cost: StepCost, name: str, ranks: int, axis: str) -> float:
    """How much is joined in a collective, in bytes that a rank holds before it."""
    startup = cost(name, _EMPTY, ranks, axis)
    per_byte = (cost(name, _FULL, ranks, axis) - startup) / _FULL
    return STARTUPS[name] * startup / per_byte if per_byte > 0 else 0.0


def is_small(size: float, limit: float) -> bool:
    """Is a collective joined with others, where a bucket takes `limit` bytes?"""
    return 0 < size <= limit / 2


@dataclass(frozen=True)
class Joins:
    """The values of an entry whose small collectives can be joined.

    Attributes:
        names: parameters, which can be gathered ahead of the first op; gradients, which nothing reads
            before all of them are there; what the updates make for the end of the step.
        sizes: bytes of the parameters, whole: what there is to be joined.
    """

    names: frozenset[str] = frozenset()
    sizes: tuple[int, ...] = ()


def joins(module: Module) -> Joins:
    """The values of a logical or placed module's entry whose small collectives can be joined."""
    entry = module.entry
    weights = [
        value for value, attrs in zip(entry.params, entry.param_attrs, strict=True)
        if attrs.get("role") == "param" and value.type.dtype in FLOATS
    ]  # fmt: skip
    ops = [op for op in entry.ops if op.name != "reshard"]
    origin = {op.results[0].name: op.operands[0].name for op in entry.ops if op.name == "reshard"}
    made = {
        value.name: index for index, op in enumerate(ops) for value in op.results
        if value.type.dtype in FLOATS
    }  # fmt: skip
    read = {origin.get(value.name, value.name): len(ops) for value in entry.results}
    for index in reversed(range(len(ops))):
        for value in ops[index].operands:
            read[origin.get(value.name, value.name)] = index
    spans = [(made[name], index, name) for name, index in read.items() if name in made]
    heavy = _heavy(module)
    first = 1 + max((i for i, op in enumerate(ops) if _is_heavy(op, heavy)), default=-1)
    border, end = _border(spans, first, len(ops)), len(ops)
    names = {
        name for start, stop, name in spans
        if start < border <= stop or (border <= start and stop == end)
    }  # fmt: skip
    names.update(value.name for value in weights)
    return Joins(frozenset(names), tuple(sorted(value.type.bytes for value in weights)))


def _border(spans: Sequence[tuple[int, int, str]], first: int, end: int) -> int:
    """The position, from `first` on, over which most values live: all gradients are there."""
    lives = [0] * (end + 2)
    for start, stop, _ in spans:
        if stop >= first:
            lives[max(start + 1, first)] += 1
            lives[stop + 1] -= 1
    counts = list(accumulate(lives))
    return max(range(first, end + 1), key=counts.__getitem__)


def _is_heavy(op: Op, heavy: Set[str]) -> bool:
    if op.name == "call":
        return str(op.attrs["callee"]) in heavy
    return OPS[op.name].family not in _LIGHT


def _heavy(module: Module) -> Set[str]:
    """Functions that hold more than what stands behind a backward pass."""
    table = {function.name: function for function in module.functions}
    known: dict[str, bool] = {}

    def visit(function: Function) -> bool:
        if function.name not in known:
            callees = [table[str(op.attrs["callee"])] for op in function.ops if op.name == "call"]
            light = all(OPS[op.name].family in _LIGHT for op in function.ops)
            known[function.name] = not light or any([visit(callee) for callee in callees])
        return known[function.name]

    return {function.name for function in module.functions[1:] if visit(function)}


@lru_cache(maxsize=256)
def joined_cost(cost: StepCost, sizes: tuple[int, ...]) -> StepCost:
    """The same costs, but a small collective bears only its share of the start-up of a bucket.

    Args:
        sizes: `Joins.sizes`. Where they do not fill a bucket, the share is that of all of them.
    """
    buckets: dict[tuple[str, int, str], tuple[float, float, float]] = {}

    def bucket(name: str, ranks: int, axis: str) -> tuple[float, float, float]:
        """(bytes that a bucket takes, bytes that it is likely to hold, its start-up in us)."""
        limit = bucket_bytes(cost, name, ranks, axis)
        part = ranks if name == "all_gather" else 1
        there = sum(size / part for size in sizes if is_small(size / part, limit))
        return limit, min(limit, there), cost(name, _EMPTY, ranks, axis)

    def joined(name: str, size: float, ranks: int, axis: str) -> float:
        alone = cost(name, size, ranks, axis)
        if name not in STARTUPS or ranks == 1:
            return alone
        key = name, ranks, axis
        if key not in buckets:
            buckets[key] = bucket(*key)
        limit, held, startup = buckets[key]
        if not is_small(size, limit) or size >= held:
            return alone
        return alone - startup * (1 - size / held)

    return joined if sizes else cost


__all__ = ["STARTUPS", "Joins", "bucket_bytes", "is_small", "joined_cost", "joins"]
