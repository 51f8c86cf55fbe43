"""A found plan in the user's words: its stages, where the time goes, and what lost against it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from ..ir.types import Mesh
from ..passes.search import Found, SearchResult
from ..passes.search_evaluate import Pipeline, Stage
from ..passes.search_result import Replay
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
    again = len(best.placement.choices.again) if best.placement is not None else 0
    if again:
        yield "gathered", f"parameters are gathered again by {again} readers instead of kept"
    yield from _stages(plan)
    yield "predicted", f"{human_time(plan.step_us)} a step: {_parts(plan)}"
    if best.replay is not None:
        yield from _replayed(best.replay)
    slowest = max(range(len(plan.stages)), key=lambda s: _loop(plan.stages[s]))
    if len(plan.stages) > 1:
        yield "critical", (
            f"stage {slowest}: {plan.micro} x {human_time(_loop(plan.stages[slowest]))} forward and "
            f"backward; a transfer to the next stage takes {human_time(plan.sent_us)}"
        )
    for found, why in result.rejected:
        yield "rejected", _rejected(found, best, why)
    yield from _end(result)


def _stages(plan: Pipeline) -> Rows:
    if len(plan.stages) == 1:
        stage = plan.stages[0]
        yield "per rank", (
            f"{human_bytes(int(stage.peak_bytes))} of {human_bytes(int(stage.memory_bytes))}"
            f"{_again(stage)}"
        )
    else:
        for number, stage in enumerate(plan.stages):
            yield f"stage {number}", _stage(stage)


def _replayed(replay: Replay) -> Rows:
    yield "simulated", (
        f"{human_time(replay.step_us)} a step of all ranks' schedules; the fullest rank holds "
        f"{human_bytes(replay.peak_bytes)}"
    )
    waits = [
        f"{human_time(us)} for {'transfers between stages' if axis == 'stage' else f'axis {axis}'}"
        for axis, us in sorted(replay.exposed_us.items(), key=lambda row: -row[1]) if us > 0.5
    ]  # fmt: skip
    if replay.bubble > 0:
        waits.append(f"{human_time(replay.bubble * replay.step_us)} for other stages' work")
    yield "exposed", f"compute waits {', '.join(waits) or 'for nothing'} (mean of all ranks)"


def _rejected(found: Found, best: Found, why: str) -> str:
    other, plan = found.pipeline, best.pipeline
    slower = other.step_us / plan.step_us - 1
    if found.simulated_us is not None and best.simulated_us is not None:
        why = f"{human_time(found.simulated_us)} in the simulator; {why}"
    return f"{_headline(other)}, on {found.layout}: {human_time(other.step_us)}, {slower:+.1%}; {why}"


def _end(result: SearchResult) -> Rows:
    step_us = result.best.pipeline.step_us
    left = "" if result.complete else "; the budget ran out before all others were placed"
    slow = f", {result.slow} were far slower by an estimate" if result.slow else ""
    yield "searched", (
        f"{result.evaluated} plans in {result.seconds:.3g} s; of "
        f"{result.layouts} layouts {result.bounded} could not win by their bound{slow}{left}"
    )
    lower = result.lower_bound_us
    proof = (
        "this plan is optimal among them" if step_us <= lower * (1 + 1e-9)
        else f"this plan takes {step_us / max(lower, 1e-9):.3g} times as long, so a better one may exist"
    )
    yield "bound", (
        f"no plan of these layouts is faster than {human_time(lower)}, what their compute takes; {proof}"
    )


def _headline(plan: Pipeline) -> str:
    if len(plan.stages) == 1:
        return "one stage" if plan.micro == 1 else f"one stage, {plan.micro} micro-batches"
    virtual = f" with {plan.chunks} virtual stages each" if plan.chunks > 1 else ""
    return (
        f"{len(plan.stages)} stages{_shares(plan)}{virtual}, {plan.micro} micro-batches, "
        f"{_ORDERS[plan.order]}"
    )


def _shares(plan: Pipeline) -> str:
    """How many numbered blocks each stage has: ` of 20 layers`, ` of 4 to 6 layers`."""
    names = [unit.rpartition(".") for stage in plan.stages for unit in stage.units]
    stems = Counter(stem for stem, _, number in names if number.isdigit())
    if not stems:
        return ""
    stem = max(sorted(stems), key=lambda s: stems[s])
    counts = [
        sum(name.rpartition(".")[0] == stem and name.rpartition(".")[2].isdigit() for name in s.units)
        for s in plan.stages
    ]
    low, high = min(counts), max(counts)
    word = stem.rpartition(".")[2]
    return f" of {low} {word}" if low == high else f" of {low} to {high} {word}"


def _again(stage: Stage) -> str:
    return ", activations computed again in backward" if stage.recompute else ""


def _stage(stage: Stage) -> str:
    return (
        f"ranks {stage.first_rank} to {stage.first_rank + _size(stage.mesh) - 1} ({stage.kind}): "
        f"{unit_words(stage.units)}; {human_bytes(int(stage.peak_bytes))} of "
        f"{human_bytes(int(stage.memory_bytes))} a rank, {stage.in_flight} micro-batches in flight"
        f"{_again(stage)}"
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
