"""Placements on disk, by what they are the answer to: a program, a mesh, a cluster, the wishes.

A plan that is read is written down and priced again; where the price is not the one that it was
stored with (the cost model has changed since), or the file cannot be read, it is searched anew.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from functools import lru_cache
from hashlib import sha256
from math import isclose
from pathlib import Path
from typing import Any

from ..costmodel.cluster import Cluster
from ..ir.module import Module
from ..ir.text import print_module
from ..ir.types import B, Mesh, P, Placement, S
from .apply import Choices, FunctionChoices, apply_phased
from .place_model import Runs
from .place_recompute import recompute
from .place_task import MeshReport, PlacementResult
from .price import price

_ENTRY = re.compile(r"S\((\d+)\)|P\((\w+)\)")


def cached(
    folder: Path | None,
    module: Module,
    mesh: Mesh,
    cluster: Cluster,
    runs: Runs,
    wishes: object,
    search: Callable[[], PlacementResult | None],
) -> PlacementResult | None:
    """The answer of a search, from the folder if it is there; None keeps nothing.

    Args:
        wishes: everything else that the answer depends on; its `repr` names it.
    """
    if folder is None:
        return search()
    asked = (_code(), mesh, cluster, runs, wishes, print_module(module))
    name = sha256("\n".join(map(repr, asked)).encode()).hexdigest()
    path = folder / name[:2] / f"{name}.json"
    found = _read(path, module, mesh, cluster, runs)
    if found is None:
        found = search()
        if found is not None:
            _write(path, found)
    return found


@lru_cache(maxsize=1)
def _code() -> str:
    """A digest of what searches and prices: another version gives other answers."""
    folder, total = Path(__file__).resolve().parent, sha256()
    for path in sorted((*folder.glob("*.py"), *(folder.parent / "costmodel").glob("*.py"))):
        total.update(path.read_bytes())
    return total.hexdigest()


def _read(
    path: Path, module: Module, mesh: Mesh, cluster: Cluster, runs: Runs
) -> PlacementResult | None:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        choices = _choices(stored["choices"])
        modes = {int(index): str(mode) for index, mode in stored["modes"].items()}
        numbers = {f.name: stored["report"][f.name] for f in fields(MeshReport) if f.name != "mesh"}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # nothing is there, or nothing that this version has written
    logical = recompute(module, modes, runs.phases)[0] if modes else module
    placed, phases = apply_phased(logical, mesh, choices)
    cost = price(placed, cluster, phases, runs.micro)
    report = MeshReport(mesh=mesh, **numbers)
    same = isclose(cost.total_us, report.time_us, rel_tol=1e-6, abs_tol=1e-6)
    if not same or cost.peak_bytes != report.peak_bytes:
        return None
    return PlacementResult(
        mesh, choices, placed, cost, report.time_us, report.lower_bound_us, (report,), phases,
        logical, modes,
    )  # fmt: skip


def _write(path: Path, found: PlacementResult) -> None:
    """Store an answer; a folder that cannot be written keeps nothing."""
    report = asdict(found.report[0])
    del report["mesh"]
    content = {
        "choices": _plain(found.choices),
        "modes": {str(index): mode for index, mode in found.modes.items()},
        "report": {name: _number(value) for name, value in report.items()},
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, suffix=".part", delete=False, encoding="utf-8"
        ) as file:
            json.dump(content, file)
        os.replace(file.name, path)
    except OSError:
        return


def _number(value: Any) -> bool | int | float:
    return value if isinstance(value, bool | int) else float(value)


def _plain(choices: Choices) -> dict[str, Any]:
    return {
        "functions": {
            name: {
                "splits": [list(states) for states in chosen.splits],
                "params": [[str(entry) for entry in row] for row in chosen.params],
                "results": [[str(entry) for entry in row] for row in chosen.results],
            }
            for name, chosen in choices.functions.items()
        },
        "clones": dict(choices.clones),
        "callees": [[name, index, callee] for (name, index), callee in choices.callees.items()],
        "again": sorted(list(reader) for reader in choices.again),
        "phases": None if choices.phases is None else list(choices.phases),
        "repeated": choices.repeated,
    }


def _choices(stored: Mapping[str, Any]) -> Choices:
    functions = {
        str(name): FunctionChoices(
            tuple(tuple(map(str, states)) for states in chosen["splits"]),
            tuple(tuple(map(_entry, row)) for row in chosen["params"]),
            tuple(tuple(map(_entry, row)) for row in chosen["results"]),
        )
        for name, chosen in stored["functions"].items()
    }
    phases = stored["phases"]
    return Choices(
        functions,
        {str(name): str(original) for name, original in stored["clones"].items()},
        {(str(name), int(index)): str(callee) for name, index, callee in stored["callees"]},
        frozenset((str(value), int(op)) for value, op in stored["again"]),
        None if phases is None else tuple(map(str, phases)),
        bool(stored["repeated"]),
    )


def _entry(text: str) -> Placement:
    """Raises ValueError."""
    if text == "B":
        return B
    match = _ENTRY.fullmatch(text)
    if match is None:
        raise ValueError(text)
    return S(int(match[1])) if match[1] is not None else P(match[2])


__all__ = ["cached"]
