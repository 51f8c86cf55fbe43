"""Optimizers that the IR has no update op for: their own `step()` is traced, state and all.

While it runs, states and learning rates are buffers of what is exported, so that a plan takes and
updates them; numbers in the state (a count of steps) are tensors. First values of the state are seen
by letting the optimizer step once on a copy of each parameter.
"""

from __future__ import annotations

import inspect
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..ir.errors import CompileError
from ..ir.verify import user_span

#: settings that choose between equal ways to compute; these are the ones that can be traced
_WAYS = {"foreach": False, "fused": False, "capturable": True, "differentiable": False}
#: functions of Python's numbers that optimizers call on what is a tensor here
_MATH: dict[str, Callable[..., Tensor]] = {"sqrt": torch.sqrt, "exp": torch.exp, "log": torch.log}
Key = tuple[str, str]  #: (name of the state, name of the parameter)


class _FirstValues(dict[str, Any]):
    """The state of one parameter, which remembers the first value of each entry."""

    def __init__(self, first: dict[str, Any]) -> None:
        super().__init__()
        self.first = first

    def __setitem__(self, key: str, value: Any) -> None:
        if key not in self:
            self.first[key] = value.clone() if isinstance(value, torch.Tensor) else value
        super().__setitem__(key, value)

    def setdefault(self, key: str, default: Any = None) -> Any:
        """As that of a dict."""
        if key not in self:
            self[key] = default
        return self[key]

    def update(self, *args: Any, **kwargs: Any) -> None:
        """As that of a dict."""
        for key, value in dict(*args, **kwargs).items():
            self[key] = value


class _Numbers(TorchFunctionMode):
    """Numbers are tensors of no dims: `.item()` leaves them as they are."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Call `func`, unless it reads a number."""
        if func is torch.Tensor.item:
            return args[0]
        return func(*args, **(kwargs or {}))


