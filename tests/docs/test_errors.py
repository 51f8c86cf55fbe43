"""Each diagnostic has a page; its wrong example raises exactly that code, its right one nothing.

`pytest tests/docs/test_errors.py --update-golden` writes the messages into the pages.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.docs.pages import DOCS, ROOT, Block, blocks, missing, run_python

from weft.ir.errors import CODES, WeftError

PAGES = sorted((DOCS / "errors").glob("W*.md"))
WRONG, RIGHT, NO_EXAMPLE = "Wrong", "Right", "## No example runs here"


def examples(section: str) -> list[tuple[Path, Block]]:
    """The runnable blocks of a section, over all pages."""
    found = [(page, block) for page in PAGES for block in blocks(page)]
    return [(p, b) for p, b in found if b.section == section and b.language == "python"]


def shown(message: str, folder: Path) -> str:
    """A message without what differs from run to run."""
    short = message.replace(f"{folder}/", "").replace(f"{ROOT}/", "")
    return re.sub(r"/\S*/[\w-]*\.weft", "....weft", short)


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])


def test_each_code_has_a_page_and_each_page_a_code() -> None:
    assert [page.stem for page in PAGES] == sorted(CODES)
    index = (DOCS / "errors" / "README.md").read_text(encoding="utf-8")
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert text.startswith(f"# {page.stem}\n\n**{CODES[page.stem]}**\n"), page
        assert f"[{page.stem}]({page.name}) | {CODES[page.stem]} |" in index, page
        assert (NO_EXAMPLE in text) != (f"## {WRONG}" in text), page


def test_most_codes_have_a_wrong_example_that_runs() -> None:
    assert len(examples(WRONG)) >= 20


@pytest.mark.parametrize("page, block", examples(WRONG), ids=lambda value: getattr(value, "stem", ""))
def test_the_wrong_example_raises_the_code(
    page: Path, block: Block, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    namespace: dict[str, Any] = {"__name__": "__main__"}
    with pytest.raises(WeftError) as caught:
        run_python(block, page, namespace, tmp_path)
    assert caught.value.code == page.stem
    (expected,) = [b for b in blocks(page) if b.section == WRONG and b.language == "text"]
    message = shown(caught.value.render(), tmp_path)
    if request.config.getoption("--update-golden"):
        text = page.read_text(encoding="utf-8")
        page.write_text(text.replace(f"```text\n{expected.text}", f"```text\n{message}\n"), encoding="utf-8")
    else:
        first = expected.text.splitlines()[0]
        assert not missing(first, message), message


@pytest.mark.parametrize("page, block", examples(RIGHT), ids=lambda value: getattr(value, "stem", ""))
def test_the_right_example_runs(page: Path, block: Block, tmp_path: Path) -> None:
    run_python(block, page, {"__name__": "__main__"}, tmp_path)
