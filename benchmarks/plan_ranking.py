"""Plans of one model on one machine: is the one that weft ranks first the fastest that was measured?

    python benchmarks/plan_ranking.py --data DIR [--json FILE]

`DIR/e2e_train.csv.gz` has steps of many plans of a model (vTrain and others). A choice is all plans
of one model, batch, sequence and number format on the same devices, at least three of them. Its
regret is by how much the plan ranked first is slower than the best measured one. With the weights
that ship, and held out: each choice is ranked by a fit that has seen none of its rows, the choices
in five folds. `--quick` leaves the fits out.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rows import Row, arguments, finish, show
from steps import Predict, by, fit, shipped
from steps_rows import Step, read_steps

from weft.costmodel.plan_choice import first_plan

#: fewer measured plans are no choice
LEAST = 3
FOLDS = 5
#: regret in %: mean, and always
MEAN, ALWAYS = 3.0, 10.0


def choices_of(steps: Sequence[Step]) -> list[list[Step]]:
    """Steps that differ in their plan only."""
    found: dict[object, list[Step]] = {}
    for step in steps:
        plan = step.plan
        key = (step.source, step.split, step.model, plan.gpus, plan.gpus_per_node,
               plan.global_batch, plan.seq, plan.precision, step.device.name)  # fmt: skip
        found.setdefault(key, []).append(step)
    return [own for own in found.values() if len({step.plan for step in own}) >= LEAST]


def regret(choice: Sequence[Step], predict: Predict) -> float:
    """By how many % the plan ranked first is slower than the best measured."""
    first = first_plan([step.plan for step in choice], [predict(step) for step in choice])
    return (choice[first].time_ms / min(step.time_ms for step in choice) - 1) * 100


def held_out(steps: Sequence[Step], choices: Sequence[Sequence[Step]]) -> list[float]:
    """Regret of each choice under a fit without its rows."""
    order = np.random.default_rng(0).permutation(len(choices))
    regrets = [0.0] * len(choices)
    for fold in range(FOLDS):
        numbers = order[fold::FOLDS].tolist()
        unseen = {id(step) for number in numbers for step in choices[number]}
        predict = by(fit([step for step in steps if id(step) not in unseen]))
        for number in numbers:
            regrets[number] = regret(choices[number], predict)
    return regrets


def _rows(name: str, choices: Sequence[Sequence[Step]], regrets: Sequence[float]) -> list[Row]:
    worst = choices[int(np.argmax(regrets))][0]
    over = sum(value > MEAN for value in regrets)
    return [
        Row(f"{name}, {len(regrets)} choices: mean regret", float(np.mean(regrets)), "%", MEAN),
        Row(f"{name}: largest regret", max(regrets), "%", ALWAYS,
            f"{worst.model.layers} x {worst.model.hidden} on {worst.plan.gpus} {worst.device.name}"),
        Row(f"{name}: choices over {MEAN:g} %", over / len(regrets) * 100, "%"),
    ]  # fmt: skip


def main() -> None:
    """Print the table; exit 1 when a target is missed."""
    parser = arguments(__doc__, "no held-out fits")
    parser.add_argument("--data", type=Path, help="folder with e2e_train.csv.gz and devices.csv")
    options = parser.parse_args()
    if options.data is None:
        print("measured steps are not part of weft: name a folder of them with --data")
        return
    if not (options.data / "e2e_train.csv.gz").exists():
        sys.exit(f"no e2e_train.csv.gz in {options.data}")
    steps, _ = read_steps(options.data)
    choices = choices_of(steps)
    if not choices:
        sys.exit(f"no model of {options.data} was measured under {LEAST} plans on one machine")
    plans = sum(len(own) for own in choices)
    print(f"{plans} measured plans; the shipped weights have seen the public ones")
    rows = _rows("shipped weights", choices, [regret(own, shipped) for own in choices])
    if not options.quick:
        rows += _rows("held out", choices, held_out(steps, choices))
    show(rows)
    sys.exit(finish(rows, options.json))


if __name__ == "__main__":
    main()
