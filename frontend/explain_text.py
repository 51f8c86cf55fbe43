"""What `Plan.explain` and `weft inspect --op` print."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..costmodel.cluster import Cluster
from ..costmodel.simulate import Timeline
from ..ir.errors import CompileError
from ..ir.module import Attr, Location, Module, Op, Value
from ..ir.types import Mesh
from .describe import (
    CollectiveRow,
    collectives,
    fallbacks,
    human_bytes,
    human_time,
    memory_by_owner,
    replicated,
    star,
    titled,
)
from .explain import Choice, Explanation, Option


def explain_path(placed: Module, spmd: Module, cluster: Cluster, path: str, limit: int = 20) -> str:
    """Placement, cost and runner-up of the parameters and ops of a module path.

    Args:
        limit: how many parameters, ops and collectives are shown, each.

    Raises CompileError W1001 where nothing matches.
    """
    explanation = Explanation(placed, cluster)
    params = list(explanation.parameters(path))
    ops = explanation.matching(path)
    if not params and not ops:
        raise CompileError(
            "W1001",
            f"nothing in the plan matches {path!r}",
            hint="use a part of a module path, an op name, or a parameter's name",
        )
    lines = _parameters(explanation, params[:limit])
    lines += _more(len(params) - limit, "parameters")
    for number, op in ops[:limit]:
        lines += _op(explanation, number, op)
    lines += _more(len(ops) - limit, "ops")
    rows = [row for row in collectives(spmd) if _concerns(row, path)]
    lines += [f"collectives of {path}"] if rows else []
    lines += [f"    {_collective(row)}" for row in rows[:limit]]
    return "\n".join([*lines, *_more(len(rows) - limit, "collectives")])


def explain_plan(placed: Module, spmd: Module, timeline: Timeline, limit: int = 10) -> str:
    """What the whole plan spends: collectives per axis, memory by owner, ops that stay whole."""
    lines = []
    by_axis: defaultdict[str, list[CollectiveRow]] = defaultdict(list)
    for row in collectives(spmd):
        by_axis[row.axis].append(row)
    for axis, rows in by_axis.items():
        count, size = sum(r.count for r in rows), sum(r.bytes for r in rows)
        lines.append(f"collectives on {axis}: {count}, {human_bytes(size)} a rank")
        lines += [f"    {_collective(row)}" for row in rows[:limit]]
        lines += _more(len(rows) - limit, "rows")
    lines.append(f"memory at the peak, {human_bytes(timeline.peak_bytes)} a rank")
    owners = memory_by_owner(timeline.at_peak)
    lines += [
        f"    {human_bytes(size):>10}  {kind} {owner}" for kind, owner, size in owners[:limit]
    ]
    lines += _more(len(owners) - limit, "owners")
    whole = replicated(placed)
    lines += ["replicated: every rank does the same work"] if whole else []
    alike = Counter(f"    {titled(op)} -> {_results(op)}, at {_place(op.loc, True)}" for op in whole)
    lines += [f"{line}, x {n}" if n > 1 else line for line, n in alike.most_common(limit)]
    lines += _more(len(alike) - limit, "rows")
    fallen = fallbacks(spmd)
    lines += ["fell back to ATen: runs whole on every rank"] if fallen else []
    lines += [f"    {name} x {count} at {where}" for name, where, count in fallen[:limit]]
    return "\n".join(lines)


def _parameters(
    explanation: Explanation, params: Sequence[tuple[Mapping[str, Attr], Value]]
) -> list[str]:
    """Parameters and states; those of which the same is said, such as both moments, together."""
    said: defaultdict[tuple[str, ...], list[str]] = defaultdict(list)
    for attrs, value in params:
        head, *rest = _parameter(explanation, attrs, value)
        said[tuple(rest)].append(head)
    return [line for rest, heads in said.items() for line in (*heads, *rest)]


def _parameter(explanation: Explanation, attrs: Mapping[str, Attr], value: Value) -> list[str]:
    choice = explanation.parameter(value)
    whole = f" of {human_bytes(value.type.bytes)}" if value.type.bytes else ""
    held = f"{human_bytes(choice.chosen.bytes)}{whole} a rank"
    return [
        f"{attrs.get('role', 'parameter')} {attrs.get('name', value.name)}: {value.type.placed(None)}",
        f"    held        {_placement(explanation.mesh, choice.chosen.text)}; {held}",
        f"    cost        {_cost(choice.chosen)}",
        f"    runner-up   {_runner_up(choice, explanation.mesh)}",
    ]


def _op(explanation: Explanation, number: int, op: Op) -> list[str]:
    choice = explanation.op(number)
    lines = [f"{titled(op)} {_shown(op)}", f"    at          {_place(op.loc)}"]
    lines.append(f"    split       {_split(op, explanation.mesh) or choice.chosen.text}")
    lines.append(f"    cost        {_cost(choice.chosen)}")
    if choice.options > 1:
        lines.append(f"    runner-up   {_runner_up(choice, None)}")
    if op.name == "aten":
        lines.append("    fell back to ATen: weft does not know the op, so it runs whole")
    return lines


def _shown(op: Op) -> str:
    operands = ", ".join(f"%{v.name}" for v in op.operands)
    return f"({operands}) -> {', '.join(f'%{v.name}: {v.type}' for v in op.results)}"


def _results(op: Op) -> str:
    return ", ".join(str(v.type) for v in op.results)


def _split(op: Op, mesh: Mesh) -> str:
    """What each axis splits, as an iteration dim and as what becomes of the first result."""
    placement = op.results[0].type.placement if op.results else None
    kinds = dict(zip(mesh.names, placement or (), strict=False))
    words = []
    for axis, dim in op.split.items():
        at = kinds.get(axis)
        means = ""
        if at is not None and at.kind == "S":
            means = f" (dim {at.dim} of the result)"
        elif at is not None and at.kind == "P":
            means = f" (partial results, {at})"
        words.append(f"{axis}={dim}{means}")
    return ", ".join(words)


def _placement(mesh: Mesh, text: str) -> str:
    parts = text.split(", ") if mesh.axes else []
    return (
        ", ".join(f"{axis}={part}" for axis, part in zip(mesh.names, parts, strict=False)) or text
    )


def _cost(option: Option) -> str:
    if not option.work_us and not option.moves_us:
        return "none: nothing is moved"
    if not option.work_us:
        return f"{human_time(option.moves_us)} a step of resharding"
    return (
        f"{human_time(option.total_us)} a step: {human_time(option.work_us)} of work, "
        f"{human_time(option.moves_us)} of resharding"
    )


def _runner_up(choice: Choice, mesh: Mesh | None) -> str:
    best, chosen = choice.runner_up, choice.chosen
    if best is None:
        return "none: nothing else is legal"
    text = best.text if mesh is None else _placement(mesh, best.text)
    more = best.total_us - chosen.total_us
    sign = "+" if more >= 0 else "-"
    size = best.bytes - chosen.bytes
    memory = f", {'+' if size > 0 else '-'}{human_bytes(abs(size))}" if size else ""
    return (
        f"{text}: {human_time(best.total_us)} ({sign}{human_time(abs(more))}{memory}), "
        f"of {choice.options - 1} others"
    )


def _collective(row: CollectiveRow) -> str:
    return (
        f"{human_bytes(row.bytes):>10}  {row.name} x {row.count} on {row.axis}: {row.carries}, "
        f"{row.tensor}{f', at {row.where}' if row.where else ''}"
    )


def _concerns(row: CollectiveRow, path: str) -> bool:
    """Does a row, which may stand for repeated blocks, concern a path?"""
    texts: Sequence[str] = (row.where, row.carries)
    if any(path in text for text in texts):
        return True
    return any("*" in text and _starred(path) in text for text in texts)


def _starred(path: str) -> str:
    parts = ["*" if part.isdigit() else part for part in path.split(".")]
    return ".".join(parts)


def _place(loc: Location, starred: bool = False) -> str:
    loc = replace(loc, path=star(loc.path)) if starred else loc
    return str(loc) or "no place of the program: weft made it"


def _more(count: int, what: str) -> list[str]:
    return [f"    and {count} more {what}"] if count > 0 else []
