"""Placed stages made ready to be repeated: one size of micro-batch after the other, lowered."""

from __future__ import annotations

from collections.abc import Sequence

from ..ir.errors import CompileError
from ..ir.module import Module, Namer, Op, Value
from .carry import carried
from .dead_code import without_dead_ops
from .lower import lower
from .micro import PHASES, TimeSplit
from .reshard import StepCost
from .stages import StageModule, cut


def lower_stages(
    split: TimeSplit, part_of: Sequence[int], placed: Sequence[Module], cost: StepCost | None
) -> dict[int, list[tuple[StageModule, Module]]]:
    """Rows of a micro-batch -> for each part its stage and spmd module.

    What a part sends is placed as its receiver wants it.

    Args:
        placed: the placed module of each part, for the first micro-batch.
    """
    sizes = list(dict.fromkeys(split.sizes))
    cuts = [cut(split, part_of, split.sizes.index(rows)) for rows in sizes]
    if len(cuts[0]) != len(placed):
        raise CompileError("W0404", f"{len(placed)} placed modules for {len(cuts[0])} stages")
    return {
        rows: [
            (stage, _lowered(module, cost))
            for stage, module in zip(stages, _aligned(stages, modules), strict=True)
        ]
        for rows, stages, modules in zip(sizes, cuts, _for_all_sizes(cuts, placed), strict=True)
    }


def phases_meant(placed: Module, phases: Sequence[str] | None) -> dict[str, int]:
    """The phases of reshards that a search has decided, by what they make."""
    if phases is None:
        return {}
    return {
        op.results[0].name: PHASES.index(phase)
        for op, phase in zip(placed.entry.ops, phases, strict=True)
        if op.name == "reshard"
    }


def _for_all_sizes(
    cuts: Sequence[Sequence[StageModule]], placed: Sequence[Module]
) -> list[Sequence[Module]]:
    """The placed modules for each size of micro-batch: the same splits for all, those that all
    sizes allow."""
    if len(cuts) == 1:
        return [placed]
    allowed = list(placed)
    for stages in (*cuts[1:], *cuts):
        allowed = [carried(s.module, m) for s, m in zip(stages, allowed, strict=True)]
    return [[carried(s.module, m) for s, m in zip(c, allowed, strict=True)] for c in cuts]


def _lowered(placed: Module, cost: StepCost | None) -> Module:
    """A lowered stage; a placement that only a longer way to another one passed is not made."""
    spmd = lower(placed, cost)
    return spmd.with_(functions=(without_dead_ops(spmd.entry), *spmd.functions[1:]))


def _aligned(stages: Sequence[StageModule], placed: Sequence[Module]) -> list[Module]:
    """Placed modules that send each value under the placement that its receiver wants."""
    wanted: dict[tuple[str, int], Value] = {}
    for stage, module in zip(stages, placed, strict=True):
        for value, attrs in zip(module.entry.params, module.entry.param_attrs, strict=True):
            if attrs["role"] == "received":
                wanted[value.name, stage.stage] = value
    out = []
    for module in placed:
        entry = module.entry
        namer = Namer(
            (*(v.name for v in entry.params), *(v.name for op in entry.ops for v in op.results))
        )
        results, extra = [], []
        for value, attrs in zip(entry.results, entry.result_attrs, strict=True):
            if attrs["role"] == "sent":
                target = wanted[str(attrs["name"]), int(attrs["to"])]  # type: ignore[arg-type]
                if target.type.placement != value.type.placement:
                    moved = Value(namer(f"{value.name}_to{attrs['to']}"), target.type)
                    extra.append(Op("reshard", (value,), (moved,)))
                    value = moved
            results.append(value)
        entry = entry.with_(ops=(*entry.ops, *extra), results=tuple(results))
        out.append(module.with_(functions=(entry, *module.functions[1:])))
    return out


__all__ = ["lower_stages", "phases_meant"]
