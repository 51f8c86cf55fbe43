"""NaN and Inf traced to the action that made them first.

With `check_finite` the generated functions call a `FiniteCheck` after each action. It knows which
values were bad before, so that the first action with a bad result from good operands is the one.
Infinities that a program writes down on purpose (masks) are followed and not reported; a NaN that
is made of one is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import isinf
from typing import Any

import torch
from torch import Tensor

from ..ir.errors import RunError
from ..ir.module import Function, Op
from ..ir.ops import OPS
from .comm import Comm

#: results of these may be infinite with finite operands: fully masked rows, neutral elements
_INFINITE = frozenset({"attention", "lse_combine", "partial"})
_HINT = "look at the operands there: a division by 0, log of 0, exp of a large number, a step too long"


def badness(tensor: Tensor) -> str:
    """`NaN` or `Inf` when a tensor holds one, NaN first; empty when it does not."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return ""
    tensor = tensor.float() if tensor.element_size() == 1 else tensor
    if bool(torch.isfinite(tensor).all()):
        return ""
    return "NaN" if bool(torch.isnan(tensor).any()) else "Inf"


def _where(tensor: Tensor, bad: str) -> list[int]:
    """Index of the first bad element, within this rank's shard."""
    tensor = tensor.float() if tensor.element_size() == 1 else tensor
    found = torch.isnan(tensor) if bad == "NaN" else torch.isinf(tensor)
    return [int(i) for i in found.nonzero()[0]] if tensor.dim() else []


class FiniteCheck:
    """Follows the values of one rank's steps.

    Args:
        function: the schedule.
        comm: the other ranks hear of what is found.
        constants: values that are there before the first step.
        body: for a kernel call, its body's ops, each with what runs it.
    """

    def __init__(
        self,
        function: Function,
        comm: Comm,
        constants: Mapping[str, Tensor],
        body: Callable[[Op], tuple[Function, list[Callable[..., Any]]]],
    ) -> None:
        self.comm, self.body = comm, body
        self.ops: list[Op] = []
        self._starts = {
            value.name: op for op in function.ops if op.attrs.get("async") for value in op.results
        }
        pairs = zip(function.params, function.param_attrs, strict=True)
        self._params = {v.name: (str(a.get("role")), str(a.get("name", v.name))) for v, a in pairs}
        self._constants = {name: badness(tensor) for name, tensor in constants.items()}
        self._known: dict[str, str] = {}  # value -> NaN or Inf

    def number(self, op: Op) -> int:
        """The number by which generated code names an action."""
        self.ops.append(op)
        return len(self.ops) - 1

    def begin(self, first: bool, names: Sequence[str], tensors: Sequence[Tensor]) -> None:
        """Look at what a step is given. Raises RunError W0804 where it holds NaN."""
        if first:
            self._known = dict(self._constants)
        for name, tensor in zip(names, tensors, strict=True):
            self._known[name] = bad = badness(tensor)
            if bad == "NaN":
                role, user = self._params[name]
                text = f"{role} {user!r} holds NaN before the step, at {_where(tensor, bad)}"
                self.comm.report(f"with {text}")
                raise RunError(
                    "W0804", f"rank {self.comm.rank}: {text} of its part",
                    reason="no action of this step made it",
                    hint="check the data and the checkpoint that were loaded",
                )  # fmt: skip

    def after(self, number: int, operands: Sequence[Tensor], results: Sequence[Tensor]) -> None:
        """Look at an action's results. Raises RunError W0803 when it is the first to make one bad."""
        op = self.ops[number]
        for value, tensor in zip(op.results, results, strict=True):
            self._known[value.name] = bad = badness(tensor)
            if bad and self._is_new(op, bad):
                raise self._found(op, value.name, tensor, bad, operands)

    def _is_new(self, op: Op, bad: str) -> bool:
        if bad == "NaN":
            return True  # a NaN before this one would have been reported
        if any(self._known.get(value.name) for value in self._operands(op)):
            return False
        return not _writes_infinity(op, self.body)

    def _operands(self, op: Op) -> Sequence[Any]:
        start = self._starts.get(op.operands[0].name) if op.name == "wait" else None
        return (start or op).operands

    def _found(
        self, op: Op, name: str, tensor: Tensor, bad: str, operands: Sequence[Tensor]
    ) -> RunError:
        before = [(f"%{v.name}", self._known.get(v.name, "")) for v in self._operands(op)]
        at = _where(tensor, bad)
        if op.name == "call":
            op, before = self._inside(op, bad, operands)
        made = self._starts.get(op.operands[0].name, op) if op.name == "wait" else op
        place = f" of {made.loc}" if str(made.loc) else ""
        text = f"{made.name} (%{name}){place} made the first {bad}"
        self.comm.report(f"with {text}")
        said = [f"{v} already held {b}" if b else f"{v} was finite" for v, b in before]
        return RunError(
            "W0803", f"rank {self.comm.rank}: {text}",
            reason=f"element {at} of this rank's part; " + (", ".join(said) or "it has no operands"),
            hint=_HINT,
        )  # fmt: skip

    def _inside(
        self, call: Op, bad: str, operands: Sequence[Tensor]
    ) -> tuple[Op, list[tuple[str, str]]]:
        """The op of a kernel's body that made a value bad, found by running the body op by op."""
        function, runs = self.body(call)
        values = {v.name: t for v, t in zip(function.params, operands, strict=True)}
        for op, run in zip(function.ops, runs, strict=True):
            out = run(*(values[v.name] for v in op.operands))
            tensors = out if isinstance(out, (tuple, list)) else (out,)
            values.update((v.name, t) for v, t in zip(op.results, tensors, strict=True))
            if any(badness(t) == bad for t in tensors) and not _writes_infinity(op, self.body):
                return op, [(f"%{v.name}", badness(values[v.name])) for v in op.operands]
        return call, [(str(v), self._known.get(v.name, "")) for v in call.operands]


def _writes_infinity(op: Op, body: Callable[[Op], tuple[Function, list[Any]]]) -> bool:
    """May an op's results be infinite because the program says so?"""
    if op.name == "call":
        return any(_writes_infinity(inner, body) for inner in body(op)[0].ops)
    if op.name in _INFINITE or (op.name in OPS and OPS[op.name].family == "creation"):
        return not op.operands or op.name in _INFINITE
    values = [x for a in op.attrs.values() for x in (a if isinstance(a, tuple) else (a,))]
    return any(isinstance(x, float) and isinf(x) for x in values)


__all__ = ["FiniteCheck", "badness"]
