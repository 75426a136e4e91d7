"""The whole stream on a real broker: readings in through one client, forecasts and dead letters out through another."""

from __future__ import annotations

import json
import threading
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kafka import KafkaAdminClient, TopicPartition

from pipeline.errors import DeploymentError
from pipeline.kafka import topics
from pipeline.kafka.membership import Membership
from pipeline.kafka.sink import partition_for
from pipeline.kafka.source import RecordSource
from pipeline.service.worker import WorkerReport
from pipeline.settings import Settings, load
from tests.helpers.broker import RunningBroker, produce_records, read_all
from tests.helpers.streams import HOUR, START, fleet, reading
from tests.helpers.workers import running_worker

PARTITIONS = 3


def make_settings(broker: RunningBroker, domain: str, tmp_path: Path, **overrides: Any) -> Settings:
    wanted = {
        "kafka.bootstrap_servers": broker.bootstrap_servers,
        "topics.domain": domain,
        "topics.partitions": PARTITIONS,
        "forecast.horizon": 3,
        "forecast.season": ["4h"],
        "windows.max_gap": 3,
        "model.path": str(tmp_path / "model"),
    }
    settings = load(None, {}, wanted | overrides)
    topics.create(settings)
    return settings


def run_to_the_end(settings: Settings) -> WorkerReport:
    with running_worker(settings) as worker:
        return worker.run(threading.Event(), exit_at_end=True)


def forecasts(broker: RunningBroker, settings: Settings) -> dict[str, list[dict[str, Any]]]:
    """By sensor, in the order of the topic."""
    found = defaultdict(list)
    for record in read_all(broker, settings.topics.forecasts_topic, "read_committed"):
        value = json.loads(record.value)
        assert record.key.decode() == value["sensor"]
        found[value["sensor"]].append(value)
    return found


BAD = {
    "null-value": ("pump-1", None),
    "over-long": ("pump-1", b'{"ts": 1, "x": "' + b"a" * 70_000 + b'"}'),
    "too-deep": ("pump-1", b'{"ts": 1, "x": ' + b"[" * 100 + b"]" * 100 + b"}"),
    "not-json": ("pump-1", b'{"ts": 17'),
    "not-an-object": ("pump-1", b"[1, 2]"),
    "bad-field": ("pump-1", b'{"ts": 1769700000, "value": 1e999}'),
    "no-sensor": (None, b'{"ts": 1769700000, "value": 1}'),
    "bad-sensor": (b"\xff\xfe", b'{"ts": 1769700000, "value": 1}'),
    "no-event-time": ("pump-1", b'{"value": 1}'),
    "bad-event-time": ("pump-1", b'{"ts": "yesterday", "value": 1}'),
    "event-time-out-of-bounds": ("pump-1", b'{"ts": 1769700000000000, "value": 1}'),
}


def test_ten_thousand_good_readings_and_one_bad_of_each_kind(
    broker: RunningBroker, domain: str, tmp_path: Path
) -> None:
    settings = make_settings(broker, domain, tmp_path)
    sensors, hours = 25, 200
    good = fleet(sensors=sensors, hours=hours, per_hour=2)
    assert len(good) == 10_000
    late = [("late", reading("pump-1", START, value=1e6))]
    stream: list[tuple[bytes | None, bytes | None]] = list(good)
    bad = [(reason, (key.encode() if isinstance(key, str) else key, value)) for reason, (key, value) in BAD.items()]
    for place, (_, pair) in enumerate(late + bad):
        stream.insert(700 * (place + 1), pair)
    produce_records(broker, settings.topics.readings_topic, stream)

    report = run_to_the_end(settings)

    assert report.counts.readings == 10_001
    assert report.counts.late == 1
    assert report.counts.rejected == dict.fromkeys(BAD, 1)
    found = forecasts(broker, settings)
    assert len(found) == sensors
    for sensor, values in found.items():
        # stream time is the partition's: all its sensors report hourly, so each window but the newest has closed
        assert [value["issued_at"] for value in values] == [START + hour * HOUR for hour in range(1, hours)], sensor
        assert [value["state_steps"] for value in values] == list(range(1, hours))
        assert {value["status"] for value in values} == {"baseline"}
    assert np.isclose(found["pump-1"][-1]["targets"]["value"]["mean"][0], _season_ago(good, "pump-1", hours), rtol=1e-6)
    _check_dead_letters(broker, settings, dict(bad) | dict(late))


