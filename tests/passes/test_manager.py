"""The pass manager and the text form of pipelines."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.passes.networks import transformer

from weft.ir.errors import CompileError
from weft.ir.module import Function, Module
from weft.ir.parser import parse_module
from weft.ir.text import print_module
from weft.ir.verify import verify
from weft.passes import pipeline as pipeline_module
from weft.passes.base import Pass, option_specs
from weft.passes.manager import HEADER, PassManager
from weft.passes.outline import Outline
from weft.passes.pipeline import parse_pipeline, print_pass, print_pipeline
from weft.passes.registry import PASSES
from weft.passes.schedule import Schedule
from weft.passes.simplify import Simplify

# -- text ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample(Pass):
    """A pass with options of all kinds."""

    count: int = 3
    rate: float = 0.5
    deep: bool = False
    where: str = "here"

    name: ClassVar[str] = "sample"
    summary: ClassVar[str] = "for this test"

    def run(self, module: Module) -> Module:
        return module


@pytest.fixture(autouse=True)
def _sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(pipeline_module.PASSES, "sample", Sample)


_SAMPLES = st.builds(
    Sample, st.integers(), st.floats(allow_nan=False), st.booleans(), st.text(max_size=8)
)
_OTHERS = st.sampled_from(
    [Simplify(), Simplify(rounds=2), Outline(min_ops=7), Schedule(in_flight=1)]
)


@settings(max_examples=200)
@given(st.lists(_SAMPLES | _OTHERS, max_size=4))
def test_a_pipeline_reads_back_as_it_was_printed(passes: list[Pass]) -> None:
    assert parse_pipeline(print_pipeline(passes)) == tuple(passes)


def test_every_registered_pass_reads_back_and_says_what_it_does() -> None:
    for name, cls in PASSES.items():
        assert parse_pipeline(name) == (cls(),)
        assert print_pass(cls()) == name == cls.name
        assert cls.summary and cls.levels
        assert "before" in (cls.__doc__ or "").lower() or name == "sample", name


@pytest.mark.parametrize(
    "text",
    [
        "simplify,outline[min_ops=4],schedule",
        "simplify outline[min-ops=4] schedule",
        " simplify, outline[ min_ops=4 ] ,\n schedule ,",
    ],
)
def test_blanks_and_commas_separate_alike(text: str) -> None:
    assert parse_pipeline(text) == (Simplify(), Outline(min_ops=4), Schedule())


def test_values_have_the_type_of_their_option() -> None:
    text = 'sample[count=-4 rate=1e-3 deep=true where="2x2:cpu, \\"a\\""]'
    assert parse_pipeline(text) == (Sample(-4, 1e-3, True, '2x2:cpu, "a"'),)
    assert parse_pipeline("sample[where=2x2:cpu]") == (Sample(where="2x2:cpu"),)
    assert print_pass(Sample(where="2x2:cpu", rate=2.0)) == "sample[rate=2.0 where=2x2:cpu]"


@pytest.mark.parametrize(
    ("text", "message", "hint", "column"),
    [
        ("simplfy", "no pass is called 'simplfy'", "'simplify'", 1),
        ("simplify,outlin", "no pass is called 'outlin'", "'outline'", 10),
        ("outline[min_op=3]", "no option 'min_op'", "'min_ops'", 9),
        ("outline[min_ops=x]", "takes a int, not x", "", 17),
        ("sample[deep=yes]", "takes a bool, not yes", "", 13),
        ("outline[min_ops 3]", "expected =", "", 16),
        ("outline[min_ops=3", "expected a name or a value", "", 18),
        ("outline]", "no pass is called ']'", "", 8),
        ('"', "expected a name or a value", "", 1),
        ('sample[where="\\q"]', "takes a str", "", 14),
    ],
)
def test_a_typo_is_shown_with_the_near_name(
    text: str, message: str, hint: str, column: int
) -> None:
    with pytest.raises(CompileError) as caught:
        parse_pipeline(text)
    error = caught.value
    assert error.code == "W0601"
    assert message in error.message and hint in error.hint
    assert error.span is not None and error.span.column == column


def test_options_without_default_and_passes_without_name_are_refused() -> None:
    with pytest.raises(TypeError, match="needs a name"):
        type("Nameless", (Pass,), {"__doc__": "none"})

    @dataclass(frozen=True, kw_only=True)
    class Bare(Sample):
        """An option that has to be given."""

        needed: int

    with pytest.raises(TypeError, match="needs a default"):
        option_specs(Bare)


# -- running ---------------------------------------------------------------------------------------


def test_stages_dumps_and_progress_tell_what_happened(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[tuple[int, int, str]] = []
    manager = PassManager(
        parse_pipeline("simplify,outline,random-place[mesh=2],lower,schedule"),
        dump_dir=tmp_path / "ir",
        print_after=["outline"],
        progress=lambda index, total, item: seen.append((index, total, item.name)),
    )
    result = manager.run(transformer(2))
    names = ["input", "simplify", "outline", "random-place", "lower", "schedule"]
    assert seen == [(i, 5, name) for i, name in enumerate(names[1:])]
    assert [stage.name for stage in manager.stages] == names
    assert manager.stages[3].made_by == "random-place[mesh=2]"
    assert all(stage.seconds >= 0 for stage in manager.stages)
    files = sorted((tmp_path / "ir").iterdir())
    assert [file.name for file in files] == [f"{i:02d}-{name}.weft" for i, name in enumerate(names)]
    for file, stage in zip(files, manager.stages, strict=True):
        assert parse_module(file.read_text()) == stage.module
    assert result == manager.stages[-1].module
    shown = capsys.readouterr().err
    assert (
        shown.startswith("// after outline\n") and print_module(manager.stages[2].module) in shown
    )


def test_each_dump_follows_from_the_one_before(tmp_path: Path) -> None:
    manager = PassManager(
        parse_pipeline("simplify,outline,random-place[mesh=2],lower,fuse,schedule")
    )
    manager.run(transformer(2))
    for before, after in zip(manager.stages, manager.stages[1:], strict=False):
        again = parse_module(print_module(before.module))
        (item,) = parse_pipeline(after.made_by)
        assert print_module(item.run(again)) == print_module(after.module)


def test_a_pass_at_the_wrong_level_is_named() -> None:
    with pytest.raises(CompileError, match="schedule does not take a module at level logical") as e:
        PassManager([Schedule()]).run(transformer(1))
    assert e.value.code == "W0601" and "spmd" in e.value.reason


def test_a_name_to_print_after_must_be_in_the_pipeline() -> None:
    with pytest.raises(CompileError, match="nothing to print after 'outlin'"):
        PassManager([Outline()], print_after=["outlin"])


def test_a_malformed_input_is_no_fault_of_a_pass() -> None:
    module = transformer(1)
    entry = module.entry.with_(ops=module.entry.ops[1:])
    with pytest.raises(CompileError) as caught:
        PassManager([Simplify()]).run(module.with_(functions=(entry,)))
    assert caught.value.code == "W0201"


@dataclass(frozen=True)
class Crash(Pass):
    """Fails at the first attention."""

    name: ClassVar[str] = "crash"
    summary: ClassVar[str] = "for this test"

    def run(self, module: Module) -> Module:
        for _, op in module.walk():
            if op.name == "attention":
                raise KeyError("no such thing")
        return module


@dataclass(frozen=True)
class Spoil(Pass):
    """Changes the type of the last op."""

    name: ClassVar[str] = "spoil"
    summary: ClassVar[str] = "for this test"

    def run(self, module: Module) -> Module:
        entry: Function = module.entry
        last = entry.ops[-1]
        result = replace(last.results[0], type=replace(last.results[0].type, dtype="f64"))
        ops = (*entry.ops[:-1], replace(last, results=(result,)))
        return module.with_(functions=(entry.with_(ops=ops, results=(result,)),))


@dataclass(frozen=True)
class Refuse(Pass):
    """Says that the program cannot be compiled."""

    name: ClassVar[str] = "refuse"
    summary: ClassVar[str] = "for this test"

    def run(self, module: Module) -> Module:
        raise CompileError("W0402", "no placement fits")


@pytest.mark.parametrize(
    ("item", "message", "reason"),
    [
        (Crash(), "pass crash failed", "KeyError: 'no such thing'"),
        (Spoil(), "the result of pass spoil is malformed", "f64"),
    ],
)
def test_a_failing_pass_leaves_a_reproducer(
    item: Pass, message: str, reason: str, tmp_path: Path
) -> None:
    module = transformer(1)
    with pytest.raises(CompileError) as caught:
        PassManager([Simplify(), item], reproducers=tmp_path).run(module)
    error = caught.value
    assert error.code == "W0602" and message in error.message
    assert reason in str(error)
    assert error.span is not None and (error.span.file, error.span.line) == ("net.py", 7)
    (file,) = tmp_path.iterdir()
    assert str(file) in error.hint and file.suffix == ".weft"
    first, _, rest = file.read_text().partition("\n")
    assert first == f"{HEADER} {item.name}"
    again = parse_module(rest)
    verify(again)
    with pytest.raises(CompileError) as repeated:
        PassManager([item], reproducers=tmp_path).run(again)
    assert repeated.value.message == error.message
    assert list(tmp_path.iterdir()) == [file]


def test_the_failing_op_is_shown_among_its_neighbours(tmp_path: Path) -> None:
    with pytest.raises(CompileError) as caught:
        PassManager([Crash()], reproducers=tmp_path).run(transformer(1))
    reason = caught.value.reason
    assert "at attention of @main, from model.layers.0.self_attn (net.py:7)" in reason
    shown = [line for line in reason.splitlines() if line.strip().startswith("%")]
    assert len(shown) == 10 and any("^^^" in line for line in reason.splitlines())


def test_what_a_pass_says_about_the_program_passes_through(tmp_path: Path) -> None:
    with pytest.raises(CompileError, match="no placement fits") as caught:
        PassManager([Refuse()], reproducers=tmp_path).run(transformer(1))
    assert caught.value.code == "W0402"
    assert not list(tmp_path.iterdir())


def test_without_verification_a_malformed_result_goes_on() -> None:
    result = PassManager([Spoil()], verify_each=False).run(transformer(1))
    assert result.entry.results[0].type.dtype == "f64"
