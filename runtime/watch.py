"""Who holds the others up: each rank says where it is when one of them calls.

A transfer that fails has victims and a culprit. The rank that notices sets a key in the store of
torch.distributed; a thread on every rank looks for it and answers with the place of the main
thread: the action that it runs, or the user's line outside a step. A rank that does not answer is
dead or stopped. So every survivor names the culprit and not another victim.
"""

from __future__ import annotations

import atexit
import linecache
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from ..ir.errors import RunError

#: Seconds between looks at the store: one small request, a few hundred microseconds of the store.
POLL_S = 0.5
#: Seconds that a rank waits for the others to say where they are: some polls, on a busy machine.
ROLL_CALL_S = 3.0

#: file names of generated functions begin so (`wrapper.py`)
GENERATED = "<weft rank"
_INTERNAL = (f"{Path(torch.__file__).parent}/", f"{Path(__file__).parents[1]}/", "<")
_CALL, _TICKETS = "weft/call", "weft/tickets"
#: first letters of answers: the rank waits for others, it gave up, or it holds others up
_WAITS, _GAVE_UP, _HOLDS = "w", "g", "h"


#: gloo's source position before, and its advice behind, the cause of an error
_NOISE = re.compile(r"^\[/[^\]]*\] |\. This is typically caused by.*$")


def first_line(error: BaseException) -> str:
    """`ValueError: what it says`, without the noise of gloo."""
    text = str(error).strip() or type(error).__name__
    return f"{type(error).__name__}: {_NOISE.sub('', text.splitlines()[0])}"


def position(frame: FrameType | None) -> tuple[bool, str]:
    """Is a frame inside an action, and in words where it is."""
    user: FrameType | None = None
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(GENERATED):
            line = linecache.getline(file, frame.f_lineno)
            return True, line.partition("  # ")[2].strip() or line.strip()
        if user is None and not file.startswith(_INTERNAL):
            user = frame
        frame = frame.f_back
    if user is None:
        return False, "outside its steps"
    where = f"{user.f_code.co_filename}:{user.f_lineno} ({user.f_code.co_name})"
    return False, f"outside its steps, at {where}"


class Watch:
    """Answers roll calls of the other ranks, from a thread of its own.

    Args:
        store: the store that all ranks share.
        rank, world: this rank, and how many there are.
    """

    def __init__(self, store: Any, rank: int, world: int) -> None:
        self.store, self.rank, self.world = store, rank, world
        self.calling = False
        self._fixed = ""  # the answer, once it is known for good
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="weft watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._stop.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(2 * POLL_S)

    def _run(self) -> None:
        while not self._stop.wait(POLL_S):
            try:
                if self.store.check([_CALL]):
                    self.store.set(f"weft/answer/{self.rank}", self._fixed or self._answer())
            except RuntimeError:  # the store went with the rank that held it
                return

    @staticmethod
    def _answer() -> str:
        if _DOING:
            return f"{_WAITS}waits for the others, it {_DOING[-1]}"
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        inside, where = position(frame)
        if not inside:
            return f"{_HOLDS}is {where}"
        transfer = where.startswith(("wait", "all_", "reduce_scatter", "broadcast", "permute_ranks",
                                     "lse_combine", "send", "recv"))  # fmt: skip
        return f"{_WAITS}waits in {where}" if transfer else f"{_HOLDS}is still in {where}"

    def ended(self) -> None:
        """From now on the answer is that this rank has come to its end."""
        self._fixed = f"{_HOLDS}has come to the end of its program"

    def report(self, text: str) -> None:
        """Tell the other ranks why this one fails: `in ACTION: reason`, `with ERROR`."""
        with suppress(RuntimeError):
            self.store.set(f"weft/failed/{self.rank}", text)

    def roll_call(self, where: str, patience_s: float = ROLL_CALL_S) -> list[str]:
        """After a failed transfer: the ranks that failed, are dead, or hold the others up.

        Args:
            where: the transfer and its error, which the others hear if no other reason is found.
        """
        found: list[str] = []
        self.calling = True
        # a stopped rank may hold the store, whose requests have no time limit
        asking = threading.Thread(target=self._ask, args=(where, patience_s, found), daemon=True)
        asking.start()
        asking.join(patience_s + 2 * POLL_S)
        self.calling = False
        return list(found) or ([_NO_STORE] if asking.is_alive() else [])

    def _ask(self, where: str, patience_s: float, found: list[str]) -> None:
        others = [rank for rank in range(self.world) if rank != self.rank]
        answers: dict[int, str] = {}
        until = time.monotonic() + patience_s
        try:
            if not self._fixed:  # those who gave up are told apart by who was the first
                ticket = self.store.add(_TICKETS, 1)
                self._fixed = f"{_GAVE_UP}{ticket:06d} gave up in {where}"
            self.store.set(_CALL, "")
            self.store.set(f"weft/answer/{self.rank}", self._fixed)
            while len(answers) < len(others) and time.monotonic() < until:
                if failed := self._failed(others):
                    found += failed
                    return
                for rank in others:
                    if rank not in answers and self.store.check([f"weft/answer/{rank}"]):
                        answers[rank] = self._text(f"weft/answer/{rank}")
                time.sleep(0.05)
            found += self._failed(others)
        except RuntimeError:  # so is every error of a store
            found.append(_NO_STORE)
            return
        found += found or _culprits(others, answers)

    def _failed(self, others: Sequence[int]) -> list[str]:
        keys = {rank: f"weft/failed/{rank}" for rank in others}
        return [f"rank {r} failed {self._text(k)}" for r, k in keys.items() if self.store.check([k])]

    def _text(self, key: str) -> str:
        return str(self.store.get(key).decode(errors="replace"))


