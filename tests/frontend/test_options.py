"""Options: the environment is read once, and typos are told."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import weft
from weft.frontend.options import Options
from weft.ir.errors import CompileError


def test_the_environment_sets_the_defaults() -> None:
    options = Options.from_environment(
        {"WEFT_CLUSTER": "2x2:cpu", "WEFT_LOGS": "trace,place", "WEFT_CACHE": "/x", "WEFT_VERIFY": "0"}
    )
    assert options.cluster == "2x2:cpu"
    assert options.logs == ("trace", "place")
    assert options.cache == Path("/x")
    assert not options.verify_each


def test_a_keyword_wins_over_the_environment() -> None:
    options = Options.from_environment({"WEFT_CLUSTER": "2x2:cpu"})
    assert options.with_({"cluster": "1x8:h100"}).cluster == "1x8:h100"


def test_an_unknown_option_names_the_near_one() -> None:
    with pytest.raises(CompileError, match="did you mean 'cluster'"):
        Options().with_({"clustr": "2x2:cpu"})


@pytest.mark.parametrize("hyper", [{"betaz": (0.9, 0.99)}, {"lr": "fast"}, {"lr": -1.0}])
def test_what_the_optimizer_does_not_take_is_told(hyper: dict[str, Any]) -> None:
    with pytest.raises(CompileError, match=f"Adam cannot be made with {next(iter(hyper))}") as error:
        weft.plan(nn.Linear(2, 2), (torch.ones(1, 2),), optimizer="adam", **hyper)
    assert error.value.code == "W1001" and error.value.reason and error.value.hint
