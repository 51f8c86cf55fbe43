"""Predicted time of a schedule's actions, from the cost model."""

from __future__ import annotations

from ..costmodel.cluster import Cluster
from ..costmodel.collectives import collective_time_us
from ..costmodel.estimate import op_time_us
from ..ir.module import Module, Op
from ..ir.opdef import OPS
from ..ir.types import Mesh, local_bytes
from .timeline import Timeline, predict


def action_time_us(op: Op, module: Module, cluster: Cluster) -> float:
    """Time of one action of a schedule on the rank with the largest shards, in us.

    A kernel function's call is one launch that reads the region's inputs and writes its outputs:
    the work of its ops with the launch counted once, and at least that of the largest.
    """
    mesh = module.mesh or Mesh()
    if op.name == "call":
        body = module.function(str(op.attrs["callee"])).ops
        times = [action_time_us(inner, module, cluster) for inner in body]
        launch = cluster.device.launch_us
        return max([launch + sum(t - launch for t in times if t > launch), *times], default=0.0)
    if OPS[op.name].family == "collective":
        axis = str(op.attrs.get("axis", ""))
        if not op.operands or axis not in mesh.names:
            return 0.0
        size = local_bytes(op.operands[0].type, mesh)
        link = cluster.axis_link(mesh, axis)
        return collective_time_us(op.name, size, mesh.sizes[mesh.axis(axis)], link)
    if OPS[op.name].family in ("control", "creation") and OPS[op.name].signature is None:
        return 0.0
    return op_time_us(op, [op.split.get(name, "") for name in mesh.names], mesh, cluster)


def predict_timeline(schedule: Module, cluster: Cluster) -> Timeline:
    """The predicted step of a schedule-level module."""
    return predict(schedule, lambda op: action_time_us(op, schedule, cluster))
