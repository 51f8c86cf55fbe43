"""The cost model on measurements: kernels and collectives of a folder.

    python benchmarks/costmodel.py --data DIR                 the shipped weights
    python benchmarks/costmodel.py --data DIR --retrain       rows held back from networks of this run

DIR holds tables with the columns of the training data (`gemm.csv.gz`, ..., `collectives.csv.gz`). A
column `split` groups the report; rows whose split begins with `fewshot_` are offered to the calibrator
only.
"""

from __future__ import annotations

import sys
from pathlib import Path

import costmodel_collectives
import costmodel_kernels
from rows import arguments, finish, show


def main() -> int:
    """Print the table; exit status 1 where a target is missed."""
    parser = arguments(__doc__, "kernels only")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--retrain", action="store_true", help="judge networks that are trained without the rows"
    )
    parser.add_argument("--steps", type=int, help="of --retrain; without, those of the shipped weights")
    parser.add_argument("--work", type=Path, default=Path("kernels.work"), help="networks of --retrain")
    parser.add_argument("--tables", default="gemm,attention,moe,eltwise,conv,collectives",
                        help="of --retrain")  # fmt: skip
    options = parser.parse_args()
    if options.retrain:
        from collective_held_out import held_out  # minutes
        from costmodel_retrain import retrained  # needs torch for minutes

        names = options.tables.split(",")
        kernels = [n for n in names if n != "collectives"]
        rows = retrained(options.data, kernels, options.steps, options.work)
        rows += held_out(options.data) if "collectives" in names else []
    else:
        rows = costmodel_kernels.rows(options.data)
        if not options.quick:
            rows += costmodel_collectives.rows(options.data)
    show(rows)
    return finish(rows, options.json)


if __name__ == "__main__":
    sys.exit(main())
