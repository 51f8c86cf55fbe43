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

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .observe import Observed, Observer, Snapshots, Unknown

#: calls of a class that were recorded and never came again, after which it is left alone
_PATIENCE = 6
#: torch's own names, most of which it has not typed
_torch: Any = torch
_LIBRARY = _torch.library.Library("weft", "FRAGMENT")
_NUMBERS = itertools.count()
#: number of an operator that stands for a block -> what it returns
_RESULTS: dict[int, Sequence[Tensor]] = {}
#: hooks of modules that run when one is called, or when autograd runs
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
#: leaves of arguments and results that are data
_CONSTANTS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device,
              torch.layout, torch.memory_format)  # fmt: skip


def _like(tensor: Tensor) -> Tensor:
    return torch.empty_strided(
        tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
    )


def _same(tensors: Sequence[Tensor], *rest: Any) -> list[Tensor]:
    return [_like(tensor) for tensor in tensors]


def _results(tensors: Sequence[Tensor], state: Sequence[Tensor], number: int) -> list[Tensor]:
    return [_like(tensor) for tensor in _RESULTS[number]]


def _define(name: str, arguments: str, fake: Callable[..., Any]) -> Any:
    _LIBRARY.define(f"{name}({arguments}) -> Tensor[]")
    _LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"weft::{name}", fake, lib=_LIBRARY)
    op = getattr(torch.ops.weft, name).default
    torch.fx.node.has_side_effect(op)  # kept in graphs: their places say what belongs to a block
    return op


OPEN = _define("block_open", "Tensor[] args, Tensor[] state, int number", _same)
CLOSE = _define("block_close", "Tensor[] results, Tensor[] state, int number", _same)
AGAIN = _define("block_again", "Tensor[] args, Tensor[] state, int number", _results)


@dataclass(frozen=True)
class Tree:
    """A module and all below it, as it is now.

    Attributes:
        modules: the modules by their path below it, its own path empty.
        attributes: (path, name of an attribute) -> snapshot, None where that is unknown.
        state: the distinct parameters and buffers, in order.
    """

    modules: Mapping[str, nn.Module]
    attributes: Mapping[tuple[str, str], Any]
    state: Sequence[Tensor]


@dataclass(frozen=True)
class Call:
    """The arguments of a call.

    Attributes:
        form: what is left of them without their tensors, and the form of those.
        tensors: the distinct tensors among them.
        build: the arguments with other tensors.
    """

    form: Any
    tensors: Sequence[Tensor]
    build: Callable[[Sequence[Any]], Any]


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
        if self.form != call.form or self.modes != _modes() or mine.keys() != other.keys():
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
            _RESULTS.pop(number, None)

    def _call(
        self, original: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any
    ) -> Any:
        with torch._C.DisableTorchFunction():  # what is asked of tensors here is no part of a trace
            call = _taken((args, kwargs))
            hooked = _torch.nn.modules.module._has_any_global_hook()
            tree = None if call is None or hooked else self._tree(module)
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
        number = next(_NUMBERS)
        _RESULTS[number] = record.made
        self.agains[number] = Again(record, self._paths[id(module)])
        for observed in self._observer.active:
            observed.reads |= {(id(tree.modules[path]), name) for path, name in record.reads}
            observed.include(record.seen)
        made = _marked(AGAIN, call.tensors, tree.state, number, record.made)
        return record.build(_picked(record.results, call.tensors, tree.state, made))

    def _record(
        self, original: Callable[..., Any], module: nn.Module, call: Call, tree: Tree
    ) -> Any:
        number, kind, modes = next(_NUMBERS), type(module), _modes()
        versions = [tensor._version for tensor in (*call.tensors, *tree.state)]
        given = _marked(OPEN, call.tensors, tree.state, number, call.tensors)
        changed = frozenset(i for i, tensor in enumerate(call.tensors) if tensor._version)
        self.opened[number] = Opened(kind, changed)
        self._copies += [(kind, tensor, tensor._version) for tensor in given]
        args, kwargs = call.build(given)
        with self._observer.observing({type(m) for m in tree.modules.values()}) as seen:
            out = original(module, *args, **kwargs)
        now = self._tree(module)
        later = _taken((args, kwargs))
        unchanged = (
            now is not None and now.attributes == tree.attributes and None not in
            [tree.attributes[at] for at in _plain_reads(tree, seen)]
            and versions == [tensor._version for tensor in (*call.tensors, *tree.state)]
            and later is not None and later.form == call.form and modes == _modes()
        )  # fmt: skip
        result = _taken(out)
        inside = {id(m): path for path, m in tree.modules.items()}
        inward = all(where in inside for where, _ in seen.reads)
        if result is None:
            return out
        sources, made = _sources(result.tensors, given, tree.state)
        if any(tensor._version for tensor in made):
            return out  # a copy would hide from torch that views of it have to follow
        closed = _marked(CLOSE, made, (), number, made) if made else []
        if made and unchanged and inward and seen.holds():
            reads = frozenset((inside[where], name) for where, name in seen.reads)
            self.records[number] = Record(
                number, self._paths[id(module)], kind, call.form, modes, tree, reads, seen,
                sources, made, result.build,
            )  # fmt: skip
        return result.build(_picked(sources, call.tensors, tree.state, closed))

    def _tree(self, module: nn.Module) -> Tree | None:
        """None for modules with hooks, or that are traced under another path."""
        modules: dict[str, nn.Module] = {}
        _walk(module, "", modules)
        own = self._paths.get(id(module))
        prefix = f"{own}." if own else ""
        for path, inner in modules.items():
            if own is None or self._paths.get(id(inner)) != (f"{prefix}{path}" if path else own):
                return None
        names = {id(inner): path for path, inner in reversed(modules.items())}
        attributes: dict[tuple[str, str], Any] = {}
        state: dict[int, tuple[int, Tensor]] = {}
        for path, inner in modules.items():
            held = _held(inner)
            if any(held.get(hooks) for hooks in _HOOKS):
                return None
            attributes[path, "type"] = type(inner)
            for name, value in held.items():
                if name in ("_parameters", "_buffers"):
                    for key, tensor in value.items():
                        attributes[path, f"{name}.{key}"] = _form(tensor, state)
                else:
                    attributes[path, name] = _snapshot(value, names)
        return Tree(modules, attributes, [tensor for _, tensor in state.values()])


