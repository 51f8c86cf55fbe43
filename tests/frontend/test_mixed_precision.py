"""bfloat16 parameters with float32 states, and dropout, on any plan: against float64, against one rank."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from tests.frontend.zoo import build, gpt2, tensors_of
from tests.passes.equality import assert_equal_on_ranks
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

import weft
from weft.frontend.train_step import trace_module_train, trace_train_step
from weft.frontend.verify import random_inputs, widen
from weft.ir.module import Module
from weft.passes.random_place import parse_mesh
from weft.runtime.interpreter import evaluate

STEPS, RATE, EPS = 8, 1e-3, 1e-3


class MasterAdamW(Optimizer):
    """AdamW with float32 states and float32 copies of its parameters, which are rounded from them."""

    def __init__(self, params: Any, lr: float, decay: float = 0.01) -> None:
        super().__init__(params, {"lr": lr, "decay": decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                state, grad = self.state[p], p.grad.float()
                if not state:
                    state["step"], state["master"] = 0, p.float()
                    state["exp_avg"] = torch.zeros_like(p, dtype=torch.float32)
                    state["exp_avg_sq"] = torch.zeros_like(p, dtype=torch.float32)
                state["step"] += 1
                state["master"].mul_(1 - group["lr"] * group["decay"])
                state["exp_avg"].lerp_(grad, 0.1)
                state["exp_avg_sq"].mul_(0.999).addcmul_(grad, grad, value=0.001)
                mean = state["exp_avg"] / (1 - 0.9 ** state["step"])
                spread = (state["exp_avg_sq"] / (1 - 0.999 ** state["step"])).sqrt()
                state["master"].addcdiv_(mean, spread.add_(EPS), value=-group["lr"])
                p.copy_(state["master"])


def train(model: nn.Module, optimizer: Optimizer, batch: dict[str, Any]) -> Tensor:
    loss: Tensor = model(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss


def distance(weights: dict[str, Tensor], exact: nn.Module) -> float:
    """To the parameters of a model in float64, relative to how far those are from 0."""
    pairs = [(weights[name].detach().double(), p.detach()) for name, p in exact.named_parameters()]
    apart = sum(float((a - b).square().sum()) for a, b in pairs)
    return (apart / sum(float(b.square().sum()) for _, b in pairs)) ** 0.5


@pytest.fixture(scope="module")
def exact() -> nn.Module:
    """Trained in float64, from the weights that bfloat16 has."""
    model, inputs = build("llama", torch.bfloat16)
    model = model.double()
    optimizer = AdamW(model.parameters(), lr=RATE, eps=EPS)
    for _ in range(STEPS):
        train(model, optimizer, inputs)
    return model


def masters(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    return {name: optimizer.state[p]["master"] for name, p in model.named_parameters()}


def test_float32_states_of_bfloat16_parameters_are_as_near_to_float64_as_eager(
    exact: nn.Module,
) -> None:
    ours, inputs = build("llama", torch.bfloat16)
    theirs, plain = deepcopy(ours), deepcopy(ours)
    mine, other = MasterAdamW(ours.parameters(), RATE), MasterAdamW(theirs.parameters(), RATE)
    rounded = AdamW(plain.parameters(), lr=RATE, eps=EPS)
    compiled = weft.compile(train)
    for _ in range(STEPS):
        loss = compiled(ours, mine, inputs)
        assert loss.item() == pytest.approx(train(theirs, other, inputs).item(), rel=1e-2)
        train(plain, rounded, inputs)
    state = compiled.state_dict()
    compiled.sync()
    for name, parameter in ours.named_parameters():
        kept = mine.state[parameter]
        assert kept.keys() == other.state[dict(theirs.named_parameters())[name]].keys()
        assert kept["step"] == STEPS
        assert {kept[key].dtype for key in ("master", "exp_avg", "exp_avg_sq")} == {torch.float32}
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, kept["master"].bfloat16())
        assert torch.equal(state[f"master/{name}"], kept["master"])
    far = distance(masters(theirs, other), exact)
    assert distance(masters(ours, mine), exact) <= 1.2 * far
    # what the masters are for: updates below bfloat16's precision are not lost
    assert far < 0.5 * distance(dict(plain.named_parameters()), exact)


def placed_on(meshes: tuple[str, ...], module: Module, given: dict[str, Tensor], seed: int) -> None:
    wide = widen(module)
    values = random_inputs(wide, given)
    wanted = evaluate(wide, values)
    for number, mesh in enumerate(meshes):
        assert_equal_on_ranks(wide, values, wanted, parse_mesh(mesh), seed + number)


def test_float32_states_of_bfloat16_parameters_on_four_ranks() -> None:
    model, inputs = build("llama", torch.bfloat16)
    traced = trace_train_step(train, model, MasterAdamW(model.parameters(), RATE), (inputs,))
    types = {str(a["name"]): v.type.dtype for v, a in
             zip(traced.module.entry.params, traced.module.entry.param_attrs, strict=True)}  # fmt: skip
    assert types["lm_head.weight"] == "bf16" and types["exp_avg/lm_head.weight"] == "f32"
    given = {k: v.detach() for k, v in {**traced.tensors, **tensors_of(inputs)}.items()}
    placed_on(("4",), traced.module, given, seed=3)


def test_dropout_of_gpt2_draws_the_same_stream_on_two_meshes_of_four_ranks() -> None:
    torch.manual_seed(0)
    model, inputs = gpt2(dropout=0.1)
    traced = trace_module_train(model.train(), (), inputs)
    drawn = [op for _, op in traced.module.walk() if op.attrs.get("dropout") or op.name == "dropout"]
    assert len(drawn) >= 3  # of embeddings, attention, residuals
    given = {k: v.detach() for k, v in {**traced.tensors, **tensors_of(inputs)}.items()}
    placed_on(("4", "2x2"), traced.module, given, seed=5)
