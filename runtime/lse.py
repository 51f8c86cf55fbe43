"""Completing ops whose split dim is combined by log-sum-exp, from the results of all ranks.

Let l_r be the log-sum-exp over rank r's part and L = log(sum over r of exp(l_r)). Then

    attention       out = sum over r of out_r * exp(l_r - L), so each product is a P(sum) term
    cross_entropy   loss = sum over r of loss_r + L, loss_r being -logit[label] on one rank

which is what `passes/lower` writes as ops. Milakov and Gimelshein, 2018; Dao et al., 2022.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..ir.module import Op
from ..ir.opdef import OPS, signature_of
from ..ir.types import Mesh
from .collectives import lse_combine


def lse_axes(op: Op) -> tuple[str, ...]:
    """The mesh axes over which an op splits a dim that is combined by log-sum-exp."""
    if not op.split or OPS[op.name].signature is None:
        return ()
    dims = signature_of(op).dims
    lse = {name for name, dim in dims.items() if dim.combine == "lse"}
    return tuple(axis for axis, state in op.split.items() if state in lse)


def _minus(value: Tensor, total: Tensor) -> Tensor:
    """value - total, and -inf where both are -inf."""
    return value - total.masked_fill(total.isinf(), 0.0)


def complete_lse(
    op: Op,
    operands: Sequence[Sequence[Tensor]],
    results: Sequence[Sequence[Tensor]],
    mesh: Mesh,
) -> list[tuple[Tensor, ...]]:
    """Results of all ranks under the placements that the op's signature promises.

    Args:
        operands, results: for each rank, the operands and what the op's semantics returned.
    """
    axes = tuple(axis for axis in lse_axes(op) if mesh.sizes[mesh.axis(axis)] > 1)
    if not axes:
        return [tuple(result) for result in results]
    parts = [result[-1] for result in results]
    totals = lse_combine(parts, mesh, axes)
    if op.name == "attention":
        scales = [_minus(part, total).exp() for part, total in zip(parts, totals, strict=True)]
        outs = [
            (out * scale.unsqueeze(-1)).to(out.dtype)
            for (out, _), scale in zip(results, scales, strict=True)
        ]
        return list(zip(outs, totals, strict=True))
    if op.name == "cross_entropy":
        default = OPS[op.name].attrs["ignore_index"].default
        ignore = int(op.attrs.get("ignore_index", default))  # type: ignore[arg-type]
        positions = [mesh.axis(axis) for axis in axes]
        rows: list[tuple[Tensor, ...]] = []
        for rank, total in enumerate(totals):
            (loss, _), labels, coord = results[rank], operands[rank][1], mesh.coord(rank)
            if not any(coord[position] for position in positions):
                loss = loss + total.masked_fill(labels == ignore, 0.0).to(loss.dtype)
            rows.append((loss, total))
        return rows
    return [(total,) for total in totals]


__all__ = ["complete_lse", "lse_axes"]
