"""WEFT_LOGS in the grammar of TORCH_LOGS, and tracebacks that show the user's frames."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Iterator

import pytest
import torch
from click.testing import CliRunner
from tests.frontend.targets import branches, net
from torch import Tensor

import weft
from weft.frontend import cli, cli_common, tracebacks
from weft.frontend.logs import LOGGERS, configure, help_text, parse_logs
from weft.frontend.options import OPTIONS


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Leave the loggers as they were."""
    root = logging.getLogger("weft")
    handlers, propagate = list(root.handlers), root.propagate
    yield
    root.handlers, root.propagate = handlers, propagate
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("weft."):
            logging.getLogger(name).setLevel(logging.NOTSET)


def test_signs_choose_the_level() -> None:
    found = parse_logs(("trace", "+place", "-lower"))
    assert found == {"trace": logging.INFO, "place": logging.DEBUG, "lower": logging.ERROR}
    assert set(parse_logs(("+all",))) == set(LOGGERS)
    assert parse_logs(("-all", "run"))["run"] == logging.INFO


@pytest.mark.parametrize(("bad", "near"), [("plce", "'place'"), ("++place", "'place'"), ("+help", "help"), ("", "help")])
def test_an_unknown_name_is_refused_with_the_near_one(bad: str, near: str) -> None:
    with pytest.raises(weft.CompileError, match="W1001") as caught:
        parse_logs((bad,))
    assert near in caught.value.hint


def test_nothing_is_configured_without_names() -> None:
    before = list(logging.getLogger("weft").handlers)
    configure(())
    assert logging.getLogger("weft").handlers == before


def test_help_names_every_logger(capsys: pytest.CaptureFixture[str]) -> None:
    configure(("help",))
    shown = capsys.readouterr().err
    assert help_text() in shown
    for name in (*LOGGERS, "lower", "differentiate"):
        assert name in shown


def test_a_compilation_tells_its_passes_and_its_placement(capsys: pytest.CaptureFixture[str]) -> None:
    model, (x,), _ = net()
    options = OPTIONS.with_({"logs": ("trace", "passes", "+place", "-lower")})
    weft.plan(model, (x,), cluster="1x2:cpu", options=options)
    shown = capsys.readouterr().err
    assert "[weft.trace] Net:" in shown
    assert "[weft.passes.schedule]" in shown and "[weft.passes.lower]" not in shown
    assert "[weft.place] chosen:" in shown and "einsum at blocks.0" in shown
    configure(("passes",))
    configure(("passes",))
    assert shown.count("[weft.passes.schedule]") == 1  # one handler, however often configured


def test_the_command_line_refuses_a_bad_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "OPTIONS", OPTIONS.with_({"logs": ("plce",)}))
    result = CliRunner().invoke(cli.main, ["doctor"])
    assert result.exit_code == 2 and "did you mean 'place'" in result.stderr


def _caught(call: object) -> weft.CompileError:
    assert callable(call)
    with pytest.raises(weft.CompileError) as caught:
        call()
    return caught.value


def _files(error: BaseException) -> list[str]:
    return [frame.filename for frame in traceback.extract_tb(error.__traceback__)]


def test_a_diagnostic_shows_the_users_frames_alone() -> None:
    program, args, _ = branches()
    for call in (lambda: weft.plan(program, args), lambda: weft.compile(program)(*args)):
        error = _caught(call)
        files = _files(error)
        inner = [f for f in files if "/torch/" in f or "/weft/" in f]
        assert len(inner) == 1 and inner[0].endswith("tracebacks.py"), files
        assert error.__notes__ == [tracebacks.NOTE]
        assert error.__suppress_context__


def test_all_frames_are_shown_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracebacks, "OPTIONS", OPTIONS.with_({"full_tracebacks": True}))
    program, args, _ = branches()
    error = _caught(lambda: weft.plan(program, args))
    assert sum("/weft/" in f for f in _files(error)) > 2
    monkeypatch.setattr(cli_common, "OPTIONS", OPTIONS.with_({"full_tracebacks": True}))
    result = CliRunner().invoke(cli.main, ["inspect", "nowhere"])
    assert result.exit_code == 2
    result = CliRunner().invoke(cli.main, ["run", "nowhere"])
    assert result.exit_code == 2 and "Traceback" in result.stderr


def test_an_exception_of_the_program_keeps_its_traceback() -> None:
    def forward(x: Tensor) -> Tensor:
        return x @ torch.ones(3, 3)

    with pytest.raises(RuntimeError) as caught:
        weft.plan(forward, (torch.ones(2, 2),))
    assert not isinstance(caught.value, weft.CompileError)
