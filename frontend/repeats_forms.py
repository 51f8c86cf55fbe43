"""Modules, arguments and settings in forms that compare: what makes two calls the same program."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .observe import Snapshots, Unknown

#: torch's own names, most of which it has not typed
_torch: Any = torch
#: hooks of modules that run when one is called, or when autograd runs
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
#: leaves of arguments and results that are data
_CONSTANTS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device,
              torch.layout, torch.memory_format)  # fmt: skip


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


def tree_of(module: nn.Module, paths: Mapping[int, str]) -> Tree | None:
    """A module's tree, `paths` by identity; None for hooks, or a module traced under another path."""
    modules: dict[str, nn.Module] = {}
    _walk(module, "", modules)
    own = paths.get(id(module))
    prefix = f"{own}." if own else ""
    for path, inner in modules.items():
        if own is None or paths.get(id(inner)) != (f"{prefix}{path}" if path else own):
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


def modes_now() -> Any:
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


@dataclass(frozen=True)
class _Place:
    """Where tensor `index` stands in arguments or results."""

    index: int


def taken(value: Any) -> Call | None:
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
