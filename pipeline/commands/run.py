"""`millrace run`: the service."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING

import click

from pipeline.commands.common import CommandContext, with_context

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from models.forecaster import Forecaster
    from pipeline.service.worker import WorkerReport
    from pipeline.settings import Settings


@click.command()
@click.option("--exit-at-end", is_flag=True, help="Stop once the offsets found at the start have been reached.")
@with_context
def run(context: CommandContext, exit_at_end: bool) -> None:
    """Read readings, close windows, forecast, write forecasts and dead letters; until SIGTERM or Ctrl-C."""
    from pipeline.service.assembly import load_model, task_settings
    from pipeline.service.serving import require_small_rows

    settings = context.settings
    _require_topics(settings)
    model = load_model(settings)
    if model is None:
        context.note(
            f"no model at {settings.model.path!r}: the baseline answers (status: baseline); `millrace train` makes one"
        )
    else:
        context.note(f"model {model.version}")
    require_small_rows(task_settings(settings), model, settings.readings.max_sensor_bytes)

    def progress(report: WorkerReport, lag: int) -> None:
        counts = report.counts
        if not report.partitions:
            context.note(
                "waiting for the group to give this worker a partition (a member that was killed keeps its own for "
                f"{settings.kafka.session_timeout_ms / 1000:.0f} s: kafka.session_timeout)"
            )
            return
        refused = sum(counts.rejected.values()) + counts.late
        rate = (counts.records + report.rebuilt) / max(report.seconds, 1e-9)
        context.note(
            f"{counts.readings:,} readings, {counts.forecasts:,} forecasts, {refused:,} dead letters, "
            f"{report.sensors:,} sensors, {report.rebuilt:,} records read again, {report.checkpoints:,} checkpoints, "
            f"{rate:,.0f} records/s, lag {lag:,}"
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
    report = serve(context, settings, model, progress, stop, exit_at_end)
    row = _row(report)
    # So many columns would not fit into a terminal side by side.
    context.emit([row] if context.format == "json" else [{"what": k, "count": v} for k, v in row.items()], title="run")
    if interrupted.is_set():
        raise SystemExit(130)


def serve(
    context: CommandContext,
    settings: Settings,
    model: Forecaster | None,
    progress: Callable[[WorkerReport, int], None],
    stop: threading.Event,
    exit_at_end: bool,
) -> WorkerReport:
    """A worker with all that it needs, until it ends; whatever happens, everything is closed."""
    from pipeline.kafka.source import RecordSource
    from pipeline.service.commit import make_committer, open_transactions
    from pipeline.service.metrics import WorkerMetrics, expose
    from pipeline.service.worker import Worker

    with ExitStack() as stack:
        metrics = WorkerMetrics(stack.enter_context(expose(settings.http.address, settings.http.port)))
        transactions = open_transactions(settings)
        stack.callback(transactions.close)
        source = stack.enter_context(RecordSource(settings, settings.topics.readings_topic))
        committer = make_committer(settings, transactions, source)
        stack.callback(committer.close)
        bars = stack.enter_context(RestoreBars(context))
        worker = Worker(settings, source, committer, model, progress, bars.show, metrics)
        return worker.run(stop, exit_at_end)


class RestoreBars:
    """A progress bar for each partition whose state is being restored, on standard error, while there are any."""

    def __init__(self, context: CommandContext) -> None:
        self._context = context
        self._progress: Progress | None = None
        self._tasks: dict[int, TaskID] = {}

    def show(self, partition: int, read: int, total: int) -> None:
        """Offsets of the changelog read so far; equal: this one is done."""
        if read >= total and partition not in self._tasks:
            return  # done before it could be seen
        if self._progress is None:
            self._progress = self._context.progress()
            self._progress.start()
        if partition not in self._tasks:
            self._tasks[partition] = self._progress.add_task(f"restoring partition {partition}", total=total)
        self._progress.update(self._tasks[partition], completed=read)
        if read >= total:
            del self._tasks[partition]
            if not self._tasks:
                self.close()

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def __enter__(self) -> RestoreBars:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _require_topics(settings: Settings) -> None:
    """The four topics that the worker touches exist, partition p of one goes with p of the others, and states are not
    deleted by age."""
    from pipeline.errors import DeploymentError
    from pipeline.kafka.topics import check

    topics = settings.topics
    touched = (topics.readings_topic, topics.forecasts_topic, topics.dead_letters_topic, topics.state_topic)
    for finding in check(settings):
        needed = finding.what == "topic" or finding.what.startswith("partitions")
        compaction = finding.topic == topics.state_topic and finding.what == "cleanup.policy"
        if finding.topic in touched and (needed or compaction):
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
        "restored": report.restored,
        "read again": report.rebuilt,
        "checkpoints": report.checkpoints,
        "seconds": round(report.seconds, 1),
    }
