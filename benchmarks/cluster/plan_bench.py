"""weft's plans against DDP, FSDP2 and tensor parallelism by hand, on emulated hosts: `make plan-bench`.

For each topology and model weft searches a plan from a description of the cluster alone: rates of
the network, and what one core of this machine computes and moves, measured first and divided by the
ranks that share it. All plans train in turns in the same processes; their first losses must be equal.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from hosts import Hosts, Topology, missing
from rival_models import EXAMPLES, made, step
from rows import Row, arguments, finish, show

import weft
from weft.frontend.options import Options

_HERE = Path(__file__).parent
TOPOLOGIES = tuple(Topology(hosts, ranks, rate)
                   for rate in (1000.0, 200.0) for hosts, ranks in ((2, 1), (4, 1), (2, 2)))  # fmt: skip
#: time over that of the best of the rivals on every case, over FSDP2's in the geometric mean
BEST, OVER_FSDP2 = 1.0, 1 / 1.3
#: relative difference of losses: float32, sums in another order, AdamW
SAME = 1e-4


@dataclass(frozen=True)
class Core:
    """What one core of this machine does, alone."""

    flops_per_s: float
    bytes_per_s: float


def measured_core() -> Core:
    """Rates of a matrix product and of a sum of large vectors, on one thread."""
    torch.set_num_threads(1)
    a, v = torch.randn(512, 512), torch.randn(1 << 23)
    out = torch.empty_like(v)
    product = min(_timed(lambda: a @ a) for _ in range(20))
    added = min(_timed(lambda: torch.add(v, v, out=out)) for _ in range(5))
    return Core(2 * 512**3 / product, 3 * 4 * len(v) / added)


def _timed(run: object) -> float:
    start = time.perf_counter()
    run()  # type: ignore[operator]
    return time.perf_counter() - start


def describe(topology: Topology, core: Core, folder: Path) -> Path:
    """A cluster file. The ranks of a host share its card, all ranks the cores of this machine."""
    crowd = max(1.0, topology.world / (os.cpu_count() or 1))
    file = folder / f"{topology.hosts}x{topology.ranks}-{topology.rate_mbit:g}.toml"
    file.write_text(
        f'[[groups]]\ndevice = "cpu"\nhosts = {topology.hosts}\ndevices = {topology.ranks}\n'
        f"[links.inter]\nbytes_per_s = {topology.rate_mbit * 1e6 / 8 / topology.ranks}\n"
        f"latency_s = {topology.delay_us * 1e-6}\n"
        f"[device]\nflops_per_s = {{f32 = {core.flops_per_s / crowd}}}\n"
        f"dram_bytes_per_s = {core.bytes_per_s / crowd}\n"
    )
    return file


@dataclass(frozen=True)
class Case:
    """One model on one topology: losses and seconds of a step of each plan."""

    topology: Topology
    model: str
    found: dict[str, tuple[list[float], float]]

    def seconds(self, plan: str) -> float:
        """Of a step."""
        return self.found[plan][1]

    @property
    def best(self) -> str:
        """The fastest of the plans by hand."""
        return min((p for p in self.found if p != "weft"), key=self.seconds)

    @property
    def ratio(self) -> float:
        """weft's time over that of the best of them."""
        return self.seconds("weft") / self.seconds(self.best)

    @property
    def apart(self) -> float:
        """The largest relative difference of a loss from weft's."""
        ours = self.found["weft"][0]
        return max(abs(a - b) / abs(b) for losses, _ in self.found.values()
                   for a, b in zip(losses, ours, strict=True))  # fmt: skip


def compare(topology: Topology, names: Sequence[str], core: Core, folder: Path,
            emulated: bool) -> list[Case]:  # fmt: skip
    """All models on one topology."""
    real = topology if emulated else Topology(1, topology.world)
    file, words = describe(real, core, folder), []
    for name in names:
        model, optimizer, batch = made(name)
        plan = weft.plan(step, (model, optimizer, *batch), cluster=str(file),
                         options=Options(progress=False, verify_each=False))  # fmt: skip
        out = folder / f"{file.stem}-{name}"
        plan.save(out)
        words.append(f"{name}={out}")
    result = folder / "result.json"
    with Hosts(real, emulated=emulated) as hosts:
        command = [sys.executable, str(_HERE / "plan_worker.py"), str(result), str(real.ranks)]
        hosts.run([*command, *words], {"TORCH_CPP_LOG_LEVEL": "ERROR"}, timeout_s=600.0)
    return [Case(topology, name, found) for name, found in json.loads(result.read_text()).items()]


def rows_of(cases: Sequence[Case]) -> list[Row]:
    """A row for each case, and the means."""
    over = exp(fmean(log(c.seconds("weft") / c.seconds("FSDP2")) for c in cases))
    best = exp(fmean(log(c.ratio) for c in cases))
    return [
        *(Row(f"{c.topology}, {c.model}: step", c.ratio, "", BEST, c.best) for c in cases),
        Row("geometric mean", over, "", OVER_FSDP2, "FSDP2"),
        Row("geometric mean", best, "", None, "the best plan by hand"),
        Row("largest relative difference of a loss", max(c.apart for c in cases), "", SAME),
    ]


def details(case: Case) -> None:
    """A line for each case."""
    times = ", ".join(f"{plan} {1e3 * seconds:.1f}" for plan, (_, seconds) in case.found.items())
    print(f"{case.topology!s:26} {case.model:10} ms a step: {times}", flush=True)


def _stop(number: int, _: object) -> None:
    raise SystemExit(128 + number)


def main() -> int:
    """Run it; the exit status."""
    parser = arguments(__doc__, "one topology, two models")
    parser.add_argument("--topology", type=int, action="append", help="index of a topology")
    parser.add_argument("--model", action="append", choices=list(EXAMPLES))
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, _stop)  # so that namespaces are taken down
    why = missing()
    if why:
        print(f"no emulated hosts here ({why}): plain local processes instead, without delay")
    chosen = [TOPOLOGIES[i] for i in options.topology or range(1 if options.quick else len(TOPOLOGIES))]
    names = options.model or list(EXAMPLES)[: 2 if options.quick else None]
    core, cases = measured_core(), []
    with tempfile.TemporaryDirectory(prefix="weft-plans-") as folder:
        for topology in chosen:
            for case in compare(topology, names, core, Path(folder), not why):
                details(case)
                cases.append(case)
    rows = rows_of(cases)
    show(rows)
    return finish(rows, options.json)


if __name__ == "__main__":
    raise SystemExit(main())
