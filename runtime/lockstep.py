"""All ranks of a mesh in one process, in lock step: the placed, spmd and schedule levels.

A value is a list with one tensor for each rank. An op runs on each rank's shards with that rank's
context; a collective sees all ranks at once. What only a schedule can get wrong is an error here:
reading a value that was freed, overwritten, or is still under way.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ir.errors import RunError
from ..ir.module import Function, Module, Op, Value
from ..ir.ops import OPS
from ..ir.ops.optimizer import OVERWRITES
from ..ir.types import Mesh
from .collectives import Mailbox, run_collective
from .context import OpContext, results_of
from .lse import complete_lse
from .shards import gather, scatter

Ranks = list[Tensor]
_COMMUNICATION = frozenset(name for name, op in OPS.items() if op.family == "collective") | {
    "shard", "partial",
}  # fmt: skip


class Frame:
    """The values of one function call, and why the missing ones are missing."""

    def __init__(self, function: Function) -> None:
        self.function = function
        self.values: dict[str, Ranks] = {}
        self.started: dict[str, tuple[str, ...]] = {}  # handle -> the operands that it still reads
        self.gone: dict[str, str] = {}  # name -> what ended its life

    def read(self, op: Op | None, value: Value) -> Ranks:
        """A value's tensors. Raises RunError W0803 when it cannot be read any more, or yet."""
        if value.name in self.started:
            raise self.error(op, f"%{value.name} is read before it was waited for")
        if value.name not in self.values:
            raise self.error(op, f"%{value.name} {self.gone.get(value.name, 'does not exist')}")
        return self.values[value.name]

    def end(self, op: Op, name: str, why: str) -> None:
        """End a value's life. Raises RunError W0803 when it is gone, or is still needed."""
        if name in self.started:
            raise self.error(op, f"%{name} {why} before it was waited for")
        for handle, reads in self.started.items():
            if name in reads:
                raise self.error(op, f"%{name} {why} while %{handle} still reads it")
        if name in self.gone:
            raise self.error(op, f"%{name} {why}, but it {self.gone[name]}")
        self.values.pop(name, None)
        self.gone[name] = why

    def error(self, op: Op | None, message: str) -> RunError:
        """The error, with where it happened."""
        place = f"{op.name} at {op.loc}" if op is not None and str(op.loc) else ""
        where = op.name if op is not None else "return"
        return RunError("W0803", f"@{self.function.name}: {message}", reason=place or f"in {where}")


class Lockstep:
    """Runs a module's functions on all ranks of its mesh.

    Args:
        module: at the placed, spmd or schedule level.
        device: where new tensors are created.
        noise: writes partial values of ideal reshards as random terms.
        mail, stage: see `run_collective`.
    """

    def __init__(
        self,
        module: Module,
        *,
        device: torch.device | str = "cpu",
        noise: torch.Generator | None = None,
        mail: Mailbox | None = None,
        stage: int = 0,
    ) -> None:
        self.module, self.mesh, self.noise = module, module.mesh or Mesh(), noise
        self.functions = {function.name: function for function in module.functions}
        self.device = device
        self.mail: Mailbox = {} if mail is None else mail
        self.stage = stage
        self.contexts: dict[int, list[OpContext]] = {}  # by id of the op, kept by `functions`

    def run(self, function: Function, operands: Sequence[Ranks]) -> list[Ranks]:
        """Values of the results, given those of the parameters."""
        frame = Frame(function)
        for param, ranks in zip(function.params, operands, strict=True):
            frame.values[param.name] = ranks
        for op, dropped in zip(function.ops, function.last_uses(), strict=True):
            self.step(frame, op)
            for name in dropped:
                frame.values.pop(name, None)
        if frame.started:
            raise frame.error(None, f"%{next(iter(frame.started))} is never waited for")
        return [frame.read(None, value) for value in function.results]

    def step(self, frame: Frame, op: Op) -> None:
        """Run one op and record its results."""
        if op.name == "free":
            for value in op.operands:
                frame.end(op, value.name, "was freed")
            return
        if op.name == "wait":
            self._wait(frame, op)
            return
        operands = [frame.read(op, value) for value in op.operands]
        results = self.evaluate(op, operands)
        for value, ranks in zip(op.results, results, strict=True):
            frame.values[value.name] = ranks
            if op.attrs.get("async") and self.module.level == "schedule":
                frame.started[value.name] = tuple(v.name for v in op.operands)
        if op.attrs.get("inplace"):
            for index in OVERWRITES.get(op.name, ()):
                frame.end(op, op.operands[index].name, "was overwritten in place")

    def _wait(self, frame: Frame, op: Op) -> None:
        for value in op.operands:
            if frame.started.pop(value.name, None) is None:
                raise frame.error(op, f"%{value.name} is waited for, but was not started")
        ranks = [frame.values.pop(value.name) for value in op.operands]
        for value, tensors in zip(op.results, ranks, strict=False):
            frame.values[value.name] = tensors

    def evaluate(self, op: Op, operands: list[Ranks]) -> Sequence[Ranks]:
        """Values of an op's results on all ranks."""
        if op.name == "call":
            return self.run(self.functions[str(op.attrs["callee"])], operands)
        if op.name == "reshard":
            return [self._reshard(op, operands[0])]
        if op.name in _COMMUNICATION:
            values = operands[0] if operands else []
            out = run_collective(op, values, self.mesh, self.mail, self.stage)
            return [out] if op.results else []
        contexts = self.contexts.get(id(op))
        if contexts is None:
            contexts = self.contexts[id(op)] = [
                OpContext(op, self.mesh, coord, device=self.device) for coord in self.mesh.coords()
            ]
        semantics = OPS[op.name].ref
        inputs = [tuple(ranks[rank] for ranks in operands) for rank in range(self.mesh.size)]
        rows: Sequence[Sequence[Tensor]] = [
            results_of(op, semantics(context, *tensors))
            for context, tensors in zip(contexts, inputs, strict=True)
        ]
        if self.module.level == "placed":
            rows = complete_lse(op, inputs, rows, self.mesh)
        return [[row[i] for row in rows] for i in range(len(op.results))]

    def _reshard(self, op: Op, ranks: Ranks) -> Ranks:
        whole = gather(ranks, op.operands[0].type, self.mesh, check=True)
        return scatter(whole, op.result.type, self.mesh, noise=self.noise)


__all__ = ["Frame", "Lockstep"]
