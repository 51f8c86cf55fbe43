"""State that every rank holds whole, for `Checkpoints`: modules outside of a plan.

The ranks take turns in writing the tensors, so that each byte is written once here too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from ..ir.types import B, Mesh, TensorType
from .context import tensor_type


@dataclass(frozen=True)
class _World:
    """All ranks in one row."""

    mesh: Mesh
    coord: tuple[int, ...]
    distributed: bool


class WholeState:
    """Tensors by name, the same on all ranks.

    Args:
        tensors: loaded in place.
        roles: `param`, `buffer` or `state` for each of them.
    """

    def __init__(self, tensors: Mapping[str, Tensor], roles: Mapping[str, str]) -> None:
        self.tensors = {name: tensor.detach() for name, tensor in tensors.items()}
        self.state_roles = dict(roles)
        distributed = dist.is_available() and dist.is_initialized()
        size, rank = (dist.get_world_size(), dist.get_rank()) if distributed else (1, 0)
        self.comm = _World(Mesh((("rank", size),)), (rank,), distributed)

    @property
    def state_types(self) -> dict[str, TensorType]:
        """Types, all replicated."""
        return {name: tensor_type(tensor).placed((B,)) for name, tensor in self.tensors.items()}

    @property
    def elsewhere(self) -> frozenset[str]:
        """Nothing: all ranks hold everything."""
        return frozenset()

    def state_dict(self, full: bool = True, copy: bool = True) -> dict[str, Tensor]:
        """The tensors."""
        return {name: t.clone() if copy else t for name, t in self.tensors.items()}

    def set_shards(self, shards: Mapping[str, Tensor]) -> None:
        """Write into the tensors."""
        for name, shard in shards.items():
            if shard is not self.tensors[name]:
                self.tensors[name].copy_(shard)


__all__ = ["WholeState"]
