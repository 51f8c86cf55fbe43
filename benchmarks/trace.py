"""Tracing Llama shapes without weights: to the training-level program, in seconds and megabytes.

    python benchmarks/trace.py [--quick] [--json FILE]

Each shape runs in a process of its own on the meta device: export, lowering to IR, outlining,
differentiation of each distinct block, AdamW updates, verification. The target is that of the
70 B shape; the reference for the time is torch.export alone, measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import logging
import resource
import subprocess
import sys

import torch
from llama import LLAMAS, on_meta
from rows import Row, arguments, finish, show, timed

from weft.frontend.train_step import trace_module_train
from weft.ir.verify import verify

LENGTH = 2048
#: seconds and megabytes; the goal that the project set for the 70 B shape
TARGETS = {"70B": (60.0, 6000.0)}


def measure(name: str) -> dict[str, float]:
    """Trace one shape in this process."""
    logging.disable(logging.WARNING)
    model, inputs = on_meta(LLAMAS[name], 1, LENGTH, torch.float32)
    export_s, _ = timed(lambda: torch.export.export(model, (), inputs, strict=False))
    trace_s, module = timed(lambda: trace_module_train(model, (), inputs).module)
    verify(module)
    return {
        "export_s": export_s, "trace_s": trace_s,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "ops": sum(len(function.ops) for function in module.functions),
        "functions": len(module.functions),
    }  # fmt: skip


def rows_of(name: str, found: dict[str, float]) -> list[Row]:
    """Rows of a shape."""
    seconds, megabytes = TARGETS.get(name, (None, None))
    size = f"{found['functions']:.0f} functions, {found['ops']:.0f} ops"
    return [
        Row(f"trace {name}", found["trace_s"], "s", seconds,
            f"torch.export alone: {found['export_s']:.1f} s"),
        Row(f"peak memory {name}", found["peak_mb"], "MB", megabytes, size),
    ]  # fmt: skip


def main() -> int:
    """Measure, print, write; 1 when a target is missed."""
    parser = arguments(__doc__, "the 7 B shape only")
    parser.add_argument("--one", choices=LLAMAS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one)))
        return 0
    rows: list[Row] = []
    for name in ["7B"] if options.quick else LLAMAS:
        command = [sys.executable, __file__, "--one", name]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        rows += rows_of(name, json.loads(output.strip().splitlines()[-1]))
    show(rows)
    return finish(rows, options.json)


if __name__ == "__main__":
    sys.exit(main())
