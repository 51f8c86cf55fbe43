"""`weft calibrate` on this machine: a file that plans are priced with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import weft
from weft.costmodel.calibration import read_calibration
from weft.frontend.calibrate import calibrate, store
from weft.frontend.cli import main
from weft.ir.errors import CompileError


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    said: list[str] = []
    found = calibrate(torch.device("cpu"), count=4, budget_s=2.0, say=said.append)
    assert len(found.samples) == 4 and all(s.time_us > 0 for s in found.samples)
    assert found.cores >= 1 and found.rates["cache_bytes_per_s"] > 0 and len(said) == 5
    return store(found, tmp_path_factory.mktemp("calibration") / "here.json")


def plan_for(cluster: str) -> float:
    net = torch.nn.Linear(512, 512)
    return weft.plan(net, (torch.ones(64, 512),), cluster=cluster).simulate().step_us


def test_a_plan_is_priced_with_what_was_measured(measured: Path, tmp_path: Path) -> None:
    slow = tmp_path / "slow.toml"
    slow.write_text(
        '[[groups]]\ndevice = "cpu"\nhosts = 1\ndevices = 1\n[device]\nflops_per_s = { f32 = 1e8 }\n'
    )
    assert plan_for("1x1:cpu") < plan_for(str(slow))
    assert plan_for(f"1x1:cpu@{measured}") > 0


def test_the_option_of_compile_reads_the_file(measured: Path, tmp_path: Path) -> None:
    net = torch.nn.Linear(8, 8)
    compiled = weft.compile(net, calibration=str(measured))
    x = torch.ones(2, 8)
    torch.testing.assert_close(compiled(x), net(x))
    with pytest.raises(CompileError, match="W1302"):
        weft.compile(torch.nn.Linear(8, 8), calibration=str(tmp_path / "none.json"))(x)


def test_the_command_writes_a_file(tmp_path: Path) -> None:
    path = tmp_path / "cli.json"
    result = CliRunner().invoke(
        main, ["calibrate", "--device", "cpu", "--samples", "2", "--seconds", "1", "--out", str(path)]
    )
    assert result.exit_code == 0, result.output
    assert read_calibration(path).kind == "cpu"
    refused = CliRunner().invoke(main, ["calibrate", "--device", "abacus"])
    assert refused.exit_code == 2
