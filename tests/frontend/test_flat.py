"""Flat programs, whole and their beginnings."""

from __future__ import annotations

import torch
from tests.frontend.zoo import llama

from weft.frontend.flat import beginning, flat
from weft.frontend.train_step import trace_module_train
from weft.ir.module import Module
from weft.passes.inline import inline


def step() -> Module:
    torch.manual_seed(0)
    model, inputs = llama(layers=4)
    return trace_module_train(model, (), inputs, optimizer="sgd").module


def test_a_beginning_is_the_beginning_of_the_whole() -> None:
    module = step()
    whole = inline(module).entry.ops
    assert len(module.functions) > 1 and len(whole) > 2 * len(module.entry.ops)
    for count in (0, 1, 7, len(whole) // 2, len(whole) - 1, len(whole), 10 * len(whole)):
        first = beginning(module, count).entry.ops
        assert first == whole[: len(first)]
        assert min(count, len(whole)) <= len(first)
    assert len(beginning(module, 1).entry.ops) < len(whole) // 2


def test_the_flat_module_is_kept() -> None:
    module = step()
    assert flat(module) is flat(module)
    assert flat(module).entry.ops == inline(module).entry.ops
