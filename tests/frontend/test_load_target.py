"""`module:factory`: what is wrong with it is said in the user's terms."""

import pytest
import torch

from weft.frontend.load_target import is_train_step, load_target
from weft.ir.errors import CompileError


def test_a_factory_is_called() -> None:
    target = load_target("examples.llama:train_step")
    assert is_train_step(target.program, target.args)
    assert not is_train_step(torch.nn.Linear(1, 1), target.args)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("examples.llama", "is not a target"),
        ("examples.lama:train_step", "there is no module"),
        ("examples.llama:trainstep", "did you mean 'train_step'"),
        ("os:getcwd", "not \\(program, args, kwargs\\)"),
    ],
)
def test_what_is_wrong_with_a_target_is_said(name: str, message: str) -> None:
    with pytest.raises(CompileError, match=message) as caught:
        load_target(name)
    assert caught.value.code == "W1001"
