"""Calls that torch.export cannot trace, or traces as one opaque operator, written in others.

* `x.data`, read or assigned: a detached view, a copy in place;
* `torch._foreach_...`: the operator for each tensor, which the IR knows;
* numbers that are tensors while a program is traced (`x.add_(y, alpha=-lr)`): products.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_DATA = torch.Tensor.data.__get__  # type: ignore[attr-defined]
_SET_DATA = torch.Tensor.data.__set__  # type: ignore[attr-defined]
_FOREACH = "_foreach_"
#: names of operators for one tensor that differ from those for lists
_SINGLE: dict[str, Callable[..., Tensor]] = {
    "norm": lambda x, ord=2, dtype=None: torch.linalg.vector_norm(x, ord, dtype=dtype),
    "zero": lambda x: torch.zeros_like(x),
    "maximum": lambda x, y: x.clamp_min(y),
    "minimum": lambda x, y: x.clamp_max(y),
}
#: arguments that scale an operator's last step
_FACTORS = ("alpha", "value")


class Rewrites(TorchFunctionMode):
    """Active while the user's program runs for tracing."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Call `func`, or what it means."""
        kwargs = kwargs or {}
        if func == _DATA:
            return args[0].detach()
        if func == _SET_DATA:
            return _assign(args[0], args[1])
        name = getattr(func, "__name__", "")
        if name.startswith(_FOREACH):
            return _each(name.removeprefix(_FOREACH), args, kwargs)
        if any(isinstance(kwargs.get(key), Tensor) for key in _FACTORS):
            found = _scaled(name, args, kwargs)
            if found is not None:
                return found
        return func(*args, **kwargs)


def _assign(target: Tensor, value: Tensor) -> None:
    with torch.no_grad():
        target.detach().copy_(value)


def _each(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor] | None:
    """An operator over lists of tensors, tensor by tensor; in place where its name says so."""
    inplace, base = name.endswith("_"), name.rstrip("_")
    tensors: Sequence[Tensor] = args[0]

    def pick(value: Any, index: int) -> Any:
        return value[index] if isinstance(value, (list, tuple)) else value

    single = _SINGLE.get(base) or getattr(torch.Tensor, base)
    if base in ("maximum", "minimum") and isinstance(pick(args[1], 0), Tensor):
        single = getattr(torch, base)
    made = []
    for index, tensor in enumerate(tensors):
        rest = [pick(arg, index) for arg in args[1:]]
        named = {key: pick(arg, index) for key, arg in kwargs.items()}
        if base in ("addcdiv", "addcmul") and len(rest) == 3:
            named["value"] = rest.pop()
        if base == "copy":
            made.append(rest[0])
            continue
        made.append(single(tensor, *rest, **named))
    if not inplace:
        return made
    for tensor, value in zip(tensors, made, strict=True):
        tensor.copy_(value)
    return None


def _scaled(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """`add`, `sub`, `addcmul`, `addcdiv` with a factor that is a tensor; None for others."""
    x, *rest = args
    base = name.rstrip("_")
    if base in ("add", "sub"):
        term = rest[0] * kwargs["alpha"]
    elif base == "addcmul":
        term = rest[0] * rest[1] * kwargs["value"]
    elif base == "addcdiv":
        term = rest[0] / rest[1] * kwargs["value"]
    else:
        return None
    inplace = name.endswith("_")
    change = (x.sub_ if inplace else x.sub) if base == "sub" else (x.add_ if inplace else x.add)
    made: Tensor = change(term)
    return made
