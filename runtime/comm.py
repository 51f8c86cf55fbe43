"""Collectives over torch.distributed: gloo on CPUs, NCCL on GPUs, the same code for both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..ir.module import Attr, Op, Value
from ..ir.types import B, TensorType
from .groups import TIMEOUT_S, Groups, Pending, check_world
from .transfers import COMMUNICATION, LOCALS, STARTS, all_reduce


class Comm(Groups):
    """The communication of one rank on a mesh: what its schedule's communication ops do."""

    def action(self, op: Op, last: bool = False) -> Callable[..., Any]:
        """The function that runs a communication op on local tensors.

        It returns a tensor, or a `Pending` when the op is asynchronous. Raises KeyError for ops
        that do not communicate.

        Args:
            last: nothing reads the operand, or its memory, afterwards: the result may take it.
        """
        if op.name in LOCALS:
            return LOCALS[op.name](self, op)
        reuse = last and op.name == "all_reduce"
        start = all_reduce(self, op, last) if reuse else STARTS[op.name](self, op)
        if op.attrs.get("async"):
            return start
        return lambda *operands: start(*operands).wait()

    def gather(self, tensor: Tensor, type: TensorType) -> Tensor:
        """The whole tensor from the shards of all ranks, on every rank; all ranks must call it."""
        placement = list(type.placement or ())
        for index in reversed(range(len(placement))):  # later axes split what earlier ones left
            held = placement[index]
            axis = self.mesh.names[index]
            attrs: dict[str, Attr] = {"axis": axis}
            attrs |= {"dim": held.dim} if held.kind == "S" else {"combine": held.combine}
            placement[index] = B
            whole = type.placed(placement)
            if held != B and self.group(axis) is not None:
                name = "all_gather" if held.kind == "S" else "all_reduce"
                op = Op(name, (Value("x", type),), (Value("y", whole),), attrs)
                tensor = self.action(op)(tensor)
            type = whole
        return tensor


__all__ = ["COMMUNICATION", "TIMEOUT_S", "Comm", "Pending", "check_world"]
