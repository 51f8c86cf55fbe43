"""Searching a plan: `weft.search`, and the budget of `weft.plan`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

from ..costmodel.cluster import parse_cluster
from ..ir.errors import CompileError
from ..passes.constraints import Constraints
from ..passes.orders import ORDERS
from ..passes.search import SearchResult, Wishes
from .api import trace_target
from .driver import Program, Progress, logical, plan_program
from .load_target import Target, target_of
from .options import OPTIONS, Options
from .plan import Plan
from .searched import Searched, searched, seconds_of


@dataclass(frozen=True)
class PlanSearch:
    """What `weft.search` found.

    Attributes:
        found: the best plan, what lost against it, and the bound.
        program: the traced program.
        cluster: specification that it was planned for.
    """

    found: Searched
    program: Program
    cluster: str
    options: Options

    @property
    def result(self) -> SearchResult:
        """The best plan in numbers, those that lost, and the bound."""
        return self.found.result

    def explain(self) -> str:
        """The plan in words, where its time goes, and what it was chosen over."""
        return self.found.explain()

    def plan(self) -> Plan:
        """The plan at every level, ready to save and run. Raises CompileError."""
        progress = Progress(self.options.progress)
        try:
            return plan_program(
                self.program, self.cluster, "", self.options, progress, found=self.found
            )
        finally:
            progress.stop()


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
    return search_target(
        target_of(model, example_inputs), cluster=cluster, train=optimizer, budget=budget,
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
    seconds = seconds_of(budget)
    parsed = parse_cluster(cluster)
    progress = Progress(options.progress)
    try:
        progress("trace")
        program = trace_target(target, train, hyper or {})
        progress("search")
        found = searched(logical(program), parsed, wishes, seconds)
    finally:
        progress.stop()
    return PlanSearch(found, program, cluster, options)
