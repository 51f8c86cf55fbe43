"""Exactness of the placement search: random programs against an exhaustive search.

    python benchmarks/placement_exact.py [--quick] [--json FILE]

Programs of up to 7 ops on meshes of up to (2, 2, 2). The exhaustive search knows nothing of the
network (`tests/passes/place_oracle.py`); it starts from the plan found, and finds a better one if
there is one. Programs for which it needs more than `MOST` nodes are counted and left out.
"""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path

from rows import Row, arguments, finish, show

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.passes.place_oracle import Exhaustive, TooLarge, random_program  # noqa: E402

from weft.costmodel.cluster import parse_cluster  # noqa: E402
from weft.ir.types import Mesh  # noqa: E402
from weft.passes.place import search_mesh  # noqa: E402

MOST = 50_000
MESHES = ((2,), (4,), (2, 2), (2, 2, 2))
CLUSTERS = ("2x4:cpu", "2x4:h100", "1x8:a100")


def rows(count: int) -> list[Row]:
    """Checks `count` programs."""
    rng = random.Random(7)
    checked = left_out = 0
    worst = above = gaps = 0.0
    start = time.perf_counter()
    while checked < count:
        cluster = parse_cluster(rng.choice(CLUSTERS))
        sizes = rng.choice(MESHES)
        mesh = Mesh(tuple((f"axis{i}", size) for i, size in enumerate(sizes)))
        module = random_program(rng, rng.randint(1, 7))
        result = search_mesh(module, mesh, cluster)
        assert result is not None
        try:
            least = Exhaustive(module, mesh, cluster, MOST).least_us(
                result.objective_us * (1 + 1e-9) + 1e-6
            )
        except TooLarge:
            left_out += 1
            continue
        checked += 1
        worst = max(worst, result.objective_us / least - 1)
        above = max(above, result.lower_bound_us / least - 1)
        gaps = max(gaps, result.report[0].gap)
    spent = time.perf_counter() - start
    what = f"{checked} programs in {spent:.0f} s, {left_out} more were too large to enumerate"
    return [
        Row("time above the exhaustive minimum, largest", worst, "", 1e-6, what),
        Row("printed bound above the minimum, largest", max(0.0, above), "", 1e-6, what),
        Row("printed gap, largest", gaps, "", 0.0, what),
    ]


def main() -> int:
    """Measure, print, write; 1 when a target is missed."""
    options = arguments(__doc__, "40 programs").parse_args()
    found = rows(40 if options.quick else 500)
    show(found)
    return finish(found, options.json)


if __name__ == "__main__":
    sys.exit(main())
