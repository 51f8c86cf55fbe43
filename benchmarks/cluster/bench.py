"""Real plans under gloo on emulated hosts, next to what was predicted: `make cluster-bench`.

1. Calibration, on three topologies: weft's transfers (`transfers.py`, fitted by `network.py`), the
   local actions of some plans (`costs.py`) with as many ranks as the plans that are judged, and one
   number from the steps of these plans: how much longer a transfer takes there than in a loop.
2. On each topology: searched and random placements of small train steps, predicted by the simulator
   and measured in whole loops (`worker.py`).
3. Errors of the step time, pairs in the right order, and the regret of the plan that is predicted
   to be the fastest of a topology and model.

Topologies are HOSTSxRANKS. Those marked `unseen` took no part in the calibration.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from costs import ComputeCosts, Costs, fit_compute
from hosts import Hosts, Topology, missing
from network import Measured, error, fit
from plans import MODELS, Case, cases, meshes, trace, whole
from rows import Row, arguments, finish, show

from weft.costmodel.cluster import Cluster, parse_cluster
from weft.costmodel.collectives import spread_of
from weft.costmodel.collectives_gloo import GlooCosts, place_of
from weft.costmodel.simulate import Settings, simulate
from weft.frontend.driver import Program
from weft.ir.module import Module
from weft.ir.types import Mesh

_HERE = Path(__file__).parent
FAST, SLOW = 1000.0, 200.0
#: topologies of the calibration, and those that are judged
CALIBRATION = (Topology(2, 1, FAST), Topology(4, 1, FAST), Topology(1, 4))
JUDGED = (*CALIBRATION[:2], Topology(2, 2, FAST), Topology(2, 1, SLOW), Topology(2, 2, SLOW))
#: seeds of random placements
_LEARNT, _JUDGED = range(1000, 1009), range(22)
_LARGEST = 1 << 22
#: Mbit/s and us of a network over which no transfer pays
_APART = (0.1, 20_000)


@dataclass(frozen=True)
class Result:
    """A plan, predicted and measured."""

    topology: Topology
    model: str
    label: str
    predicted_s: float
    measured_s: float

    @property
    def error(self) -> float:
        """Relative error."""
        return self.predicted_s / self.measured_s - 1


def describe(topology: Topology, folder: Path) -> Path:
    """A cluster file. A host's card is shared by its ranks."""
    file = folder / f"{topology.hosts}x{topology.ranks}-{topology.rate_mbit:g}.toml"
    rate = topology.rate_mbit * 1e6 / 8 / topology.ranks
    file.write_text(
        f'[[groups]]\ndevice = "cpu"\nhosts = {topology.hosts}\ndevices = {topology.ranks}\n'
        f"[links.inter]\nbytes_per_s = {rate}\nlatency_s = {topology.delay_us * 1e-6}\n"
    )
    return file


def crowd(topology: Topology) -> float:
    """Ranks of the machine over its cores."""
    return max(1.0, topology.world / (os.cpu_count() or 1))


@dataclass(frozen=True)
class Calibrated:
    """What the calibration found.

    Attributes:
        compute: local actions, by the number of ranks on this machine.
        stretch: see `Costs`.
    """

    gloo: GlooCosts
    compute: Mapping[int, ComputeCosts]
    stretch: float = 1.0

    def predict(self, module: Module, topology: Topology, cluster: Cluster) -> float:
        """Seconds of a step. The emulated hosts share the cores of this machine."""
        settings = Settings(at_once=2, cores_per_host=(os.cpu_count() or 1) / cluster.hosts)
        compute = self.compute[topology.world]
        costs = Costs(module, cluster, compute, self.gloo, crowd(topology), self.stretch)
        return simulate(module, cluster, costs=costs, settings=settings).step_us * 1e-6


def fit_stretch(plain: Sequence[float], longer: Sequence[float], measured: Sequence[float]) -> float:
    """The stretch with the least mean error; times of a step at 1 and at 2 are given."""

    def off(stretch: float) -> float:
        rows = zip(plain, longer, measured, strict=True)
        return statistics.fmean(abs((a + (stretch - 1) * (b - a)) / m - 1) for a, b, m in rows)

    return min((1 + i / 100 for i in range(-20, 61)), key=off)


