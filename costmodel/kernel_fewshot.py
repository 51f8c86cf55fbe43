"""A few measurements of a device shift the zero-shot model: a Gaussian process on its residuals.

    r = log2(measured / zero-shot)  at most 64 samples
    k(a, b) = s^2 [ all + op + near(a, b) (family + op) ] + noise^2 (a = b), op where the contexts agree
    near    = exp(-distance of the rising inputs / l), 0 across families
    shift   = trust k(x, samples) K^-1 r

The prior mean is 0, the zero-shot estimate: with no samples near, nothing changes, and with few,
little does. The scale s is the one under which the samples are likeliest among a few, down to one as
small as the noise (Rasmussen and Williams, Gaussian Processes for Machine Learning, 2006, 2.2 and 5.4).

Each sample is also predicted from the others (ibid., 5.4.2). `trust` goes from 0 to 1 as that beats the
zero-shot estimate by more than chance does, so a device whose sibling is known is not made worse; and
the interval is as wide as those errors say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .kernel_context import Context
from .kernel_model import Estimates, Model, rounded
from .kernel_net import Array
from .kernel_query import Batch

#: variances of the parts of the kernel in units of s^2, and the length scale in standard deviations of the
#: rising inputs: the best of a grid over devices left out of training, see docs/costmodel.md
SHARED, OF_OP, NEAR, NEAR_OF_OP = 0.25, 0.5, 0.75, 0.75
LENGTH = 1.5
#: standard deviation in log2 of what no sample tells: noise of the measurements (about 0.07), and
#: the model's own roughness
NOISE = 0.16
#: candidates of s in log2 (3 % to a factor of 2)
_SCALES = (0.04, 0.08, 0.15, 0.25, 0.4, 0.6, 0.9, 1.3)
#: standard errors of the mean gain of the samples at which they are trusted wholly
_SURE = 2.0
#: samples from which on their errors set the width of intervals, and by how much at most
_ENOUGH, _WIDTHS = 16, (0.6, 2.5)
#: errors in log2 beyond this do not count for more: a measurement that went wrong
_OUTLIER = 1.0


@dataclass(frozen=True, eq=False)
class Adapter:
    """The model, shifted by samples of one device.

    Attributes:
        model: the zero-shot model.
        points: per sample, family, names of its context, and place.
        weights: K^-1 r, times the trust.
        inverse: K^-1.
        scale: s.
        widen: errors of samples predicted from the others, over what the process expects.
    """

    model: Model
    families: Sequence[str]
    names: Sequence[tuple[str, ...]]
    places: Sequence[Array]
    weights: Array
    inverse: Array
    scale: float
    widen: float

    def estimates(self, batch: Batch) -> Estimates:
        """Times and intervals of a batch."""
        family = self.model.families[batch.family]
        centre = family.log2_us(batch)
        places = place(self.model, batch)
        names = [name_of(context) for context in batch.contexts]
        cross = self.scale**2 * np.stack(
            [
                _column(batch, names, places, other, name, at)
                for other, name, at in zip(self.families, self.names, self.places, strict=True)
            ],
            1,
        )
        shift = cross @ self.weights
        prior = self.scale**2 * (SHARED + OF_OP + NEAR + NEAR_OF_OP)
        left = np.clip(prior - np.einsum("ij,jk,ik->i", cross, self.inverse, cross), 0.0, prior)
        width = 1.645 * np.sqrt(left + NOISE**2)
        if list(self.families).count(batch.family) >= _ENOUGH:
            low = high = self.widen * width
        else:  # what the samples leave open, never wider than with none of them
            below, above = family.intervals.offsets(batch, family.members[0])
            low = np.minimum(width, np.maximum(below, NOISE))
            high = np.minimum(width, np.maximum(above, NOISE))
        found = centre + shift
        return Estimates(rounded(found), rounded(found - low), rounded(found + high))


def name_of(context: Context) -> tuple[str, ...]:
    """What samples of a context share beyond the device."""
    return context.op, context.dtype, context.kv_dtype, context.impl


def place(model: Model, batch: Batch) -> Array:
    """Rising inputs in standard deviations of training, scaled to a mean of squares: [rows, r]."""
    arrays = model.families[batch.family].members[0].arrays
    z = batch.features().rising * arrays["gain"] - arrays["shift"]
    return np.asarray(z / np.sqrt(z.shape[1]))


def _column(
    batch: Batch,
    names: Sequence[tuple[str, ...]],
    places: Array,
    family: str,
    name: tuple[str, ...],
    at: Array,
) -> Array:
    """The kernel between all rows of a batch and one sample."""
    if batch.family != family:
        return np.full(len(places), SHARED)
    same = np.array([float(other == name) for other in names])[batch.index]
    near = np.exp(-np.sqrt(((places - at) ** 2).sum(1)) / LENGTH)
    return np.asarray(SHARED + OF_OP * same + near * (NEAR + NEAR_OF_OP * same))


def adapt(model: Model, samples: Sequence[tuple[Batch, Array]]) -> Adapter:
    """The model shifted by samples: batches and their measured times in us."""
    families, names, places, residuals = [], [], [], []
    for batch, time_us in samples:
        centre = model.families[batch.family].log2_us(batch)
        residuals.append(np.log2(time_us) - centre)
        places += list(place(model, batch))
        families += [batch.family] * len(time_us)
        names += [name_of(batch.contexts[i]) for i in batch.index]
    unit = np.concatenate(
        [
            np.stack(
                [
                    _column(
                        batch, [name_of(c) for c in batch.contexts], place(model, batch), f, n, p
                    )
                    for f, n, p in zip(families, names, places, strict=True)
                ],
                1,
            )
            for batch, _ in samples
        ]
    )
    r = np.concatenate(residuals)
    best, chosen = -np.inf, _SCALES[0]
    for scale in _SCALES:
        covariance = scale**2 * unit + NOISE**2 * np.eye(len(r))
        sign, logdet = np.linalg.slogdet(covariance)
        likelihood = -0.5 * float(r @ np.linalg.solve(covariance, r)) - 0.5 * logdet
        if likelihood > best:
            best, chosen = likelihood, scale
    inverse = np.linalg.inv(chosen**2 * unit + NOISE**2 * np.eye(len(r)))
    weights = inverse @ r
    alone = weights / np.diag(inverse)
    gain = np.minimum(np.abs(r), _OUTLIER) - np.minimum(np.abs(alone), _OUTLIER)
    error = gain.std() / np.sqrt(len(r)) + 1e-9
    trust = float(np.clip(gain.mean() / (_SURE * error), 0.0, 1.0)) if len(r) > 1 else 0.0
    widen = 1.0
    if len(r) >= _ENOUGH:
        reach = np.quantile(np.abs(alone) * np.sqrt(np.diag(inverse)), 0.9) / 1.645
        widen = float(np.clip(reach, *_WIDTHS))
    return Adapter(
        model, families, names, places, np.asarray(trust * weights), np.asarray(inverse), chosen, widen
    )
