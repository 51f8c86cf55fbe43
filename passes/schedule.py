"""Schedule: one flat list of actions, asynchronous collectives, ends of lives.

The order of actions is a deterministic function of the program alone, so it is the same on all
ranks, and every process group sees one sequence of collectives.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from ..ir.module import Function, Module, Namer, Op, Value
from ..ir.ops import OPS
from .base import Pass
from .inline import inline

#: placed by `stage_schedule`, in an order that all stages share
_MESSAGES = frozenset({"send", "recv"})
#: collectives whose result is larger than their operand: started late, to keep memory low
_GROWING = frozenset({"all_gather"})
#: ops outside the movement, control and collective families whose result may be an operand's memory
_ALIASING = frozenset({"cast", "stop_gradient", "reduce_sum", "reduce_max", "reduce_min",
                       "reduce_prod", "aten"})  # fmt: skip
#: the operands of an optimizer update that are not state: gradient, step, learning rate
_STATELESS = {"adam_update": (1, 4, 5), "adamw_update": (1, 4, 5), "sgd_update": (1, 2, 3),
              "momentum_update": (1, 3, 4)}  # fmt: skip


@dataclass(frozen=True)
class Schedule(Pass):
    """Calls are inlined, collectives become asynchronous pairs, values are freed.

    before:  %g = reduce_scatter(%dw) {axis = "dp", dim = 0} : f32[8, 4]{S(0)}
             %h = einsum(%x, %v) {spec = "b k, k n -> b n"} : f32[6, 4]{B}
             %w1 = sgd_update(%w, %g, %step, %lr) : f32[8, 4]{S(0)}
    after:   %g.start = reduce_scatter(%dw) {axis = "dp", dim = 0, async = true} : f32[8, 4]{S(0)}
             %h = einsum(%x, %v) {spec = "b k, k n -> b n"} : f32[6, 4]{B}
             free(%x, %v)
             %g = wait(%g.start) : f32[8, 4]{S(0)}
             free(%g.start, %dw)
             %w1 = sgd_update(%w, %g, %step, %lr) {inplace = true} : f32[8, 4]{S(0)}

    A collective starts as soon as its operand is there, except an `all_gather`, whose result needs
    more memory than its operand: it starts ahead of its use only while fewer than `in_flight`
    collectives run. It is waited for right before the first use of its result, or earlier when
    `in_flight` newer ones are to start, because its operand lives until then. An optimizer update
    runs as soon as its gradient is complete and nothing reads the old state any more, so that
    gradients do not pile up until the end of the step.
    """

    in_flight: int = 4

    name = "schedule"
    summary = "calls inlined, asynchronous collectives, frees, updates in place"
    levels = ("spmd",)

    def run(self, module: Module) -> Module:
        flat = inline(module)
        entry = flat.entry
        kernels = views_of(flat.functions[1:])
        ops = place_updates(entry, place_collectives(entry.ops), kernels)
        ops = _Starter(entry, ops, self.in_flight).run()
        ops = add_frees(entry, update_in_place(entry, ops, kernels))
        entry = replace(entry, ops=tuple(ops))
        return flat.with_(level="schedule", functions=(entry, *flat.functions[1:]))


def is_asynchronous(op: Op) -> bool:
    """Can an op be started here and waited for later? Messages between stages stay where they are."""
    if op.name in _MESSAGES:
        return False
    return "async" in OPS[op.name].attrs and len(op.operands) == 1 and len(op.results) == 1


def place_collectives(ops: Sequence[Op]) -> list[Op]:
    """Each collective right behind its operand's definition, a growing one before its first use."""
    order = range(len(ops))
    # (position, -1 before, 0 at or 1 behind it, old position): sorting keeps definitions first
    keys = [(index, 0, index) for index in order]
    first: dict[str, int] = {}  # value -> where it is first needed
    for index in reversed(order):
        op = ops[index]
        if is_asynchronous(op) and op.name in _GROWING and op.results[0].name in first:
            target = first[op.results[0].name]
            if target > index:
                keys[index] = (target, -1, index)
        # what is to move up behind its operand must find the operand where it was
        needed = 0 if is_asynchronous(op) and op.name not in _GROWING else keys[index][0]
        for value in op.operands:
            first[value.name] = min(needed, first.get(value.name, needed))
    defined: dict[str, int] = {}
    for index, op in enumerate(ops):
        if is_asynchronous(op) and op.name not in _GROWING:
            source = defined.get(op.operands[0].name)
            keys[index] = (-1 if source is None else keys[source][0], 1, index)
        for value in op.results:
            defined[value.name] = index
    return [ops[index] for index in sorted(order, key=keys.__getitem__)]


