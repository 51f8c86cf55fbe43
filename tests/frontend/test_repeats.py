"""Repeated modules that are traced once give the program that tracing each of them gives."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from tests.frontend import zoo
from tests.frontend.features import checkpointed
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from weft.frontend import capture
from weft.frontend.trace import trace_forward
from weft.frontend.train_step import trace_module_train
from weft.ir.text import print_module

WIDTH, DEPTH = 4, 4


class Block(nn.Module):
    """A residual block, which the cases below change."""

    def __init__(self, index: int = 0) -> None:
        super().__init__()
        self.inner, self.index = nn.Linear(WIDTH, WIDTH), index

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(self.inner(x))


class Tower(nn.Module):
    """Blocks behind each other, and the mean of the squares."""

    def __init__(self, make: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.blocks = nn.ModuleList(make(index) for index in range(DEPTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x * self.scale).square().mean()

    def run(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class ReadsIndex(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x) * self.index


class ReadsAll(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x) * vars(self)["index"]


class Alternates(Block):
    """As models whose layers have a window every other time."""

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.is_sliding = index % 2 == 0

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        return x + (y.tril() if self.is_sliding else y)


class Counts(Block):
    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return x + self.inner(x) * self.calls


class Remembers(Block):
    def forward(self, x: Tensor) -> Tensor:
        self.last = self.inner(x)
        return x + self.last


_STATE = {"calls": 0}
_SEEN: list[Tensor] = []


class CountsGlobally(Block):
    def forward(self, x: Tensor) -> Tensor:
        _STATE["calls"] += 1
        return x + self.inner(x) * _STATE["calls"]


class CountsInClass(Block):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        type(self).calls += 1
        return x + self.inner(x) * self.calls


class Leaks(Block):
    """The values leave by a global list, and enter the next block by it."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        before = _SEEN[-1] if _SEEN else 0
        _SEEN.append(y)
        return x + y + before


