"""Fit the collective model: `train_collectives.py --data DIR` writes costmodel/weights/.

1. Rows are thinned to four sizes an octave (medians).
2. The prior's parameters: Levenberg and Marquardt with a Huber loss on log-time, and a ridge towards
   where they start. The formula has no derivatives; columns of the Jacobian are differences.
3. The residual: one linear system per (implementation, collective).
4. Intervals: quantiles of the errors of a refit without each device in turn (`new`), and without a
   fifth of the measured series of known devices (`known`): conformal prediction by groups (Vovk, 2012).
   Few devices make a group, so all are widened by what leaving out each source once more asks for.

With --report it also prints the errors of those refits.
"""

from __future__ import annotations

import argparse
import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from collective_intervals import DEVICES, PARTS, Missed, folds_of, scored, spans, tell
from costmodel_collectives import query_of, read_rows
from safetensors.numpy import save_file

from weft.costmodel.collectives_model import (
    CollectiveModel,
    Key,
    Weights,
    dump,
    place,
    span_group,
)
from weft.costmodel.collectives_prior import START, Array, Columns, Prior, columns, parameters
from weft.costmodel.collectives_query import Query
from weft.costmodel.collectives_residual import Features, features, solve

OUT = Path(__file__).parents[1] / "costmodel" / "weights" / "collectives.safetensors"
#: beyond this error in log-time a row counts linearly
_HUBER = 0.2
#: in a parameter's logarithm, for differences
_STEP = 1e-4
#: rows of a series above which only a part is kept
_LONG = 150
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
    """Medians of two sizes an octave; expert-parallel ops keep their sizes, which name a model, and
    of a long series a part. Rows weigh less in long series, so that no source drowns the others."""
    groups: dict[Query, list[tuple[float, float]]] = defaultdict(list)
    for query, time in zip(queries, times, strict=True):
        octaves = math.log2(query.bytes + 1)
        size = query.bytes if query.impl.startswith("deepep") else float(round(2 * octaves))
        groups[replace(query, bytes=size)].append((query.bytes, time))
    long = Counter(map(_series, groups))
    found, middle, place = [], [], Counter[tuple[str, ...]]()
    for query, rows in sorted(groups.items(), key=lambda item: _order(item[0])):
        series = _series(query)
        place[series] += 1
        if place[series] % max(1, long[series] // _LONG):
            continue
        size = math.exp(np.mean([math.log(max(b, 1)) for b, _ in rows]))
        found.append(replace(query, bytes=rows[0][0] if query.impl.startswith("deepep") else size))
        middle.append(float(np.median([t for _, t in rows])))
    series_rows = Counter(map(_series, found))
    weights = np.array([5 / math.sqrt(series_rows[_series(q)]) for q in found])
    return Data(found, np.array(middle), weights)


def _order(query: Query) -> tuple[object, ...]:
    return (*_series(query), query.ranks, query.per_host, query.fabric, query.joined,
            query.multiprocessors, query.experts, query.element_bytes, query.bytes)  # fmt: skip


def _series(query: Query) -> tuple[str, str, str, str]:
    return query.device, query.impl, query.collective, query.timing


def untrained() -> Array:
    """Logarithms of the prior's parameters before any data."""
    return _X0.copy()


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

    forms = [np.array([i for i, q in enumerate(data.queries) if _form(q) == form])
             for form in dict.fromkeys(map(_form, data.queries))]  # fmt: skip
    parts = [c.take(rows) for rows in forms]
    uses = [_used(part, x) for part in parts]
    r, damping = missed(x), 1e-2
    best = loss(r, x)
    for _ in range(rounds):
        jacobian = np.zeros((len(r), len(x)))
        for form, (rows, used) in enumerate(zip(forms, uses, strict=True)):
            of = parts[form]
            for i in used:
                shifted = x.copy()
                shifted[i] += _STEP
                logs_of = np.log(Prior(parameters(shifted))(of)) - logs[rows]
                jacobian[rows, i] = (logs_of - r[rows]) / _STEP
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


def _form(query: Query) -> str:
    """Rows with one form of the prior use the same parameters."""
    family = query.impl.partition(":")[0]
    return "nvlink" if family.startswith("nvlink") else family


def _used(part: Columns, x: Array) -> list[int]:
    """Parameters that some of these rows depend on."""
    some = part.take(np.arange(0, len(part.bytes), 1 + len(part.bytes) // 400))
    times = Prior(parameters(x))(some)
    return [i for i, e in enumerate(np.eye(len(x)))
            if np.abs(Prior(parameters(x + _STEP * e))(some) / times - 1).max() > 1e-9]  # fmt: skip


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
    measured = frozenset(map(place, data.queries))
    return Weights(values, devices, points, {}, measured), x


def odds(queries: Sequence[Query]) -> list[int]:
    """Odd parts of the bytes."""
    sizes = [max(int(q.bytes), 1) for q in queries]
    return [size // (size & -size) for size in sizes]


def errors(model: CollectiveModel, data: Data) -> list[float]:
    """log(estimate / measured)."""
    pairs = zip(data.queries, data.times_us, strict=True)
    return [math.log(model.time_us(q) / float(t)) for q, t in pairs]


def refits(data: Data, start: Array, keys: Sequence[str], parts: int, known: bool) -> list[Missed]:
    """Errors of the rows, each under a fit without all that shares a part with it.

    Args:
        keys: of the rows; those with equal keys are in one part.
        known: the devices are known all the same.
    """
    out = []
    for fold in folds_of(keys, parts):
        held = set(fold)
        weights, _ = fit(data.take(i for i in range(len(data.queries)) if i not in held), start, 3)
        judged, model = data.take(fold), CollectiveModel(weights)
        for index, query, error in zip(fold, judged.queries, errors(model, judged), strict=True):
            level = "known" if known else model.level(query)
            out.append(Missed(query, tuple(span_group(query, level).split()), keys[index], error))
    return out


def main() -> None:
    """Fit and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, metavar="DIR")
    parser.add_argument("--report", action="store_true", help="print the errors of the refits")
    options = parser.parse_args()
    table = read_rows(options.data)
    data = thin([query_of(row) for row in table], [float(row["time_us"]) for row in table])
    weights, x = fit(data, _X0, 15)
    devices = [q.device for q in data.queries]
    series = [" ".join((*_series(q), str(q.ranks), str(q.per_host))) for q in data.queries]
    new = refits(data, x, devices, DEVICES, False)
    known = refits(data, x, series, PARTS, True)
    if options.report:
        tell("a device left out", scored(new, DEVICES))
        tell("series left out", scored(known, PARTS))
    weights = replace(weights, spans=spans(new, known))
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