#: kernel function -> for each result, the operands whose memory it may be
Views = Mapping[str, Sequence[Sequence[int]]]


def place_updates(function: Function, ops: Sequence[Op], kernels: Views) -> list[Op]:
    """Optimizer updates, and what depends on them, as early as their operands are there.

    An update also stays behind the readers of the state that it replaces, so that it can overwrite
    it. Only the tail of the program moves: ops on which nothing else depends.
    """
    roots = aliases(function, ops, kernels)
    readers: dict[str, int] = {}  # parameter -> its last reader outside the tail
    place: dict[str, int] = {}  # value -> the position behind which it is there
    late: set[str] = set()
    keys = []
    for index, op in enumerate(ops):  # the tail, and who reads the states before it
        if op.name in _STATELESS or any(value.name in late for value in op.operands):
            late.update(value.name for value in op.results)
        else:
            place.update((value.name, index) for value in op.results)
            for value in op.operands:
                readers.update((root, index) for root in roots.get(value.name, ()))
    for index, op in enumerate(ops):
        if op.results and op.results[0].name in late and op.name not in _MESSAGES:
            anchor = max((place.get(value.name, -1) for value in op.operands), default=-1)
            for root in _states(op, roots):
                anchor = max(anchor, readers.get(root, -1))
            place.update((value.name, anchor) for value in op.results)
            keys.append((anchor, 1, index))
        else:  # messages stay in the order that both stages share
            place.update((value.name, index) for value in op.results)
            keys.append((index, 0, index))
    return [ops[index] for index in sorted(range(len(ops)), key=keys.__getitem__)]


def views_of(kernels: Iterable[Function]) -> Views:
    """Which results of kernel functions may be the memory of an operand."""
    table: dict[str, list[list[int]]] = {}
    for kernel in kernels:
        roots = aliases(kernel, kernel.ops, {})
        names = [roots.get(value.name, frozenset()) for value in kernel.results]
        params = list(enumerate(kernel.params))
        table[kernel.name] = [[i for i, value in params if value.name in found] for found in names]
    return table


def aliases(function: Function, ops: Iterable[Op], kernels: Views) -> dict[str, frozenset[str]]:
    """For each value, the parameters whose memory it may be: views and the like."""
    roots = {value.name: frozenset({value.name}) for value in function.params}
    none: frozenset[str] = frozenset()
    for op in ops:
        views = kernels.get(str(op.attrs["callee"])) if op.name == "call" else None
        if views is not None:
            for value, sources in zip(op.results, views, strict=True):
                shared = none.union(*(roots.get(op.operands[i].name, none) for i in sources))
                if shared:
                    roots[value.name] = shared
            continue
        family = OPS[op.name].family
        if family in ("movement", "control", "collective") or op.name in _ALIASING:
            found = none.union(*(roots.get(value.name, none) for value in op.operands))
        elif op.attrs.get("inplace"):
            found = none.union(*(roots.get(value.name, none) for value in _state_operands(op)))
        else:
            continue
        if found:
            roots.update((value.name, found) for value in op.results)
    return roots


def _state_operands(op: Op) -> list[Value]:
    skip = _STATELESS[op.name]
    return [value for index, value in enumerate(op.operands) if index not in skip]


def _states(op: Op, roots: Mapping[str, frozenset[str]]) -> set[str]:
    """Parameters whose memory an optimizer update could overwrite."""
    if op.name not in _STATELESS:
        return set()
    return {root for value in _state_operands(op) for root in roots.get(value.name, ())}


