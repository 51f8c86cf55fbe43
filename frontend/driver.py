"""The driver: strings tracing, passes and the plan together."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console
from rich.status import Status
from torch import Tensor

from ..costmodel.cluster import about_all, parse_cluster
from ..ir.module import Module
from ..ir.verify import verify
from ..passes.carry import Carry
from ..passes.manager import PassManager
from ..passes.pipeline import parse_pipeline
from ..passes.place import Place
from ..passes.random_place import RandomPlace
from ..passes.search import Wishes
from .garbage import heap_aside
from .options import Options
from .pass_table import ALL_PASSES
from .plan import Plan
from .report import Dump
from .searched import Searched, searched, seconds_of
from .staging import is_staged, staged_dumps

log = logging.getLogger("weft.trace")

#: what takes longer shows that it is alive
_PATIENCE_S = 2.0


#: the passes that decide where everything is
_PLACING = (Place, RandomPlace)


def logical_passes(kind: str) -> str:
    """The passes from a traced program of a kind to the logical module that is placed."""
    return {
        "train": "simplify,outline,differentiate,simplify",
        "forward": "simplify,outline",
        "joint": "simplify",
    }[kind]


def default_pipeline(kind: str, cluster: str, mesh: str = "") -> str:
    """The passes from a traced program to a schedule.

    Args:
        kind: `train` (a step with its updates), `forward`, or `joint` (already differentiated).
    """
    first = logical_passes(kind)
    place = f"place[cluster={json.dumps(cluster)}{f' mesh={json.dumps(mesh)}' if mesh else ''}]"
    return f"{first},{place},lower,fuse,coalesce,schedule"


class Progress:
    """Shows the running stage on a terminal once a compilation takes over two seconds."""

    def __init__(self, enabled: bool) -> None:
        self.console = Console(stderr=True)
        self.enabled = enabled and self.console.is_terminal
        self.status = Status("weft", console=self.console)
        self.timer = threading.Timer(_PATIENCE_S, self.status.start)
        self.timer.daemon = True
        if self.enabled:
            self.timer.start()

    def __call__(self, what: str) -> None:
        """Say what begins now."""
        self.status.update(f"weft: {what}")

    def stop(self) -> None:
        """Remove the line; it does not come any more."""
        self.timer.cancel()
        if self.timer.ident is not None:
            self.timer.join()
        self.status.stop()


@dataclass(frozen=True)
class Program:
    """A traced program, ready to be planned.

    Attributes:
        kind: `train`, `forward` or `joint`.
        target: its name.
        module: logical IR.
        weights, inputs: tensors by name; meta tensors are left out.
        meta: what running needs to know besides.
    """

    kind: str
    target: str
    module: Module
    weights: Mapping[str, Tensor]
    inputs: Mapping[str, Tensor]
    meta: Mapping[str, Any]


@heap_aside()
def plan_program(
    program: Program,
    cluster: str,
    mesh: str,
    options: Options,
    progress: Progress,
    known: Sequence[Module] = (),
    found: Searched | None = None,
) -> Plan:
    """Plan a traced program for a cluster.

    Args:
        mesh: axis sizes such as `2x2`, or empty to search for the best mesh.
        known: placed modules of the same program at other sizes; the one that suits is taken over
            in place of a search.
        found: the plan to write down; by default a search of stages and micro-batches as well where
            the options have a budget for it.

    Raises CompileError.
    """
    if options.calibration:
        cluster = about_all(cluster, options.calibration)
    parsed = parse_cluster(cluster)  # a typo is told before the work begins
    log.info(
        "%s: %d ops, %d parameters and inputs, %s", program.target, len(program.module.entry.ops),
        len(program.module.entry.params), program.kind,
    )  # fmt: skip
    staged = is_staged(options)
    if found is None and options.budget and not (staged or mesh or known or options.pipeline):
        progress("search")
        seconds = seconds_of(options.budget)
        if program.kind == "train":
            found = searched(logical(program), parsed, Wishes(), seconds)
    if found is not None:
        staged, mesh = found.staged, found.mesh
        parsed = found.in_order(parsed)
    text = logical_passes(program.kind) if staged else options.pipeline
    text = text or default_pipeline(program.kind, cluster, mesh)
    passes = tuple(
        replace(p, cache=options.cache / "placements") if isinstance(p, Place) else p
        for p in parse_pipeline(text, ALL_PASSES)
    )
    if known:
        passes = tuple(Carry(p, tuple(known)) if isinstance(p, _PLACING) else p for p in passes)
    manager = PassManager(
        passes,
        verify_each=options.verify_each,
        reproducers=options.cache / "reproducers",
        progress=lambda index, count, item: progress(f"{item.name} ({index + 1} of {count})"),
    )
    manager.run(program.module)
    first, *later = manager.stages
    dumps = [
        Dump("trace", first.module),
        *(Dump(s.name, s.module, f"{s.seconds:.2f} s") for s in later),
    ]
    made_by = [stage.made_by for stage in manager.stages]
    if staged:
        progress("stages")
        rows = found.dumps() if found is not None else staged_dumps(
            dumps[-1].module, program.kind, cluster, mesh, options
        )
        for maker, dump in rows:
            if options.verify_each:
                verify(dump.module)
            made_by.append(maker)
            dumps.append(dump)
    return Plan(
        program.target,
        parsed,
        tuple(dumps),
        tuple(made_by),
        _real(program.weights),
        _real(program.inputs),
        dict(program.meta) | ({"search": found.explain()} if found is not None else {}),
    )


def logical(program: Program) -> Module:
    """The program as placement sees it: simplified, outlined, differentiated."""
    manager = PassManager(parse_pipeline(logical_passes(program.kind), ALL_PASSES))
    return manager.run(program.module)


def _real(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not tensor.is_meta}