def _held(module: nn.Module) -> dict[str, Any]:
    # past `__getattribute__`, which records what the program reads
    held: dict[str, Any] = object.__getattribute__(module, "__dict__")
    return held


def _walk(module: nn.Module, path: str, found: dict[str, nn.Module]) -> None:
    found[path] = module
    for name, child in _held(module)["_modules"].items():
        if child is not None:
            _walk(child, f"{path}.{name}" if path else name, found)


def _is_own(name: str) -> bool:
    """Is this an attribute of the user's, which may differ where it is not read?"""
    return name != "type" and not name.startswith(("_parameters", "_buffers", "_modules"))


def _plain_reads(tree: Tree, seen: Observed) -> Iterator[tuple[str, str]]:
    names = {id(module): path for path, module in tree.modules.items()}
    for where, name in seen.reads:
        if where in names and (names[where], name) in tree.attributes:
            yield names[where], name


def _snapshot(value: Any, names: Mapping[int, str]) -> Any:
    try:
        return Snapshots(names).of(value)
    except Unknown:
        return None


def _form(tensor: Any, known: dict[int, tuple[int, Tensor]]) -> Any:
    """What a tensor is, and which of the known ones; it becomes one of those."""
    if tensor is None:
        return ()
    place, _ = known.setdefault(id(tensor), (len(known), tensor))
    return (type(tensor), tensor.shape, tensor.stride(), tensor.dtype, tensor.device,
            tensor.requires_grad, place)  # fmt: skip


def _modes() -> Any:
    """What a program may have set around a call."""
    kinds = ("cpu", "cuda")
    return (
        torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype(),
        tuple((torch.is_autocast_enabled(k), torch.get_autocast_dtype(k)) for k in kinds),
        torch.is_autocast_cache_enabled(), torch.are_deterministic_algorithms_enabled(),
        _torch.backends.cuda.flash_sdp_enabled(), _torch.backends.cuda.math_sdp_enabled(),
        _torch.backends.cuda.mem_efficient_sdp_enabled(),
        tuple(id(mode) for mode in _torch.overrides._get_current_function_mode_stack()),
    )


class _Marked(torch.autograd.Function):
    """A marker's results, with and without gradients as they would be without it."""

    @staticmethod
    def forward(ctx: Any, op: Any, count: int, number: int, wanted: Any, *tensors: Tensor) -> Any:
        made = op(tensors[:count], tensors[count:], number)
        ctx.mark_non_differentiable(*(t for t, is_wanted in zip(made, wanted) if not is_wanted))
        return tuple(made)


#: in place of `_Marked.apply`, which tracing would look into
_apply = torch._C._FunctionBase.__dict__["apply"].__get__(None, _Marked)


def _marked(
    op: Any, tensors: Sequence[Tensor], state: Sequence[Tensor], number: int,
    like: Sequence[Tensor],
) -> tuple[Tensor, ...]:  # fmt: skip
    wanted = [tensor.requires_grad for tensor in like]
    made: tuple[Tensor, ...] = _apply(op, len(tensors), number, wanted, *tensors, *state)
    return made


@dataclass(frozen=True)
class _Place:
    """Where tensor `index` stands in arguments or results."""

    index: int


def _taken(value: Any) -> Call | None:
    """Take the tensors out of arguments or results; None where there is other than plain data."""
    tensors: dict[int, tuple[int, Tensor]] = {}
    try:
        body, form = _take(value, tensors)
    except Unknown:
        return None
    found = [tensor for _, tensor in tensors.values()]
    return Call(form, found, lambda given: _built(body, given))


def _take(value: Any, tensors: dict[int, tuple[int, Tensor]]) -> tuple[Any, Any]:
    if isinstance(value, Tensor):
        if any(isinstance(size, torch.SymInt) for size in value.shape):
            raise Unknown("a size that varies")
        form = _form(value, tensors)
        return _Place(form[-1]), form
    if type(value) in _CONSTANTS:
        return value, (type(value), repr(value))
    if type(value) is dict:
        items = {key: _take(item, tensors) for key, item in value.items() if type(key) is str}
        if len(items) < len(value):
            raise Unknown("keys")
        body: Any = {key: item[0] for key, item in items.items()}
        return body, (dict, tuple((key, item[1]) for key, item in items.items()))
    if type(value) in (tuple, list):
        taken = [_take(item, tensors) for item in value]
        body = type(value)(item[0] for item in taken)
        return body, (type(value), tuple(item[1] for item in taken))
    raise Unknown(type(value).__name__)


def _built(body: Any, tensors: Sequence[Any]) -> Any:
    if isinstance(body, _Place):
        return tensors[body.index]
    if type(body) is dict:
        return {key: _built(item, tensors) for key, item in body.items()}
    if type(body) in (tuple, list):
        return type(body)(_built(item, tensors) for item in body)
    return body


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
