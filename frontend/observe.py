"""What a piece of Python reads while it runs, so that one knows when it would do the same again.

Reads of attributes of modules are recorded one by one. Globals, what closures hold and attributes of
modules outside are watched: their contents, before and after. Contents are compared as *snapshots*,
values without identity that are equal where the objects cannot be told apart. What cannot be seen
through (an open file, a generator) makes the answer "unknown", which is equal to nothing.
"""

from __future__ import annotations

import dis
import enum
import functools
import logging
import random
import re
import sys
import sysconfig
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .locate import is_internal

#: objects of a snapshot at most: more is not worth comparing
_MOST_OBJECTS = 20_000
#: values that are what they print
_PLAIN = (type(None), bool, int, str, bytes, torch.dtype, torch.layout, torch.memory_format,
          torch.device, enum.Enum, type(Ellipsis), type(NotImplemented), slice)  # fmt: skip
#: objects that are told apart by identity: code, or state that a computation does not read
_FIXED = (type, types.ModuleType, types.BuiltinFunctionType, types.WrapperDescriptorType,
          types.MethodDescriptorType, types.GetSetDescriptorType, types.CodeType,
          functools._lru_cache_wrapper, logging.Logger, re.Pattern,
          torch._ops.OpOverload, torch._ops.OpOverloadPacket, torch._C.ScriptFunction)  # fmt: skip
#: their functions have classes of their own
_LIBRARIES = ("builtins", "numpy", "torch")
_STDLIB = f"{sysconfig.get_paths()['stdlib']}/"
_SITE = ("/site-packages/", "/dist-packages/")
_MODULE_FILE = str(Path(nn.__file__).parent / "modules" / "module.py")


class Unknown(Exception):
    """An object that a snapshot cannot see through."""


class Snapshots:
    """Makes snapshots; objects that occur twice in one are told from equal ones."""

    def __init__(self, names: Mapping[int, str] | None = None) -> None:
        self.names = names or {}  #: modules that are known by a name, in place of their identity
        self._known: dict[int, int] = {}
        self._kept: list[Any] = []  # an identity holds for as long as its object lives

    def of(self, value: Any) -> Any:
        """A snapshot of a value. Raises Unknown."""
        if isinstance(value, _PLAIN):
            return type(value), str(value)
        if isinstance(value, (float, complex)):
            return type(value), repr(value)
        if isinstance(value, _FIXED):
            return type(value), id(value)
        if isinstance(value, ContextVar):
            return ContextVar, id(value), self.of(value.get(None))
        if isinstance(value, nn.Module):
            return nn.Module, self.names.get(id(value), id(value))
        if isinstance(value, Tensor):
            return Tensor, id(value), value._version
        if id(value) in self._known:
            return "again", self._known[id(value)]
        self._known[id(value)] = len(self._known)
        self._kept.append(value)
        if len(self._known) > _MOST_OBJECTS:
            raise Unknown("too many objects")
        return self._parts(value)

    def _parts(self, value: Any) -> Any:
        kind = type(value)
        if isinstance(value, types.MethodType):
            return kind, self.of(value.__func__), self.of(value.__self__)
        if isinstance(value, types.FunctionType):
            cells = [self.of(cell.cell_contents) for cell in value.__closure__ or ()
                     if _is_full(cell)]  # fmt: skip
            held = (value.__defaults__, value.__kwdefaults__, value.__dict__)
            return kind, id(value.__code__), tuple(cells), self.of(held)
        if isinstance(value, functools.partial):
            return kind, self.of((value.func, value.args, value.keywords))
        if isinstance(value, (staticmethod, classmethod)):
            return kind, self.of(value.__func__)
        content: Any = ()
        if isinstance(value, dict):
            content = tuple((self.of(k), self.of(v)) for k, v in dict.items(value))
        elif isinstance(value, (list, tuple)):
            content = tuple(map(self.of, value))
        elif isinstance(value, (set, frozenset)):
            content = frozenset(map(self.of, value))
        elif callable(value) and kind.__module__.partition(".")[0] in _LIBRARIES:
            return kind, id(value)
        elif not _is_python(kind):
            raise Unknown(kind.__name__)
        slots = [name for cls in kind.__mro__ for name in _slots(cls) if hasattr(value, name)]
        own = getattr(value, "__dict__", {})
        return (
            kind, content, tuple((n, self.of(getattr(value, n))) for n in slots),
            tuple((n, self.of(v)) for n, v in own.items()),
        )  # fmt: skip


