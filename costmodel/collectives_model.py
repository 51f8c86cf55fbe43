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
from .collectives_query import COLLECTIVES, IMPLS, TIMINGS, Query, generation_of
from .collectives_residual import FEATURES, Features, bounded, features, kernel

#: octaves of the curves' sizes: 64 B to 64 GB; below the time is that of 64 B, beyond it grows with
#: the bytes
_LOW, _HIGH, _PER_OCTAVE = 6, 36, 2
_GRID = np.arange(_LOW * _PER_OCTAVE, _HIGH * _PER_OCTAVE + 1) / _PER_OCTAVE
_OCTAVES: tuple[float, ...] = tuple(map(float, _GRID))


class Span(NamedTuple):
    """A time in us and its 90 % interval."""

    time_us: float
    low_us: float
    high_us: float


Key = tuple[str, str]


@dataclass(frozen=True)
class Weights:
    """What is fitted.

    Attributes:
        parameters: of the prior.
        devices: names of the measured devices; a feature is an index into it.
        points: (implementation, collective) -> measured points and their weights.
        spans: group of an interval -> log of the factors down and up.
        measured: (device, implementation) pairs that were measured.
    """

    parameters: Mapping[str, float]
    devices: tuple[str, ...]
    points: Mapping[Key, tuple[Features, Array]]
    spans: Mapping[str, tuple[float, float]]
    measured: frozenset[Key]


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
        low, high = self._span(query)
        return Span(time_us, time_us * math.exp(low), time_us * math.exp(high))

    def time_us(self, query: Query) -> float:
        """Time of a collective, unchecked."""
        return self.curve(query)(query.bytes)

    def curve(self, query: Query) -> Curve:
        """Times over sizes, unchecked; of the bytes only their odd part matters (see `features`)."""
        key = replace(query, bytes=float(_odd(query)))
        found = self._curves.get(key)
        if found is None:
            odd = round(key.bytes)
            logs = self.raw([replace(key, bytes=float(2**o)) for o in _OCTAVES], odd)
            logs = np.maximum.accumulate(logs)
            if key.ranks >= 4:
                logs = np.maximum(logs, self.curve(replace(key, ranks=key.ranks // 2)).logs)
            found = self._curves[key] = Curve(tuple(map(float, logs)))
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

    def _span(self, query: Query) -> tuple[float, float]:
        return self.weights.spans[span_group(query, self.level(query))]

    def level(self, query: Query) -> str:
        """How well the device is known: one of LEVELS."""
        if self.samples or (query.device, query.impl) in self.weights.measured:
            return "known"
        kin = (generation_of(query.device), query.impl) in self._families
        return "kin" if kin else "new"

    @cached_property
    def _families(self) -> frozenset[tuple[float, str]]:
        """(generation, implementation) of the measured devices."""
        return frozenset((generation_of(d), impl) for d, impl in self.weights.measured)

    def calibrated(self, samples: Iterable[Sample]) -> CollectiveModel:
        """The model for the machine on which the samples were measured."""
        return CollectiveModel(self.weights, tuple(samples))


#: how well a device is known: measured, another of its generation measured, neither
LEVELS = ("known", "kin", "new")


def span_group(query: Query, level: str) -> str:
    """Queries whose errors are alike: how well is the device known, and what is asked?"""
    family = query.impl.partition(":")[0].removesuffix("_ll")
    family = "nvlink" if family.startswith("nvlink") else family
    family = "nccl" if family == "oneccl" else family
    fabric = "switch" if query.shape == "switch" else "other"
    far = "far" if query.hosts > 1 else "near"
    return f"{family} {fabric} {far} {level}"


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
            "spans": {k: list(v) for k, v in weights.spans.items()},
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
    spans = {k: (float(v[0]), float(v[1])) for k, v in told["spans"].items()}
    measured = frozenset((str(a), str(b)) for a, b in told["measured"])
    return Weights(told["parameters"], tuple(told["devices"]), points, spans, measured)


@cache
def collective_model() -> CollectiveModel:
    """The model that the package ships."""
    path = files(__package__) / "weights" / "collectives.safetensors"
    with safe_open(str(path), framework="numpy") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        return CollectiveModel(read(tensors, file.metadata()))
