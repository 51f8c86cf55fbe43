"""Repeated modules, traced once: a model of eighty equal layers runs the Python of one.

While a program is traced, the first call of a module whose class occurs again is *recorded*: what its
Python reads, and by two markers which ops of the graph are its own. A later call with arguments of
the same form, of a module that is equal in all that the first one read, does not run; one operator
stands for it. `repeats_graph.py` then writes the recorded ops in its place.

    layer 0:  x' = block_open(x, weights)    ...ops on x' and weights...    y = block_close(y')
    layer 1:  y = block_again(x, weights)

What cannot be known to repeat is traced as ever: hooks, changed attributes, buffers, globals and
arguments, random numbers of Python, arguments that are not plain data. What shows only in the graph
(a tensor that leaves or enters a block by another way) is found there; then all is traced again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .observe import Observed, Observer
from .repeats_forms import Call, Tree, modes_now, taken, tree_of
from .repeats_markers import AGAIN, CLOSE, NUMBERS, OPEN, RESULTS, marked

#: calls of a class that were recorded and never came again, after which it is left alone
_PATIENCE = 6
#: torch's own names, most of which it has not typed
_torch: Any = torch


@dataclass(frozen=True)
class Record:
    """A call that was traced, and what has to be equal for another to have the same ops.

    Attributes:
        number: of its markers.
        path: of its module.
        reads: (path below the module, attribute), the attribute empty for all of one module.
        results: for each tensor it returns, where it comes from: ("arg" | "state" | "made", index).
        build: what it returns, from those tensors.
    """

    number: int
    path: str
    kind: type
    form: Any
    modes: Any
    tree: Tree
    reads: frozenset[tuple[str, str]]
    seen: Observed
    results: Sequence[tuple[str, int]]
    made: Sequence[Tensor]
    build: Callable[[Sequence[Any]], Any]

    def suits(self, call: Call, tree: Tree) -> bool:
        """Would the call of another module give the same ops?"""
        mine, other = self.tree.attributes, tree.attributes
        if self.form != call.form or self.modes != modes_now() or mine.keys() != other.keys():
            return False
        for (path, name), value in mine.items():
            unread = (path, name) not in self.reads and (path, "") not in self.reads
            if (value is None or value != other[path, name]) and not (unread and _is_own(name)):
                return False
        return self.seen.holds()


@dataclass(frozen=True)
class Again:
    """An operator that stands for a block: whose ops, and the path of its own module."""

    record: Record
    path: str


@dataclass(frozen=True)
class Opened:
    """A block's class, and which of its arguments were changed in place before."""

    kind: type
    changed: frozenset[int]


