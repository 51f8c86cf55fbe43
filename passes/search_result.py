"""What is asked of the outer search, and what it answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..costmodel.cluster import Cluster
from ..costmodel.simulate import Simulation
from ..ir.errors import CompileError
from .constraints import Constraints
from .micro import TimeSplit
from .place import MEMORY_SHARE, PlacementResult
from .search_evaluate import Pipeline
from .search_layouts import Layout
from .search_realize import Realized
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
class Replay:
    """The schedules of a plan in the event simulator.

    Attributes:
        step_us: time of the step.
        exposed_us: mesh axis, or `stage` for transfers between stages -> time that compute waits for
            it, mean over ranks.
        bubble: share of the step in which a rank waits for other stages, mean over ranks.
        peak_bytes: of the fullest rank.
    """

    step_us: float
    exposed_us: Mapping[str, float]
    bubble: float
    peak_bytes: int

    @staticmethod
    def of(step: Simulation) -> Replay:
        """Of a simulation."""
        return Replay(step.step_us, dict(step.exposed_us), step.bubble, step.peak_bytes)


@dataclass(frozen=True)
class Found:
    """A plan that was evaluated, and the placement that it stands on.

    Attributes:
        placement: of the short program on a stage's mesh; None where stages differ in devices.
        replay: its schedules in the event simulator; None where it was not among the best few.
    """

    pipeline: Pipeline
    layout: Layout
    placement: PlacementResult | None = field(repr=False)
    replay: Replay | None = None

    @property
    def simulated_us(self) -> float | None:
        """The step in the event simulator."""
        return self.replay.step_us if self.replay is not None else None


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
        slow: layouts that were not placed, as their estimate was far above the best plan.
        evaluated: plans that were evaluated.
        lower_bound_us: no plan of the layouts that were looked at is faster than this.
        seconds: that the search took.
        complete: False where the budget ended it.
        realized: the best plan's program, where it was written down.
    """

    best: Found
    split: TimeSplit
    units: Units
    rejected: tuple[tuple[Found, str], ...]
    layouts: int
    bounded: int
    slow: int
    evaluated: int
    lower_bound_us: float
    seconds: float
    complete: bool
    realized: Realized | None = field(default=None, repr=False, compare=False)


def rank(found: Found) -> tuple[int, float, int, int, int, bool]:
    """The order of plans: simulated ones first, then by time; of equals the simpler one. Those that
    do not fit in the simulator, which knows all values, come last."""
    plan, replay = found.pipeline, found.replay
    group, step = 1, plan.step_us
    if replay is not None:
        device_bytes = max(stage.memory_bytes for stage in plan.stages) / MEMORY_SHARE
        group, step = (2 if replay.peak_bytes > device_bytes else 0), replay.step_us
    return group, step, len(plan.stages), plan.chunks, plan.micro, plan.order != "1f1b"


def why(plan: Pipeline, best: Pipeline) -> str:
    """What a plan loses against the best one, in words."""
    own, other = plan.losses_us(), best.losses_us()
    lost = sorted(((own[k] - other[k], k) for k in own), reverse=True)
    more = [f"{name} +{us / 1e3:.3g} ms" for us, name in lost if us > 0.01 * best.step_us][:2]
    return ", ".join(more) or "no faster"


def nothing_fits(plan: Pipeline, cluster: Cluster, wishes: Wishes) -> CompileError:
    """Says by how much the nearest plan is over, on which device, and the smallest changes that
    would make it fit."""
    stage = max(plan.stages, key=lambda s: s.peak_bytes - s.memory_bytes)
    number = plan.stages.index(stage)
    over = stage.peak_bytes - stage.memory_bytes
    times = stage.peak_bytes / stage.memory_bytes
    where = f"stage {number} of {len(plan.stages)}" if len(plan.stages) > 1 else "each rank"
    cap = wishes.constraints.memory_bytes
    hints = []
    if cap is not None and cap < MEMORY_SHARE * cluster.device.memory_bytes:
        hints.append(f"a memory constraint of {_gb(stage.peak_bytes)}")
    else:
        hints.append(f"devices of {_gb(stage.peak_bytes / MEMORY_SHARE)}")
        hints.append(f"about {int(cluster.ranks * times) + 1} devices")
    if not wishes.recompute:
        hints.append("recompute=True")
    hints.append("a smaller batch")
    return CompileError(
        "W0402", f"no plan fits on {cluster}",
        reason=f"the nearest one needs {_gb(stage.peak_bytes)} on {where} "
        f"({stage.kind}), {_gb(over)} more than the {_gb(stage.memory_bytes)} that it may fill",
        hint=", ".join(hints[:-1]) + f", or {hints[-1]}",
    )  # fmt: skip


def _gb(size: float) -> str:
    return f"{size / 1e9:.3g} GB"
