"""Forecasts beside what came of them: a dictionary of windows is the judge, row by row."""

from __future__ import annotations

import io
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.baselines import LastValue, SeasonalNaive
from models.forecaster import Column, Prediction, Rows, SeriesSpec, StepBlock
from models.measures import Said
from pipeline.errors import SettingsError
from pipeline.service import matching as module
from pipeline.service.matching import FrameShape, Kept, Matching, level_column
from pipeline.service.passage import frame_of
from pipeline.stream.columns import Readings
from pipeline.stream.task import ForecastTask, TaskSettings
from tests.helpers.streams import HOUR, task_settings
from tests.helpers.textbook_windows import TextbookWindows

NOW = 1_735_689_600_000 // HOUR
BEFORE_1970 = -500
WARMUP = 3


@dataclass(frozen=True)
class Came:
    """A reading."""

    sensor: str
    ms: int
    values: tuple[float, ...]


class Oracle:
    """Says of each lead what nobody else would, and what a test can say after it."""

    name = "Millrace"
    warmup_steps = WARMUP

    def __init__(self, spec: SeriesSpec, version: str = "first") -> None:
        self.spec, self.version = spec, version

    @staticmethod
    def word(version: str, end_ms: Any, lead: Any, target: Any) -> Any:
        """Whole numbers below 2^24: float32 holds them exactly."""
        return end_ms // HOUR % 5_000 + 10_000 * lead + 1_000_000 * target + len(version)

    def columns(self) -> tuple[Column, ...]:
        return ()

    def advance(self, rows: Rows, block: StepBlock, context: Any) -> Prediction:
        lead, target = np.arange(1, self.spec.horizon + 1)[:, None], np.arange(len(self.spec.targets))
        mean = self.word(self.version, block.end_ms[..., None, None], lead, target)
        mean = np.where(np.isnan(context.last)[:, :, None], np.nan, mean).astype(np.float32)
        return Prediction(mean, mean[..., None] + np.float32(100) * np.array(self.spec.quantiles, np.float32))

    def rebuild(self, rows: Rows, block: StepBlock, context: Any) -> None:
        pass


class LastOf:
    """In place of statsforecast: the newest value of a history, and how many there are."""

    names = ("LastOf",)

    def __init__(self, horizon: int, levels: Sequence[float], history_steps: int) -> None:
        self.history_steps = history_steps
        self._horizon, self._levels = horizon, levels

    @staticmethod
    def word(history: Sequence[float], lead: int) -> float:
        known = [value for value in history if not math.isnan(value)]
        return (known[-1] if known else 0.0) + 1_000 * len(history) + 100_000 * lead

    def forecast(self, histories: Sequence[Any]) -> list[Said]:
        leads = range(1, self._horizon + 1)
        mean = np.array([[self.word(history.tolist(), lead) for lead in leads] for history in histories])
        return [Said(mean, mean[..., None] + np.array(self._levels))]


# -- the way through the modules


