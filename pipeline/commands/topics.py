"""`millrace topics create|check`: the topics that the settings need."""

from __future__ import annotations

from dataclasses import asdict

import click

from pipeline.commands.common import CommandContext, CommandError, with_context


@click.group()
def topics() -> None:
    """The topics that the settings need."""


@topics.command()
@click.option("--alter", is_flag=True, help="Also set the configs (retention, compaction) of topics that exist.")
@with_context
def create(context: CommandContext, alter: bool) -> None:
    """Make the topics that are missing; leave those that exist as they are."""
    from pipeline.kafka import topics as adapter

    context.emit(adapter.create(context.settings, alter=alter), title="Topics")


@topics.command()
@with_context
def check(context: CommandContext) -> None:
    """Hold the topics against the settings. Exit status 1 and what mends it, if something is wrong."""
    from pipeline.kafka import topics as adapter

    findings = adapter.check(context.settings)
    if findings or context.format == "json":
        context.emit([asdict(finding) for finding in findings], title="Findings")
    if findings:
        raise CommandError("the topics are not as the settings need them: the column `mend` says what to do.")
    context.note("All seven topics are as the settings need them.")
