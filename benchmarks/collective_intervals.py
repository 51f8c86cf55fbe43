"""Intervals of the collective model: conformal quantiles of what fits miss that had not seen a row.

Few devices make a group, so all intervals are widened by what leaving out each source once more asks
for; `scored` is that.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from itertools import product
from typing import NamedTuple

import numpy as np

from weft.costmodel.collectives_model import LEVELS
from weft.costmodel.collectives_query import Query

#: least number of errors, and of devices or series, for a quantile of a group's own
_FEW, _SOURCES = 40, 2
#: parts of the data that are left out in turn: at most this many devices, and fifths of the series
DEVICES, PARTS = 99, 5


def folds_of(keys: Sequence[object], most: int) -> list[list[int]]:
    """Indices in at most `most` parts that keep equal keys together."""
    order = list(dict.fromkeys(keys))
    count = min(most, len(order))
    part = {key: i % count for i, key in enumerate(order)}
    return [[i for i, key in enumerate(keys) if part[key] == f] for f in range(count)]


class Missed(NamedTuple):
    """An error of a fit that had not seen its row.

    Attributes:
        query: of the row.
        group: of the interval, see `span_group`.
        source: the device, or the series of a known device.
        error: log(estimate / measured).
    """

    query: Query
    group: tuple[str, ...]
    source: str
    error: float


def all_groups() -> list[tuple[str, ...]]:
    """Groups of intervals."""
    words = (("nccl", "custom", "deepep", "nvlink"), ("switch", "other"), ("near", "far"),
             ("device", "noisy"), LEVELS)  # fmt: skip
    return list(product(*words))


def width(found: Sequence[Missed], wanted: tuple[str, ...]) -> float:
    """Half the width of a group's 90 % interval, in logarithms: the quantile of the sizes of its
    errors in which each source counts the same. A group with too few errors or sources joins those
    around it."""
    level, where = wanted[4], wanted[1:3]
    orders: tuple[Callable[[tuple[str, ...]], bool], ...] = (
        lambda g: g == wanted,
        lambda g: g[1:] == wanted[1:],
        lambda g: g[1:3] == where and g[4] == level,
        lambda g: g[1:3] == where and (g[4] == "known") == (level == "known"),
        lambda g: g[2] == wanted[2] and g[4] != "known",
        lambda g: True,
    )
    for fits in orders:
        pool = [m for m in found if fits(m.group)]
        counts = Counter(m.source for m in pool)
        if len(pool) >= _FEW and len(counts) >= _SOURCES:
            return quantile([abs(m.error) for m in pool], [1 / counts[m.source] for m in pool])
    raise ValueError("too few measurements for intervals")


def quantile(values: Sequence[float], weights: Sequence[float]) -> float:
    """The least value that nine tenths of the weight do not exceed."""
    order = np.argsort(values)
    total = np.cumsum(np.array(weights)[order])
    return float(np.array(values)[order][int(np.searchsorted(total, 0.9 * total[-1]))])


def scored(found: Sequence[Missed], parts: int) -> list[tuple[Missed, float]]:
    """Each error with its size over the width that the other parts' sources give."""
    out = []
    for fold in folds_of([m.source for m in found], parts):
        held = set(fold)
        rest = [m for i, m in enumerate(found) if i not in held]
        widths = {g: width(rest, g) for g in dict.fromkeys(found[i].group for i in fold)}
        out += [(found[i], abs(found[i].error) / widths[found[i].group]) for i in fold]
    return out


def fit_spread(scores: Sequence[tuple[Missed, float]]) -> float:
    """How much wider than the quantiles of few other sources an interval has to be. A source and group
    counts as the square root of its rows, between all rows and all sources the same."""
    counts = Counter((m.source, m.group) for m, _ in scores)
    weights = [counts[m.source, m.group] ** -0.5 for m, _ in scores]
    return quantile([score for _, score in scores], weights)


def spans(new: Sequence[Missed], known: Sequence[Missed]) -> dict[str, float]:
    """Logs of the factors from an estimate to the ends of its 90 % interval, of all groups: what is
    known less has none that is narrower."""
    spreads = fit_spread(scored(new, DEVICES)), fit_spread(scored(known, PARTS))
    out, least = {}, 0.0
    for group in all_groups():
        seen = group[-1] == LEVELS[0]
        found = width(known if seen else new, group) * spreads[seen]
        least = found if seen else max(found, least)
        out[" ".join(group)] = least
    return out


def tell(title: str, scores: Sequence[tuple[Missed, float]]) -> None:
    """Print errors, and how many are within intervals that know nothing of their source."""
    spread = fit_spread(scores)
    named: dict[str, list[tuple[float, bool]]] = defaultdict(list)
    for missed, score in scores:
        query, row = missed.query, (missed.error, score <= spread)
        where = f"{query.hosts} hosts" if query.hosts > 1 else query.shape
        library = query.impl.partition(":")[0]
        named[f"{query.device}, {where}, {library}, {query.timing}"].append(row)
        named[f"all, {where}, {library}"].append(row)
        named["all"].append(row)
    print(f"{title}; intervals {spread:.2f} times the quantiles")
    for name in sorted(named):
        off, inside = np.array(named[name]).T
        sizes = 100 * np.abs(np.expm1(off))
        print(f"  {name:58s} {len(off):5d} rows, MAPE {sizes.mean():6.1f} %, "
              f"median {np.median(sizes):6.1f} %, inside {100 * inside.mean():5.1f} %")