class Bench:
    """One run of the benchmark.

    Args:
        emulated: with namespaces; otherwise all topologies are plain local processes.
        folder: for plans and results; removed by its owner.
    """

    def __init__(self, emulated: bool, folder: Path, random: range, learnt: range) -> None:
        self.emulated, self.folder = emulated, folder
        self.random, self.learnt = random, learnt
        self.programs: dict[str, Program] = {name: trace(name) for name in MODELS}

    def _run(self, topology: Topology, *words: str) -> object:
        out = self.folder / "out.json"
        out.unlink(missing_ok=True)
        script, *rest = words
        command = [sys.executable, str(_HERE / script), *(w.replace("OUT", str(out)) for w in rest)]
        with Hosts(self.real(topology), emulated=self.emulated) as hosts:
            hosts.run(command, {"TORCH_CPP_LOG_LEVEL": "ERROR"})
        return json.loads(out.read_text())

    def real(self, topology: Topology) -> Topology:
        """The topology that can be had: one host with all ranks, where there are no namespaces."""
        return topology if self.emulated else Topology(1, topology.world)

    def cluster(self, topology: Topology) -> Cluster:
        """What the predictions know of a topology."""
        return parse_cluster(str(describe(self.real(topology), self.folder)))

    def transfers(self, topology: Topology) -> list[Measured]:
        """Weft's transfers along the axes of the meshes of a topology."""
        cluster, texts = self.cluster(topology), meshes(topology.world)
        found = self._run(topology, "transfers.py", "OUT", str(_LARGEST), *texts)
        assert isinstance(found, list)
        out = []
        for text, axis, op, held, seconds in found:
            sizes = tuple((f"a{i}", int(size)) for i, size in enumerate(text.split("x")))
            spread = spread_of(cluster, Mesh(sizes, "cpu"), axis)
            place = place_of(cluster, *spread, crowd(topology))
            out.append(Measured(op, held, place, seconds))
        return out

    def compute(self, world: int) -> ComputeCosts:
        """Local actions with `world` ranks on this machine, of the shares of plans and of whole models:
        the times of shapes in between are interpolated."""
        topology, folder = Topology(1, world), self.folder / f"learn{world}"
        plans = list(cases(self.programs, topology, describe(topology, self.folder), self.learnt, folder))
        apart = describe(Topology(world, 1, *_APART), self.folder)
        plans += whole(self.programs, world, apart, self.folder / f"whole{world}")
        found = self._run(topology, "worker.py", "trace", "OUT", *(str(c.folder) for c in plans))
        assert isinstance(found, list)
        return fit_compute(zip((c.plan.module("schedule") for c in plans), found, strict=True))

    def timed(self, topology: Topology, seeds: range) -> list[tuple[Case, float]]:
        """Plans of a topology, and seconds of a step of each."""
        file = describe(self.real(topology), self.folder)
        name = f"{topology}-{seeds.start}".replace(" ", "-").replace("/", "-")
        plans = list(cases(self.programs, topology, file, seeds, self.folder / name))
        found = self._run(topology, "worker.py", "time", "OUT", *(str(c.folder) for c in plans))
        assert isinstance(found, list)
        return list(zip(plans, found, strict=True))

    def judge(self, topology: Topology, calibrated: Calibrated) -> list[Result]:
        """Plans of a topology."""
        cluster, out = self.cluster(topology), []
        for case, measured in self.timed(topology, self.random):
            predicted = calibrated.predict(case.plan.module("schedule"), topology, cluster)
            out.append(Result(topology, case.model, case.label, predicted, measured))
        return out

    def calibrate(self, worlds: Sequence[int]) -> tuple[Calibrated, float]:
        """Everything that predictions need, and the mean error of the transfers in percent."""
        measured = [row for topology in CALIBRATION for row in self.transfers(topology)]
        gloo = fit(measured)
        first = Calibrated(gloo, {world: self.compute(world) for world in worlds})
        double = replace(first, stretch=2.0)
        times: list[tuple[float, float, float]] = []
        for topology in CALIBRATION:
            if topology.hosts > 1 and topology.world in worlds:
                cluster = self.cluster(topology)
                for case, seconds in self.timed(topology, self.learnt):
                    module = case.plan.module("schedule")
                    both = (c.predict(module, topology, cluster) for c in (first, double))
                    times.append((*both, seconds))
        stretch = fit_stretch(*zip(*times, strict=True)) if times else 1.0
        return replace(first, stretch=stretch), error(gloo, measured)


