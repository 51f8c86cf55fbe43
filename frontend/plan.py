"""A plan: the program at every level, what it is predicted to cost, and how to keep it."""

from __future__ import annotations

import json
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..codegen.emit import emit_kernels
from ..costmodel import cluster_json
from ..costmodel.cluster import Cluster, parse_cluster
from ..costmodel.cluster_stages import stage_clusters
from ..costmodel.simulate import Simulation, Timeline, simulate
from ..ir.errors import CompileError
from ..ir.module import LEVELS, Module
from ..ir.opdef import OPS
from ..ir.stage_ranks import StageRanks
from ..ir.text import print_module
from ..ir.trace_events import trace_text
from ..ir.types import Mesh, local_bytes
from ..runtime.kernel_manifest import kernel_folder
from ..runtime.stage_map import ranks_of
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
from .garbage import heap_aside
from .options import OPTIONS
from .report import Dump, render_report

VERSION = "0.1.0"


def mesh_text(mesh: Mesh | None) -> str:
    """A mesh for people: `host=2 x dev=2`."""
    if mesh is None or not mesh.axes:
        return "one rank"
    return " x ".join(f"{name}={size}" for name, size in mesh.axes)


def stages_text(schedules: Sequence[Module]) -> str:
    """The mesh, and how many stages have one."""
    shapes = list(dict.fromkeys(mesh_text(module.mesh) for module in schedules))
    if len(shapes) > 1:
        return "stages of " + ", ".join(mesh_text(module.mesh) for module in schedules)
    return f"{len(schedules)} stages of {shapes[0]}" if len(schedules) > 1 else shapes[0]


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
        """The mesh that was chosen; that of the first stage where there are several."""
        return self.schedules[0].mesh or Mesh()

    @property
    def schedules(self) -> tuple[Module, ...]:
        """What the ranks run: one schedule, or one for each pipeline stage."""
        count = self.dumps[-1].module.attrs.get("stages", 1)
        assert isinstance(count, int)
        return tuple(dump.module for dump in self.dumps[-count:])

    @property
    def stage_ranks(self) -> StageRanks:
        """The mesh of each stage, and which ranks it has."""
        return ranks_of(self.schedules)

    @property
    def ranks(self) -> int:
        """Ranks of all stages."""
        return self.stage_ranks.size

    @cached_property
    def simulation(self) -> Simulation:
        """The predicted step of all ranks, on the cluster that the plan is for."""
        return simulate(self.schedules, self.cluster)

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
        return simulate(self.schedules, parse_cluster(cluster))

    def summary(self) -> str:
        """The plan in a few lines."""
        return "\n".join(f"{key:<12}{value}" for key, value in self._summary())

    def _summary(self) -> list[tuple[str, str]]:
        if "stages" in self.dumps[-1].module.attrs:
            return self._staged_summary()
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

    def _staged_summary(self) -> list[tuple[str, str]]:
        shape = stages_text(self.schedules)
        rows = [("program", self.target), ("cluster", f"{self.cluster}, {shape}")]
        for stage, module in enumerate(self.schedules):
            counts = Counter(op.name for op in module.entry.ops if OPS[op.name].family == "collective")
            moved = ", ".join(f"{name} {counts[name]}" for name in sorted(counts)) or "none"
            held = sum(
                local_bytes(value.type, module.mesh or Mesh())
                for value, attrs in zip(module.entry.params, module.entry.param_attrs, strict=True)
                if attrs.get("role") in ("param", "buffer", "state")
            )
            rows.append((f"stage {stage}", f"{human_bytes(held)} of state a rank, transfers: {moved}"))
        step, peak = self.timeline.step_us, self.timeline.peak_bytes
        rows.append(("predicted", f"{human_time(step)} a step, {human_bytes(peak)} a rank"))
        return rows

    def explain(self, path: str = "") -> str:
        """Why the plan is as it is.

        Args:
            path: a part of a module path or parameter name, such as `layers.0.mlp`: placement,
                cost and runner-up of its parameters and ops, and its collectives. Empty for the
                whole plan: collectives per axis, memory by owner, ops that every rank repeats.

        Raises CompileError W1001 where nothing matches.
        """
        if "stages" in self.dumps[-1].module.attrs:
            return self._explain_stages(path)
        placed, spmd = self.module("placed"), self.module("spmd")
        if path:
            return explain_path(placed, spmd, self.cluster, path)
        parts = [self.summary(), *self._searched(), explain_plan(placed, spmd, self.timeline)]
        return "\n".join(parts)

    def _searched(self) -> list[str]:
        """What the search of stages and micro-batches chose this plan over, if there was one."""
        return [str(self.meta["search"])] if "search" in self.meta else []

    def _explain_stages(self, path: str) -> str:
        """Each part of the program that has something under a path, or a summary of all."""
        if not path:
            return "\n".join([self.summary(), *self._searched()])
        found, last = [], None
        sizes = [mesh.size for mesh in self.stage_ranks.meshes]
        shares = stage_clusters(self.cluster, len(sizes), sizes)
        by_level = {level: [d for d in self.dumps if d.module.level == level] for level in LEVELS}
        parts = zip(by_level["placed"], by_level["spmd"], cycle(shares), strict=False)
        for placed, spmd, share in parts:
            try:
                text = explain_path(placed.module, spmd.module, share, path)
            except CompileError as error:
                last = error
                continue
            found.append(f"{placed.name.partition('-')[0]}\n{text}")
        if not found and last is not None:
            raise last
        return "\n".join(found)

    @heap_aside()
    def save(self, path: str | Path) -> None:
        """Write the artifact folder, all of it or nothing. Raises CompileError W1001."""
        with ArtifactWriter(path) as writer:
            names = []
            for number, dump in enumerate(self.dumps):
                names.append(f"ir/{number:02d}-{dump.name}.weft")
                writer.text(names[-1], dump.text)
            for name, tensors in (("weights", self.weights), ("inputs", self.inputs)):
                if tensors:
                    writer.tensors(name, tensors)
            for stage, module in enumerate(self.schedules):
                folder = kernel_folder(writer.folder, len(self.schedules), stage)
                kind = module.mesh.device if module.mesh else self.cluster.groups[0].kind
                emit_kernels(module, folder, kind, cache=OPTIONS.cache / "kernels")
            writer.gzipped("timeline.json.gz", trace_text(self.simulation.events()))
            writer.text("report.html", self.report())
            writer.commit(self._info(names))

    def report(self) -> str:
        """The report page as HTML text."""
        subtitle = f"{self.cluster}, {stages_text(self.schedules)}, weft {VERSION}"
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
            "mesh": stages_text(self.schedules),
            "ranks": self.ranks,
            "predicted": {
                "step_us": self.timeline.step_us,
                "memory_bytes": self.timeline.peak_bytes,
            },
            "dumps": list(dumps),
            "made_by": list(self.made_by),
            "meta": json.loads(json.dumps(dict(self.meta))),
        }
