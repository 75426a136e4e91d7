"""The terminal view, fed with records and drawn without a terminal."""

import io

import numpy as np
import pytest
from rich.console import Console

from pipeline.service.assembly import task_settings
from pipeline.service.chart import Chart
from pipeline.service.simulator import DAY_MS, Fleet
from pipeline.service.watch import Forecast, StreamView, line, screen
from pipeline.settings import parse
from tests.helpers.demo_stream import answers_of, records_of

START = 1_769_700_000_000 // DAY_MS * DAY_MS
SETTINGS = task_settings(
    parse('[readings]\nfields = ["temperature", "pressure"]\ntargets = ["temperature"]\n[windows]\ngrace = "10m"\n')
)


def seen(sensor: str | None, days: int = 4) -> StreamView:
    batch = Fleet(12, seed=1).generate(START, START + days * DAY_MS)
    records = records_of(batch, np.arange(len(batch)))
    view = StreamView(SETTINGS, sensor)
    view.take_readings(records)
    view.take_forecasts(answers_of(SETTINGS, records)[1])
    return view


def drawn(view: StreamView, width: int = 110, height: int = 34) -> str:
    out = io.StringIO()
    console = Console(file=out, width=width, height=height, force_terminal=False, color_system=None)
    console.print(screen(view, console))
    return out.getvalue()


def test_the_view_closes_the_windows_that_the_service_closes():
    view = seen("oven-003")
    issued = [forecast.issued_at_ms for forecast in view.forecasts]
    assert [end for end, _ in view.values] == issued
    assert issued[-1] == START + 4 * DAY_MS - 3_600_000
    assert len(view.values) == 3 * 24, "bounded to three horizons"


def test_the_picture_shows_the_sensor_its_status_its_state_and_its_neighbours():
    text = drawn(seen("oven-003"))
    for wanted in (
        "oven-003",
        "temperature",
        "baseline",
        "SeasonalNaive",
        "state_steps 95",
        "partition 0",
        "chiller-004",
    ):
        assert wanted in text
    assert any("\u2800" < character < "\u28ff" for character in text), "a line of braille dots"
    assert "░" in text, "without colours the band is shaded"


def test_no_line_of_the_picture_is_wider_than_the_terminal():
    for width in (80, 100, 160):
        assert max(map(len, drawn(seen("oven-003"), width).splitlines())) <= width


def test_an_empty_stream_is_drawn_as_such():
    assert "waiting for readings" in drawn(StreamView(SETTINGS))
    assert "no forecast yet" in line(StreamView(SETTINGS))


def test_one_line_says_the_same():
    text = line(seen("oven-003"))
    assert text.startswith("Sun 01 Feb 23:00 oven-003 temperature")
    assert "baseline, model SeasonalNaive, state_steps 95" in text


def test_without_a_name_the_busiest_sensor_is_watched():
    batch = Fleet(3, seed=1).generate(START, START + DAY_MS)
    keep = np.flatnonzero((batch.sensor != 1) | (np.arange(len(batch)) % 2 == 0))
    view = StreamView(SETTINGS)
    view.take_readings(records_of(batch, keep[batch.sensor[keep] != 2]))
    assert view.sensor == "pump-001"


def test_a_name_that_nobody_bears_is_answered_with_near_ones():
    view = seen("oven-3")
    assert not view.known
    message = str(view.unknown())
    assert "'oven-3'" in message
    assert "oven-003" in message


def test_last_words_said_twice_are_shown_once():
    view = seen("oven-003")
    count = len(view.forecasts)
    batch = Fleet(12, seed=1).generate(START, START + 4 * DAY_MS)
    view.take_forecasts(answers_of(SETTINGS, records_of(batch, np.arange(len(batch))))[1])
    assert len(view.forecasts) == count


def test_a_forecast_speaks_of_the_windows_after_it_was_issued():
    value = (
        b'{"sensor":"a","issued_at":3600000,"step_ms":1800000,"horizon":2,"targets":{"t":{"mean":[1.0,null],"q0.1":[0.5,null],'
        b'"q0.9":[1.5,null]}},"model":"m","status":"ok","state_steps":7,"source":{"partition":1,"offset":9}}'
    )
    forecast = Forecast.parse(value, "t")
    assert forecast.ends_ms == [5_400_000, 7_200_000]
    assert forecast.outer == ([0.5, None], [1.5, None])
    assert forecast.middle == [1.0, None]
    assert (forecast.status, forecast.state_steps, forecast.partition, forecast.offset) == ("ok", 7, 1, 9)


@pytest.mark.parametrize("values", [[5.0, 5.0, 5.0], [1.0, float("nan"), 2.0], [float("nan")] * 3])
def test_a_chart_survives_constant_and_missing_values(values):
    chart = Chart(40, 8, (0.0, 2.0), (min(values), max(values)))
    chart.line([0, 1, 2], values, "white")
    chart.band([0, 1, 2], values, values, "blue")
    assert len(chart.render({}).plain.splitlines()) in (7, 8)
