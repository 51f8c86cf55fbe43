"""What an ATen operator is made of, by torch's own table of decompositions.

torch.export decomposes towards core ATen and leaves some operators whole that torch can also write
in smaller ones (`upsample_bilinear2d`, `grid_sampler_2d`, `slice_scatter`). Those have an IR.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._decomp import decomposition_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph
from torch.fx.experimental.proxy_tensor import make_fx

from ..ir.module import Value
from ..runtime.context import TORCH_DTYPES


def decomposed(
    target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Graph, list[Value]] | None:
    """The graph of an operator in smaller ones, and the values of its placeholders.

    None where torch has no decomposition, or has one that needs data.
    """
    rule = decomposition_table.get(target)
    if rule is None:
        return None
    operands: list[Value] = []
    _collect([args, kwargs], operands)
    with FakeTensorMode() as mode:
        fakes = [torch.empty(v.type.shape, dtype=TORCH_DTYPES[v.type.dtype]) for v in operands]

    def call(*tensors: Tensor) -> Any:
        given = iter(tensors)
        return rule(*_fill(args, given), **_fill(dict(kwargs), given))

    try:
        with mode:
            functional = torch.func.functionalize(call, remove="mutations")
            graph = make_fx(functional)(*fakes).graph
    except (RuntimeError, NotImplementedError):
        return None
    return graph, operands


def _collect(item: Any, operands: list[Value]) -> None:
    if isinstance(item, Value):
        operands.append(item)
    elif isinstance(item, (list, tuple)):
        for entry in item:
            _collect(entry, operands)
    elif isinstance(item, Mapping):
        _collect(list(item.values()), operands)


def _fill(item: Any, tensors: Any) -> Any:
    """The argument with its values replaced by tensors, in the order of `_collect`."""
    if isinstance(item, Value):
        return next(tensors)
    if isinstance(item, (list, tuple)):
        return [_fill(entry, tensors) for entry in item]
    if isinstance(item, dict):
        return {key: _fill(entry, tensors) for key, entry in item.items()}
    return item