@dataclass
class TracedOptimizer:
    """An optimizer's step as a part of the traced program.

    Attributes:
        optimizer: the user's.
        names: name of each parameter of the model by `id`.
        alive: the parameters that get gradients; torch leaves those of others None.
        holder: carries states and rates as buffers.
        buffers: name of each buffer of `holder` -> the entry's name for it.
        numbers: states that are numbers of Python, with their type.
    """

    optimizer: torch.optim.Optimizer
    names: Mapping[int, str]
    alive: frozenset[str]
    holder: torch.nn.Module = field(default_factory=torch.nn.Module)
    buffers: dict[str, str] = field(default_factory=dict)
    numbers: dict[str, str] = field(default_factory=dict)
    _states: dict[Key, str] = field(default_factory=dict)
    _constants: dict[Key, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for number, group in enumerate(self.optimizer.param_groups):
            self._add(f"lr.{number}", torch.tensor(float(group["lr"]), dtype=torch.float64))
            for parameter in group["params"]:
                name = self.names[id(parameter)]
                if name in self.alive:
                    for kind, value in self._first_state(group, parameter).items():
                        self._add_state(kind, name, value)

    def _add(self, name: str, tensor: Tensor) -> str:
        attribute = f"b{len(self.buffers)}"
        self.holder.register_buffer(attribute, tensor)
        self.buffers[attribute] = name
        return attribute

    def _add_state(self, kind: str, name: str, value: Any) -> None:
        full = f"{kind}/{name}"
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            self.numbers[full] = type(value).__name__
            value = torch.tensor(value, dtype=torch.float64)
        if isinstance(value, torch.Tensor):
            self._states[kind, name] = self._add(full, value.detach())
        elif value is None or isinstance(value, (bool, str)):
            self._constants[kind, name] = value
        else:
            raise self._unsupported(f"its state {kind!r} is a {type(value).__name__}")

    @property
    def roles(self) -> dict[str, str]:
        """The role of each buffer, by the entry's names."""
        return {name: "lr" if name.startswith("lr.") else "state" for name in self.buffers.values()}

    # -- first values -------------------------------------------------------------------------

    def _first_state(self, group: Mapping[str, Any], parameter: Tensor) -> Mapping[str, Any]:
        known: Mapping[str, Any] = self.optimizer.state.get(parameter, {})
        if known:
            return known
        first, other = (self._stepped_once(group, parameter, seed) for seed in (0, 1))
        for key, value in first.items():
            if isinstance(value, torch.Tensor) and not value.is_meta and (
                not torch.equal(value, other[key])
            ):  # fmt: skip
                raise self._unsupported(f"the first value of its state {key!r} is made from gradients")
        return first

    def _stepped_once(
        self, group: Mapping[str, Any], parameter: Tensor, seed: int
    ) -> dict[str, Any]:
        """The first values of a parameter's state, from a step on a copy of it."""
        copy = parameter.detach().clone().requires_grad_()
        made = torch.Generator().manual_seed(seed)
        noise = torch.randn(copy.shape, generator=made).to(copy)
        copy.grad = noise
        first: dict[str, Any] = {}
        with self._instead([{**group, "params": [copy]}], lambda: _FirstValues(first)):
            self._step()
        return first

    @contextmanager
    def _instead(
        self, groups: list[dict[str, Any]], state: Callable[[], dict[str, Any]]
    ) -> Iterator[None]:
        own = vars(self.optimizer)
        kept = dict(own)
        own.update(param_groups=groups, state=defaultdict(state))
        try:
            yield
            changed = [key for key, value in own.items() if key not in ("param_groups", "state")
                       and not key.startswith("_") and kept.get(key) is not value]  # fmt: skip
            if changed:
                raise self._unsupported(f"its step changes its attribute {changed[0]!r}")
        finally:
            own.clear()
            own.update(kept)

    def _step(self) -> None:
        step: Callable[..., Any] = type(self.optimizer).step
        inner = getattr(step, "__wrapped__", step)  # without torch's profiling hook
        with torch.no_grad():
            inner(self.optimizer)

    # -- tracing ------------------------------------------------------------------------------

    def trace(self, parameters: Sequence[tuple[str, Tensor]]) -> None:
        """Run the step on the parameters as the trace sees them, with their gradients."""
        by_name = dict(parameters)
        buffers = dict(self.holder.named_buffers())
        groups = []
        for number, group in enumerate(self.optimizer.param_groups):
            named = [self.names[id(p)] for p in group["params"]]
            settings = {key: _WAYS[key] for key in group if key in _WAYS}
            inside = [by_name[name] for name in named if name in self.alive and name in by_name]
            groups.append({**group, **settings, "lr": buffers[f"b{self._rate(number)}"],
                           "params": inside})  # fmt: skip
        before = [dict(group) for group in groups]
        state = {id(by_name[name]): name for name in by_name}
        with self._instead(groups, dict), ExitStack() as stack:
            for (kind, name), attribute in self._states.items():
                self.optimizer.state[by_name[name]][kind] = buffers[attribute]
            for (kind, name), value in self._constants.items():
                self.optimizer.state[by_name[name]][kind] = value
            for function, stand_in in _MATH.items():
                stack.enter_context(patch.object(math, function, _either(function, stand_in)))
            stack.enter_context(_Numbers())
            self._step()
            self._keep({state[id(p)]: held for p, held in self.optimizer.state.items()}, buffers)
        for old, new in zip(before, groups, strict=True):
            if any(new[key] is not value for key, value in old.items()):
                raise self._unsupported("its step changes its parameter groups")

    def _rate(self, number: int) -> int:
        return list(self.buffers.values()).index(f"lr.{number}")

    def _keep(self, states: Mapping[str, Mapping[str, Any]], buffers: Mapping[str, Tensor]) -> None:
        """Write states that the step replaced into their buffers."""
        for name, held in states.items():
            for kind, value in held.items():
                if (kind, name) in self._constants:
                    if value is not self._constants[kind, name]:
                        raise self._unsupported(f"its state {kind!r} becomes another kind of thing")
                    continue
                if (kind, name) not in self._states:
                    raise self._unsupported(f"its state {kind!r} appears after the first step")
                buffer = buffers[self._states[kind, name]]
                if value is not buffer:
                    buffer.copy_(torch.as_tensor(value))

    def _unsupported(self, reason: str) -> CompileError:
        step = inspect.unwrap(type(self.optimizer).step).__code__
        return CompileError(
            "W0303", f"optimizer {type(self.optimizer).__name__} is not supported", reason=reason,
            span=user_span(step.co_filename, step.co_firstlineno),
            hint="keep tensors and numbers in `state[parameter]`, made before the first update, and "
            "nothing elsewhere; or use an optimizer of torch.optim",
        )  # fmt: skip


def _either(name: str, of_tensor: Callable[..., Tensor]) -> Callable[[Any], Any]:
    of_number = getattr(math, name)
    return lambda x: of_tensor(x) if isinstance(x, torch.Tensor) else of_number(x)
