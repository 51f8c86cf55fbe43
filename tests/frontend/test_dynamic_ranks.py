"""Dynamic dims on several ranks: batches that do not divide the mesh, under one trace and search."""

from __future__ import annotations

import json
import os
from pathlib import Path

from tests.frontend import dynamic_worker

from weft.runtime.launch import launch

ROOT = Path(__file__).parents[2]
PATH = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}"}


def test_any_batch_equals_eager_on_four_ranks(tmp_path: Path) -> None:
    worker = str(Path(dynamic_worker.__file__))
    launch([worker, str(tmp_path / "out")], 4, env=PATH, timeout_s=600)  # four ranks on a busy machine
    for rank in range(4):
        report = json.loads((tmp_path / f"out.{rank}.json").read_text())
        assert set(report) == {*dynamic_worker.PLANS, "module"}
        for plan, found in report.items():
            assert found["loss"] < 1e-5, (plan, found)
            assert max(found["weights"], found["states"]) < 1e-4, (plan, found)
            assert found["traces"] == found["searches"] == 1, (plan, found)
            assert found["plans"] == (3 if plan == "module" else 7), (plan, found)
