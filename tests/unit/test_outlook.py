"""What a file alone tells: fields, step, season, and whether its rows stand in the order of time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.forecaster import SeriesSpec
from models.seasonality import SeasonFound
from pipeline.errors import DeploymentError
from pipeline.service.files import FileBatch, FileLayout, read_file
from pipeline.service.outlook import FileFacts, assumed, in_time_order, look
from pipeline.settings import changed, parse

HOUR = 3_600_000
MINUTE = 60_000
START = 1_735_689_600_000
LONG = FileLayout("ds", id_column="unique_id")


def rhythm(hours: int = 24 * 14, sensors: int = 3, season: int = 24, step_ms: int = HOUR) -> pd.DataFrame:
    """Sensor after sensor, as Nixtla's libraries keep it."""
    random, at = np.random.default_rng(0), np.arange(hours)
    parts = [
        pd.DataFrame(
            {
                "unique_id": f"pump-{sensor}",
                "ds": pd.to_datetime(START + at * step_ms, unit="ms"),
                "y": 5 * sensor + np.sin(2 * np.pi * at / season) + random.normal(0, 0.1, hours),
            }
        )
        for sensor in range(sensors)
    ]
    return pd.concat(parts, ignore_index=True)


def facts_of(frame: pd.DataFrame, layout: FileLayout = LONG) -> FileFacts:
    return look(read_file(frame, layout))


def batch(times: Any, values: Any = None, sensors: Any = None, fields: tuple[str, ...] = ("y",)) -> FileBatch:
    """One sensor "a" unless told."""
    times = np.array(times, np.int64)
    names = list(dict.fromkeys(sensors)) if sensors is not None else ["a"]
    codes = [names.index(name) for name in sensors] if sensors is not None else np.zeros(len(times))
    columns = (
        np.arange(len(times), dtype=np.float64)[:, None] + 100 * np.arange(len(fields)) if values is None else values
    )
    return FileBatch(names, np.array(codes, np.int32), times, np.asarray(columns, np.float64), fields)


# -- what is told


@pytest.mark.parametrize(
    ("step_ms", "season", "text"),
    [(HOUR, 24, "season 1d (24 steps"), (15 * MINUTE, 96, "season 1d (96 steps"), (HOUR, 6, "season 6h (6 steps")],
)
def test_step_and_season_are_told_from_the_readings(step_ms: int, season: int, text: str) -> None:
    found = facts_of(rhythm(season * 14, season=season, step_ms=step_ms))
    assert found.step_ms == step_ms
    assert [one.steps for one in found.seasons] == [season]
    assert (found.sensors, found.readings, found.fields) == (3, 3 * season * 14, ("y",))
    assert (found.first_ms, found.last_ms) == (START, START + (season * 14 - 1) * step_ms)
    assert text in str(found)
    assert "3 sensors" in str(found)


def test_noise_has_no_season() -> None:
    frame = rhythm().assign(y=np.random.default_rng(1).normal(0, 1, 3 * 24 * 14))
    assert facts_of(frame).seasons == ()
    assert str(facts_of(frame)).endswith("a step of 1h, no season")


def test_order_and_cutting_tell_nothing_else() -> None:
    frame = rhythm()
    whole, shuffled = facts_of(frame), facts_of(frame.sample(frac=1, random_state=2))
    by_time = look(b for part in np.array_split(np.arange(len(frame)), 50) for b in read_file(frame.iloc[part], LONG))
    for found in (shuffled, by_time):
        assert (found.step_ms, found.readings, found.sensors) == (whole.step_ms, whole.readings, whole.sensors)
        assert [one.steps for one in found.seasons] == [24]
        assert (found.first_ms, found.last_ms) == (whole.first_ms, whole.last_ms)


