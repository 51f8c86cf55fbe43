"""Pipelines of several processes (gloo): any order, any number of stages, equal to eager PyTorch."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from tests.frontend import stage_worker

from weft.runtime.launch import launch

ROOT = Path(__file__).parents[2]
WORKER = str(Path(stage_worker.__file__))
Reports = dict[str, list[dict[str, Any]]]


def run(out: Path, ranks: int, *tasks: str) -> Reports:
    """For each task the reports of all ranks."""
    out.mkdir()
    env = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}", "WEFT_TEST_FOLDER": str(out)}
    launch([WORKER, str(out / "report"), *tasks], ranks, env=env, timeout_s=240)
    read = [json.loads((out / f"report.{rank}.json").read_text()) for rank in range(ranks)]
    return {task: [rank[task] for rank in read] for task in tasks}


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Reports]:
    folder = tmp_path_factory.mktemp("stages")
    return {
        2: run(folder / "two", 2, "steps", "dropout", "resumed"),
        3: run(folder / "three", 3, "steps", "resumed"),
        4: run(folder / "four", 4, "steps"),
    }


def test_pipelines_train_as_eager(worlds: dict[int, Reports]) -> None:
    limits = {"loss": 1e-5, "logits": 1e-4, "state_dict": 1e-4, "update_model": 1e-4, "optimizer": 1e-3}
    for ranks, reports in worlds.items():
        for report in reports["steps"]:
            for name, numbers in report.items():
                assert numbers["ranks"] == ranks
                assert all(numbers[what] <= limit for what, limit in limits.items()), (name, numbers)
    used = {name: n["stages"] for world in worlds.values() for name, n in world["steps"][0].items()}
    assert used == {"1f1b": 2, "micro-batches alone": 1, "gpipe": 4, "interleaved": 2, "narrower": 2, "wider": 2}


def test_dropout_is_that_of_the_plan_without_stages(worlds: dict[int, Reports]) -> None:
    for report in worlds[2]["dropout"]:
        for name, losses in report.items():
            assert losses == pytest.approx(report["whole"], rel=1e-5), name


def test_checkpoints_fit_any_number_of_stages(worlds: dict[int, Reports]) -> None:
    for report in (*worlds[2]["resumed"], *worlds[3]["resumed"]):
        assert report["losses"] == pytest.approx(report["wanted"], rel=1e-5)
