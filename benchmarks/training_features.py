"""What training programs do beside the plain step: are compiled steps and their plans equal to eager?

    python benchmarks/training_features.py [--quick] [--only FEATURE] [--json FILE]

Features are clipping, accumulation, several losses, averages of weights, optimizers without an
update op and others; each on models of transformers that make it hard (`tests/frontend/features.py`).
Measured are errors after three steps beside eager in float32, of what the step returns, of parameters
and buffers, and of optimizer states; and the error of all results of two plans for 4 ranks (a random
legal placement and the searched one) in float64, by the multi-rank interpreter. Targets are the
project's, 1e-5 for losses and 1e-4 for parameters.
"""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path

from rows import Row, arguments, finish
from zoo import plan_errors

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.frontend.features import CASES, FEATURES, made, step_errors, traced

TARGETS = {"results": 1e-5, "parameters": 1e-4, "states": 1e-4, "random plan": 1e-9,
           "searched plan": 1e-9}  # fmt: skip
REFERENCES = {"random plan": "logical program", "searched plan": "logical program"}


def measure(name: str, model_name: str, number: int) -> dict[str, float]:
    """All errors of one feature on one model; `number` picks its random placement."""
    step, _ = traced(name, model_name)
    plans = plan_errors(lambda: made(name, model_name)[1:], step, number)
    return {**step_errors(name, model_name), **plans}


def main() -> int:
    """Measure, print, write; 1 when a target is missed."""
    parser = arguments(__doc__, "each feature on its first model")
    parser.add_argument("--only", choices=FEATURES, help="one feature")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    rows: list[Row] = []
    print(f"{'feature':34}" + "".join(f"{what:>15}" for what in TARGETS))
    seen = set()
    for number, (name, model_name) in enumerate(CASES):
        if options.only not in (None, name) or (options.quick and name in seen):
            continue
        seen.add(name)
        errors = measure(name, model_name, number)
        label = f"{name}, {model_name}"
        print(f"{label:34}" + "".join(f"{errors[what]:15.1e}" for what in TARGETS), flush=True)
        rows += [Row(f"{label}: {what} error", errors[what], "relative", target,
                     REFERENCES.get(what, "eager"))
                 for what, target in TARGETS.items()]  # fmt: skip
    return finish(rows, options.json)


if __name__ == "__main__":
    sys.exit(main())
