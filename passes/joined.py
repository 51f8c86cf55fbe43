"""What small collectives cost where `coalesce` joins them with others, and which of them it can.

A joined collective bears its share of the start-up of its bucket in place of one of its own. Search,
price and lowering ask here, so that they agree; what is joined in the end is decided op by op.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

from ..ir.module import Module, Op, Value
from ..ir.ops import OPS
from ..ir.types import FLOATS
from .reshard import StepCost

#: A bucket takes so many bytes that its transfer lasts so many start-ups. Of reductions: from there on
#: more saves less than 1 / 8 of the time, and less of it could overlap with the backward. A gathered
#: bucket is waited for at the beginning of a step, where little is there to overlap with.
STARTUPS: Mapping[str, float] = {"all_reduce": 8.0, "reduce_scatter": 8.0, "all_gather": 2.0}
#: sizes from which the line through a collective's times is taken, in bytes
_EMPTY, _FULL = 4, 1 << 24
#: families whose ops stand between the gradients and the end of a step
_LIGHT = frozenset({"pointwise", "reduction", "movement", "optimizer", "control", "creation",
                    "collective"})  # fmt: skip


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
        sizes: of each such value the bytes of those that it can be joined with, whole: parameters,
            which can be gathered ahead of the first op; gradients, which nothing reads before all
            of them are there; what the updates make for the end of the step.
    """

    sizes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def cost(self, name: str, alone: StepCost) -> StepCost:
        """What collectives of a value of the entry cost."""
        return joined_cost(alone, self.sizes[name]) if name in self.sizes else alone


def joins(module: Module) -> Joins:
    """The values of a logical or placed module's entry whose small collectives can be joined."""
    entry = module.entry
    weights = [
        value for value, attrs in zip(entry.params, entry.param_attrs, strict=True)
        if attrs.get("role") == "param" and value.type.dtype in FLOATS
    ]  # fmt: skip
    kinds = _Kinds(module)
    first, last = kinds.parted()
    ops = [op for op in (*first, *last) if op.name != "reshard"]
    origin = {op.result.name: op.operands[0].name for op in entry.ops if op.name == "reshard"}
    read = {origin.get(value.name, value.name): len(ops) for value in entry.results}
    for index in reversed(range(len(ops))):
        read.update((origin.get(value.name, value.name), index) for value in ops[index].operands)
    lives = [
        _Life(value, 0 if OPS[op.name].family == "pointwise" else value.type.numel,
              index, read.get(value.name, index))
        for index, op in enumerate(ops) for value in op.results if value.type.dtype in FLOATS
    ]  # fmt: skip
    earliest = 1 + max((i for i, op in enumerate(ops) if kinds.heavy(op)), default=-1)
    latest = sum(op.name != "reshard" for op in first)
    border = _border(lives, min(earliest, latest), latest)
    over = [life for life in lives if life.made < border <= life.read]
    late = [life for life in lives if border <= life.made and life.read == len(ops)]
    sizes: dict[str, tuple[int, ...]] = {}
    for group in (weights, [life.value for life in over], [life.value for life in late]):
        company = weights if last else group  # in a step with updates a gradient for each of them
        held = tuple(sorted(value.type.bytes for value in company))
        sizes.update(dict.fromkeys((value.name for value in group), held))
    return Joins(sizes)


def updates_last(module: Module) -> tuple[Op, ...]:
    """The ops of the entry with the optimizer's updates, and what depends on them, behind all others.

    In a program the update of a block may stand right behind its backward; what reads its gradient
    can wait. `schedule` does each update as soon as its gradient is there, whatever the order.
    """
    first, last = _Kinds(module).parted()
    return (*first, *last)


class _Kinds:
    """What the ops of a module are, functions that they call included."""

    def __init__(self, module: Module) -> None:
        self.entry = module.entry
        self.table = {function.name: function for function in module.functions}
        self.known: dict[str, frozenset[str]] = {}

    def heavy(self, op: Op) -> bool:
        """More than what stands between the gradients and the end of a step?"""
        return not self._families(op) <= _LIGHT

    def parted(self) -> tuple[list[Op], list[Op]]:
        """The ops of the entry, and those that depend on an update, updates included."""
        late: set[str] = set()
        parts: tuple[list[Op], list[Op]] = [], []
        for op in self.entry.ops:
            families = self._families(op)
            own = "optimizer" in families and families <= _LIGHT
            own = own or any(value.name in late for value in op.operands)
            if own:
                late.update(value.name for value in op.results)
            parts[own].append(op)
        return parts

    def _families(self, op: Op) -> frozenset[str]:
        if op.name != "call":
            return frozenset((OPS[op.name].family,))
        name = str(op.attrs["callee"])
        if name not in self.known:
            inner = (self._families(inner) for inner in self.table[name].ops)
            self.known[name] = frozenset[str]().union(*inner)
        return self.known[name]


class _Life(NamedTuple):
    """A value of the entry: the index of the op that makes it, of its first reader; its elements if
    it may be a gradient as the backward makes it, not one that has been cast or scaled since."""

    value: Value
    numel: int
    made: int
    read: int


def _border(lives: Sequence[_Life], first: int, last: int) -> int:
    """The position among `first` to `last` over which most elements live: all gradients are there."""
    change = [0] * (last + 2)
    for life in lives:
        if life.read >= first and life.made < last:
            change[max(life.made + 1, first)] += life.numel
            change[min(life.read, last) + 1] -= life.numel
    sums = list(accumulate(change))
    return max(range(first, last + 1), key=sums.__getitem__)


@lru_cache(maxsize=256)
def joined_cost(cost: StepCost, sizes: tuple[int, ...]) -> StepCost:
    """The same costs, but a small collective bears only its share of the start-up of a bucket.

    Args:
        sizes: bytes of all that may be joined. Where they do not fill a bucket, they share its start-up.
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
        return max(alone - startup, 0.0) + startup * size / held  # a byte is less than _EMPTY

    return joined if sizes else cost


__all__ = ["STARTUPS", "Joins", "bucket_bytes", "is_small", "joined_cost", "joins"]
