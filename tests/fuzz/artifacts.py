"""Artifacts: files cut, flipped, swapped, linked; and manifests and dumps edited under right hashes."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from random import Random
from typing import Any

import torch
from click.testing import CliRunner
from torch import nn

import weft
from weft.frontend.cli import main
from weft.frontend.options import OPTIONS
from weft.runtime.artifact import Artifact, content_hash, file_hash, plan_hash

from .values import deep, mutate_bytes, mutate_json, mutate_text

#: a file that no artifact may make anyone read
SECRET = "secret.weft"


class _Runs:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self) -> Any:
        return Path.write_text, (Path(self.mark), "executed")


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> torch.Tensor:
    loss: torch.Tensor = model(x).square().mean()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return loss


def make_bases(folder: Path) -> None:
    """The artifacts that are broken: a train step and a forward on one rank, and one for GPUs."""
    options = OPTIONS.with_({"progress": False})
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Dropout(0.1))
    optimizer = torch.optim.AdamW(model.parameters())
    weft.plan(_step, (model, optimizer, torch.ones(2, 3)), options=options).save(folder / "train")
    weft.plan(model.eval(), (torch.ones(2, 3),), options=options).save(folder / "forward")
    weft.plan(model, (torch.ones(2, 3),), cluster="1x2:h100", options=options).save(folder / "gpus")


def _rehash(folder: Path, info: Any) -> None:
    """Write a manifest whose hashes are right."""
    if isinstance(info, dict):
        if isinstance(info.get("files"), dict):
            hashes = {
                name: file_hash(folder / name)
                if SECRET not in name and (folder / name).is_file()
                else digest
                for name, digest in info["files"].items()
                if "\0" not in name and len(name) < 200
            }
            info["files"] = hashes
            if all(isinstance(digest, str) for digest in hashes.values()):
                info["content_hash"] = content_hash(hashes)
        info["plan_hash"] = plan_hash(info)
    (folder / "plan.json").write_text(json.dumps(info), encoding="utf-8", errors="replace")


def _edit(random: Random, folder: Path) -> None:
    """Edit the manifest, a dump or tensors, as somebody does who knows how to hash."""
    plan = folder / "plan.json"
    info = json.loads(plan.read_text())
    files = sorted(info["files"])
    match random.randrange(5):
        case 0:
            secret = folder.parent / "outside" / SECRET
            there = os.path.relpath(secret, folder)
            name = random.choice((there, str(secret), f"ir/../../outside/{SECRET}"))
            info["dumps"] = [*info["dumps"], name]
            info["made_by"] = [*info["made_by"], "schedule"]
            if random.random() < 0.5:
                info["files"][name] = "0" * 64
        case 1 | 2:
            info = mutate_json(random, info)
        case 3:
            path = folder / random.choice([name for name in files if name.endswith(".weft")])
            path.write_text(mutate_text(random, path.read_text()), encoding="utf-8", errors="replace")
        case _:
            path = folder / random.choice([name for name in files if "weft" not in name])
            path.write_bytes(mutate_bytes(random, path.read_bytes()))
    with deep():
        _rehash(folder, info)


def _break(random: Random, folder: Path) -> None:
    """Damage files."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    path, other = random.choice(files), random.choice(files)
    match random.randrange(9):
        case 0:
            path.unlink()
        case 1:
            path.rename(path.with_name(path.name + ".old"))
        case 2:
            data = path.read_bytes()
            path.write_bytes(other.read_bytes())
            other.write_bytes(data)
        case 3:
            path.unlink()
            target = random.choice(("/dev/zero", "/etc/hostname", str(path), str(folder), "nowhere"))
            path.symlink_to(target)
        case 4:
            path.unlink()
            random.choice((path.mkdir, lambda: os.mkfifo(path)))()
        case 5:
            path.write_bytes(pickle.dumps(_Runs(folder.parent / "outside" / "executed")))
        case 6:
            shutil.rmtree(path.parent)
        case _:
            path.write_bytes(mutate_bytes(random, path.read_bytes()))


def _use(random: Random, folder: Path, alone: bool) -> None:
    match random.randrange(6):
        case 0 | 1:
            artifact = Artifact.open(folder)
            for dump in artifact.dumps:
                artifact.module(dump)
            artifact.tensors("weights")
            artifact.tensors("inputs")
        case 2 | 3:
            with weft.load(folder, timeout_s=5.0) as exe:
                exe.load_weights()
                exe.step(*exe.example_inputs(), seed=0)
                exe.state_dict()
        case 4:
            flags = random.choice(
                ([], ["--op", "0"], ["--diff", "0", "1"], ["--ir", "schedule"], ["--html"], ["--limit", "2"])
            )
            invoke(["inspect", str(folder), *flags])
        case 5:
            run_it = ["run", str(folder), "--steps", "1"]  # several ranks are several processes
            invoke(run_it if alone and random.random() < 0.5 else ["verify", str(folder)])


def invoke(arguments: list[str]) -> None:
    """Run the command line; raises what it did not diagnose."""
    result = CliRunner().invoke(main, arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code in (0, 1, 2), result.exit_code


def run(random: Random, folder: Path, bases: Path) -> None:
    """Break an artifact, and use it."""
    name = random.choice(("train", "forward", "gpus"))
    target = folder / "plan"
    shutil.copytree(bases / name, target)
    (_edit if random.random() < 0.6 else _break)(random, target)
    _use(random, target, alone=name != "gpus")
    assert not (folder / "outside" / "executed").exists(), "a pickle was executed"
