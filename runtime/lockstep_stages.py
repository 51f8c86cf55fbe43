"""All stages of a pipeline in one process: what their schedules mean together.

Each stage runs in lock step on the ranks of its mesh (`lockstep.py`) until it waits for a message
that is not there; then another stage goes on. The oracle of the passes that make stages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ir.errors import RunError
from ..ir.module import Attr, Function, Module, Op, Value
from ..ir.types import Mesh
from .collectives import Mailbox, run_collective
from .lockstep import Frame, Lockstep
from .shards import gather, scatter


def whole_name(attrs: Mapping[str, Attr]) -> str:
    """What a parameter of an entry is called by those who feed it: its name, or its role."""
    return str(attrs.get("name", attrs.get("role", "")))


def part_of(tensor: Tensor, attrs: Mapping[str, Attr], value: Value) -> Tensor:
    """The part of an input that a parameter of one micro-batch takes; a view."""
    part = attrs.get("part")
    if not isinstance(part, tuple) or not part:
        return tensor
    dim, start = int(part[0]), int(part[1])  # type: ignore[arg-type]
    return tensor.narrow(dim, start, value.type.shape[dim])


@dataclass
class _Running:
    """One stage and how far it is."""

    runner: Lockstep
    frame: Frame
    function: Function
    place: int = 0
    expected: dict[str, Op] | None = None  # handle -> the receive that started it


def evaluate_stages(
    modules: Sequence[Module],
    inputs: Mapping[str, Tensor],
    *,
    noise: torch.Generator | None = None,
) -> tuple[dict[int, Tensor], dict[str, Tensor]]:
    """Run a step of all stages.

    Args:
        modules: the schedule-level (or lowered) module of each stage.
        inputs: whole tensors by the names of the entries' parameters (a seed is called `seed`).
        noise: as for `evaluate`.

    Returns (results by their number in the program, new values of parameters by their name), whole.
    Raises RunError W0803 where the stages wait for each other, or copies differ.
    """
    mail: Mailbox = {}
    stages = [_begin(module, number, mail, inputs, noise) for number, module in enumerate(modules)]
    while any(stage.place < len(stage.function.ops) for stage in stages):
        if not any([_advance(stage, mail) for stage in stages]):
            stuck = next(i for i, s in enumerate(stages) if s.place < len(s.function.ops))
            op = stages[stuck].function.ops[stages[stuck].place]
            raise RunError(
                "W0803", f"stage {stuck} waits for ever", reason=f"in {op.name} of {op.results[0]}"
            )
    return _collect(modules, stages)


def _begin(
    module: Module,
    number: int,
    mail: Mailbox,
    inputs: Mapping[str, Tensor],
    noise: torch.Generator | None,
) -> _Running:
    function, mesh = module.entry, module.mesh or Mesh()
    runner = Lockstep(module, mail=mail, stage=number, noise=noise)
    frame = Frame(function)
    for value, attrs in zip(function.params, function.param_attrs, strict=True):
        whole = part_of(inputs[whole_name(attrs)], attrs, value)
        frame.values[value.name] = scatter(whole, value.type, mesh, noise=noise)
    return _Running(runner, frame, function, 0, {})


def _advance(stage: _Running, mail: Mailbox) -> bool:
    """Run a stage until it waits for a message; did it get on?"""
    begun = stage.place
    assert stage.expected is not None
    while stage.place < len(stage.function.ops):
        op = stage.function.ops[stage.place]
        if op.name == "recv" and op.attrs.get("async"):
            stage.expected[op.result.name] = op
        elif op.name in ("recv", "wait"):
            start = stage.expected.get(op.operands[0].name) if op.name == "wait" else op
            if start is None:
                stage.runner.step(stage.frame, op)
            else:
                number = stage.runner.stage
                key = (int(start.attrs["source"]), number, int(start.attrs.get("tag", 0)))  # type: ignore[arg-type]
                if not mail.get(key):
                    break
                got = run_collective(start, [], stage.runner.mesh, mail, number)
                stage.frame.values[op.results[0].name] = got
                if op.name == "wait":
                    del stage.expected[op.operands[0].name]
        else:
            stage.runner.step(stage.frame, op)
        stage.place += 1
    return stage.place > begun


def _collect(
    modules: Sequence[Module], stages: Sequence[_Running]
) -> tuple[dict[int, Tensor], dict[str, Tensor]]:
    results: dict[int, Tensor] = {}
    pieces: dict[int, list[tuple[int, int, Tensor]]] = {}
    updates: dict[str, Tensor] = {}
    for module, stage in zip(modules, stages, strict=True):
        function, mesh = stage.function, module.mesh or Mesh()
        names = {
            value.name: whole_name(attrs)
            for value, attrs in zip(function.params, function.param_attrs, strict=True)
        }
        for value, attrs in zip(function.results, function.result_attrs, strict=True):
            ranks = stage.frame.read(None, value)
            whole = gather(ranks, value.type, mesh, check=True)
            if "updates" in attrs:
                updates[names[str(attrs["updates"])]] = whole
                continue
            part = attrs.get("part")
            number = int(attrs["number"])  # type: ignore[arg-type]
            if isinstance(part, tuple):
                dim, start = int(part[0]), int(part[1])  # type: ignore[arg-type]
                pieces.setdefault(number, []).append((start, dim, whole))
            else:
                results[number] = whole
    for number, found in pieces.items():
        in_order = sorted(found, key=lambda item: item[0])
        results[number] = torch.cat([tensor for _, _, tensor in in_order], in_order[0][1])
    return results, updates


__all__ = ["evaluate_stages", "part_of", "whole_name"]