@dataclass
class Repeats:
    """The blocks of one trace.

    Attributes:
        root: what is traced.
        apart: classes whose modules are traced one by one.
        records: number of the markers -> what was recorded.
        agains: number of an operator -> what it stands for.
        opened: number of the markers -> whose they are.
        unfaithful: classes of which a block was found to do what cannot be repeated, too late.
    """

    root: nn.Module
    apart: frozenset[type] = frozenset()
    records: dict[int, Record] = field(default_factory=dict)
    agains: dict[int, Again] = field(default_factory=dict)
    unfaithful: set[type] = field(default_factory=set)
    opened: dict[int, Opened] = field(default_factory=dict)
    _observer: Observer = field(default_factory=Observer)
    _alone: Counter[type] = field(default_factory=Counter)
    _copies: list[tuple[type, Tensor, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        named = list(self.root.named_modules())
        self._paths = {id(module): name for name, module in named}
        kinds = Counter(type(m) for _, m in named if next(m.children(), None) is not None)
        # one object may be called several times
        self._kinds = {kind for kind, count in kinds.items() if count > 1} - self.apart

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Let repeated modules be traced once while the user's program runs."""
        original = nn.Module.__call__

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if type(module) not in self._kinds:
                return original(module, *args, **kwargs)
            return self._call(original, module, args, kwargs)

        nn.Module.__call__ = call  # type: ignore[method-assign]
        try:
            yield
        finally:
            nn.Module.__call__ = original  # type: ignore[method-assign]
        # who changes an argument in place changed a copy of it
        self.unfaithful |= {kind for kind, copy, version in self._copies if copy._version != version}
        self._copies.clear()

    def forget(self) -> None:
        """Drop what the operators of this trace return."""
        for number in self.agains:
            RESULTS.pop(number, None)

    def _call(
        self, original: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any
    ) -> Any:
        with torch._C.DisableTorchFunction():  # what is asked of tensors here is no part of a trace
            call = taken((args, kwargs))
            hooked = _torch.nn.modules.module._has_any_global_hook()
            tree = None if call is None or hooked else tree_of(module, self._paths)
        if call is None or tree is None or not call.tensors:
            return original(module, *args, **kwargs)
        kind = type(module)
        for record in self.records.values():
            if record.kind is kind and record.suits(call, tree):
                self._alone[kind] = -_PATIENCE
                return self._again(record, module, call, tree)
        self._alone[kind] += 1
        if self._alone[kind] > _PATIENCE:
            return original(module, *args, **kwargs)
        return self._record(original, module, call, tree)

    def _again(self, record: Record, module: nn.Module, call: Call, tree: Tree) -> Any:
        number = next(NUMBERS)
        RESULTS[number] = record.made
        self.agains[number] = Again(record, self._paths[id(module)])
        for observed in self._observer.active:
            observed.reads |= {(id(tree.modules[path]), name) for path, name in record.reads}
            observed.include(record.seen)
        made = marked(AGAIN, call.tensors, tree.state, number, record.made)
        return record.build(_picked(record.results, call.tensors, tree.state, made))

    def _record(
        self, original: Callable[..., Any], module: nn.Module, call: Call, tree: Tree
    ) -> Any:
        number, kind, modes = next(NUMBERS), type(module), modes_now()
        versions = [tensor._version for tensor in (*call.tensors, *tree.state)]
        given = marked(OPEN, call.tensors, tree.state, number, call.tensors)
        changed = frozenset(i for i, tensor in enumerate(call.tensors) if tensor._version)
        self.opened[number] = Opened(kind, changed)
        self._copies += [(kind, tensor, tensor._version) for tensor in given]
        args, kwargs = call.build(given)
        with self._observer.observing({type(m) for m in tree.modules.values()}) as seen:
            out = original(module, *args, **kwargs)
        now = tree_of(module, self._paths)
        later = taken((args, kwargs))
        unchanged = (
            now is not None and now.attributes == tree.attributes and None not in
            [tree.attributes[at] for at in _plain_reads(tree, seen)]
            and versions == [tensor._version for tensor in (*call.tensors, *tree.state)]
            and later is not None and later.form == call.form and modes == modes_now()
        )  # fmt: skip
        result = taken(out)
        inside = {id(m): path for path, m in tree.modules.items()}
        inward = all(where in inside for where, _ in seen.reads)
        if result is None:
            return out
        sources, made = _sources(result.tensors, given, tree.state)
        if any(tensor._version for tensor in made):
            return out  # a copy would hide from torch that views of it have to follow
        closed = marked(CLOSE, made, (), number, made) if made else []
        if made and unchanged and inward and seen.holds():
            reads = frozenset((inside[where], name) for where, name in seen.reads)
            self.records[number] = Record(
                number, self._paths[id(module)], kind, call.form, modes, tree, reads, seen,
                sources, made, result.build,
            )  # fmt: skip
        return result.build(_picked(sources, call.tensors, tree.state, closed))

def _is_own(name: str) -> bool:
    """Is this an attribute of the user's, which may differ where it is not read?"""
    return name != "type" and not name.startswith(("_parameters", "_buffers", "_modules"))


def _plain_reads(tree: Tree, seen: Observed) -> Iterator[tuple[str, str]]:
    names = {id(module): path for path, module in tree.modules.items()}
    for where, name in seen.reads:
        if where in names and (names[where], name) in tree.attributes:
            yield names[where], name


def _sources(
    tensors: Sequence[Tensor], given: Sequence[Tensor], state: Sequence[Tensor]
) -> tuple[list[tuple[str, int]], list[Tensor]]:
    """Where results come from, and those that the block makes."""
    known = {id(t): ("state", i) for i, t in enumerate(state)}
    known |= {id(t): ("arg", i) for i, t in enumerate(given)}
    sources: list[tuple[str, int]] = []
    made: list[Tensor] = []
    for tensor in tensors:
        if id(tensor) in known:
            sources.append(known[id(tensor)])
        else:
            sources.append(("made", len(made)))
            made.append(tensor)
    return sources, made


def _picked(
    sources: Sequence[tuple[str, int]], args: Sequence[Tensor], state: Sequence[Tensor],
    made: Sequence[Tensor],
) -> list[Tensor]:  # fmt: skip
    return [{"arg": args, "state": state, "made": made}[kind][i] for kind, i in sources]
