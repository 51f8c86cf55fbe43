"""Fit the collective model: `train_collectives.py --data DIR` writes costmodel/weights/.

1. Rows are thinned to four sizes an octave (medians).
2. The prior's parameters: Levenberg and Marquardt with a Huber loss on log-time, and a ridge towards
   where they start. The formula has no derivatives; columns of the Jacobian are differences.
3. The residual: one linear system per (implementation, collective).
4. Intervals: quantiles of the errors of a refit without each device in turn (`new`), and without a
   fifth of the measured series of known devices (`known`): conformal prediction by groups (Vovk, 2012).

With --report it also prints the errors of those refits.
"""

from __future__ import annotations

import argparse
import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from costmodel_collectives import query_of, read_rows
from safetensors.numpy import save_file

from weft.costmodel.collectives_model import (
    LEVELS,
    CollectiveModel,
    Key,
    Weights,
    dump,
    span_group,
)
from weft.costmodel.collectives_prior import START, Array, Prior, columns, parameters
from weft.costmodel.collectives_query import Query
from weft.costmodel.collectives_residual import Features, features, solve

OUT = Path(__file__).parents[1] / "costmodel" / "weights" / "collectives.safetensors"
#: beyond this error in log-time a row counts linearly
_HUBER = 0.2
#: least number of errors for a quantile of a group's own
_FEW = 40
_X0 = np.array([math.log(start) for start, _ in START.values()])
_SD = np.array([sd for _, sd in START.values()])


@dataclass(frozen=True)
class Data:
    """Thinned measurements."""

    queries: Sequence[Query]
    times_us: Array
    weights: Array

    def take(self, index: Iterable[int]) -> Data:
        """Some of them."""
        index = list(index)
        return Data([self.queries[i] for i in index], self.times_us[index], self.weights[index])


def thin(queries: Sequence[Query], times: Sequence[float]) -> Data:
    """Medians of four sizes an octave; expert-parallel ops keep their sizes, which name a model. Rows
    weigh less in long series, so that no source drowns the others."""
    groups: dict[Query, list[tuple[float, float]]] = defaultdict(list)
    for query, time in zip(queries, times, strict=True):
        octaves = math.log2(query.bytes + 1)
        size = query.bytes if query.impl.startswith("deepep") else float(round(4 * octaves))
        groups[replace(query, bytes=size)].append((query.bytes, time))
    found, middle = [], []
    for query, rows in groups.items():
        size = math.exp(np.mean([math.log(max(b, 1)) for b, _ in rows]))
        found.append(replace(query, bytes=rows[0][0] if query.impl.startswith("deepep") else size))
        middle.append(float(np.median([t for _, t in rows])))
    series = Counter(map(_series, found))
    weights = np.array([5 / math.sqrt(series[_series(q)]) for q in found])
    return Data(found, np.array(middle), weights)


def _series(query: Query) -> tuple[str, str, str, str]:
    return query.device, query.impl, query.collective, query.timing


def fit_prior(data: Data, start: Array, rounds: int) -> Array:
    """Logarithms of the prior's parameters."""
    c, logs, x = columns(data.queries), np.log(data.times_us), start.copy()

    def missed(x: Array) -> Array:
        found: Array = np.log(Prior(parameters(x))(c)) - logs
        return found

    def loss(r: Array, x: Array) -> float:
        size = np.abs(r)
        huber = np.where(size < _HUBER, size**2 / 2, _HUBER * (size - _HUBER / 2))
        return float((data.weights * huber).sum() + (((x - _X0) / _SD) ** 2).sum() / 2)

    r, damping = missed(x), 1e-2
    best = loss(r, x)
    for _ in range(rounds):
        step = 1e-4
        jacobian = np.stack([(missed(x + step * e) - r) / step for e in np.eye(len(x))], axis=1)
        w = data.weights * np.minimum(1, _HUBER / np.maximum(np.abs(r), 1e-9))
        hessian = jacobian.T @ (jacobian * w[:, None]) + np.diag(1 / _SD**2)
        slope = jacobian.T @ (w * r) + (x - _X0) / _SD**2
        before = best
        for _ in range(6):
            move = np.linalg.solve(hessian + damping * np.diag(np.diag(hessian)), slope)
            trial = x - np.clip(move, -0.5, 0.5)
            found = missed(trial)
            if (value := loss(found, trial)) < best:
                x, r, best, damping = trial, found, value, damping / 3
                break
            damping *= 4
        if before - best < 1e-4 * before:
            break
    return x


def fit(data: Data, start: Array, rounds: int) -> tuple[Weights, Array]:
    """Weights without intervals, and the logarithms of the prior's parameters."""
    x = fit_prior(data, start, rounds)
    values = parameters(x)
    c = columns(data.queries)
    missed = np.log(data.times_us) - np.log(Prior(values)(c))
    devices = tuple(sorted({q.device for q in data.queries}))
    known = features(c, [devices.index(q.device) for q in data.queries], odds(data.queries))
    points: dict[Key, tuple[Features, Array]] = {}
    for key in dict.fromkeys((q.impl, q.collective) for q in data.queries):
        index = np.array([i for i, q in enumerate(data.queries) if (q.impl, q.collective) == key])
        block = known.take(index)
        points[key] = block, solve(block, missed[index])
    measured = frozenset((q.device, q.impl) for q in data.queries)
    return Weights(values, devices, points, {}, measured), x


