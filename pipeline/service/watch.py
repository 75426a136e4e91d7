"""What the terminal shows of a running stream: one sensor's values and forecasts, a few of its neighbours.

`Tail` reads a topic's end, `StreamView` keeps what is worth showing, `screen` and `line` draw it. The view closes windows with the
same code as the service, so that a forecast is held against the very value that it spoke of.
"""

from __future__ import annotations

import difflib
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final, Self

import numpy as np
import orjson
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pipeline.errors import MillraceError
from pipeline.kafka.source import RecordSource
from pipeline.service.assembly import task_settings
from pipeline.service.chart import Chart
from pipeline.settings import Settings
from pipeline.stream.columns import RecordColumns
from pipeline.stream.task import StepTask, TaskSettings

READINGS_BACK: Final = 20_000
FORECASTS_BACK: Final = 2_000
"""How far before the end of each partition a view begins: some days of a few dozen sensors, a second's reading."""
PATIENCE_SECONDS: Final = 5.0
"""How long a sensor that was asked for may stay away while others are heard."""
NEIGHBOURS: Final = 5

_TRUTH, _NOW, _THEN = "bright_white", "bright_cyan", "bright_magenta"
_NOW_GROUND, _THEN_GROUND = "#12365a", "#3d1f4d"
_STATUS_COLOURS: Final = {
    "ok": "green",
    "warming": "yellow",
    "baseline": "yellow",
    "stale": "red",
    "provisional": "yellow",
}


class UnknownSensorError(MillraceError):
    """A sensor that the stream does not hold."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """One forecast message, of one target."""

    sensor: str
    issued_at_ms: int
    step_ms: int
    mean: list[float | None]
    quantiles: dict[str, list[float | None]]
    """"q0.1" -> one value a lead, levels ascending."""
    model: str
    status: str
    state_steps: int
    partition: int
    offset: int

    @staticmethod
    def parse(value: bytes, target: str) -> Forecast:
        """From a message of the forecasts topic."""
        message = orjson.loads(value)
        series = dict(message["targets"][target])
        source = message["source"]
        mean = series.pop("mean")
        return Forecast(
            message["sensor"],
            message["issued_at"],
            message["step_ms"],
            mean,
            series,
            message["model"],
            message["status"],
            message["state_steps"],
            source["partition"],
            source["offset"],
        )

    @property
    def ends_ms(self) -> list[int]:
        """Ends of the windows that it speaks of, lead 1 first."""
        return [self.issued_at_ms + lead * self.step_ms for lead in range(1, len(self.mean) + 1)]

    @property
    def outer(self) -> tuple[list[float | None], list[float | None]]:
        """The outermost quantiles: what most truths should fall between."""
        levels = list(self.quantiles.values())
        return (levels[0], levels[-1]) if levels else (self.mean, self.mean)

    @property
    def middle(self) -> list[float | None]:
        """The median; the mean where it is not among the quantiles."""
        return self.quantiles.get("q0.5", self.mean)


@dataclass(slots=True)
class StreamView:
    """What has been seen of the stream, bounded in size.

    sensor: the one in the middle; None = the busiest of the first readings that come."""

    settings: TaskSettings
    sensor: str | None = None
    target: str = ""
    keep_steps: int = 0
    values: deque[tuple[int, float]] = field(default_factory=deque)
    """(window end, value) of the watched sensor; NaN = a window without readings."""
    forecasts: deque[Forecast] = field(default_factory=deque)
    """Of the watched sensor, oldest first."""
    last_value: dict[str, float] = field(default_factory=dict)
    """Newest closed window of each sensor."""
    last_forecast: dict[str, bytes] = field(default_factory=dict)
    """Newest forecast message of each sensor."""
    newest_ms: dict[int, int] = field(default_factory=dict)
    """Stream time of each partition."""
    next_offset: dict[int, int] = field(default_factory=dict)
    """Of each partition of the readings, as far as the view has read."""
    readings: int = 0
    _tasks: dict[int, StepTask] = field(default_factory=dict)

    def __post_init__(self) -> None:
        spec = self.settings.spec
        self.target = self.target or spec.target_names[0]
        self.keep_steps = self.keep_steps or 3 * spec.horizon
        self.values = deque(maxlen=self.keep_steps)
        self.forecasts = deque(maxlen=self.keep_steps)

    def take_readings(self, records: RecordColumns) -> None:
        """Readings of one partition, in log order."""
        task = self._tasks.setdefault(records.partition, StepTask(self.settings))
        steps, readings, _ = task.process(records)
        self.readings += len(readings)
        self.next_offset[records.partition] = int(records.offsets[-1]) + 1
        if len(readings):
            newest = int(readings.event_time_ms.max())
            self.newest_ms[records.partition] = max(newest, self.newest_ms.get(records.partition, newest))
            if self.sensor is None:
                self.sensor = max(set(readings.sensors), key=readings.sensors.count).decode()
        channel = self.settings.spec.targets[self.settings.spec.target_names.index(self.target)]
        names = task.table.sensors
        for slot, end_ms, value in zip(steps.slot.tolist(), steps.end_ms.tolist(), steps.values[:, channel].tolist()):
            name = names[slot].decode()
            self.last_value[name] = value
            if name == self.sensor:
                self.values.append((end_ms, value))

    def take_forecasts(self, records: RecordColumns) -> None:
        """Forecasts of one partition, in log order."""
        keys, values = records.keys(), records.values()
        self.last_forecast.update((key.decode(), value) for key, value in zip(keys, values) if key and value)
        if self.sensor is None:
            return
        watched = self.sensor.encode()
        for key, value in zip(keys, values):
            if key == watched and value:
                self._remember(Forecast.parse(value, self.target))

    def _remember(self, forecast: Forecast) -> None:
        # A worker that was killed says its last words again.
        if not self.forecasts or forecast.issued_at_ms > self.forecasts[-1].issued_at_ms:
            self.forecasts.append(forecast)

    @property
    def sensors(self) -> set[str]:
        """Everybody heard or forecast so far."""
        heard = {name.decode() for task in self._tasks.values() for name in task.table.sensors}
        return heard | set(self.last_forecast)

    @property
    def known(self) -> bool:
        """Whether the watched sensor has been heard or forecast."""
        return self.sensor is not None and self.sensor in self.sensors

    def forecast_at(self, issued_at_ms: int) -> Forecast | None:
        """The watched sensor's newest forecast that was issued by then."""
        return next((f for f in reversed(self.forecasts) if f.issued_at_ms <= issued_at_ms), None)

    def neighbours(self) -> list[Forecast]:
        """Newest forecasts of a few other sensors."""
        others = sorted(name for name in self.last_forecast if name != self.sensor)[:NEIGHBOURS]
        return [Forecast.parse(self.last_forecast[name], self.target) for name in others]

    def unknown(self) -> UnknownSensorError:
        """The error for a watched sensor that nobody has heard of."""
        names = sorted(self.sensors)
        near = difflib.get_close_matches(self.sensor or "", names, 3, 0.4) or names[:3]
        return UnknownSensorError(
            f"sensor {self.sensor!r} is not among the {len(names)} sensors seen lately; near names: {', '.join(near)}"
        )