def _is_full(cell: Any) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:  # a variable that is not assigned yet
        return False


def _is_python(kind: type) -> bool:
    """Is all that objects of a class hold in their `__dict__` and `__slots__`?"""
    return all(
        cls is object or "__module__" in vars(cls) and cls.__flags__ & _HEAP_TYPE
        for cls in kind.__mro__
    ) and kind.__basicsize__ <= _PLAIN_SIZE + 8 * sum(len(_slots(c)) for c in kind.__mro__)  # fmt: skip


class _Empty:
    pass


#: Py_TPFLAGS_HEAPTYPE: made by a class statement (or by an extension, which is then larger)
_HEAP_TYPE = 1 << 9
_PLAIN_SIZE = _Empty.__basicsize__


def _slots(cls: type) -> Sequence[str]:
    slots = vars(cls).get("__slots__", ())
    names = (slots,) if isinstance(slots, str) else tuple(slots)
    mangled = (f"_{cls.__name__.lstrip('_')}{n}" if n.startswith("__") and not n.endswith("__") else n
               for n in names)  # fmt: skip
    return [name for name in mangled if name not in ("__dict__", "__weakref__")]


def snapshot(value: Any) -> Any:
    """A snapshot of one value. Raises Unknown."""
    return Snapshots().of(value)


@dataclass
class Observed:
    """What a run of Python has read so far.

    Attributes:
        reads: (identity of a module, name of an attribute); the name is empty for all of them.
        unknown: why it cannot be told when the run would do the same again; empty where it can.
    """

    reads: set[tuple[int, str]] = field(default_factory=set)
    unknown: str = ""
    _watched: dict[Any, tuple[Callable[[], Any], Any]] = field(default_factory=dict)

    def watch(self, key: Any, get: Callable[[], Any]) -> None:
        """Compare what `get` returns now with what it will return later."""
        if key in self._watched or self.unknown:
            return
        try:
            self._watched[key] = get, snapshot(get())
        except Unknown as reason:
            self.unknown = str(reason)

    def holds(self) -> bool:
        """Is all that is watched as it was when it was first read?"""
        try:
            return not self.unknown and all(
                snapshot(get()) == before for get, before in self._watched.values()
            )
        except Unknown:
            return False

    def include(self, other: Observed) -> None:
        """Add what another run has read outside of modules."""
        self._watched.update({k: v for k, v in other._watched.items() if k not in self._watched})
        self.unknown = self.unknown or other.unknown


