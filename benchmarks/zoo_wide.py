"""Many more architectures, in a process each: are train steps and plans equal to eager?

    python benchmarks/zoo_wide.py [--quick] [--only NAME ...] [--limit SECONDS] [--json FILE]

The models are those of `tests/frontend/zoo_wide.py`, measured as `benchmarks/zoo.py` does it. A
model that takes longer than the limit is stopped; one that is refused shows its diagnostic.

Batch norms over few small images and the like amplify rounding beyond the targets: eager is then as
far from exact numbers as weft is. Such a model is measured again in float64, and marked so.
"""

from __future__ import annotations

import logging
import multiprocessing
import resource
import signal
import sys
import time
import traceback
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from queue import Empty
from typing import Any

import torch
from rows import Row, arguments, finish
from zoo import TARGETS, Found, measure, rows_of

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.frontend.zoo import tensors_of
from tests.frontend.zoo_wide import WIDE, Example, build

from weft.ir.errors import CompileError

#: a process that waits longer than this many times its limit hangs
WALL = 8


def _measured(
    name: str, number: int, answers: multiprocessing.Queue[Found | str], limit_s: int
) -> None:
    """The work of one process: figures, or why there are none."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_CPU, (limit_s, limit_s + 5))
    signal.signal(signal.SIGXCPU, _stop)
    try:
        found = measure(partial(build, name), number)
        if any(found.errors[what] > TARGETS[what] for what in ("loss", "outputs", "gradients")):
            found = replace(measure(partial(_double, name), number), dtype="f64")
        answers.put(found)
    except TimeoutError:
        answers.put(f"TIME more than {limit_s} s")
    except CompileError as error:
        answers.put(f"{error.code} {error.message}: {error.reason} ({error.span})")
    except Exception as error:  # noqa: BLE001  a crash is a figure of this table
        place = traceback.extract_tb(error.__traceback__)[-1]
        answers.put(f"CRASH {type(error).__name__}: {error} ({place.filename}:{place.lineno})")


def _stop(*_: Any) -> None:
    raise TimeoutError


def _double(name: str) -> Example:
    """A model and its inputs in float64."""
    model, inputs = build(name)
    floats = {k: v.double() for k, v in tensors_of(inputs).items() if v.is_floating_point()}
    return model.double(), {**inputs, **floats}


def measured(name: str, number: int, limit_s: int) -> Found | str:
    """The figures of one model, or why there are none."""
    context = multiprocessing.get_context("fork")  # torch and transformers are loaded once
    answers: multiprocessing.Queue[Found | str] = context.Queue()
    process = context.Process(target=_measured, args=(name, number, answers, limit_s))
    process.start()
    try:
        return answers.get(timeout=WALL * limit_s)
    except Empty:
        return f"TIME more than {WALL * limit_s} s on the clock"
    finally:
        process.kill()
        process.join()


def main() -> int:
    """Measure, print, write; 1 when a target is missed."""
    parser = arguments(__doc__, "six models")
    parser.add_argument("--only", nargs="+", help="models by name")
    parser.add_argument("--limit", type=int, default=150, help="CPU seconds for one model")
    options = parser.parse_args()
    names = options.only or (list(WIDE)[::20] if options.quick else list(WIDE))
    rows: list[Row] = []
    print(f"{'model':22}" + "".join(f"{what:>14}" for what in TARGETS) + f"{'s':>6}  dtype, fallbacks")
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
              f"{found.dtype} {len(found.fallbacks)} {' '.join(sorted(set(found.fallbacks)))}",
              flush=True)  # fmt: skip
    return finish(rows, options.json)


if __name__ == "__main__":
    sys.exit(main())
