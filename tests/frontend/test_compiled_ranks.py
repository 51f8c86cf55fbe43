"""`@weft.compile` under torchrun: any plan on any number of ranks equals eager PyTorch."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from tests.frontend import rank_worker

from weft.runtime.launch import launch

ROOT = Path(__file__).parents[2]
WORKER = str(Path(rank_worker.__file__))
PATH = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}"}
Reports = dict[str, list[dict[str, Any]]]


def run(out: Path, ranks: int, *tasks: str) -> Reports:
    """For each task the reports of all ranks."""
    launch([WORKER, str(out), *tasks], ranks, env=PATH, timeout_s=180)
    read = [json.loads(Path(f"{out}.{rank}.json").read_text()) for rank in range(ranks)]
    return {task: [rank[task] for rank in read] for task in tasks}


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Reports]:
    folder = tmp_path_factory.mktemp("ranks")
    return {
        2: run(folder / "two", 2, "steps", "dropout", "module", "class_and_function"),
        4: run(folder / "four", 4, "steps", "dropout", "refused"),
    }


def reports_of(worlds: dict[int, Reports], task: str) -> list[dict[str, Any]]:
    """The reports of a task on every rank of every world that ran it."""
    found = [report for world in worlds.values() for report in world.get(task, [])]
    assert found
    return found


def equal(reports: list[dict[str, Any]], limits: dict[str, float]) -> None:
    for report in reports:
        for plan, numbers in report.items():
            for what, limit in limits.items():
                assert numbers[what] <= limit, (plan, what, numbers)


def test_a_train_step_equals_eager_under_any_plan(worlds: dict[int, Reports]) -> None:
    found = reports_of(worlds, "steps")
    equal(found, {"loss": 1e-5, "state_dict": 1e-4, "sync": 1e-4, "optimizer": 1e-4})
    used = {numbers["ranks"] for report in found for numbers in report.values()}
    assert used == {2, 4}  # the cluster is torchrun's world


def test_dropout_draws_the_same_stream_under_any_plan_and_world(worlds: dict[int, Reports]) -> None:
    alone = [float(loss) for loss in rank_worker.train(0.5, "", 3)[3]]
    without = [float(loss) for loss in rank_worker.train(0.0, "", 3)[3]]
    assert alone != pytest.approx(without, rel=1e-3)  # something is dropped
    for report in reports_of(worlds, "dropout"):
        for plan, losses in report.items():
            assert losses == pytest.approx(alone, rel=1e-5), plan


def test_a_module_gets_eager_gradients_on_every_rank(worlds: dict[int, Reports]) -> None:
    equal(reports_of(worlds, "module"), {"grad": 1e-4, "buffer": 1e-5, "forward": 1e-5})


def test_a_class_and_a_function_give_whole_results(worlds: dict[int, Reports]) -> None:
    for report in reports_of(worlds, "class_and_function"):
        numbers = [value for part in report.values() for value in part.values()]
        assert max(numbers) <= 1e-5, report


def test_a_cluster_that_is_not_the_world_is_refused(worlds: dict[int, Reports]) -> None:
    for report in reports_of(worlds, "refused"):
        assert "plan is for 8 ranks" in report["error"] and "has 4" in report["error"]
        assert "--nproc-per-node 8" in report["error"]
