"""What a 1-rank plan of a train step costs in time and memory, against eager and torch.compile,
and what a rank of a plan with sharded states holds.

Both sides of a ratio run in turns in one process on one thread, and the ratio is that of their
fastest processor times: other work on the machine only adds. Memory is measured in processes of its
own (`step_memory.py`).
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rows import Row
from step_memory import in_child, rise_bytes
from torch import Tensor
from train_steps import SHARDED_ROWS, STEPS, runner, token_ids

import weft

#: figures 2 and 3 of the contract
TIME_RATIO, MEMORY_RATIO, SHARDED_RATIO = 1.05, 1.05, 1.10
RANKS = 4
#: bytes of a device of the sharded plan, too few for whole states, so the search shards them all
SMALL_DEVICE_BYTES = 9e7


def _compiled_model(step: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The step with its model under torch.compile, as its documentation does training."""
    compiled: dict[int, Any] = {}

    def run(model: torch.nn.Module, *rest: Any) -> Tensor:
        if id(model) not in compiled:
            compiled[id(model)] = torch.compile(model)
        return step(compiled[id(model)], *rest)

    return run


def _first(run: Callable[[], Tensor]) -> float:
    """Processor seconds of the first call."""
    start = time.process_time()
    run()
    return time.process_time() - start


def _fastest(runs: dict[str, Callable[[], Tensor]], repeats: int) -> dict[str, float]:
    """The least processor seconds of each, run in turns."""
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.process_time()
            run()
            best[name] = min(best[name], time.process_time() - start)
    return best


def time_rows(name: str, repeats: int, with_inductor: bool) -> list[Row]:
    """Step time of one model, and the time until the first step is done."""
    runs = {"eager": runner(name, lambda step: step), "weft": runner(name, weft.compile)}
    if with_inductor:
        runs["torch.compile"] = runner(name, _compiled_model)
    first = {side: _first(run) for side, run in runs.items()}
    best = _fastest(runs, repeats)
    ratio = best["weft"] / best["eager"]
    rows = [
        Row(f"{name} step, eager", best["eager"] * 1e3, "ms"),
        Row(f"{name} step, 1-rank plan over eager", ratio, "", TIME_RATIO, "eager"),
        Row(f"{name} first step, plan", first["weft"], "s"),
    ]
    if with_inductor:
        against = best["weft"] / best["torch.compile"]
        rows.append(Row(f"{name} step, 1-rank plan over torch.compile", against, "", None,
                        "torch.compile of the model; the plan runs ATen"))  # fmt: skip
        took = first["torch.compile"]
        rows.append(Row(f"{name} first step, torch.compile", took, "s", None, "the plan's"))
    return rows


def memory_rows(name: str) -> list[Row]:
    """Peak bytes of tensors of one model's step."""
    eager, plan = (in_child(name, side) for side in ("eager", "weft"))
    peaks = [side["live"] + side["rise"] for side in (eager, plan)]
    return [
        Row(f"{name} peak memory, eager", peaks[0] / 2**20, "MiB"),
        Row(f"{name} peak memory, 1-rank plan over eager", peaks[1] / peaks[0], "", MEMORY_RATIO,
            "eager, bytes of the allocator"),
    ]  # fmt: skip


def sharded_rows() -> list[Row]:
    """Peak bytes of tensors on a rank of Llama with the batch and all states sharded (ZeRO-3)."""
    make, step = STEPS["llama"]
    model, optimizer, _ = make()
    ids = token_ids(SHARDED_ROWS)
    with tempfile.TemporaryDirectory() as folder:
        cluster, out = Path(folder, "small.toml"), Path(folder, "plan")
        cluster.write_text(
            f'[[groups]]\ndevice = "cpu"\nhosts = 1\ndevices = {RANKS}\n'
            f"[device]\nmemory_bytes = {SMALL_DEVICE_BYTES}\n"
        )
        weft.plan(step, (model, optimizer, ids), cluster=str(cluster), mesh=str(RANKS)).save(out)
        child = str(Path(__file__).with_name("step_memory.py"))
        subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone",
             f"--nproc-per-node={RANKS}", child, str(out)],
            check=True, capture_output=True,
        )  # fmt: skip
        ranks = [json.loads((out / f"memory{rank}.json").read_text()) for rank in range(RANKS)]
    states = 3 * sum(p.numel() * p.element_size() for p in model.parameters())
    local = ids[: SHARDED_ROWS // RANKS]
    activations = rise_bytes(lambda: model(input_ids=local, labels=local).loss)
    peak = max(rank["live"] + rank["rise"] for rank in ranks)
    held = max(rank["live"] for rank in ranks)
    name = f"llama, {RANKS} ranks"
    return [
        Row(f"{name}, states on a rank over all / {RANKS}", held * RANKS / states, "",
            SHARDED_RATIO, "all sharded"),
        Row(f"{name}, peak memory of a rank", peak / (states / RANKS + activations), "",
            SHARDED_RATIO, f"states / {RANKS} + eager's forward on a rank's rows"),
    ]  # fmt: skip


def step_rows(quick: bool) -> list[Row]:
    """All figures; a quick run has the Llama only, and leaves torch.compile out."""
    rows: list[Row] = []
    for name in list(STEPS)[:1] if quick else STEPS:
        rows += time_rows(name, 5 if quick else 15, not quick) + memory_rows(name)
    return rows + sharded_rows()
