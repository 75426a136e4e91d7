"""Backtests through their own entry: alignment first, then no leak, no difference after a stop, and what a caller gets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from models.forecaster import Column, Prediction, Rows, SeriesSpec, StepBlock
from pipeline.errors import DeploymentError, SettingsError
from pipeline.service import backtest as module
from pipeline.service import passage
from pipeline.service.assembly import task_settings
from pipeline.service.backtest import Answer, Watcher, backtest, matching_for, of_file
from pipeline.service.files import FileLayout
from pipeline.service.inputs import FileInput
from pipeline.service.keeping import Memory
from pipeline.service.matching import Kept
from pipeline.service.outlook import prepared
from pipeline.service.passage import Passage, frame_of
from pipeline.service.question import Question, epoch_ms
from pipeline.service.results import metrics_frame
from pipeline.service.timeline import Given, Shelf
from pipeline.settings import Settings, load

HOUR = 3_600_000
START = 1_735_689_600_000
LONG = FileLayout("ds", ("y",), "unique_id")
SMALL = {
    "readings.fields": ["y"],
    "windows.size": "1h",
    "forecast.season": ["6h"],
    "forecast.horizon": 4,
    "model.units": 8,
    "model.path": "no-such-folder",
    "training.epochs": 6,
    "training.learning_rate": 0.02,
    "training.lanes": 8,
    "training.chunk": 24,
    "retraining.min_labels": 20,
}


@pytest.fixture
def settings() -> Settings:
    return load(None, {}, SMALL)


def truth(end_ms: Any) -> Any:
    """A series that is a function of time, in numbers that float32 holds exactly."""
    hour = np.asarray(end_ms) // HOUR
    return (hour * 7 % 23 + hour % 6).astype(np.float64)


def readings(hours: int, sensors: int = 3, seed: int | None = None) -> pd.DataFrame:
    """A row a sensor and hour, sensor after sensor. seed: of a rhythm with a disturbance that dies away slowly, which a seasonal
    naive forecast cannot follow; None: `truth`, the same for all."""
    start_ms = START + HOUR * np.arange(hours)
    columns = []
    random = np.random.default_rng(seed)
    for sensor in range(sensors):
        rhythm = 3 * np.sin(2 * np.pi * (np.arange(hours) + sensor) / 6)
        disturbance = np.zeros(hours)
        for hour in range(1, hours):
            disturbance[hour] = 0.8 * disturbance[hour - 1] + random.normal(0, 1)
        values = truth(start_ms + HOUR) if seed is None else 20 + 5 * sensor + rhythm + disturbance
        ds = pd.to_datetime(start_ms, unit="ms")
        columns.append(pd.DataFrame({"unique_id": f"pump-{sensor}", "ds": ds, "y": values}))
    return pd.concat(columns, ignore_index=True)


class Seer:
    """Knows the future: says of each window what `truth` has for the one `shift` later."""

    name = "Millrace"
    warmup_steps = 0

    def __init__(self, spec: SeriesSpec, shift: int = 0) -> None:
        self.spec, self.version, self._shift = spec, f"seer-{shift}", shift

    def columns(self) -> tuple[Column, ...]:
        return ()

    def advance(self, rows: Rows, block: StepBlock, context: Any) -> Prediction:
        ahead = self.spec.step_ms * (np.arange(1, self.spec.horizon + 1) + self._shift)
        mean = truth(block.end_ms[..., None] + ahead)[..., None].astype(np.float32)
        return Prediction(mean, np.repeat(mean[..., None], len(self.spec.quantiles), axis=-1))

    def rebuild(self, rows: Rows, block: StepBlock, context: Any) -> None:
        pass


def passed(settings: Settings, frame: pd.DataFrame, model: Any, kept: Kept = Kept()) -> tuple[Any, pd.DataFrame]:  # noqa: B008
    """Matching and long frame of a model that answers all the time."""
    core = task_settings(settings)
    data = prepared(settings, [frame], LONG, None, None, lambda text: None)
    timeline = Given(Shelf(Path("nowhere")), model)
    matching, keeper = matching_for(core, timeline, kept), Memory()
    source = FileInput(data.read(None), core.format.fields, "frame")
    Passage(settings, source, timeline, matching, keeper).run()
    return matching, frame_of(keeper.tables, matching.shape.schema)


# -- alignment


def test_a_perfect_forecaster_scores_0_at_every_lead(settings: Settings) -> None:
    matching, frame = passed(settings, readings(60), Seer(task_settings(settings).spec))
    metrics = metrics_frame(matching)
    by_lead = metrics[metrics["lead"].notna() & (metrics["forecaster"] == "Millrace")]
    assert by_lead["lead"].tolist() == [1, 2, 3, 4]
    assert by_lead["labels"].tolist() == [3 * (60 - lead) for lead in (1, 2, 3, 4)]
    for name in ("MAE", "RMSE", "MSE", "MASE", "sMAPE", "pinball", "width", "scaled_MAE", "scaled_MSE"):
        assert by_lead[name].tolist() == [0.0] * 4, name
    assert by_lead["coverage"].tolist() == [1.0] * 4
    known = frame.dropna(subset=["y"])
    assert (known["y"] == known["Millrace"]).all()


@pytest.mark.parametrize("shift", [-1, 1])
def test_one_that_is_a_step_off_does_not(settings: Settings, shift: int) -> None:
    matching, _ = passed(settings, readings(60), Seer(task_settings(settings).spec, shift))
    assert (matching.errors.figures(*matching.in_sample.units()).by_lead()["MAE"][:, 0] > 1).all()


def test_the_baselines_are_what_they_say(settings: Settings) -> None:
    _, frame = passed(settings, readings(60), None)
    own = frame[(frame["unique_id"] == "pump-0") & (frame["cutoff"] >= frame["cutoff"].min() + pd.Timedelta("12h"))]
    cutoff_ms = own["cutoff"].astype("datetime64[ms]").astype(np.int64).to_numpy()
    ds_ms = own["ds"].astype("datetime64[ms]").astype(np.int64).to_numpy()
    assert (own["LastValue"].to_numpy() == truth(cutoff_ms + HOUR)).all()
    assert (own["SeasonalNaive"].to_numpy() == truth(ds_ms + HOUR - 6 * HOUR)).all()
    assert (own["Millrace"] == own["SeasonalNaive"]).all()
    assert set(own["model_version"]) == {"SeasonalNaive"}


def test_rows_join_back_on_the_times_of_the_readings(settings: Settings) -> None:
    data = readings(40, seed=1)
    _, frame = passed(settings, data, None)
    joined = frame.drop(columns="y").merge(data, on=["unique_id", "ds"], how="left")
    pd.testing.assert_series_equal(joined["y"], frame["y"], check_names=False)
    assert (frame["ds"] == frame["cutoff"] + pd.to_timedelta(frame["lead"], unit="h")).all()


# -- no leak


def of(settings: Settings, data: pd.DataFrame, question: Question) -> Answer:
    return of_file(settings, [data], LONG, question)


def by_row(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.sort_values(["unique_id", "cutoff", "lead"], ignore_index=True)


def trained_at(hour: int) -> Question:
    return Question(train_until_ms=START + hour * HOUR)


@pytest.mark.keras
@pytest.mark.parametrize("question", [trained_at(150), Question(retrain_every="4d")], ids=["fresh", "schedule"])
def test_nothing_up_to_a_cutoff_changes_when_all_readings_after_it_are_replaced(
    settings: Settings, question: Question
) -> None:
    data, cutoff = readings(300, sensors=8, seed=2), pd.Timestamp(START + 250 * HOUR, unit="ms")
    corrupted = data.copy()
    after = corrupted["ds"] > cutoff
    corrupted.loc[after, "y"] = np.random.default_rng(9).normal(1e6, 1e5, int(after.sum()))
    said, other = (of(settings, own, question).frame() for own in (data, corrupted))
    # A model's name is the hash of its file, which holds the time at which it was saved.
    forecasts = [column for column in said.columns if column not in ("y", "model_version")]
    before, after_corruption = (by_row(one[one["cutoff"] <= cutoff])[forecasts] for one in (said, other))
    assert len(before) > 300
    assert set(before["status"]) >= {"ok"}
    pd.testing.assert_frame_equal(before, after_corruption, check_exact=True)
    later = [by_row(one[one["cutoff"] > cutoff])["Millrace"].to_numpy() for one in (said, other)]
    assert not np.array_equal(*later)  # the corruption is seen where it may be


# -- stopping and going on


class Stopped(Exception):
    """Somebody pulled the plug."""


def pulling(after: int) -> Watcher:
    """The plug, at the so-manyth look at the progress."""
    looks = iter(range(after + 1))

    def progress(at: Any) -> None:
        if next(looks) == after:
            raise Stopped

    return Watcher(progress=progress)


@pytest.fixture
def always_saving(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passage, "CHECKPOINT_SECONDS", -1.0)
    monkeypatch.setattr(passage, "READINGS_AT_ONCE", 50)
    monkeypatch.setattr("pipeline.service.files.READINGS_AT_ONCE", 90)
    monkeypatch.setattr("pipeline.service.outlook.READINGS_AT_ONCE", 90)
    monkeypatch.setattr("pipeline.service.matching.SETTLE_ROWS", 64)


@pytest.mark.keras
@pytest.mark.usefixtures("always_saving")
@pytest.mark.parametrize("question", [trained_at(150), Question(retrain_every="4d")], ids=["fresh", "schedule"])
def test_one_that_was_stopped_goes_on_as_if_nothing_had_happened(
    settings: Settings, question: Question, tmp_path: Path
) -> None:
    data = readings(260, sensors=8, seed=3)

    def run(out: Path, watcher: Watcher = module.SILENT) -> Answer:
        asked = Question(train_until_ms=question.train_until_ms, retrain_every=question.retrain_every, out=out)
        return of_file(settings, [data], LONG, asked, watcher)

    whole = run(tmp_path / "whole")
    for after in (2, 3, 2):
        with pytest.raises(Stopped):
            run(tmp_path / "pieces", pulling(after))
    pieces = run(tmp_path / "pieces")
    same = [one.drop(columns="model_version") for one in (by_row(whole.frame()), by_row(pieces.frame()))]
    pd.testing.assert_frame_equal(*same, rtol=1e-5, atol=1e-5)
    pd.testing.assert_frame_equal(
        metrics_frame(whole.outcome.matching), metrics_frame(pieces.outcome.matching), rtol=1e-5
    )
    assert [(c.time_ms, c.kind, c.reason) for c in whole.outcome.changes] == [
        (c.time_ms, c.kind, c.reason) for c in pieces.outcome.changes
    ]
    assert whole.outcome.counts == pieces.outcome.counts
    assert whole.outcome.over_time.sums.keys() == pieces.outcome.over_time.sums.keys()


def test_a_folder_with_another_backtest_is_left_alone(settings: Settings, tmp_path: Path, always_saving: None) -> None:
    model_free = Question(retrain_every="900d", out=tmp_path)
    with pytest.raises(Stopped):
        of_file(settings, [readings(60)], LONG, model_free, pulling(1))
    with pytest.raises(DeploymentError, match=r"unfinished backtest with retrain_every = '900d'.*--overwrite"):
        of_file(settings, [readings(60)], LONG, Question(retrain_every="800d", out=tmp_path))
    with pytest.raises(DeploymentError, match="unfinished backtest with data"):
        of_file(settings, [readings(61)], LONG, model_free)
    of_file(settings, [readings(60)], LONG, model_free)
    with pytest.raises(DeploymentError, match=r"finished backtest.*--overwrite"):
        of_file(settings, [readings(60)], LONG, model_free)


# -- what learns


@pytest.mark.keras
def test_the_schedule_does_not_depend_on_how_the_file_was_cut(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = readings(260, sensors=8, seed=4)
    whole = of(settings, data, Question(retrain_every="4d"))
    monkeypatch.setattr(passage, "READINGS_AT_ONCE", 7)
    monkeypatch.setattr("pipeline.service.outlook.READINGS_AT_ONCE", 31)
    cut = of(settings, data, Question(retrain_every="4d"))
    assert [c.time_ms for c in whole.outcome.changes] == [c.time_ms for c in cut.outcome.changes]
    assert "promoted" in {change.kind for change in whole.outcome.changes}
    same = [by_row(one.frame()).drop(columns="model_version") for one in (whole, cut)]
    pd.testing.assert_frame_equal(*same, rtol=1e-4, atol=1e-4)


@pytest.mark.keras
def test_a_fresh_model_answers_from_the_time_on_up_to_which_it_was_trained(settings: Settings) -> None:
    answer = of(settings, readings(220, seed=5), trained_at(150))
    frame, (change,) = answer.frame(), answer.outcome.changes
    assert (change.kind, change.time_ms) == ("trained", START + 150 * HOUR)
    assert frame["ds"].min() == pd.Timestamp(START + 150 * HOUR, unit="ms")
    assert set(frame["status"]) == {"ok"}
    assert set(frame["model_version"]) == {change.version}


def test_a_time_before_which_nothing_closed_is_no_time_to_train_until(settings: Settings) -> None:
    with pytest.raises(DeploymentError, match=r"no window had closed before 2025-01-01 00:00 UTC.*--train-until"):
        of(settings, readings(60), trained_at(0))


def test_a_time_after_the_end_is_no_time_to_train_until(settings: Settings) -> None:
    with pytest.raises(DeploymentError, match=r"the data ends before 2025-01-31 .*--train-until"):
        of(settings, readings(60), trained_at(720))


# -- what a caller gets


@pytest.mark.parametrize("moment", ["2025-01-05", pd.Timestamp("2025-01-05"), 1_736_035_200, 1_736_035_200_000])
def test_a_time_may_be_written_in_any_way(moment: Any) -> None:
    assert epoch_ms(moment) == 1_736_035_200_000


def test_no_time_is_refused() -> None:
    with pytest.raises(SettingsError, match="is no time"):
        epoch_ms(pd.NaT)
    with pytest.raises(SettingsError, match="'soon' is no time"):
        epoch_ms("soon")


def test_arguments_go_over_settings(settings: Settings) -> None:
    frame = backtest(readings(40, seed=1), settings=settings, retrain_every="900d", horizon=2, value_columns=["y"])
    assert frame["lead"].max() == 2
    assert settings.forecast.horizon == 4


def test_a_step_that_the_settings_name_is_not_asked_of_the_data(settings: Settings) -> None:
    told: list[str] = []
    one = readings(1, sensors=2)
    frame = backtest(one, settings=settings, retrain_every="900d", note=told.append)
    assert told[0] == "2 readings of 2 sensors"
    assert len(frame) == 2 * 4


def test_periods_are_no_times(settings: Settings) -> None:
    data = readings(10)
    data["ds"] = data["ds"].dt.to_period("h")
    with pytest.raises(DeploymentError, match=r"column 'ds' holds period\[h\].*to_timestamp"):
        backtest(data, settings=settings, retrain_every="900d")


@pytest.mark.keras
def test_a_frame_of_nixtlas_kind_needs_nothing_but_a_time_to_train_until(tmp_path: Path) -> None:
    told: list[str] = []
    frame = backtest(
        readings(300, seed=6), train_until="2025-01-10", horizon=3, note=told.append, out=tmp_path, settings=None
    )
    assert "a step of 1h, season 6h" in told[0]
    assert frame.columns.tolist() == [
        "unique_id", "ds", "cutoff", "lead", "y", "status", "model_version",
        "Millrace", "Millrace-q0.1", "Millrace-q0.5", "Millrace-q0.9", "LastValue", "SeasonalNaive",
    ]  # fmt: skip
    assert sorted(frame["unique_id"].unique()) == ["pump-0", "pump-1", "pump-2"]
    assert {path.name for path in tmp_path.iterdir()} == {
        "forecasts.parquet", "metrics.csv", "report.html", "settings.toml", "models",
    }  # fmt: skip
    stored = pd.read_parquet(tmp_path / "forecasts.parquet")
    pd.testing.assert_frame_equal(stored, frame)
    assert load(tmp_path / "settings.toml", {}).forecast.horizon == 3


@pytest.mark.keras
def test_utilsforecast_takes_the_frame_as_it_is(settings: Settings) -> None:
    losses = pytest.importorskip("utilsforecast.losses")
    evaluation = pytest.importorskip("utilsforecast.evaluation")
    answer = of(settings, readings(220, seed=7), trained_at(150))
    frame = answer.frame().dropna(subset=["y"])
    names = ["Millrace", "LastValue", "SeasonalNaive"]
    theirs = evaluation.evaluate(
        frame.drop(columns=["status", "model_version", "lead", "cutoff"]), [losses.mae], models=names
    )
    ours = metrics_frame(answer.outcome.matching)
    own = ours[ours["unique_id"].notna()].pivot(index="unique_id", columns="forecaster", values="MAE")
    np.testing.assert_allclose(theirs.set_index("unique_id")[names], own[names], rtol=1e-6)


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        (lambda: Question(model="x", recorded=True), "--model and --recorded"),
        (lambda: Question(stride=0), "--stride 0"),
    ],
)
def test_a_question_that_contradicts_itself_is_refused(question: Callable[[], Question], expected: str) -> None:
    with pytest.raises(SettingsError, match=expected):
        question()


def test_a_trained_model_is_warmed_up_before_the_start_and_one_that_learns_is_not(settings: Settings) -> None:
    core, start = task_settings(settings), START + 10_000 * HOUR
    assert Question(model="m", start=start).reads_from_ms(core) == start - 4_000 * HOUR
    assert Question(model="m", start=start, lead_in_ms=HOUR).reads_from_ms(core) == start - HOUR
    assert Question(model="m", start=HOUR).reads_from_ms(core) < 0  # a file may begin before 1970
    assert Question(retrain_every="1d", start=start).reads_from_ms(core) == start
    assert Question(model="m").reads_from_ms(core) is None
    assert Question(train_until_ms=start + HOUR, start=start).kept_from_ms == start + HOUR


@pytest.mark.keras
def test_a_start_leaves_out_what_was_said_before_it(settings: Settings, tmp_path: Path) -> None:
    fitted = of(settings, readings(220, seed=5), Question(train_until_ms=START + 150 * HOUR, out=tmp_path / "fit"))
    (change,) = fitted.outcome.changes
    start = START + 180 * HOUR
    asked = Question(model=str(tmp_path / "fit" / "models" / change.version), start=start)
    answer = of(settings, readings(220, seed=5), asked)
    assert answer.frame()["ds"].min() == pd.Timestamp(start, unit="ms")
    assert answer.outcome.counts.readings == 3 * 220
    assert answer.notes == []  # it has seen nothing after the start
    (note,) = of(settings, readings(220, seed=5), Question(model=asked.model)).notes
    assert "has learned from data up to" in note


def test_without_a_word_about_the_model_it_says_what_can_be_said(settings: Settings) -> None:
    with pytest.raises(SettingsError, match=r"--model DIR or VERSION.*--train-until T.*--retrain-every 1d"):
        of(settings, readings(60), Question())


def test_offsets_and_recorded_models_are_for_topics(settings: Settings) -> None:
    with pytest.raises(SettingsError, match="--from 2026-01-31"):
        of(settings, readings(60), Question(start={0: 5}, retrain_every="9d"))
    with pytest.raises(SettingsError, match="--recorded was given with --data"):
        of(settings, readings(60), Question(recorded=True))
