"""Fits the parameters of whole training steps to published ones.

    python benchmarks/fit_steps.py --data DIR [--out FILE]

Least squares of log(predicted / measured), robust (soft L1), with a Gaussian prior on the logarithm
of each parameter so that what the steps do not determine stays physical. Writes
`costmodel/weights/training_step.json`; the measured rows do not enter the project, their hash does.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from steps_rows import Step, read_steps

from weft.costmodel.training_step import composed, layer_key

TARGET = Path(__file__).parent.parent / "costmodel" / "weights" / "training_step.json"
#: prior of a parameter: (value, standard deviation of its logarithm)
Prior = tuple[float, float]

#: rates that belong to a device generation and a format: large products in the public measurements
SHARED: dict[str, Prior] = {
    "matmul_8_bf16": (0.78, 0.07), "matmul_8_f16": (0.78, 0.07), "matmul_8_f8": (0.7, 0.1),
    "matmul_8_f4": (0.6, 0.1),
    "matmul_9_bf16": (0.7, 0.07), "matmul_9_f16": (0.7, 0.07), "matmul_9_f8": (0.62, 0.07),
    "matmul_9_f4": (0.6, 0.1),
    "matmul_10_bf16": (0.65, 0.07), "matmul_10_f16": (0.65, 0.07), "matmul_10_f8": (0.6, 0.07),
    "matmul_10_f4": (0.5, 0.1),
}  # fmt: skip
#: what a training framework and its kernels make of the devices
SOFTWARE: dict[str, Prior] = {
    "attention_8": (0.45, 0.3), "attention_9": (0.38, 0.3), "attention_10": (0.35, 0.3),
    "passes": (14.0, 0.4), "passes_experts": (3.0, 0.7), "grouped": (0.6, 0.3),
    "expert_passes": (14.0, 0.5), "exchange_exposed": (0.4, 0.3),
    "host_ms": (1.0, 0.6), "host_experts_ms": (1.0, 0.5), "host_backward": (1.0, 0.3),
    "host_per_rank": (0.003, 1.0), "host_unfused_ms": (0.3, 0.7),
    "reduce_ms": (0.05, 0.5), "reduce_exposed": (1.0, 0.5),
    "intra_efficiency": (0.6, 0.1), "inter_efficiency": (0.5, 0.3),
    "gradients_exposed": (1.0, 0.5), "transfer_exposed": (0.7, 0.7),
    "optimizer_bytes": (26.0, 0.4), "loss_bytes": (16.0, 0.4), "step": (3.0, 1.0),
}  # fmt: skip
#: what is known of a framework before any row is seen
KNOWN: dict[str, dict[str, Prior]] = {
    # unfused GPT layers of 2021: scores in memory, the optimizer on each rank
    "megatron": {"score_passes": (6.0, 0.7), "host_ms": (1.7, 0.5), "passes": (8.0, 0.7)},
    # layer norms and casts of eager PyTorch under autocast
    "llm-foundry": {"passes": (25.0, 0.5)},
    "megatron-bridge": {"passes": (14.0, 0.2), "host_ms": (0.3, 0.5), "gradients_exposed": (0.3, 0.7),
                        "reduce_exposed": (0.5, 0.6)},
}  # fmt: skip
#: switches that no fit changes
FIXED: dict[str, dict[str, float]] = {
    "megatron": {"sharded_optimizer": 0.0},
    "llm-foundry": {"sharded_optimizer": 1.0, "score_passes": 0.0},
    "megatron-bridge": {"sharded_optimizer": 1.0, "score_passes": 0.0},
}
#: spread of measured steps that physics cannot explain, and where the loss turns from square to L1
NOISE, TURN = 0.06, 2.0
#: weight of a row, so that tables of 50 rows count beside one of 700
WEIGHTS = {"vtrain single-node": 1.0, "vtrain multi-node": 3.0}
OTHER_WEIGHT = 2.0
#: steps that share a layer before it counts as measured; how many steps at the model's own value
#: pull it back; rounds, as a layer is not all of a step
_LEAST_LAYERS, _LAYER_SHRINK, _LAYER_ROUNDS = 3, 0.5, 2
#: step of a derivative, in the logarithm of a parameter
_DIFFERENCE = 1e-4

Fitted = dict[str, dict[str, dict[str, float]]]


def fit(steps: Sequence[Step], rounds: int = 14) -> Fitted:
    """Parameters of all frameworks by damped Gauss-Newton over their logarithms."""
    names, mean, spread = _priors()
    every = range(len(steps))
    weights = np.array([WEIGHTS.get(step.group, OTHER_WEIGHT) for step in steps]) / NOISE

    def residuals(at: NDArray[np.float64], rows: Sequence[int]) -> NDArray[np.float64]:
        fitted = _unpacked(names, at)
        logs = [np.log(_predicted(steps[row], fitted) / steps[row].time_ms) for row in rows]
        return np.asarray(logs) * weights[list(rows)]

    def slopes_of(at: NDArray[np.float64], errors: NDArray[np.float64]) -> NDArray[np.float64]:
        """Derivatives by forward differences; a framework's parameter moves its own rows only."""
        slopes = np.zeros((len(errors), len(at)))
        for column, (software, _) in enumerate(names):
            rows = [i for i in every if software in ("", steps[i].software)]
            moved = at.copy()
            moved[column] += _DIFFERENCE
            if rows:
                slopes[rows, column] = (residuals(moved, rows) - errors[rows]) / _DIFFERENCE
        return slopes

    def loss(errors: NDArray[np.float64], at: NDArray[np.float64]) -> float:
        soft = 2 * TURN**2 * (np.sqrt(1 + (errors / TURN) ** 2) - 1)
        return float(soft.sum() + (((at - mean) / spread) ** 2).sum())

    at, damping = mean.copy(), 1e-2
    errors = residuals(at, every)
    for _ in range(rounds):
        slopes = slopes_of(at, errors)
        robust = 1 / np.sqrt(1 + (errors / TURN) ** 2)
        normal = slopes.T @ (robust[:, None] * slopes) + np.diag(1 / spread**2)
        gradient = slopes.T @ (robust * errors) + (at - mean) / spread**2
        while damping < 1e6:
            moved = at - np.linalg.solve(normal + damping * np.diag(np.diag(normal)), gradient)
            there = residuals(moved, every)
            if loss(there, moved) < loss(errors, at):
                at, errors, damping = moved, there, damping / 4
                break
            damping *= 4
    fitted = _unpacked(names, at)
    for _ in range(_LAYER_ROUNDS):
        _correct_layers(steps, fitted)
    return fitted


