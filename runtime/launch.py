"""Starting the ranks of a plan, and ending them.

torchrun does the work (rendezvous, signals, tearing down the others when a rank dies); this module
calls it for this interpreter, and sets a rank's world up from the environment it makes.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import traceback
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeGuard

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from ..ir.errors import RunError
from .comm import TIMEOUT_S
from .watch import first_line, transfer_failed, unwatch, watch

#: torchrun's summary of the first failure: `rank : 1 (local_rank: 1)` and `exitcode : -9 (pid: 7)`
_FAILED = re.compile(r"Root Cause.*?rank\s*:\s*(\d+).*?exitcode\s*:\s*(-?\d+)", re.DOTALL)
_DISTRIBUTED = str(Path(dist.__file__).parent)
#: seconds that torchrun gets to end its ranks: it sends SIGTERM, and SIGKILL after 30 s
_GRACE_S = 35.0
#: lines of stderr that are kept to explain a failure
_KEPT_LINES = 200


@dataclass(frozen=True)
class World:
    """A rank's place among all ranks, and its device."""

    rank: int
    size: int
    device: torch.device


def launch(
    argv: Sequence[str],
    nproc: int,
    *,
    env: Mapping[str, str] | None = None,
    timeout_s: float | None = None,
) -> None:
    """Run `python argv...` on `nproc` ranks of this host and wait for them.

    Their output goes to this process's stdout and stderr. When one dies, the others are ended.

    Args:
        argv: a script and its arguments, or `-m module ...`.
        env: variables on top of the current environment; OMP_NUM_THREADS is 1 by default, so that
            ranks on one host do not fight for its cores.
        timeout_s: how long all of it may take.

    Raises RunError W0803 when a rank fails or the time is over.
    """
    module = ["--module", *argv[1:]] if argv and argv[0] == "-m" else list(argv)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               f"--nproc-per-node={nproc}", *module]  # fmt: skip
    variables = {"OMP_NUM_THREADS": "1", **os.environ, **(env or {})}
    tail: deque[str] = deque(maxlen=_KEPT_LINES)
    with subprocess.Popen(command, env=variables, stderr=subprocess.PIPE, text=True) as agent:
        try:
            code = _wait(agent, tail, timeout_s)
        except BaseException:
            _end(agent)  # torchrun ends its ranks on SIGTERM
            raise
    if code:
        raise _failure("".join(tail), code)


def _wait(agent: subprocess.Popen[str], tail: deque[str], timeout_s: float | None) -> int:
    """Pass stderr on until the agent ends; its exit code."""
    assert agent.stderr is not None
    stream = agent.stderr

    def pass_on() -> None:
        for line in stream:
            tail.append(line)
            sys.stderr.write(line)

    reader = threading.Thread(target=pass_on, daemon=True)
    reader.start()
    try:
        code = agent.wait(timeout_s)
    except subprocess.TimeoutExpired:
        raise RunError(
            "W0803", f"the ranks did not end within {timeout_s:g} s",
            hint="look at the last output of each rank, or allow more time",
        ) from None  # fmt: skip
    reader.join(timeout=5)
    return code


def _end(agent: subprocess.Popen[str]) -> None:
    agent.terminate()
    try:
        agent.wait(_GRACE_S)
    except subprocess.TimeoutExpired:
        agent.kill()


def _failure(stderr: str, code: int) -> RunError:
    found = _FAILED.search(stderr)
    if found is None:
        return RunError(
            "W0803", f"the ranks could not be run: torchrun ended with code {code}",
            reason=stderr.strip().splitlines()[-1] if stderr.strip() else "",
        )  # fmt: skip
    rank, status = int(found[1]), int(found[2])
    how = f"was ended by signal {-status}" if status < 0 else f"ended with code {status}"
    return RunError(
        "W0803", f"rank {rank} {how}", reason="the other ranks were ended after it",
        hint=f"the output of rank {rank} above says why",
    )  # fmt: skip


@contextmanager
def init_from_env(kind: str = "", *, timeout_s: float = TIMEOUT_S) -> Iterator[World]:
    """This rank's world, from the variables that torchrun sets; a world of one without them.

    NCCL where each rank of the host has a GPU, gloo otherwise, and where `kind`, the device kind of
    the plan's mesh, is `cpu`. At a normal end the ranks wait for
    each other before the process groups go, since some hold what others still read; after an error
    nothing is waited for.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    rank, local = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cuda = kind != "cpu" and torch.cuda.is_available() and torch.cuda.device_count() >= here
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if size == 1:
        yield World(rank, size, device)
        return
    # no device_id: NCCL would then split groups off with all ranks taking part, not members alone
    # torchrun keeps its store over restarts, with the addresses of ranks that are gone
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    limit = timedelta(seconds=timeout_s)
    try:
        base, _, _ = next(rendezvous("env://", timeout=limit))
        dist.init_process_group(
            "nccl" if cuda else "gloo", timeout=limit, rank=rank, world_size=size,
            store=PrefixStore(f"weft/attempt{attempt}", base),
        )  # fmt: skip
    except (RuntimeError, ValueError) as error:
        raise RunError(
            "W0803", f"rank {rank} did not find the other {size - 1} within {timeout_s:g} s",
            reason=first_line(error),
            hint="start all ranks with torchrun, and look for the one that ended before",
        ) from error  # fmt: skip
    try:
        watch()
        yield World(rank, size, device)
        if cuda:
            torch.cuda.synchronize()
        _end_together(rank, [local] if cuda else None)
    except BaseException as error:
        if _is_transfers(error):
            raise transfer_failed("communicates with the others", error) from error
        _tell(error)
        raise
    finally:
        unwatch()
        dist.destroy_process_group()


def _end_together(rank: int, devices: list[int] | None) -> None:
    """Wait for the other ranks. Raises RunError W0803 when one of them does not come."""
    here = watch()
    if here is not None:
        here.ended()
    try:
        dist.barrier(device_ids=devices)
    except RuntimeError as error:
        culprits = here.roll_call("the barrier at its end") if here is not None else []
        raise RunError(
            "W0803", f"rank {rank} came to its end, the others did not",
            reason="; ".join(culprits) or str(error).splitlines()[0],
            hint="all ranks make the same calls in the same order, as many steps on each",
        ) from error  # fmt: skip


def _is_transfers(error: BaseException) -> TypeGuard[RuntimeError]:
    """Did torch.distributed raise it: in a checkpoint, or in a call of the user's own?"""
    if not isinstance(error, RuntimeError):
        return False
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and frames[-1].filename.startswith(_DISTRIBUTED)


def _tell(error: BaseException) -> None:
    """Tell the other ranks why this one leaves; those that hear of a failed transfer know."""
    here = watch()
    if here is None or (isinstance(error, RunError) and error.code == "W0803"):
        return
    text = str(error).strip().splitlines()
    what = "with " + type(error).__name__ + (f": {text[0]}" if text else "")
    user = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith("<")]
    here.report(f"{what} ({user[-1].filename}:{user[-1].lineno})" if user else what)
