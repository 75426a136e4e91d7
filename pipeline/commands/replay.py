"""`millrace replay FILE` and `millrace replay --from-topic T`: a file, or another topic, into the readings topic."""

from __future__ import annotations

import csv
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from pipeline.commands.common import INSTANT, CommandContext, with_context
from pipeline.errors import SettingsError

if TYPE_CHECKING:
    from pipeline.service.copy import TimeRange
    from pipeline.service.files import FileLayout
    from pipeline.service.replay import ReplayReport
    from pipeline.settings import Settings

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
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False), required=False)
@click.option("--from-topic", default="", metavar="T", help="Instead of a FILE: copy this topic's records.")
@click.option("--from-servers", default="", metavar="HOST:PORT", help="Brokers of --from-topic, if of another cluster.")
@click.option("--topic", default="", help="Where to; else the settings' readings topic.")
@layout_options
@click.option("--speed", type=Speed(), default="max", show_default=True, metavar="N|max", help="N times original pace.")
@click.option("--from", "from_ms", type=INSTANT, help="Only readings from this event time (record timestamp) on.")
@click.option("--to", "to_ms", type=INSTANT, help="Only readings before this event time (record timestamp).")
@with_context
def replay(
    context: CommandContext,
    file: Path | None,
    from_topic: str,
    from_servers: str,
    topic: str,
    speed: float | None,
    from_ms: int | None,
    to_ms: int | None,
    **layout_words: Any,
) -> None:
    """Send the readings of a CSV or Parquet FILE, in the file's order, with their event time as the record's timestamp.

    Or copy the committed records of another topic as they are (key, value, headers, timestamp), in the order of their
    timestamps. Where it ends is fixed at the start: what comes into that topic later is left alone.

    \b
    wide file:  millrace replay ETTh1.csv --time-column date --value-columns OT,HUFL
    long file:  millrace replay fleet.csv --time-column time --id-column machine
    topic:      millrace replay --from-topic plant.readings.v1 --topic staging.readings.v1 --from 2026-06-01 --speed 60
    """
    _require_one_origin(file, from_topic, from_servers, layout_words)
    topic = topic or context.settings.topics.readings_topic
    if file is None:
        from pipeline.service.copy import TimeRange

        if from_ms is not None and to_ms is not None and from_ms >= to_ms:
            raise click.UsageError(f"{TimeRange(from_ms, to_ms)} is empty: --from must lie before --to")
        _copy(context, from_topic, from_servers, topic, speed, TimeRange(from_ms, to_ms))
    else:
        _send(context, file, layout_of(layout_words), topic, speed, from_ms, to_ms)


def _require_one_origin(file: Path | None, from_topic: str, from_servers: str, layout_words: Collection[str]) -> None:
    if file is None and not from_topic:
        raise click.UsageError("nothing to replay: name a FILE, or a topic to copy with --from-topic")
    if file is not None and from_topic:
        raise click.UsageError(f"FILE {str(file)!r} and --from-topic {from_topic!r}: name one of the two")
    if file is not None and from_servers:
        raise click.UsageError(f"--from-servers {from_servers!r} needs --from-topic; FILE {str(file)!r} has no brokers")
    if from_topic and (given := _given(layout_words)):
        raise click.UsageError(
            f"{', '.join(given)}: for the columns of a FILE, the records of --from-topic are copied as they are;"
            " leave that out"
        )


def _given(names: Collection[str]) -> list[str]:
    """Those of the options that were on the command line, as they are written."""
    context = click.get_current_context()
    return [
        parameter.opts[0]
        for parameter in context.command.params
        if parameter.name in names and context.get_parameter_source(parameter.name) is ParameterSource.COMMANDLINE
    ]


