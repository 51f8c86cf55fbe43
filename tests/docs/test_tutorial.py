"""The tutorial and the how-tos do what they say: their blocks run, in order, in a folder of their own."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from tests.docs.pages import DOCS, blocks, missing, run_page

PAGES = [DOCS / "tutorial.md", *sorted((DOCS / "howto").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setenv("COLUMNS", "160")
    before = set(sys.modules)
    try:
        run_page(page, tmp_path)
    finally:
        for name in set(sys.modules) - before:  # the next page has a net.py of its own
            if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
                del sys.modules[name]


def test_every_page_of_daily_work_has_a_runnable_example() -> None:
    assert len(PAGES) >= 7
    for page in PAGES:
        assert any(block.language in ("python", "sh") for block in blocks(page)), page


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page}: {target}"


def test_numbers_and_spacing_do_not_count_but_order_does() -> None:
    assert missing("a 1.5\nb ... c", "x\na   2e-3 z\n | b | 7 | c |") == []
    assert missing("b\na", "a\nb") == ["a"]
