"""What a 1-rank plan of a train step costs in time and memory, against eager and torch.compile,
and what a rank of a plan with sharded states holds.

All sides of a model run in turns in one process on one thread, a few steps each, of which the first is
left out: it finds the heap as the other side left it. Memory that was freed stays with that process, or
page faults of whichever side the system charges them to, up to a sixth of a step, would decide. A ratio
is the median, over the rounds, of the ratio of
two processor times of one round: what slows a whole round cancels, and a disturbance is an outlier.
First steps are timed by the clock, because compilers run beside the process. Memory is measured in
processes of its own (`step_memory.py`).
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rows import Row, timed
from step_memory import in_child, rise_bytes
from torch import Tensor
from train_steps import SHARDED_ROWS, STEPS, runner, token_ids

import weft

#: figures 2 and 3 of the contract
TIME_RATIO, MEMORY_RATIO, SHARDED_RATIO = 1.05, 1.05, 1.10
RANKS = 4
#: timed steps of a side in a round
TIMED = 2
#: models that are compiled too, which takes up to a minute each
COMPILED = ("llama", "gpt2", "resnet")
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


def _seconds(run: Callable[[], Tensor]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def _rounds(runs: dict[str, Callable[[], Tensor]], repeats: int) -> list[dict[str, float]]:
    """Processor seconds of a step of each side in each round; another one begins each round."""
    rounds, names = [], list(runs)
    for number in range(repeats + 1):
        seconds = {}
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            runs[name]()
            seconds[name] = min(_seconds(runs[name]) for _ in range(TIMED))
        rounds.append(seconds)
    return rounds[1:]  # the first one warms up


def _keep_freed_memory() -> None:
    """Let glibc's malloc keep what is freed: no mappings of their own, no trimming (mallopt(3))."""
    trim_threshold, mmap_max = -1, -4
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)


def time_rows(name: str, repeats: int, compilers: bool) -> list[Row]:
    """Step time of one model, and the time until the first step is done; for a process of its own.

    With `compilers` the plan runs on the backend `inductor` too, and the model under torch.compile.
    """
    _keep_freed_memory()
    torch.set_num_threads(1)
    sides: dict[str, Callable[[Callable[..., Tensor]], Any]] = {
        "eager": lambda step: step, "plan": weft.compile,
    }  # fmt: skip
    if compilers:
        sides["inductor"] = weft.compile(cpu_backend="inductor")
        sides["torch.compile"] = _compiled_model
    runs = {side: runner(name, wrap) for side, wrap in sides.items()}
    first = {side: timed(run)[0] for side, run in runs.items()}
    rounds = _rounds(runs, repeats)

    def ratio(side: str, other: str) -> float:
        return median(seconds[side] / seconds[other] for seconds in rounds)

    step = median(seconds["eager"] for seconds in rounds)
    rows = [
        Row(f"{name} step, eager", step * 1e3, "ms"),
        Row(f"{name} step, 1-rank plan", ratio("plan", "eager"), "", TIME_RATIO, "eager"),
    ]
    if compilers:
        rows += [
            Row(f"{name} step, 1-rank plan on inductor", ratio("inductor", "torch.compile"), "",
                TIME_RATIO, "torch.compile of the model"),
            Row(f"{name} step, torch.compile", ratio("torch.compile", "eager"), "", None, "eager"),
        ]  # fmt: skip
    for side, took in first.items():
        if side != "eager":
            rows.append(Row(f"{name} first step, {side}", took, "s"))
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
    """All figures; a quick run has the Llama only, and leaves the compilers out."""
    rows: list[Row] = []
    for name in list(STEPS)[:1] if quick else STEPS:
        compilers = name in COMPILED and not quick
        with multiprocessing.get_context("spawn").Pool(1) as child:
            rows += child.apply(time_rows, (name, 4 if quick else 8, compilers))
        rows += memory_rows(name)
    return rows + sharded_rows()
