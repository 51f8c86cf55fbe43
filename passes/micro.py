"""Micro-batches: a batch that is split over time.

A train step over a batch is cut into `count` micro-batches, computed one after the other. That is a
split of the batch dim over an axis "time", and the dimension algebra says what it means, as it does
for data parallelism: activations are S(dim), losses and gradients P(sum), parameters B. There is
no communication over time inside of the loop. A value P(sum) that the update reads is added up over
the micro-batches: the accumulation of gradients.

Micro-batches need not be equal: 7 rows in 3 are 3, 2 and 2. A flattened dim, (batch, sequence) say,
is cut where its batch is. Sums over the batch stay sums, so the loss and gradients are those of the
whole batch whatever the sizes, and random numbers are those of the whole batch too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ..ir.errors import CompileError, Span
from ..ir.module import NOWHERE, Function, Location, Module, Op, Value
from ..ir.ops import OPS
from ..ir.types import B, Placement, S, shard_offset, shard_size
from .dead_code import without_dead_ops
from .inline import inline
from .micro_walk import Cut, Flip, Infeasible, Mixed, Walk, Walked

#: what an op of the entry belongs to: `before` is computed once, ahead of the first micro-batch
PHASES = ("before", "forward", "backward", "update")
LOOP = frozenset({"forward", "backward"})


@dataclass(frozen=True)
class TimeSplit:
    """A module whose batch is cut over time.

    Attributes:
        module: the program, for the whole batch. It may have more ops than the one that was split
            (what is computed for the whole batch besides its parts), and calls inlined.
        sizes: rows of the batch in each micro-batch.
        held: function -> value -> its placement over time: S(dim), P(combine) or B.
        states: function -> for each op, the iteration dim that is cut, `partial(...)`, or ''.
        phases: one of `PHASES` for each op of the entry.
    """

    module: Module
    sizes: tuple[int, ...]
    held: Mapping[str, Mapping[str, Placement]]
    states: Mapping[str, tuple[str, ...]]
    phases: tuple[str, ...]

    @property
    def count(self) -> int:
        """Number of micro-batches."""
        return len(self.sizes)

    @property
    def batch(self) -> int:
        """Rows of the whole batch."""
        return sum(self.sizes)

    def start(self, micro: int) -> int:
        """The first row of a micro-batch."""
        return sum(self.sizes[:micro])

    def time(self, value: Value) -> Placement:
        """The placement over time of a value of the entry."""
        return self.held[self.module.entry.name][value.name]


def time_split(module: Module, count: int) -> TimeSplit:
    """Cut the batch of a logical program into micro-batches.

    Args:
        count: how many; their sizes differ by one row at most.

    Raises CompileError W0404 where the program has no batch that can be cut, or has fewer rows.
    """
    if module.level != "logical":
        raise CompileError("W0201", f"micro-batches are made of logical modules, not {module.level}")
    if count < 1:
        raise CompileError(
            "W0404", f"a batch cannot be cut into {count} micro-batches",
            reason="there must be one at least", hint="micro=1 is the whole batch",
        )  # fmt: skip
    candidates = _candidates(module.entry)
    if not candidates and count > 1:
        raise CompileError(
            "W0404", "the program has no batch that could be cut into micro-batches",
            reason="it has no input with a dim of more than one element", hint="leave micro= out",
        )  # fmt: skip
    enough = [(size, dims) for size, dims in candidates if size >= count]
    if not enough and count > 1:
        size = max(size for size, _ in candidates)
        raise CompileError(
            "W0404", f"a batch of {size} cannot be cut into {count} micro-batches",
            reason="each micro-batch needs a row", hint=f"ask for at most {size} micro-batches",
        )  # fmt: skip
    errors: list[Infeasible] = []
    for size, dims in enough:
        starts = tuple(shard_offset(size, count, k) for k in range(count))
        try:
            return _split(module, dims, Cut(size, starts), count)
        except Infeasible as error:
            errors.append(error)
    if count == 1:
        return _uncut(module)
    raise _refusal(count, errors[0])


def _refusal(count: int, first: Infeasible) -> CompileError:
    loc = first.op.loc if first.op is not None else NOWHERE
    what = f"{first.op.name}" if first.op is not None else "the program"
    place = f" of {loc.path}" if loc.path else ""
    return CompileError(
        "W0404", f"the program cannot be computed in {count} micro-batches because of {what}{place}",
        span=span_of(loc), reason=first.reason,
        hint="what depends on the whole batch at once (batch statistics, contrastive losses, sorting) "
        "needs all of it; use micro=1, or the layer's form without it",
    )  # fmt: skip


def span_of(loc: Location) -> Span | None:
    """The user's line, for a diagnostic."""
    return Span(loc.file, loc.line, 1) if loc.file else None


