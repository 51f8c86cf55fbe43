"""weft's plan over the best that an expert's grid has, all through one evaluator.

    python benchmarks/plan_quality.py [--model TEXT] [--cluster TEXT] [--json FILE]

The grid: pipeline stages x tensor-parallel degree x data-parallel degree (the rest), data parallelism
plain, with sharded optimizer states (ZeRO-1) or with sharded parameters (ZeRO-3), each with its best
number of micro-batches, order, interleaving and recompute. An expert plan is a set of constraints:
Megatron's columns and rows over `tp`, the batch over `dp`; what they leave open the same exact search
fills in, so an expert here is better than a hand-written plan. `--quick` takes one model and two
clusters.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator

from plan_models import MODELS
from rows import Row, arguments, finish, show

from weft.costmodel.cluster import Cluster, Group, parse_cluster
from weft.ir.errors import CompileError
from weft.ir.module import Module
from weft.ir.types import Mesh
from weft.passes.constraints import Constraints
from weft.passes.search import Layout, Wishes, layouts_of, part_of, search_plan

CLUSTERS = ("1x4:h100", "2x2:a100", "4x1:v100", "2x4:a100")
#: weft's plan over the best expert plan: on each case, and as the geometric mean
WORST, MEAN = 1.0, 0.92
#: equal plans differ by rounding
_ROUNDING = 1e-6

#: columns of the projections into a block and rows of those out of it (Shoeybi et al., 2019)
_COLUMNS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head")
_ROWS = ("o_proj", "down_proj")
_ZERO = {
    "DDP": "param * : dp = B; state * : dp = B",
    "ZeRO-1": "param * : dp = B",
    "ZeRO-3": "",
}


def experts(module: Module, cluster: Cluster) -> Iterator[tuple[str, Layout, Constraints]]:
    """(name, devices, constraints) of each plan of the grid."""
    names = [str(attrs.get("name", "")) for attrs in module.entry.param_attrs]
    group = cluster.homogeneous()
    for stages in range(1, group.ranks + 1):
        ranks, rest = divmod(group.ranks, stages)
        if rest or (ranks % group.devices and group.devices % ranks):
            continue
        hosts = max(1, ranks // group.devices)
        part = part_of(cluster, Group(group.kind, hosts, min(ranks, group.devices)))
        for tp in range(1, min(ranks, group.devices) + 1):
            if ranks % tp:
                continue
            axes = (("dp", ranks // tp), ("tp", tp))
            mesh = Mesh(tuple((n, s) for n, s in axes if s > 1), group.kind)
            for zero, rules in _ZERO.items():
                if ranks == tp and zero != "DDP":
                    continue
                text = "; ".join(filter(None, [rules, *_megatron(names), "input * : dp = S(0), tp = B"]))
                yield f"pp{stages} dp{ranks // tp} tp{tp} {zero}", Layout(
                    stages, mesh, part, ranks
                ), Constraints.parse(text)


def _megatron(names: list[str]) -> Iterator[str]:
    for kinds, dim in ((_COLUMNS, 0), (_ROWS, 1)):
        for kind in kinds:
            if any(name.endswith(f"{kind}.weight") for name in names):
                yield f"param *{kind}.weight : tp = S({dim})"
    if not any(name.endswith("q_proj.weight") for name in names):  # no Megatron form: data parallel
        yield "forbid tp"


def case(name: str, module: Module, cluster: Cluster) -> Row:
    """The ratio for a model on a cluster."""
    started = time.perf_counter()
    best, label = math.inf, "none fits"
    meshes = []
    for expert, layout, constraints in experts(module, cluster):
        meshes.append(layout)
        wishes = Wishes(constraints=constraints)
        try:
            found = search_plan(module, cluster, wishes=wishes, layouts=[layout], finalists=0)
        except CompileError as error:  # such a plan does not exist or does not fit
            if error.code not in ("W0402", "W0404"):
                raise
            continue
        plan = found.best.pipeline
        if plan.step_us < best:
            best, label = plan.step_us, f"{expert}, {plan.micro} micro-batches, {plan.order}"
    middle = time.perf_counter()
    layouts = [*layouts_of(cluster, cluster.ranks), *meshes]
    own = search_plan(module, cluster, layouts=layouts, finalists=0)
    plan = own.best.pipeline
    print(
        f"{name} on {cluster}: {own.best.layout}, {plan.micro} micro-batches, {plan.order}, "
        f"{plan.step_us / 1e3:.4g} ms; expert {label}, {best / 1e3:.4g} ms; "
        f"grid {middle - started:.0f} s, search {own.seconds:.0f} s", flush=True,
    )  # fmt: skip
    ratio = plan.step_us / best * (1 - _ROUNDING) if best < math.inf else 0.0
    return Row(f"{name} on {cluster}", ratio, "", WORST, label)


def main() -> None:
    """Print the table; exit 1 when a plan of the grid is better than weft's."""
    parser = arguments(__doc__, "one model on two clusters")
    parser.add_argument("--model", default="", help="only models whose name holds this")
    parser.add_argument("--cluster", action="append", help="clusters in place of the default ones")
    options = parser.parse_args()
    names = [name for name in MODELS if options.model in name][: 1 if options.quick else None]
    clusters = (options.cluster or list(CLUSTERS))[: 2 if options.quick else None]
    print("not in the grid: context and expert parallelism, clusters of several device kinds")
    rows = []
    for name in names:
        module = MODELS[name]()
        rows += [case(name, module, parse_cluster(text)) for text in clusters]
    mean = math.exp(sum(math.log(max(row.value, 1e-9)) for row in rows) / len(rows))
    rows.append(Row(f"geometric mean of {len(rows)}", mean, "", MEAN))
    show(rows)
    sys.exit(finish(rows, options.json))


if __name__ == "__main__":
    main()