def _season_ago(pairs: list[tuple[bytes, bytes]], sensor: str, hours: int) -> float:
    """Seasonal naive for lead 1 after the newest closed window: the mean of the window four hours before its target."""
    values = [json.loads(value)["value"] for key, value in pairs if key == sensor.encode()]
    hour = hours - 1 - 4
    return float(np.mean(values[2 * hour : 2 * hour + 2]))


def _check_dead_letters(broker: RunningBroker, settings: Settings, sent: dict[str, tuple[Any, Any]]) -> None:
    letters = read_all(broker, settings.topics.dead_letters_topic)
    by_reason = {dict(letter.headers)["millrace.reason"].decode(): letter for letter in letters}
    assert len(letters) == len(by_reason) == len(sent)
    for reason, (key, value) in sent.items():
        letter = by_reason[reason]
        assert (letter.key, letter.value) == (key, value)
        headers = {name: content.decode() for name, content in letter.headers}
        assert headers["__connect.errors.topic"] == settings.topics.readings_topic
        assert int(headers["__connect.errors.partition"]) == letter.partition
        assert int(headers["__connect.errors.offset"]) >= 0
        assert headers["__connect.errors.exception.message"]


def test_a_restarted_worker_has_its_state_back_and_repeats_nothing(
    broker: RunningBroker, domain: str, tmp_path: Path
) -> None:
    settings = make_settings(broker, domain, tmp_path)
    stream = fleet(sensors=6, hours=30)
    cut = len(stream) // 2 + 5  # in the middle of a window
    produce_records(broker, settings.topics.readings_topic, stream[:cut])
    first = run_to_the_end(settings)
    produce_records(broker, settings.topics.readings_topic, stream[cut:])

    second = run_to_the_end(settings)

    assert (first.restored, second.restored) == (0, 6)
    assert (first.rebuilt, second.rebuilt) == (0, 0)  # its last checkpoint stood where it stopped
    assert second.counts.records == len(stream) - cut
    undisturbed = make_settings(broker, domain + "b", tmp_path)
    produce_records(broker, undisturbed.topics.readings_topic, stream)
    run_to_the_end(undisturbed)
    assert forecasts(broker, settings) == forecasts(broker, undisturbed)


def test_the_end_is_reached_only_when_it_is_committed(broker: RunningBroker, domain: str, tmp_path: Path) -> None:
    settings = make_settings(broker, domain, tmp_path)
    stream = fleet(sensors=6, hours=10)
    produce_records(broker, settings.topics.readings_topic, stream)
    with running_worker(settings) as worker:
        source, membership, unsure = worker.source, worker.source.membership, [None] * 3

        def sure_at_last() -> Membership | None:
            # As the source does while the group rearranges itself.
            return unsure.pop() if unsure else membership()

        source.membership = sure_at_last  # type: ignore[method-assign]
        worker.run(threading.Event(), exit_at_end=True)
        assert unsure == []
        assert sum(source.committed(partition) or 0 for partition in source.partitions) == len(stream)


@pytest.mark.parametrize("committed", [5, 41], ids=["deleted by retention", "beyond the end"])
def test_a_committed_offset_outside_the_log_stops_the_worker_instead_of_losing_forecasts(
    broker: RunningBroker, domain: str, tmp_path: Path, committed: int
) -> None:
    settings = make_settings(broker, domain, tmp_path, **{"topics.partitions": 1})
    topic = settings.topics.readings_topic
    produce_records(broker, topic, fleet(sensors=2, hours=10))
    with RecordSource(settings, topic) as source:
        source.on_assigned = lambda partitions: [source.seek(partition, 0) for partition in partitions]
        while not source.assignment or not source.commit({0: committed}):
            source.poll(100)
    with KafkaAdminClient(bootstrap_servers=broker.bootstrap_servers) as admin:
        admin.delete_records({TopicPartition(topic, 0): 10})

    with pytest.raises(
        DeploymentError, match=rf"committed offset {committed}, the log holds \[10, 40\).*millrace state reset --to"
    ):
        run_to_the_end(settings)


def test_forecasts_stand_in_the_partition_their_readings_came_from(
    broker: RunningBroker, domain: str, tmp_path: Path
) -> None:
    settings = make_settings(broker, domain, tmp_path)
    produce_records(broker, settings.topics.readings_topic, fleet(sensors=6, hours=3))
    run_to_the_end(settings)
    for record in read_all(broker, settings.topics.forecasts_topic):
        assert record.partition == partition_for(record.key, PARTITIONS)
        assert json.loads(record.value)["source"]["partition"] == record.partition
