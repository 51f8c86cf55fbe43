"""Pages of the documentation that run.

A page is a sequence of fenced blocks:

* `python`: run in order, in one namespace per page; a first line `# file: NAME` writes a file instead.
* `sh`: each line is a command; `weft ...` runs in this process, anything else in bash.
* `text` right behind one of these: what it prints, compared loosely (`missing`).

Blocks of other languages are only shown.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from weft.frontend.cli import main

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_HEADING = re.compile(r"^## (.+)$", re.MULTILINE)
_NUMBER = re.compile(r"\d+(\.\d+)?(e[+-]?\d+)?")


@dataclass(frozen=True)
class Block:
    """One fenced block; `line` is that of its fence, `section` the heading above it."""

    language: str
    text: str
    line: int
    section: str


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    headings = [(m.start(), m[1]) for m in _HEADING.finditer(text)]
    found = []
    for match in _FENCE.finditer(text):
        above = [name for start, name in headings if start < match.start()]
        line = text.count("\n", 0, match.start()) + 1
        found.append(Block(match[1], match[2], line, above[-1] if above else ""))
    return found


def _words(line: str) -> str:
    """A line without numbers, spacing and the borders of tables."""
    plain = re.sub(r"[\u2500-\u257f|]", " ", line)
    return " ".join(_NUMBER.sub("#", plain).split())


def missing(expected: str, actual: str) -> list[str]:
    """The lines of `expected` that `actual` does not have, in this order.

    Numbers match any number, spacing does not count, `...` matches anything.
    """
    lines, at, out = [_words(line) for line in actual.splitlines()], 0, []
    for wanted in expected.splitlines():
        parts = [re.escape(part.strip()) for part in _words(wanted).split("...")]
        if not any(parts):
            continue
        pattern = re.compile(".*".join(parts))
        place = next((i for i in range(at, len(lines)) if pattern.search(lines[i])), None)
        if place is None:
            out.append(wanted)
        else:
            at = place + 1
    return out


@contextlib.contextmanager
def _captured() -> Iterator[io.StringIO]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        yield out


def run_python(block: Block, page: Path, namespace: dict[str, Any], folder: Path) -> str:
    """Run a block, or write the file that its first line names. What it printed."""
    first, _, rest = block.text.partition("\n")
    if first.startswith("# file: "):
        target = folder / first.removeprefix("# file: ").strip()
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(rest, encoding="utf-8")
        return ""
    # line numbers of a traceback are those of the page
    code = compile("\n" * block.line + block.text, str(page), "exec")
    with _captured() as out:
        exec(code, namespace)
    return out.getvalue()


def _weft(arguments: list[str]) -> str:
    with _captured() as out:
        try:
            main.main(arguments, prog_name="weft", standalone_mode=False)
        except SystemExit as error:
            out.write(f"\nexit code {error.code}\n")
        except click.ClickException as error:
            out.write(error.format_message())
    return out.getvalue()


def run_shell(block: Block, folder: Path) -> str:
    """Run the commands of a block in a folder. What they printed, stderr included."""
    variables = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(folder)]),
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "160",
    }
    said = []
    commands = block.text.replace("\\\n", " ").splitlines()
    for command in filter(None, map(str.strip, commands)):
        plain = command.partition(" #")[0]
        if plain.startswith("weft ") and not re.search(r"[<>|&;]", plain):
            if not plain.startswith("weft run"):  # its ranks are processes, whatever calls it
                said.append(_weft(plain.split()[1:]))
                continue
            plain = f"{sys.executable} -m {plain}"
        done = subprocess.run(
            ["bash", "-c", plain], cwd=folder, env=variables, text=True, timeout=120,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
        said.append(done.stdout)
        if done.returncode:
            said.append(f"exit code {done.returncode}\n")
    return "".join(said)


def run_page(page: Path, folder: Path) -> None:
    """Run all blocks of a page in a folder, which is the current one.

    Raises AssertionError with the page and line where the output is not the expected one.
    """
    namespace: dict[str, Any] = {"__name__": "__main__"}
    said, ran = "", False
    for block in blocks(page):
        where = f"{page.relative_to(ROOT)}:{block.line}"
        if block.language == "python":
            said, ran = run_python(block, page, namespace, folder), True
        elif block.language == "sh":
            said, ran = run_shell(block, folder), True
            assert ("exit code" in said) == ("(fails)" in block.section), f"{where}\n{said}"
        elif block.language == "text" and ran:
            lost = missing(block.text, said)
            assert not lost, f"{where}: not in the output: {lost}\n{said}"
            ran = False
        else:
            ran = False
