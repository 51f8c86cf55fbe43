"""Placed to spmd: reshards become collectives, and log-sum-exp splits get their fix-up.

    %y = einsum(%x, %w) {...} split [tp = k] : f32[8, 4]{P(sum)}
    %r = reshard(%y) : f32[8, 4]{B}
becomes
    %y = einsum(%x, %w) {...} split [tp = k] : f32[8, 4]{P(sum)}
    %r = all_reduce(%y) {axis = "tp", combine = "sum"} : f32[8, 4]{B}

Reshards of one value share their steps: each placement on the way is a copy that later reshards may
start from, the planner takes the cheapest start.

Log-sum-exp splits: see `passes/lower_lse.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..costmodel.cluster import parse_cluster
from ..costmodel.collectives import collective_cost
from ..ir.module import Function, Module, Namer, Op, Value
from ..ir.types import Mesh
from .base import Pass
from .joined import Joins, joins
from .lower_lse import FIXES, Fixer, lse_axes, placement_of
from .reshard import Placements, StepCost, default_cost, plan_from


def lower(module: Module, cost: StepCost | None = None) -> Module:
    """The spmd module of a placed one. Raises CompileError.

    Args:
        cost: times of collectives; by default those of the module's `cluster` attribute.
    """
    mesh = module.mesh or Mesh()
    step_cost = cost or module_cost(module)
    entry = _Lowering(module.entry, mesh, step_cost, joins(module)).run()
    rest = (_Lowering(function, mesh, step_cost).run() for function in module.functions[1:])
    return module.with_(level="spmd", functions=(entry, *rest))


def module_cost(module: Module) -> StepCost:
    """The collectives' cost on the module's cluster, or on one host of GPUs where none is named."""
    text = module.attrs.get("cluster")
    if not isinstance(text, str) or module.mesh is None:
        return default_cost
    cluster = parse_cluster(text)
    # a mesh of another size was put on by hand: the links of its axes are not known
    return (
        collective_cost(cluster, module.mesh) if cluster.ranks == module.mesh.size else default_cost
    )


@dataclass(frozen=True)
class Lower(Pass):
    """Reshards become collectives, log-sum-exp splits get their fix-up: see `passes/lower.py`.

    Before:  %r = reshard(%y) : f32[8, 4]{B}
    After:   %r = all_reduce(%y) {axis = "tp", combine = "sum"} : f32[8, 4]{B}
    """

    name: ClassVar[str] = "lower"
    summary: ClassVar[str] = "turn reshards into the cheapest collectives"
    levels: ClassVar[tuple[str, ...]] = ("placed",)

    def run(self, module: Module) -> Module:
        """The spmd module. Raises CompileError."""
        return lower(module)


class _Lowering:
    """Lowers one function."""

    def __init__(
        self,
        function: Function,
        mesh: Mesh,
        cost: StepCost,
        joins: Joins = Joins(),
    ) -> None:
        self.function, self.mesh, self.cost, self.joins = function, mesh, cost, joins
        taken = [p.name for p in function.params]
        taken += [result.name for op in function.ops for result in op.results]
        self.namer = Namer(tuple(taken))
        self.ops: list[Op] = []
        #: value -> the value it was resharded from, and that value's copies by placement
        self.origin: dict[str, str] = {}
        self.copies: dict[str, dict[Placements, Value]] = {}
        self.renamed: dict[str, Value] = {}

    def run(self) -> Function:
        """The lowered function."""
        for op in self.function.ops:
            operands = tuple(self.renamed.get(v.name, v) for v in op.operands)
            op = op.with_(operands=operands)
            axes = lse_axes(op, self.mesh)
            if op.name == "reshard":
                self._reshard(op)
            elif axes:
                FIXES[op.name](Fixer(op, axes, self.mesh, self.namer, self.ops))
            else:
                self.ops.append(op)
        results = tuple(self.renamed.get(v.name, v) for v in self.function.results)
        return self.function.with_(ops=tuple(self.ops), results=results)

    def _reshard(self, op: Op) -> None:
        """Emit the cheapest steps from any copy at hand; readers then use where they end."""
        (held,) = op.operands
        root = self.origin.get(held.name, held.name)
        copies = self.copies.setdefault(root, {placement_of(held): held})
        target = placement_of(op.result)
        cost = self.joins.cost(root, self.cost)
        start, steps, _ = plan_from(held.type, self.mesh, tuple(copies), target, cost)
        current = list(copies.values())[start]
        for number, step in enumerate(steps, start=1):
            last = number == len(steps)
            name = op.result.name if last else self.namer(f"{op.result.name}_s")
            value = Value(name, held.type.placed(step.placement))
            self.ops.append(Op(step.op, (current,), (value,), step.attrs, loc=op.loc))
            copies[step.placement] = current = value
            self.origin[name] = root
        self.renamed[op.result.name] = current


__all__ = ["Lower", "lower", "module_cost"]
