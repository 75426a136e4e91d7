"""`millrace run`: the service."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from typing import TYPE_CHECKING

import click

from pipeline.commands.common import CommandContext, StopSignals, with_context

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from pipeline.service.children import Companion
    from pipeline.service.worker import WorkerReport
    from pipeline.settings import Settings


@click.command()
@click.option("--exit-at-end", is_flag=True, help="Stop once the offsets found at the start have been reached.")
@click.option("--with-trainer", is_flag=True, help="Start `millrace trainer` beside it, and stop it in the end.")
@with_context
def run(context: CommandContext, exit_at_end: bool, with_trainer: bool) -> None:
    """Read readings, close windows, forecast, write forecasts and dead letters; until SIGTERM or Ctrl-C.

    The champion of the models topic answers; where there is none, the baseline, until the first one comes."""
    settings = context.settings
    require_topics(settings)

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

    signals = StopSignals()
    with _trainer(context) if with_trainer else nullcontext():
        report = serve(context, settings, progress, signals.asked, exit_at_end)
    row = _row(report)
    # So many columns would not fit into a terminal side by side.
    context.emit([row] if context.format == "json" else [{"what": k, "count": v} for k, v in row.items()], title="run")
    signals.leave()


def serve(
    context: CommandContext,
    settings: Settings,
    progress: Callable[[WorkerReport, int], None],
    stop: threading.Event,
    exit_at_end: bool,
) -> WorkerReport:
    """A worker with all that it needs, until it ends; whatever happens, everything is closed."""
    from pipeline.kafka.source import RecordSource
    from pipeline.service.assembly import task_settings
    from pipeline.service.commit import make_committer, open_transactions
    from pipeline.service.feed import ModelFeed
    from pipeline.service.metrics import WorkerMetrics, expose
    from pipeline.service.serving import require_small_rows
    from pipeline.service.versions import ensure_champion
    from pipeline.service.worker import Worker

    core = task_settings(settings)
    with ExitStack() as stack:
        metrics = WorkerMetrics(stack.enter_context(expose(settings.http.address, settings.http.port)))
        ensure_champion(settings)
        feed = ModelFeed(settings, core.spec, metrics)
        stack.callback(feed.close)
        model = feed.first()
        if model is None:
            context.note(
                f"no model on {settings.topics.models_topic}: the baseline answers (status: baseline); `millrace train` makes one"
            )
        else:
            context.note(f"model {model.version}")
        require_small_rows(core, model, settings.readings.max_sensor_bytes)
        transactions = open_transactions(settings)
        stack.callback(transactions.close)
        source = stack.enter_context(RecordSource(settings, settings.topics.readings_topic))
        committer = make_committer(settings, transactions, source)
        stack.callback(committer.close)
        bars = stack.enter_context(RestoreBars(context))
        feed.start()
        worker = Worker(settings, source, committer, model, progress, bars.show, metrics, feed)
        return worker.run(stop, exit_at_end)


def _trainer(context: CommandContext) -> Companion:
    """`millrace trainer` with the settings of this command."""
    from pipeline.service.children import Companion

    arguments = ["trainer", *(["--config", str(context.config)] if context.config else [])]
    servers = context.overrides.get("kafka.bootstrap_servers")
    arguments += ["--bootstrap-servers", servers] if servers else []
    return Companion([*arguments, *(["-v"] if context.verbose else [])])


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


def require_topics(settings: Settings) -> None:
    """The topics that the worker touches exist, partition p of one goes with p of the others, and neither states nor models are
    deleted by age."""
    from pipeline.kafka.topics import require

    topics = settings.topics
    kept = (topics.state_topic, topics.models_topic)
    require(
        settings, topics.readings_topic, topics.forecasts_topic, topics.dead_letters_topic, topics.scores_topic, *kept
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
        "model swaps": report.swaps,
        "seconds": round(report.seconds, 1),
    }
