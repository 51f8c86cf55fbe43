"""A plan: the program at every level, what it is predicted to cost, and how to keep it."""

from __future__ import annotations

import json
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..codegen.emit import emit_kernels
from ..costmodel import cluster_json
from ..costmodel.cluster import Cluster, parse_cluster
from ..costmodel.simulate import Simulation, Timeline, simulate
from ..ir.errors import CompileError
from ..ir.module import LEVELS, Module
from ..ir.text import print_module
from ..ir.trace_events import trace_text
from ..ir.types import Mesh
from .artifact import ArtifactWriter
from .axes import axis_words
from .describe import (
    collectives,
    fallbacks,
    human_bytes,
    human_time,
    memory_by_role,
)
from .explain_text import explain_path, explain_plan
from .options import OPTIONS
from .report import Dump, render_report

VERSION = "0.1.0"


def mesh_text(mesh: Mesh | None) -> str:
    """A mesh for people: `host=2 x dev=2`."""
    if mesh is None or not mesh.axes:
        return "one rank"
    return " x ".join(f"{name}={size}" for name, size in mesh.axes)


@dataclass(frozen=True)
class Plan:
    """What `weft.plan` returns. The IR is the plan: everything else is derived from the dumps.

    Attributes:
        target: the name of what was planned.
        cluster: the cluster it is for.
        dumps: the module after each pass; the last one is the schedule.
        made_by: for each dump, the pass in pipeline text; empty for the traced program.
        weights: parameters and buffers by name; empty when traced without data.
        inputs: example inputs by name; empty when traced without data.
        meta: what `run` needs to know besides: learning rates of the example, among others.
    """

    target: str
    cluster: Cluster
    dumps: tuple[Dump, ...]
    made_by: tuple[str, ...]
    weights: Mapping[str, Tensor]
    inputs: Mapping[str, Tensor]
    meta: Mapping[str, Any]

    def module(self, level: str) -> Module:
        """The last module of a level. Raises CompileError W0102 for a level that is not there."""
        for dump in reversed(self.dumps):
            if dump.module.level == level:
                return dump.module
        raise CompileError("W0102", f"the plan has no level {level!r}", hint=", ".join(LEVELS))

    def ir(self, level: str = "placed") -> str:
        """The text of a level."""
        return print_module(self.module(level))

    @property
    def mesh(self) -> Mesh:
        """The mesh that was chosen."""
        return self.dumps[-1].module.mesh or Mesh()

    @cached_property
    def simulation(self) -> Simulation:
        """The predicted step of all ranks, on the cluster that the plan is for."""
        return simulate(self.module("schedule"), self.cluster)

    @cached_property
    def timeline(self) -> Timeline:
        """The predicted step of the rank that needs most memory."""
        return self.simulation.timeline()

    def simulate(self, cluster: str = "") -> Simulation:
        """Replay a step of all ranks, on another cluster of as many devices when one is named.

        Raises CompileError W0501 for a cluster of another size.
        """
        if not cluster:
            return self.simulation
        return simulate(self.module("schedule"), parse_cluster(cluster))

    def summary(self) -> str:
        """The plan in a few lines."""
        return "\n".join(f"{key:<12}{value}" for key, value in self._summary())

    def _summary(self) -> list[tuple[str, str]]:
        spmd = self.module("spmd")
        rows = [("program", self.target), ("cluster", f"{self.cluster}, {mesh_text(self.mesh)}")]
        for axis in self.mesh.names:
            rows.append((f"axis {axis}", axis_words(self.module("placed"), axis)))
        moved: Counter[str] = Counter()
        counts: Counter[str] = Counter()
        for row in collectives(spmd):
            moved[row.name] += row.bytes
            counts[row.name] += row.count
        shown = [f"{n} {counts[n]} ({human_bytes(moved[n])})" for n in sorted(counts)]
        rows.append(("collectives", ", ".join(shown) or "none"))
        memory = ", ".join(f"{k} {human_bytes(v)}" for k, v in memory_by_role(spmd).items())
        rows.append(("per rank", memory))
        step, peak = self.timeline.step_us, self.timeline.peak_bytes
        rows.append(("predicted", f"{human_time(step)} a step, {human_bytes(peak)} a rank"))
        if fallen := fallbacks(spmd):
            names = sorted({target for target, _, _ in fallen})
            rows.append(("ATen", f"{len(fallen)} ops are not known to weft: {', '.join(names)}"))
        return rows

    def explain(self, path: str = "") -> str:
        """Why the plan is as it is.

        Args:
            path: a part of a module path or parameter name, such as `layers.0.mlp`: placement,
                cost and runner-up of its parameters and ops, and its collectives. Empty for the
                whole plan: collectives per axis, memory by owner, ops that every rank repeats.

        Raises CompileError W1001 where nothing matches.
        """
        placed, spmd = self.module("placed"), self.module("spmd")
        if path:
            return explain_path(placed, spmd, self.cluster, path)
        return f"{self.summary()}\n{explain_plan(placed, spmd, self.timeline)}"

    def save(self, path: str | Path) -> None:
        """Write the artifact folder, all of it or nothing. Raises CompileError W1001."""
        with ArtifactWriter(path) as writer:
            names = []
            for number, dump in enumerate(self.dumps):
                names.append(f"ir/{number:02d}-{dump.name}.weft")
                writer.text(names[-1], print_module(dump.module))
            for name, tensors in (("weights", self.weights), ("inputs", self.inputs)):
                if tensors:
                    writer.tensors(name, tensors)
            kind = self.cluster.groups[0].kind
            kernels = writer.folder / "kernels"
            emit_kernels(self.module("schedule"), kernels, kind, cache=OPTIONS.cache / "kernels")
            writer.gzipped("timeline.json.gz", trace_text(self.simulation.events()))
            writer.text("report.html", self.report())
            writer.commit(self._info(names))

    def report(self) -> str:
        """The report page as HTML text."""
        subtitle = f"{self.cluster}, {mesh_text(self.mesh)}, weft {VERSION}"
        return render_report(
            f"weft plan: {self.target}", subtitle, self._summary(), self.dumps, self.timeline,
            self.cluster,
        )  # fmt: skip

    def _info(self, dumps: Sequence[str]) -> dict[str, Any]:
        return {
            "weft": VERSION,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "target": self.target,
            "cluster": str(self.cluster),
            cluster_json.KEY: cluster_json.to_json(self.cluster),
            "mesh": mesh_text(self.mesh),
            "ranks": self.mesh.size,
            "predicted": {
                "step_us": self.timeline.step_us,
                "memory_bytes": self.timeline.peak_bytes,
            },
            "dumps": list(dumps),
            "made_by": list(self.made_by),
            "meta": json.loads(json.dumps(dict(self.meta))),
        }
