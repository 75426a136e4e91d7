"""`millrace replay` against a real broker: what a plain client then finds in the topic."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.kafka import topics
from pipeline.kafka.sink import partition_for
from pipeline.settings import Settings, load
from tests.helpers.broker import RunningBroker, read_all

START = 1_467_331_200_000  # 2016-07-01T00:00Z
SECOND = 1000


@pytest.fixture
def settings(broker: RunningBroker, domain: str) -> Settings:
    overrides = {"kafka.bootstrap_servers": broker.bootstrap_servers, "topics.domain": domain, "topics.partitions": 3}
    settings = load(None, {}, overrides)
    topics.create(settings)
    return settings


def start(settings: Settings, *args: str) -> subprocess.Popen[str]:
    """The command as a person runs it, in a process of its own."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("MILLRACE_")}
    environ |= {
        "MILLRACE_KAFKA__BOOTSTRAP_SERVERS": settings.kafka.bootstrap_servers,
        "MILLRACE_TOPICS__DOMAIN": settings.topics.domain,
    }
    command = [sys.executable, "-m", "pipeline.cli", "replay", *args]
    return subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(settings: Settings, *args: str) -> tuple[int, str, str]:
    process = start(settings, *args)
    stdout, stderr = process.communicate(timeout=120)
    return process.returncode, stdout, stderr


def wide_file(folder: Path, rows: int = 200) -> Path:
    lines = [f"{START // 1000 + n},{n}.5,{'' if n % 10 == 3 else n * 2}" for n in range(rows)]
    path = folder / "wide.csv"
    path.write_text("\n".join(["when,pump-1,pump-2", *lines, ""]))
    return path


def test_every_reading_arrives_once_in_order_where_its_key_belongs(broker, settings, tmp_path):
    path = wide_file(tmp_path)
    status, stdout, stderr = run(
        settings, str(path), "--time-column", "when", "--value-columns", "pump-1,pump-2", "--format", "json"
    )
    assert status == 0, stderr
    [summary] = json.loads(stdout)
    assert (summary["records"], summary["sensors"]) == (400, 2)
    assert (summary["from"], summary["to"]) == ("2016-07-01T00:00:00Z", "2016-07-01T00:03:19Z")

    found: dict[str, list[tuple[int, float | None]]] = {"pump-1": [], "pump-2": []}
    for record in read_all(broker, settings.topics.readings_topic):
        value = json.loads(record.value)
        assert record.timestamp == value["ts"]
        assert record.partition == partition_for(record.key, 3)
        found[record.key.decode()].append((value["ts"], value["value"]))
    assert found["pump-1"] == [(START + n * SECOND, n + 0.5) for n in range(200)]
    assert found["pump-2"] == [(START + n * SECOND, None if n % 10 == 3 else n * 2.0) for n in range(200)]


def test_ctrl_c_ends_it_with_130_and_says_what_was_sent(broker, settings, tmp_path):
    path = wide_file(tmp_path, rows=2000)
    process = start(
        settings, str(path), "--time-column", "when", "--value-columns", "*", "--speed", "20", "--format", "json"
    )
    deadline = time.monotonic() + 60
    while not read_all(broker, settings.topics.readings_topic):
        assert time.monotonic() < deadline
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    [summary] = json.loads(stdout)
    assert 0 < summary["records"] < 4000
    assert summary["records"] == len(read_all(broker, settings.topics.readings_topic))


def test_a_bad_cell_in_the_middle_ends_it_with_1_and_names_the_row(settings, tmp_path):
    path = tmp_path / "bad.csv"
    path.write_text("when,a\n1467331200,1\n1467331201,warm\n")
    status, _, stderr = run(settings, str(path), "--time-column", "when", "--value-columns", "a")
    assert status == 1
    assert "'warm'" in stderr
    assert "#3" in stderr
    assert "Traceback" not in stderr


def test_a_file_whose_columns_were_not_named_is_described(settings, tmp_path):
    status, _, stderr = run(settings, str(wide_file(tmp_path)))
    assert status == 2
    assert "--time-column" in stderr
    assert "pump-1 (numbers, such as 0.5)" in stderr


def test_fields_that_the_settings_do_not_name_are_sent_with_a_warning(settings, tmp_path):
    columns = ("--time-column", "when", "--value-columns", "pump-1")
    status, _, stderr = run(settings, str(wide_file(tmp_path)), *columns, "--field", "temperature")
    assert status == 0
    assert "fields temperature, readings.fields names others (value)" in stderr
    assert "warning" not in run(settings, str(wide_file(tmp_path)), *columns)[2]
