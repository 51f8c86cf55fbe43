"""What is asked of the outer search, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..costmodel.cluster import Cluster
from ..ir.errors import CompileError
from .constraints import Constraints
from .micro import TimeSplit
from .place import MEMORY_SHARE, PlacementResult
from .search_evaluate import Pipeline
from .search_layouts import Layout
from .search_units import Units


@dataclass(frozen=True)
class Wishes:
    """What the user asks of a plan; None and empty leave it to the search.

    Attributes:
        stages, micro: their number.
        order: `gpipe`, `1f1b` or `interleaved`.
        recompute: whether activations may be computed again.
        constraints: on placements and memory.
    """

    stages: int | None = None
    micro: int | None = None
    order: str = ""
    recompute: bool = True
    constraints: Constraints = Constraints()


@dataclass(frozen=True)
class Found:
    """A plan that was evaluated, and the placement that it stands on.

    Attributes:
        placement: of the short program on a stage's mesh; None where stages differ in devices.
        simulated_us: the step of its schedules in the event simulator; None where it was not among
            the best few.
    """

    pipeline: Pipeline
    layout: Layout
    placement: PlacementResult | None = field(repr=False)
    simulated_us: float | None = None


@dataclass(frozen=True)
class SearchResult:
    """What the outer search found.

    Attributes:
        best: the fastest plan that fits.
        split: the program over time that its stages are cut from.
        units: what stages are made of.
        rejected: the best plan of each other layout and of other numbers of micro-batches, and why
            it lost, the nearest first.
        layouts: how many there are; `bounded` of them could not win by their bound alone.
        evaluated: plans that were evaluated.
        lower_bound_us: no plan of the layouts that were looked at is faster than this.
        seconds: that the search took.
        complete: False where the budget ended it.
    """

    best: Found
    split: TimeSplit
    units: Units
    rejected: tuple[tuple[Found, str], ...]
    layouts: int
    bounded: int
    evaluated: int
    lower_bound_us: float
    seconds: float
    complete: bool


def rank(found: Found) -> tuple[bool, float, int, int, int, bool]:
    """The order of plans: simulated ones first, then by time; of equals the simpler one."""
    plan = found.pipeline
    step = found.simulated_us if found.simulated_us is not None else plan.step_us
    return found.simulated_us is None, step, len(plan.stages), plan.chunks, plan.micro, plan.order != "1f1b"


def why(plan: Pipeline, best: Pipeline) -> str:
    """What a plan loses against the best one, in words."""
    own, other = plan.losses_us(), best.losses_us()
    lost = sorted(((own[k] - other[k], k) for k in own), reverse=True)
    more = [f"{name} +{us / 1e3:.3g} ms" for us, name in lost if us > 0.01 * best.step_us][:2]
    return ", ".join(more) or "no faster"


def nothing_fits(plan: Pipeline, cluster: Cluster) -> CompileError:
    """Says by how much the nearest plan is over, on which device, and what would help."""
    stage = max(plan.stages, key=lambda s: s.peak_bytes - s.memory_bytes)
    number = plan.stages.index(stage)
    over = stage.peak_bytes - stage.memory_bytes
    times = stage.peak_bytes / stage.memory_bytes
    where = f"stage {number} of {len(plan.stages)}" if len(plan.stages) > 1 else "each rank"
    return CompileError(
        "W0402", f"no plan fits on {cluster}",
        reason=f"the nearest one needs {stage.peak_bytes / 1e9:.3g} GB on {where} "
        f"({stage.kind}), {over / 1e9:.3g} GB more than the {stage.memory_bytes / 1e9:.3g} GB that "
        "it may fill",
        hint=f"devices of {stage.peak_bytes / MEMORY_SHARE / 1e9:.3g} GB, about "
        f"{int(cluster.ranks * times) + 1} devices, or a smaller batch",
    )  # fmt: skip
