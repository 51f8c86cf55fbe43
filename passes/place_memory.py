"""Time against memory: plans that fit, by a price of bytes and by computing blocks again.

A price lambda of bytes (a Lagrange multiplier; Everett, 1963) is raised until the plan fits, then
bisected. Blocks are computed again one after the other, first `selective`, then `full`: a chain of
programs that hold less and less; the first that fits is found by bisection. Whether a plan fits is
decided by the peak over the liveness of all values of the placed program, never by a proxy. No plan
within memory is faster than the fastest without a limit, so that is the lower bound.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from .place_recompute import Block, blocks
from .place_task import PlacementResult, Task

#: prices of memory that are tried, as powers of ten, and steps of bisection below the first that fits
_POWERS, _BISECTIONS = range(-2, 3), 2

#: makes the search of the program with some blocks computed again
Make = Callable[[Mapping[int, str]], Task]


def fitted(task: Task, best: PlacementResult, make: Make | None) -> PlacementResult:
    """The fastest plan found that fits; if none does, the one of least memory.

    Args:
        best: the fastest plan of all, which does not fit.
        make: None where nothing may be computed again.
    """
    found = [_priced(task, best)]
    if make is not None:
        found += _again(task, best, make)
    fits = [result for result in found if result.report[0].fits]
    if fits:
        return _bounded(min(fits, key=lambda r: r.objective_us), best)
    return _bounded(min(found, key=lambda r: r.price.peak_bytes), best)


def frontier(task: Task, make: Make) -> tuple[PlacementResult, ...]:
    """Plans of which none is both slower and larger than another, the fastest first.

    Each is exact for its price of bytes and its blocks that are computed again: none, all
    `selective`, or all `full`.
    """
    found: list[PlacementResult] = []
    best: PlacementResult | None = None
    for mode in ("none", "selective", "full"):
        chosen = {block.forward: mode for block in blocks(task.module)} if mode != "none" else {}
        if mode != "none" and not chosen:
            break
        own = make(chosen) if chosen else task
        for us_per_byte in (0.0, *_prices(best)):
            result = own.attempt(us_per_byte)
            if result is not None:
                best = best or result
                found.append(_bounded(result, best))
    found.sort(key=lambda r: (r.objective_us, r.price.peak_bytes))
    kept: list[PlacementResult] = []
    for result in found:
        if not kept or result.price.peak_bytes < kept[-1].price.peak_bytes:
            kept.append(result)
    return tuple(kept)


def _prices(best: PlacementResult | None) -> list[float]:
    if best is None:
        return []
    unit = best.objective_us / max(1.0, best.price.peak_bytes)
    return [unit * 10.0**power for power in (-1, 0)]


def _bounded(result: PlacementResult, free: PlacementResult) -> PlacementResult:
    """With the bound of the search that memory does not limit."""
    bound_us = min(free.lower_bound_us, result.objective_us)
    gap = (result.objective_us - bound_us) / max(result.objective_us, 1e-9)
    report = replace(
        result.report[0], lower_bound_us=bound_us, gap=gap if gap > 1e-6 else 0.0
    )
    return replace(result, lower_bound_us=bound_us, report=(report,))


def _priced(task: Task, best: PlacementResult) -> PlacementResult:
    """The fastest that fits among the exact optima for some prices of bytes."""
    # time over peak is the price at which all memory would cost as much as the step takes
    unit = best.objective_us / max(1.0, best.price.peak_bytes)
    low, frugal = 0.0, best
    for power in _POWERS:
        high = unit * 10.0**power
        result = task.attempt(high)
        if result is None:
            continue
        if result.report[0].fits:
            frugal = result
            break
        # the sum of bytes stands for the peak, which may rise where the sum falls
        frugal = min(frugal, result, key=lambda r: r.price.peak_bytes)
        low = high
    for _ in range(_BISECTIONS if frugal.report[0].fits else 0):
        middle = (low + high) / 2
        result = task.attempt(middle)
        if result is not None and result.report[0].fits:
            high, frugal = middle, min(frugal, result, key=lambda r: r.objective_us)
        else:
            low = middle
    return frugal


def _again(task: Task, best: PlacementResult, make: Make) -> list[PlacementResult]:
    """Plans with blocks computed again."""
    order = blocks(task.module)
    if not order:
        return []
    last = 2 * len(order)
    whole = make(_level(order, last))
    least = whole.attempt(0.0)
    if least is None:
        return []
    if not least.report[0].fits:
        return [least, _priced(whole, best)]
    found = [least]
    low, high = 0, last  # `low` does not fit, `high` does
    while high - low > 1:
        middle = (low + high) // 2
        result = make(_level(order, middle)).attempt(0.0)
        if result is not None and result.report[0].fits:
            high = middle
            found.append(result)
        else:
            low = middle
    return found


def _level(order: tuple[Block, ...], level: int) -> dict[int, str]:
    """The first `level` blocks selectively, then one after the other fully computed again."""
    full = max(0, level - len(order))
    return {
        block.forward: "full" if number < full else "selective"
        for number, block in enumerate(order)
        if number < level
    }


__all__ = ["fitted", "frontier"]
