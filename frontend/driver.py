"""The driver: strings tracing, passes and the plan together."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.status import Status
from torch import Tensor

from ..costmodel.cluster import parse_cluster
from ..ir.module import Module
from ..passes.base import Pass
from ..passes.manager import PassManager, Stage
from ..passes.pipeline import parse_pipeline
from .options import Options
from .plan import Plan
from .report import Dump

#: what takes longer shows that it is alive
_PATIENCE_S = 2.0


def default_pipeline(cluster: str, mesh: str = "") -> str:
    """The passes from a training-level logical module to a schedule."""
    place = f"place[cluster={json.dumps(cluster)}{f' mesh={mesh}' if mesh else ''}]"
    return f"{place},lower,fuse,schedule"


class Progress:
    """Shows the running stage on a terminal once a compilation takes over two seconds."""

    def __init__(self, enabled: bool) -> None:
        self.console = Console(stderr=True)
        self.enabled = enabled and self.console.is_terminal
        self.started = time.monotonic()
        self.status: Status | None = None

    def __call__(self, what: str) -> None:
        """Say what begins now."""
        if not self.enabled:
            return
        if self.status is not None:
            self.status.update(f"weft: {what}")
        elif time.monotonic() - self.started > _PATIENCE_S:
            self.status = self.console.status(f"weft: {what}")
            self.status.start()

    def stop(self) -> None:
        """Remove the line."""
        if self.status is not None:
            self.status.stop()


def run_passes(
    module: Module, passes: Sequence[Pass], options: Options, progress: Progress
) -> list[Stage]:
    """Run passes; the stages, the input first."""
    manager = PassManager(
        passes,
        verify_each=options.verify_each,
        reproducers=options.cache / "reproducers",
        progress=lambda index, count, item: progress(f"{item.name} ({index + 1} of {count})"),
    )
    manager.run(module)
    return manager.stages


def plan_module(
    stages: Sequence[Stage],
    *,
    target: str,
    cluster: str,
    mesh: str,
    options: Options,
    progress: Progress,
    weights: Mapping[str, Tensor],
    inputs: Mapping[str, Tensor],
    meta: Mapping[str, Any],
) -> Plan:
    """Plan a logical module, the last of the stages that the frontend made, for a cluster.

    Args:
        mesh: axis sizes such as `2x2`, or empty to search for the best mesh.

    Raises CompileError.
    """
    parsed = parse_cluster(cluster)
    passes = parse_pipeline(options.pipeline or default_pipeline(cluster, mesh))
    module = stages[-1].module
    later = run_passes(module, passes, options, progress)
    all_stages = [*stages, *later[1:]]
    dumps = tuple(Dump(s.name, s.module, f"{s.seconds:.2f} s") for s in all_stages)
    made_by = tuple(stage.made_by for stage in all_stages)
    return Plan(target, parsed, dumps, made_by, dict(weights), dict(inputs), dict(meta))
