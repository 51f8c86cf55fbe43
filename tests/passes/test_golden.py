"""Golden files: the pipeline in the first line, the input, and the module that it must give.

`pytest tests/passes/test_golden.py --update-golden` writes what passes give today.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.passes.equality import assert_close
from tests.passes.random_inputs import random_inputs

from weft.ir.parser import parse_module
from weft.ir.text import print_module
from weft.passes.manager import HEADER, PassManager
from weft.passes.pipeline import parse_pipeline
from weft.runtime.interpreter import evaluate

FILES = sorted(Path(__file__).parent.glob("*.weft"))
SEPARATOR = "// ---- expected"


def test_there_are_golden_files() -> None:
    assert len(FILES) >= 6


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_pipeline_gives_the_expected_module(path: Path, request: pytest.FixtureRequest) -> None:
    first, _, rest = path.read_text(encoding="utf-8").partition("\n")
    assert first.startswith(HEADER), f"{path.name} does not start with {HEADER}"
    given, _, expected = rest.partition(SEPARATOR + "\n")
    module = parse_module(given, path.name)
    after = PassManager(parse_pipeline(first.removeprefix(HEADER))).run(module)
    text = print_module(after)
    assert parse_module(text) == after
    if request.config.getoption("--update-golden"):
        path.write_text(f"{first}\n{given}{SEPARATOR}\n{text}", encoding="utf-8")
    else:
        assert text == expected
    if module.level == "logical" or after.level == "schedule":
        inputs = random_inputs(module)
        assert_close(evaluate(module, inputs), evaluate(after, inputs), 1e-5)
