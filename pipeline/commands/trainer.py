"""`millrace trainer` and `millrace retrain`: learning while it runs."""

from __future__ import annotations

import os

import click

from pipeline.commands.common import CommandContext, StopSignals, with_context
from pipeline.errors import SettingsError

NICENESS = 10
"""Whoever serves goes first."""


@click.command()
@with_context
def trainer(context: CommandContext) -> None:
    """Learn again on schedule, on drift or when asked; promote what is better, take back what disappoints; until SIGTERM or Ctrl-C.

    Of several trainers one works and the others stand by. `millrace run --with-trainer` starts one beside the worker."""
    from pipeline.kafka.source import RecordSource
    from pipeline.kafka.topics import require
    from pipeline.service.children import ended_with_parent
    from pipeline.service.metrics import TrainerMetrics, expose
    from pipeline.service.trainer import Trainer, trainer_settings

    settings = context.settings
    if not settings.scoring.publish:
        raise SettingsError(
            f"scoring.publish = false ({settings.source_of('scoring.publish')}): the trainer lives on the scores that workers "
            "publish; expected true"
        )
    topics = settings.topics
    require(settings, topics.readings_topic, topics.scores_topic, topics.models_topic, topics.control_topic)
    signals = StopSignals()
    os.nice(NICENESS)
    with (
        expose(settings.http.address, settings.http.trainer_port) as registry,
        RecordSource(trainer_settings(settings), topics.control_topic) as control,
    ):
        context.note("the trainer waits for its turn")
        Trainer(settings, control, TrainerMetrics(registry)).run(lambda: signals.asked.is_set() or ended_with_parent())
    signals.leave()


@click.command()
@click.option("--reason", default="", help="Why: it will stand in the decision's record.")
@with_context
def retrain(context: CommandContext, reason: str) -> None:
    """Ask the trainer to learn again now. `millrace models list --decisions` has the answer."""
    from pipeline.service.requests import ask_to_retrain

    ask_to_retrain(context.settings, reason)
    context.note(f"asked on {context.settings.topics.control_topic}; the trainer that is on duty takes it up")
