"""Many more architectures, in a process each: are train steps and plans equal to eager?

    python benchmarks/zoo_wide.py [--quick] [--only NAME ...] [--limit SECONDS] [--json FILE]

The models are those of `tests/frontend/zoo_wide.py`, measured as `benchmarks/zoo.py` does it. A
model that takes longer than the limit is stopped; one that is refused shows its diagnostic.
"""

from __future__ import annotations

import logging
import multiprocessing
import sys
import time
import traceback
import warnings
from functools import partial
from pathlib import Path
from queue import Empty

import torch
from rows import Row, arguments, finish
from zoo import TARGETS, Found, measure, rows_of

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.frontend.zoo_wide import WIDE, build

from weft.ir.errors import CompileError


def _measured(name: str, number: int, answers: multiprocessing.Queue[Found | str]) -> None:
    """The work of one process: figures, or why there are none."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    try:
        answers.put(measure(partial(build, name), number))
    except CompileError as error:
        answers.put(f"{error.code} {error.message}: {error.reason} ({error.span})")
    except Exception as error:  # noqa: BLE001  a crash is a figure of this table
        place = traceback.extract_tb(error.__traceback__)[-1]
        answers.put(f"CRASH {type(error).__name__}: {error} ({place.filename}:{place.lineno})")


def measured(name: str, number: int, limit_s: float) -> Found | str:
    """The figures of one model, or why there are none."""
    context = multiprocessing.get_context("fork")  # torch and transformers are loaded once
    answers: multiprocessing.Queue[Found | str] = context.Queue()
    process = context.Process(target=_measured, args=(name, number, answers))
    process.start()
    try:
        return answers.get(timeout=limit_s)
    except Empty:
        return f"TIME more than {limit_s:.0f} s"
    finally:
        process.kill()
        process.join()


def main() -> int:
    """Measure, print, write; 1 when a target is missed."""
    parser = arguments(__doc__, "six models")
    parser.add_argument("--only", nargs="+", help="models by name")
    parser.add_argument("--limit", type=float, default=150.0, help="seconds for one model")
    options = parser.parse_args()
    names = options.only or (list(WIDE)[::20] if options.quick else list(WIDE))
    rows: list[Row] = []
    print(f"{'model':22}" + "".join(f"{what:>14}" for what in TARGETS) + f"{'s':>6}  fallbacks")
    for name in names:
        start = time.perf_counter()
        found = measured(name, list(WIDE).index(name), options.limit)
        seconds = time.perf_counter() - start
        if isinstance(found, str):
            rows += rows_of(name, None)
            print(f"{name:22}{'':70}{seconds:6.1f}  {found[:300]!r}", flush=True)
            continue
        rows += rows_of(name, found)
        figures = "".join(f"{found.errors[what]:14.1e}" for what in TARGETS)
        print(f"{name:22}{figures}{seconds:6.1f}  "
              f"{len(found.fallbacks)} {' '.join(sorted(set(found.fallbacks)))}", flush=True)  # fmt: skip
    return finish(rows, options.json)


if __name__ == "__main__":
    sys.exit(main())
