"""Placements on disk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tests.passes.place_programs import mlp_step

from weft.costmodel.cluster import parse_cluster
from weft.ir.types import Mesh
from weft.passes import place
from weft.passes.constraints import Constraints
from weft.passes.place import Place, PlacementResult, search_mesh

CLUSTER = parse_cluster("1x4:h100")
MESH = Mesh((("dp", 2), ("tp", 2)), "h100")
STEP = mlp_step(4096, 256, 512)


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def asked(folder: Path, text: str = "") -> PlacementResult:
    found = search_mesh(STEP, MESH, CLUSTER, cache=folder, constraints=Constraints.parse(text))
    assert found is not None
    return found


def test_an_answer_is_read_back_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = asked(tmp_path)
    assert len(files(tmp_path)) == 1
    monkeypatch.setattr(place, "Task", None)  # nothing is searched any more
    again = asked(tmp_path)
    assert again.placed == first.placed and again.choices == first.choices
    assert again.report == first.report and again.price == first.price


def test_another_question_has_another_answer(tmp_path: Path) -> None:
    asked(tmp_path)
    where = asked(tmp_path, "param w1 : * = B")
    assert len(files(tmp_path)) == 2
    assert where.objective_us >= asked(tmp_path).objective_us


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"choices": 3}', "half"])
def test_a_damaged_file_is_searched_anew_and_replaced(tmp_path: Path, damage: str) -> None:
    first = asked(tmp_path)
    (path,) = files(tmp_path)
    whole = path.read_text()
    path.write_text(whole[: len(whole) // 2] if damage == "half" else damage)
    again = asked(tmp_path)
    assert again.objective_us == pytest.approx(first.objective_us)
    assert len(files(tmp_path)) == 1 and len(path.read_text()) == pytest.approx(len(whole), rel=0.05)


def test_an_answer_whose_price_has_changed_is_not_believed(tmp_path: Path) -> None:
    first = asked(tmp_path)
    (path,) = files(tmp_path)
    text = path.read_text().replace(f'"time_us": {first.report[0].time_us!r}', '"time_us": 1.0')
    path.write_text(text)
    assert asked(tmp_path).objective_us == pytest.approx(first.objective_us)


def test_a_folder_that_cannot_be_made_keeps_nothing(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert asked(blocked / "below").objective_us > 0
    assert files(tmp_path) == [blocked]


def test_the_pass_keeps_its_answers_where_it_is_told(tmp_path: Path) -> None:
    once = Place(cluster="1x4:h100", mesh="dp=2,tp=2", cache=tmp_path)
    assert once.run(STEP) == replace(once).run(STEP)
    assert len(files(tmp_path)) == 1
    assert "cache" not in once.options()
