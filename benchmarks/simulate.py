"""The simulator: time of a replay, and its answers against closed forms.

    python benchmarks/simulate.py [--quick] [--json FILE]

The replays include memory, waiting and the critical path. The steps are those of a Llama 70B as
pipeline stages (`pipeline_steps.py`), 1,024 devices with the axes dp = 16 and tp = 8 in 8 stages.
Peers: the targets of the issue; the bubble of equal stages, (p - 1) / (m + p - 1) (Narayanan et al.,
2019, where p are stages and m micro-batches); the replay of all ranks instead of one of each class.
"""

from __future__ import annotations

import gc
import sys

from pipeline_steps import Model, train_step
from rows import Row, arguments, finish, show, timed

from weft.costmodel.cluster import parse_cluster
from weft.costmodel.simulate import Settings, Simulation, simulate
from weft.costmodel.simulate_cost import Transfer
from weft.ir.module import Module, Op
from weft.ir.types import Mesh

#: issue 4 of 5
ACTIONS, ACTIONS_S, STEP_S = 100_000, 2.0, 10.0
LLAMA_70B = Model(8192, 28672, 80, 64, 8, 128256)
SMALL = Model(1024, 2816, 8, 8, 4, 32000)


class ComputeOnly:
    """1 us for each computation, nothing for communication: the closed forms ask for that."""

    def action_us(self, op: Op, coord: tuple[int, ...]) -> float:
        return 1.0 if op.name in ("einsum", "attention", "attention_backward") else 0.0

    def transfer_us(self, transfer: Transfer) -> tuple[float, float]:
        return 0.0, 0.0


def everything(stages: Module | list[Module], cluster: str) -> Simulation:
    """A replay with all that is asked of it."""
    found = simulate(stages, parse_cluster(cluster))
    assert found.peak_bytes and found.critical_path and found.exposed_us and found.bubble < 1
    return found


def speed_rows(micro: int) -> list[Row]:
    """Time of replays."""
    rows = []
    alone = train_step(SMALL, Mesh((("dp", 4), ("tp", 2)), "h100"), 1, 140, 8, 2048)
    count = sum(op.name != "free" for op in alone[0].entry.ops)
    gc.collect()
    seconds, _ = timed(lambda: everything(alone, "1x8:h100"))
    per = seconds * ACTIONS / count
    rows.append(Row("100,000 actions", per, "s", ACTIONS_S, f"target; {count} actions, {seconds:.2f} s"))
    mesh = Mesh((("dp", 16), ("tp", 8)), "h100")
    stages = train_step(LLAMA_70B, mesh, 8, micro, 16, 4096)
    count = sum(op.name != "free" for stage in stages for op in stage.entry.ops)
    gc.collect()
    seconds, found = timed(lambda: everything(stages, "128x8:h100"))
    note = f"target; {micro} micro-batches, {count} actions, {len(found.classes)} classes of ranks"
    rows.append(Row("70B step on 1,024 devices, 8 x 16 x 8", seconds, "s", STEP_S, note))
    tokens = micro * 16 * 4096
    flops = 6 * 70.6e9 * tokens / (found.step_us * 1e-6) / 1024
    rows.append(Row("  its predicted step", found.step_us / 1e6, "s", None,
                    f"{flops / 1e12:.0f} TFLOP/s of a device, Llama 3 405B reports 380 to 430"))  # fmt: skip
    rows.append(Row("  its bubble", found.bubble, "", None,
                    f"{7 / (micro + 7):.3f} without communication"))  # fmt: skip
    rows.append(Row("  its peak memory", found.peak_bytes / 1e9, "GB", None, "80 GB of an H100"))
    return rows


def closed_form_rows() -> list[Row]:
    """Bubbles of equal stages: the first and last stage have no embedding and no head."""
    rows = []
    mesh = Mesh((("dp", 2), ("tp", 2)), "h100")
    for schedule in ("GPipe", "1F1B"):
        worst = 0.0
        for stages, micro in ((2, 4), (4, 4), (4, 12), (8, 8)):
            modules = train_step(SMALL, mesh, stages, micro, 4, 64, schedule, ends=False)
            cluster = parse_cluster(f"{stages}x4:h100")
            found = simulate(modules, cluster, settings=Settings(), costs=ComputeOnly())
            expected = (stages - 1) / (micro + stages - 1)
            worst = max(worst, abs(found.bubble / expected - 1))
        rows.append(Row(f"bubble of {schedule}, largest error", worst, "", 1e-9,
                        "(p - 1) / (m + p - 1), p = 2, 4, 8"))  # fmt: skip
    return rows


def symmetry_rows() -> list[Row]:
    """One rank of each class against all ranks."""
    mesh = Mesh((("dp", 4), ("tp", 4)), "h100")
    stages = train_step(SMALL, mesh, 4, 4, 8, 128)
    cluster = parse_cluster("8x8:h100")
    once_s, once = timed(lambda: simulate(stages, cluster))
    all_s, every = timed(lambda: simulate(stages, cluster, symmetric=False))
    error = abs(once.step_us / every.step_us - 1)
    return [
        Row("one rank of each class: error of the step", error, "", 1e-9, "all 64 ranks replayed"),
        Row("  time of the replay", once_s, "s", all_s, "the same, all ranks"),
    ]


def main() -> int:
    options = arguments(__doc__, "fewer micro-batches of the 70B step").parse_args()
    rows = closed_form_rows() + symmetry_rows() + speed_rows(8 if options.quick else 32)
    show(rows)
    return finish(rows, options.json)


if __name__ == "__main__":
    sys.exit(main())