_NO_STORE = "the rank that holds the store of torch.distributed does not answer"


def _culprits(others: Sequence[int], answers: dict[int, str]) -> list[str]:
    """Dead ranks; without any, those that hold others up; without any, the first that gave up."""
    silent = [r for r in others if r not in answers]
    if silent:
        return [f"rank {r} does not answer, it is dead or stopped" for r in silent]
    holding = [r for r in others if answers[r].startswith(_HOLDS)]
    if holding:
        return [f"rank {r} {answers[r][1:]}" for r in holding]
    gave_up = [(answers[r], r) for r in others if answers[r].startswith(_GAVE_UP)]
    return [f"rank {r} {text.partition(' ')[2]}" for text, r in sorted(gave_up)[:1]]


_WATCH: list[Watch] = []
#: what this rank does together with the others outside of actions, innermost last
_DOING: list[str] = []


@contextmanager
def together(doing: str) -> Iterator[None]:
    """Around communication outside of actions: where it fails, the others are asked why.

    Args:
        doing: what all ranks do here, `gathers its results`.

    Raises RunError W0803 in place of an error of torch.distributed.
    """
    _DOING.append(doing)
    try:
        yield
    except RunError:
        raise
    except RuntimeError as error:
        raise transfer_failed(doing, error) from error
    finally:
        _DOING.pop()


def transfer_failed(doing: str, error: RuntimeError) -> RunError:
    """The diagnostic for communication outside of actions; asks the other ranks."""
    here, told = watch(), first_line(error)
    culprits = here.roll_call(f"what all do together, it {doing}: {told}") if here else []
    rank = dist.get_rank() if dist.is_initialized() else 0
    return RunError(
        "W0803", f"rank {rank} failed while it {doing}", reason="; ".join([*culprits, told]),
        hint="look at the output of the rank named first" if culprits else
        "all ranks make the same calls in the same order",
    )  # fmt: skip


def watch() -> Watch | None:
    """This process's watch, started when there is a world of several ranks; None without one."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return None
    store = _get_default_store()
    if _WATCH and _WATCH[0].store is store:
        return _WATCH[0]
    unwatch()
    _WATCH.append(Watch(store, dist.get_rank(), dist.get_world_size()))
    main = threading.current_thread() is threading.main_thread()
    if main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _on_sigterm)
    return _WATCH[0]


def unwatch() -> None:
    """Stop this process's watch."""
    while _WATCH:
        _WATCH.pop().stop()
        if signal.getsignal(signal.SIGTERM) is _on_sigterm:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


atexit.register(unwatch)


def _on_sigterm(number: int, frame: FrameType | None) -> None:
    """torchrun ends the others within 0.1 s of a rank's death: say first what this rank waited for.

    While an error is handled, by a roll call or on the way out, nothing is done: it ends soon.
    """
    if not _WATCH or _WATCH[0].calling or isinstance(sys.exception(), RuntimeError | RunError):
        return
    here = _WATCH[0]
    inside, where = position(frame)
    if inside:
        why = "; ".join(here.roll_call(f"{where}: SIGTERM")) or "no other rank says why"
        sys.stderr.write(f"[W0803] rank {here.rank} was ended in {where}\n  why: {why}\n")
        sys.stderr.flush()
    signal.signal(number, signal.SIG_DFL)
    signal.raise_signal(number)


__all__ = [
    "POLL_S", "ROLL_CALL_S", "Watch", "first_line", "position", "together", "transfer_failed",
    "unwatch", "watch",
]  # fmt: skip
