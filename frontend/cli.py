"""The command line. Each command is one call into the library, and is loaded when it is asked for:
`weft --help` and `weft inspect` take no torch."""

from __future__ import annotations

from importlib import import_module

import click

from .cli_common import diagnosed
from .options import OPTIONS

#: command -> (module of this package, its name there, first line of its help)
COMMANDS: dict[str, tuple[str, str, str]] = {
    "compile": (
        "cli_compile", "compile_command",
        "Plan TARGET (module:factory) ahead of time and write an artifact; no device is needed.",
    ),
    "search": (
        "cli_search", "search_command",
        "Search stages, micro-batches and placements of TARGET together, and say what lost.",
    ),
    "run": (
        "cli_run", "run",
        "Run an artifact on its example inputs, under torchrun or starting the processes itself.",
    ),
    "inspect": (
        "cli_inspect", "inspect",
        "Show what an artifact holds: levels, collectives, placements, an op's history.",
    ),
    "simulate": (
        "cli_simulate", "simulate_command",
        "Replay a step: its time, memory, critical path, and where it waits for communication.",
    ),
    "calibrate": (
        "cli_calibrate", "calibrate_command",
        "Measure this machine: rates, the cost of a launch, and at most 64 kernels; three minutes.",
    ),
    "verify": (
        "cli_verify", "verify",
        "Run every dump on the same inputs in one process and compare; exit 0 only if all agree.",
    ),
    "opt": ("cli_opt", "opt", "Run passes on a dump by hand."),
    "doctor": ("cli_doctor", "doctor", "Say what this installation can do, and what is missing."),
}  # fmt: skip


class _Commands(click.Group):
    """A group whose commands are imported when they run."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All names."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command."""
        if cmd_name not in COMMANDS:
            return None
        module, name, _ = COMMANDS[cmd_name]
        found: click.Command = getattr(import_module(f".{module}", __package__), name)
        return found

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of commands, without importing them."""
        width = formatter.width - 6 - max(map(len, COMMANDS))
        rows = [
            (name, click.Command(name, help=text).get_short_help_str(width))
            for name, (_, _, text) in COMMANDS.items()
        ]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="weft")
@diagnosed
def main() -> None:
    """Weave a one-device PyTorch program across a cluster.

    \b
    weft compile pkg.mod:factory --cluster 2x8:h100 --train adamw -o out/
    weft run out/         weft inspect out/         weft verify out/
    """
    if OPTIONS.logs:
        from .logs import configure  # knows all passes, which takes a while to load

        configure(OPTIONS.logs)


__all__ = ["COMMANDS", "main"]
