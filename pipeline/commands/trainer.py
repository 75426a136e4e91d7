"""`millrace trainer` and `millrace retrain`: learning while it runs."""

from __future__ import annotations

import os
import signal
import threading

import click

from pipeline.commands.common import CommandContext, with_context
from pipeline.errors import DeploymentError, SettingsError

NICENESS = 10
"""Whoever serves goes first."""


@click.command()
@with_context
def trainer(context: CommandContext) -> None:
    """Learn again on schedule, on drift or when asked; promote what is better, take back what disappoints; until SIGTERM or Ctrl-C.

    Of several trainers one works and the others stand by. `millrace run --with-trainer` starts one beside the worker."""
    from pipeline.kafka.source import RecordSource
    from pipeline.service.children import ended_with_parent
    from pipeline.service.metrics import TrainerMetrics, expose
    from pipeline.service.trainer import Trainer, trainer_settings

    settings = context.settings
    if not settings.scoring.publish:
        raise SettingsError(
            f"scoring.publish = false ({settings.source_of('scoring.publish')}): the trainer lives on the scores that workers "
            "publish; expected true"
        )
    _require_topics(context)
    stop = threading.Event()
    interrupted = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())

    def on_interrupt(*_: object) -> None:
        interrupted.set()
        stop.set()

    signal.signal(signal.SIGINT, on_interrupt)
    os.nice(NICENESS)
    with (
        expose(settings.http.address, settings.http.trainer_port) as registry,
        RecordSource(trainer_settings(settings), settings.topics.control_topic) as control,
    ):
        context.note("the trainer waits for its turn")
        Trainer(settings, control, TrainerMetrics(registry)).run(lambda: stop.is_set() or ended_with_parent())
    if interrupted.is_set():
        raise SystemExit(130)


@click.command()
@click.option("--reason", default="", help="Why: it will stand in the decision's record.")
@with_context
def retrain(context: CommandContext, reason: str) -> None:
    """Ask the trainer to learn again now. The decision appears in `millrace models show`."""
    from pipeline.service.requests import ask_to_retrain

    ask_to_retrain(context.settings, reason)
    context.note(f"asked on {context.settings.topics.control_topic}; the trainer that is on duty takes it up")


def _require_topics(context: CommandContext) -> None:
    from pipeline.kafka.topics import check

    topics = context.settings.topics
    touched = (topics.readings_topic, topics.scores_topic, topics.models_topic, topics.control_topic)
    for finding in check(context.settings):
        if finding.topic in touched and finding.what == "topic":
            raise DeploymentError(f'topic "{finding.topic}" is missing; {finding.mend}')
