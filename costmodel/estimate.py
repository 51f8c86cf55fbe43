"""Time of one op under a split: a roofline on local sizes, from the op's signature.

    time = launch + max(flops / (peak * efficiency), bytes / (DRAM bandwidth * efficiency))

on the largest shard (uneven parts are rounded up); an axis that the op does not use repeats the
whole work on its ranks, so it divides nothing. Williams, Waterman and Patterson, Roofline, 2009.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from math import prod

from ..ir.module import Op
from ..ir.opdef import OPS, bytes_of, signature_of
from ..ir.signature import Signature
from ..ir.types import FLOATS, Mesh, Placement, TensorType, local_bytes, shard_size
from .cluster import Cluster
from .collectives import collective_time_us, spread_of
from .devices import COMPUTE_EFFICIENCY, DRAM_EFFICIENCY

#: ops that only change how memory is read: no kernel runs
VIEWS = frozenset({"reshape", "permute", "expand", "slice"})
#: operands of which only the rows that appear in the result are read
SPARSE_OPERANDS = {"embedding": 1, "take": 0, "gather": 0}


def op_time_us(op: Op, states: Sequence[str], mesh: Mesh, cluster: Cluster) -> float:
    """Time in us of an op, with one state per mesh axis ('' where the axis is not used).

    Includes the collectives behind an op whose split dim is combined by log-sum-exp, for `lower`
    adds them. Calls and reshards take no time of their own; creation ops without operands neither:
    they run once, when a plan is loaded. Raises SignatureError, KeyError.
    """
    entry = OPS[op.name]
    if op.name in ("call", "reshard") or (entry.family == "creation" and not op.operands):
        return 0.0
    if op.name in VIEWS:
        return cluster.device.launch_us
    if entry.signature is None:
        return _roofline_us(0.0, "f32", bytes_of(op), cluster)
    signature = signature_of(op)
    if len(op.results) > 1 and entry.lse_results:
        fixup = _lse_fixup_us(op, signature, states, mesh, cluster)
    else:
        fixup = 0.0
    ins, outs = signature.placements(states)
    moved = sum(_bytes(v.type, p, mesh) for v, p in zip(op.results, outs, strict=True))
    first = moved
    for index, (value, placement) in enumerate(zip(op.operands, ins, strict=True)):
        sparse = SPARSE_OPERANDS.get(op.name) == index
        moved += first if sparse else _bytes(value.type, placement, mesh)
    flops = local_flops(op, signature, states, mesh)
    dtype = "f32"
    if entry.family == "contraction":
        dtype = op.results[0].type.dtype
    return _roofline_us(flops, dtype, moved, cluster) + fixup


def local_flops(op: Op, signature: Signature, states: Sequence[str], mesh: Mesh) -> float:
    """Floating-point operations of the largest shard."""
    sizes = {name: dim.size for name, dim in signature.dims.items()}
    for state, parts in zip(states, mesh.sizes, strict=True):
        if state in sizes:
            sizes[state] = shard_size(sizes[state], parts, 0)
    entry = OPS[op.name]
    if entry.flops is None:
        return entry.flops_per_point * prod(sizes.values())
    dims = {name: replace(dim, size=sizes[name]) for name, dim in signature.dims.items()}
    return entry.flops(replace(signature, dims=dims))


@lru_cache(maxsize=1 << 18)
def _bytes(type: TensorType, placement: tuple[Placement, ...], mesh: Mesh) -> int:
    return local_bytes(type.placed(placement), mesh)


def _roofline_us(flops: float, dtype: str, moved_bytes: float, cluster: Cluster) -> float:
    device = cluster.device
    peak = device.peak_flops_per_s(dtype if dtype in FLOATS else "f32")
    compute_s = flops / (peak * COMPUTE_EFFICIENCY)
    memory_s = moved_bytes / (device.dram_bytes_per_s * DRAM_EFFICIENCY)
    return device.launch_us + max(compute_s, memory_s) * 1e6


def _lse_fixup_us(
    op: Op, signature: Signature, states: Sequence[str], mesh: Mesh, cluster: Cluster
) -> float:
    """Log-sum-exp of the last result over each axis that splits such a dim, then a rescaling."""
    axes = [
        name
        for name, state in zip(mesh.names, states, strict=True)
        if state in signature.dims and signature.dims[state].combine == "lse"
    ]
    if not axes:
        return 0.0
    outs = signature.placements(states)[1]
    last = _bytes(op.results[-1].type, outs[-1], mesh)
    time_us = sum(
        collective_time_us("lse_combine", last, spread_of(cluster, mesh, name), cluster)
        for name in axes
    )
    rescaled = 2 * sum(_bytes(v.type, p, mesh) for v, p in zip(op.results, outs, strict=True))
    # difference of the two log-sum-exps, its exponential, the product
    return time_us + 3 * cluster.device.launch_us + _roofline_us(0.0, "f32", rescaled, cluster)
