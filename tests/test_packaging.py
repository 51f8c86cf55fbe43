"""The installed package is the only way to reach the code."""

import importlib
import pkgutil
import sys
from pathlib import Path

import weft

FOLDERS = {"ir", "passes", "costmodel", "codegen", "runtime", "frontend"}
ROOT = Path(__file__).resolve().parents[1]


def test_every_module_imports_and_under_one_name_only() -> None:
    """A bare `import ir` anywhere would load a second copy of the floor."""
    names = [m.name for m in pkgutil.walk_packages(weft.__path__, "weft.")]
    for name in names:
        if not name.endswith("__main__"):
            importlib.import_module(name)
    assert {f"weft.{folder}" for folder in FOLDERS} <= set(names)
    assert not FOLDERS & set(sys.modules)


def test_links_match_the_folders() -> None:
    for folder in FOLDERS:
        assert (ROOT / "src" / "weft" / folder).resolve() == ROOT / folder


def test_the_public_names_are_there() -> None:
    for name in weft.__all__:
        assert hasattr(weft, name), name
