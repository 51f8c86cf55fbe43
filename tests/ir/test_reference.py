"""The IR reference is what the op table says."""

from pathlib import Path

from weft.ir.ops import OPS
from weft.ir.reference import reference

PAGE = Path(__file__).resolve().parents[2] / "docs" / "ir.md"


def test_the_committed_page_is_up_to_date() -> None:
    assert PAGE.read_text() == reference(), "run: python -m weft.ir.reference > docs/ir.md"


def test_every_op_is_on_the_page() -> None:
    page = reference()
    assert all(f"| `{name}` |" in page for name in OPS)