def _correct_layers(steps: Sequence[Step], fitted: Fitted) -> None:
    """Multiply the factors of measured layers by the mean ratio of their steps, shrunk towards 1."""
    ratios: dict[tuple[str, str], list[float]] = {}
    for step in steps:
        key = step.software, layer_key(step.model, step.plan, step.device)
        ratios.setdefault(key, []).append(math.log(step.time_ms / _predicted(step, fitted)))
    for (software, name), logs in ratios.items():
        if len(logs) >= _LEAST_LAYERS:
            factors = fitted["software"][software]
            mean = sum(logs) / (len(logs) + _LAYER_SHRINK)
            factors[name] = factors.get(name, 1.0) * math.exp(mean)


def _priors() -> tuple[list[tuple[str, str]], NDArray[np.float64], NDArray[np.float64]]:
    """((framework or "", parameter), mean and spread of the logarithm)."""
    table = {("", name): prior for name, prior in SHARED.items()}
    for software, known in KNOWN.items():
        table |= {(software, name): prior for name, prior in {**SOFTWARE, **known}.items()}
    values = np.array(list(table.values()))
    return list(table), np.log(values[:, 0]), values[:, 1]


def _unpacked(names: Sequence[tuple[str, str]], at: NDArray[np.float64]) -> Fitted:
    out: Fitted = {"shared": {"": {}}, "software": {name: dict(FIXED[name]) for name in KNOWN}}
    for (software, name), value in zip(names, np.exp(at), strict=True):
        group = out["software"][software] if software else out["shared"][""]
        group[name] = float(value)
    return out


def _predicted(step: Step, fitted: Fitted) -> float:
    merged = {**fitted["shared"][""], **fitted["software"][step.software]}
    return composed(step.model, step.plan, step.device, step.fabric, merged).time_ms


def main() -> None:
    """Fit to all rows and write the parameters."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=TARGET)
    options = parser.parse_args()
    steps, _ = read_steps(options.data)
    fitted = fit(steps)
    written = {
        "source": "fitted by benchmarks/fit_steps.py",
        "rows": len(steps),
        "data_sha256": hashlib.sha256((options.data / "e2e_train.csv.gz").read_bytes()).hexdigest(),
        "shared": _rounded(fitted["shared"][""]),
        "software": {name: _rounded(values) for name, values in fitted["software"].items()},
    }
    text = json.dumps(written, indent=2, sort_keys=True) + "\n"
    temporary = options.out.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, options.out)


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: float(f"{value:.4g}") for name, value in values.items()}


if __name__ == "__main__":
    main()