def order(results: Sequence[Result]) -> float:
    """Percent of the pairs of one topology that are predicted in the order measured."""
    pairs = [(a, b) for a, b in combinations(results, 2) if a.topology == b.topology]
    kept = [(a.predicted_s < b.predicted_s) == (a.measured_s < b.measured_s) for a, b in pairs]
    return 100 * statistics.fmean(kept)


def regret(results: Sequence[Result]) -> float:
    """Percent that the plan predicted fastest is slower than the fastest, mean over topologies."""
    groups: dict[Topology, list[Result]] = {}
    for result in results:
        groups.setdefault(result.topology, []).append(result)
    lost = [min(g, key=lambda r: r.predicted_s).measured_s / min(r.measured_s for r in g) - 1
            for g in groups.values()]  # fmt: skip
    return 100 * statistics.fmean(lost)


def rows_of(name: str, results: Sequence[Result]) -> list[Row]:
    """The report of some results."""
    off = sorted(abs(r.error) for r in results)
    p95 = off[min(len(off) - 1, round(0.95 * len(off)))]
    return [
        Row(f"{name}: mean error of {len(off)} plans", 100 * statistics.fmean(off), "%", 5.0,
            "dPRO < 5, Echo 8, ten lines 5.5 to 8.5"),
        Row(f"{name}: 95th percentile", 100 * p95, "%", 15.0),
        Row(f"{name}: pairs in the wrong order", 100 - order(results), "%", 5.0),
        Row(f"{name}: regret of the best", regret(results), "%", 3.0),
    ]  # fmt: skip


def details(results: Sequence[Result]) -> None:
    """A line for each plan."""
    for r in results:
        print(f"{r.topology!s:26} {r.model:8} {r.label:14} predicted {1e3 * r.predicted_s:8.1f} ms, "
              f"measured {1e3 * r.measured_s:8.1f} ms, {100 * r.error:+6.1f} %")  # fmt: skip


def measure(bench: Bench, judged: Sequence[Topology], verbose: bool) -> list[Row]:
    """Calibrate, judge, report."""
    calibrated, missed = bench.calibrate(sorted({t.world for t in judged}))
    out = [
        Row("transfers of the calibration: mean error", missed, "%"),
        Row("stretch of transfers in steps", calibrated.stretch, ""),
    ]
    everything: list[Result] = []
    for topology in judged:
        results = bench.judge(topology, calibrated)
        everything += results
        if verbose:
            details(results)
        name = str(topology) + ("" if topology in CALIBRATION else ", unseen")
        out += rows_of(name, results)
    return out + rows_of("all topologies", everything)


def _stop(number: int, _: object) -> None:
    raise SystemExit(128 + number)


def main() -> int:
    """Run it; the exit status."""
    parser = arguments(__doc__, "two topologies and fewer plans")
    parser.add_argument("--plans", action="store_true", help="print a line for each plan")
    parser.add_argument("--topology", type=int, action="append", help="index of a judged topology")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, _stop)  # so that namespaces are taken down
    why = missing()
    if why:
        print(f"no emulated hosts here ({why}): plain local processes instead, without delay")
    judged = JUDGED[:2] if options.quick else JUDGED
    if options.topology:
        judged = tuple(JUDGED[index] for index in options.topology)
    with tempfile.TemporaryDirectory(prefix="weft-cluster-") as folder:
        bench = Bench(not why, Path(folder), _JUDGED[:6] if options.quick else _JUDGED,
                      _LEARNT[:3] if options.quick else _LEARNT)  # fmt: skip
        found = measure(bench, judged, options.plans)
    show(found)
    return finish(found, options.json)


if __name__ == "__main__":
    raise SystemExit(main())
