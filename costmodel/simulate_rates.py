"""Who gets how much of the links: max-min fair rates of the transfers that run at the same time.

Each transfer has a rate between 0 and its cap (1 is the speed that it has alone) and takes
`rate * use` of each of its resources, whose capacity is 1. Max-min fair: no transfer could be
faster without slowing one that takes no more bandwidth than it (Bertsekas and Gallager, Data
Networks, 1992, section 6.5.2; TCP flows and switches with fair queues come close to it).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

Resource = TypeVar("Resource")


def fair_rates(
    uses: Sequence[Sequence[tuple[Resource, float]]],
    weights: Sequence[float],
    caps: Sequence[float],
) -> list[float]:
    """The max-min fair rates, by progressive filling.

    Args:
        uses: for each transfer, the share of each resource that it takes at rate 1.
        weights: for each transfer, the bandwidth that it takes at rate 1: all rise together.
        caps: for each transfer, its largest rate.

    Linear in transfers times resources for each round; a round freezes at least one transfer.
    """
    count = len(uses)
    rates = list(caps)
    open_ = [i for i in range(count) if weights[i] > 0]
    left: dict[Resource, float] = {}
    for transfer in uses:
        left.update((resource, 1.0) for resource, _ in transfer)
    while open_:
        slope: dict[Resource, float] = {}
        for i in open_:
            for resource, use in uses[i]:
                slope[resource] = slope.get(resource, 0.0) + use / weights[i]
        level = min((left[r] / s for r, s in slope.items() if s > 0), default=float("inf"))
        capped = min(caps[i] * weights[i] for i in open_)
        if capped <= level:
            done = [i for i in open_ if caps[i] * weights[i] <= capped]
            rate_of: Mapping[int, float] = {i: caps[i] for i in done}
        else:
            full = {r for r, s in slope.items() if s > 0 and left[r] / s <= level * (1 + 1e-12)}
            done = [i for i in open_ if any(r in full and u > 0 for r, u in uses[i])]
            rate_of = {i: level / weights[i] for i in done}
        for i in done:
            rates[i] = rate_of[i]
            for resource, use in uses[i]:
                left[resource] = max(0.0, left[resource] - use * rates[i])
        closed = set(done)
        open_ = [i for i in open_ if i not in closed]
    return rates
