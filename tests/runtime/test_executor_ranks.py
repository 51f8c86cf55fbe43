"""The executor, the transfers and the diagnostics, on real gloo processes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from weft.runtime.launch import launch
from weft.runtime.trace import merge, read_events

ROOT = Path(__file__).parents[2]
WORKER = str(Path(__file__).with_name("rank_worker.py"))
PATH = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}"}
Reports = dict[str, list[dict[str, Any]]]


def reports(out: Path, ranks: int) -> Reports:
    """For each task, the reports of all ranks."""
    read = [json.loads(Path(f"{out}.{rank}.json").read_text()) for rank in range(ranks)]
    return {task: [rank[task] for rank in read] for task in read[0]}


def run(out: Path, ranks: int, *tasks: str) -> Reports:
    launch([WORKER, str(out), *tasks], ranks, env=PATH, timeout_s=180)
    return reports(out, ranks)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def four(folder: Path) -> Reports:
    tasks = [
        "collectives",
        "stages",
        "programs=15",
        f"train={folder / 'trace.json.gz'}",
        "halves",
        "differ",
    ]
    return run(folder / "four", 4, *tasks, "fail")


def fine(parts: list[dict[str, Any]]) -> None:
    for rank, part in enumerate(parts):
        assert not part["failures"], f"rank {rank}: " + "\n".join(part["failures"])


def test_each_transfer_equals_its_meaning_over_all_ranks(four: Reports) -> None:
    fine(four["collectives"])
    assert four["collectives"][0]["count"] > 200


def test_stages_exchange_values_with_the_same_coordinate(four: Reports) -> None:
    fine(four["stages"])


def test_random_programs_on_four_ranks_equal_the_logical_program(four: Reports) -> None:
    fine(four["programs"])
    assert four["programs"][0]["count"] == 30


def test_random_programs_on_two_ranks_equal_the_logical_program(tmp_path: Path) -> None:
    found = run(tmp_path / "two", 2, "programs=12", "fewer")
    fine(found["programs"])
    fine(found["fewer"])  # and a plan for four ranks is refused
    assert "--nproc-per-node 4" in found["fewer"][0]["message"]


def test_optimizer_steps_equal_the_logical_program_and_keep_shards(four: Reports) -> None:
    fine(four["train"])
    losses = [part["losses"] for part in four["train"]]
    assert losses[0] == losses[1] == losses[2] == losses[3]
    assert four["train"][0]["local"]["exp_avg/w"] == [3, 3]
    assert four["train"][2]["local"]["exp_avg/w"] == [2, 3]  # 5 rows on 2 ranks
    assert four["train"][0]["state"] == 4 * (5 * 3 + 2 * 3 * 3) + 8


def test_a_trace_has_a_track_for_compute_and_one_for_each_group(
    four: Reports, folder: Path
) -> None:
    fine(four["train"])
    paths = [folder / f"trace.rank{rank}.json.gz" for rank in range(4)]
    events = read_events(merge(paths, folder / "all.json"))
    assert {event["pid"] for event in events} == {0, 1, 2, 3}
    tracks = {e["args"]["name"] for e in events if e["ph"] == "M" and e["pid"] == 3}
    assert {"compute", "axis dp, ranks 1, 3", "axis tp, ranks 2, 3", "rank 3"} <= tracks
    slices = [event for event in events if event["ph"] == "X"]
    assert any(event["name"] == "model.linear: reduce_scatter" for event in slices)
    ends: dict[tuple[int, int], float] = {}
    for event in sorted(slices, key=lambda e: (e["pid"], e["tid"], e["ts"])):
        key = event["pid"], event["tid"]
        assert event["ts"] >= ends.get(key, 0.0) - 1e-3  # nothing on a track overlaps
        ends[key] = event["ts"] + event["dur"]


def test_outputs_come_before_the_tangents_are_known(four: Reports) -> None:
    fine(four["halves"])


def test_ranks_with_different_plans_are_told_what_differs(four: Reports) -> None:
    fine(four["differ"])
    assert all("combine sum against max" in part["message"] for part in four["differ"])


def test_an_error_on_one_rank_is_named_on_all(four: Reports) -> None:
    fine(four["fail"])
    assert "rank 1 failed in einsum" in four["fail"][1]["message"]
    assert "model.linear (train.py:12)" in four["fail"][1]["message"]
    for part in four["fail"]:
        assert "rank 1 failed in einsum" in part["message"]
        assert part["took"] < 15
