"""The plans that are measured: small train steps under random and searched placements."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hosts import Topology
from torch import Tensor, nn

from weft.frontend.api import trace_target
from weft.frontend.driver import Program, plan_program
from weft.frontend.load_target import Target
from weft.frontend.options import Options
from weft.frontend.plan import Plan

_RANDOM = ("simplify,outline,differentiate,simplify,random-place[mesh=\"{}\" seed={}],lower,fuse,"
           "schedule")  # fmt: skip
_OPTIONS = {"verify_each": False, "progress": False}


class Block(nn.Module):
    """A pre-norm transformer block without biases, as in Llama but for the rotation."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 3 * width, bias=False), nn.Linear(3 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, time, width] -> the same."""
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.silu(self.up(self.norms[1](x))))


class Experts(nn.Module):
    """Experts that all tokens visit, mixed by a gate."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, count, bias=False)
        self.up = nn.Parameter(torch.randn(count, width, width) / width**0.5)
        self.down = nn.Parameter(torch.randn(count, width, width) / width**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """[tokens, width] -> the same."""
        inner = torch.relu(torch.einsum("td,edf->tef", x, self.up))
        out = torch.einsum("tef,efd->ted", inner, self.down)
        mixed: Tensor = (out * self.gate(x).softmax(-1).unsqueeze(-1)).sum(1)
        return mixed


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Tensor:
    """A train step towards y."""
    loss = ((model(x) - y) ** 2).mean()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    optimizer.zero_grad()
    return loss


def _mlp() -> tuple[nn.Module, tuple[int, ...]]:
    layers = [nn.Sequential(nn.Linear(512, 512, bias=False), nn.ReLU()) for _ in range(4)]
    return nn.Sequential(*layers), (256, 512)


def _llama() -> tuple[nn.Module, tuple[int, ...]]:
    return nn.Sequential(*(Block(256, 8) for _ in range(2))), (4, 64, 256)


def _experts() -> tuple[nn.Module, tuple[int, ...]]:
    return nn.Sequential(*(Experts(192, 4) for _ in range(2))), (128, 192)


MODELS: dict[str, Callable[[], tuple[nn.Module, tuple[int, ...]]]] = {
    "mlp": _mlp, "llama": _llama, "experts": _experts,
}  # fmt: skip


def trace(name: str) -> Program:
    """The train step of a model, traced."""
    torch.manual_seed(0)
    model, shape = MODELS[name]()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    args: tuple[Any, ...] = (model, optimizer, torch.randn(shape), torch.randn(shape))
    return trace_target(Target(name, step, args, {}), "", {})


@dataclass(frozen=True)
class Case:
    """A plan to measure.

    Attributes:
        folder: its artifact.
    """

    model: str
    label: str
    plan: Plan
    folder: Path


def whole(programs: dict[str, Program], world: int, file: Path, out: Path) -> Iterator[Case]:
    """For each model the plan for a cluster whose network is too slow for any transfer: each rank
    computes everything.

    Args:
        file: the description of such a cluster.
    """
    for name, program in programs.items():
        plan = plan_program(program, str(file), str(world), Options(**_OPTIONS), lambda _: None)
        plan.save(out / name)
        yield Case(name, "whole", plan, out / name)


def meshes(world: int) -> list[str]:
    """Flat, and square where there is a square."""
    return [str(world)] + (["2x2"] if world == 4 else [])


def cases(
    programs: dict[str, Program], topology: Topology, file: Path, random: range, out: Path
) -> Iterator[Case]:
    """For each model a searched plan per mesh, and random placements by seed.

    Args:
        file: the cluster's description.
        random: seeds, given to the models and meshes in turn.
    """
    shapes, names = meshes(topology.world), list(programs)
    todo = [(name, f"searched {mesh}", mesh, Options(**_OPTIONS)) for name in names for mesh in shapes]
    for seed in random:
        mesh = shapes[seed // len(names) % len(shapes)]
        text = _RANDOM.format(mesh, seed)
        todo.append((names[seed % len(names)], f"random {seed}", mesh, Options(pipeline=text, **_OPTIONS)))
    for number, (name, label, mesh, options) in enumerate(todo):
        plan = plan_program(programs[name], str(file), mesh, options, lambda _: None)
        folder = out / f"{number}-{name}"
        plan.save(folder)
        yield Case(name, label, plan, folder)
