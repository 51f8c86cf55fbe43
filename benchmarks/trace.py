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
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from weft.frontend.train_step import trace_module_train
from weft.ir.verify import verify

#: name -> (hidden, intermediate, layers, heads, key heads, vocabulary); Touvron et al., 2023
#: (7 B), Llama team, 2024 (70 B and 405 B)
SHAPES = {
    "7B": (4096, 11008, 32, 32, 32, 32000),
    "70B": (8192, 28672, 80, 64, 8, 128256),
    "405B": (16384, 53248, 126, 128, 8, 128256),
}
LENGTH = 2048
#: seconds and megabytes; the goal that the project set for the 70 B shape
TARGETS = {"70B": (60.0, 6000.0)}


def measure(name: str) -> dict[str, float]:
    """Trace one shape in this process."""
    logging.disable(logging.WARNING)
    hidden, intermediate, layers, heads, key_heads, vocabulary = SHAPES[name]
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=key_heads, vocab_size=vocabulary,
        use_cache=False, attn_implementation="sdpa",
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
        ids = torch.empty(1, LENGTH, dtype=torch.int64)
    inputs = {"input_ids": ids, "labels": ids}
    start = time.perf_counter()
    torch.export.export(model, (), inputs, strict=False)
    export_s = time.perf_counter() - start
    start = time.perf_counter()
    module = trace_module_train(model, (), inputs).module
    trace_s = time.perf_counter() - start
    verify(module)
    return {
        "export_s": export_s, "trace_s": trace_s,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "ops": sum(len(function.ops) for function in module.functions),
        "functions": len(module.functions), "parameters": len(module.entry.params),
    }  # fmt: skip


def rows_of(name: str, found: dict[str, float]) -> list[dict[str, Any]]:
    """Rows of a shape, as `benchmarks/` writes them."""
    seconds, megabytes = TARGETS.get(name, (None, None))
    return [
        {"name": f"trace {name}", "value": round(found["trace_s"], 2), "unit": "s",
         "target": seconds, "reference": round(found["export_s"], 2),
         "holds": seconds is None or found["trace_s"] <= seconds},
        {"name": f"peak memory {name}", "value": round(found["peak_mb"], 1), "unit": "MB",
         "target": megabytes, "reference": None,
         "holds": megabytes is None or found["peak_mb"] <= megabytes},
    ]  # fmt: skip


def main() -> int:
    """Measure, print a table, write rows; 1 when a target is missed."""
    parser = argparse.ArgumentParser(description="trace time and memory of Llama shapes")
    parser.add_argument("--quick", action="store_true", help="the 7 B shape only")
    parser.add_argument("--json", type=Path, help="write the rows there")
    parser.add_argument("--one", choices=SHAPES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one)))
        return 0
    rows: list[dict[str, Any]] = []
    print(f"{'shape':8}{'export s':>10}{'trace s':>10}{'peak MB':>10}{'functions':>11}{'ops':>7}")
    for name in ["7B"] if options.quick else SHAPES:
        command = [sys.executable, __file__, "--one", name]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found = json.loads(output.strip().splitlines()[-1])
        rows += rows_of(name, found)
        print(f"{name:8}{found['export_s']:10.1f}{found['trace_s']:10.1f}{found['peak_mb']:10.0f}"
              f"{found['functions']:11.0f}{found['ops']:7.0f}", flush=True)  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0 if all(row["holds"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