def _send(
    context: CommandContext,
    file: Path,
    layout: FileLayout,
    topic: str,
    speed: float | None,
    from_ms: int | None,
    to_ms: int | None,
) -> None:
    from pipeline.kafka.sink import Partitioner, RecordSink
    from pipeline.service.files import read_file
    from pipeline.service.replay import ReadingEncoder, ReplayReport
    from pipeline.service.replay import replay as send

    readings = context.settings.readings
    batches = read_file(file, layout, from_ms, to_ms)
    first = next(batches, None)  # a layout that does not fit is told before a broker is asked
    if first is not None and not set(first.field_names) & set(readings.fields):
        context.note(
            f"warning: the readings have the fields {', '.join(first.field_names)}, readings.fields names others "
            f"({', '.join(readings.fields)}): the service will find no value in them (a wide file's field: --field)"
        )
    report, started, stop = ReplayReport(), time.monotonic(), threading.Event()
    with (
        _stopped_by_interrupt(stop),
        RecordSink(context.settings) as sink,
        _bar(context, file.name, "readings") as on_progress,
    ):
        encoder = ReadingEncoder(topic, Partitioner(sink.partitions(topic)), readings.event_time, readings.sensor)
        whole = _chain(first, batches)
        send(whole, encoder, sink, speed, time.monotonic, stop.wait, on_progress, report)
    sensors = {"sensors": len(report.sensors)}
    _end(context, _summary(topic, report, time.monotonic() - started, sensors), stop, "Replayed")


def _copy(
    context: CommandContext, from_topic: str, from_servers: str, topic: str, speed: float | None, wanted: TimeRange
) -> None:
    from pipeline.kafka.sink import RecordSink
    from pipeline.service.copy import RecordCopier, copy, nothing_copied, open_source, target_partitions
    from pipeline.service.replay import ReplayReport

    settings, from_settings = context.settings, _settings_of_source(context, from_servers)
    report, started, stop = ReplayReport(), time.monotonic(), threading.Event()
    with _stopped_by_interrupt(stop):
        _require_another(from_settings, from_topic, settings, topic)
        with open_source(from_settings, from_topic) as source, RecordSink(settings) as sink:
            count = len(source.partitions)
            copier = RecordCopier(topic, count, target_partitions(settings, sink, topic, count))
            context.note(copier.rule)
            with _bar(context, from_topic, "records") as on_progress:
                copy(source, wanted, copier, sink, speed, time.monotonic, stop.wait, on_progress, report)
            seconds = time.monotonic() - started
            if not report.records and not stop.is_set():
                context.note(nothing_copied(source, wanted))
    _end(context, _summary(topic, report, seconds), stop, "Copied")


def _settings_of_source(context: CommandContext, from_servers: str) -> Settings:
    """The same settings, with other brokers."""
    from pipeline.settings import load

    if not from_servers:
        return context.settings
    try:
        return load(context.config, overrides={**context.overrides, "kafka.bootstrap_servers": from_servers})
    except SettingsError as error:
        raise SettingsError(str(error).replace("--bootstrap-servers", "--from-servers")) from None


def _require_another(from_settings: Settings, from_topic: str, settings: Settings, topic: str) -> None:
    from pipeline.service.copy import is_same_cluster

    if from_topic == topic and is_same_cluster(from_settings, settings):
        raise click.UsageError(
            f"{topic!r} at {settings.kafka.bootstrap_servers} is both source and target; name another target with --topic,"
            " or the source's cluster with --from-servers"
        )


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
def _bar(context: CommandContext, origin: str, what: str) -> Iterator[Callable[[ReplayReport], None]]:
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with context.progress(*columns, TextColumn("{task.fields[records]:,} " + what)) as progress:
        task = progress.add_task(origin, total=1.0, records=0)

        def on_progress(report: ReplayReport) -> None:
            progress.update(task, completed=report.share_read, records=report.records)

        yield on_progress


def _end(context: CommandContext, summary: dict[str, Any], stop: threading.Event, title: str) -> None:
    context.emit([summary], title="Stopped" if stop.is_set() else title)
    if stop.is_set():
        raise SystemExit(130)


def _summary(
    topic: str, report: ReplayReport, seconds: float, more: Mapping[str, Any] = MappingProxyType({})
) -> dict[str, Any]:
    from pipeline.service.replay import event_times

    first, last = event_times(report)
    return {
        "topic": topic,
        "records": report.records,
        **more,
        "from": first,
        "to": last,
        "seconds": round(seconds, 2),
        "records/s": round(report.records / max(seconds, 1e-9)),
    }
