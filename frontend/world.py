"""The world that a decorated program runs in: torchrun's, or this one process."""

from __future__ import annotations

import atexit
import os
from contextlib import ExitStack
from functools import lru_cache

import torch
import torch.distributed as dist

from ..costmodel.devices import DEVICES
from ..runtime.launch import World, init_from_env


@lru_cache(maxsize=1)
def join_world() -> World:
    """Join torchrun's world once per process, and leave it at exit.

    A process group that the user made already is used as it is, and left to the user.
    """
    if dist.is_available() and dist.is_initialized():
        size, rank = dist.get_world_size(), dist.get_rank()
        cuda = dist.get_backend() == "nccl"
        index = int(os.environ.get("LOCAL_RANK", "0"))
        return World(rank, size, torch.device("cuda", index) if cuda else torch.device("cpu"))
    stack = ExitStack()
    world = stack.enter_context(init_from_env())
    atexit.register(stack.close)
    return world


def device_kind(device: torch.device) -> str:
    """The table's name of a device: `cpu`, or the GPU whose name holds it (`h100`)."""
    if device.type != "cuda":
        return "cpu"
    name = torch.cuda.get_device_name(device).lower()
    return next((kind for kind in DEVICES if kind in name), "h100")


def world_cluster(world: World) -> str:
    """The cluster shorthand of a world: hosts are what torchrun says is local."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", str(world.size)))
    hosts = max(1, world.size // max(local, 1))
    return f"{hosts}x{world.size // hosts}:{device_kind(world.device)}"
