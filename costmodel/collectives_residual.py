"""The learned part of the collective model: what the analytic prior misses, pooled and bounded.

The residual log(measured / prior) is a Gaussian process per (implementation, collective), a sum of
what all devices share, what a generation shares, and what one device has to itself (partial
pooling; Rasmussen and Williams, Gaussian Processes for Machine Learning, 2006, section 5.4.3). For a
device that was never measured the last part is zero. Beyond two hosts the residual is that of two:
the prior extrapolates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .collectives_prior import Array, Columns

#: at most a factor of two, either way
BOUND = math.log(2.0)
#: squared standard deviations of the parts, and of noise (two builds differ by about 10 %)
_SHARED, _GENERATION, _DEVICE, NOISE = 0.02, 0.06, 0.01, 0.01
_TREND, _TREND_GENERATION, _TREND_DEVICE = 0.01, 0.03, 0.01
#: length scale of each feature, in octaves or steps
_LENGTHS = {
    "local": 0.8, "far": 0.5, "odd": 0.5, "multiprocessors": 0.7, "experts": 1.0, "element": 0.4,
}  # fmt: skip
#: correlation across timing modes and shapes of fabric
_OTHER_TIMING, _OTHER_SHAPE = 0.4, 0.1
#: part of what is shared that remains between hosts: a site's network is its own
_OTHER_SITE = 0.1
FEATURES = ("impl", "collective", "timing", "shape", "bytes", "time", "rate", "generation", "device",
            *_LENGTHS)  # fmt: skip


@dataclass(frozen=True)
class Features:
    """Arrays of FEATURES, (count, len(FEATURES)); bytes, times and rates in octaves."""

    table: Array

    def of(self, name: str) -> Array:
        """A column."""
        found: Array = self.table[:, FEATURES.index(name)]
        return found

    def take(self, index: np.typing.NDArray[np.generic]) -> Features:
        """Some of the rows."""
        return Features(self.table[index])


def features(c: Columns, device: Sequence[int], odd: Sequence[int]) -> Features:
    """Features of queries.

    Args:
        device: number of each query's device, -1 where it was never measured.
        odd: odd part of the bytes of expert-parallel ops, which tells models' widths apart.
    """
    expert = (c.impl == 5) | (c.impl == 6)
    size = np.log2(c.bytes)
    return Features(np.stack([
        c.impl, c.collective, c.timing, c.shape, size, size - np.log2(c.gb_per_s),
        np.log2(c.gb_per_s), c.generation, np.array(device, float),
        np.log2(c.local), np.where(c.hosts > 1, 1.0, 0.0),
        np.where(expert, np.minimum(np.log2(np.maximum(np.array(odd, float), 1)), 4.0), 0.0),
        np.where(c.impl == 5, np.log2(np.maximum(c.multiprocessors, 1)), 0.0),
        np.where(c.impl == 6, np.log2(np.maximum(c.experts, 1)), 0.0),
        np.where(c.impl >= 7, np.log2(c.element_bytes), 0.0),
    ], axis=1).astype(np.float64))  # fmt: skip


def kernel(a: Features, b: Features) -> Array:
    """Covariance of the residuals of two sets of one (implementation, collective).

    Queries of one curve differ in their size only, so what does not depend on it is computed once
    for each place.
    """
    where = [i for i, name in enumerate(FEATURES) if name not in ("bytes", "time")]
    places, inverse = np.unique(a.table[:, where], axis=0, return_inverse=True)
    table = np.zeros((len(places), len(FEATURES)))
    table[:, where] = places
    shared, trend, own, own_trend = (
        part[inverse.reshape(-1)] for part in _of_places(Features(table), b)
    )

    def bell(name: str, length: float) -> Array:
        gap = a.of(name)[:, None] - b.of(name)[None, :]
        found: Array = np.exp(-0.5 * (gap / length) ** 2)
        return found

    size = 0.6 * bell("bytes", 1.2) + 0.4 * bell("time", 1.2)
    found: Array = size * shared + bell("bytes", 6.0) * (trend + own_trend)
    if own.any():
        found += bell("bytes", 1.0) * own
    return found


def _of_places(a: Features, b: Features) -> tuple[Array, Array, Array, Array]:
    """Factors of the four parts of the covariance that do not depend on sizes."""

    def gap(name: str) -> Array:
        found: Array = a.of(name)[:, None] - b.of(name)[None, :]
        return found

    def same(name: str, other: float) -> Array:
        return np.where(gap(name) == 0, 1.0, other)

    timing = same("timing", _OTHER_TIMING)
    core = timing * np.exp(-0.5 * sum((gap(n) / length) ** 2 for n, length in _LENGTHS.items()))
    kin = np.exp(-0.5 * (gap("generation") / 0.7) ** 2)
    fabric = same("shape", _OTHER_SHAPE) * np.exp(-0.5 * (gap("rate") / 2.0) ** 2)
    hosts = a.of("far")[:, None] + b.of("far")[None, :] > 0
    fabric = np.where(hosts, _OTHER_SITE * fabric, fabric)
    device = np.where((gap("device") == 0) & (a.of("device")[:, None] >= 0), 1.0, 0.0)
    return (
        fabric * core * (_SHARED + _GENERATION * kin),
        fabric * timing * (_TREND + _TREND_GENERATION * kin),
        device * core * _DEVICE,
        device * timing * _TREND_DEVICE,
    )


def bounded(residual: Array) -> Array:
    """At most BOUND either way, smoothly."""
    found: Array = BOUND * np.tanh(residual / BOUND)
    return found


def solve(known: Features, residual: Array) -> Array:
    """Weights of the points of one (implementation, collective)."""
    gram = kernel(known, known)
    gram[np.diag_indices(len(residual))] += NOISE
    found: Array = np.linalg.solve(gram, residual).astype(np.float64)
    return found
