"""Placed stages made ready to be repeated: one size of micro-batch after the other, lowered."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

from ..ir.errors import CompileError
from ..ir.module import Function, Module, Namer, Op, Value
from ..ir.types import B, Mesh, S, TensorType, illegal_placement, local_bytes
from .carry import carried
from .dead_code import without_dead_ops
from .lower import lower
from .micro import PHASES, TimeSplit
from .reshard import StepCost, default_cost, reshard_cost_us
from .stages import StageModule, cut


def lower_stages(
    split: TimeSplit,
    part_of: Sequence[int],
    placed: Sequence[Module],
    costs: Sequence[StepCost | None],
) -> dict[int, list[tuple[StageModule, Module]]]:
    """Rows of a micro-batch -> for each part its stage and spmd module.

    What a part sends is placed as its receiver wants it; to a mesh of another shape it goes as it is,
    sums done.

    Args:
        placed: the placed module of each part, for the first micro-batch.
        costs: for each part the times of collectives on its mesh.
    """
    sizes = list(dict.fromkeys(split.sizes))
    cuts = [cut(split, part_of, split.sizes.index(rows)) for rows in sizes]
    if len(cuts[0]) != len(placed):
        raise CompileError("W0404", f"{len(placed)} placed modules for {len(cuts[0])} stages")
    return {
        rows: [
            (stage, _lowered(module, cost))
            for stage, module, cost in zip(
                stages, _aligned(stages, modules, costs), costs, strict=True
            )
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


def _aligned(
    stages: Sequence[StageModule], placed: Sequence[Module], costs: Sequence[StepCost | None]
) -> list[Module]:
    """Placed modules that send each value under the placement that its receiver wants.

    Between meshes of different shape both ends hold it without partial sums.
    """
    received = [_received(module, placed) for module in placed]
    wanted: dict[tuple[str, int], Value] = {}
    for stage, module in zip(stages, received, strict=True):
        for value, attrs in zip(module.entry.params, module.entry.param_attrs, strict=True):
            if attrs["role"] == "received":
                wanted[value.name, stage.stage] = value
    out = []
    for module, cost in zip(received, costs, strict=True):
        entry, mesh = module.entry, module.mesh or Mesh()
        namer = _namer(entry)
        results, extra = [], []
        for value, attrs in zip(entry.results, entry.result_attrs, strict=True):
            if attrs["role"] == "sent":
                number = int(attrs["to"])  # type: ignore[arg-type]
                type = wanted[str(attrs["name"]), number].type
                if (placed[number].mesh or Mesh()).sizes != mesh.sizes:
                    type = _whole_terms(value.type, mesh, cost or default_cost)
                if type.placement != value.type.placement:
                    moved = Value(namer(f"{value.name}_to{number}"), type)
                    extra.append(Op("reshard", (value,), (moved,)))
                    value = moved
            results.append(value)
        entry = entry.with_(ops=(*entry.ops, *extra), results=tuple(results))
        out.append(module.with_(functions=(entry, *module.functions[1:])))
    return out


def _namer(entry: Function) -> Namer:
    return Namer(
        (*(v.name for v in entry.params), *(v.name for op in entry.ops for v in op.results))
    )


def _received(module: Module, placed: Sequence[Module]) -> Module:
    """A placed part that receives nothing partial from a mesh of another shape: it makes the terms
    of a sum itself, of the whole value."""
    entry, mesh, namer = module.entry, module.mesh or Mesh(), _namer(module.entry)
    params, moves, renamed = [], [], {}
    for value, attrs in zip(entry.params, entry.param_attrs, strict=True):
        placement = value.type.placement or ()
        if attrs["role"] == "received" and any(p.kind == "P" for p in placement):
            source = placed[int(attrs["source"])]  # type: ignore[arg-type]
            if (source.mesh or Mesh()).sizes != mesh.sizes:
                whole = [B if p.kind == "P" else p for p in placement]
                terms = Value(namer(f"{value.name}_terms"), value.type)
                renamed[value] = terms
                value = Value(value.name, value.type.placed(whole))
                moves.append(Op("reshard", (value,), (terms,)))
        params.append(value)
    if not moves:
        return module
    ops = [op.with_(operands=tuple(renamed.get(v, v) for v in op.operands)) for op in entry.ops]
    entry = entry.with_(
        params=tuple(params), ops=(*moves, *ops),
        results=tuple(renamed.get(v, v) for v in entry.results),
    )  # fmt: skip
    return module.with_(functions=(entry, *module.functions[1:]))


def _whole_terms(type: TensorType, mesh: Mesh, cost: StepCost) -> TensorType:
    """A type without partial sums: the cheapest to reach, of equals the one of the smallest parts."""
    placement = type.placement or ()
    if all(p.kind != "P" for p in placement):
        return type
    choices = [(B, *map(S, range(len(type.shape)))) if p.kind == "P" else (p,) for p in placement]
    types = [
        type.placed(found) for found in product(*choices)
        if not illegal_placement(type, mesh, found)
    ]  # fmt: skip
    return min(
        types, key=lambda t: (
            reshard_cost_us(type, mesh, placement, t.placement or (), cost), local_bytes(t, mesh)
        ),
    )  # fmt: skip


__all__ = ["lower_stages", "phases_meant"]
