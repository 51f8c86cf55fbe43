"""A rank that dies, stops, raises or leaves: every other rank says which, soon, and ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import TCPStore

from weft.ir.errors import RunError
from weft.runtime.launch import launch

ROOT = Path(__file__).parents[2]
WORKER = str(Path(__file__).with_name("failure_worker.py"))
PATH = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}", "OMP_NUM_THREADS": "1"}
SURVIVORS = (0, 1, 3)
#: what rank 2 does -> what the others say of it
SAID = {
    "kill": "rank 2 does not answer, it is dead or stopped",
    "stop": "rank 2 does not answer, it is dead or stopped",
    "raise": "rank 2 failed in adamw_update (%w1, %m1, %v1): RuntimeError",
    "user": "rank 2 failed with ValueError: the data loader found no file",
    "exit": "rank 2 failed with SystemExit",
    "early": "rank 2 has come to the end of its program",
    "sleep": "rank 2 is outside its steps, at",
}


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The reports of all ranks of all worlds, `MODE.RANK`, and how the processes ended."""
    folder = tmp_path_factory.mktemp("failures")
    stores = {  # they outlive the ranks, as torchrun's does
        mode: TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for mode in SAID
    }
    names = [f"{mode}:{store.port}" for mode, store in stores.items()]
    command = [sys.executable, WORKER, str(folder), *names]
    subprocess.run(command, env={**os.environ, **PATH}, check=True, timeout=150)
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


@pytest.mark.parametrize("mode", SAID)
def test_each_survivor_names_the_culprit_and_its_own_action(
    worlds: dict[str, Any], mode: str
) -> None:
    for rank in SURVIVORS:
        report = worlds[f"{mode}.{rank}"]
        assert report["code"] == "W0803"
        assert SAID[mode] in report["message"], report["message"]
        assert f"rank {rank} failed in wait (%" in report["message"]
        others = [f"rank {other} {word}" for other in SURVIVORS for word in ("does not", "is out")]
        assert not any(text in report["message"] for text in others), report["message"]


def test_the_action_is_named_with_its_module_and_line(worlds: dict[str, Any]) -> None:
    message = worlds["kill.0"]["message"]
    assert "all_reduce over dp of model.linear (train.py:12)" in message


def test_a_rank_that_is_stuck_in_python_says_where(worlds: dict[str, Any]) -> None:
    for rank in SURVIVORS:
        assert "failure_worker.py" in worlds[f"sleep.{rank}"]["message"]
        assert "(misbehave)" in worlds[f"sleep.{rank}"]["message"]
    assert "gave up" in worlds["sleep.2"]["message"]  # and finds the others gone, later


def test_a_rank_that_ends_early_hears_of_it(worlds: dict[str, Any]) -> None:
    assert "rank 2 came to its end, the others did not" in worlds["early.2"]["message"]


def test_nothing_hangs_at_the_end(worlds: dict[str, Any]) -> None:
    # a transfer's limit is 4 s; neighbours wait for each other, a roll call takes 3 s each
    for name, (_, code) in worlds["ended"].items():
        mode, rank = name.split(".")
        assert code == (-9 if rank == "2" and mode in ("kill", "stop") else 0), name
    for mode in SAID:
        for rank in SURVIVORS:
            assert worlds[f"{mode}.{rank}"]["took_s"] < 30


def test_under_torchrun_the_survivors_speak_before_they_are_ended(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    script = Path(__file__).with_name("rank_worker.py")
    with pytest.raises(RunError, match="rank 2 was ended by signal 9"):
        launch([str(script), str(tmp_path / "out"), "die"], 4, env=PATH, timeout_s=120)
    told = capfd.readouterr().err
    reports = [json.loads(path.read_text()) for path in tmp_path.glob("out.*.json")]
    for rank in SURVIVORS:
        says = [report["die"]["message"] for report in reports if "die" in report]
        texts = "\n".join([told, *says])
        assert f"rank {rank} was ended in" in texts or f"rank {rank} failed in" in texts, texts