class Observer:
    """Watches what runs, for as many runs inside each other as there are."""

    def __init__(self) -> None:
        self.active: list[Observed] = []
        self._codes: dict[Any, list[tuple[Any, Callable[[], Any]]]] = {}

    @contextmanager
    def observing(self, kinds: Iterable[type] = ()) -> Iterator[Observed]:
        """Record what is read meanwhile, by methods of these classes too."""
        made = Observed()
        for kind in kinds:
            for key, get in _members(kind):
                made.watch(key, get)
        made.watch("random", random.getstate)
        if "numpy" in sys.modules:
            numpy_random = sys.modules["numpy"].random
            made.watch("numpy", lambda: _numbers(numpy_random.get_state()))
        self.active.append(made)
        with self._installed() if len(self.active) == 1 else _nothing():
            try:
                yield made
            finally:
                self.active.remove(made)

    @contextmanager
    def _installed(self) -> Iterator[None]:
        def read(module: nn.Module, name: str) -> Any:
            self._read(module, name)
            return object.__getattribute__(module, name)

        profile = sys.getprofile()
        nn.Module.__getattribute__ = read  # type: ignore[method-assign, assignment]
        sys.setprofile(self._called)
        try:
            yield
        finally:
            _set_profile(profile)
            del nn.Module.__getattribute__

    def _read(self, module: nn.Module, name: str) -> None:
        reader = sys._getframe(2).f_code.co_filename
        if reader == __file__:
            return
        if name == "__dict__":
            if reader == _MODULE_FILE:
                return  # how modules look up their own attributes
            name = ""
        for observed in self.active:
            observed.reads.add((id(module), name))

    def _called(self, frame: types.FrameType, event: str, arg: Any) -> None:
        if event != "call":
            return
        code = frame.f_code
        found = self._codes.get(code)
        if found is None:
            found = self._codes[code] = [] if _is_fixed(code.co_filename) else _globals(frame)
        for observed in self.active:
            for key, get in found:
                observed.watch(key, get)
        if code.co_freevars and not _is_fixed(code.co_filename):
            self._closure(frame)

    def _closure(self, frame: types.FrameType) -> None:
        code, values = frame.f_code, frame.f_locals
        for observed in self.active:
            if _rebinds(code):
                observed.unknown = f"{code.co_name} assigns variables of the function around it"
            for name in code.co_freevars:
                if name in values:
                    value = values[name]
                    observed.watch((id(value), name), functools.partial(_same, value))


def _same(value: Any) -> Any:
    return value


def _set_profile(profile: Any) -> None:
    if profile is None or callable(profile):
        sys.setprofile(profile)
    else:
        sys.setprofile(None)
        profile.enable()  # cProfile gives itself


def _numbers(state: Sequence[Any]) -> list[Any]:
    """The state of numpy's generator in plain data: (name, array, position, ...)."""
    return [part if isinstance(part, (str, int, float)) else part.tobytes() for part in state]


@contextmanager
def _nothing() -> Iterator[None]:
    yield


@functools.lru_cache(maxsize=4096)
def _is_fixed(file: str) -> bool:
    """Is a file part of torch, of weft's tracing or of Python, whose variables do not matter?"""
    return is_internal(file) or (file.startswith(_STDLIB) and not any(s in file for s in _SITE))


@functools.lru_cache(maxsize=4096)
def _rebinds(code: types.CodeType) -> bool:
    return any(
        i.opname in ("STORE_DEREF", "DELETE_DEREF") and i.argval in code.co_freevars
        for i in dis.get_instructions(code)
    )


def _globals(frame: types.FrameType) -> list[tuple[Any, Callable[[], Any]]]:
    """Globals that a function names, and what it may name of modules and classes among them."""
    found: list[tuple[Any, Callable[[], Any]]] = []
    space, names = frame.f_globals, frame.f_code.co_names
    for name in names:
        if name not in space:
            continue
        value = space[name]
        found.append(((id(space), name), functools.partial(space.get, name)))
        if isinstance(value, (types.ModuleType, type)) and not _is_fixed(_file_of(value)):
            for inner in names:
                if not isinstance(vars(value).get(inner, _same), _CODE):
                    get = functools.partial(_item, vars(value), inner)
                    found.append(((id(value), inner), get))
    return found


def _members(kind: type) -> list[tuple[Any, Callable[[], Any]]]:
    """What a class and the user's classes above it hold besides code."""
    return [
        ((id(cls), name), functools.partial(_item, vars(cls), name))
        for cls in kind.__mro__ if not _is_fixed(_file_of(cls))
        for name, value in vars(cls).items()
        if not (name.startswith("__") or name == "_abc_impl" or isinstance(value, _CODE))
    ]  # fmt: skip


#: members of modules and classes that are code
_CODE = (types.FunctionType, type, types.ModuleType, property, staticmethod, classmethod,
         functools.cached_property, functools.partialmethod, types.MemberDescriptorType)  # fmt: skip


def _item(space: Mapping[str, Any], name: str) -> Any:
    return space.get(name)


def _file_of(value: Any) -> str:
    module = value if isinstance(value, types.ModuleType) else sys.modules.get(value.__module__)
    return str(getattr(module, "__file__", None) or "<builtin>")
