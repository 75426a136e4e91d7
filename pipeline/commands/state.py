"""`millrace state show|check|reset`: what the changelog knows of the sensors."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, cast

import click

from pipeline.commands.common import CommandContext, CommandError, with_context

if TYPE_CHECKING:
    from pipeline.service.states import To


@click.group()
def state() -> None:
    """Sensor states in the changelog."""


@state.command()
@click.argument("sensor")
@with_context
def show(context: CommandContext, sensor: str) -> None:
    """The state of SENSOR, as its partition's newest checkpoint has it."""
    from pipeline.service import states

    context.emit(states.show(context.settings, sensor), title=f"State of {sensor}")


@state.command()
@with_context
def check(context: CommandContext) -> None:
    """Read the whole changelog and verify it: every block is there and unaltered, it fits the settings, the group and the
    log. Exit status 1, and what mends it, if something is wrong."""
    from pipeline.service import states

    found = states.check(context.settings)
    context.emit([asdict(row) for row in found], title="Changelog")
    if wrong := [row.partition for row in found if row.finding]:
        raise CommandError(f"partitions {', '.join(map(str, wrong))}: the column `finding` says what is wrong.")
    missing = sum(row.checkpoint is None for row in found)
    if missing:
        context.note(f"{missing} of {len(found)} partitions have no checkpoint yet.")


@state.command()
@click.option(
    "--to",
    type=click.Choice(["committed", "beginning", "end", "checkpoint"]),
    default="committed",
    show_default=True,
    help="Where the group goes on: where it is; at the oldest reading left; at the newest; at its checkpoints (kept).",
)
@click.option("--yes", is_flag=True, help="Do not ask.")
@with_context
def reset(context: CommandContext, to: str, yes: bool) -> None:
    """Forget all checkpoints, so that workers rebuild the states from the readings that are left; for when a worker has stopped
    with an error that names this command. The group's workers must be stopped."""
    from pipeline.service import states

    settings = context.settings
    if not yes:
        what = "Set the offsets" if to == "checkpoint" else f'Forget the states in "{settings.topics.state_topic}"'
        click.confirm(f'{what} of group "{settings.kafka.group_id}" (--to {to})?', abort=True, err=True)
    context.emit(states.reset(settings, cast("To", to)), title="Reset")
