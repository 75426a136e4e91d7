"""The whole demo, small: a real broker, real programs, one of them killed. Every message is accounted for."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from pipeline.service.demo import DemoPlan, DemoReport, run_demo
from pipeline.service.narrator import Narrator
from pipeline.service.simulator import FAULTS
from tests.helpers.broker import RunningBroker

HOUR_MS = 3_600_000
ROOT = Path(__file__).parents[2]


def millrace(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline.cli", *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def small(broker: RunningBroker, tmp_path_factory: pytest.TempPathFactory) -> tuple[DemoPlan, DemoReport, str]:
    out = tmp_path_factory.mktemp("demo") / "out"
    plan = DemoPlan(
        ends_at_ms=int(time.time() * 1000) // HOUR_MS * HOUR_MS,
        out=out,
        sensors=8,
        history_days=8,
        live_hours=30,
        live_seconds=5,
        units=8,
        epochs=2,
        broken_share=0.02,
        late_share=0.01,
        bootstrap_servers=broker.bootstrap_servers,
        domain=f"demo{time.time_ns()}",
    )
    with (out.parent / "told.txt").open("w") as told:
        report, interrupted = run_demo(plan, Narrator(Console(file=told, width=200)))
    assert not interrupted
    return plan, report, (out.parent / "told.txt").read_text()


def test_every_forecast_that_is_due_has_come_and_no_other(small: tuple[DemoPlan, DemoReport, str]) -> None:
    plan, report, _ = small
    forecasts = report.counts[0]
    assert forecasts["expected"] == forecasts["seen"]
    # At most one for each sensor and hour; all but the hours before each sensor's first reading and after a long silence.
    hours = plan.history_days * 24 + plan.live_hours
    assert 0.95 * plan.sensors * hours < forecasts["seen"] <= plan.sensors * hours
    assert report.mistakes == []


def test_each_broken_message_is_one_dead_letter_with_its_reason(small: tuple[DemoPlan, DemoReport, str]) -> None:
    _, report, _ = small
    letters = {row["what"].removeprefix("dead letters: "): row for row in report.counts[1:]}
    assert set(letters) == {fault.reason for fault in FAULTS} | {"late"}
    for reason, row in letters.items():
        assert row["expected"] == row["seen"] > 0, reason


def test_the_hidden_state_goes_on_after_kill_9(small: tuple[DemoPlan, DemoReport, str]) -> None:
    _, report, told = small
    assert "kill -9" in told
    assert len(report.memory) == 3
    for row in report.memory:
        before, after = row["state_steps before kill -9"], row["first one after"]
        assert before > 24
        assert after == before + 1
    assert report.out_of_sequence == 0


def test_the_baseline_answers_until_there_is_a_model_then_the_model(small: tuple[DemoPlan, DemoReport, str]) -> None:
    plan, report, _ = small
    statuses = {row["status"]: row["forecasts"] for row in report.statuses}
    assert statuses["baseline"] >= 0.9 * plan.sensors * plan.history_days * 24
    assert statuses["ok"] > 0.5 * plan.sensors * plan.live_hours
    assert [row["forecaster"] for row in report.scores] == ["Millrace", "LastValue", "SeasonalNaive"]
    assert len({row["windows scored"] for row in report.scores}) == 1


def test_it_leaves_a_picture_a_page_and_the_settings_to_go_on_with(small: tuple[DemoPlan, DemoReport, str]) -> None:
    plan, report, told = small
    assert report.files == [str(plan.out / name) for name in ("forecasts.png", "index.html", "millrace.toml")]
    assert all(Path(file).stat().st_size > 300 for file in report.files)
    for pid in re.findall(r"pid (\d+)", told):
        assert not Path(f"/proc/{pid}").exists(), "what was started is stopped"


def test_watch_shows_a_sensor_of_it_in_one_line(small: tuple[DemoPlan, DemoReport, str]) -> None:
    plan, _, _ = small
    process = millrace("watch", "fan-002", "--frames", "1", "--config", str(plan.out / "millrace.toml"), cwd=ROOT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert re.search(r"fan-002 temperature .* model gru8-\w+, state_steps \d+, offset \d:\d+", out), out


def test_watch_names_sensors_near_to_one_that_nobody_knows(small: tuple[DemoPlan, DemoReport, str]) -> None:
    plan, _, _ = small
    process = millrace("watch", "fan-2", "--config", str(plan.out / "millrace.toml"), cwd=ROOT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "fan-002" in err
    assert "Traceback" not in err


def test_ctrl_c_ends_it_with_a_summary_and_nothing_left_running(broker: RunningBroker, tmp_path: Path) -> None:
    process = millrace("demo", "--sensors", "5", "--bootstrap-servers", broker.bootstrap_servers, cwd=tmp_path)
    assert process.stderr is not None
    pids = []
    for line in process.stderr:
        pids += re.findall(r"millrace run, pid (\d+)", line)
        if line.startswith("training"):
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Sent and seen" in out
    assert "interrupted" in err
    assert "Traceback" not in err
    assert len(pids) == 1
    assert not Path(f"/proc/{pids[0]}").exists()