def test_a_sensor_is_the_same_in_every_batch_whatever_number_it_has_there() -> None:
    # Both speak every hour, b at half past. Taken for each other in every second batch they would seem to speak at 0, 1:30, 2, 3:30.
    parts = [
        batch([hour * HOUR, hour * HOUR + HOUR // 2], sensors=["a", "b"])
        if hour % 2
        else batch([hour * HOUR + HOUR // 2, hour * HOUR], sensors=["b", "a"])
        for hour in range(60)
    ]
    assert (look(parts).sensors, look(parts).step_ms) == (2, HOUR)


def test_gaps_and_missing_values_hide_neither_step_nor_season() -> None:
    frame = rhythm()
    frame.loc[np.random.default_rng(3).random(len(frame)) < 0.2, "y"] = np.nan
    found = facts_of(frame.drop(index=range(50, 90)))
    assert (found.step_ms, [one.steps for one in found.seasons]) == (HOUR, [24])


def test_of_a_wide_file_each_column_is_a_sensor() -> None:
    wide = rhythm().pivot(index="ds", columns="unique_id", values="y").reset_index()
    found = facts_of(wide, FileLayout("ds", ("*",)))
    assert (found.sensors, found.fields, found.step_ms, found.readings) == (3, ("value",), HOUR, 3 * 24 * 14)
    assert [one.steps for one in found.seasons] == [24]


@pytest.mark.parametrize("zone", [None, "UTC", "America/New_York"])
@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
def test_times_of_a_frame_may_have_any_unit_and_zone(zone: str | None, unit: str) -> None:
    frame = rhythm(48, 1)
    times = frame["ds"].dt.as_unit(unit)
    frame["ds"] = times if zone is None else times.dt.tz_localize("UTC").dt.tz_convert(zone)
    found = facts_of(frame)
    assert (found.first_ms, found.step_ms) == (START, HOUR)


@pytest.mark.parametrize("divisor", [1, 1_000])
def test_times_of_a_frame_may_be_epochs(divisor: int) -> None:
    frame = rhythm(48, 1)
    frame["ds"] = frame["ds"].astype("datetime64[ms]").astype(np.int64) // divisor
    assert (facts_of(frame).first_ms, facts_of(frame).step_ms) == (START, HOUR)


def test_times_before_1970_are_times() -> None:
    found = look([batch(-HOUR * np.arange(40, 0, -1))])
    assert (found.first_ms, found.last_ms, found.step_ms) == (-40 * HOUR, -HOUR, HOUR)
    assert found.in_order(HOUR)


def test_without_readings_there_is_nothing_to_tell() -> None:
    with pytest.raises(DeploymentError, match=r"no readings in this range; widen --from and --to"):
        facts_of(rhythm().iloc[:0])
    with pytest.raises(DeploymentError, match=r"no readings"):
        look(read_file(rhythm(), LONG, from_ms=START + 9_000 * HOUR))


def test_from_a_single_reading_no_step_can_be_told() -> None:
    with pytest.raises(DeploymentError, match=r"the step cannot be told.*two readings.*set windows\.size"):
        facts_of(rhythm().iloc[:1])


# -- in the order of time or not


def lagging(lag_ms: int, share: float = 0.5, steps: int = 200) -> FileBatch:
    """Two sensors, row by row; of the second a share comes so much later than it should."""
    at = np.repeat(np.arange(steps), 2) * HOUR + START
    behind = (np.arange(2 * steps) % 2 == 1) & (np.arange(2 * steps) // 2 % 100 < 100 * share)
    return batch(at - behind * lag_ms, sensors=["a", "b"] * steps)


@pytest.mark.parametrize("patience_ms", [HOUR, 15 * MINUTE, 24 * HOUR, 1_000, 65_536, 65_535])
def test_readings_as_far_behind_as_a_window_and_its_grace_are_out_of_order(patience_ms: int) -> None:
    # A reading of [0 ---- size) that comes with stream time at size + grace is late: half of this file would be lost.
    assert not look([lagging(patience_ms)]).in_order(patience_ms)
    assert not look([lagging(patience_ms + 1)]).in_order(patience_ms)
    assert not look([lagging(100 * patience_ms)]).in_order(patience_ms)
    assert look([lagging(patience_ms * 9 // 10)]).in_order(patience_ms)
    assert look([lagging(1)]).in_order(patience_ms)
    assert look([lagging(0)]).in_order(patience_ms)


def test_a_few_stragglers_are_no_other_order() -> None:
    assert look([lagging(50 * HOUR, share=0.15)]).in_order(HOUR)  # 7.5 % of the readings
    assert not look([lagging(50 * HOUR, share=0.25)]).in_order(HOUR)


@pytest.mark.parametrize("pieces", [1, 7, 100])
def test_sensor_after_sensor_is_not_the_order_of_time_however_the_file_is_cut(pieces: int) -> None:
    frame = rhythm()
    parts = [frame.iloc[rows] for rows in np.array_split(np.arange(len(frame)), pieces)]
    assert not look(b for part in parts for b in read_file(part, LONG)).in_order(HOUR)
    by_time = frame.sort_values("ds", kind="stable")
    assert facts_of(by_time).in_order(HOUR)
    assert facts_of(frame[frame["unique_id"] == "pump-1"]).in_order(HOUR)


def readings(batches: Iterator[FileBatch]) -> list[tuple[str, int, tuple[float, ...]]]:
    return [
        (one.sensors[code], time_ms, tuple(values))
        for one in batches
        for code, time_ms, values in zip(one.codes.tolist(), one.event_time_ms.tolist(), one.values.tolist())
    ]


@given(
    rows=st.lists(st.tuples(st.sampled_from("abc"), st.integers(-4, 9)), min_size=1, max_size=40),
    cuts=st.sets(st.integers(1, 39)),
    at_once=st.integers(1, 50),
)
def test_in_time_order_is_a_stable_sort_however_the_file_was_cut(rows: Any, cuts: set[int], at_once: int) -> None:
    parts = [
        part for part in np.split(np.arange(len(rows)), sorted(cut for cut in cuts if cut < len(rows))) if len(part)
    ]
    batches = [
        batch([rows[at][1] for at in part], part[:, None].astype(np.float64), [rows[at][0] for at in part])
        for part in parts
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.service.outlook.READINGS_AT_ONCE", at_once)
        found = list(in_time_order(batches))
    wanted = sorted(((sensor, time, (float(at),)) for at, (sensor, time) in enumerate(rows)), key=lambda row: row[1])
    assert readings(iter(found)) == wanted
    shares = [one.share_read for one in found]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert all(len(one) <= at_once for one in found)


def test_nothing_in_time_order_is_nothing() -> None:
    assert list(in_time_order([])) == []


# -- several files


def test_a_field_is_found_by_its_name_where_a_later_file_has_its_columns_in_another_order() -> None:
    first = batch([0, HOUR], [[1, 10], [2, 20]], fields=("heat", "rpm"))
    second = batch([2 * HOUR, HOUR], [[30, 3, 0], [40, 4, 0]], fields=("rpm", "heat", "more"))
    found = list(in_time_order([first, second]))
    assert found[0].field_names == ("heat", "rpm")
    assert np.concatenate([one.values for one in found]).tolist() == [[1, 10], [2, 20], [4, 40], [3, 30]]
    facts = look([first, second])
    assert facts.fields == ("heat", "rpm")
    assert facts.readings == 4


@pytest.mark.parametrize("ask", [look, lambda batches: list(in_time_order(batches))])
def test_a_field_that_a_later_file_lacks_is_named(ask: Any) -> None:
    with pytest.raises(DeploymentError, match=r"no field 'rpm'.*it has heat, noise.*--value-columns"):
        ask([batch([0, HOUR], fields=("heat", "rpm")), batch([2 * HOUR], fields=("heat", "noise"))])


# -- what nobody has set


def test_what_was_left_open_is_taken_from_the_file() -> None:
    found = assumed(parse(""), facts_of(rhythm(96 * 14, season=96, step_ms=15 * MINUTE)))
    assert found == {"readings.fields": ["y"], "windows.size": "15m", "forecast.season": ["1d"]}
    settings = changed(parse(""), found, "the data")
    assert (settings.windows.size_ms, settings.windows.hop_ms) == (15 * MINUTE, 15 * MINUTE)
    assert settings.forecast.season_ms == (24 * HOUR,)
    assert settings.readings.targets == ("y",)


def test_a_file_without_a_season_leaves_none() -> None:
    noise = rhythm().assign(y=np.random.default_rng(1).normal(0, 1, 3 * 24 * 14))
    assert changed(parse(""), assumed(parse(""), facts_of(noise)), "the data").forecast.season_ms == ()


@pytest.mark.parametrize(
    ("toml", "kept"),
    [
        ('[windows]\nsize = "30m"', {"readings.fields"}),
        ('[forecast]\nseason = ["48h"]', {"readings.fields", "windows.size"}),
        ('[readings]\nfields = ["heat"]', {"windows.size", "forecast.season"}),
        ('[windows]\nhop = "30m"', {"readings.fields", "forecast.season"}),
    ],
)
def test_what_was_set_stays(toml: str, kept: set[str]) -> None:
    settings = parse(toml)
    found = assumed(settings, facts_of(rhythm()))
    assert found.keys() == kept
    after = changed(settings, found, "the data")
    assert after.windows.size_ms == settings.windows.size_ms
    for key in settings.sources:
        section, name = key.split(".")
        name = {"size": "size_ms", "hop": "hop_ms", "season": "season_ms"}.get(name, name)
        assert getattr(getattr(after, section), name) == getattr(getattr(settings, section), name)


@pytest.mark.parametrize(("minutes", "left"), [(24 * 60, ["1d"]), (90, ["90m"]), (60, ["1h"]), (50, []), (30, [])])
def test_a_season_that_the_steps_that_were_set_do_not_divide_is_none(minutes: int, left: list[str]) -> None:
    season = (SeasonFound(minutes // 10, 0.9, 0.5),)
    facts = FileFacts(("y",), 3, 999, START, START + 99 * HOUR, 10 * MINUTE, season, np.zeros(1024, np.int64))
    settings = parse('[windows]\nhop = "30m"')
    assert assumed(settings, facts)["forecast.season"] == left
    assert changed(settings, assumed(settings, facts), "the data").windows.hop_ms == 30 * MINUTE


def test_what_a_model_was_made_for_goes_over_what_the_file_looks_like() -> None:
    spec = SeriesSpec(("y.mean",), (0,), 30 * MINUTE, 7, (0.25, 0.75), (12, 48))
    found = assumed(parse(""), facts_of(rhythm()), spec)
    assert found == {
        "readings.fields": ["y"],
        "windows.size": "30m",
        "forecast.season": ["6h", "1d"],
        "forecast.horizon": 7,
        "forecast.quantiles": [0.25, 0.75],
    }
    settings = parse("[forecast]\nhorizon = 3")
    assert "forecast.horizon" not in assumed(settings, facts_of(rhythm()), spec)
    after = changed(settings, assumed(settings, facts_of(rhythm()), spec), "the model")
    assert (after.forecast.horizon, after.forecast.quantiles) == (3, (0.25, 0.75))
