"""`millrace replay` against a real broker: what a plain client then finds in the topic."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kafka import KafkaProducer

from pipeline.kafka import topics
from pipeline.kafka.sink import RecordSink, partition_for
from pipeline.settings import Settings, load
from pipeline.stream.columns import OutgoingRecords
from tests.helpers.broker import RunningBroker, make_topic, read_all

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


def interrupted(process: subprocess.Popen[str], broker: RunningBroker, topic: str) -> dict[str, Any]:
    """Ctrl-C once something has arrived; its summary."""
    deadline = time.monotonic() + 60
    while not read_all(broker, topic):
        assert time.monotonic() < deadline
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    [summary] = json.loads(stdout)
    return summary


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
    summary = interrupted(process, broker, settings.topics.readings_topic)
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


def fill(settings: Settings, records: list[tuple]) -> None:
    """(partition, timestamp_ms, key, value, headers) into the readings topic, in this order within each partition."""
    with RecordSink(settings) as sink:
        for partition in sorted({record[0] for record in records}):
            rows = [record[1:] for record in records if record[0] == partition]
            times, keys, values, headers = zip(*rows)
            sink.async_send(
                OutgoingRecords(
                    settings.topics.readings_topic, partition, keys, values, headers, np.array(times, np.int64)
                )
            )
        sink.flush()


def abort(broker: RunningBroker, topic: str) -> None:
    """A transaction that is aborted, in every one of three partitions, and so ends the log of each."""
    producer = KafkaProducer(bootstrap_servers=broker.bootstrap_servers, transactional_id=f"{topic}-aborted")
    producer.init_transactions()
    producer.begin_transaction()
    for partition in range(3):
        producer.send(topic, b"aborted", b"k", partition=partition, timestamp_ms=START)
    producer.flush()
    producer.abort_transaction()
    producer.close()


def held(broker: RunningBroker, topic: str) -> list[tuple]:
    """(partition, timestamp_ms, key, value, headers) of what readers of committed records find."""
    return [
        (r.partition, r.timestamp, r.key, r.value, tuple(r.headers)) for r in read_all(broker, topic, "read_committed")
    ]


UNUSUAL = [
    (0, START, b"a", b"first", (("trace", b"1"), ("trace", None), ("\u00e9", b""))),
    (0, START + 9000, b"a", b"ahead", ()),
    (0, START + 1000, b"b\0", b"late \0\0", ()),
    (0, -1, b"a", b"timeless", ()),
    (1, START + 2000, None, b"no key", (("h", b"\xff\0"),)),
    (1, START + 3000, b"gone", None, ()),
    (2, START + 500, None, None, (("neither", b""),)),
    (2, START + 10_000, b"a", b"not by its key", ()),
]


def test_a_copied_topic_holds_the_same_records_in_the_same_partitions(broker, settings):
    fill(settings, UNUSUAL)
    abort(broker, settings.topics.readings_topic)
    target = make_topic(broker, f"{settings.topics.domain}.copy", 3)
    status, stdout, stderr = run(
        settings, "--from-topic", settings.topics.readings_topic, "--topic", target, "--format", "json"
    )
    assert status == 0, stderr
    [summary] = json.loads(stdout)
    assert (summary["topic"], summary["records"]) == (target, len(UNUSUAL))
    assert (summary["from"], summary["to"]) == ("2016-07-01T00:00:00Z", "2016-07-01T00:00:10Z")
    assert "each record keeps its own" in stderr
    assert held(broker, target) == held(broker, settings.topics.readings_topic) == UNUSUAL


def test_a_range_is_copied_by_key_where_the_target_has_other_partitions(broker, settings):
    fill(settings, UNUSUAL)
    target = make_topic(broker, f"{settings.topics.domain}.copy", 2)
    # [1 s ---- 10 s): what is without a timestamp comes after a record of the ninth second
    wanted = ("--from", "2016-07-01T00:00:01Z", "--to", "2016-07-01T00:00:10Z")
    status, _, stderr = run(settings, "--from-topic", settings.topics.readings_topic, "--topic", target, *wanted)
    assert status == 0, stderr
    assert "each record goes by its key" in stderr
    # By time, the late and the timeless one after the "ahead" of their partition; the one without a key was in partition 1.
    leaving = [UNUSUAL[n][1:] for n in (4, 5, 1, 2, 3)]
    rule = {key: partition_for(key, 2) for key in (b"a", b"b\0", b"gone")} | {None: 1}
    by_rule = [(partition, *record) for partition in (0, 1) for record in leaving if rule[record[1]] == partition]
    assert held(broker, target) == by_rule


def test_ctrl_c_ends_a_copy_with_130_and_says_what_was_sent(broker, settings):
    fill(settings, [(n % 3, START + n * SECOND, b"k", b"%d" % n, ()) for n in range(3000)])
    target = make_topic(broker, f"{settings.topics.domain}.copy", 3)
    arguments = ("--from-topic", settings.topics.readings_topic, "--topic", target, "--speed", "20")
    process = start(settings, *arguments, "--format", "json")
    summary = interrupted(process, broker, target)
    copied = sorted(int(record.value) for record in read_all(broker, target))
    assert 0 < summary["records"] == len(copied) < 3000
    assert copied == list(range(len(copied)))  # by time across the partitions, and none left out on the way


def test_an_empty_range_ends_well_and_says_what_the_topic_holds(broker, settings):
    fill(settings, UNUSUAL[:3])
    target = make_topic(broker, f"{settings.topics.domain}.copy", 1)
    arguments = ("--from-topic", settings.topics.readings_topic, "--topic", target, "--format", "json")
    status, stdout, stderr = run(settings, *arguments, "--from", "2017-01-01")
    assert status == 0, stderr
    assert json.loads(stdout)[0]["records"] == 0
    assert "from 2016-07-01T00:00:00Z to 2016-07-01T00:00:09Z" in stderr


def test_topics_that_are_not_there_and_a_topic_onto_itself_are_refused(broker, settings):
    topic = settings.topics.readings_topic
    status, _, stderr = run(settings, "--from-topic", f"{topic}.gone")
    assert (status, f'"{topic}.gone" does not exist' in stderr, "--from-topic" in stderr) == (1, True, True)
    if broker.bootstrap_servers.startswith("127.0.0.1:"):
        port = broker.bootstrap_servers.rpartition(":")[2]
        status, _, stderr = run(settings, "--from-topic", topic, "--from-servers", f"localhost:{port}")
        assert (status, "both source and target" in stderr) == (2, True)
