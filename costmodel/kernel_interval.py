"""Intervals around kernel times: conformal quantiles of held-out residuals, scaled by hardness.

    r = log2(measured / estimated)                on rows that the network had not seen
    hardness h = exp2(fit of log2 |r| on the place: rising inputs and their squares)
    interval = [estimate * 2^(h q05), estimate * 2^(h q95)]   quantiles of r / h of like queries

Like queries share a case: the very context (device, format, implementation, timing) with sizes in
the range of training; sizes beyond it; a device whose sibling was seen; any other device, whose
residuals come from networks trained without it and its siblings (Vovk et al., Algorithmic Learning
in a Random World, 2005: split and Mondrian conformal prediction).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .datasheet import Datasheet, datasheets
from .kernel_context import Context
from .kernel_features import Features
from .kernel_net import Array, Net
from .kernel_query import Batch
from .kernel_support import distance

CONFIG, LARGE, SIBLING, FAR = "config", "large", "sibling", "far"
#: datasheet distance up to which two devices are siblings (A100 SXM and PCIe 0.6, H100 and H200 0.7,
#: B200 and GB200 0.2; L40S and RTX PRO 6000 1.5)
SIBLING_DISTANCE = 1.0
#: how much more a bound may be than the largest of training before a query counts as larger than seen
_SLACK = 0.05


@dataclass(frozen=True)
class Intervals:
    """Quantiles of one family.

    Attributes:
        hardness: coefficients of `place`.
        cases: case or context key -> (q05, q95) of r / h.
        seen: context key -> (device, largest log2 bound of training in us).
        devices: datasheets of the devices of training by name.
    """

    hardness: Array
    cases: Mapping[str, tuple[float, float]]
    seen: Mapping[str, tuple[str, float]]
    devices: Mapping[str, Datasheet]

    def offsets(self, batch: Batch, net: Net) -> tuple[Array, Array]:
        """Widths below and above the estimate in log2, both non-negative, [rows]."""
        features = batch.features()
        hard = np.exp2(place(features, net) @ self.hardness)
        near = [self.case(context) for context in batch.contexts]
        quantiles = np.array(
            [self.quantiles(case, c) for case, c in zip(near, batch.contexts, strict=True)]
        )
        most = np.array([self.seen.get(key(c), ("", np.inf))[1] for c in batch.contexts])
        low, high = quantiles[batch.index].T
        beyond = np.log2(features.bound_us) > most[batch.index] + _SLACK
        large = np.array([self.cases.get(larger(c), self.cases[LARGE]) for c in batch.contexts])
        large_low, large_high = large[batch.index].T
        low, high = (
            np.where(beyond, np.minimum(low, large_low), low),
            np.where(beyond, np.maximum(high, large_high), high),
        )
        return np.maximum(-low * hard, 0.0), np.maximum(high * hard, 0.0)

    def case(self, context: Context) -> str:
        """Which residuals a context's queries are like."""
        if key(context) in self.seen:
            return CONFIG
        near = min((distance(context.device, d) for d in self.devices.values()), default=np.inf)
        return SIBLING if near < SIBLING_DISTANCE else FAR

    def quantiles(self, case: str, context: Context) -> tuple[float, float]:
        """q05 and q95 of a context."""
        if case == CONFIG:
            return self.cases.get(key(context), self.cases[CONFIG])
        return self.cases[case]

    def to_json(self) -> dict[str, object]:
        """Everything but the coefficients."""
        return {"cases": dict(self.cases), "seen": dict(self.seen), "devices": sorted(self.devices)}

    @staticmethod
    def from_json(data: Mapping[str, object], hardness: Array) -> Intervals:
        """Inverse of `to_json`."""
        known = datasheets()
        cases = {k: (float(a), float(b)) for k, (a, b) in data["cases"].items()}  # type: ignore[attr-defined]
        seen = {k: (str(a), float(b)) for k, (a, b) in data["seen"].items()}  # type: ignore[attr-defined]
        devices = {name: known[name] for name in data["devices"]}  # type: ignore[attr-defined]
        return Intervals(hardness, cases, seen, devices)


def key(context: Context) -> str:
    """A context as text."""
    return "|".join((context.device.name, *context.tokens()[:3], context.kv_dtype, context.impl))


def larger(context: Context) -> str:
    """The case of sizes of a context that are larger than seen."""
    return f"{LARGE}|{key(context)}"


def place(features: Features, net: Net) -> Array:
    """Where a row is in the space of training: [rows, 1 + 2 r]."""
    a = net.arrays
    z = np.clip(features.rising * a["gain"] - a["shift"], -2.5, 2.5)
    return np.concatenate([np.ones((len(z), 1)), z, z * z], 1)


def fit_hardness(
    features: Features, net: Net, residuals: Array, rows: Sequence[int] | NDArray[np.intp]
) -> Array:
    """Ridge regression of log2 |residual| on `place`, shrunk towards its mean."""
    chosen = np.asarray(rows)
    x = place(features, net)[chosen]
    y = np.log2(np.abs(residuals[chosen]) + 0.01)
    x[:, 1:] -= (mean := x[:, 1:].mean(0))
    centre = y.mean()
    gram = x[:, 1:].T @ x[:, 1:] + 0.01 * len(x) * np.eye(x.shape[1] - 1)
    slope = np.linalg.solve(gram, x[:, 1:].T @ (y - centre))
    return np.concatenate([[centre - mean @ slope], slope])


def quantile_pair(scaled: Array, weights: Array | None = None) -> tuple[float, float]:
    """Conformal q05 and q95: each the order statistic of (n + 1) x the level.

    With weights, that at a share of them all: devices count alike, however many rows they have.
    """
    order = np.argsort(scaled, kind="stable")
    share = np.ones(len(scaled)) if weights is None else weights[order] / weights.mean()
    below = np.cumsum(share)
    n = len(scaled)
    low = int(np.searchsorted(below, 0.05 * (n + 1), "right")) - 1
    high = int(np.searchsorted(below, 0.95 * (n + 1), "left"))
    return float(scaled[order[max(low, 0)]]), float(scaled[order[min(high, n - 1)]])
