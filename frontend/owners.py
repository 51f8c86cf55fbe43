"""Which compiled train step holds the current parameters of a module.

A step on several ranks keeps shards, and the module's own tensors fall behind. Another compiled
program that reads the module asks here first.
"""

from __future__ import annotations

from typing import Protocol
from weakref import WeakSet

import torch


class Owner(Protocol):
    """What holds parameters in place of a module."""

    @property
    def model(self) -> torch.nn.Module | None:
        """The module, once there is one."""

    def update_model(self) -> None:
        """Write current parameters and buffers into the module; all ranks must call."""

    def __hash__(self) -> int: ...


_OWNERS: WeakSet[Owner] = WeakSet()


def register(owner: Owner) -> None:
    """Ask `owner` from now on. It is held weakly."""
    _OWNERS.add(owner)


def bring_up_to_date(*modules: torch.nn.Module) -> None:
    """Let parameters and buffers of modules be the current ones; all ranks must call."""
    if not len(_OWNERS):
        return
    wanted = {id(inner) for module in modules for inner in module.modules()}
    for owner in list(_OWNERS):
        model = owner.model
        if model is not None and any(id(inner) in wanted for inner in model.modules()):
            owner.update_model()