class Tail:
    """Reads a topic from a little before its end on, all partitions, without a group.

    back: records before the end of each partition; None = from the beginning."""

    def __init__(self, settings: Settings, topic: str, back: int | None) -> None:
        self._back = back
        self._start_end: dict[int, int] = {}
        self._source = RecordSource(settings, topic, group=False, on_assigned=self._begin)

    def poll(self, timeout_ms: int = 100) -> list[RecordColumns]:
        return self._source.poll(timeout_ms)

    @property
    def caught_up(self) -> bool:
        """Whether all has been read that was there in the beginning."""
        positions = self._source.positions()
        return bool(self._start_end) and all(positions.get(p, 0) >= end for p, end in self._start_end.items())

    def close(self) -> None:
        self._source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _begin(self, partitions: Any) -> None:
        first, end = self._source.beginning_offsets(partitions), self._source.end_offsets(partitions)
        for partition in partitions:
            start = first[partition] if self._back is None else max(first[partition], end[partition] - self._back)
            self._source.seek(partition, start)
        self._start_end.update(end)


def follow(settings: Settings, view: StreamView, tick_seconds: float = 0.5) -> Iterator[bool]:
    """Feed the view from both topics; yields about every `tick_seconds` whether it has caught up with the present."""
    topics = settings.topics
    with (
        Tail(settings, topics.readings_topic, READINGS_BACK) as readings,
        Tail(settings, topics.forecasts_topic, FORECASTS_BACK) as forecasts,
    ):
        caught_up = False
        while True:
            until = time.monotonic() + tick_seconds
            while True:
                for records in readings.poll(50):
                    view.take_readings(records)
                # The watched sensor is chosen among the readings: forecasts wait until there are some.
                for records in forecasts.poll(50) if view.sensor else []:
                    view.take_forecasts(records)
                if time.monotonic() >= until:
                    break
            caught_up = caught_up or (readings.caught_up and forecasts.caught_up)
            yield caught_up


