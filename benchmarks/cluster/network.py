"""Fit gloo's numbers of a machine to transfers measured on some topologies.

Non-negative parameters by gradient-free coordinate steps in their logarithms: six numbers for each
op, some tens of measurements, a loss of absolute errors of log-time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from weft.costmodel.collectives_gloo import GlooCosts, OpCosts, Place

_START = np.log([100.0, 100.0, 300.0, 0.5, 0.2, 0.9])
#: of the card's rate at most, framing and pacing taken off: 16 MiB at 200 Mbit/s, where nothing else
#: counts, reach 0.957; at 1 Gbit/s it cannot be told from a cost per byte
_MOST = np.log(0.957)


@dataclass(frozen=True)
class Measured:
    """A transfer that was timed."""

    op: str
    bytes_per_rank: float
    place: Place
    seconds: float


def _costs(logs: np.typing.NDArray[np.float64]) -> OpCosts:
    return OpCosts(*map(float, np.round(np.exp(logs), 4)))


def _loss(logs: np.typing.NDArray[np.float64], rows: Sequence[Measured]) -> float:
    costs = _costs(logs)
    missed = [abs(math.log(costs.time_us(r.op, r.bytes_per_rank, r.place) / (r.seconds * 1e6)))
              for r in rows]  # fmt: skip
    drift = float(((logs - _START) ** 2).sum())
    return sum(missed) + 0.02 * drift + 50 * max(0.0, float(logs[-1] - _MOST))


def fit_op(rows: Sequence[Measured]) -> OpCosts:
    """The numbers of one op."""
    logs, best = _START.copy(), _loss(_START, rows)
    step = 1.0
    while step > 0.005:
        improved = False
        for index in range(len(logs)):
            for sign in (1, -1):
                trial = logs.copy()
                trial[index] += sign * step
                if (value := _loss(trial, rows)) < best:
                    logs, best, improved = trial, value, True
        if not improved:
            step /= 2
    return _costs(logs)


def fit(rows: Sequence[Measured]) -> GlooCosts:
    """The numbers of all ops that were measured."""
    names = dict.fromkeys(row.op for row in rows)
    return GlooCosts({name: fit_op([row for row in rows if row.op == name]) for name in names})


def error(costs: GlooCosts, rows: Sequence[Measured]) -> float:
    """Mean absolute error of times in percent."""
    off = [abs(costs.ops[r.op].time_us(r.op, r.bytes_per_rank, r.place) / (r.seconds * 1e6) - 1)
           for r in rows]  # fmt: skip
    return 100 * sum(off) / len(off)
