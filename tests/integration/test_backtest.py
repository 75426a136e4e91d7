"""Backtests from a real topic: which records they read, and what they make of several partitions."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from kafka import KafkaProducer

from pipeline.errors import DeploymentError, SettingsError
from pipeline.kafka.source import RecordSource
from pipeline.service import passage
from pipeline.service.assembly import task_settings
from pipeline.service.backtest import Answer, Watcher, of_file, of_topic
from pipeline.service.feed import ModelFeed
from pipeline.service.files import FileLayout
from pipeline.service.history import from_topic
from pipeline.service.question import Question
from pipeline.service.versions import import_folder
from pipeline.settings import Settings, changed
from tests.helpers.broker import RunningBroker, produce_records
from tests.helpers.streams import HOUR, START, fleet
from tests.helpers.workers import running_worker
from tests.integration.test_worker import forecasts, make_settings

NEVER = "9000d"
"""Retraining so seldom: the baseline answers."""


@pytest.fixture
def settings(broker: RunningBroker, domain: str, tmp_path: Path) -> Settings:
    return make_settings(
        broker,
        domain,
        tmp_path,
        **{
            "topics.partitions": 2,
            "model.units": 8,
            "training.epochs": 2,
            "training.lanes": 8,
            "training.chunk": 24,
        },
    )


def by_row(answer: Answer) -> pd.DataFrame:
    return answer.frame().sort_values(["unique_id", "cutoff", "lead"], ignore_index=True)


def send(broker: RunningBroker, settings: Settings, pairs: Iterable[tuple[bytes, bytes]], partition: int) -> None:
    records = [{"key": key, "value": value, "partition": partition} for key, value in pairs]
    produce_records(broker, settings.topics.readings_topic, records)


def test_a_topic_and_a_file_with_the_same_readings_say_the_same(broker: RunningBroker, settings: Settings) -> None:
    pairs = fleet(4, 30, per_hour=1)
    send(broker, settings, pairs, 1)
    from_topic = of_topic(settings, Question(retrain_every=NEVER))
    decoded = [(key.decode(), json.loads(value)) for key, value in pairs]
    rows = [{"unique_id": name, "ds": value["ts"], "value": value["value"]} for name, value in decoded]
    layout = FileLayout("ds", ("value",), "unique_id")
    from_file = of_file(settings, [pd.DataFrame(rows)], layout, Question(retrain_every=NEVER))
    one, other = by_row(from_topic), by_row(from_file)
    # A file's end closes its last window, a topic's does not: more readings may come.
    last = other["cutoff"].max()
    assert one["cutoff"].max() == last - pd.Timedelta("1h")
    same = other[other["cutoff"] < last].reset_index(drop=True)
    known = one["y"].notna()
    pd.testing.assert_frame_equal(one[known], same[known])


def test_offsets_name_what_is_read_of_each_partition(broker: RunningBroker, settings: Settings) -> None:
    pairs = fleet(2, 30, per_hour=1)
    for partition in (0, 1):
        send(broker, settings, [(b"p%d-" % partition + key, value) for key, value in pairs], partition)
    asked = Question(retrain_every=NEVER, start={0: 20, 1: 40}, end={0: 50, 1: 60})
    answer = of_topic(settings, asked)
    assert answer.outcome.counts.readings == 30 + 20
    frame = answer.frame()
    first = {name: frame[frame["unique_id"] == name]["cutoff"].min() for name in frame["unique_id"].unique()}
    assert first["p0-pump-0"] == pd.Timestamp(START + 10 * HOUR, unit="ms")
    assert first["p1-pump-1"] == pd.Timestamp(START + 20 * HOUR, unit="ms")


def test_offsets_that_are_not_there_are_refused(broker: RunningBroker, settings: Settings) -> None:
    send(broker, settings, fleet(1, 5, per_hour=1), 0)
    with pytest.raises(SettingsError, match=r"--from 0:9: the log of partition 0 holds offsets 0 to 5"):
        of_topic(settings, Question(retrain_every=NEVER, start={0: 9}))
    with pytest.raises(SettingsError, match=r"--to names partition 7: topic .* has \[0, 1\]"):
        of_topic(settings, Question(retrain_every=NEVER, end={7: 1}))


def test_what_was_aborted_was_never_said_and_what_is_broken_is_counted_once(
    broker: RunningBroker, settings: Settings
) -> None:
    topic, pairs = settings.topics.readings_topic, fleet(1, 12, per_hour=1)
    send(broker, settings, pairs[:6], 0)
    producer = KafkaProducer(bootstrap_servers=broker.bootstrap_servers, transactional_id=f"{topic}-aborted")
    producer.init_transactions()
    producer.begin_transaction()
    producer.send(topic, pairs[0][1], pairs[0][0], partition=0)
    producer.flush()
    producer.abort_transaction()
    producer.close()
    send(broker, settings, [(b"pump-0", b"no json"), *pairs[6:], (b"pump-0", b"{}")], 0)
    answer = of_topic(settings, Question(retrain_every=NEVER))
    assert answer.outcome.counts.readings == 12
    assert dict(answer.outcome.rejected) == {"not-json": 1, "no-event-time": 1}


def test_a_topic_without_a_record_of_its_models_says_what_else_can_answer(
    broker: RunningBroker, settings: Settings
) -> None:
    send(broker, settings, fleet(1, 5, per_hour=1), 0)
    with pytest.raises(DeploymentError, match=r"no record of a model that answered.*--train-until T"):
        of_topic(settings, Question())


@pytest.mark.keras
def test_partitions_that_are_apart_in_the_log_come_together_where_a_model_is_trained(
    broker: RunningBroker, settings: Settings
) -> None:
    hours = 120
    for partition in (0, 1):  # one whole partition before the other
        pairs = [(b"p%d-" % partition + key, value) for key, value in fleet(4, hours, per_hour=1, seed=partition)]
        send(broker, settings, pairs, partition)
    until_ms = START + 90 * HOUR
    answer = of_topic(settings, Question(train_until_ms=until_ms))
    (change,) = answer.outcome.changes
    assert change.time_ms == until_ms
    assert (
        change.reason == f"trained on {8 * 89:,} steps of 8 sensors"
    )  # the window up to 90:00 closes with the reading of 90:00
    frame = answer.frame()
    assert set(frame["model_version"]) == {change.version}
    assert frame.groupby("unique_id")["ds"].min().eq(pd.Timestamp(until_ms, unit="ms")).all()
    assert frame["unique_id"].nunique() == 8


@pytest.mark.keras
@pytest.mark.parametrize("profile", ["base", "lean"])
def test_a_month_of_a_live_run_is_repeated_by_default(
    broker: RunningBroker, settings: Settings, tmp_path: Path, profile: str
) -> None:
    settings = changed(settings, {"forecast.profile": profile}, "the test")
    hours, since = 90, START + 60 * HOUR
    past = fleet(8, 80, per_hour=1, seed=1)
    frame = pd.DataFrame([{"unique_id": key.decode(), **json.loads(value)} for key, value in past])
    fit_on = FileLayout("ts", ("value",), "unique_id")
    asked = Question(train_until_ms=START + 70 * HOUR, out=tmp_path / "fit")
    (trained,) = of_file(settings, [frame], fit_on, asked).outcome.changes
    stamped = [
        {"key": key, "value": value, "timestamp_ms": json.loads(value)["ts"]} for key, value in fleet(8, hours, 1)
    ]
    produce_records(broker, settings.topics.readings_topic, stamped)
    import_folder(settings, tmp_path / "fit" / "models" / trained.version, promote=True)
    feed = ModelFeed(settings, task_settings(settings).spec)
    try:
        with running_worker(settings, feed.first(), feed=feed) as worker:
            worker.run(threading.Event(), exit_at_end=True)
    finally:
        feed.close()
    live = {
        (sensor, said["issued_at"]): said
        for sensor, of_sensor in forecasts(broker, settings).items()
        for said in of_sensor
        if said["issued_at"] >= since
    }
    frame = of_topic(settings, Question(start=since, lead_in_ms=2**60)).frame()
    assert {said["model"] for said in live.values()} == {trained.version} == set(frame["model_version"])
    assert len(frame) == 3 * len(live) > 3 * 8 * 25
    for (sensor, cutoff), rows in frame.groupby(["unique_id", "cutoff"]):
        said = live[sensor, int(cutoff.timestamp() * 1000) + HOUR]
        for name, column in (("mean", "Millrace"), ("q0.1", "Millrace-q0.1"), ("q0.9", "Millrace-q0.9")):
            np.testing.assert_allclose(rows[column], said["targets"]["value"][name], rtol=1e-5, atol=1e-5)


def test_a_topic_without_a_reading_has_no_history(broker: RunningBroker, settings: Settings) -> None:
    with RecordSource(settings, settings.topics.readings_topic, group=False) as source:
        history = from_topic(task_settings(settings), source, None, None)
    with pytest.raises(DeploymentError, match="no closed window in the history: 0 readings were read"):
        history.sequences()


class Stopped(Exception):
    """Somebody pulled the plug."""


def test_one_that_was_stopped_ends_where_the_topic_ended_when_it_began(
    broker: RunningBroker, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passage, "CHECKPOINT_SECONDS", -1.0)
    monkeypatch.setattr(passage, "READINGS_AT_ONCE", 25)
    pairs = fleet(3, 40, per_hour=1)
    send(broker, settings, pairs[:60], 0)
    send(broker, settings, [(b"other-" + key, value) for key, value in pairs[:60]], 1)
    asked = Question(retrain_every="4h", out=tmp_path / "out")
    looks = iter(range(100))

    def pull(at: Any) -> None:
        if next(looks) == 6:
            raise Stopped

    whole = of_topic(settings, Question(retrain_every="4h", out=tmp_path / "whole"))
    with pytest.raises(Stopped):
        of_topic(settings, asked, Watcher(progress=pull))
    send(broker, settings, pairs[60:], 0)
    told: list[str] = []
    pieces = of_topic(settings, asked, Watcher(note=told.append))
    assert "going on with what is in" in told[0]
    pd.testing.assert_frame_equal(by_row(whole), by_row(pieces))
    assert whole.outcome.counts == pieces.outcome.counts
    assert pieces.outcome.counts.readings == 120


def test_a_start_in_time_is_found_by_the_records_timestamps(broker: RunningBroker, settings: Settings) -> None:
    stamped = [
        {"key": key, "value": value, "partition": 0, "timestamp_ms": START + hour * HOUR}
        for hour, (key, value) in enumerate(fleet(1, 30, per_hour=1))
    ]
    produce_records(broker, settings.topics.readings_topic, stamped)
    asked = Question(retrain_every=NEVER, start=START + 20 * HOUR, end=START + 28 * HOUR)
    answer = of_topic(settings, asked)
    assert answer.outcome.counts.readings == 8
    assert answer.frame()["cutoff"].min() == pd.Timestamp(START + 20 * HOUR, unit="ms")
