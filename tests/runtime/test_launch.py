"""Starting ranks with torchrun, and what is said when that fails."""

from __future__ import annotations

from pathlib import Path

import pytest

from weft.ir.errors import RunError
from weft.runtime.launch import init_from_env, launch


def script(folder: Path, text: str) -> str:
    path = folder / "script.py"
    path.write_text(text)
    return str(path)


def test_ranks_get_their_arguments_and_one_thread_each(tmp_path: Path) -> None:
    text = """
import os, sys
from pathlib import Path
Path(sys.argv[1], os.environ["RANK"]).write_text(os.environ["OMP_NUM_THREADS"] + os.environ["A"])
"""
    launch([script(tmp_path, text), str(tmp_path)], 2, env={"A": "b"}, timeout_s=60)
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["1b", "1b"]


def test_a_failing_rank_is_named_with_its_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = """
import os, sys, time
from pathlib import Path
if os.environ["RANK"] == "1":
    sys.exit("the reason")
time.sleep(30)
Path(sys.argv[1], "waited").touch()
"""
    with pytest.raises(RunError, match="rank 1 ended with code 1") as error:
        launch([script(tmp_path, text), str(tmp_path)], 2, timeout_s=50)
    assert error.value.code == "W0803"
    assert not (tmp_path / "waited").exists()  # rank 0 was ended, not waited for
    assert "the reason" in capsys.readouterr().err


def test_ranks_that_hang_are_ended(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="did not end within 5 s"):
        launch([script(tmp_path, "import time; time.sleep(60)")], 1, timeout_s=5)


def test_what_cannot_be_started_says_why() -> None:
    with pytest.raises(RunError, match="W0803"):
        launch(["-m", "no_such_module_anywhere"], 1, timeout_s=60)


def test_without_torchrun_there_is_a_world_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with init_from_env() as world:
        assert (world.rank, world.size) == (0, 1)
