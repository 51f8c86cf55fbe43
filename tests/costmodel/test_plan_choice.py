"""Which of several predicted plans comes first."""

from __future__ import annotations

from weft.costmodel.plan_choice import first_plan
from weft.costmodel.transformer import TrainingPlan


def _plan(tp: int, pp: int) -> TrainingPlan:
    return TrainingPlan(gpus=16, seq=1024, micro_batch=1, global_batch=64, tp=tp, pp=pp)


def test_the_clearly_fastest_comes_first() -> None:
    assert first_plan([_plan(1, 1), _plan(2, 4)], [100.0, 90.0]) == 1


def test_near_ties_go_to_fewer_stages_then_less_tensor_parallelism() -> None:
    plans = [_plan(1, 4), _plan(4, 2), _plan(2, 2), _plan(1, 1)]
    assert first_plan(plans, [100.0, 100.5, 101.0, 110.0]) == 2


def test_of_equal_degrees_the_faster_one() -> None:
    assert first_plan([_plan(1, 2), _plan(1, 2)], [100.9, 100.1]) == 1
