"""Kills and failures of ranks: the curve goes on, and the survivors say who failed.

Part one: a train step runs under torchrun with `weft run --save --resume`; kill -9 ends a random
rank at a random moment, 20 times: ranks restarted under the same plan with checkpoints written in
place, the same with asynchronous saves, and other numbers of ranks under other plans. After each
kill the curve on the disk, from the first step on, is compared with that of a run without kills:
equal to the bit under one plan, to 1e-6 relative under changing ones.

Part two (`failing_ranks.py`): ranks die, stop, loop, raise or leave at a random action, and every
survivor names them, in time.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random

import psutil
import torch
from failing_ranks import failures
from rows import Row, arguments, finish, show, timed
from torch import Tensor, nn

import weft
from weft.frontend.curve import read_curve
from weft.frontend.options import OPTIONS

STEPS = 60
#: a quiet restart takes about 10 s: torch is imported, survivors look for the culprit for 3 s
LIMIT_S = 180.0
#: what `--only` takes
PARTS = ("same", "same-async", "replanned", "failures")
#: passes behind the placement
AFTER = "lower,fuse,schedule"


class Net(nn.Module):
    """Dropout, batch statistics and weights that split unevenly over 2 and 3 ranks."""

    def __init__(self, width: int = 50) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(32, width), nn.Linear(width, 7)
        self.norm = nn.BatchNorm1d(width)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """The loss."""
        hidden = self.drop(torch.tanh(self.norm(self.first(x))))
        return nn.functional.cross_entropy(self.last(hidden), labels)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Tensor:
    """One step."""
    loss: Tensor = model(x, y)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    optimizer.zero_grad()
    return loss


def plan(folder: Path, ranks: int, seed: int, dtype: torch.dtype) -> Path:
    """Plan the step for some ranks under a random placement, and write it down."""
    torch.manual_seed(0)
    model = Net().to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    batch = torch.randn(22, 32, dtype=dtype), torch.randint(0, 7, (22,))
    place = f"random-place[mesh={ranks} seed={seed}]"
    pipeline = f"simplify,outline,differentiate,simplify,{place},{AFTER}"
    options = OPTIONS.with_({"pipeline": pipeline, "progress": False})
    made = weft.plan(
        train_step, (model, optimizer, *batch), cluster=f"1x{ranks}:cpu", options=options
    )
    out = folder / f"plan{ranks}-{seed}-{str(dtype).removeprefix('torch.')}"
    made.save(out)
    return out


@dataclass
class Campaign:
    """A run that is killed again and again.

    Attributes:
        artifacts: the plans, used in turn; one plan alone is restarted by torchrun itself.
        kills: how many.
        saving: flags of `weft run`.
        tolerance: how much a curve may differ, relative to the value.
        worst: the largest relative difference seen.
        curves: number of curves compared.
        wrong: what was not equal.
        unfinished: kills while a checkpoint was being written.
    """

    name: str
    artifacts: Sequence[Path]
    kills: int
    saving: Sequence[str]
    tolerance: float
    worst: float = 0.0
    curves: int = 0
    unfinished: int = 0
    wrong: list[str] = field(default_factory=list)

    def compare(self, curve: dict[int, list[float]], want: dict[int, list[float]]) -> None:
        """Compare the curve so far, which begins at step 0 and has no gap."""
        self.curves += 1
        if list(curve) != list(range(len(curve))):
            self.wrong.append(f"curve {self.curves} has the steps {list(curve)}")
        for step, values in curve.items():
            for a, b in zip(values, want[step], strict=True):
                error = abs(a - b) / abs(b)
                self.worst = max(self.worst, error)
                if not error <= self.tolerance:
                    self.wrong.append(f"curve {self.curves}, step {step}: {a!r}, not {b!r}")


def command(artifact: Path, restarts: int, arguments: Sequence[str]) -> list[str]:
    """torchrun of an artifact on as many ranks as it is for."""
    found = re.match(r"plan(\d+)", artifact.name)
    assert found
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", found[1]]
    run = ["-m", "weft", "run", str(artifact), "--steps", str(STEPS), *arguments]
    return [sys.executable, *torchrun, "--max-restarts", str(restarts), *run]


def ranks_of(agent: int) -> dict[int, psutil.Process]:
    """The ranks of a torchrun that are there now."""
    out = {}
    for process in psutil.Process(agent).children(recursive=True):
        try:
            out[int(process.environ()["RANK"])] = process
        except (psutil.Error, KeyError):
            continue  # ended while it was looked at, or no rank
    return out


def last_step(curve: Path) -> int:
    """The last step on the disk, -1 without any; cheap, a file may be a line ahead of it."""
    try:
        return curve.read_bytes().count(b"\n") - 1
    except FileNotFoundError:
        return -1


def kill_one(agent: subprocess.Popen[str], curve: Path, step: int, random: Random) -> bool:
    """kill -9 a random rank soon after a step; False when the run ended before."""
    while last_step(curve) < step:
        if agent.poll() is not None:
            return False
        time.sleep(0.001)
    time.sleep(random.uniform(0, 0.02))  # anywhere in one of the next steps or saves
    there = ranks_of(agent.pid)
    if not there:
        return False
    there[random.choice(sorted(there))].kill()
    return True


def run_campaign(campaign: Campaign, folder: Path, seed: int) -> None:
    """Run to the last step, with kills on the way; compare the curve after each."""
    random = Random(seed)
    reference = folder / f"{campaign.artifacts[0].name}.curve"
    if not reference.exists():
        whole = command(campaign.artifacts[0], 0, ["--curve", str(reference)])
        subprocess.run(whole, check=True, capture_output=True, timeout=LIMIT_S)
    want = read_curve(reference)
    assert len(want) == STEPS
    kept, curve = folder / f"{campaign.name}.kept", folder / f"{campaign.name}.curve"
    flags = ["--save", str(kept), "--curve", str(curve), "--resume", *campaign.saving]
    at = sorted(random.sample(range(STEPS - 5), campaign.kills))
    alone = len(campaign.artifacts) == 1
    legs = [at] if alone else [*([step] for step in at), []]
    for number, steps in enumerate(legs):
        artifact = campaign.artifacts[number % len(campaign.artifacts)]
        line = command(artifact, len(steps) if alone else 0, flags)
        log = folder / f"{campaign.name}.{number}.log"
        with log.open("w") as out, subprocess.Popen(
            line, stdout=out, stderr=subprocess.STDOUT, text=True
        ) as agent:
            for step in steps:
                if not kill_one(agent, curve, step, random):
                    campaign.wrong.append(f"ended before step {step}: {log.read_text()[-2000:]}")
                    break
                campaign.unfinished += any(kept.glob(".writing-*"))
                campaign.compare(read_curve(curve), want)
            try:
                code = agent.wait(LIMIT_S)
            except subprocess.TimeoutExpired:
                agent.terminate()
                campaign.wrong.append(f"hangs: {log.read_text()[-2000:]}")
                return
        if (code != 0) != (bool(steps) and not alone):
            campaign.wrong.append(f"torchrun ended with {code}: {log.read_text()[-2000:]}")
    last = read_curve(curve)
    campaign.compare(last, want)
    if len(last) != STEPS:
        campaign.wrong.append(f"the curve ends at step {len(last)}")


def campaigns(folder: Path, quick: bool) -> list[Campaign]:
    """The runs to kill."""
    f32, f64 = torch.float32, torch.float64
    if quick:
        changing = [plan(folder, 2, 3, f64), plan(folder, 1, 0, f64)]
        return [
            Campaign("same-async", [plan(folder, 2, 3, f32)], 2, ["--async-save"], 0.0),
            Campaign("replanned", changing, 1, ["--save-every", "3"], 1e-6),
        ]
    changing = [plan(folder, r, s, f32) for r, s in ((3, 1), (2, 3), (1, 0), (3, 4), (2, 5))]
    return [
        Campaign("same", [plan(folder, 3, 1, f32)], 6, ["--save-every", "3"], 0.0),
        Campaign("same-async", [plan(folder, 2, 3, f32)], 8, ["--async-save"], 0.0),
        Campaign("replanned", changing, 6, ["--save-every", "2", "--async-save"], 1e-6),
    ]


def recovery(quick: bool, seed: int, only: str | None = None) -> list[Row]:
    """The rows of part one."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    rows: list[Row] = []
    kills = equal = saving = 0
    with tempfile.TemporaryDirectory() as name:
        for number, campaign in enumerate(campaigns(Path(name), quick)):
            if only not in (None, campaign.name):
                continue
            seconds, _ = timed(partial(run_campaign, campaign, Path(name), seed + number))
            for text in campaign.wrong:
                print(f"{campaign.name}: {text}", file=sys.stderr)
            kills += campaign.kills
            equal += 0 if campaign.wrong else campaign.kills
            saving += campaign.unfinished
            against = f"uninterrupted run; {campaign.kills} kills in {seconds:.0f} s"
            name_ = f"recovery: {campaign.name}, largest relative difference of a curve"
            rows.append(Row(name_, campaign.worst, "", campaign.tolerance, against))
    rows.append(Row("recovery: kills whose curve differs", kills - equal, "", 0.0, f"{kills} kills"))
    rows.append(Row("recovery: kills during a save", saving, "", None, f"of {kills}"))
    return rows


def main() -> None:
    """Print and write the rows."""
    parser = arguments(__doc__, "3 kills, one failure of each kind")
    parser.add_argument("--seed", type=int, default=0, help="of ranks, steps and actions")
    parser.add_argument("--only", choices=PARTS, help="only this part")
    given = parser.parse_args()
    print(f"seed {given.seed}")
    rows = []
    if given.only != "failures":
        rows += recovery(given.quick, given.seed, given.only)
    if given.only in (None, "failures"):
        rows += failures(given.quick, given.seed)
    show(rows)
    raise SystemExit(finish(rows, given.json))


if __name__ == "__main__":
    main()
