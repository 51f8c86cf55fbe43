"""State of a module that every rank holds whole, with that of an optimizer in the user's own loop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..runtime.checkpoint import Checkpoints, open_checkpoint
from ..runtime.checkpoint_whole import WholeState
from .state_forms import canonical_names, flat_state, optimizer_state, parameter_order


def module_state(
    module: torch.nn.Module, optimizer: torch.optim.Optimizer | None
) -> WholeState:
    """The state of a module and an optimizer, under the names that a train step's plan has."""
    own = module.state_dict(keep_vars=True)
    params = {name for name, _ in module.named_parameters()}
    tensors = {plan: own[plan] for plan in dict.fromkeys(canonical_names(module).values())}
    roles = {name: "param" if name in params else "buffer" for name in tensors}
    if optimizer is not None:
        names = parameter_order(module, optimizer)
        states = flat_state(optimizer.state_dict(), names)
        tensors |= states
        roles |= dict.fromkeys(states, "state")
    return WholeState(tensors, roles)


def load_module(
    bound: Callable[[WholeState], Checkpoints],
    module: torch.nn.Module,
    optimizer: torch.optim.Optimizer | None,
    path: str | Path,
    strict: bool,
) -> tuple[int, dict[str, Any]]:
    """Load a checkpoint into a module and an optimizer; its step and what was kept with it."""
    state = module_state(module, None)
    order = [] if optimizer is None else parameter_order(module, optimizer)
    if optimizer is not None:
        fresh = _fresh(module, path, order)
        roles = {**state.state_roles, **dict.fromkeys(fresh, "state")}
        state = WholeState({**state.tensors, **fresh}, roles)
    checkpoints = bound(state)
    step = checkpoints.load(path, strict=strict, order=order)
    if optimizer is not None:
        by_name = dict(module.named_parameters())
        for name, kept in optimizer_state(state.tensors, module, optimizer)["state"].items():
            optimizer.state[by_name[name]].update(kept)
    return step, checkpoints.extra


def _fresh(module: torch.nn.Module, path: str | Path, order: list[str]) -> dict[str, Tensor]:
    """Room for the optimizer states that a checkpoint has for these parameters."""
    by_name = dict(module.named_parameters())
    stored = open_checkpoint(path, list(by_name), order).index.tensors
    found = {}
    for key, entry in stored.items():
        _, slash, name = key.partition("/")
        if slash and name in by_name:
            found[key] = torch.zeros_like(by_name[name])
        elif key == "step":
            found[key] = torch.zeros((), dtype=torch.float64)
    return found
