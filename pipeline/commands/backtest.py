"""`millrace backtest`: what the service would have said, from its topic or from files."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.commands.common import INSTANT, CommandContext, parse_instant, with_context
from pipeline.commands.replay import layout_of, layout_options
from pipeline.errors import SettingsError

if TYPE_CHECKING:
    from models.training import TrainingProgress
    from pipeline.service.backtest import Answer, Watcher
    from pipeline.service.passage import Progress
    from pipeline.service.question import Question

_OFFSETS = re.compile(r"\d+:\d+(,\d+:\d+)*")


class PlaceType(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """A time, or PARTITION:OFFSET,…"""

    name = "place"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        if _OFFSETS.fullmatch(value):
            pairs = (pair.split(":") for pair in value.split(","))
            return {int(partition): int(offset) for partition, offset in pairs}
        try:
            return parse_instant(value)
        except ValueError:
            self.fail(f"{value!r}: expected a time such as 2026-01-31, or offsets such as 0:1200,1:900", param, ctx)


class Span(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """A duration, to ms; "all": as far back as there is anything."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        from pipeline.settings import parse_duration

        if isinstance(value, int):
            return value
        if value == "all":
            return 2**60
        try:
            return int(parse_duration(value))
        except ValueError:
            self.fail(f'{value!r}: expected a duration such as 14d, or "all"', param, ctx)


@click.command()
@click.option(
    "--data", "files", type=click.Path(path_type=Path, exists=True, dir_okay=False), multiple=True, metavar="FILE",
    help="A CSV or Parquet file instead of the readings topic; may be given again.",
)  # fmt: skip
@layout_options
@click.option(
    "--from", "start", type=PlaceType(), help="Forecasts from this time on, or from offsets such as 0:1200,1:900."
)
@click.option("--to", "end", type=PlaceType(), help="Readings before this time, or before such offsets.")
@click.option(
    "--lead-in",
    "lead_in_ms",
    type=Span(),
    metavar="D|all",
    help="Before --from, to warm the state up; else 4,000 windows.",
)
@click.option(
    "--model", default="", metavar="DIR|VERSION", help="This one answers; else model.path, if it is there (files)."
)
@click.option(
    "--train-until",
    "train_until_ms",
    type=INSTANT,
    metavar="T",
    help="Train on what came before T, forecast from T on.",
)
@click.option(
    "--retrain-every",
    default="",
    metavar="D",
    help="Replay the retraining rule in event time: schedule, drift, gate, rollback.",
)
@click.option(
    "--recorded", is_flag=True, help="The models that answered live, where they took over (topics; the default there)."
)
@click.option("--horizon", type=click.IntRange(min=1), help="Steps ahead; else forecast.horizon.")
@click.option(
    "--stride",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Keep the forecasts of every n-th window.",
)
@click.option(
    "--beside", multiple=True, metavar="NAME", help="AutoETS, AutoARIMA, … of statsforecast at the same cutoffs; slow."
)
@click.option(
    "--beside-history", "history_steps", type=click.IntRange(min=12), help="Steps these see; else ten seasons."
)
@click.option("--show", "shown", multiple=True, metavar="S", help="A sensor for the report; may be given again.")
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), required=True, metavar="DIR", help="Where all goes."
)
@click.option("--overwrite", is_flag=True, help="What DIR holds of another backtest may go.")
@with_context
def backtest(
    context: CommandContext,
    files: tuple[Path, ...],
    horizon: int | None,
    shown: tuple[str, ...],
    out: Path,
    beside: tuple[str, ...],
    history_steps: int | None,
    **asked: Any,
) -> None:
    """What the service would have said, by its own code: from the readings topic, or from files.

    Event time drives everything; nothing that comes later is known. Into DIR go forecasts.parquet (a row a lead),
    metrics.csv, report.html and settings.toml. Stopped half-way, the same command goes on where it was.

    \b
    live once more:    millrace backtest --from 2026-10-01 --to 2026-11-01 --out october
    a file:            millrace backtest --data ETTh1.csv --time-column date --value-columns '*' \\
                           --train-until 2017-07-01 --out etth1
    with retraining:   millrace backtest --data … --retrain-every 7d --out etth1-weekly
    """
    from pipeline.service.backtest import of_file, of_topic
    from pipeline.service.question import Question

    layout = {name: asked.pop(name) for name in list(asked) if name not in Question.__dataclass_fields__}
    question = Question(beside=beside, history_steps=history_steps or 0, out=out, **asked)
    if horizon is not None:
        context.overrides["forecast.horizon"] = horizon
    if not files and any(value for name, value in layout.items() if name not in ("decimal", "field")):
        raise SettingsError(
            "the columns of a file were named, but no file: add --data FILE, or leave them out to read the topic"
        )
    with watching(context) as watcher:
        if files:
            answer = of_file(context.settings, files, layout_of(layout), question, watcher)
        else:
            answer = of_topic(context.settings, question, watcher)
    _report(context, answer, question, shown)


def _report(context: CommandContext, answer: Answer, question: Question, shown: tuple[str, ...]) -> None:
    from pipeline.service.results import METRICS_FILE, REPORT_FILE, SETTINGS_FILE, overall, speed_up

    out = question.out
    assert out is not None
    metrics = answer.write(out, shown)
    outcome = answer.outcome
    context.emit(overall(metrics), title="Over all sensors and leads")
    speed = speed_up(outcome)
    context.note(
        f"{outcome.counts.readings:,} readings, {outcome.matching.forecasts:,} forecasts in {outcome.seconds:.1f} s"
        + (f": event time {speed:,.0f} times as fast as it was lived" if speed else "")
    )
    context.note(f"in {out}: forecasts.parquet, {METRICS_FILE}, {REPORT_FILE}, {SETTINGS_FILE}")


@contextmanager
def watching(context: CommandContext) -> Iterator[Watcher]:
    """Bars on standard error: how far the data has been read, and each training."""
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn

    from pipeline.service.backtest import Watcher

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with context.progress(*columns, TextColumn("{task.fields[said]}")) as bars:
        reading = bars.add_task("forecasting", total=1.0, said="", visible=False)
        training = bars.add_task("training", total=1.0, said="", visible=False)

        def progress(at: Progress) -> None:
            bars.update(training, visible=False)
            bars.update(
                reading,
                completed=at.share_read,
                said=f"{_moment(at.event_ms)}  {at.forecasts:,} forecasts",
                visible=True,
            )

        def trained(at: TrainingProgress) -> None:
            share = (at.epoch - 1 + at.done) / at.epochs
            bars.update(
                training, completed=share, said=f"epoch {at.epoch}/{at.epochs}, loss {at.loss:.4f}", visible=True
            )

        def note(text: str) -> None:
            bars.console.print(text, markup=False, highlight=False)

        yield Watcher(note, progress, trained)


def _moment(epoch_ms: int | None) -> str:
    from pipeline.service.words import moment

    return "" if epoch_ms is None else f"{moment(epoch_ms)} UTC"
