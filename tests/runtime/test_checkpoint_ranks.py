"""Checkpoints between real processes: four ranks write, two ranks read."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from weft.runtime.checkpoint_format import read_index
from weft.runtime.launch import launch

ROOT = Path(__file__).parents[2]
WORKER = str(Path(__file__).with_name("checkpoint_worker.py"))
PATH = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}"}


def run(task: str, folder: Path, out: Path, ranks: int) -> list[dict[str, Any]]:
    launch([WORKER, task, str(folder), str(out)], ranks, env=PATH, timeout_s=120)
    return [json.loads(Path(f"{out}.{rank}.json").read_text()) for rank in range(ranks)]


def test_two_ranks_continue_what_four_saved(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    four = run("save", folder, tmp_path / "four", 4)
    index = read_index(folder / "step-00000004")
    assert len(index.files) > 1  # the ranks share the work
    stored = sum(entry.bytes for entry in index.files.values())
    assert stored < 3 * 5 * 6 * 4 + 8 + 600 * len(index.files)  # once, and the headers
    for report in four:
        assert report["back"] == 4
        assert report["again"] == report["losses"][4:]  # equal, not only close
    two = run("load", folder, tmp_path / "two", 2)
    want, got = (load_file(tmp_path / f"{name}.safetensors") for name in ("four", "two"))
    assert set(want) == set(got) == {"w", "exp_avg/w", "exp_avg_sq/w", "step"}
    assert all(torch.equal(want[name], got[name]) for name in want)
    for report in two:
        assert report["step"] == 4 and report["code"] == "W1102"
        assert 0 < report["read"] <= stored
        assert report["losses"] == pytest.approx(four[0]["losses"][4:], rel=1e-5)
