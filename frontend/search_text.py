"""A found plan in the user's words: its stages, where the time goes, and what lost against it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..ir.types import Mesh
from ..passes.search import SearchResult
from ..passes.search_evaluate import Pipeline, Stage
from .axes import axis_words
from .describe import human_bytes, human_time

_ORDERS = {"gpipe": "GPipe", "1f1b": "1F1B", "interleaved": "interleaved 1F1B"}
Rows = Iterator[tuple[str, str]]


def explain_search(result: SearchResult) -> str:
    """What was chosen, its time and memory, the nearest rejected plans and the bound."""
    return "\n".join(f"{key:<12}{value}".rstrip() for key, value in _rows(result))


def _rows(result: SearchResult) -> Rows:
    best = result.best
    plan = best.pipeline
    yield "plan", f"{_headline(plan)}, on {best.layout}"
    for axis in best.layout.mesh.names if best.placement is not None else ():
        assert best.placement is not None
        yield f"axis {axis}", axis_words(best.placement.placed, axis)
    if len(plan.stages) > 1:
        for number, stage in enumerate(plan.stages):
            yield f"stage {number}", _stage(stage)
    else:
        stage = plan.stages[0]
        yield "per rank", f"{human_bytes(int(stage.peak_bytes))} of {human_bytes(int(stage.memory_bytes))}"
    yield "predicted", f"{human_time(plan.step_us)} a step: {_parts(plan)}"
    if best.simulated_us is not None:
        yield "simulated", f"{human_time(best.simulated_us)} a step of all ranks' schedules"
    slowest = max(range(len(plan.stages)), key=lambda s: _loop(plan.stages[s]))
    if len(plan.stages) > 1:
        yield "critical", (
            f"stage {slowest}: {plan.micro} x {human_time(_loop(plan.stages[slowest]))} forward and "
            f"backward; a transfer to the next stage takes {human_time(plan.sent_us)}"
        )
    for found, why in result.rejected:
        other = found.pipeline
        slower = other.step_us / plan.step_us - 1
        if found.simulated_us is not None and best.simulated_us is not None:
            why = f"{human_time(found.simulated_us)} in the simulator; {why}"
        yield "rejected", (
            f"{_headline(other)}, on {found.layout}: {human_time(other.step_us)}, "
            f"{slower:+.1%}; {why}"
        )
    yield "searched", (
        f"{result.evaluated} plans of {result.layouts - result.bounded} layouts in "
        f"{result.seconds:.3g} s; {result.bounded} of {result.layouts} layouts could not win by "
        f"their bound{'' if result.complete else '; the budget ran out'}"
    )
    gap = plan.step_us / max(result.lower_bound_us, 1e-9) - 1
    yield "bound", (
        f"no plan of these layouts is faster than {human_time(result.lower_bound_us)}, all "
        f"communication left out; this one is within {gap:.1%}"
    )


def _headline(plan: Pipeline) -> str:
    if len(plan.stages) == 1:
        return "one stage" if plan.micro == 1 else f"one stage, {plan.micro} micro-batches"
    virtual = f" with {plan.chunks} virtual stages each" if plan.chunks > 1 else ""
    return (
        f"{len(plan.stages)} stages{virtual}, {plan.micro} micro-batches, {_ORDERS[plan.order]}"
    )


def _stage(stage: Stage) -> str:
    again = ", activations computed again in backward" if stage.recompute else ""
    return (
        f"ranks {stage.first_rank} to {stage.first_rank + _size(stage.mesh) - 1} ({stage.kind}): "
        f"{unit_words(stage.units)}; {human_bytes(int(stage.peak_bytes))} of "
        f"{human_bytes(int(stage.memory_bytes))} a rank, {stage.in_flight} micro-batches in flight"
        f"{again}"
    )


def unit_words(units: Sequence[str]) -> str:
    """Names of units, runs of numbered ones together: `layers.0` to `layers.3`."""
    out: list[str] = []
    runs: list[tuple[str, int, int]] = []
    for name in units:
        stem, _, number = name.rpartition(".")
        if number.isdigit():
            if runs and runs[-1][0] == stem and runs[-1][2] + 1 == int(number):
                runs[-1] = (stem, runs[-1][1], int(number))
                out[-1] = f"{stem}.{runs[-1][1]} to {number}"
                continue
            runs.append((stem, int(number), int(number)))
        else:
            runs.append(("", 0, 0))
        out.append(name)
    return ", ".join(out)


def _parts(plan: Pipeline) -> str:
    return ", ".join(
        f"{human_time(us)} {name}" for name, us in plan.losses_us().items() if us > 0.5
    )


def _loop(stage: Stage) -> float:
    return stage.forward_us + stage.backward_us


def _size(mesh: Mesh) -> int:
    return mesh.size
