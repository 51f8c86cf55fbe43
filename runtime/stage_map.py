"""What the stages of a plan have together: inputs in parts, results and state on some stage.

A plan without stages is one stage. Callers give whole inputs and get whole results and state on
every rank, whatever stage it belongs to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch import Tensor

from ..ir.module import Attr, Function, Module, Value
from ..ir.stage_ranks import StageRanks
from ..ir.types import Mesh, TensorType
from .context import TORCH_DTYPES
from .groups import Groups
from .lifetimes import PERSISTENT
from .lockstep_stages import part_of

#: attribute of a staged module: (role, name) of the whole program's inputs and rates, in order
FED = "fed"


@dataclass(frozen=True)
class Result:
    """A result of the whole program.

    Attributes:
        type: of the whole tensor.
        stage: where it is.
    """

    type: TensorType
    stage: int


def ranks_of(modules: Sequence[Module]) -> StageRanks:
    """The ranks of all stages of a plan."""
    return StageRanks(tuple(module.mesh or Mesh() for module in modules))


def whole_type(value: Value, attrs: Mapping[str, Attr]) -> TensorType:
    """The type of the whole tensor of which a value is a part, without placement."""
    part = attrs.get("part")
    type = value.type.placed(None)
    if not isinstance(part, tuple) or not part:
        return type
    shape = list(type.shape)
    shape[int(part[0])] = int(part[2])  # type: ignore[arg-type]
    return replace(type, shape=tuple(shape))


@dataclass
class StageMap:
    """All stages of a plan, seen from one rank.

    Args:
        modules: the schedule of each stage.
        stage: that of this rank.

    Attributes:
        inputs, rates: names and whole types of what a step is given, in the program's order.
        kept: name -> type, role and stage of all state; what several stages hold is the first's.
        results: of the whole program, by number.
    """

    modules: Sequence[Module]
    stage: int
    inputs: list[tuple[str, TensorType]] = field(init=False)
    rates: list[str] = field(init=False)
    kept: dict[str, tuple[TensorType, str, int]] = field(init=False, default_factory=dict)
    results: dict[int, Result] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        fed: dict[tuple[str, str], TensorType] = {}
        for number, module in enumerate(self.modules):
            entry = module.entry
            for value, attrs in zip(entry.params, entry.param_attrs, strict=True):
                role, name = str(attrs.get("role", "input")), str(attrs.get("name", value.name))
                if role in PERSISTENT:
                    self.kept.setdefault(name, (value.type, role, number))
                else:
                    fed.setdefault((role, name), whole_type(value, attrs))
            for place, attrs in result_places(entry):
                result = Result(whole_type(entry.results[place], attrs), number)
                self.results.setdefault(_number(place, attrs), result)
        order = self.modules[0].attrs.get(FED)
        if isinstance(order, tuple):
            names = [(str(pair[0]), str(pair[1])) for pair in order if isinstance(pair, tuple)]
            fed = {key: fed[key] for key in (*names, *fed) if key in fed}
        self.inputs = [(name, type) for (role, name), type in fed.items() if role == "input"]
        self.rates = [name for role, name in fed if role == "lr"]

    @property
    def staged(self) -> bool:
        """Are there several stages?"""
        return len(self.modules) > 1

    @property
    def elsewhere(self) -> frozenset[str]:
        """Names of state that another stage keeps, or writes down."""
        return frozenset(name for name, (_, _, stage) in self.kept.items() if stage != self.stage)

    def part(self, whole: Tensor, value: Value, attrs: Mapping[str, Attr]) -> Tensor:
        """The part of an input that a parameter of this stage takes."""
        return part_of(whole, attrs, value)

    def collect(self, comm: Groups, entry: Function, own: Sequence[Tensor]) -> list[Tensor]:
        """All results of the program on every rank, from those of this stage; all ranks call.

        Args:
            own: whole results of this stage's entry, without updates.
        """
        pieces: dict[int, list[tuple[int, int, Tensor]]] = {}
        for (place, attrs), tensor in zip(result_places(entry), own, strict=True):
            part = attrs.get("part")
            dim, start = (int(part[0]), int(part[1])) if isinstance(part, tuple) else (0, -1)  # type: ignore[arg-type]
            pieces.setdefault(_number(place, attrs), []).append((start, dim, tensor))
        out = []
        for number in sorted(self.results):
            found = sorted(pieces.get(number, ()), key=lambda item: item[0])
            mine = None
            if len(found) == 1:
                mine = found[0][2]
            elif found:
                mine = torch.cat([tensor for _, _, tensor in found], found[0][1])
            result = self.results[number]
            out.append(self.share(comm, result.type, result.stage, mine))
        return out

    def share(
        self, comm: Groups, type: TensorType, stage: int, mine: Tensor | None
    ) -> Tensor:
        """A whole tensor of one stage on all ranks; all ranks call.

        Args:
            mine: the tensor, on the ranks of its stage.
        """
        if not self.staged:
            assert mine is not None
            return mine
        device = torch.device("cuda", torch.cuda.current_device()) if comm.nccl else None
        if mine is None or stage != self.stage:
            mine = torch.empty(type.shape, dtype=TORCH_DTYPES[type.dtype], device=device)
        mine = mine.contiguous()
        if mine.numel():
            dist.broadcast(mine.view(-1).view(torch.uint8), comm.ranks.firsts[stage])
        return mine


def result_places(entry: Function) -> list[tuple[int, Mapping[str, Attr]]]:
    """(position, attributes) of the results of a step that are no updates."""
    return [(i, attrs) for i, attrs in enumerate(entry.result_attrs) if "updates" not in attrs]


def _number(place: int, attrs: Mapping[str, Attr]) -> int:
    number = attrs.get("number", place)
    assert isinstance(number, int)
    return number


__all__ = ["FED", "StageMap", "ranks_of", "result_places", "whole_type"]
