"""The commands as a user types them, one process each, on a real broker and a generated file."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tests.helpers.broker import RunningBroker, read_all

HOURS, SENSORS = 400, 4


@pytest.fixture
def folder(broker: RunningBroker, domain: str, tmp_path: Path) -> Path:
    """A user's folder: ten lines of TOML and a wide file of hourly readings, one column a sensor."""
    (tmp_path / "millrace.toml").write_text(
        f'[kafka]\nbootstrap_servers = "{broker.bootstrap_servers}"\n[topics]\ndomain = "{domain}"\n'
        "[forecast]\nhorizon = 6\n[model]\nunits = 8\n[training]\nepochs = 3\nlanes = 8\n"
    )
    hours = np.arange(HOURS)
    rng = np.random.default_rng(0)
    columns = {
        f"pump-{s}": np.round(20 + s + np.sin(2 * np.pi * hours / 24 + s) + rng.normal(0, 0.1, HOURS), 4)
        for s in range(SENSORS)
    }
    times = pd.date_range("2025-03-01", periods=HOURS, freq="h")
    pd.DataFrame({"date": times, **columns}).to_csv(tmp_path / "fleet.csv", index=False)
    return tmp_path


def millrace(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipeline.cli", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240, env=environment())


def environment() -> dict[str, str]:
    root = str(Path(__file__).parents[2])
    return os.environ | {"PYTHONPATH": root, "PYTHONUNBUFFERED": "1"}


@pytest.mark.keras
def test_from_a_file_to_a_model_to_forecasts(folder: Path, broker: RunningBroker, domain: str) -> None:
    assert millrace(folder, "topics", "create").returncode == 0
    assert millrace(folder, "topics", "check").returncode == 0
    replayed = millrace(
        folder, "replay", "fleet.csv", "--time-column", "date", "--value-columns", "*", "--format", "json"
    )
    assert json.loads(replayed.stdout)[0]["records"] == HOURS * SENSORS, replayed.stderr

    trained = millrace(folder, "train", "--format", "json")

    figures = {row["forecaster"]: row for row in json.loads(trained.stdout)}
    assert set(figures) == {"Millrace", "LastValue", "SeasonalNaive"}, trained.stderr
    assert figures["Millrace"]["labels"] > 0
    from_file = millrace(
        folder, "train", "--data", "fleet.csv", "--time-column", "date", "--value-columns", "*", "--out", "other",
        "--format", "json",
    )  # fmt: skip
    assert {row["forecaster"]: row["labels"] for row in json.loads(from_file.stdout)} == {
        name: row["labels"] for name, row in figures.items()
    }, "the topic and the file hold the same history"

    ran = millrace(folder, "run", "--exit-at-end", "--format", "json")

    (summary,) = json.loads(ran.stdout)
    # Stream time is each partition's: the newest hour of every sensor is still open.
    assert summary["forecasts"] == summary["windows"] == (HOURS - 1) * SENSORS, ran.stderr
    values = [json.loads(record.value) for record in read_all(broker, f"{domain}.forecasts.v1", "read_committed")]
    assert Counter(value["sensor"] for value in values) == {f"pump-{s}": HOURS - 1 for s in range(SENSORS)}
    assert Counter(value["status"] for value in values) == {"ok": (HOURS - 12) * SENSORS, "warming": 11 * SENSORS}
    version = json.loads((folder / "model" / "manifest.json").read_text())["version"]
    assert {value["model"] for value in values if value["status"] == "ok"} == {version}
    for value in values:
        quantiles = np.array([value["targets"]["value"][name] for name in ("q0.1", "q0.5", "q0.9")])
        assert np.isfinite(quantiles).all()
        assert (np.diff(quantiles, axis=0) >= 0).all()


def test_a_worker_stops_cleanly_on_sigterm_and_says_what_it_did(folder: Path) -> None:
    millrace(folder, "topics", "create")
    millrace(folder, "replay", "fleet.csv", "--time-column", "date", "--value-columns", "*")
    command = [sys.executable, "-m", "pipeline.cli", "run", "--format", "json"]
    log = folder / "run.log"
    with log.open("w") as stderr:
        worker = subprocess.Popen(
            command, cwd=folder, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment()
        )
    try:
        wait_for(lambda: log.read_text().count("answers from offset") == 4, "four partitions")
        time.sleep(1)
        worker.send_signal(signal.SIGTERM)
        out, _ = worker.communicate(timeout=60)
    finally:
        worker.kill()
    assert worker.returncode == 0, log.read_text()
    assert json.loads(out)[0]["readings"] == HOURS * SENSORS
    assert "the baseline answers" in log.read_text()


def test_a_worker_without_its_topics_names_the_mend(folder: Path) -> None:
    ran = millrace(folder, "run", "--exit-at-end")
    assert ran.returncode == 1
    assert "millrace topics create" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_a_model_made_for_other_settings_is_refused_and_says_why(folder: Path) -> None:
    (folder / "model").mkdir()
    (folder / "model" / "manifest.json").write_text("{}")
    millrace(folder, "topics", "create")
    ran = millrace(folder, "run", "--exit-at-end")
    assert ran.returncode == 1
    assert "manifest.json" in ran.stderr
    assert "millrace train" in ran.stderr


def wait_for(condition: object, what: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, f"{what} did not come within {seconds} s"
        time.sleep(0.1)


def test_readings_without_any_of_the_fields_are_told_by_run_and_train(folder: Path) -> None:
    millrace(folder, "topics", "create")
    columns = ("--time-column", "date", "--value-columns", "*", "--field", "temperature")
    assert "readings.fields" in millrace(folder, "replay", "fleet.csv", *columns).stderr

    ran = millrace(folder, "run", "--exit-at-end", "--format", "json")

    assert json.loads(ran.stdout)[0]["forecasts"] == 0
    assert "no reading had a value in value; check readings.fields" in ran.stderr
    trained = millrace(folder, "train")
    assert trained.returncode == 1
    assert "with values in value" in trained.stderr


def test_a_model_folder_that_cannot_be_written_is_told_before_the_training(folder: Path) -> None:
    (folder / "taken").write_text("a file")
    columns = ("--data", "fleet.csv", "--time-column", "date", "--value-columns", "*")
    trained = millrace(folder, "train", *columns, "--out", "taken/model")
    assert trained.returncode == 1
    assert "is no folder; name another with --out" in trained.stderr
    assert "epoch" not in trained.stderr
