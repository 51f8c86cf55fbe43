"""A disk that is full: a small file system that only root can mount, so it is skipped for others."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import weft
from weft.frontend.cli import main
from weft.frontend.curve import Curve, read_curve
from weft.frontend.options import OPTIONS
from weft.ir.errors import CompileError, RunError, WeftError
from weft.runtime.executable import Executable
from weft.runtime.hf_weights import save_pretrained

#: holds an artifact, a checkpoint and another one that is being written
DISK_BYTES = 8 << 20
#: what is left free: less than the weights of `Executable` take
LEFT_BYTES = 64 << 10
SIDE = 256


@dataclass(frozen=True)
class Disk:
    """A mounted file system.

    Attributes:
        path: its root.
    """

    path: Path

    def fill(self) -> None:
        """Leave `LEFT_BYTES`."""
        free = os.statvfs(self.path)
        (self.path / "ballast").write_bytes(bytes(free.f_bavail * free.f_frsize - LEFT_BYTES))

    def clear(self) -> None:
        """Make room again."""
        (self.path / "ballast").unlink()

    def names(self) -> set[str]:
        """Everything on it, to see that nothing is left behind."""
        return {str(path.relative_to(self.path)) for path in self.path.rglob("*")} - {"ballast"}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("no mount here")
    if done.returncode:
        pytest.skip("only root may mount a file system")
    yield Disk(folder)
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture(scope="module")
def plan() -> weft.Plan:
    torch.manual_seed(0)
    model, x = nn.Linear(SIDE, SIDE), torch.ones(2, SIDE)
    return weft.plan(model, (x,), options=OPTIONS.with_({"progress": False}))


@pytest.fixture
def exe(plan: weft.Plan, tmp_path: Path) -> Iterator[Executable]:
    plan.save(tmp_path / "plan")
    with weft.load(tmp_path / "plan") as exe:
        exe.load_weights()
        yield exe


def says_so(error: WeftError, code: str) -> bool:
    return error.code == code and "No space left" in str(error.reason) and bool(error.hint)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_last_checkpoint_stays(disk: Disk, exe: Executable, asynchronous: bool) -> None:
    kept = disk.path / "kept"
    exe.save(kept, 1)
    before, want = disk.names(), exe.state_dict()
    disk.fill()
    with pytest.raises(RunError) as caught:
        exe.save(kept, 2, asynchronous=asynchronous)
        exe.checkpoints.wait()
    assert says_so(caught.value, "W1105")
    assert disk.names() == before
    assert exe.load(kept) == 1
    assert all(torch.equal(tensor, want[name]) for name, tensor in exe.state_dict().items())
    disk.clear()
    exe.save(kept, 2)
    assert exe.load(kept) == 2


@pytest.mark.parametrize("there", [False, True])
def test_the_last_artifact_stays(disk: Disk, plan: weft.Plan, there: bool) -> None:
    out = disk.path / "out"
    if there:
        plan.save(out)
    before = disk.names()
    disk.fill()
    with pytest.raises(CompileError) as caught:
        plan.save(out)
    assert caught.value.code == "W1001" and "No space left" in str(caught.value)
    assert disk.names() == before
    if there:
        with weft.load(out) as exe:
            exe.load_weights()
            assert len(exe.step(*exe.example_inputs())) == 1


@pytest.mark.parametrize("file_bytes", [1 << 30, 1 << 10])
def test_the_last_model_files_stay(disk: Disk, exe: Executable, file_bytes: int) -> None:
    folder = disk.path / "model"
    save_pretrained(exe.program, folder, file_bytes=file_bytes)
    before = {name: (disk.path / name).stat().st_mtime_ns for name in disk.names()}
    disk.fill()
    with pytest.raises(RunError) as caught:
        save_pretrained(exe.program, folder, file_bytes=file_bytes)
    assert says_so(caught.value, "W1105")
    after = {name: (disk.path / name).stat().st_mtime_ns for name in disk.names()}
    assert {n: t for n, t in after.items() if n != "model"} == {
        n: t for n, t in before.items() if n != "model"
    }


def test_a_curve_says_so_and_keeps_its_steps(disk: Disk) -> None:
    curve = Curve(disk.path / "curve", 0)
    curve.add(0, [torch.ones(())])
    disk.fill()
    with pytest.raises(RunError) as caught:
        for step in range(1, LEFT_BYTES):
            curve.add(step, [torch.ones(())])
    assert says_so(caught.value, "W1001")
    steps = list(read_curve(disk.path / "curve"))
    assert steps == list(range(len(steps))) and len(steps) > 1


def test_traces_and_dumps_say_so_and_leave_nothing(disk: Disk, plan: weft.Plan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan")
    dump = next((tmp_path / "plan" / "ir").glob("*-trace.weft"))
    disk.fill()
    (disk.path / "rest").write_bytes(bytes(LEFT_BYTES))
    for command in (
        ["run", str(tmp_path / "plan"), "--steps", "1", "--trace", str(disk.path / "trace.json")],
        ["opt", str(dump), "--pass", "simplify", "-o", str(disk.path / "dump.weft")],
        ["compile", "tests.frontend.targets:net", "-o", str(disk.path / "out")],
    ):
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 2, result.output
        assert "W1001" in result.stderr and "No space left" in " ".join(result.stderr.split())
        assert disk.names() == {"rest"}
