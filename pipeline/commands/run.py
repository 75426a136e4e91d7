"""`millrace run`: the service."""

from __future__ import annotations

import signal
import threading
from typing import TYPE_CHECKING

import click

from pipeline.commands.common import CommandContext, with_context

if TYPE_CHECKING:
    from pipeline.service.worker import WorkerReport
    from pipeline.settings import Settings


@click.command()
@click.option("--exit-at-end", is_flag=True, help="Stop once the offsets found at the start have been reached.")
@with_context
def run(context: CommandContext, exit_at_end: bool) -> None:
    """Read readings, close windows, forecast, write forecasts and dead letters; until SIGTERM or Ctrl-C."""
    from pipeline.kafka.sink import RecordSink
    from pipeline.kafka.source import RecordSource
    from pipeline.service.assembly import load_model
    from pipeline.service.worker import Worker

    settings = context.settings
    _require_topics(settings)
    model = load_model(settings)
    if model is None:
        context.note(
            f"no model at {settings.model.path!r}: the baseline answers (status: baseline); `millrace train` makes one"
        )
    else:
        context.note(f"model {model.version}")

    def progress(report: WorkerReport, lag: int) -> None:
        counts = report.counts
        if not report.partitions:
            context.note(
                "waiting for the group to give this worker a partition (a member that was killed keeps its own for 45 s)"
            )
            return
        refused = sum(counts.rejected.values()) + counts.late
        rate = (counts.records + report.rebuilt) / max(report.seconds, 1e-9)
        context.note(
            f"{counts.readings:,} readings, {counts.forecasts:,} forecasts, {refused:,} dead letters, "
            f"{report.sensors:,} sensors, {report.rebuilt:,} records read again, {rate:,.0f} records/s, lag {lag:,}"
        )
        if counts.steps and not counts.forecasts:
            targets = settings.readings.targets or settings.readings.fields
            context.note(f"no forecast: no reading had a value in {', '.join(targets)}; check readings.fields")

    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    interrupted = threading.Event()

    def on_interrupt(*_: object) -> None:
        interrupted.set()
        stop.set()

    signal.signal(signal.SIGINT, on_interrupt)
    source = RecordSource(settings, settings.topics.readings_topic)
    try:
        sink = RecordSink(settings)
        try:
            report = Worker(settings, source, sink, model, progress).run(stop, exit_at_end)
        finally:
            sink.close()
    finally:
        source.close()
    context.emit([_row(report)], title="run")
    if interrupted.is_set():
        raise SystemExit(130)


def _require_topics(settings: Settings) -> None:
    """The three topics that the worker touches exist, and partition p of one goes with p of the others."""
    from pipeline.errors import DeploymentError
    from pipeline.kafka.topics import check

    topics = settings.topics
    touched = (topics.readings_topic, topics.forecasts_topic, topics.dead_letters_topic)
    for finding in check(settings):
        if finding.topic in touched and (finding.what == "topic" or finding.what.startswith("partitions")):
            raise DeploymentError(
                f'topic "{finding.topic}": {finding.what}: expected {finding.expected}, found {finding.found}; {finding.mend}'
            )


def _row(report: WorkerReport) -> dict[str, object]:
    counts = report.counts
    return {
        "records": counts.records,
        "readings": counts.readings,
        "late": counts.late,
        "rejected": sum(counts.rejected.values()),
        "windows": counts.steps,
        "of them gaps": counts.gap_steps,
        "resets": counts.resets,
        "forecasts": counts.forecasts,
        "sensors": report.sensors,
        "read again": report.rebuilt,
        "seconds": round(report.seconds, 1),
    }
