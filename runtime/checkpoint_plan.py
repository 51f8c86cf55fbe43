"""What each rank writes to and reads from a checkpoint: planners for torch.distributed.checkpoint.

A shard is a range of each dim (`ir.types.local_range`), uneven ones included, so the plan follows
from types, mesh and coordinate alone. Of the ranks that hold the same shard one writes it; the copies
take turns over the tensors, so that replicated state is not all written by rank 0.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from ..ir.errors import RunError
from ..ir.types import Mesh, TensorType, local_range
from .context import TORCH_DTYPES


@dataclass(frozen=True)
class Layout:
    """Where the tensors of a program are, seen from one rank.

    Attributes:
        types: placed types by name, in the same order on all ranks.
        mesh: the program's mesh.
        coord: this rank's coordinate.
        elsewhere: names that the ranks of another pipeline stage write.
    """

    types: Mapping[str, TensorType]
    mesh: Mesh
    coord: tuple[int, ...]
    elsewhere: frozenset[str] = frozenset()

    def chunk(self, name: str) -> ChunkStorageMetadata:
        """The part of a tensor that this rank holds."""
        type = self.types[name]
        ranges = [local_range(type, self.mesh, self.coord, dim) for dim in range(len(type.shape))]
        return ChunkStorageMetadata(
            torch.Size([offset for offset, _ in ranges]), torch.Size([size for _, size in ranges])
        )

    def owned(self) -> list[str]:
        """Names of the shards that this rank writes. Raises RunError W1105 for partial values."""
        return [
            name
            for number, (name, type) in enumerate(self.types.items())
            if name not in self.elsewhere and self._owns(number, name, type)
        ]

    def _owns(self, number: int, name: str, type: TensorType) -> bool:
        turn = number
        for placement, size, index in zip(
            type.placement or (), self.mesh.sizes, self.coord, strict=False
        ):
            if placement.kind == "P":
                raise RunError(
                    "W1105", f"{name!r} is partial: its value is a sum over ranks",
                    hint="give state a placement without P",
                )  # fmt: skip
            if placement.kind == "B":
                turn, digit = divmod(turn, size)
                if digit != index:
                    return False
        return all(size > 0 for size in self.chunk(name).sizes)


class ShardSavePlanner(SavePlanner):
    """Writes each element once, from the rank that owns it.

    Args:
        layout: where the tensors are.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self._tensors: Mapping[str, Any] = {}

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        storage_meta: StorageMeta | None = None,
        is_coordinator: bool = False,
    ) -> None:
        """Take this rank's shards by name; those that it owns suffice."""
        self._tensors = state_dict

    def create_local_plan(self) -> SavePlan:
        """An item for each shard that this rank owns."""
        return SavePlan([self._item(name) for name in self.layout.owned()])

    def _item(self, name: str) -> WriteItem:
        type, chunk = self.layout.types[name], self.layout.chunk(name)
        return WriteItem(
            MetadataIndex(name, chunk.offsets),
            WriteItemType.SHARD,
            tensor_data=TensorWriteData(
                chunk, TensorProperties(TORCH_DTYPES[type.dtype]), torch.Size(type.shape)
            ),
        )

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """What all ranks write together."""
        chunks: dict[str, list[ChunkStorageMetadata]] = {name: [] for name in self.layout.types}
        for item in (item for plan in all_plans for item in plan.items):
            assert item.tensor_data is not None
            chunks[item.index.fqn].append(item.tensor_data.chunk)
        return all_plans, Metadata(
            {
                name: TensorStorageMetadata(
                    TensorProperties(TORCH_DTYPES[type.dtype]), torch.Size(type.shape), chunks[name]
                )
                for name, type in self.layout.types.items()
            }
        )

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """Nothing to add."""
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        """The shard to write."""
        tensor: Tensor = self._tensors[write_item.index.fqn]
        return tensor


class ShardLoadPlanner(LoadPlanner):
    """Reads what overlaps with this rank's shards, into them.

    Args:
        layout: where the tensors are. Names and shapes were compared with the checkpoint before.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self._tensors: Mapping[str, Any] = {}
        self._metadata = Metadata({})

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        metadata: Metadata | None = None,
        is_coordinator: bool = False,
    ) -> None:
        """Take this rank's shards by name."""
        self._tensors = state_dict
        self._metadata = metadata or self._metadata

    def create_local_plan(self) -> LoadPlan:
        """An item for each stored shard that overlaps with one of this rank's."""
        items: list[ReadItem] = []
        for name in self._tensors:
            stored = self._metadata.state_dict_metadata[name]
            assert isinstance(stored, TensorStorageMetadata)
            chunk = self.layout.chunk(name)
            if all(size > 0 for size in chunk.sizes):
                items += create_read_items_for_chunk_list(name, stored, [chunk])
        return LoadPlan(items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        """Ranks read independently of each other."""
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        """Nothing to add."""
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Refuse: a checkpoint holds tensors only."""
        raise RunError("W1103", f"{read_item.dest_index.fqn!r} is not a tensor")

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """The part of this rank's shard that an item fills."""
        tensor: Tensor = self._tensors[read_item.dest_index.fqn]
        pairs = zip(read_item.dest_offsets, read_item.lengths, strict=True)
        for dim, (offset, length) in enumerate(pairs):
            tensor = tensor.narrow(dim, offset, length)
        return tensor

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """The item was copied in place."""


__all__ = ["Layout", "ShardLoadPlanner", "ShardSavePlanner"]