def watch(
    settings: Settings,
    sensor: str | None = None,
    frames: int | None = None,
    seconds: float | None = None,
    as_json: bool = False,
) -> None:
    """Show the stream until Ctrl-C, or for so many frames or seconds.

    Without a terminal, or as JSON: one line for each new forecast of the sensor. Raises UnknownSensorError when others
    are heard for a while and the one that was asked for is not."""
    console = Console()
    view = StreamView(task_settings(settings), sensor)
    started = time.monotonic()
    shown = 0
    with _Pictures(console) if console.is_terminal and not as_json else _Lines(as_json) as display:
        for caught_up in follow(settings, view):
            elapsed = time.monotonic() - started
            if caught_up and view.readings and not view.known and elapsed > PATIENCE_SECONDS:
                raise view.unknown()
            shown += display.show(view, caught_up)
            if (frames is not None and shown >= frames) or (seconds is not None and elapsed >= seconds):
                return


class _Pictures:
    """A picture that is drawn again in its place."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, auto_refresh=False)

    def show(self, view: StreamView, caught_up: bool) -> int:
        self._live.update(screen(view, self._console), refresh=True)
        return 1

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()


class _Lines:
    """One line for each change."""

    def __init__(self, as_json: bool) -> None:
        self._as_json = as_json
        self._last = ""

    def show(self, view: StreamView, caught_up: bool) -> int:
        text = self._text(view)
        if not caught_up or not text or text == self._last:
            return 0
        print(text, flush=True)
        self._last = text
        return 1

    def _text(self, view: StreamView) -> str:
        return view.last_forecast.get(view.sensor or "", b"").decode() if self._as_json else line(view)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def screen(view: StreamView, console: Console, title: str = "millrace watch") -> Group:
    """Everything, for a terminal of the console's size."""
    width, height = console.size
    header = Text.assemble(
        (f" {title} ", "bold reverse"), "  ", (view.sensor or "waiting for readings", "bold"), "  ", view.target
    )
    newest = view.forecasts[-1] if view.forecasts else None
    chart_height = min(max(height - NEIGHBOURS - 10, 8), 22)
    parts: list[Any] = [
        header,
        _legend(newest),
        _chart(view, width - 1, chart_height, console.color_system in ("256", "truecolor")),
    ]
    parts += [_facts(view, newest), _table(view)]
    return Group(*parts)


def line(view: StreamView) -> str:
    """The same in one line, for a log."""
    newest = view.forecasts[-1] if view.forecasts else None
    last = f"{view.values[-1][1]:.2f}" if view.values else "-"
    if newest is None:
        return (
            f"{view.sensor or 'no sensor yet'}: {view.target} {last}, no forecast yet ({view.readings:,} readings read)"
        )
    low, high = newest.outer
    return (
        f"{clock(newest.issued_at_ms)} {view.sensor} {view.target} {last}, next {_number(newest.middle[0])}"
        f" [{_number(low[0])}, {_number(high[0])}], in {len(newest.mean)} steps {_number(newest.middle[-1])}"
        f" [{_number(low[-1])}, {_number(high[-1])}], {newest.status}, model {newest.model}, state_steps {newest.state_steps},"
        f" offset {newest.partition}:{newest.offset}"
    )


def clock(time_ms: int) -> str:
    """An event time, UTC.

    >>> clock(1769700000000)
    'Thu 29 Jan 15:20'
    """
    return f"{datetime.fromtimestamp(time_ms / 1000, UTC):%a %d %b %H:%M}"


def _legend(newest: Forecast | None) -> Text:
    levels = list(newest.quantiles) if newest else []
    span = f"{levels[0]} … {levels[-1]}" if levels else "forecast"
    steps = f"{len(newest.mean)} steps" if newest else "some steps"
    return Text.assemble(
        (" ── ", _TRUTH),
        ("measured ", "default"),
        (" ── ", _NOW),
        (f"forecast, {span} ", f"on {_NOW_GROUND}"),
        ("  ── ", _THEN),
        (f"forecast {steps} ago, {span} ", f"on {_THEN_GROUND}"),
        no_wrap=True,
        overflow="ellipsis",
    )


