"""Times of collectives on GPUs with 90 % intervals: prior, residual, and what keeps them monotone.

A question about many sizes is one curve: log-time over log-bytes on half octaves, of which the
running maximum over sizes and over halved groups is kept. So a time never falls when bytes or ranks
double, whatever was learned.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from importlib.resources import files
from typing import NamedTuple

import numpy as np
from safetensors import safe_open

from .collectives_prior import Array, Prior, columns
from .collectives_query import COLLECTIVES, FABRICS, IMPLS, TIMINGS, Query, generation_of
from .collectives_residual import FEATURES, Features, bounded, features, kernel

#: octaves of the curves' sizes: 64 B to 64 GB; below the time is that of 64 B, beyond it grows with
#: the bytes
_LOW, _HIGH, _PER_OCTAVE = 6, 36, 2
_GRID = np.arange(_LOW * _PER_OCTAVE, _HIGH * _PER_OCTAVE + 1) / _PER_OCTAVE
_OCTAVES: tuple[float, ...] = tuple(map(float, _GRID))
#: timings with the waiting for other ranks, or the processor, in them
_NOISY = ("kineto_kernel", "host_wallclock_sync", "eager")


class Span(NamedTuple):
    """A time in us and its 90 % interval."""

    time_us: float
    low_us: float
    high_us: float


Key = tuple[str, str]
#: device, implementation, shape of the fabric, `near` or `far`
Measured = tuple[str, str, str, str]


@dataclass(frozen=True)
class Weights:
    """What is fitted.

    Attributes:
        parameters: of the prior.
        devices: names of the measured devices; a feature is an index into it.
        points: (implementation, collective) -> measured points and their weights.
        spans: group of an interval -> log of the factor down and up.
        measured: what was measured, see `place`.
    """

    parameters: Mapping[str, float]
    devices: tuple[str, ...]
    points: Mapping[Key, tuple[Features, Array]]
    spans: Mapping[str, float]
    measured: frozenset[Measured]


@dataclass(frozen=True)
class Sample:
    """A measurement on this machine."""

    query: Query
    time_us: float


@dataclass(frozen=True)
class Curve:
    """Times of a collective over its bytes.

    Attributes:
        logs: log of us on the grid.
    """

    logs: tuple[float, ...]

    def __call__(self, size: float) -> float:
        """Time in us."""
        position = math.log2(size) if size > 1.0 else 0.0
        if position <= _OCTAVES[0]:
            return math.exp(self.logs[0])
        if position >= _OCTAVES[-1]:
            return math.exp(self.logs[-1] + (position - _OCTAVES[-1]) * math.log(2))
        place = (position - _OCTAVES[0]) * _PER_OCTAVE
        left = int(place)
        part = place - left
        return math.exp(self.logs[left] * (1 - part) + self.logs[left + 1] * part)


@dataclass(frozen=True)
class CollectiveModel:
    """Times of collectives.

    Args:
        weights: the fitted part.
        samples: measurements on the machine that is asked about; its times are shrunk towards them.
    """

    weights: Weights
    samples: tuple[Sample, ...] = ()
    _curves: dict[Query, Curve] = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def _prior(self) -> Prior:
        return Prior(self.weights.parameters)

    def estimate(self, query: Query) -> Span:
        """Time and interval of a collective. 0 for one rank. Raises CompileError W0501."""
        query.check()
        if query.ranks == 1:
            return Span(0.0, 0.0, 0.0)
        time_us = self.time_us(query)
        factor = math.exp(self.weights.spans[span_group(query, self.level(query))])
        return Span(time_us, time_us / factor, time_us * factor)

    def time_us(self, query: Query) -> float:
        """Time of a collective, unchecked."""
        return self.curve(query)(query.bytes)

    def curve(self, query: Query) -> Curve:
        """Times over sizes, unchecked; of the bytes only their odd part matters (see `features`)."""
        key = replace(query, bytes=float(_odd(query)))
        found = self._curves.get(key)
        if found is None:
            sizes = [key]  # and halved groups
            while sizes[-1].ranks >= 4:
                sizes.append(replace(sizes[-1], ranks=sizes[-1].ranks // 2))
            asked = [replace(q, bytes=float(2**o)) for q in reversed(sizes) for o in _OCTAVES]
            table = self.raw(asked, round(key.bytes)).reshape(len(sizes), -1)
            table = np.maximum.accumulate(np.maximum.accumulate(table, axis=1), axis=0)
            for one, logs in zip(reversed(sizes), table, strict=True):
                self._curves[one] = Curve(tuple(map(float, logs)))
            found = self._curves[key]
        return found

    def raw(self, queries: Sequence[Query], odd: int | None = None) -> Array:
        """Log-times of queries of one implementation and collective, before they are made monotone.

        Args:
            odd: odd part of all queries' bytes; each query's own by default.
        """
        c = columns(queries)
        devices = [self._device(q.device) for q in queries]
        odds = [_odd(q) if odd is None else odd for q in queries]
        logs = np.log(self._prior(c))
        known = self.weights.points.get((queries[0].impl, queries[0].collective))
        if known is not None:
            logs = logs + bounded(kernel(features(c, devices, odds), known[0]) @ known[1])
        if self.samples:
            logs = logs + self._local.correction(queries)
        found: Array = logs
        return found

    def _device(self, name: str) -> int:
        found = self.weights.devices
        return found.index(name) if name in found else -1

    @cached_property
    def _local(self) -> _Local:
        return _Local(CollectiveModel(self.weights), self.samples)

    def level(self, query: Query) -> str:
        """How well a place is known: one of LEVELS."""
        if query.hosts > MOST_HOSTS:
            return "new"
        found = place(query)
        if self.samples or found in self.weights.measured:
            return "known"
        return "kin" if (query.generation, *found[1:]) in self._families else "new"

    @cached_property
    def _families(self) -> frozenset[tuple[float, str, str, str]]:
        """`place`, with the generation in place of the device."""
        measured = self.weights.measured
        return frozenset((generation_of(d), impl, shape, far) for d, impl, shape, far in measured)

    def calibrated(self, samples: Iterable[Sample]) -> CollectiveModel:
        """The model for the machine on which the samples were measured."""
        return CollectiveModel(self.weights, tuple(samples))


#: how well a place is known: measured, on another device of its generation, neither; best first
LEVELS = ("known", "kin", "new")
#: hosts of the measurements; groups of more are new everywhere
MOST_HOSTS = 2


def place(query: Query) -> Measured:
    """Where a collective is asked for, as far as it matters to whether that was measured."""
    far = "far" if query.hosts > 1 else "near"
    return query.device, query.impl, FABRICS[query.fabric].shape, far


def span_group(query: Query, level: str) -> str:
    """Queries whose errors are alike: library, fabric, hosts, whether a processor or other ranks are
    part of what is timed, and how well the place is known."""
    family = query.impl.partition(":")[0].removesuffix("_ll")
    family = "nvlink" if family.startswith("nvlink") else family
    family = "nccl" if family == "oneccl" else family
    fabric = "switch" if query.shape == "switch" else "other"
    far = "far" if query.hosts > 1 else "near"
    timing = "noisy" if query.timing in _NOISY else "device"
    return f"{family} {fabric} {far} {timing} {level}"


def _odd(query: Query) -> int:
    """Odd part of the bytes of expert-parallel ops; 1 for others."""
    size = int(query.bytes)
    if not query.impl.startswith("deepep") or size < 1:
        return 1
    return int(size // (size & -size))


class _Local:
    """Correction from a few samples of a machine: a constant per implementation, and a slow function
    of the size per collective, shrunk towards none (a Gaussian process)."""

    #: squared standard deviations of the parts and of a sample
    _MACHINE, _CONSTANT, _SIZE, _NOISE = 0.05, 0.1, 0.06, 0.006

    def __init__(self, base: CollectiveModel, samples: Sequence[Sample]) -> None:
        self._queries = [s.query for s in samples]
        measured = np.log([s.time_us for s in samples])
        missed = measured - np.log([base.time_us(q) for q in self._queries])
        gram = self._kernel(self._queries, self._queries)
        gram[np.diag_indices(len(samples))] += self._NOISE
        self._weights = np.linalg.solve(gram, missed)

    def correction(self, queries: Sequence[Query]) -> Array:
        """What to add to the log-times of queries."""
        found: Array = self._kernel(queries, self._queries) @ self._weights
        return found

    def _kernel(self, a: Sequence[Query], b: Sequence[Query]) -> Array:
        def columns_of(queries: Sequence[Query]) -> tuple[Array, ...]:
            rows = [(IMPLS.index(q.impl), COLLECTIVES.index(q.collective),
                     math.log2(max(q.bytes, 1)), math.log2(q.local), q.hosts > 1,
                     TIMINGS.index(q.timing)) for q in queries]  # fmt: skip
            return tuple(np.array(rows, dtype=np.float64).reshape(-1, 6).T)

        gap = [x[:, None] - y[None, :] for x, y in zip(columns_of(a), columns_of(b), strict=True)]
        impl, collective, size, local, far, timing = gap
        same = (impl == 0) * np.where(far == 0, 1.0, 0.2) * np.where(timing == 0, 1.0, 0.5)
        near = np.exp(-0.5 * ((size / 2.0) ** 2 + (local / 0.8) ** 2))
        other = np.where(collective == 0, 1.0, 0.5)
        wide = self._MACHINE * np.exp(-0.5 * (size / 8.0) ** 2) * np.where(far == 0, 1.0, 0.2)
        found: Array = wide + same * other * (self._CONSTANT * np.exp(-0.5 * (size / 6.0) ** 2)
                                              + self._SIZE * near)  # fmt: skip
        return found


def dump(weights: Weights, about: Mapping[str, str]) -> tuple[dict[str, Array], dict[str, str]]:
    """Tensors and metadata of a weights file. `about` says where they come from."""
    tensors: dict[str, Array] = {}
    for (impl, collective), (known, alpha) in weights.points.items():
        table = np.concatenate([known.table, alpha[:, None]], axis=1)
        tensors[f"{impl}/{collective}"] = table.astype(np.float32)
    told = {"parameters": dict(weights.parameters), "devices": list(weights.devices),
            "spans": dict(weights.spans),
            "measured": sorted(weights.measured), "features": list(FEATURES)}  # fmt: skip
    return tensors, {**about, "model": json.dumps(told)}


def read(tensors: Mapping[str, Array], metadata: Mapping[str, str]) -> Weights:
    """Weights from what `dump` made."""
    told = json.loads(metadata["model"])
    points = {}
    for name, table in tensors.items():
        impl, _, collective = name.partition("/")
        table = np.asarray(table, dtype=np.float64)
        points[impl, collective] = Features(table[:, :-1]), table[:, -1]
    spans = {k: float(v) for k, v in told["spans"].items()}
    measured = frozenset((str(d), str(i), str(s), str(f)) for d, i, s, f in told["measured"])
    return Weights(told["parameters"], tuple(told["devices"]), points, spans, measured)


@cache
def collective_model() -> CollectiveModel:
    """The model that the package ships."""
    path = files(__package__) / "weights" / "collectives.safetensors"
    with safe_open(str(path), framework="numpy") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        return CollectiveModel(read(tensors, file.metadata()))
