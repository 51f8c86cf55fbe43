"""Derivatives of ops without a rule: torch's autograd over the reference semantics, traced.

Works for every op, opaque ATen calls included. The forward is computed again inside the backward.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from ..ir.errors import CompileError
from ..ir.module import Op, Value
from ..ir.ops import OPS
from ..ir.types import TensorType
from ..runtime.context import TORCH_DTYPES, OpContext, results_of
from .aten import Lowering
from .capture import decompositions


def traced_vjp(
    c: Lowering, op: Op, cts: Sequence[Value | None], wants: Sequence[bool]
) -> list[Value | None]:
    """Cotangents of an op's operands, None where not wanted.

    Raises CompileError W0302 where torch cannot differentiate the op.
    """
    context = OpContext(op)
    operands = list(op.operands)
    given = [ct for ct in cts if ct is not None]

    def backward(*tensors: Tensor) -> list[Tensor]:
        with torch.enable_grad():
            xs = [x.detach().requires_grad_(wanted) if wanted else x
                  for x, wanted in zip(tensors, wants, strict=False)]  # fmt: skip
            outs = results_of(op, OPS[op.name].ref(context, *xs))
            used = [out for out, ct in zip(outs, cts, strict=True) if ct is not None]
            wanted_xs = [x for x, wanted in zip(xs, wants, strict=True) if wanted]
            grads = torch.autograd.grad(used, wanted_xs, list(tensors[len(xs) :]),
                                        allow_unused=True)  # fmt: skip
        return [torch.zeros_like(x) if g is None else g
                for g, x in zip(grads, wanted_xs, strict=True)]  # fmt: skip

    with FakeTensorMode() as mode:
        fakes = [_fake(value.type) for value in (*operands, *given)]
    try:
        with mode:
            # autograd's formulas write in place; the second trace makes them functional
            flat = make_fx(backward)(*fakes)
            functional = torch.func.functionalize(flat, remove="mutations")
            graph = make_fx(functional, decomposition_table=dict(decompositions()))(*fakes).graph
    except (RuntimeError, NotImplementedError) as error:
        raise CompileError(
            "W0302", f"{op.attrs.get('target', op.name)} has no gradient", reason=str(error),
            hint="call it under torch.no_grad(), or on detached tensors",
        ) from None  # fmt: skip
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    c.fixed_loc = c.loc
    results = c.run(graph, dict(zip(placeholders, (*operands, *given), strict=True)))
    c.fixed_loc = None
    grads = iter(results)
    return [next(grads) if wanted else None for wanted in wants]


def _fake(type: TensorType) -> Tensor:
    return torch.empty(type.shape, dtype=TORCH_DTYPES[type.dtype])
