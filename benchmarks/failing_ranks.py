"""Ranks that fail at a random action, for `recovery.py`: what every survivor says, and how soon.

In each world of four ranks a train step runs on a 2 x 2 mesh; at a random action of the second step
a random rank is killed or stopped, loops for ever or raises, or between two steps it leaves or hangs
in a function of the user's. The ranks are forks of one process, which saves importing torch; the
store outlives them, as torchrun's does.
"""

from __future__ import annotations

import faulthandler
import json
import linecache
import os
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any

import torch
from rows import Row
from torch import nn

import weft
from weft.frontend.options import OPTIONS
from weft.ir.errors import RunError
from weft.ir.module import Module
from weft.runtime.comm import COMMUNICATION
from weft.runtime.launch import init_from_env
from weft.runtime.program import Program
from weft.runtime.watch import GENERATED, ROLL_CALL_S

RANKS = 4
#: how long a transfer waits for the others; short, so that fifty failures take minutes
TIMEOUT_S = 4.0
#: a victim may wait for another victim's limit before its own roll call; the machine may be busy
ALLOWED_S = 2 * TIMEOUT_S + 2 * ROLL_CALL_S + 10.0
#: mode -> what the others must say of the culprit, after `rank N `
SAID = {
    "kill": r"does not answer, it is dead or stopped",
    "stop": r"does not answer, it is dead or stopped",
    "loop": r"is still in .+\.py:\d+",
    "raise": r"(failed|gave up) in .+: RuntimeError: no such luck",
    "leave": r"has come to the end of its program",
    "user": r"is outside its steps, at .*failing_ranks\.py:\d+ \(load_batch\)",
}
_TRANSFERS = ("wait", *COMMUNICATION)
#: a survivor names the action that it waited in
_OWN = re.compile(r"rank (\d+) failed (in .+\.py:\d+|while it gathers the results)")


@dataclass(frozen=True)
class World:
    """One world of ranks.

    Attributes:
        mode: one of `SAID`.
        culprit: the rank that fails.
        action: of the second step at which it does, counted from its first one.
        seed: of the placement.
    """

    mode: str
    culprit: int
    action: int
    seed: int

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.mode}-{self.culprit}-{self.action}-{self.seed}"


def schedule(seed: int) -> Module:
    """A train step on 2 x 2 ranks under a random placement."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = model(x).square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss

    place = f"random-place[mesh=2x2 seed={seed}]"
    text = f"simplify,outline,differentiate,simplify,{place},lower,fuse,schedule"
    options = OPTIONS.with_({"pipeline": text, "progress": False})
    example = model, torch.optim.AdamW(model.parameters()), torch.randn(9, 6)
    made = weft.plan(step, example, cluster="1x4:cpu", options=options)
    return made.module("schedule")


def _acts(line: str, transfers: bool) -> bool:
    """Does a line run an op, a kernel or an update, or, where asked, a transfer?"""
    code, _, name = line.partition("  # ")
    runs = "(" in code and bool(name) and not code.lstrip().startswith("S[")
    return runs and (transfers or not name.startswith(_TRANSFERS))


def at_action(number: int, transfers: bool, act: Callable[[], None]) -> None:
    """Call `act` at an action of the generated code, counted from now on."""
    seen = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal seen
        if not frame.f_code.co_filename.startswith(GENERATED):
            return None
        if event == "line":
            line = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
            seen += _acts(line, transfers)
            if seen == number:
                seen += 1  # once
                sys.settrace(None)
                act()
        return trace

    sys.settrace(trace)


def actions_of(program: Program, transfers: bool) -> int:
    """How many actions a step has at least, so that each is as likely as any other."""
    return sum(_acts(line, transfers) for line in program.executor.source.splitlines())


def load_batch() -> None:
    """A function of the user's that never returns."""
    while True:
        time.sleep(0.01)


def misbehave(world: World, program: Program) -> None:
    """What the culprit does before or in its second step."""

    def raise_() -> None:
        raise RuntimeError("no such luck")

    def loop() -> None:
        while True:
            pass

    acts = {
        "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
        "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
        "loop": loop,
        "raise": raise_,
    }
    if world.mode == "user":
        load_batch()
    else:
        transfers = world.mode != "loop"  # who is in a transfer is a victim, as far as anyone sees
        number = 1 + world.action % actions_of(program, transfers)
        at_action(number, transfers, acts[world.mode])


