"""`weft search`: search stages, micro-batches, order and placements together, and say why."""

from __future__ import annotations

import click

from .cli_common import console, diagnosed


@click.command("search")
@click.argument("target")
@click.option("--cluster", default="", help="HOSTSxDEVICES:KIND, or a TOML file. Default: one cpu.")
@click.option(
    "--train", default="", help="Build the train step with this optimizer: adamw, adam, sgd."
)
@click.option("--budget", default="", help="Time after which the best plan so far is taken: 10s.")
@click.option("--stages", type=click.IntRange(1), help="Number of pipeline stages.")
@click.option("--micro", type=click.IntRange(1), help="Number of micro-batches.")
@click.option("--order", default="", help="gpipe, 1f1b or interleaved.")
@click.option("--no-recompute", is_flag=True, help="Compute no activations again in backward.")
@click.option("--constraints", default="", help="What placements must obey; see docs/search.md.")
@diagnosed
def search_command(
    target: str, cluster: str, train: str, budget: str, stages: int | None, micro: int | None,
    order: str, no_recompute: bool, constraints: str,
) -> None:
    """Search stages, micro-batches and placements of TARGET together, and say what lost."""
    from .load_target import load_target  # torch takes seconds to load, help needs none
    from .searching import search_target

    found = search_target(
        load_target(target), cluster=cluster or "1x1:cpu", train=train, budget=budget or "inf",
        stages=stages, micro=micro, order=order, recompute=not no_recompute,
        constraints=constraints,
    )  # fmt: skip
    console.print(found.explain(), markup=False)


__all__ = ["search_command"]
