"""The forms that state has in torch, and between them.

Names are the user's. Three forms are understood:

* one flat dict, as weft's checkpoints have it: `layers.0.weight`, `exp_avg/layers.0.weight`, `step`;
* the dict of `model.state_dict()`;
* the dict of an optimizer with names in place of numbers, as
  `torch.distributed.checkpoint.state_dict.get_optimizer_state_dict` gives it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from .optimizers import UNCOUNTED

_NUMBERS: dict[str, Callable[[Tensor], Any]] = {"int": int, "float": float}


def canonical_names(model: torch.nn.Module) -> dict[str, str]:
    """Each name of `model.state_dict()` -> the name that a plan has for the tensor.

    A tensor with several names has its first one, parameters before buffers.
    """
    first: dict[int, str] = {}
    names: dict[str, str] = {}
    tables = (
        model.named_parameters(remove_duplicate=False),
        model.named_buffers(remove_duplicate=False),
    )
    for table in tables:
        for name, tensor in table:
            names[name] = first.setdefault(id(tensor), name)
    return {name: names[name] for name in model.state_dict() if name in names}


def optimizer_state(
    flat: Mapping[str, Tensor],
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    numbers: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Any]:
    """An optimizer's state by parameter names, from the flat form.

    Args:
        numbers: states that are numbers of Python, with their type.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    state: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        kind, slash, name = key.partition("/")
        if slash:
            number = _NUMBERS.get(numbers.get(key, ""))
            state.setdefault(name, {})[kind] = value if number is None else number(value)
    for kept in state.values():
        if "step" in flat and not set(kept) <= UNCOUNTED:
            step = flat["step"]
            kept["step"] = step.to(torch.float32, copy=True)
    groups = [
        {**{key: value for key, value in group.items() if key != "params"},
         "params": [names[id(p)] for p in group["params"]]}
        for group in optimizer.param_groups
    ]  # fmt: skip
    return {"state": state, "param_groups": groups}


def flat_state(
    nested: Mapping[str, Any], names: list[str], types: Mapping[str, Any] = MappingProxyType({})
) -> dict[str, Tensor]:
    """The flat form of an optimizer's state, by names or by numbers.

    Args:
        names: names of the optimizer's parameters, in its order.
        types: what the plan holds; it may count steps, or keep numbers, for each parameter.
    """
    flat: dict[str, Tensor] = {}
    steps = [0.0]
    for key, kept in nested.get("state", {}).items():
        name = names[key] if isinstance(key, int) else key
        for kind, value in kept.items():
            if f"{kind}/{name}" in types and isinstance(value, (int, float)):
                flat[f"{kind}/{name}"] = torch.tensor(value, dtype=torch.float64)
            elif kind == "step" and f"step/{name}" not in types:
                steps.append(float(whole(torch.as_tensor(value))))
            elif isinstance(value, torch.Tensor):
                flat[f"{kind}/{name}"] = whole(value)
    if flat and ("step" in types or not types):
        flat["step"] = torch.tensor(max(*steps, 1.0), dtype=torch.float64)
    return flat


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor of a DTensor (all ranks must call); others as they are."""
    gather: Callable[[], Tensor] | None = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def parameter_order(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Names of an optimizer's parameters, in its order."""
    names = {id(p): name for name, p in model.named_parameters()}
    return [names.get(id(p), "") for group in optimizer.param_groups for p in group["params"]]
