"""`millrace config show|validate`: the settings in force, each with its source."""

from __future__ import annotations

from typing import Any

import click

from pipeline.commands.common import CommandContext, with_context


@click.group()
def config() -> None:
    """The settings in force."""


@config.command()
@with_context
def show(context: CommandContext) -> None:
    """Every key with its value and where it came from; secrets are masked."""
    from pipeline.settings import describe

    context.emit([*describe(context.settings), *_state_size(context)], title="Settings")


@config.command()
@with_context
def validate(context: CommandContext) -> None:
    """Check the settings: exit status 0 if they are right, 2 with the offending key if not."""
    sources = sorted(set(context.settings.sources.values())) or ["defaults"]
    context.emit([{"valid": True, "sources": ", ".join(sources)}])


def _state_size(context: CommandContext) -> list[dict[str, Any]]:
    """What the state of one sensor takes in each profile, as last rows; the network's hidden state included."""
    from pipeline.service.assembly import bytes_by_profile

    chosen = context.settings.forecast.profile
    return [
        {
            "key": f"(state, bytes per sensor: {profile})",
            "value": size,
            "source": "computed, in force" if profile == chosen else "computed",
        }
        for profile, size in bytes_by_profile(context.settings).items()
    ]
