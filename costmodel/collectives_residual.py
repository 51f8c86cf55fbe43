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
    """Covariance of the residuals of two sets of one (implementation, collective)."""

    def gap(name: str) -> Array:
        found: Array = a.of(name)[:, None] - b.of(name)[None, :]
        return found

    def same(name: str, other: float) -> Array:
        return np.where(gap(name) == 0, 1.0, other)

    def bell(name: str, length: float) -> Array:
        found: Array = np.exp(-0.5 * (gap(name) / length) ** 2)
        return found

    exponent = sum((gap(name) / length) ** 2 for name, length in _LENGTHS.items())
    timing = same("timing", _OTHER_TIMING)
    fabric = same("shape", _OTHER_SHAPE) * bell("rate", 2.0)
    core = np.exp(-0.5 * exponent) * timing
    size = 0.6 * bell("bytes", 1.2) + 0.4 * bell("time", 1.2)
    trend = bell("bytes", 6.0) * timing
    device = np.where((gap("device") == 0) & (a.of("device")[:, None] >= 0), 1.0, 0.0)
    kin = bell("generation", 0.7)
    shared = core * size * (_SHARED + _GENERATION * kin)
    shared = shared + trend * (_TREND + _TREND_GENERATION * kin)
    found: Array = fabric * shared + device * (
        _DEVICE * core * bell("bytes", 1.0) + _TREND_DEVICE * trend
    )
    return found


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
