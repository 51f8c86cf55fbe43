"""From a model in memory to its plan on disk: Llamas of any depth, in seconds and megabytes.

    python benchmarks/planning.py [--quick] [--case NAME] [--json FILE]

Each shape runs in a process of its own on the meta device, with an empty cache: tracing, the passes,
the search for a placement, kernels, the report, the artifact. Weights are not written, as there are
none. The targets are those that the project set: 10 s and 2 GB for the 8 B shape on a (128, 8)
mesh, 60 s for each of the 70 B and 405 B shapes on 1,024 and 16,384 devices, with stages, and 80
layers for at most 1.3 times what 8 cost. A budget is that of the search; schedules are written,
verified and saved after it. The reference is torch.export alone, measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import resource
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from llama import LLAMAS, Shape, on_meta
from rows import Row, arguments, finish, show, timed

import weft
from weft.frontend.train_step import trace_module_train

LENGTH = 2048
#: published sizes of the 8 B model (Llama team, 2024)
SMALL = Shape(4096, 14336, 32, 32, 8, 128256)


@dataclass(frozen=True)
class Case:
    """A model, its cluster, and a mesh or the time in which everything is searched."""

    shape: Shape
    batch: int
    cluster: str
    mesh: str = ""
    budget: str | None = None


def of_depth(layers: int) -> Case:
    """The 8 B shape with another number of layers."""
    return Case(SMALL._replace(layers=layers), 1024, "128x8:h100", mesh="128x8")


CASES = {
    "8B": of_depth(32), "8B, 8 layers": of_depth(8), "8B, 80 layers": of_depth(80),
    "70B": Case(LLAMAS["70B"], 1024, "128x8:h100", budget="15s"),
    "405B": Case(LLAMAS["405B"], 4096, "2048x8:h100", budget="15s"),
    # a quarter of the layers and devices
    "70B, 20 layers": Case(LLAMAS["70B"]._replace(layers=20), 256, "32x8:h100", budget="10s"),
}  # fmt: skip
#: what `--quick` measures; it is left out otherwise
QUICK = ("8B", "70B, 20 layers")


def measure(name: str) -> dict[str, float]:
    """Plan one shape in this process; what is imported or made at the first trace is not timed."""
    logging.disable(logging.WARNING)
    case = CASES[name]
    tiny, ids = on_meta(Shape(32, 32, 1, 4, 2, 32), 2, 8, torch.bfloat16)
    trace_module_train(tiny, (), ids)
    model, inputs = on_meta(case.shape, case.batch, LENGTH, torch.bfloat16)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with TemporaryDirectory() as folder:
        plan_s, plan = timed(lambda: weft.plan(
            model, inputs, cluster=case.cluster, optimizer="adamw", mesh=case.mesh,
            budget=case.budget,
        ))  # fmt: skip
        save_s, _ = timed(lambda: plan.save(Path(folder) / "plan"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    export_s, _ = timed(lambda: torch.export.export(model, (), inputs, strict=False))
    return {"plan_s": plan_s, "save_s": save_s, "export_s": export_s, "peak_mb": peak / 1024,
            "imports_mb": before / 1024, "stages": len(plan.schedules)}  # fmt: skip


def in_process(name: str) -> dict[str, float]:
    """Measure one shape in a process of its own, with an empty cache."""
    with TemporaryDirectory() as cache:
        command = [sys.executable, __file__, "--one", name]
        environment = {**os.environ, "XDG_CACHE_HOME": cache}
        output = subprocess.run(
            command, check=True, capture_output=True, text=True, env=environment
        ).stdout
    found: dict[str, float] = json.loads(output.strip().splitlines()[-1])
    return found


def rows_of(found: dict[str, dict[str, float]]) -> list[Row]:
    """Rows of what was measured."""
    whole = {name: f["plan_s"] + f["save_s"] for name, f in found.items()}
    limits = {"8B": (10.0, 2000.0), "70B": (60.0, None), "405B": (60.0, None)}
    rows = []
    for name, f in found.items():
        seconds, megabytes = limits.get(name, (None, None))
        parts = f"save {f['save_s']:.1f} s; torch.export alone: {f['export_s']:.1f} s"
        rows += [
            Row(f"plan {name}", whole[name], "s", seconds, f"{f['stages']:.0f} stages; {parts}"),
            Row(f"peak memory {name}", f["peak_mb"], "MB", megabytes,
                f"{f['imports_mb']:.0f} MB before"),
        ]  # fmt: skip
    if "8B, 80 layers" in whole:
        rows.append(Row("80 layers over 8", whole["8B, 80 layers"] / whole["8B, 8 layers"], "", 1.3))
    return rows


def main() -> int:
    """Measure, print, write; 1 when a target is missed."""
    parser = arguments(__doc__, "the 8 B shape, and the 70 B shape at a quarter of its depth")
    parser.add_argument("--case", action="append", choices=CASES, help="only this one")
    parser.add_argument("--one", choices=CASES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one)))
        return 0
    names = QUICK if options.quick else [name for name in CASES if name not in QUICK[1:]]
    rows = rows_of({name: in_process(name) for name in options.case or names})
    show(rows)
    return finish(rows, options.json)


if __name__ == "__main__":
    sys.exit(main())