class InPlace(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x.add_(self.inner(x))


class ChangesCopy(Block):
    """In place, on a value of its own."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        y.mul_(2.0)
        return x + y.relu()


class Views(Block):
    """Returns a view of its argument."""

    def forward(self, x: Tensor) -> Tensor:
        return x.view(-1, WIDTH)


class Reshapes(Block):
    """Returns a view of what it made."""

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.inner(x)).view(-1, WIDTH)


class Random(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x) * random.random()


class Drops(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + nn.functional.dropout(self.inner(x), 0.5, self.training)


class Stops(Block):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            scale = self.inner(x).abs().amax()
        return x + self.inner(x.detach()) / scale


class Constant(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x) * torch.tensor([1.0, 2.0, 3.0, 4.0])


class Checkpoints(Block):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(self.inner, x, use_reentrant=False)
        return x + y


class Nested(nn.Module):
    def __init__(self, index: int) -> None:
        super().__init__()
        self.first, self.second = Block(index), Block(index)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.second(x)


def with_closure(index: int) -> nn.Module:
    calls = 0

    def scale(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return x * calls

    block = Block(index)
    block.inner = nn.Sequential(nn.Linear(WIDTH, WIDTH), _Calls(_shared(scale)))
    return block


class _Calls(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


_FUNCTIONS: list[Callable[[Tensor], Tensor]] = []


def _shared(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The first of them: all blocks share it."""
    _FUNCTIONS.append(function)
    return _FUNCTIONS[0]


def hooked(index: int) -> nn.Module:
    block = Block(index)
    block.inner.register_forward_hook(lambda module, args, out: out * (index + 1))
    return block


class Shared(Tower):
    """One block, four times."""

    def __init__(self) -> None:
        super().__init__(Block)
        self.blocks = nn.ModuleList([self.blocks[0], Block()])

    def run(self, x: Tensor) -> Tensor:
        for block in [*self.blocks, *self.blocks]:
            x = block(x)
        return x


class Arguments(Tower):
    """Constants and containers among the arguments and results; calls from several lines."""

    class Block(Block):
        def forward(self, x: dict[str, Tensor], more: bool) -> tuple[dict[str, Tensor], Tensor]:  # type: ignore[override]
            y = self.inner(x["x"])
            return {"x": x["x"] + (y * 2 if more else y), "mask": x["mask"]}, y

    def __init__(self) -> None:
        super().__init__(self.Block)

    def run(self, x: Tensor) -> Tensor:
        first, second, third, fourth = self.blocks
        state, a = first({"x": x, "mask": x > 0}, True)
        state, b = second(state, True)
        state, c = third(state, more=False)
        state, d = fourth(state, more=False)
        return state["x"] * state["mask"] + b + d


class Between(Tower):
    """What is read changes between the calls."""

    def __init__(self) -> None:
        super().__init__(ReadsScale)

    def run(self, x: Tensor) -> Tensor:
        for number, block in enumerate(self.blocks):
            _STATE["scale"] = number // 2
            x = block(x)
        return x


class ReadsScale(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x) * _STATE["scale"]


class Tied(Tower):
    def __init__(self) -> None:
        super().__init__(Block)
        self.blocks[2].inner.weight = self.blocks[0].inner.weight  # type: ignore[union-attr]


class ChangedLater(Tower):
    """A result, which may be a view of the argument, is changed in place."""

    def __init__(self) -> None:
        super().__init__(Views)

    def run(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            y = block(x)
            y.mul_(2.0)
            x = x + y
        return x


#: a tower, and how many of its blocks were not traced (None: any number)
CASES: dict[str, tuple[Callable[[], nn.Module], int | None]] = {
    "equal": (partial(Tower, Block), 3),
    "an index that is read": (partial(Tower, ReadsIndex), 0),
    "all attributes are read": (partial(Tower, ReadsAll), 0),
    "every other layer": (partial(Tower, Alternates), 2),
    "a buffer that changes": (partial(Tower, Counts), 0),
    "a value that is kept": (partial(Tower, Remembers), 0),
    "a global that counts": (partial(Tower, CountsGlobally), 0),
    "a class that counts": (partial(Tower, CountsInClass), 0),
    "a closure that counts": (partial(Tower, with_closure), 0),
    "a list that leaks": (partial(Tower, Leaks), 0),
    "an argument in place": (partial(Tower, InPlace), 0),
    "its own value in place": (partial(Tower, ChangesCopy), 3),
    "a view of its argument": (partial(Tower, Views), 0),
    "a view of its own": (partial(Tower, Reshapes), 3),
    "random numbers of Python": (partial(Tower, Random), 0),
    "dropout": (partial(Tower, Drops), 3),
    "no_grad and detach": (partial(Tower, Stops), 3),
    "a constant tensor": (partial(Tower, Constant), None),
    "checkpointing": (partial(Tower, Checkpoints), None),
    "nested": (partial(Tower, Nested), 4),
    "hooks": (partial(Tower, hooked), 0),
    "one block often": (Shared, 3),
    "arguments": (Arguments, 2),
    "changes between calls": (Between, 2),
    "tied": (Tied, 3),
    "a result in place": (ChangedLater, None),
}


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many modules were not traced, for each trace."""
    counts: list[int] = []
    write = capture.write_repeats

    def counting(graph: Any, repeats: Any) -> None:
        write(graph, repeats)
        counts.append(len(repeats.agains))

    monkeypatch.setattr(capture, "write_repeats", counting)
    yield counts


def texts(
    monkeypatch: pytest.MonkeyPatch, make: Callable[[], zoo.Example], train: bool
) -> tuple[str, str, int]:
    """The program with and without the shortcut, and how many modules were not traced."""
    made = []
    with counted(monkeypatch) as counts:
        for attempts in (capture._ATTEMPTS, 0):
            monkeypatch.setattr(capture, "_ATTEMPTS", attempts)
            _STATE["calls"], CountsInClass.calls = 0, 0
            _SEEN.clear()
            _FUNCTIONS.clear()
            random.seed(0)
            model, inputs = make()
            if train:
                made.append(trace_module_train(model, (), inputs, optimizer="adamw").marked)
            else:
                made.append(trace_forward(model, (), inputs).module)
    return print_module(made[0]), print_module(made[1]), sum(counts)


@pytest.mark.parametrize("name", CASES)
def test_a_tower_is_the_same_program(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, untraced = CASES[name]

    def example() -> zoo.Example:
        torch.manual_seed(0)
        return make(), {"x": torch.randn(3, WIDTH)}

    fast, slow, count = texts(monkeypatch, example, train=True)
    assert fast == slow
    assert untraced is None or count == untraced


ARCHITECTURES: dict[str, tuple[Callable[[], zoo.Example], bool]] = {
    "llama": (partial(zoo.llama, layers=3, tied=True), True),
    "gpt2": (partial(zoo.gpt2, dropout=0.1), True),
    "swin": (partial(zoo.build, "swin"), False),
    "mixtral": (partial(zoo.build, "mixtral"), True),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture_is_the_same_program(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fast, slow, _ = texts(monkeypatch, *ARCHITECTURES[name])
    assert fast == slow


def test_checkpointed_layers_are_the_same_program(monkeypatch: pytest.MonkeyPatch) -> None:
    def example() -> zoo.Example:
        model, inputs = zoo.llama(layers=3)
        return checkpointed(model.train()), inputs

    fast, slow, _ = texts(monkeypatch, example, train=True)
    assert fast == slow


def test_an_error_is_told_of_the_program_as_it_is() -> None:
    class Fails(Tower):
        def forward(self, x: Tensor) -> Tensor:
            super().forward(x)
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        trace_forward(Fails(Block), (torch.randn(3, WIDTH),))
