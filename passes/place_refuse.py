"""Why constraints on a placement cannot be kept, in the user's words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from difflib import get_close_matches

from ..ir.errors import CompileError
from ..ir.module import Module
from ..ir.types import Mesh
from .constraints import Constraints, Rule

#: likeness of names above which one is taken for a slip of the other
_CLOSE = 0.5


def check_axes(constraints: Constraints, candidates: Sequence[Mesh]) -> None:
    """Raise CompileError W0402 for an axis that no candidate mesh has."""
    names = {name for mesh in candidates for name in mesh.names}
    if any(mesh.size == 1 for mesh in candidates):
        return  # axes of one rank are left out of a mesh
    for rule in constraints.rules:
        if rule.axis != "*" and rule.axis not in names:
            near = get_close_matches(rule.axis, sorted(names), 1)
            raise CompileError(
                "W0402", f"no mesh has the axis {rule.axis!r} of the constraint `{rule}`",
                reason=f"there are {', '.join(sorted(names))}",
                hint=f"did you mean {near[0]!r}?" if near else "name the axes: mesh=\"dp=2,tp=4\"",
            )  # fmt: skip


def unused(rules: Sequence[Rule], module: Module) -> None:
    """Raise CompileError W0402 for constraints that are about nothing in the program.

    Of a rule that was written for several kinds at once (`forbid`), one kind is enough.
    """
    for rule in rules:
        if rule.where == "*" or rule.kind in ("buffer", "state", "input"):
            continue
        entry = module.entry
        names = {str(attrs.get("name", "")) for attrs in entry.param_attrs}
        names |= {op.loc.path for _, op in module.walk()} | {op.name for _, op in module.walk()}
        near = get_close_matches(rule.where, sorted(filter(None, names)), 1, _CLOSE)
        raise CompileError(
            "W0402", f"the constraint `{rule}` is about nothing in the program",
            reason=f"no {rule.kind} is called {rule.where!r}",
            hint=f"did you mean {near[0]!r}?" if near else "see `weft inspect` for the module paths",
        )  # fmt: skip


def conflict(rules: Sequence[Rule], legal: Callable[[Sequence[Rule]], bool]) -> CompileError:
    """The error for constraints of which no placement obeys all, naming a least set of them.

    Every one of the named is needed for the contradiction: each is left out in turn for good if the
    rest still contradict each other (deletion filter; Chinneck and Dravnieks, 1991).
    """
    if not legal(()):
        return CompileError(
            "W0402", "no placement is legal", reason="some op has no legal split on this mesh",
            hint="use fewer devices",
        )  # fmt: skip
    left = list(rules)
    for rule in rules:
        rest = [other for other in left if other is not rule]
        if not legal(rest):
            left = rest
    listed = "; ".join(f"`{rule}`" for rule in left)
    if len(left) == 1:
        return CompileError(
            "W0402", f"no placement obeys the constraint {listed}",
            reason="what it is about cannot be placed or split so",
            hint="`weft inspect --op PATH` shows the splits of an op; or leave it out",
        )  # fmt: skip
    return CompileError(
        "W0402", f"constraints contradict each other: {listed}",
        reason="each of these can be kept without the others, all of them cannot",
        hint="leave one of them out",
    )  # fmt: skip


def over_cap(constraints: Constraints, peak_bytes: int) -> CompileError:
    """The error for a memory cap that no placement keeps."""
    cap = constraints.memory_bytes or 0.0
    rules = "; ".join(f"`{rule}`" for rule in constraints.rules)
    return CompileError(
        "W0402", f"no placement keeps the memory cap of {cap / 1e9:.4g} GB",
        reason=f"the least found is {peak_bytes / 1e9:.4g} GB a rank"
        + (f" under {rules}" if rules else ""),
        hint="raise the cap, use more devices" + (", or drop a constraint" if rules else ""),
    )  # fmt: skip
