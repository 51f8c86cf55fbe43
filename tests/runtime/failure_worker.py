"""What `test_failures.py` runs: `failure_worker.py FOLDER MODE:PORT ...`, a world of 4 ranks for each
mode, in which rank 2 fails by that mode. The ranks are forks, which saves importing torch.

Each rank that can writes FOLDER/MODE.<rank>.json: what was raised and after how long. At the end
FOLDER/ended.json says after how many seconds each process was gone, and how.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tests.runtime.schedules import TRAIN_STEP

from weft.ir.errors import RunError
from weft.ir.parser import parse_module
from weft.runtime.launch import init_from_env
from weft.runtime.program import Program

CULPRIT = 2
RANKS = 4
#: how long a transfer waits for the others
TIMEOUT_S = 4.0


def misbehave(mode: str, program: Program) -> None:
    """What the culprit does in place of its second step."""
    match mode:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "raise":  # in an action, after the step's first transfers
            program.executor.state[1] = program.executor.state[1].double()
        case "user":
            raise ValueError("the data loader found no file")
        case "exit":
            sys.exit(0)
        case "sleep":
            time.sleep(3 * TIMEOUT_S)


def rank_main(out: Path, mode: str, rank: int) -> None:
    """One rank."""
    report: dict[str, Any] = {}
    start = time.monotonic()
    try:
        with init_from_env(timeout_s=TIMEOUT_S) as world:
            program = Program(parse_module(TRAIN_STEP), timeout_s=TIMEOUT_S)
            program.load_state({"w": torch.ones(5, 6)})
            steps = 1 if mode == "early" and world.rank == CULPRIT else 4
            for step in range(steps):
                if step == 1:
                    start = time.monotonic()
                    if world.rank == CULPRIT:
                        misbehave(mode, program)
                program.step(torch.ones(7, 5), lr=0.1)
    except (RunError, ValueError) as error:
        report["message"], report["code"] = str(error), getattr(error, "code", "")
    report["took_s"] = time.monotonic() - start
    Path(out, f"{mode}.{rank}.json").write_text(json.dumps(report), encoding="utf-8")


def start_rank(out: Path, mode: str, port: str, rank: int) -> int:
    """Fork a rank; its process id."""
    child = os.fork()
    if child:
        return child
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(RANKS), MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
        TORCHELASTIC_USE_AGENT_STORE="True",
    )  # fmt: skip
    code = 1
    try:
        rank_main(out, mode, rank)
        code = 0
    except SystemExit:
        code = 0
    finally:
        os._exit(code)


def main(folder: str, *worlds: str) -> None:
    torch.set_num_threads(1)
    out, start = Path(folder), time.monotonic()
    running: dict[int, tuple[str, int]] = {}
    for world in worlds:
        mode, port = world.split(":")
        for rank in range(RANKS):
            running[start_rank(out, mode, port, rank)] = (mode, rank)
    ended: dict[str, tuple[float, int]] = {}
    while running:
        if list(running.values()) == [("stop", CULPRIT)]:  # what is stopped never ends
            os.kill(next(iter(running)), signal.SIGKILL)
        for child in list(running):
            gone, status = os.waitpid(child, os.WNOHANG)
            if gone:
                mode, rank = running.pop(child)
                code = os.waitstatus_to_exitcode(status)
                ended[f"{mode}.{rank}"] = time.monotonic() - start, code
        time.sleep(0.05)
    Path(out, "ended.json").write_text(json.dumps(ended), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
