"""The command line, as a user types it."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from weft.frontend import cli_compile
from weft.frontend.cli import main
from weft.runtime.artifact import Artifact

TARGETS = "tests.frontend.targets"


def weft(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A train step on 2 x 2 ranks, with a placement that splits things."""
    out = tmp_path_factory.mktemp("cli") / "out"
    pipeline = "simplify,outline,differentiate,simplify,random-place[mesh=2x2 seed=3],lower,fuse,schedule"
    with environment(WEFT_PIPELINE=pipeline):
        result = weft("compile", f"{TARGETS}:net", "--cluster", "2x2:cpu", "--train", "adamw", "-o", out)
    assert result.exit_code == 0, result.output
    return out


@contextmanager
def environment(**variables: str) -> Iterator[None]:
    """`compile` with another pipeline, which is an option of the library only."""
    old = cli_compile.OPTIONS
    cli_compile.OPTIONS = old.with_({"pipeline": variables["WEFT_PIPELINE"]})
    try:
        yield
    finally:
        cli_compile.OPTIONS = old


def test_compile_prints_the_plan_and_writes_everything(artifact: Path) -> None:
    names = {path.name for path in artifact.iterdir()}
    assert {"plan.json", "ir", "kernels", "timeline.json.gz", "report.html"} <= names
    info = Artifact.open(artifact).info
    assert info["ranks"] == 4 and info["predicted"]["step_us"] > 0
    events = json.loads(gzip.decompress((artifact / "timeline.json.gz").read_bytes()))
    assert {e["ph"] for e in events["traceEvents"]} == {"M", "X"}
    assert "</html>" in (artifact / "report.html").read_text()


def test_opt_reproduces_each_dump_from_the_one_before(artifact: Path) -> None:
    opened = Artifact.open(artifact)
    made_by = opened.info["made_by"]
    for before, after, text in zip(opened.dumps, opened.dumps[1:], made_by[1:], strict=False):
        result = weft("opt", before, "--pass", text)
        assert result.exit_code == 0, result.output
        assert result.stdout == after.read_text(), text


def test_verify_agrees_and_says_how_well(artifact: Path) -> None:
    result = weft("verify", artifact)
    assert result.exit_code == 0, result.output
    assert "largest relative error" in result.output and "FAILS" not in result.output


def test_inspect_shows_levels_collectives_and_histories(artifact: Path) -> None:
    overview = weft("inspect", artifact)
    assert overview.exit_code == 0
    for word in ("schedule", "random-place", "collective", "blocks.0.weight"):
        assert word in overview.output
    history = weft("inspect", artifact, "--op", "blocks")
    assert history.exit_code == 0 and "einsum" in history.output
    assert weft("inspect", artifact, "--ir", "lower").output.startswith("weft 1 spmd")
    assert "+" in weft("inspect", artifact, "--diff", "simplify", "outline").output
    kernels = weft("inspect", artifact, "--kernels").output
    assert all(word in kernels for word in ("traffic", "blocks", "registers", "fused"))
    missing = weft("inspect", artifact, "--op", "nowhere.at.all")
    assert missing.exit_code == 2


def test_run_starts_its_ranks_and_a_batch_that_does_not_divide_works(artifact: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "weft", "run", str(artifact), "--steps", "3"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [*command, "--trace", str(tmp_path / "trace.json")], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    losses = [float(line.split()[-1]) for line in done.stdout.splitlines() if line.startswith("step")]
    assert len(losses) == 3 and losses[2] < losses[0]
    assert len(list(tmp_path.glob("trace.rank*.json"))) == 4


def test_another_world_size_is_refused(artifact: Path) -> None:
    env = {"WORLD_SIZE": "3", "RANK": "0", "LOCAL_RANK": "0"}
    result = CliRunner().invoke(main, ["run", str(artifact)], env=env)
    assert result.exit_code == 2
    assert "W0801" in result.stderr and "--nproc-per-node 4" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["compile", f"{TARGETS}:net", "--cluster", "2x2:cpuu"], ["W0501", "cpu"]),
        (["compile", f"{TARGETS}:net", "--cluster", "2by2"], ["W0501"]),
        (["compile", f"{TARGETS}:net", "--train", "adamm"], ["W0303", "adamw"]),
        (["compile", f"{TARGETS}:sgd_step", "--train", "adamw"], ["SGD"]),
        (["compile", f"{TARGETS}:branches"], ["W0301", "targets.py", "torch.where"]),
        (["compile", "no_such_module:f"], ["W1001"]),
        (["run", "nowhere"], ["W0701"]),
        (["opt", "nowhere.weft"], ["W1001"]),
    ],
)
def test_bad_input_ends_in_a_diagnostic(arguments: list[str], words: list[str], tmp_path: Path) -> None:
    if arguments[0] == "compile":
        arguments = [*arguments, "-o", str(tmp_path / "out")]
    result = weft(*arguments)
    assert result.exit_code == 2, result.output
    for word in words:
        assert word in result.stderr
    assert not list(tmp_path.iterdir())  # nothing half-written


def test_a_users_own_exception_has_the_users_traceback() -> None:
    result = weft("compile", f"{TARGETS}:raises")
    assert isinstance(result.exception, RuntimeError)
    frames = []
    tb = result.exception.__traceback__
    while tb is not None:
        frames.append(Path(tb.tb_frame.f_code.co_filename))
        tb = tb.tb_next
    assert frames[-1].name == "targets.py"


def test_opt_names_the_near_pass_and_the_place_in_a_malformed_file(artifact: Path, tmp_path: Path) -> None:
    first = Artifact.open(artifact).dumps[0]
    assert "did you mean 'simplify'" in weft("opt", first, "--pass", "simplfy").stderr
    bad = tmp_path / "bad.weft"
    bad.write_text(first.read_text().replace(" = einsum(", " = einsm(", 1))
    result = weft("opt", bad, "--pass", "simplify")
    assert result.exit_code == 2
    assert "bad.weft:" in result.stderr and "einsum" in result.stderr


def test_a_changed_artifact_is_refused(artifact: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(artifact, copy)
    dump = next((copy / "ir").iterdir())
    dump.write_bytes(dump.read_bytes().replace(b"tanh", b"tanj", 1))
    for command in ("run", "verify", "inspect"):
        result = weft(command, copy)
        assert result.exit_code == 2 and "W0701" in result.stderr


def test_doctor_and_help_read_well() -> None:
    assert "torch" in weft("doctor").output
    text = weft("--help").output
    for command in ("compile", "run", "inspect", "opt", "verify", "doctor"):
        assert command in text
    assert "schedule" in weft("opt", "x", "--list").output
