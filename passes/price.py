"""The price of a placed module, from its text alone: op times plus reshard times.

This does not use the search: it walks the placed module and asks the cost model, so that the
search's objective can be checked against it.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..costmodel.cluster import Cluster
from ..costmodel.collectives import collective_cost
from ..costmodel.estimate import op_time_us
from ..ir.errors import CompileError
from ..ir.module import Function, Module, Op
from ..ir.types import Mesh, local_bytes
from .place_model import PERSISTENT
from .place_runs import executions
from .reshard import reshard_cost_us


@dataclass(frozen=True)
class Price:
    """Predicted time of a step, one action after the other, and memory of a rank.

    Attributes:
        compute_us: time of the ops.
        reshard_us: time of the reshards.
        persistent_bytes: parameters, buffers and optimizer states.
        peak_bytes: these, and the most that the values of a step hold at a time.
    """

    compute_us: float
    reshard_us: float
    persistent_bytes: int
    peak_bytes: int

    @property
    def total_us(self) -> float:
        """Time of a step."""
        return self.compute_us + self.reshard_us


def price(module: Module, cluster: Cluster) -> Price:
    """Price a placed module. Raises CompileError W0201 where it is not one."""
    mesh = module.mesh
    if mesh is None or module.level != "placed":
        raise CompileError("W0201", f"a {module.level} module has no price: it must be placed")
    cost = collective_cost(cluster, mesh)
    counts = executions(module)
    compute_us = reshard_us = 0.0
    for function, op in module.walk():
        runs = counts[function.name]
        if op.name == "reshard":
            source, target = op.operands[0].type, op.result.type
            assert source.placement is not None and target.placement is not None
            step_us = reshard_cost_us(source, mesh, source.placement, target.placement, cost)
            reshard_us += runs * step_us
        else:
            states = tuple(op.split.get(axis, "") for axis in mesh.names)
            compute_us += runs * op_time_us(op, states, mesh, cluster)
    persistent = sum(
        local_bytes(value.type, mesh)
        for value, attrs in zip(module.entry.params, module.entry.param_attrs, strict=True)
        if attrs.get("role") in PERSISTENT
    )
    return Price(compute_us, reshard_us, persistent, persistent + _peak(module, mesh))


def _peak(module: Module, mesh: Mesh) -> int:
    """Most bytes that values hold at a time beside the entry's persistent parameters."""
    peaks: dict[str, int] = {}

    def visit(function: Function) -> int:
        if function.name not in peaks:
            inner = {}
            for op in function.ops:
                if op.name == "call":
                    name = str(op.attrs["callee"])
                    inner[name] = visit(module.function(name))
            peaks[function.name] = function_peak(function, mesh, inner)
        return peaks[function.name]

    return visit(module.entry)


def function_peak(function: Function, mesh: Mesh, inner: dict[str, int]) -> int:
    """Most bytes that the values of a placed function's ops hold at a time; `inner` of its callees.

    Views share the bytes of their operand and are not counted.
    """
    last: dict[str, int] = {}
    for index, op in enumerate(function.ops):
        last.update((value.name, index) for value in op.operands)
    last.update((value.name, len(function.ops)) for value in function.results)
    ending: dict[int, list[int]] = {}
    live = peak = 0
    for index, op in enumerate(function.ops):
        made = 0 if _is_view(op) else sum(local_bytes(v.type, mesh) for v in op.results)
        nested = inner.get(str(op.attrs["callee"]), 0) if op.name == "call" else 0
        live += made
        peak = max(peak, live + max(0, nested - made))
        for value in op.results:
            if not _is_view(op):
                ending.setdefault(last.get(value.name, index), []).append(
                    local_bytes(value.type, mesh)
                )
        live -= sum(ending.pop(index, ()))
    return peak


def _is_view(op: Op) -> bool:
    return op.name in ("reshape", "permute", "expand", "slice")
