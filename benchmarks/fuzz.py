"""Broken cluster specifications, artifacts and option sets: diagnostics only.

10,000 inputs, made by `tests/fuzz`. Each ends in success or in a CompileError or RunError with a
known code. A violation is another exception, more than 5 s of processor time, a dead process,
gigabytes of memory, executed code (pickles, programs), or a file read outside of the artifact. The
exit status is 1 for one; `--seed`, `--kind` and `--only` repeat it.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import tempfile
import traceback
import webbrowser
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any

import torch
from rows import Row, arguments, finish, show

from weft.ir.errors import CODES, CompileError, RunError

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.fuzz import artifacts, clusters, options  # noqa: E402

#: processor time of one input, and real time, which a busy machine stretches
CPU_S, REAL_S = 5.0, 60.0
#: address space on top of what a process has when it starts
MEMORY_BYTES = 4 << 30
#: inputs that one process runs
CHUNK = 200
#: share of the inputs of each kind
KINDS = {"cluster": 4, "artifact": 3, "options": 3}
#: what nothing that is only read may cause
_FORBIDDEN = ("pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen")


class Hang(BaseException):
    """Out of time. No Exception, so that nothing swallows it."""


class Violation(BaseException):
    """Something forbidden was done."""


def _on_alarm(number: int, frame: FrameType | None) -> None:
    raise Hang(f"signal {number}")


@contextmanager
def limited() -> Iterator[None]:
    """Raise Hang when the body takes too long."""
    signal.setitimer(signal.ITIMER_PROF, CPU_S)
    signal.setitimer(signal.ITIMER_REAL, REAL_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)


def forbid() -> Callable[[], list[str]]:
    """Watch for forbidden acts of this process; what was seen since the last call."""
    seen: list[str] = []

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event in _FORBIDDEN:
            seen.append(f"{event} {str(args)[:200]}")
        elif event == "open" and str(args[0]).endswith(artifacts.SECRET):
            seen.append(f"reads {args[0]}")

    sys.addaudithook(hook)

    def take() -> list[str]:
        found = list(seen)
        seen.clear()
        return found

    return take


def one(kind: str, seed: int, folder: Path, bases: Path, take: Callable[[], list[str]]) -> tuple[str, str]:
    """Run an input: its outcome (`ok`, a code, `violation`), and what is wrong."""
    outcome, wrong = _attempt(kind, seed, folder, bases, take)
    if f"Hang: signal {int(signal.SIGALRM)}" in wrong:  # the machine may have slept
        outcome, wrong = _attempt(kind, seed, folder, bases, take)
    return outcome, wrong


def _attempt(
    kind: str, seed: int, folder: Path, bases: Path, take: Callable[[], list[str]]
) -> tuple[str, str]:
    random = Random(f"{kind} {seed}")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory(dir=folder) as name, open(os.devnull, "w") as null:
        here = Path(name)
        (here / "outside").mkdir()
        (here / "outside" / artifacts.SECRET).write_text("weft 1 logical\n")
        take()
        try:
            with limited(), redirect_stdout(null), redirect_stderr(null):
                if kind == "cluster":
                    clusters.run(random, here)
                elif kind == "artifact":
                    artifacts.run(random, here, bases)
                else:
                    options.run(random, here, bases)
            outcome = "ok"
        except (CompileError, RunError) as error:
            if error.code not in CODES or not str(error).strip() or len(str(error)) > 20_000:
                return "violation", f"a diagnostic of {len(str(error))} characters: {str(error)[:200]}"
            outcome = error.code
        except BaseException:
            lines = [line[:300] for line in traceback.format_exc().splitlines()]
            return "violation", "\n".join(lines[-30:])
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    if used * 1024 > MEMORY_BYTES / 2:
        return "violation", f"took {used / 2**20:.1f} GiB"
    wrong = take()
    return ("violation", "; ".join(wrong)) if wrong else (outcome, "")


def run_chunk(kind: str, seeds: Sequence[int], folder: Path, bases: Path, out: Path) -> None:
    """Run some inputs in this process; a line of JSON for each, the seed alone before it runs."""
    torch.set_num_threads(1)
    webbrowser.open = lambda *a, **k: True  # type: ignore[assignment]
    os.chdir(folder)
    signal.signal(signal.SIGPROF, _on_alarm)
    signal.signal(signal.SIGALRM, _on_alarm)
    with open("/proc/self/statm") as stream:
        size = int(stream.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY_BYTES, size + MEMORY_BYTES))
    take = forbid()
    with out.open("w") as lines:
        for seed in seeds:
            lines.write(f"{seed}\n")
            lines.flush()
            lines.write(json.dumps([seed, *one(kind, seed, folder, bases, take)]) + "\n")
            lines.flush()


def _forked(act: Callable[[], None]) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        act()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def fuzz(kind: str, seeds: Sequence[int], folder: Path, bases: Path) -> tuple[Counter[str], list[str]]:
    """Outcomes of the inputs of a kind, and violations."""
    outcomes: Counter[str] = Counter()
    wrong: list[str] = []
    waiting = [list(seeds[i : i + CHUNK]) for i in range(0, len(seeds), CHUNK)]
    running: dict[int, tuple[list[int], Path]] = {}
    number = 0
    while waiting or running:
        while waiting and len(running) < (os.cpu_count() or 1):
            chunk, number = waiting.pop(0), number + 1
            out = folder / f"{kind}.{number}.lines"
            child = _forked(lambda c=chunk, o=out: run_chunk(kind, c, folder, bases, o))  # type: ignore[misc]
            running[child] = chunk, out
        child, status = os.wait()
        chunk, out = running.pop(child)
        rows = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
        for row in rows:
            if isinstance(row, list):
                outcomes[row[1]] += 1
                if row[2]:
                    wrong.append(f"{kind} {row[0]}: {row[2]}")
        if status:
            dead = rows[-1] if rows and isinstance(rows[-1], int) else chunk[0]
            outcomes["violation"] += 1
            wrong.append(f"{kind} {dead}: the process ended with {os.waitstatus_to_exitcode(status)}")
            waiting.append(chunk[chunk.index(dead) + 1 :])
    return outcomes, wrong


def main() -> None:
    """Print and write the rows."""
    parser = arguments(__doc__, "1,000 inputs")
    parser.add_argument("--count", type=int, default=10_000, help="how many inputs")
    parser.add_argument("--seed", type=int, default=0, help="number of the first input")
    parser.add_argument("--kind", choices=KINDS, help="only these")
    parser.add_argument("--only", type=int, help="only this seed of --kind, with its traceback")
    given = parser.parse_args()
    count = 1_000 if given.quick else given.count
    kinds = {given.kind: 1} if given.kind else KINDS
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bases = folder / "bases"
        bases.mkdir()
        torch.set_num_threads(1)  # a process with threads cannot be forked
        artifacts.make_bases(bases)  # also loads what all inputs need: it took most of the time
        for kind, share in kinds.items():
            many = 1 if given.only is not None else count * share // sum(kinds.values())
            first = given.seed if given.only is None else given.only
            outcomes, wrong = fuzz(kind, range(first, first + many), folder, bases)
            for text in wrong[:200]:
                print(text, file=sys.stderr)
            told = ", ".join(f"{n} {code}" for code, n in sorted(outcomes.items()))
            print(f"{kind}: seeds {first} to {first + many - 1}: {told}")
            bad = outcomes["violation"]
            rows.append(Row(f"fuzz: {kind}, inputs without a diagnostic", bad, "", 0.0, f"{many} inputs"))
    show(rows)
    raise SystemExit(finish(rows, given.json))


if __name__ == "__main__":
    main()
