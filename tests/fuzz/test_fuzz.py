"""A slice of `benchmarks/fuzz.py`: whatever the input, a diagnostic or success."""

from __future__ import annotations

import os
import sys
import webbrowser
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from weft.ir.errors import CODES, CompileError, RunError

from . import artifacts, clusters, options

SEEDS = st.integers(0, 2**32)
FEW = settings(
    max_examples=120, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
_opened: list[str] = []


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if event == "pickle.find_class" or (
        event == "open" and str(args[0]).endswith(artifacts.SECRET) and "r" in str(args[1])
    ):
        _opened.append(f"{event} {args}")


sys.addaudithook(_hook)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    artifacts.make_bases(folder)
    return folder


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(os.path.abspath(Path(__file__).parents[2]))
    monkeypatch.setattr(webbrowser, "open", lambda *a, **k: True)
    yield


def only_diagnostics(run: Any, seed: int, tmp_path: Path, *more: Path) -> None:
    here = tmp_path / str(len(list(tmp_path.iterdir())))
    (here / "outside").mkdir(parents=True)
    (here / "outside" / artifacts.SECRET).write_text("weft 1 logical")
    _opened.clear()
    try:
        run(Random(seed), here, *more)
    except (CompileError, RunError) as error:
        assert error.code in CODES and error.message and len(str(error)) < 20_000
    assert not _opened


@FEW
@given(seed=SEEDS)
def test_cluster_specifications(tmp_path: Path, seed: int) -> None:
    only_diagnostics(clusters.run, seed, tmp_path)


@FEW
@given(seed=SEEDS)
def test_artifacts(tmp_path: Path, bases: Path, seed: int) -> None:
    only_diagnostics(artifacts.run, seed, tmp_path, bases)


@FEW
@given(seed=SEEDS)
def test_option_sets(tmp_path: Path, bases: Path, seed: int) -> None:
    only_diagnostics(options.run, seed, tmp_path, bases)