def _candidates(entry: Function) -> list[tuple[int, dict[int, int]]]:
    """(size of the batch, parameter -> its batch dim): inputs that have one size in one dim.

    Dim 0 first; in a dim, the size that most inputs have. Inputs that are left out may turn out
    to be cut as well, where one that is cut meets them.
    """
    inputs = [
        (i, value.type.shape)
        for i, (value, attrs) in enumerate(zip(entry.params, entry.param_attrs, strict=True))
        if attrs.get("role") == "input"
    ]
    found: list[tuple[int, dict[int, int]]] = []
    for dim in range(max((len(shape) for _, shape in inputs), default=0)):
        sizes = [shape[dim] for _, shape in inputs if len(shape) > dim and shape[dim] > 1]
        for size in sorted(set(sizes), key=lambda n: (-sizes.count(n), sizes.index(n))):
            found.append(
                (size, {i: dim for i, s in inputs if len(s) > dim and s[dim] == size})
            )
    return found


def _split(module: Module, dims: dict[int, int], cut: Cut, count: int) -> TimeSplit:
    """The split with given batch dims of the entry's inputs. Raises Infeasible."""
    flat: set[str] = set()
    dims = dict(dims)
    while True:
        program = inline(module, keep=lambda f: f.name not in flat) if flat else module
        walks = _Walks(program, cut)
        entry = program.entry
        params = tuple(S(dims[i]) if i in dims else B for i in range(len(entry.params)))
        try:
            walked = Walk(entry, params, cut, walks, entry=True).run()
        except Mixed as mixed:
            flat.add(mixed.name)
        except Flip as flip:
            role = entry.param_attrs[flip.index].get("role")
            if role not in ("input", "buffer"):
                raise Infeasible(None, f"{entry.params[flip.index]} would have to be cut") from None
            dims[flip.index] = flip.dim
        else:
            return _finished(program, walked, walks, cut, count)


class _Walks:
    """Walks of functions, one for each way their operands are held."""

    def __init__(self, module: Module, cut: Cut) -> None:
        self.table = {function.name: function for function in module.functions}
        self.cut = cut
        self.done: dict[tuple[str, tuple[Placement, ...]], tuple[str, Walked]] = {}

    def __call__(self, name: str, held: tuple[Placement, ...]) -> tuple[str, Walked]:
        key = name, held
        if key not in self.done:
            walked = Walk(self.table[name], held, self.cut, self).run()
            self.done[key] = f"{name}#{len(self.done)}", walked
        return self.done[key]

    def reached(self, entry: Walked) -> list[tuple[str, Walked]]:
        """(name, walk) of the functions that the entry calls, directly or not."""
        by_name = dict(self.done.values())
        found: dict[str, Walked] = {}
        pending = [entry]
        while pending:
            for op in pending.pop(0).function.ops:
                if op.name == "call" and (name := str(op.attrs["callee"])) not in found:
                    found[name] = by_name[name]
                    pending.append(by_name[name])
        return list(found.items())


def _alive(walked: Walked) -> Walked:
    """Without the ops that nothing reads since they were written again."""
    state = {op.results[0].name: s for op, s in zip(walked.function.ops, walked.states, strict=True)}
    function = without_dead_ops(walked.function)
    return replace(walked, function=function, states=[state[op.results[0].name] for op in function.ops])


