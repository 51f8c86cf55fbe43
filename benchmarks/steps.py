"""Whole training steps: weft's prediction beside published measurements.

    python benchmarks/steps.py --data DIR [--held-out] [--json FILE]

For each row of `DIR/e2e_train.csv.gz` the model is built from the row's fields, its plan is fixed
by them, and the step is predicted with the weights that ship with weft. A column `split` groups the
report. `--held-out` predicts each table's plans with parameters fitted without them: five folds of
the rows of a table, so that each row is predicted by a fit that has not seen it, and besides
whole groups (the largest model, the most devices) left out.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from fit_steps import Fitted, fit
from rows import Row, arguments, finish, show
from steps_rows import Step, read_steps

from weft.costmodel.training_step import composed, training_step

#: table -> (target of the mean error in %, target of 1 - Spearman, published reference)
TARGETS: Mapping[str, tuple[float, float | None, str]] = {
    "vtrain single-node": (10.0, 0.03, "vTrain's simulator 8.37 %, a line fit 31 %"),
    "vtrain multi-node": (9.0, None, "vTrain's simulator 14.73 %, a line fit 16 %"),
    "llm-foundry": (12.0, None, ""),
    "megatron-bridge": (12.0, None, ""),
}
Predict = Callable[[Step], float]


def error_rows(steps: Sequence[Step], predict: Predict, note: str) -> list[Row]:
    """Mean and median error, rank correlation and the worst row of each table."""
    rows: list[Row] = []
    for group in dict.fromkeys(step.group for step in steps):
        own = [step for step in steps if step.group == group]
        predicted = np.array([predict(step) for step in own])
        measured = np.array([step.time_ms for step in own])
        errors = np.abs(predicted / measured - 1) * 100
        target, order, reference = TARGETS.get(group, (None, None, ""))
        worst = own[int(errors.argmax())]
        name = f"{group}{note}"
        rows.append(Row(f"{name}: mean error, {len(own)} steps", float(errors.mean()), "%", target,
                        reference))  # fmt: skip
        rows.append(Row(f"{name}: median error", float(np.median(errors)), "%"))
        rows.append(Row(f"{name}: largest error", float(errors.max()), "%", None, worst.label))
        if len(own) > 2:
            disorder = 1 - _spearman(predicted, measured)
            rows.append(Row(f"{name}: 1 - Spearman", disorder, "", order, ""))
    return rows


def _spearman(a: np.ndarray, b: np.ndarray) -> float:
    ranks = [np.argsort(np.argsort(values)) for values in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


def shipped(step: Step) -> float:
    """Prediction with the weights of the package, in ms."""
    own = training_step(step.model, step.plan, step.device, step.fabric, step.software)
    return own.time_ms


def by(fitted: Fitted) -> Predict:
    """Predictions under fitted parameters."""

    def predict(step: Step) -> float:
        merged = {**fitted["shared"][""], **fitted["software"][step.software]}
        return composed(step.model, step.plan, step.device, step.fabric, merged).time_ms

    return predict


def held_out(steps: Sequence[Step], folds: int) -> list[Row]:
    """Errors on rows that the fit has not seen."""
    order = np.random.default_rng(0).permutation(len(steps))
    predictions: dict[int, float] = {}
    for fold in range(folds):
        test = set(order[fold::folds].tolist())
        predict = by(fit([step for i, step in enumerate(steps) if i not in test]))
        predictions |= {id(steps[i]): predict(steps[i]) for i in test}
    rows = error_rows(steps, lambda step: predictions[id(step)], f", {folds} folds")
    for name, apart in _APART.items():
        test_steps = [step for step in steps if apart(step)]
        if test_steps and len(test_steps) < len(steps):
            predict = by(fit([step for step in steps if not apart(step)]))
            rows += [row for row in error_rows(test_steps, predict, f", {name} held out")
                     if "mean" in row.name]  # fmt: skip
    return rows


#: groups that are left out as a whole
_APART: Mapping[str, Callable[[Step], bool]] = {
    "multi-node": lambda step: step.group == "vtrain multi-node",
    "8 devices": lambda step: step.group == "vtrain single-node" and step.plan.gpus == 8,
    "over 8192 tokens": lambda step: step.source == "llm-foundry" and step.plan.seq > 8192,
    "over 8 devices": lambda step: step.source == "llm-foundry" and step.plan.gpus > 8,
    "Llama 70B": lambda step: step.source == "megatron-bridge" and "LLAMA3_70B" in step.label,
    "Qwen3 235B": lambda step: step.source == "megatron-bridge" and "235B" in step.label,
}


def main() -> None:
    """Print the tables; exit 1 when a target is missed."""
    parser = arguments(__doc__, "no held-out fits")
    parser.add_argument("--data", type=Path, help="folder with e2e_train.csv.gz and devices.csv")
    parser.add_argument("--held-out", action="store_true", help="fit without the rows predicted")
    options = parser.parse_args()
    if options.data is None:
        print("measured steps are not part of weft: name a folder of them with --data")
        return
    if not (options.data / "e2e_train.csv.gz").exists():
        sys.exit(f"no e2e_train.csv.gz in {options.data}")
    steps, left = read_steps(options.data)
    print(f"{len(steps)} steps; the shipped weights have seen the public rows")
    for reason, count in sorted(left.items()):
        print(f"left out: {count} rows, {reason}")
    rows = error_rows(steps, shipped, "")
    if options.held_out and not options.quick:
        rows += held_out(steps, 5)
    show(rows)
    sys.exit(finish(rows, options.json))


if __name__ == "__main__":
    main()
