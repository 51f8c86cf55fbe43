"""The command line loads what a command needs: help and a look at a dump take no torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner
from torch import nn

import weft
from weft.frontend.cli import COMMANDS, main

ROOT = Path(__file__).parents[2]
#: commands whose help is wanted often
LIGHT = ("compile", "run", "inspect", "verify", "opt", "doctor")
ENVIRONMENT = {"PYTHONPATH": str(ROOT / "src"), "PATH": ""}
_LOADED = "import sys; sys.argv = ['weft', *sys.argv[1:]]\n" \
    "from weft.frontend.cli import main\n" \
    "try:\n main()\nfinally:\n print('LOADED', 'torch' in sys.modules, file=sys.stderr)"


def torch_is_loaded(*arguments: str) -> bool:
    done = subprocess.run(
        [sys.executable, "-c", _LOADED, *arguments], capture_output=True, text=True, cwd=ROOT,
        env=ENVIRONMENT, check=True, timeout=300,
    )  # fmt: skip
    return "LOADED True" in done.stderr


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("speed") / "out"
    weft.plan(nn.Linear(4, 4), (torch.ones(2, 4),), cluster="1x2:cpu").save(out)
    return out


def test_help_takes_no_torch() -> None:
    assert not torch_is_loaded("--help")
    helps = "from click.testing import CliRunner; from weft.frontend.cli import main\n" \
        f"for name in {LIGHT}:\n" \
        "    result = CliRunner().invoke(main, [name, '--help'])\n" \
        "    assert result.exit_code == 0, result.output\n" \
        "import sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", helps], env=ENVIRONMENT, check=True, timeout=300)


def test_looking_at_an_artifact_and_passes_on_a_dump_take_no_torch(artifact: Path) -> None:
    assert not torch_is_loaded("inspect", str(artifact))
    assert not torch_is_loaded("inspect", str(artifact), "--op", "einsum")
    dump = str(next(artifact.glob("ir/*-trace.weft")))
    assert not torch_is_loaded("opt", dump, "--pass", "simplify,outline")


def test_the_list_of_commands_says_what_each_command_says() -> None:
    with click.Context(main) as context:
        for name, (_, _, text) in COMMANDS.items():
            command = main.get_command(context, name)
            assert command is not None and command.help is not None
            assert " ".join(command.help.split("\n\n")[0].split()) == text
    shown = CliRunner().invoke(main, ["--help"]).output
    assert all(f"  {name} " in shown for name in COMMANDS)
