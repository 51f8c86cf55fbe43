"""The price of a placed module, from its text alone: op times plus reshard times.

This does not use the search: it walks the placed module and asks the cost model, so that the
search's objective can be checked against it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..costmodel.cluster import Cluster
from ..costmodel.collectives import collective_cost
from ..costmodel.estimate import op_time_us
from ..ir.errors import CompileError
from ..ir.module import Function, Module, Op
from ..ir.types import Mesh, local_bytes
from .apply import LOOP
from .joined import joins
from .place_body import PERSISTENT
from .reshard import StepCost, reshard_cost_us


@dataclass(frozen=True)
class Price:
    """Predicted time of a step, one action after the other, and memory of a rank.

    Attributes:
        compute_us: time of the ops.
        reshard_us: time of the reshards.
        phase_us: of both, what belongs to `forward` and `backward`, of one micro-batch, and to
            `before` and `update`, once; empty where the phases are not known.
        persistent_bytes: parameters, buffers and optimizer states.
        peak_bytes: these, and the most that the values of a step hold at a time.
        saved_bytes: values that a forward pass makes for its backward pass, of one micro-batch; 0
            where the phases are not known.
    """

    compute_us: float
    reshard_us: float
    persistent_bytes: int
    peak_bytes: int
    phase_us: Mapping[str, float] = field(default_factory=dict)
    saved_bytes: int = 0

    @property
    def transient_bytes(self) -> int:
        """What is held at the peak beside persistent and saved values, of one micro-batch."""
        return max(0, self.peak_bytes - self.persistent_bytes - self.saved_bytes)

    @property
    def total_us(self) -> float:
        """Time of a step."""
        return self.compute_us + self.reshard_us


def price(
    module: Module, cluster: Cluster, phases: Sequence[str] | None = None, micro: int = 1
) -> Price:
    """Price a placed module.

    Args:
        phases: of each op of the entry; see `apply_phased`.
        micro: runs of forward and backward ops.

    Raises CompileError W0201 where it is not placed.
    """
    mesh = module.mesh
    if mesh is None or module.level != "placed":
        raise CompileError("W0201", f"a {module.level} module has no price: it must be placed")
    pricer = Pricer(module, mesh, cluster)
    compute_us = reshard_us = 0.0
    phase_us: dict[str, float] = {}
    for index, op in enumerate(module.entry.ops):
        compute, reshard = pricer.op_us(op)
        phase = phases[index] if phases is not None else ""
        runs = micro if phase in LOOP else 1
        compute_us, reshard_us = compute_us + runs * compute, reshard_us + runs * reshard
        if phase:
            phase_us[phase] = phase_us.get(phase, 0.0) + compute + reshard
    persistent = sum(
        local_bytes(value.type, mesh)
        for value, attrs in zip(module.entry.params, module.entry.param_attrs, strict=True)
        if attrs.get("role") in PERSISTENT
    )
    peak = persistent + _peak(module, mesh)
    saved = _saved(module, mesh, phases) if phases is not None else 0
    return Price(compute_us, reshard_us, persistent, peak, phase_us, saved)


def _saved(module: Module, mesh: Mesh, phases: Sequence[str]) -> int:
    """Bytes of values that a forward op makes and a backward op reads; views are their operands."""
    owner: dict[str, str] = {}
    size: dict[str, int] = {}
    late: set[str] = set()
    for op, phase in zip(module.entry.ops, phases, strict=True):
        if phase == "backward":
            late.update(owner.get(value.name, "") for value in op.operands)
        if phase != "forward":
            continue
        for value in op.results:
            source = op.operands[0].name if _is_view(op) else value.name
            owner[value.name] = owner.get(source, "") if _is_view(op) else value.name
            size[value.name] = local_bytes(value.type, mesh)
    return sum(size[name] for name in late if name)


class Pricer:
    """Times of ops, once for equal functions."""

    def __init__(self, module: Module, mesh: Mesh, cluster: Cluster) -> None:
        self.module, self.mesh, self.cluster = module, mesh, cluster
        self.cost = collective_cost(cluster, mesh)
        self.joins = joins(module)
        self.table = {function.name: function for function in module.functions}
        self.known: dict[str, tuple[float, float]] = {}

    def op_us(self, op: Op) -> tuple[float, float]:
        """(compute, reshards) of one run of an op of the entry."""
        moves = op.name == "reshard"
        return self._us(op, self.joins.cost(op.operands[0].name, self.cost) if moves else self.cost)

    def _us(self, op: Op, cost: StepCost) -> tuple[float, float]:
        if op.name == "call":
            return self.function_us(str(op.attrs["callee"]))
        if op.name == "reshard":
            source, target = op.operands[0].type, op.result.type
            assert source.placement is not None and target.placement is not None
            return 0.0, reshard_cost_us(
                source, self.mesh, source.placement, target.placement, cost
            )
        states = tuple(op.split.get(axis, "") for axis in self.mesh.names)
        return op_time_us(op, states, self.mesh, self.cluster), 0.0

    def function_us(self, name: str) -> tuple[float, float]:
        """(compute, reshards) of one call."""
        if name not in self.known:
            times = [self._us(op, self.cost) for op in self.table[name].ops]
            self.known[name] = sum(c for c, _ in times), sum(r for _, r in times)
        return self.known[name]


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