def _chart(view: StreamView, width: int, height: int, coloured: bool) -> Text:
    if not view.values and not view.forecasts:
        return Text("\n".join([""] * (height - 1)))
    step_ms, horizon = view.settings.spec.step_ms, view.settings.spec.horizon
    newest = view.forecasts[-1] if view.forecasts else None
    now_ms = newest.issued_at_ms if newest else view.values[-1][0]
    begin_ms, end_ms = now_ms - 2 * horizon * step_ms, now_ms + horizon * step_ms
    past = view.forecast_at(now_ms - horizon * step_ms)
    values = [(end, value) for end, value in view.values if end >= begin_ms]
    fans = [fan for fan in (past, newest) if fan]
    chart = Chart(width, height, (begin_ms, end_ms), _range(values, fans))
    for fan, ground in zip((past, newest), (_THEN_GROUND, _NOW_GROUND)):
        if fan:
            low, high = fan.outer
            chart.band(fan.ends_ms, _floats(low), _floats(high), ground)
    chart.vertical(now_ms, "bright_black")
    for fan, colour in zip((past, newest), (_THEN, _NOW)):
        if fan:
            chart.line(fan.ends_ms, _floats(fan.middle), colour)
    chart.line([end for end, _ in values], [value for _, value in values], _TRUTH)
    return chart.render(_ticks(begin_ms, end_ms, now_ms), shaded=coloured)


def _ticks(begin_ms: int, end_ms: int, now_ms: int) -> dict[float, str]:
    """A label about every quarter, at round times, and the present."""
    day_ms = 86_400_000
    span_ms = end_ms - begin_ms
    spacing_ms = next((s for s in (60_000, 900_000, 3_600_000, 6 * 3_600_000, day_ms) if span_ms / s <= 6), 7 * day_ms)
    first_ms = -(-begin_ms // spacing_ms) * spacing_ms
    ticks = {float(at): clock(at) for at in range(first_ms, end_ms, spacing_ms) if abs(at - now_ms) > span_ms / 9}
    return ticks | {float(now_ms): f"▲ {clock(now_ms)}"}


def _facts(view: StreamView, newest: Forecast | None) -> Text:
    if newest is None:
        return Text(f"  no forecast yet · {view.readings:,} readings read", style="yellow")
    behind = view.next_offset.get(newest.partition, newest.offset + 1) - newest.offset - 1
    lag_ms = view.newest_ms.get(newest.partition, newest.issued_at_ms) - newest.issued_at_ms
    text = Text.assemble(
        "  status ",
        (newest.status, _STATUS_COLOURS.get(newest.status, "default")),
        f" · model {newest.model} · state_steps {newest.state_steps:,}",
        no_wrap=True,
        overflow="ellipsis",
    )
    hit = _hits(view)
    if hit is not None:
        text.append(f" · {hit[0]} of {hit[1]} inside the band, one step ahead")
    text.append(
        f"\n  source partition {newest.partition}, offset {newest.offset:,}: since then {max(behind, 0):,} readings,"
        f" {max(lag_ms, 0) / 60_000:,.0f} min of event time",
        style="bright_black",
    )
    return text


def _hits(view: StreamView) -> tuple[int, int] | None:
    """How many truths lay between the outer quantiles one step ahead, of how many."""
    spoken = {f.ends_ms[0]: (f.outer[0][0], f.outer[1][0]) for f in view.forecasts}
    known = [(value, *spoken[end]) for end, value in view.values if end in spoken and value == value]
    inside = [low <= value <= high for value, low, high in known if low is not None and high is not None]
    return (sum(inside), len(inside)) if inside else None


def _table(view: StreamView) -> Table:
    table = Table(box=None, padding=(0, 1), header_style="bright_black")
    for name, side in (
        ("sensor", "left"),
        ("last", "right"),
        ("next", "right"),
        ("range", "left"),
        ("status", "left"),
        ("state_steps", "right"),
        ("issued at", "left"),
    ):
        table.add_column(name, justify=side, no_wrap=True)  # type: ignore[arg-type]
    for forecast in view.neighbours():
        low, high = forecast.outer
        table.add_row(
            forecast.sensor,
            _number(view.last_value.get(forecast.sensor)),
            _number(forecast.middle[0]),
            f"{_number(low[0])} … {_number(high[0])}",
            Text(forecast.status, style=_STATUS_COLOURS.get(forecast.status, "default")),
            f"{forecast.state_steps:,}",
            clock(forecast.issued_at_ms),
        )
    return table


def _range(values: list[tuple[int, float]], fans: list[Forecast]) -> tuple[float, float]:
    numbers = [value for _, value in values] + [
        v for fan in fans for side in (*fan.outer, fan.middle) for v in _floats(side)
    ]
    finite = np.array([v for v in numbers if np.isfinite(v)])
    if not len(finite):
        return 0.0, 1.0
    margin = 0.04 * float(np.ptp(finite))
    return float(finite.min()) - margin, float(finite.max()) + margin


def _floats(values: list[float | None]) -> list[float]:
    return [float("nan") if value is None else value for value in values]


def _number(value: float | None) -> str:
    return "-" if value is None or value != value else f"{value:.2f}"