def _finished(module: Module, entry: Walked, walks: _Walks, cut: Cut, count: int) -> TimeSplit:
    entry = _alive(entry)
    reached = [(name, _alive(walked)) for name, walked in walks.reached(entry)]
    taken: set[str] = {entry.function.name}
    names: dict[str, str] = {}
    for name, _ in reached:
        base = name.partition("#")[0]
        names[name] = base if base not in taken else name.replace("#", "_t")
        taken.add(names[name])

    def renamed(function: Function, name: str) -> Function:
        ops = tuple(
            op.with_(attrs={**op.attrs, "callee": names[str(op.attrs["callee"])]})
            if op.name == "call" else op
            for op in function.ops
        )  # fmt: skip
        return function.with_(name=name, ops=ops)

    functions = [renamed(entry.function, entry.function.name)]
    functions += [renamed(walked.function, names[name]) for name, walked in reached]
    walked_by = {entry.function.name: entry, **{names[n]: w for n, w in reached}}
    timed = [_is_timed(op, entry) for op in functions[0].ops]
    if count > 1 and not any(timed):
        raise Infeasible(None, "nothing that it computes depends on a part of the batch")
    return TimeSplit(
        module.with_(functions=tuple(functions)),
        tuple(shard_size(cut.batch, count, k) for k in range(count)),
        {name: walked.held for name, walked in walked_by.items()},
        {name: tuple(walked.states) for name, walked in walked_by.items()},
        _phases(functions[0], entry.late, timed),
    )


def _is_timed(op: Op, walked: Walked) -> bool:
    """Does an op of the entry belong to each micro-batch?"""
    if any(value.name in walked.late for value in op.results):
        return False
    values = (*op.operands, *op.results)
    return any(walked.held[value.name] != B for value in values)


def _phases(entry: Function, late: set[str], timed: Sequence[bool]) -> tuple[str, ...]:
    """The phase of each op of the entry."""
    roles = [str(attrs.get("role", "")) for attrs in entry.result_attrs]
    forward = _ancestors(entry, [v.name for v, r in zip(entry.results, roles, strict=True) if r == "loss"])
    updated = _ancestors(
        entry,
        [v.name for v, r in zip(entry.results, roles, strict=True) if r in ("update", "grad")],
    )
    tangents = {
        v.name for v, a in zip(entry.params, entry.param_attrs, strict=True)
        if a.get("role") == "tangent"
    }  # fmt: skip
    after = set(tangents)
    phases: list[str] = []
    for op, in_loop in zip(entry.ops, timed, strict=True):
        names = {value.name for value in op.results}
        if any(value.name in after for value in op.operands):
            after |= names
        if not in_loop:
            phases.append("update" if names & late else "")
            continue
        if "loss" in roles and not names & forward and names & updated:
            after |= names
        phases.append("backward" if names & after else "forward")
    # what is the same for all micro-batches comes before them where they read it
    needed: set[str] = set()
    for index in reversed(range(len(phases))):
        op = entry.ops[index]
        if not phases[index]:
            phases[index] = "before" if any(v.name in needed for v in op.results) else "update"
        if phases[index] != "update":
            needed.update(value.name for value in op.operands)
    return tuple(phases)


def _ancestors(entry: Function, wanted: Sequence[str]) -> set[str]:
    """Names of the values that some values depend on, these included."""
    found = set(wanted)
    for op in reversed(entry.ops):
        if any(value.name in found for value in op.results):
            found.update(value.name for value in op.operands)
            found.update(value.name for value in op.results)
    return found


def _uncut(module: Module) -> TimeSplit:
    """One micro-batch of a program whose batch cannot be cut: updates are what optimizers do."""
    entry = module.entry
    updating = {
        f.name for f in module.functions if any(OPS[op.name].family == "optimizer" for op in f.ops)
    }
    late: set[str] = set()
    for op in entry.ops:
        updates = OPS[op.name].family == "optimizer" or op.attrs.get("callee") in updating
        if updates or any(value.name in late for value in op.operands):
            late.update(value.name for value in op.results)
    timed = [not any(value.name in late for value in op.results) for op in entry.ops]
    held = {
        f.name: dict.fromkeys([v.name for v in f.params] + [v.name for op in f.ops for v in op.results], B)
        for f in module.functions
    }  # fmt: skip
    states = {f.name: ("",) * len(f.ops) for f in module.functions}
    return TimeSplit(module, (1,), held, states, _phases(entry, late, timed))


__all__ = ["LOOP", "PHASES", "TimeSplit", "span_of", "time_split"]
