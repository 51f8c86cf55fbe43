"""Searching a plan: `weft.search`, and the budget of `weft.plan`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

from ..costmodel.cluster import Cluster, parse_cluster
from ..ir.errors import CompileError
from ..ir.module import Module
from ..passes.constraints import Constraints
from ..passes.manager import PassManager
from ..passes.orders import ORDERS
from ..passes.pipeline import parse_pipeline
from ..passes.search import SearchResult, Wishes, search_plan
from .api import plan_target, trace_target
from .driver import Program, Progress, logical_passes
from .load_target import Target
from .options import OPTIONS, Options, expect
from .pass_table import ALL_PASSES
from .plan import Plan
from .search_text import explain_search

_UNITS = {"": 1.0, "s": 1.0, "ms": 1e-3, "m": 60.0, "min": 60.0, "h": 3600.0}
_BUDGET = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(s|ms|m|min|h|)")


def seconds_of(budget: str | float) -> float:
    """Seconds of `10s`, `2min` or a number. Raises CompileError W1001."""
    if isinstance(budget, (int, float)) and not isinstance(budget, bool):
        seconds = float(budget)
    else:
        expect(budget, str, "the budget")
        match = _BUDGET.fullmatch(budget.strip()) if isinstance(budget, str) else None
        seconds = float(match[1]) * _UNITS[match[2]] if match else -1.0
    if not seconds > 0:
        raise CompileError(
            "W1001", f"the budget {budget!r} is no time", reason="it must be a positive number of "
            "seconds, or a text with a unit", hint='write for example "10s" or "2min"',
        )  # fmt: skip
    return seconds


@dataclass(frozen=True)
class PlanSearch:
    """What `weft.search` found.

    Attributes:
        result: the best plan, what lost against it, and the bound.
        target: what was planned.
        cluster: specification that it was planned for.
        train: name of the optimizer, as for `weft.plan`.
    """

    result: SearchResult
    target: Target
    cluster: str
    train: str
    options: Options
    hyper: Mapping[str, Any]

    def explain(self) -> str:
        """The plan in words, where its time goes, and what it was chosen over."""
        return explain_search(self.result)

    def plan(self) -> Plan:
        """The plan at every level, ready to save and run.

        Raises CompileError W0404 for one of several stages or micro-batches.
        """
        pipeline = self.result.best.pipeline
        if len(pipeline.stages) > 1 or pipeline.micro > 1:
            raise CompileError(
                "W0404", f"the best plan has {len(pipeline.stages)} stages and {pipeline.micro} "
                "micro-batches", reason="an artifact holds plans of one stage and one micro-batch",
                hint="search with stages=1 and micro=1 for the best of those",
            )  # fmt: skip
        mesh = mesh_option(self.result)
        return plan_target(
            self.target, cluster=self.cluster, train=self.train, mesh=mesh, options=self.options,
            hyper=self.hyper,
        )  # fmt: skip


def mesh_option(result: SearchResult) -> str:
    """The mesh of a plan of one stage, as the option `mesh` of the place pass."""
    axes = result.best.layout.mesh.axes
    return ",".join(f"{name}={size}" for name, size in axes)


def search(
    model: Any,
    example_inputs: Sequence[Any] | Mapping[str, Any] = (),
    *,
    cluster: str = "1x1:cpu",
    optimizer: str = "",
    budget: str | float = inf,
    stages: int | None = None,
    micro: int | None = None,
    order: str = "",
    recompute: bool = True,
    constraints: str = "",
    options: Options = OPTIONS,
    **hyper: Any,
) -> PlanSearch:
    """Search stages, micro-batches, order, recompute and placements of a train step together.

    Args:
        model, example_inputs, cluster, optimizer: as for `weft.plan`.
        budget: time after which the best plan so far is taken, `10s` for example.
        stages, micro: their number; the search chooses where they are left out.
        order: `gpipe`, `1f1b` or `interleaved`.
        recompute: whether activations may be computed again in the backward pass.
        constraints: what placements must obey, see `passes/constraints.py`.

    Raises CompileError: W0402 where nothing fits, W0404 where the wishes cannot be met.
    """
    keywords = isinstance(example_inputs, Mapping)
    args = () if keywords else tuple(example_inputs)
    kwargs = dict(example_inputs) if isinstance(example_inputs, Mapping) else {}
    name = getattr(model, "__qualname__", type(model).__qualname__)
    return search_target(
        Target(name, model, args, kwargs), cluster=cluster, train=optimizer, budget=budget,
        stages=stages, micro=micro, order=order, recompute=recompute, constraints=constraints,
        options=options, hyper=hyper,
    )  # fmt: skip


def search_target(
    target: Target,
    *,
    cluster: str,
    train: str = "",
    budget: str | float = inf,
    stages: int | None = None,
    micro: int | None = None,
    order: str = "",
    recompute: bool = True,
    constraints: str = "",
    options: Options = OPTIONS,
    hyper: Mapping[str, Any] | None = None,
) -> PlanSearch:
    """Trace and search a target. See `search`."""
    for name, value in (("stages", stages), ("micro", micro)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise CompileError(
                "W1001", f"{name} is {value!r}", hint="it must be a positive whole number"
            )
    if order not in ("", *ORDERS):
        raise CompileError(
            "W1001", f"there is no pipeline schedule {order!r}",
            reason=f"known: {', '.join(ORDERS)}", hint='order="1f1b"',
        )  # fmt: skip
    wishes = Wishes(stages, micro, order, recompute, Constraints.parse(constraints))
    seconds = inf if budget in (inf, "inf") else seconds_of(budget)
    parsed = parse_cluster(cluster)
    progress = Progress(options.progress)
    try:
        progress("trace")
        program = trace_target(target, train, hyper or {})
        progress("search")
        result = search_program(program, parsed, wishes, seconds)
    finally:
        progress.stop()
    return PlanSearch(result, target, cluster, train, options, hyper or {})


def search_program(
    program: Program, cluster: Cluster, wishes: Wishes, budget_s: float
) -> SearchResult:
    """Search a plan of a traced program."""
    return search_plan(logical(program), cluster, wishes=wishes, budget_s=budget_s)


def logical(program: Program) -> Module:
    """The program as placement sees it: simplified, outlined, differentiated."""
    manager = PassManager(parse_pipeline(logical_passes(program.kind), ALL_PASSES))
    return manager.run(program.module)
