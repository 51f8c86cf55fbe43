"""On each rank: steps of plans, timed or traced.

    worker.py time OUT.json FOLDER...     [seconds of a step, of the slowest rank] for each plan
    worker.py trace OUT.json FOLDER...    for each plan, {action: median us of a local action}

A step's time is that of a whole loop of steps over their number: what is still under way at the end
of a step is waited for by a later one, or by the end of the loop.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from weft.runtime.artifact import Artifact
from weft.runtime.comm import COMMUNICATION, Comm
from weft.runtime.program import Program

#: seconds of a loop; loops, of which the median counts; least and most steps that are traced
_LOOP_S, _LOOPS, _TRACED = 0.25, 3, (5, 60)


class Steps:
    """A plan on this rank."""

    def __init__(self, folder: Path) -> None:
        artifact = Artifact.open(folder)
        self.module = artifact.module()
        assert self.module.mesh is not None
        self.comm = Comm(self.module.mesh)
        self.program = Program(self.module, self.comm)
        self.program.load_state(artifact.tensors("weights"))
        names = [str(a.get("name", "")) for a in self.module.entry.param_attrs
                 if a.get("role") == "input"]  # fmt: skip
        stored = artifact.tensors("inputs")
        self.inputs: list[Tensor] = [stored[name] for name in names]
        self.rates = artifact.info["meta"]["lr"]

    def __call__(self) -> None:
        self.program.step(*self.inputs, lr=self.rates)

    def _count(self, least: int, most: int) -> int:
        """Steps of a loop, the same on all ranks."""
        self()
        start = time.perf_counter()
        self()
        took = max(time.perf_counter() - start, 1e-6)
        count = torch.tensor([max(least, min(most, round(_LOOP_S / took)))])
        dist.broadcast(count, 0)
        return int(count)

    def seconds(self) -> float:
        """Time of a step on the slowest rank."""
        count, found = self._count(1, 200), []
        for _ in range(_LOOPS):
            self.comm.barrier()
            start = time.perf_counter()
            for _ in range(count):
                self()
            found.append((time.perf_counter() - start) / count)
        slowest = torch.tensor([statistics.median(found)], dtype=torch.float64)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        return float(slowest)

    def local_us(self) -> dict[str, float]:
        """Median time of each action that does not communicate."""
        ops = self.module.entry.ops
        count = self._count(*_TRACED)
        for _ in range(count):  # as warm as in a loop
            self()
        with self.program.tracing() as trace:
            for _ in range(count):
                self()
        times: dict[int, list[float]] = defaultdict(list)
        for event in trace.all_events():
            if event.get("cat") != "compute":
                continue
            action = event["args"]["action"]
            name = ops[action].name
            if name != "wait" and (name not in COMMUNICATION or name in ("shard", "partial")):
                times[action].append(event["dur"])
        return {str(action): statistics.median(found) for action, found in times.items()}


def main() -> None:
    """Measure all plans."""
    what, out, *folders = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    steps = [Steps(Path(folder)) for folder in folders]
    found = [one.seconds() if what == "time" else one.local_us() for one in steps]
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
