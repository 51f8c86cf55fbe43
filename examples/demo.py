"""The demo: plan a Llama for 4 processes, train it there and in eager PyTorch, compare.

    python -m examples.demo --out demo-out

Each run is a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from safetensors.torch import load_file, save_file

from examples.llama import build, loss_and_update
from examples.text_data import batch, standard_library_bytes

CLUSTER, RANKS = "1x4:cpu", 4
STEPS, ROWS, LENGTH = 40, 8, 128
MODEL = {"hidden": 384, "layers": 6, "heads": 6, "intermediate": 1024}
#: float32: the acceptance limit of the losses
TOLERANCE = 1e-5
WARMUP, PEAK_LR = 8, 6e-4
console = Console(highlight=False)


def learning_rate(step: int) -> float:
    """Linear warm-up, then constant: it changes from step to step, and nothing is traced again."""
    return PEAK_LR * min(1.0, (step + 1) / WARMUP)


def program() -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Factory: the train step with example inputs."""
    model = build(**MODEL)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate(0), weight_decay=0.01)
    text = standard_library_bytes()
    return loss_and_update, (model, optimizer, batch(text, 0, ROWS, LENGTH)), {}


def peak_mib() -> float:
    """Peak resident memory of this process in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _steps(label: str, quiet: bool) -> Any:
    steps = range(STEPS)
    return steps if quiet else track(steps, description=label, console=console)


def run_eager(out: Path) -> None:
    """Forty steps in eager PyTorch, one process."""
    torch.set_num_threads(1)  # as each rank of the plan: spinning threads would fight for cores
    step_fn, (model, optimizer, _), _ = program()
    text = standard_library_bytes()
    before, losses, start = peak_mib(), [], time.perf_counter()
    for step in _steps("eager, 1 process ", quiet=False):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        loss = step_fn(model, optimizer, batch(text, step, ROWS, LENGTH))
        losses.append(float(loss.detach()))
    report = {"losses": losses, "seconds": time.perf_counter() - start}
    report |= {"before_mib": before, "peak_mib": peak_mib()}
    params = {name: value.detach().clone() for name, value in model.named_parameters()}
    _write(out / "eager", report, params)


def run_rank(out: Path) -> None:
    """Forty steps of this rank of the plan; started by torchrun."""
    import weft  # the parent and the eager run measure themselves without it

    exe = weft.load(out / "plan")
    exe.load_weights()
    text = standard_library_bytes()
    before, losses, start = peak_mib(), [], time.perf_counter()
    for step in _steps(f"weft, {RANKS} processes", quiet=exe.rank != 0):
        results = exe.step(batch(text, step, ROWS, LENGTH), lr=learning_rate(step), seed=step)
        losses.append(float(results[0]))
    report = {"losses": losses, "seconds": time.perf_counter() - start}
    report |= {"before_mib": before, "peak_mib": peak_mib()}
    state = exe.state_dict()
    _write(out / f"rank{exe.rank}", report, state if exe.rank == 0 else {})
    exe.close()


def _write(stem: Path, report: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    if tensors:
        save_file({k: v.contiguous().clone() for k, v in tensors.items()}, f"{stem}.safetensors")
    Path(f"{stem}.json").write_text(json.dumps(report))


def _child(role: str, out: Path, ranks: int = 1) -> None:
    command = [sys.executable, "-m"]
    if ranks > 1:
        command += ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"} if ranks > 1 else dict(os.environ)
    subprocess.run(
        [*command, "examples.demo", "--role", role, "--out", str(out)], check=True, env=env
    )


def _curve(values: list[float], low: float, high: float) -> str:
    marks = "▁▂▃▄▅▆▇█"
    scale = (len(marks) - 1) / max(high - low, 1e-12)
    return "".join(marks[round((value - low) * scale)] for value in values)


def compare(out: Path) -> bool:
    """Print both curves and the differences. Returns whether the losses agree."""
    eager = json.loads((out / "eager.json").read_text())
    ranks = [json.loads((out / f"rank{r}.json").read_text()) for r in range(RANKS)]
    ours, theirs = ranks[0]["losses"], eager["losses"]
    low, high = min(ours + theirs), max(ours + theirs)
    console.print(f"\neager loss {_curve(theirs, low, high)} {theirs[0]:.4f} -> {theirs[-1]:.6f}")
    console.print(f"weft loss  {_curve(ours, low, high)} {ours[0]:.4f} -> {ours[-1]:.6f}")
    gap = max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))
    expected, actual = load_file(out / "eager.safetensors"), load_file(out / "rank0.safetensors")
    params = max(
        float((actual[name] - value).norm() / value.norm()) for name, value in expected.items()
    )
    table = Table("", "eager", *(f"rank {r}" for r in range(RANKS)))
    growth = [f"{r['peak_mib'] - r['before_mib']:.0f}" for r in (eager, *ranks)]
    table.add_row("peak memory of the run above its start, MiB", *growth)
    table.add_row("peak resident memory, MiB", *(f"{r['peak_mib']:.0f}" for r in (eager, *ranks)))
    table.add_row("seconds for all steps", *(f"{r['seconds']:.1f}" for r in (eager, *ranks)))
    console.print(table)
    holds = gap <= TOLERANCE and len(ours) == len(theirs) == STEPS
    console.print(
        f"largest relative difference of losses             {gap:.1e} (limit {TOLERANCE:.0e})"
    )
    console.print(f"largest relative difference of updated parameters {params:.1e}")
    return holds


def main() -> None:
    """Plan, run both, compare; exits with 1 when the curves differ."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo-out"))
    parser.add_argument("--role", choices=["all", "plan", "eager", "rank"], default="all")
    arguments = parser.parse_args()
    out: Path = arguments.out
    if arguments.role == "eager":
        run_eager(out)
    elif arguments.role == "rank":
        run_rank(out)
    elif arguments.role == "plan":
        import weft

        fn, args, _ = program()
        plan = weft.plan(fn, args, cluster=CLUSTER)
        plan.save(out / "plan")
        console.print(plan.summary(), markup=False)
    else:
        out.mkdir(parents=True, exist_ok=True)
        _child("plan", out)
        _child("eager", out)
        _child("rank", out, RANKS)
        holds = compare(out)
        console.print(f"artifact {out / 'plan'}, report {out / 'plan' / 'report.html'}")
        sys.exit(0 if holds else 1)


if __name__ == "__main__":
    main()
