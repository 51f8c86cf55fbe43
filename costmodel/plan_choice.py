"""Which of several predicted plans comes first: the fastest, and of near ties the simplest."""

from __future__ import annotations

from collections.abc import Sequence

from .transformer import TrainingPlan

#: predictions closer than this are a tie: about the median error of the model on all public steps
#: (`benchmarks/steps.py`)
TIE = 0.02


def first_plan(plans: Sequence[TrainingPlan], times_ms: Sequence[float]) -> int:
    """The number of the plan to take.

    Plans within `TIE` of the fastest are a tie, which fewer pipeline stages decide, then less tensor
    parallelism: what a prediction leaves out (stragglers, jitter between stages, contention) grows
    with the number of ranks that wait for each other in every layer.
    """
    limit = min(times_ms) * (1 + TIE)
    return min(
        (number for number, time_ms in enumerate(times_ms) if time_ms <= limit),
        key=lambda number: (plans[number].pp, plans[number].tp, times_ms[number]),
    )
