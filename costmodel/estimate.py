"""Time of an op under a split, as passes and the simulator ask for it.

The op becomes kernel calls on the sizes of its largest shard (uneven parts are rounded up; an axis that
the op does not use repeats the whole work on its ranks, so it divides nothing), and the learned model
prices them, see `kernel_calls.py`. On top comes the launch of one action. On a CPU the time of a call
is its roofline: compute or bytes, whichever is longer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from math import prod
from typing import Any

from ..ir.module import Op
from ..ir.opdef import OPS, bytes_of, signature_of
from ..ir.signature import Signature
from ..ir.types import Mesh, Placement, TensorType, local_bytes, shard_size
from .cluster import Cluster
from .collectives import collective_time_us, spread_of
from .datasheet import Datasheet, find_datasheet
from .devices import Device
from .kernel_calls import Call, calls_of, stream_call, times_us

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
    return op_times_us(op, [states], mesh, cluster)[0]


def op_times_us(
    op: Op, choices: Sequence[Sequence[str]], mesh: Mesh, cluster: Cluster
) -> list[float]:
    """Times of an op under several splits, priced together; see `op_time_us`."""
    entry, launch_us = OPS[op.name], launch_of(cluster)
    if op.name in ("call", "reshard") or (entry.family == "creation" and not op.operands):
        return [0.0] * len(choices)
    if op.name in VIEWS:
        return [launch_us] * len(choices)
    sheet = sheet_of(cluster.device)
    if entry.signature is None:
        moved = float(bytes_of(op))
        calls = [[stream_call(sheet, op.name, "f32", moved, 0.0, 1024)]] * len(choices)
        extra = [0.0] * len(choices)
    else:
        signature = signature_of(op)
        calls = [_calls(op, signature, states, mesh, sheet) for states in choices]
        extra = [_lse_fixup_us(op, signature, states, mesh, cluster) for states in choices]
    flat = times_us([call for group in calls for call in group], cluster.device.calibration)
    out, start, slow = [], 0, sharing(cluster)
    for group, more in zip(calls, extra, strict=True):
        out.append(launch_us + slow * sum(flat[start : start + len(group)]) + more)
        start += len(group)
    return out


def sharing(cluster: Cluster) -> float:
    """How many ranks of a host share a core: each is as much slower."""
    cores = cluster.device.cores
    return max(1.0, cluster.devices_per_host / cores) if cores else 1.0


def launch_of(cluster: Cluster) -> float:
    """Least time of an action in us."""
    return cluster.device.launch_us * sharing(cluster)


@lru_cache(maxsize=256)
def sheet_of(device: Device) -> Datasheet:
    """The datasheet of a cluster's device, with the rates that a cluster file gave it."""
    sheet = device.own_sheet or find_datasheet(device.sheet)
    rates: dict[str, Any] = {n: rate * 1e-12 for n, rate in device.flops_per_s if n != "f64"}
    return replace(sheet, mem_gbs=device.dram_bytes_per_s * 1e-9, **rates)


def _calls(
    op: Op, signature: Signature, states: Sequence[str], mesh: Mesh, sheet: Datasheet
) -> list[Call]:
    ins, outs = signature.placements(states)
    written = sum(_bytes(v.type, p, mesh) for v, p in zip(op.results, outs, strict=True))
    read = 0
    for index, (value, placement) in enumerate(zip(op.operands, ins, strict=True)):
        sparse = SPARSE_OPERANDS.get(op.name) == index
        read += written if sparse else _bytes(value.type, placement, mesh)
    sizes = local_sizes(signature, states, mesh)
    return calls_of(op, signature, sizes, read, written, sheet)


def local_sizes(signature: Signature, states: Sequence[str], mesh: Mesh) -> dict[str, int]:
    """Sizes of the iteration dims of the largest shard."""
    sizes = {name: dim.size for name, dim in signature.dims.items()}
    for state, parts in zip(states, mesh.sizes, strict=True):
        if state in sizes:
            sizes[state] = shard_size(sizes[state], parts, 0)
    return sizes


def local_flops(op: Op, signature: Signature, states: Sequence[str], mesh: Mesh) -> float:
    """Floating-point operations of the largest shard."""
    sizes = local_sizes(signature, states, mesh)
    entry = OPS[op.name]
    if entry.flops is None:
        return entry.flops_per_point * prod(sizes.values())
    dims = {name: replace(dim, size=sizes[name]) for name, dim in signature.dims.items()}
    return entry.flops(replace(signature, dims=dims))


@lru_cache(maxsize=1 << 18)
def _bytes(type: TensorType, placement: tuple[Placement, ...], mesh: Mesh) -> int:
    return local_bytes(type.placed(placement), mesh)


def _lse_fixup_us(
    op: Op, signature: Signature, states: Sequence[str], mesh: Mesh, cluster: Cluster
) -> float:
    """Log-sum-exp of the last result over each axis that splits such a dim, then a rescaling."""
    if len(op.results) < 2 or not OPS[op.name].lse_results:
        return 0.0
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
    whole = sum(_bytes(v.type, p, mesh) for v, p in zip(op.results, outs, strict=True))
    rescaling = stream_call(
        sheet_of(cluster.device), "mul", "f32", float(whole), float(whole), 1024
    )
    (rescale_us,) = times_us([rescaling], cluster.device.calibration)
    # difference of the two log-sum-exps, its exponential, the product
    return time_us + 4 * launch_of(cluster) + sharing(cluster) * rescale_us