def rank_main(out: Path, world: World, module: Module) -> None:
    """One rank; writes what it raised and after how long."""
    report: dict[str, Any] = {"code": "", "message": "ended well"}
    start = time.monotonic()
    try:
        with init_from_env(timeout_s=TIMEOUT_S) as here:
            program = Program(module, timeout_s=TIMEOUT_S)
            program.init_state(lambda name, type: torch.ones(type.shape))
            for step in range(3):
                if step == 1:
                    start = time.monotonic()
                    if here.rank == world.culprit:
                        if world.mode == "leave":
                            break
                        misbehave(world, program)
                program.step(torch.ones(9, 6), lr=0.1)
    except RunError as error:
        report = {"code": error.code, "message": str(error)}
    report["took_s"] = time.monotonic() - start
    Path(out, f"{world.name}.{here.rank}.json").write_text(json.dumps(report), encoding="utf-8")


def start_rank(out: Path, world: World, module: Module, port: int, rank: int) -> int:
    """Fork a rank; its process id."""
    child = os.fork()
    if child:
        return child
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(RANKS), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",
    )  # fmt: skip
    with Path(out, f"{world.name}.{rank}.stack").open("w") as stack:
        faulthandler.dump_traceback_later(ALLOWED_S, file=stack)  # of what hangs
        try:
            rank_main(out, world, module)
        finally:
            os._exit(0)


def start_stores(count: int) -> tuple[int, list[int]]:
    """A process that holds the stores, and their ports: one with threads cannot be forked."""
    read, write = os.pipe()
    child = os.fork()
    if child:
        os.close(write)
        with os.fdopen(read) as stream:
            return child, json.loads(stream.readline())
    make = partial(torch.distributed.TCPStore, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    stores = [make("127.0.0.1", 0) for _ in range(count)]
    os.write(write, f"{json.dumps([store.port for store in stores])}\n".encode())
    signal.pause()
    os._exit(0)


def run_worlds(out: Path, worlds: Sequence[World]) -> dict[str, bool]:
    """Run some worlds at once; did all survivors of each end on their own, in time?"""
    modules = {world.seed: schedule(world.seed) for world in worlds}
    server, ports = start_stores(len(worlds))
    running = {
        start_rank(out, world, modules[world.seed], port, rank): (world, rank)
        for world, port in zip(worlds, ports, strict=True)
        for rank in range(RANKS)
    }
    ended = {world.name: True for world in worlds}
    limit = time.monotonic() + 2 * ALLOWED_S
    while running:
        for child in list(running):
            if os.waitpid(child, os.WNOHANG)[0]:
                del running[child]
        late = time.monotonic() > limit
        waited = {world for world, rank in running.values() if rank != world.culprit}
        for child, (world, rank) in list(running.items()):
            if late or world not in waited:  # what is stopped or loops never ends
                ended[world.name] &= rank == world.culprit
                os.kill(child, signal.SIGKILL)
        time.sleep(0.05)
    os.kill(server, signal.SIGKILL)
    os.waitpid(server, 0)
    return ended


def faults(out: Path, world: World, ended: bool) -> list[str]:
    """What is wrong with the reports of a world's survivors."""
    wrong = [] if ended else ["a survivor hangs"]
    for rank in set(range(RANKS)) - {world.culprit}:
        path = out / f"{world.name}.{rank}.json"
        report: dict[str, Any] = {"message": f"hangs\n{path.with_suffix('.stack').read_text()}"}
        if path.exists():
            report = json.loads(path.read_text())
        message = str(report["message"])
        if report.get("code") != "W0803":
            wrong.append(f"rank {rank}: {message}")
        elif not re.search(rf"why: (.*; )?rank {world.culprit} {SAID[world.mode]}", message):
            wrong.append(f"rank {rank} does not name the culprit: {message}")
        elif not _OWN.search(message):
            wrong.append(f"rank {rank} does not say where it was: {message}")
        elif report["took_s"] > ALLOWED_S:
            wrong.append(f"rank {rank} took {report['took_s']:.0f} s")
    return wrong


def failures(quick: bool, seed: int) -> list[Row]:
    """The rows of part two of `recovery.py`."""
    torch.set_num_threads(1)
    random, rows = Random(seed), []
    rounds = 1 if quick else 10
    found: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        for _ in range(rounds):
            worlds = [
                World(mode, random.randrange(RANKS), random.randrange(10_000), random.randrange(20))
                for mode in SAID
            ]
            ended = run_worlds(Path(name), worlds)
            for world in worlds:
                wrong = faults(Path(name), world, ended[world.name])
                found[world.mode] += bool(wrong)
                for text in wrong:
                    print(f"{world.name}: {text}", file=sys.stderr)
    for mode in SAID:
        against = f"{rounds} times, {RANKS - 1} survivors each"
        row = f"failures: {mode}, worlds without a full report on every survivor"
        rows.append(Row(row, found[mode], "", 0.0, against))
    return rows
