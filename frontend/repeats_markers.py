"""Operators that mark in a traced graph which ops are a block's, and one that stands for a block."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

#: torch's own names, most of which it has not typed
_torch: Any = torch
_LIBRARY = _torch.library.Library("weft", "FRAGMENT")
#: numbers of markers
NUMBERS = itertools.count()
#: number of an operator that stands for a block -> what it returns
RESULTS: dict[int, Sequence[Tensor]] = {}


def _like(tensor: Tensor) -> Tensor:
    return torch.empty_strided(
        tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
    )


def _same(tensors: Sequence[Tensor], *rest: Any) -> list[Tensor]:
    return [_like(tensor) for tensor in tensors]


def _results(tensors: Sequence[Tensor], state: Sequence[Tensor], number: int) -> list[Tensor]:
    return [_like(tensor) for tensor in RESULTS[number]]


def _define(name: str, arguments: str, fake: Callable[..., Any]) -> Any:
    _LIBRARY.define(f"{name}({arguments}) -> Tensor[]")
    _LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"weft::{name}", fake, lib=_LIBRARY)
    op = getattr(torch.ops.weft, name).default
    torch.fx.node.has_side_effect(op)  # kept in graphs: their places say what belongs to a block
    return op


OPEN = _define("block_open", "Tensor[] args, Tensor[] state, int number", _same)
CLOSE = _define("block_close", "Tensor[] results, Tensor[] state, int number", _same)
AGAIN = _define("block_again", "Tensor[] args, Tensor[] state, int number", _results)


class _Marked(torch.autograd.Function):
    """A marker's results, with and without gradients as they would be without it."""

    @staticmethod
    def forward(ctx: Any, op: Any, count: int, number: int, wanted: Any, *tensors: Tensor) -> Any:
        made = op(tensors[:count], tensors[count:], number)
        ctx.mark_non_differentiable(*(t for t, is_wanted in zip(made, wanted) if not is_wanted))
        return tuple(made)


#: in place of `_Marked.apply`, which tracing would look into
_apply = torch._C._FunctionBase.__dict__["apply"].__get__(None, _Marked)


def marked(
    op: Any, tensors: Sequence[Tensor], state: Sequence[Tensor], number: int,
    like: Sequence[Tensor],
) -> tuple[Tensor, ...]:  # fmt: skip
    """The results of a marker; they want gradients as the tensors in `like` do."""
    wanted = [tensor.requires_grad for tensor in like]
    made: tuple[Tensor, ...] = _apply(op, len(tensors), number, wanted, *tensors, *state)
    return made
