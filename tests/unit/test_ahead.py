"""The steps after a file's end."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

from pipeline.cli import main
from pipeline.errors import SettingsError
from pipeline.service.ahead import draw_ahead, look_ahead, require_suffix
from pipeline.service.files import FileLayout
from pipeline.settings import load
from tests.unit.test_backtest import START, readings

QUICK = {
    "training.epochs": 6,
    "training.learning_rate": 0.02,
    "model.units": 8,
    "training.lanes": 8,
    "training.chunk": 24,
}
LONG = FileLayout("ds", ("y",), "unique_id")


def stored(frame: pd.DataFrame, folder: Path) -> Path:
    path = folder / "fleet.csv"
    frame.to_csv(path, index=False)
    return path


@pytest.mark.keras
def test_the_next_steps_begin_where_the_file_ends(tmp_path: Path) -> None:
    path = stored(readings(300, sensors=8, seed=2), tmp_path)
    settings = load(None, {}, QUICK | {"forecast.horizon": 5})
    ahead = look_ahead(settings, [path], LONG, "")
    last = pd.Timestamp(START, unit="ms") + pd.Timedelta("299h")
    frame = ahead.frame
    assert "y" not in frame
    assert len(frame) == 8 * 5
    assert set(frame["cutoff"]) == {last}
    assert frame.groupby("unique_id")["ds"].apply(list).map(tuple).unique().tolist() == [
        tuple(last + pd.Timedelta(hours=lead) for lead in (1, 2, 3, 4, 5))
    ]
    assert set(frame["status"]) == {"ok"}, ahead.notes
    bands = frame[["Millrace-q0.1", "Millrace-q0.5", "Millrace-q0.9"]].to_numpy()
    assert (np.diff(bands, axis=1) >= 0).all()
    assert ahead.data.core.spec.seasons == (6,)
    picture = draw_ahead(tmp_path / "next.png", ahead, "next")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_file_too_short_to_train_on_is_answered_by_the_baseline(tmp_path: Path) -> None:
    path = stored(readings(8, seed=2), tmp_path)
    ahead = look_ahead(load(None, {}, QUICK), [path], LONG, "")
    assert set(ahead.frame["status"]) == {"baseline"}
    assert "no model was trained, the baseline answers" in ahead.notes[0]


@pytest.mark.keras
def test_a_model_that_is_no_better_than_the_baselines_does_not_answer(tmp_path: Path) -> None:
    walk = readings(200, sensors=2, seed=2)
    walk["y"] = np.random.default_rng(0).normal(0, 1, len(walk)).cumsum()
    settings = load(None, {}, QUICK | {"training.epochs": 1})
    ahead = look_ahead(settings, [stored(walk, tmp_path)], LONG, "")
    assert set(ahead.frame["status"]) == {"baseline"}
    assert ahead.notes[0].startswith("the baseline answers")
    own = ahead.frame[ahead.frame["unique_id"] == "pump-1"]
    assert own["Millrace"].to_numpy() == pytest.approx(walk["y"].iloc[-1])


def test_a_sensor_that_fell_silent_long_ago_is_told_of(tmp_path: Path) -> None:
    frame = readings(200, seed=2)
    silent = (frame["unique_id"] == "pump-1") & (frame["ds"] > pd.Timestamp(START, unit="ms") + pd.Timedelta("50h"))
    ahead = look_ahead(
        load(None, {}, QUICK | {"training.holdout": 0.999}), [stored(frame[~silent], tmp_path)], LONG, ""
    )
    assert set(ahead.frame["unique_id"]) == {"pump-0", "pump-2"}
    assert "1 series ended too long before the file's end" in ahead.notes[-1]


def test_a_name_says_how_it_is_written() -> None:
    require_suffix(Path("a.csv"))
    require_suffix(Path("a.parquet"))
    with pytest.raises(SettingsError, match=r"--out a.txt: expected a name that ends in .csv or .parquet"):
        require_suffix(Path("a.txt"))


def test_the_command_needs_no_settings_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = stored(readings(8, seed=2), tmp_path)
    options = ["--data", str(path), "--time-column", "ds", "--id-column", "unique_id", "--horizon", "2"]
    done = CliRunner().invoke(main, ["forecast", *options, "--out", "next.csv"])
    assert done.exit_code == 0, done.output
    assert pd.read_csv("next.csv")["lead"].tolist() == [1, 2] * 3