@dataclass
class Way:
    """A stretch of readings of some partitions through tasks and matching.

    swaps: before the reading of this place in its partition, this model takes over."""

    settings: TaskSettings
    logs: Mapping[int, Sequence[Came]]
    model: Any = None
    swaps: Mapping[int, Any] = field(default_factory=dict)
    kept: Kept = field(default_factory=Kept)
    history_steps: int = 0

    @property
    def specs(self) -> list[SeriesSpec]:
        models = [self.model, *self.swaps.values()]
        return [self.settings.spec, *(model.spec for model in models if model)]

    @property
    def shape(self) -> FrameShape:
        return FrameShape(
            targets=self.settings.spec.target_names,
            horizon=max(spec.horizon for spec in self.specs),
            levels=tuple(sorted({level for spec in self.specs for level in spec.quantiles})),
            beside=tuple(kind.name for kind in self.kinds),
            season=self.season,
            outside=LastOf.names if self.history_steps else (),
        )

    @property
    def season(self) -> int:
        return next(iter(self.settings.spec.seasons), 1)

    @property
    def kinds(self) -> tuple[Any, ...]:
        return (LastValue, SeasonalNaive) if self.settings.spec.seasons else (LastValue,)

    def matching(self) -> Matching:
        shape, outside = self.shape, None
        if self.history_steps:
            outside = LastOf(shape.horizon, shape.levels, self.history_steps)
        return Matching(self.settings.rule, shape, self.kept, outside)  # type: ignore[arg-type]

    def go(
        self, cuts: Sequence[int] = (), restarts: Sequence[int] = (), settle_rows: int = 2**30
    ) -> tuple[pd.DataFrame, Matching]:
        """cuts: of each partition's log; restarts: pieces before which the matching is put away and taken up again."""
        found, tables = self.matching(), []
        tasks = {p: ForecastTask(self.settings, self.model, beside=self.kinds) for p in self.logs}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "SETTLE_ROWS", settle_rows)
            for number, (partition, place, piece) in enumerate(self._pieces(cuts)):
                if number in restarts:
                    found = self.again(found)
                if place in self.swaps:
                    tasks[partition].swap(self.swaps[place])
                found.add(partition, tasks[partition], tasks[partition].take("t", partition, piece))
                if found.is_full:
                    tables += found.settle()
            for partition, task in tasks.items():
                found.add(partition, task, task.finish("t", partition, len(self.logs[partition])))
            tables += found.settle(final=True)
        return frame_of(tables, found.shape.schema), found

    def again(self, found: Matching) -> Matching:
        """As a folder keeps it."""
        arrays, facts = found.state()
        stored = io.BytesIO()
        np.savez(stored, allow_pickle=False, **arrays)
        stored.seek(0)
        other = self.matching()
        with np.load(stored, allow_pickle=False) as loaded:
            other.restore({name: loaded[name] for name in loaded.files}, json.loads(json.dumps(facts)))
        return other

    def _pieces(self, cuts: Sequence[int]) -> Iterator[tuple[int, int, Readings]]:
        """Of all partitions in turn."""
        by_partition = []
        for partition, log in self.logs.items():
            marks = sorted({0, len(log), *self.swaps, *cuts} & set(range(len(log) + 1)))
            by_partition.append(
                [(partition, start, self._readings(log, start, stop)) for start, stop in itertools.pairwise(marks)]
            )
        for pieces in itertools.zip_longest(*by_partition):
            yield from (piece for piece in pieces if piece is not None)

    def _readings(self, log: Sequence[Came], start: int, stop: int) -> Readings:
        part = log[start:stop]
        values = np.array([one.values for one in part], np.float64).reshape(len(part), -1)
        times = np.array([one.ms for one in part], np.int64)
        return Readings(
            [one.sensor.encode() for one in part], np.arange(start, stop), times, values, np.arange(len(part))
        )

    # -- and beside it, with dictionaries

    def judged(self) -> tuple[pd.DataFrame, dict[str, list[tuple[float, int]]]]:
        """The frame, and of each series the naive errors and truths with the time they ended."""
        rows: list[dict[str, Any]] = []
        errors: dict[str, list[tuple[float, int]]] = {}
        for log in self.logs.values():
            steps = self._steps(log)
            for sensor in steps:
                self._judge(log, sensor, steps[sensor], rows, errors)
        return pd.DataFrame(rows, columns=self.shape.schema.names), errors

    def _steps(self, log: Sequence[Came]) -> dict[str, list[tuple[int, tuple[float, ...], int, bool, int]]]:
        """Of each sensor: window, values, count, reset, offset of the reading that closed it."""
        textbook, sensors = TextbookWindows(self.settings.rule), list(dict.fromkeys(one.sensor for one in log))
        textbook.feed((sensors.index(one.sensor), at, one.ms, list(one.values)) for at, one in enumerate(log))
        if textbook.open:
            textbook._close(max(window for _, window in textbook.open), len(log))
        found: dict[str, list[Any]] = {}
        for slot, *step in textbook.steps:
            found.setdefault(sensors[slot], []).append(tuple(step))
        return found

    def _model_at(self, offset: int) -> Any:
        model = self.model
        for place, other in self.swaps.items():
            if offset >= place:
                model = other
        return model

    def _judge(
        self, log: Sequence[Came], sensor: str, steps: Sequence[Any], rows: list[Any], errors: dict[str, Any]
    ) -> None:
        targets, names = self.settings.spec.targets, self.settings.spec.target_names
        brought = {window: values for window, values, *_ in steps}
        first, last_offset = min(brought), len(log) - 1
        memory: list[tuple[float, ...]] = []
        naive_of_next: list[float] = []
        for window, values, count, reset, offset in steps:
            memory = [*([] if reset else memory), tuple(values[k] for k in targets)]
            end_ms = window * self.settings.rule.hop_ms + self.settings.rule.size_ms
            cutoff = end_ms - self.settings.rule.size_ms
            model = self._model_at(min(offset, last_offset))
            spec = model.spec if model else self.settings.spec
            last = [_newest(memory, k) for k in range(len(targets))]
            for k, name in enumerate(names):
                unique_id = f"{sensor}/{name}" if len(names) > 1 else sensor
                if len(memory) > self.season and not math.isnan(naive_of_next[k] - memory[-1][k]):
                    errors.setdefault(unique_id, []).append((abs(memory[-1][k] - naive_of_next[k]), end_ms))
            naive_of_next = [self._seasonal(memory, k, 1, last[k]) for k in range(len(targets))]
            is_kept = window % self.kept.stride == 0 and (self.kept.from_ms is None or end_ms >= self.kept.from_ms)
            if all(math.isnan(value) for value in last) or not is_kept:
                continue
            ready = model is not None and len(memory) >= WARMUP
            status = ("ok" if count else "stale") if ready else "warming" if model else "baseline"
            for k, lead in itertools.product(range(len(targets)), range(1, spec.horizon + 1)):
                own = float(Oracle.word(model.version, end_ms, lead, k)) if ready else math.nan
                said = own if ready else self._seasonal(memory, k, lead, last[k])
                if math.isnan(last[k]):
                    said = math.nan
                row = {
                    "unique_id": f"{sensor}/{names[k]}" if len(names) > 1 else sensor,
                    "ds": pd.Timestamp(cutoff + lead * self.settings.rule.hop_ms, unit="ms"),
                    "cutoff": pd.Timestamp(cutoff, unit="ms"),
                    "lead": lead,
                    "y": brought.get(window + lead, (math.nan,) * (max(targets) + 1))[targets[k]],
                    "status": status,
                    "model_version": model.version if ready else self.kinds[-1].name,
                    "Millrace": said,
                    "LastValue": last[k],
                    "SeasonalNaive": self._seasonal(memory, k, lead, last[k]),
                }
                for level in self.shape.levels:
                    row[level_column(level)] = said + 100 * level if level in spec.quantiles else math.nan
                if self.history_steps:
                    began = max(first, window - self.history_steps + 1)
                    began = min(w for w in brought if w >= began)
                    history = [brought.get(w, (math.nan,) * 9)[targets[k]] for w in range(began, window + 1)]
                    row["LastOf"] = LastOf.word(history, lead)
                rows.append({name: value for name, value in row.items() if name in self.shape.schema.names})

    def _seasonal(self, memory: Sequence[tuple[float, ...]], k: int, lead: int, last: float) -> float:
        season = next(iter(self.settings.spec.seasons), None)
        if season is None or len(memory) < season:
            return last
        back = season * -(-lead // season) - lead
        value = memory[-1 - back][k] if back < len(memory) else math.nan
        return last if math.isnan(value) else value


def _newest(memory: Sequence[tuple[float, ...]], k: int) -> float:
    return next((values[k] for values in reversed(memory) if not math.isnan(values[k])), math.nan)


KEY = ["unique_id", "cutoff", "lead"]


def in_order(frame: pd.DataFrame) -> pd.DataFrame:
    """Ties are two lives of one sensor: told apart by whatever differs."""
    return frame.sort_values([*KEY, *frame.columns.drop(KEY)], ignore_index=True)


def require_equal(found: pd.DataFrame, wanted: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(in_order(found), in_order(wanted), check_dtype=False, rtol=1e-6, atol=1e-6)


def without_baseline_quantiles(frame: pd.DataFrame) -> pd.DataFrame:
    """The intervals of a baseline are its own business, and tested there."""
    frame = frame.copy()
    levels = [column for column in frame.columns if column.startswith("Millrace-q")]
    frame.loc[frame["status"].isin(["warming", "baseline"]), levels] = np.nan
    return frame


def require_as_judged(way: Way, **how: Any) -> Matching:
    frame, found = way.go(**how)
    wanted, errors = way.judged()
    require_equal(without_baseline_quantiles(frame), without_baseline_quantiles(wanted))
    assert found.forecasts == frame.groupby([frame["unique_id"].str.split("/").str[0], "cutoff"]).ngroups
    require_sums_of(frame, found)
    require_naive_errors(found, errors, way.kept.from_ms)
    return found


def require_sums_of(frame: pd.DataFrame, found: Matching) -> None:
    """What is counted is of the rows that were given."""
    names = found.shape.forecasters
    known = frame.dropna(subset=["y", *names])
    measures = found.errors.figures(*found.in_sample.units())
    by_series, places = measures.by_series(), {name: number for number, name in enumerate(found.series_names)}
    assert measures.over_all()["labels"].tolist() == [len(known)] * len(names)
    for unique_id, own in known.groupby("unique_id"):
        for f, name in enumerate(names):
            error = (own["y"] - own[name].astype(np.float64)).abs()
            assert by_series["MAE"][places[str(unique_id)], f] == pytest.approx(error.mean(), rel=1e-5, abs=1e-5)
            assert by_series["labels"][places[str(unique_id)], f] == len(own)
    by_lead = measures.by_lead()
    for lead, own in known.groupby("lead"):
        assert by_lead["labels"][int(lead) - 1, 0] == len(own)  # type: ignore[call-overload]


def require_naive_errors(found: Matching, errors: Mapping[str, Any], from_ms: int | None) -> None:
    scale, _ = found.in_sample.units()
    for number, name in enumerate(found.series_names):
        own = errors.get(name, [])
        before = [error for error, end_ms in own if from_ms is not None and end_ms <= from_ms]
        chosen = before if np.mean(before or [0]) > 0 else [error for error, _ in own]
        if not chosen or np.mean(chosen) == 0:
            assert math.isnan(scale[number]), name
        else:
            assert scale[number] == pytest.approx(np.mean(chosen), rel=1e-5), name


def steady(sensors: int = 2, hours: int = 30, first: int = NOW, skip: Sequence[int] = ()) -> list[Came]:
    """A reading a sensor and hour, whole numbers; nobody speaks in the hours skipped."""
    random = np.random.default_rng(sensors * 1_000 + hours)
    return [
        Came(f"pump-{s}", (first + hour) * HOUR + 60_000 * s, (float(random.integers(-50, 50)),))
        for hour in range(hours)
        if hour not in skip
        for s in range(sensors)
    ]


# -- each rule by itself


@pytest.mark.parametrize("first", [NOW, BEFORE_1970, -3], ids=["now", "before-1970", "over-1970"])
@pytest.mark.parametrize("seasons", [(4,), ()], ids=["season", "no-season"])
@pytest.mark.parametrize("has_model", [True, False], ids=["model", "baseline"])
def test_y_is_what_the_window_spoken_of_brought(first: int, seasons: tuple[int, ...], has_model: bool) -> None:
    settings = task_settings(seasons=seasons)
    model = Oracle(settings.spec) if has_model else None
    found = require_as_judged(Way(settings, {0: steady(first=first)}, model))
    assert found.forecasts == 60


def test_a_window_without_readings_has_no_y_and_is_spoken_from_all_the_same() -> None:
    settings = task_settings()
    way = Way(settings, {0: steady(1, 30, skip=(10, 11))}, Oracle(settings.spec))
    require_as_judged(way)
    frame, _ = way.go()
    gap = pd.Timestamp((NOW + 10) * HOUR, unit="ms")
    assert frame[frame["ds"] == gap]["y"].isna().tolist() == [True] * 3
    assert set(frame[frame["cutoff"] == gap]["status"]) == {"stale"}


@pytest.mark.parametrize("silence", [3, 4, 5, 12])
def test_over_a_silence_longer_than_is_remembered_the_windows_in_between_stay_unknown(silence: int) -> None:
    # max_gap is 3: up to it gap steps are made; beyond it nothing is said until the sensor speaks again, and begins anew.
    settings = task_settings(horizon=6)
    skip = range(10, 10 + silence)
    way = Way(settings, {0: steady(1, 40, skip=skip)}, Oracle(settings.spec))
    found = require_as_judged(way, settle_rows=4)
    assert found.forecasts == 40 - max(silence - 3, 0)
    frame, _ = way.go()
    after = frame[frame["cutoff"] == pd.Timestamp((NOW + 10 + silence) * HOUR, unit="ms")]
    assert set(after["status"]) == ({"ok"} if silence == 3 else {"warming"})
    if silence == 4:  # the first window after it is still within the horizon of what was said before
        over = frame[(frame["lead"] == 6) & (frame["ds"] == pd.Timestamp((NOW + 14) * HOUR, unit="ms"))]
        assert over["y"].notna().tolist() == [True]


def test_a_late_reading_is_in_no_y() -> None:
    settings = task_settings()
    log = steady(1, 20)
    late = Came("pump-0", log[5].ms + 1, (10_000.0,))
    way = Way(settings, {0: [*log[:12], late, *log[12:]]}, Oracle(settings.spec))
    require_as_judged(way)
    assert way.go()[0]["y"].max() < 100


def test_one_that_the_grace_waits_for_is() -> None:
    settings = task_settings(aggregates=("max",), grace_ms=2 * HOUR)
    log = steady(1, 20)
    late = Came("pump-0", log[5].ms + 1, (10_000.0,))
    way = Way(settings, {0: [*log[:7], late, *log[7:]]}, Oracle(settings.spec))
    require_as_judged(way)
    hit = way.go()[0].query("y == 10_000")
    assert hit["lead"].tolist() == [3, 2, 1]
    assert set(hit["ds"]) == {pd.Timestamp((NOW + 5) * HOUR, unit="ms")}


def test_of_hopping_windows_ds_and_cutoff_are_the_starts() -> None:
    settings = task_settings(size_ms=3 * HOUR, aggregates=("last",))
    way = Way(settings, {0: steady(2, 20)}, Oracle(settings.spec))
    require_as_judged(way)
    frame, _ = way.go()
    # The first window holds the first hour alone: it starts two hours before it.
    assert frame["cutoff"].min() == pd.Timestamp((NOW - 2) * HOUR, unit="ms")
    assert (frame["ds"] - frame["cutoff"] == pd.to_timedelta(frame["lead"], unit="h")).all()
    newest = {one.ms // HOUR: one.values[0] for one in way.logs[0] if one.sensor == "pump-1"}
    own = frame[(frame["unique_id"] == "pump-1") & frame["y"].notna()]
    hours = own["ds"].astype("datetime64[ms]").astype(np.int64) // HOUR
    assert own["y"].tolist() == [newest[min(hour + 2, NOW + 19)] for hour in hours]


def test_each_target_is_a_series_of_its_own() -> None:
    settings = task_settings(("heat", "rpm"), aggregates=("last", "count"))
    log = [replace(one, values=(one.values[0], 7.0 * at)) for at, one in enumerate(steady(2, 20))]
    log[9] = replace(log[9], values=(math.nan, 1.0))
    way = Way(settings, {0: log}, Oracle(settings.spec))
    found = require_as_judged(way)
    assert found.series_names == ["pump-0/heat", "pump-0/rpm", "pump-1/heat", "pump-1/rpm"]


def test_a_target_that_was_never_observed_is_null_beside_one_that_was() -> None:
    settings = task_settings(("heat", "rpm"), aggregates=("last",))
    way = Way(settings, {0: [replace(one, values=(math.nan, one.values[0])) for one in steady(1, 12)]})
    require_as_judged(way)
    frame, _ = way.go()
    assert frame[frame["unique_id"] == "pump-0/heat"][["y", "Millrace", "LastValue"]].isna().all(axis=None)
    assert frame[frame["unique_id"] == "pump-0/rpm"]["Millrace"].notna().all()


def test_targets_may_be_some_of_the_fields_in_another_order() -> None:
    settings = task_settings(("a", "b", "c"), aggregates=("last",))
    settings = replace(settings, spec=replace(settings.spec, targets=(2, 0)))
    log = [replace(one, values=(one.values[0], 555.0, -one.values[0])) for one in steady(2, 14)]
    found = require_as_judged(Way(settings, {0: log}, Oracle(settings.spec)))
    assert found.series_names[:2] == ["pump-0/c", "pump-0/a"]


def test_a_sensor_in_two_partitions_is_one_series_of_two_lives() -> None:
    settings = task_settings()
    logs = {0: steady(2, 20), 3: [replace(one, values=(one.values[0] + 200,)) for one in steady(1, 15, NOW + 2)]}
    way = Way(settings, logs, Oracle(settings.spec))
    frame, found = way.go(settle_rows=8)
    wanted, _ = way.judged()
    require_equal(without_baseline_quantiles(frame), without_baseline_quantiles(wanted))
    require_sums_of(frame, found)
    assert found.series == ["pump-0", "pump-1"]
    both = frame[(frame["unique_id"] == "pump-0") & (frame["lead"] == 1)].groupby("cutoff").size()
    assert set(both) == {1, 2}


@pytest.mark.parametrize("stride", [1, 2, 5, 100])
@pytest.mark.parametrize("first", [NOW, -13])
def test_with_a_stride_every_nth_window_of_the_grid_is_a_cutoff(stride: int, first: int) -> None:
    settings = task_settings()
    way = Way(settings, {0: steady(2, 40, first)}, Oracle(settings.spec), kept=Kept(stride=stride))
    require_as_judged(way)
    cutoffs = way.go()[0]["cutoff"].astype("datetime64[ms]").astype(np.int64) // HOUR
    assert (cutoffs % stride == 0).all()
    assert cutoffs.nunique() == sum(window % stride == 0 for window in range(first, first + 40))


def test_from_a_time_on_it_is_the_forecasts_issued_then_or_later_that_are_kept() -> None:
    # issued at the end of a window: the one [12:00 ---- 13:00) is the first that is kept from 13:00 on
    settings = task_settings()
    kept = Kept(from_ms=(NOW + 13) * HOUR)
    way = Way(settings, {0: steady(2, 30)}, Oracle(settings.spec), kept=kept)
    require_as_judged(way)
    frame, found = way.go()
    assert frame["cutoff"].min() == pd.Timestamp((NOW + 12) * HOUR, unit="ms")
    assert frame["ds"].min() == pd.Timestamp((NOW + 13) * HOUR, unit="ms")
    # What came before is what MASE divides by; the window that ended just then belongs to it.
    whole, _ = Way(settings, way.logs, way.model).go()[1].in_sample.units()
    scale, _ = found.in_sample.units()
    assert not np.array_equal(scale[:2], whole[:2])


def test_a_horizon_beyond_what_int32_counts_in_milliseconds_has_the_right_times() -> None:
    day = 24 * HOUR
    settings = task_settings(size_ms=day, hop_ms=day, horizon=40, seasons=(7,))
    log = [replace(one, ms=one.ms * 24) for one in steady(1, 45, NOW // 24)]
    way = Way(settings, {0: log}, Oracle(settings.spec))
    require_as_judged(way)
    frame, _ = way.go()
    assert ((frame["ds"] - frame["cutoff"]).dt.days == frame["lead"]).all()


def test_a_single_window_of_years_has_the_right_times() -> None:
    year = 365 * 24 * HOUR
    settings = task_settings(size_ms=year, hop_ms=year, seasons=())
    log = [Came("pump-0", year * number, (float(number),)) for number in range(40, 48)]
    require_as_judged(Way(settings, {0: log}, Oracle(settings.spec)))


@pytest.mark.parametrize("place", [1, 17, 40])
def test_a_model_that_takes_over_may_look_further_or_less_far_and_give_other_quantiles(place: int) -> None:
    settings = task_settings()
    further = Oracle(replace(settings.spec, horizon=7, quantiles=(0.25, 0.5, 0.75)), "looks further")
    shorter = Oracle(replace(settings.spec, horizon=1, quantiles=(0.9,)), "near")
    swaps = {place: further, place + 11: shorter}
    way = Way(settings, {0: steady(2, 30)}, Oracle(settings.spec), swaps)
    require_as_judged(way, settle_rows=4)
    frame, found = way.go()
    assert found.shape.levels == (0.1, 0.25, 0.5, 0.75, 0.9)
    assert frame.groupby("model_version")["lead"].max()["looks further"] == 7
    assert set(frame["model_version"]) >= {"looks further", "near"}
    near = frame[frame["model_version"] == "near"]
    assert near["Millrace-q0.9"].notna().all()
    assert near[["Millrace-q0.1", "Millrace-q0.25", "Millrace-q0.5"]].isna().all(axis=None)


def test_who_is_asked_outside_sees_the_newest_windows_up_to_the_cutoff_and_no_more() -> None:
    settings = task_settings()
    skip = (5, 12, 13, 14, 15, 16)
    way = Way(settings, {0: steady(2, 30, skip=skip)}, Oracle(settings.spec), history_steps=8)
    require_as_judged(way)
    require_as_judged(way, settle_rows=4, cuts=range(0, 60, 3))


def test_who_is_asked_outside_goes_with_a_model_of_other_quantiles() -> None:
    settings = task_settings()
    swaps = {15: Oracle(replace(settings.spec, horizon=2, quantiles=(0.25,)), "other")}
    way = Way(settings, {0: steady(1, 30)}, Oracle(settings.spec), swaps, history_steps=5)
    found = require_as_judged(way)
    of_level = found.errors.of_level
    assert of_level.shape == (4, 4)
    np.testing.assert_array_equal(of_level, np.broadcast_to(of_level[0], of_level.shape))
    assert (of_level > 0).all()
    # LastOf's quantiles are its mean + level: it is told apart by the thousands in it, so that all truths lie below.
    assert found.errors.reliability["LastOf"].tolist() == [1.0] * 4


def test_a_sensor_of_which_every_reading_was_late_is_a_series_without_labels() -> None:
    settings = task_settings()
    log = steady(2, 20)
    late = Came("late", log[0].ms, (1.0,))
    _, found = Way(settings, {0: [*log[:20], late, *log[20:]]}).go()
    figures = found.errors.figures(*found.in_sample.units())
    assert found.series_names == ["pump-0", "pump-1", "late"]
    assert figures.by_series()["labels"][2].tolist() == [0.0] * 3
    assert np.isnan(figures.by_series()["MAE"][2]).all()


def test_a_name_that_two_columns_would_bear_is_refused() -> None:
    shape = FrameShape(("y",), 3, (0.5,), ("LastValue", "SeasonalNaive"))
    for outside in (("SeasonalNaive",), ("AutoETS", "AutoETS"), ("Millrace",)):
        with pytest.raises(SettingsError, match=rf"--beside {outside[-1]}: .*once"):
            replace(shape, outside=outside)


def test_what_is_no_longer_needed_is_forgotten_even_while_nothing_is_said() -> None:
    settings = task_settings()
    way = Way(settings, {0: steady(2, 600)}, kept=Kept(from_ms=(NOW + 10_000) * HOUR))
    found, task = way.matching(), ForecastTask(settings, beside=way.kinds)
    most = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SETTLE_ROWS", 4)
        for _, _, piece in way._pieces(range(0, 1_200, 5)):
            found.add(0, task, task.take("t", 0, piece))
            if found.is_full:
                assert found.settle() == []
            most = max(most, sum(len(part["line"]) for part in found._truth))
    assert most < 400


# -- rows as they are given


def test_rows_come_by_cutoff_and_each_once() -> None:
    settings = task_settings()
    frame, _ = Way(settings, {0: steady(3, 30)}, Oracle(settings.spec)).go(cuts=range(0, 90, 7), settle_rows=4)
    assert frame["cutoff"].is_monotonic_increasing
    assert not frame.duplicated(KEY).any()


def test_rows_join_back_to_the_readings_on_ds() -> None:
    settings = task_settings()
    log = [replace(one, ms=one.ms // HOUR * HOUR) for one in steady(3, 40)]
    frame, _ = Way(settings, {0: log}, Oracle(settings.spec)).go()
    data = pd.DataFrame(
        {
            "unique_id": [one.sensor for one in log],
            "ds": pd.to_datetime([one.ms for one in log], unit="ms"),
            "truth": [one.values[0] for one in log],
        }
    )
    joined = frame.merge(data, on=["unique_id", "ds"], how="left", validate="many_to_one")
    pd.testing.assert_series_equal(joined["y"], joined["truth"], check_names=False)
    inside = frame["ds"] <= data["ds"].max()
    assert frame["y"].notna().equals(inside)


def test_only_the_last_horizon_has_no_y() -> None:
    settings = task_settings(horizon=5)
    frame, _ = Way(settings, {0: steady(2, 30)}, Oracle(settings.spec)).go(settle_rows=4)
    unknown = frame[frame["y"].isna()]
    assert unknown["ds"].min() == pd.Timestamp((NOW + 30) * HOUR, unit="ms")
    assert len(unknown) == 2 * (1 + 2 + 3 + 4 + 5)


def test_an_empty_log_gives_an_empty_frame_of_the_same_columns() -> None:
    way = Way(task_settings(), {0: []})
    frame, found = way.go()
    assert frame.empty
    assert frame.columns.tolist() == way.shape.schema.names
    assert found.forecasts == 0
    assert found.errors.figures(*found.in_sample.units()).over_all()["labels"].tolist() == [0.0] * 3


# -- however the log was cut, and however often it was stopped


@st.composite
def ways(draw: st.DrawFn) -> Way:
    """Two or three sensors that stammer: gaps, silences, disorder, missing values, over one or two partitions."""
    fields = draw(st.sampled_from([("value",), ("a", "b")]))
    hop = draw(st.sampled_from([1, 2]))
    settings = task_settings(
        fields,
        horizon=draw(st.integers(1, 5)),
        seasons=draw(st.sampled_from([(), (2,), (4,)])),
        size_ms=hop * HOUR,
        grace_ms=draw(st.sampled_from([0, HOUR])),
        aggregates=("last",),
    )
    logs = {}
    for partition in draw(st.sampled_from([(0,), (0, 2)])):
        hour, log = draw(st.sampled_from([NOW, -7])), []
        for _ in range(draw(st.integers(0, 40))):
            hour += draw(st.sampled_from([0, 0, 0, 1, 1, 2, 6, -1]))
            values = tuple(draw(st.sampled_from([math.nan, 1.0, 2.0, 5.0, -8.0])) for _ in fields)
            log.append(Came(draw(st.sampled_from(["a", "b", "c"])), hour * HOUR + len(log), values))
        logs[partition] = log
    model, swaps = None, {}
    if draw(st.booleans()):
        model = Oracle(settings.spec)
    if len(logs) == 1 and draw(st.booleans()):
        other = replace(settings.spec, horizon=draw(st.integers(1, 6)), quantiles=(0.5, 0.95))
        swaps = {draw(st.integers(1, 30)): Oracle(other, "second")}
    kept = Kept(draw(st.sampled_from([None, (NOW + 3) * HOUR, -2 * HOUR])), draw(st.integers(1, 3)))
    return Way(settings, logs, model, swaps, kept, draw(st.sampled_from([0, 0, 3])))


@settings(max_examples=60, deadline=None)
@given(way=ways(), cuts=st.sets(st.integers(1, 39)), restarts=st.sets(st.integers(0, 20)), rows=st.integers(1, 30))
def test_any_cutting_and_any_stop_give_the_rows_of_the_slow_judge(
    way: Way, cuts: set[int], restarts: set[int], rows: int
) -> None:
    frame, found = way.go(sorted(cuts), sorted(restarts), rows)
    wanted, errors = way.judged()
    require_equal(without_baseline_quantiles(frame), without_baseline_quantiles(wanted))
    require_sums_of(frame, found)
    if len(way.logs) == 1:
        require_naive_errors(found, errors, way.kept.from_ms)
    whole, other = way.go()
    pd.testing.assert_frame_equal(in_order(frame), in_order(whole))
    assert found.forecasts == other.forecasts
    np.testing.assert_allclose(found.errors.below, other.errors.below)
    np.testing.assert_allclose(found.errors.of_level, other.errors.of_level)
