"""State of compiled train steps between worlds: weft's files, torch's own, FSDP2 programs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from tests.frontend import state_worker

from weft.runtime.launch import launch

ROOT = Path(__file__).parents[2]
PATH = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}"}
Reports = dict[str, list[dict[str, Any]]]


def run(out: Path, ranks: int, *tasks: str) -> Reports:
    """For each task the reports of all ranks."""
    launch([str(Path(state_worker.__file__)), str(out), *tasks], ranks, env=PATH, timeout_s=180)
    read = [json.loads(Path(f"{out}.{rank}.json").read_text()) for rank in range(ranks)]
    return {task: [rank[task] for rank in read] for task in tasks}


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Reports:
    folder = tmp_path_factory.mktemp("state")
    found = run(folder / "four", 4, "fsdp_saves", "saves", "evaluates")
    return {**found, **run(folder / "two", 2, "fsdp_loads", "resumes", "loads_dcp", "loads_fsdp")}


def test_another_plan_on_fewer_ranks_goes_on_bit_for_bit(worlds: Reports) -> None:
    before = worlds["saves"][0]
    for after in worlds["resumes"]:
        assert after["start"] == 2 and after["same"] and after["note"] == "two"
        # the stream of dropout goes on as well; sums over ranks round differently
        assert after["losses"] == pytest.approx(before["losses"], rel=1e-5)


def test_each_byte_is_written_once(worlds: Reports) -> None:
    report = worlds["saves"][0]
    headers = 4 * 4096  # of safetensors, one for each rank's file
    assert report["needed"] <= report["written"] <= report["needed"] + headers


def test_a_rank_reads_no_more_than_there_is(worlds: Reports) -> None:
    written = worlds["saves"][0]["written"]
    assert all(0 < report["read"] <= written for report in worlds["resumes"])


def test_torchs_own_files_carry_the_state_bit_for_bit(worlds: Reports) -> None:
    for report in worlds["loads_dcp"]:
        assert report == {"directly": True, "dicts": True}


def test_a_plan_goes_on_where_an_fsdp_program_was(worlds: Reports) -> None:
    wanted = worlds["fsdp_saves"][0]["losses"]
    for report in worlds["loads_fsdp"]:
        assert report["start"] == 2
        assert report["losses"] == pytest.approx(wanted, rel=1e-5)


def test_an_fsdp_program_takes_what_a_plan_wrote(worlds: Reports) -> None:
    for report in worlds["fsdp_loads"]:
        assert report["differ"] == 0 and report["tensors"] >= 15


def test_an_evaluation_sees_the_weights_of_the_step(worlds: Reports) -> None:
    assert all(report["differ"] < 1e-5 for report in worlds["evaluates"])
