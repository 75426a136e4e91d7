"""`millrace watch`: live in the terminal."""

from __future__ import annotations

import click

from pipeline.commands.common import CommandContext, with_context


@click.command()
@click.argument("sensor", required=False)
@click.option("--frames", type=click.IntRange(min=1), metavar="N", help="End after so many updates.")
@click.option("--for", "seconds", type=click.FloatRange(min=0), metavar="SECONDS", help="End after so long.")
@with_context
def watch(context: CommandContext, sensor: str | None, frames: int | None, seconds: float | None) -> None:
    """Show SENSOR's recent values, its forecast and how the one before came out; without SENSOR the busiest one.

    Ends on Ctrl-C. Where standard output is no terminal, one line is printed for each update."""
    from pipeline.service.watch import watch as show

    show(context.settings, sensor, frames, seconds, as_json=context.format == "json")