def odds(queries: Sequence[Query]) -> list[int]:
    """Odd parts of the bytes."""
    sizes = [max(int(q.bytes), 1) for q in queries]
    return [size // (size & -size) for size in sizes]


def errors(model: CollectiveModel, data: Data) -> list[float]:
    """log(estimate / measured)."""
    pairs = zip(data.queries, data.times_us, strict=True)
    return [math.log(model.time_us(q) / float(t)) for q, t in pairs]


def refits(
    data: Data, start: Array, folds: Sequence[Sequence[int]], known: bool
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Errors of each fold under a fit without it, by group of interval and by device."""
    groups: dict[str, list[float]] = defaultdict(list)
    named: dict[str, list[float]] = defaultdict(list)
    for fold in folds:
        held = set(fold)
        weights, _ = fit(data.take(i for i in range(len(data.queries)) if i not in held), start, 3)
        judged = data.take(fold)
        model = CollectiveModel(weights)
        found = errors(model, judged)
        for query, error in zip(judged.queries, found, strict=True):
            groups[span_group(query, "known" if known else model.level(query))].append(error)
            where = f"{query.device}, {query.hosts} hosts" if query.hosts > 1 else query.device
            named[f"{where}, {query.impl}"].append(error)
    return groups, named


def spans(found: dict[str, list[float]]) -> dict[str, tuple[float, float]]:
    """Logs of the factors from an estimate down and up to its 90 % interval, of all groups."""
    out = {}
    for family in ("nccl", "custom", "deepep", "nvlink"):
        for fabric in ("switch", "other"):
            for far in ("near", "far"):
                for level in LEVELS:
                    wanted = (family, fabric, far, level)
                    own = _pool(found, wanted)
                    low, high = np.quantile(own, (0.95, 0.05))
                    out[" ".join(wanted)] = (float(-low), float(-high))
    return out


def _pool(found: dict[str, list[float]], wanted: tuple[str, ...]) -> list[float]:
    """The errors of a group, or of the smallest union of groups around it that has enough."""
    orders: tuple[Callable[[Sequence[str]], bool], ...] = (
        lambda g: tuple(g) == wanted,
        lambda g: g[1:] == list(wanted[1:]),
        lambda g: g[2:] == list(wanted[2:]),
        lambda g: g[3] == wanted[3],
        lambda g: True,
    )
    for fits in orders:
        pool = [e for group, errors in found.items() if fits(group.split()) for e in errors]
        if len(pool) >= _FEW:
            return pool
    raise ValueError("too few measurements for intervals")


def tell(title: str, named: dict[str, list[float]]) -> None:
    """Print errors."""
    print(title)
    for name in sorted(named):
        e = np.abs(np.expm1(named[name]))
        print(f"  {name:45s} {len(e):5d} rows, MAPE {100 * e.mean():6.1f} %, "
              f"median {100 * np.median(e):6.1f} %, bias {100 * np.mean(named[name]):+6.1f} %")


def folds_of(keys: Sequence[object], count: int) -> list[list[int]]:
    """Indices in `count` parts that keep equal keys together."""
    part = {key: i % count for i, key in enumerate(dict.fromkeys(keys))}
    return [[i for i, key in enumerate(keys) if part[key] == f] for f in range(count)]


def main() -> None:
    """Fit and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, metavar="DIR")
    parser.add_argument("--report", action="store_true", help="print the errors of the refits")
    options = parser.parse_args()
    table = read_rows(options.data)
    data = thin([query_of(row) for row in table], [float(row["time_us"]) for row in table])
    weights, x = fit(data, _X0, 25)
    devices = [q.device for q in data.queries]
    new, by_device = refits(data, x, folds_of(devices, len(set(devices))), False)
    series = [(_series(q), q.ranks, q.per_host) for q in data.queries]
    known, by_series = refits(data, x, folds_of(series, 5), True)
    if options.report:
        tell("a device left out", by_device)
        tell("series left out", by_series)
    weights = replace(weights, spans=spans({**new, **known}))
    source = next(options.data.glob("collectives.csv*"))
    tensors, about = dump(weights, {
        "data": source.name, "sha256": hashlib.sha256(source.read_bytes()).hexdigest(),
        "rows": str(len(table)), "script": "benchmarks/train_collectives.py",
    })  # fmt: skip
    OUT.parent.mkdir(exist_ok=True)
    part = OUT.with_suffix(".part")
    save_file(tensors, part, metadata=about)
    part.rename(OUT)
    print(f"{OUT.name}: {OUT.stat().st_size / 1e6:.2f} MB, {len(data.queries)} points")


if __name__ == "__main__":
    main()
