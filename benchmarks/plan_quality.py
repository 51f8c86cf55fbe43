"""weft's plan over the best that an expert's grid has, all through one evaluator.

    python benchmarks/plan_quality.py [--model TEXT] [--cluster TEXT] [--wide] [--json FILE]

The grid: pipeline stages x tensor-parallel, context-parallel or expert-parallel degree x data-parallel
degree (the rest), the inner axis in a host or over hosts (rank order), data parallelism plain, with
sharded optimizer states (ZeRO-1) or with sharded parameters (ZeRO-3), each with its best number of
micro-batches, order, interleaving and recompute. An expert plan is a set of constraints: Megatron's
columns and rows over `tp`, the batch over `dp`, the sequence over `cp`, experts over `ep`; what they
leave open the same exact search fills in, so an expert here is better than a hand-written plan. On
clusters of several kinds an expert has the fast devices alone, or all at the pace of the slow ones.
`--quick` takes one model and two clusters, `--wide` all models and clusters.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from dataclasses import replace

from plan_models import MODELS, WIDE
from rows import Row, arguments, finish, show

from weft.costmodel.cluster import Cluster, Group, parse_cluster
from weft.ir.errors import CompileError
from weft.ir.module import Module
from weft.ir.types import Mesh
from weft.passes.constraints import Constraints
from weft.passes.search import Layout, Wishes, layouts_of, part_of, search_plan
from weft.passes.search_coarse import Coarse
from weft.passes.search_layout import LayoutSearch, micros_of
from weft.passes.search_program import Programs
from weft.passes.search_state import State

CLUSTERS = ("1x4:h100", "2x2:a100", "4x1:v100", "2x4:a100")
WIDE_CLUSTERS = (
    *CLUSTERS, "1x8:h100", "2x8:h100", "4x4:a100", "8x1:a100", "1x2:h100+1x2:v100",
    "1x4:a100+1x4:v100",
)  # fmt: skip
#: weft's plan over the best expert plan: on each case, and as the geometric mean
WORST, MEAN = 1.0, 0.92
#: equal plans differ by rounding
_ROUNDING = 1e-6

#: columns of the projections into a block and rows of those out of it (Shoeybi et al., 2019)
_COLUMNS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head", "q", "k", "v", "wi")
_ROWS = ("o_proj", "down_proj", "o", "wo")
_ZERO = {
    "DDP": "param * : dp = B; state * : dp = B",
    "ZeRO-1": "param * : dp = B",
    "ZeRO-3": "",
}


def experts(module: Module, cluster: Cluster) -> Iterator[tuple[str, Layout, Constraints]]:
    """(name, devices, constraints) of each plan of the grid on devices of one kind."""
    group = cluster.homogeneous()
    kinds = dict(_inner(module))
    for stages in range(1, group.ranks + 1):
        ranks, rest = divmod(group.ranks, stages)
        if rest or (ranks % group.devices and group.devices % ranks):
            continue
        hosts = max(1, ranks // group.devices)
        part = part_of(cluster, Group(group.kind, hosts, min(ranks, group.devices)))
        for size in (n for n in range(1, ranks + 1) if ranks % n == 0):
            for kind, rules in kinds.items() if size > 1 else [("tp", "")]:
                outer, inner = ("dp", ranks // size), (kind, size)
                orders = [(outer, inner)] + ([(inner, outer)] if hosts > 1 and size < ranks else [])
                for axes in orders:
                    mesh = Mesh(tuple((n, s) for n, s in axes if s > 1), group.kind)
                    where = "" if axes[0] is outer else " over hosts"
                    for zero, stored in _ZERO.items():
                        if ranks == size and zero != "DDP":
                            continue
                        text = "; ".join(filter(None, [stored, rules, "input * : dp = S(0)"]))
                        yield f"pp{stages} dp{ranks // size} {kind}{size}{where} {zero}", Layout(
                            stages, mesh, part, ranks
                        ), Constraints.parse(text)


def _inner(module: Module) -> Iterator[tuple[str, str]]:
    """What an expert does with the inner axis: (name, constraints)."""
    rows = list(zip(module.entry.params, module.entry.param_attrs, strict=True))
    names = {str(attrs.get("name", "")): value.type for value, attrs in rows}
    weights = [name for name in names if name.endswith(".weight")]

    def ends(kind: str) -> bool:
        return any(name.endswith(f".{kind}.weight") for name in weights)

    if ends("q_proj") or ends("q"):  # without, there is no Megatron form
        rules = [
            f"param *.{kind}.weight : tp = S({dim})"
            for kinds, dim in ((_COLUMNS, 0), (_ROWS, 1)) for kind in kinds if ends(kind)
        ]  # fmt: skip
        yield "tp", "; ".join([*rules, "input * : tp = B"])
    inputs = [value.type.shape for value, attrs in rows if attrs.get("role") == "input"]
    if any(len(shape) > 1 and shape[1] >= _LONG for shape in inputs):
        yield "cp", "input * : cp = S(1)"
    grouped = [name for name, type in names.items() if "experts" in name and len(type.shape) == 3]
    if grouped:
        yield "ep", "param *experts* : ep = S(0); input * : ep = B"


#: sequences from this length on are split by experts
_LONG = 4096


def best_expert(module: Module, programs: Programs, cluster: Cluster) -> tuple[float, str, list[Layout]]:
    """(step, plan, layouts) of the best plan of the grid. Those that cannot win are not placed."""
    plain = State(programs, cluster, Wishes(), math.inf, 0.0)
    coarse = Coarse(plain)
    grid = list(experts(module, cluster))
    guess = {layout: coarse.estimate(layout).step_us for _, layout, _ in grid}
    best, label = math.inf, "none fits"
    for expert, layout, constraints in sorted(grid, key=lambda row: guess[row[1]]):
        state = State(programs, cluster, Wishes(constraints=constraints), math.inf, 0.0)
        if programs.bound_us(layout, micros_of(state, layout)) >= best:
            continue
        try:
            LayoutSearch(state, layout).run()
        except CompileError as error:  # there is no such plan
            if error.code not in ("W0402", "W0404"):
                raise
        if state.best_us < best:
            plan = state.best.pipeline
            best, label = plan.step_us, f"{expert}, {plan.micro} micro-batches, {plan.order}"
    return best, label, [layout for _, layout, _ in grid]


def uniform(cluster: Cluster) -> list[Cluster]:
    """What an expert makes of devices of several kinds: each kind alone, or all as the slowest."""
    if len(cluster.groups) == 1:
        return [cluster]
    alone = [part_of(cluster, group) for group in cluster.groups]
    devices = {group.devices for group in cluster.groups}
    if len(devices) > 1:
        return alone
    slow = min(alone, key=lambda c: c.device.peak_flops_per_s("bf16"))
    hosts = sum(group.hosts for group in cluster.groups)
    return [*alone, replace(slow, groups=(Group(slow.device.kind, hosts, devices.pop()),))]


def case(name: str, module: Module, cluster: Cluster) -> Row:
    """The ratio for a model on a cluster."""
    started = time.perf_counter()
    programs = Programs(module)
    found = [best_expert(module, programs, each) for each in uniform(cluster)]
    best, label, meshes = min(found, key=lambda row: row[0])
    middle = time.perf_counter()
    mixed = len(cluster.groups) > 1
    layouts = None if mixed else list(dict.fromkeys([*layouts_of(cluster, cluster.ranks), *meshes]))
    own = search_plan(module, cluster, layouts=layouts, finalists=0, enough=0.0)
    plan = own.best.pipeline
    print(
        f"{name} on {cluster}: {own.best.layout}, {plan.micro} micro-batches, {plan.order}, "
        f"{plan.step_us / 1e3:.4g} ms; expert {label}, {best / 1e3:.4g} ms; "
        f"ratio {plan.step_us / best:.4f}; grid {middle - started:.0f} s, "
        f"search {own.seconds:.0f} s", flush=True,
    )  # fmt: skip
    ratio = plan.step_us / best * (1 - _ROUNDING) if best < math.inf else 0.0
    return Row(f"{name} on {cluster}", ratio, "", WORST, label)


def main() -> None:
    """Print the table; exit 1 when a plan of the grid is better than weft's."""
    parser = arguments(__doc__, "one model on two clusters")
    parser.add_argument("--model", default="", help="only models whose name holds this")
    parser.add_argument("--cluster", action="append", help="clusters in place of the default ones")
    parser.add_argument("--wide", action="store_true", help="all models on all clusters")
    options = parser.parse_args()
    models = MODELS | WIDE if options.wide or options.model else MODELS
    names = [name for name in models if options.model in name][: 1 if options.quick else None]
    known = WIDE_CLUSTERS if options.wide else CLUSTERS
    clusters = (options.cluster or list(known))[: 2 if options.quick else None]
    rows = []
    for name in names:
        module = models[name]()
        rows += [case(name, module, parse_cluster(text)) for text in clusters]
    mean = math.exp(sum(math.log(max(row.value, 1e-9)) for row in rows) / len(rows))
    rows.append(Row(f"geometric mean of {len(rows)}", mean, "", MEAN))
    show(rows)
    sys.exit(finish(rows, options.json))


if __name__ == "__main__":
    main()
