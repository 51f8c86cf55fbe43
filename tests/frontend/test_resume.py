"""`weft run --save --resume`: ranks are killed, the curve stays."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

import psutil
import pytest
from click.testing import CliRunner

from weft.frontend import cli
from weft.frontend.cli import main

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    **os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}", "OMP_NUM_THREADS": "1"
}  # fmt: skip
_LINE = re.compile(r"^step (\d+)  (\S+)", re.MULTILINE)
STEPS = 40


def compiled(out: Path, cluster: str, placement: str) -> Path:
    """A train step under a placement that splits things."""
    passes = f"simplify,outline,differentiate,simplify,{placement},lower,fuse,schedule"
    old = cli.OPTIONS
    cli.OPTIONS = replace(old, pipeline=passes)
    try:
        arguments = ["compile", "tests.frontend.targets:net", "--cluster", cluster]
        result = CliRunner().invoke(main, [*arguments, "--train", "adamw", "-o", str(out)])
    finally:
        cli.OPTIONS = old
    assert result.exit_code == 0, result.output
    return out


def curve(text: str) -> dict[int, str]:
    """Losses by step, as printed; a step that ran again has its last one."""
    return {int(step): loss for step, loss in _LINE.findall(text)}


def command(ranks: int, restarts: int, arguments: Sequence[str]) -> list[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [sys.executable, *torchrun, "--max-restarts", str(restarts), "-m", "weft", "run", *arguments]


def kill(agent: int, rank: int) -> bool:
    """kill -9 one rank of a torchrun; False when it is not there."""
    for process in psutil.Process(agent).children(recursive=True):
        try:
            if process.environ().get("RANK") == str(rank):
                process.kill()
                return True
        except psutil.Error:
            continue  # it ended while it was looked at
    return False


def run_with_kills(folder: Path, ranks: int, kills: Sequence[int], seed: int, *arguments: str) -> str:
    """Run under torchrun; when a step of `kills` is printed, a random rank is killed."""
    random, left = Random(seed), list(kills)
    line = [str(folder), *arguments]
    with subprocess.Popen(
        command(ranks, len(kills) + 1, line), env=ENVIRONMENT, text=True, cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as agent:  # fmt: skip
        assert agent.stdout is not None
        text = ""
        for printed in agent.stdout:
            text += printed
            found = _LINE.match(printed)
            if left and found and int(found[1]) >= left[0]:
                left.pop(0)
                assert kill(agent.pid, random.randrange(ranks)), text
    assert agent.returncode == 0 and not left, text
    return text


def test_killed_ranks_continue_on_the_same_curve_also_on_fewer_ranks(tmp_path: Path) -> None:
    two = compiled(tmp_path / "two", "1x2:cpu", "random-place[mesh=2 seed=3]")
    one = compiled(tmp_path / "one", "1x1:cpu", "random-place[mesh=1 seed=0]")
    want = curve(run_with_kills(two, 2, (), 0, "--steps", str(STEPS)))
    assert len(want) == STEPS
    saving = ["--save", str(tmp_path / "kept"), "--save-every", "3", "--resume"]
    early = str(STEPS - 10)
    text = run_with_kills(two, 2, (6, 20), 1, "--steps", early, *saving, "--async-save")
    assert text.count("resumed after") == 2
    for step, loss in curve(text).items():
        assert loss == want[step], step
    assert set(curve(text)) == set(range(STEPS - 10))
    result = CliRunner().invoke(main, ["run", str(one), "--steps", str(STEPS), *saving])
    assert result.exit_code == 0, result.output
    last = curve(result.output)
    assert set(last) == set(range(STEPS - 10, STEPS))
    assert all(float(last[s]) == pytest.approx(float(want[s]), rel=1e-5, abs=2e-6) for s in last)


def test_resume_needs_a_folder_and_starts_in_an_empty_one(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["run", "out", "--resume"])
    assert result.exit_code == 2 and "--save DIR" in result.stderr
    out = compiled(tmp_path / "out", "1x1:cpu", "random-place[mesh=1 seed=0]")
    again = ["run", str(out), "--steps", "2", "--save", str(tmp_path / "kept"), "--resume"]
    first = CliRunner().invoke(main, again)
    assert "from the start" in " ".join(first.output.split()) and set(curve(first.output)) == {0, 1}
    second = CliRunner().invoke(main, again)
    assert "resumed after 2 steps" in " ".join(second.output.split()) and not curve(second.output)
