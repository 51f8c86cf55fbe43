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
import torch
from click.testing import CliRunner

from weft.frontend import cli_compile
from weft.frontend.cli import main
from weft.frontend.curve import Curve, read_curve
from weft.ir.errors import RunError

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    **os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}", "OMP_NUM_THREADS": "1"
}  # fmt: skip
_LINE = re.compile(r"^step (\d+)  (\S+)", re.MULTILINE)
STEPS = 40


def compiled(out: Path, cluster: str, placement: str) -> Path:
    """A train step under a placement that splits things."""
    passes = f"simplify,outline,differentiate,simplify,{placement},lower,fuse,schedule"
    old = cli_compile.OPTIONS
    cli_compile.OPTIONS = replace(old, pipeline=passes)
    try:
        arguments = ["compile", "tests.frontend.targets:net", "--cluster", cluster]
        result = CliRunner().invoke(main, [*arguments, "--train", "adamw", "-o", str(out)])
    finally:
        cli_compile.OPTIONS = old
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
    whole, again = tmp_path / "whole.curve", tmp_path / "again.curve"
    run_with_kills(two, 2, (), 0, "--steps", str(STEPS), "--curve", str(whole))
    want = read_curve(whole)
    assert list(want) == list(range(STEPS))
    saving = ["--save", str(tmp_path / "kept"), "--save-every", "3", "--resume", "--curve", str(again)]
    early = STEPS - 10
    text = run_with_kills(two, 2, (6, 20), 1, "--steps", str(early), *saving, "--async-save")
    assert text.count("resumed after") == 2
    assert read_curve(again) == {step: want[step] for step in range(early)}  # to the bit
    result = CliRunner().invoke(main, ["run", str(one), "--steps", str(STEPS), *saving])
    assert result.exit_code == 0, result.output
    assert set(curve(result.output)) == set(range(early, STEPS))
    last = read_curve(again)
    assert list(last) == list(range(STEPS))
    assert all(last[step] == pytest.approx(want[step], rel=1e-6) for step in last)


def test_a_curve_is_cut_where_a_run_is_resumed_and_a_torn_line_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "curve"
    first = Curve(file, 0)
    for step in range(4):
        first.add(step, [torch.tensor(1 / (step + 3), dtype=torch.float64), torch.ones(2)])
    with file.open("a") as stream:
        stream.write('{"step": 4, "resu')
    assert read_curve(file) == {step: [1 / (step + 3)] for step in range(4)}
    Curve(file, 2).add(2, [torch.tensor(0.5)])
    assert read_curve(file) == {0: [1 / 3], 1: [1 / 4], 2: [0.5]}
    Curve(file, 0)
    assert read_curve(file) == {}


def test_a_file_that_is_no_curve_and_one_that_cannot_be_written_are_diagnosed(tmp_path: Path) -> None:
    other = tmp_path / "notes.txt"
    other.write_text("remember the milk\n")
    with pytest.raises(RunError, match="is not a curve of weft run") as error:
        Curve(other, 3)
    assert error.value.code == "W1001" and error.value.hint
    assert other.read_text() == "remember the milk\n"
    for path in (other / "below" / "curve", Path("")):
        with pytest.raises(RunError, match="cannot be written") as error:
            Curve(path, 0)
        assert error.value.reason and error.value.hint


def test_resume_needs_a_folder_and_starts_in_an_empty_one(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["run", "out", "--resume"])
    assert result.exit_code == 2 and "--save DIR" in result.stderr
    out = compiled(tmp_path / "out", "1x1:cpu", "random-place[mesh=1 seed=0]")
    again = ["run", str(out), "--steps", "2", "--save", str(tmp_path / "kept"), "--resume"]
    first = CliRunner().invoke(main, again)
    assert "from the start" in " ".join(first.output.split()) and set(curve(first.output)) == {0, 1}
    second = CliRunner().invoke(main, again)
    assert "resumed after 2 steps" in " ".join(second.output.split()) and not curve(second.output)
