"""`millrace replay FILE`: a CSV or Parquet file into the readings topic."""

from __future__ import annotations

import csv
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from pipeline.commands.common import INSTANT, CommandContext, with_context

if TYPE_CHECKING:
    from pipeline.service.files import FileLayout
    from pipeline.service.replay import ReplayReport

F = TypeVar("F", bound=Callable[..., Any])


def layout_options(command: F) -> F:
    """The options that say what a file's columns mean; `layout_of` makes a FileLayout of them."""
    options = (
        click.option("--time-column", default="", metavar="C", help="Column of the event time."),
        click.option(
            "--value-columns",
            default="",
            metavar="A,B,…",
            help="Wide file: each is a sensor; * = every numeric column. With --id-column or --sensor: the fields.",
        ),
        click.option(
            "--id-column", default="", metavar="I", help="Long file: column of the sensor id; the others are fields."
        ),
        click.option("--sensor", default="", metavar="NAME", help="The whole file is one sensor; columns are fields."),
        click.option(
            "--field", default="value", show_default=True, help="Wide file: the field's name in the readings."
        ),
        click.option("--time-format", default="", help="strptime format, or s, ms, us, ns for epochs; else found out."),
        click.option("--separator", default="", help="CSV: the separator; else found out."),
        click.option("--decimal", default=".", show_default=True, help="CSV: the decimal point."),
        click.option("--encoding", default="", help="CSV: else UTF-8, or Latin-1 where the file is not."),
    )
    for option in reversed(options):
        command = option(command)
    return command


def layout_of(options: dict[str, Any]) -> FileLayout:
    """What `layout_options` gathered. A column whose name holds a comma goes in double quotes."""
    from pipeline.service.files import FileLayout

    listed = next(csv.reader([options.pop("value_columns")], skipinitialspace=True), [])
    return FileLayout(value_columns=tuple(name for name in listed if name), **options)


class Speed(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """A factor over the original pace, or "max" (None)."""

    name = "speed"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float | None:
        from pipeline.service.replay import check_speed

        try:
            return check_speed(value) if isinstance(value, str) else value
        except ValueError:
            self.fail(f"{value!r}: expected a number above 0, such as 60 for a minute a second, or max", param, ctx)


@click.command()
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--topic", default="", help="Where to; else the settings' readings topic.")
@layout_options
@click.option("--speed", type=Speed(), default="max", show_default=True, metavar="N|max", help="N times original pace.")
@click.option("--from", "from_ms", type=INSTANT, help="Only readings from this event time on.")
@click.option("--to", "to_ms", type=INSTANT, help="Only readings before this event time.")
@with_context
def replay(
    context: CommandContext,
    file: Path,
    topic: str,
    speed: float | None,
    from_ms: int | None,
    to_ms: int | None,
    **layout_words: Any,
) -> None:
    """Send the readings of a CSV or Parquet FILE, in the file's order, with their event time as the record's timestamp.

    \b
    wide file:  millrace replay ETTh1.csv --time-column date --value-columns OT,HUFL
    long file:  millrace replay fleet.csv --time-column time --id-column machine
    """
    from pipeline.kafka.sink import Partitioner, RecordSink
    from pipeline.service.files import read_file
    from pipeline.service.replay import ReadingEncoder, ReplayReport
    from pipeline.service.replay import replay as send

    readings = context.settings.readings
    topic = topic or context.settings.topics.readings_topic
    batches = read_file(file, layout_of(layout_words), from_ms, to_ms)
    first = next(batches, None)  # a layout that does not fit is told before a broker is asked
    if first is not None and not set(first.field_names) & set(readings.fields):
        context.note(
            f"warning: the readings have the fields {', '.join(first.field_names)}, readings.fields names others "
            f"({', '.join(readings.fields)}): the service will find no value in them (a wide file's field: --field)"
        )
    report, started, stop = ReplayReport(), time.monotonic(), threading.Event()
    with _stopped_by_interrupt(stop), RecordSink(context.settings) as sink, _bar(context, file) as on_progress:
        encoder = ReadingEncoder(topic, Partitioner(sink.partitions(topic)), readings.event_time, readings.sensor)
        whole = _chain(first, batches)
        send(whole, encoder, sink, speed, time.monotonic, stop.wait, on_progress, report)
    context.emit(
        [_summary(topic, report, time.monotonic() - started)], title="Stopped" if stop.is_set() else "Replayed"
    )
    if stop.is_set():
        raise SystemExit(130)


def _chain(first: Any, rest: Iterator[Any]) -> Iterator[Any]:
    if first is not None:
        yield first
        yield from rest


@contextmanager
def _stopped_by_interrupt(stop: threading.Event) -> Iterator[None]:
    """The first Ctrl-C or SIGTERM asks to stop, so that what was sent is waited for; a second one does not wait."""

    def ask(number: int, frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _bar(context: CommandContext, file: Path) -> Iterator[Callable[[ReplayReport], None]]:
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with context.progress(*columns, TextColumn("{task.fields[records]:,} readings")) as progress:
        task = progress.add_task(file.name, total=1.0, records=0)

        def on_progress(report: ReplayReport) -> None:
            progress.update(task, completed=report.share_read, records=report.records)

        yield on_progress


def _summary(topic: str, report: ReplayReport, seconds: float) -> dict[str, Any]:
    from pipeline.service.replay import event_times

    first, last = event_times(report)
    return {
        "topic": topic,
        "records": report.records,
        "sensors": len(report.sensors),
        "from": first,
        "to": last,
        "seconds": round(seconds, 2),
        "records/s": round(report.records / max(seconds, 1e-9)),
    }
