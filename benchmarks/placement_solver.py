"""The placement solver alone, on a folder of pairwise cost tables: time to a proven optimum.

    python benchmarks/placement_solver.py --data DIR [--limit SECONDS] [--json FILE]

Each `*.npz` file of the folder is an instance: `unary_of[i]` names the table `u<k>` of variable i,
rows of `edges` are (i, j, k) with the table `p<k>` of shape states(i) x states(j); inf is
forbidden. Times are of the solver, reading the file excluded. The bound that the gap is measured
against comes from the same run.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rows import Row, finish, show

from weft.passes.place_network import FORBIDDEN, Network
from weft.passes.place_solve import solve

#: issue 4 of 5: each instance, on one core
TARGET_S = 3.0


def read_tables(path: Path) -> Network:
    """The cost network of a file. Raises KeyError where a table is missing."""
    network = Network()
    with np.load(path, allow_pickle=False) as data:
        tables: dict[str, NDArray[np.float64]] = {}

        def table(name: str) -> NDArray[np.float64]:
            if name not in tables:
                given = np.asarray(data[name], dtype=np.float64)
                tables[name] = np.where(np.isfinite(given), given, FORBIDDEN)
            return tables[name]

        for number in data["unary_of"].tolist():
            network.add_variable(table(f"u{number}"))
        for i, j, number in data["edges"].tolist():
            network.add_cost(i, j, table(f"p{number}"))
    return network


def table_rows(folder: Path, limit_s: float) -> list[Row]:
    """Time and gap of each instance. Raises FileNotFoundError where there is none."""
    paths = sorted(folder.glob("*.npz"))
    if not paths:
        raise FileNotFoundError(f"no *.npz in {folder}")
    rows = []
    for path in paths:
        solution = solve(read_tables(path), limit_s)
        if solution is None:
            rows.append(Row(f"{path.stem}: legal assignments", 0.0, "", None, "proven"))
            continue
        what = f"{solution.variables} variables, width {solution.width}"
        rows.append(Row(f"{path.stem}: solve", solution.time_s, "s", TARGET_S, what))
        gap = solution.cost - solution.lower_bound
        bound = f"lower bound {solution.lower_bound:.6f} of the same run"
        tolerance = 1e-6 * max(1.0, abs(solution.cost))
        rows.append(Row(f"{path.stem}: gap of {solution.cost:.0f} us", gap, "us", tolerance, bound))
    return rows


def main() -> int:
    """Measure, print, write; 1 when a target is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="a folder of cost tables")
    parser.add_argument("--limit", type=float, default=30.0, help="seconds for each instance")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows as JSON")
    options = parser.parse_args()
    rows = table_rows(options.data, options.limit)
    show(rows)
    return finish(rows, options.json)


if __name__ == "__main__":
    sys.exit(main())