class _Starter:
    """Splits collectives into starts and waits, and starts growing ones ahead of their place."""

    def __init__(self, function: Function, ops: Sequence[Op], in_flight: int) -> None:
        self.function, self.ops, self.in_flight = function, ops, max(1, in_flight)
        names = [value.name for value in function.params]
        names += [value.name for op in ops for value in op.results]
        self.namer = Namer(tuple(names))
        self.out: list[Op] = []
        self.there = {value.name for value in function.params}  #: may be read now
        self.running: dict[str, Op] = {}  #: result -> its `wait`, oldest first
        self.ahead: set[str] = set()  #: results of growing collectives that nothing has read yet
        self.deferred: list[Op] = []  #: updates whose gradients are still on the way
        growing = (op for op in ops if is_asynchronous(op) and op.name in _GROWING)
        self.growing = deque(growing)

    def run(self) -> list[Op]:
        """The ops with starts and waits. Linear in the number of ops."""
        for op in self.ops:
            self._start_ahead()
            if is_asynchronous(op):
                if op.results[0].name not in self.there and op.results[0].name not in self.running:
                    self._start(op)
            elif op.name in _STATELESS and any(v.name in self.running for v in op.operands):
                self.deferred.append(op)
            else:
                self._emit(op)
        for name in list(self.running):
            self._wait(name)
        self._flush()
        return self.out

    def _start_ahead(self) -> None:
        while self.growing:
            name = self.growing[0].results[0].name
            if name in self.running or name in self.there:
                self.growing.popleft()
            elif (
                self.growing[0].operands[0].name in self.there
                and max(len(self.running), len(self.ahead)) < self.in_flight
            ):
                self._start(self.growing.popleft())
            else:
                return

    def _start(self, op: Op) -> None:
        self._need(op)
        while len(self.running) >= self.in_flight:
            self._wait(next(iter(self.running)))
        result = op.results[0]
        handle = Value(self.namer(f"{result.name}_start"), result.type)
        self.out.append(replace(op, attrs={**op.attrs, "async": True}, results=(handle,)))
        self.running[result.name] = Op("wait", (handle,), (result,), loc=op.loc)
        if op.name in _GROWING:
            self.ahead.add(result.name)

    def _wait(self, name: str) -> None:
        self.out.append(self.running.pop(name))
        self.there.add(name)
        self._flush()

    def _flush(self) -> None:
        """Emit the deferred updates whose operands are there."""
        deferred, self.deferred = self.deferred, []
        for op in deferred:
            if all(value.name in self.there for value in op.operands):
                self._emit(op)
            else:
                self.deferred.append(op)

    def _need(self, op: Op) -> None:
        """Make the operands of an op readable: wait for them, run deferred updates."""
        for value in op.operands:
            if value.name in self.running:
                self._wait(value.name)
            elif value.name not in self.there:
                late = next(u for u in self.deferred if value in u.results)
                self._need(late)
                self._flush()
            self.ahead.discard(value.name)

    def _emit(self, op: Op) -> None:
        self._need(op)
        self.out.append(op)
        self.there.update(value.name for value in op.results)


def update_in_place(function: Function, ops: Sequence[Op], kernels: Views) -> list[Op]:
    """Mark the optimizer updates that may overwrite their state.

    The state must be entry parameters which the results replace, nothing may read them (or a view
    of them, or an unfinished collective on them) afterwards, and no result may be the old state.
    """
    roots = aliases(function, ops, kernels)
    replaced = {
        value.name: attrs["updates"]
        for value, attrs in zip(function.results, function.result_attrs, strict=True)
        if "updates" in attrs
    }
    none: frozenset[str] = frozenset()
    busy = {root for value in function.results for root in roots.get(value.name, ())}
    out: list[Op] = []
    for op in reversed(ops):
        if op.name in _STATELESS:
            states = [value.name for value in _state_operands(op)]
            read = none.union(*(roots.get(op.operands[i].name, none) for i in _STATELESS[op.name]))
            distinct = len(set(states)) == len(states)
            free = distinct and not any(state in busy or state in read for state in states)
            pairs = zip(states, op.results, strict=True)
            if free and all(replaced.get(result.name) == state for state, result in pairs):
                op = replace(op, attrs={**op.attrs, "inplace": True})
        for value in op.operands:
            busy |= roots.get(value.name, none)
        out.append(op)
    return out[::-1]


def add_frees(function: Function, ops: Sequence[Op]) -> list[Op]:
    """A `free` behind the last use of each value but parameters and results.

    The operand of a collective is in use until its `wait`.
    """
    kept = {value.name for value in (*function.params, *function.results)}
    source = {op.results[0].name: op.operands for op in ops if op.attrs.get("async")}
    out: list[Op] = []
    for op in reversed(ops):
        touched = op.operands + op.results
        if op.name == "wait":
            touched = (*op.operands, *source[op.operands[0].name], *op.results)
        last = [value for value in dict.fromkeys(touched) if value.name not in kept]
        if last:
            kept.update(value.name for value in last)
            out.append(Op("free", tuple(last), (), loc=op.loc))
        out.append(op)
    return out[::-1]
