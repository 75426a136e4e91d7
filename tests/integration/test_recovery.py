"""States come back: from checkpoints, across workers, in both guarantees; and where they cannot, the worker says what to do."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kafka import KafkaAdminClient, OffsetAndMetadata, TopicPartition
from kafka.admin import ConfigResource, ConfigResourceType

from pipeline.commands.run import require_topics
from pipeline.errors import DeploymentError
from pipeline.kafka import registry
from pipeline.kafka.changelog import read_checkpoint
from pipeline.kafka.transactions import TransactionFailed
from pipeline.service import states
from pipeline.settings import Settings
from pipeline.stream.checkpoint import MANIFEST
from pipeline.stream.task import ForecastTask
from tests.helpers.broker import RunningBroker, make_topic, produce_records, read_all
from tests.helpers.settings import again
from tests.helpers.streams import HOUR, START, fleet, records
from tests.helpers.workers import running_worker
from tests.integration.test_worker import forecasts, make_settings, run_to_the_end

SENSORS, HOURS = 6, 40
STREAM = fleet(sensors=SENSORS, hours=HOURS)
CUT = len(STREAM) // 2 + 5  # in the middle of a window


@pytest.fixture
def settings(broker: RunningBroker, domain: str, tmp_path: Path) -> Settings:
    return make_settings(broker, domain, tmp_path, **{"topics.partitions": 1, "kafka.session_timeout": "6s"})


def send(broker: RunningBroker, settings: Settings, pairs: Any) -> None:
    produce_records(broker, settings.topics.readings_topic, pairs)


def expected(settings: Settings, model: Any = None) -> Any:
    """What an undisturbed task says of the whole stream."""
    from pipeline.service.assembly import task_settings

    return ForecastTask(task_settings(settings), model).run(records(STREAM)).forecasts


def work_until(settings: Settings, done: Callable[[Any], bool], model: Any = None) -> None:
    """A worker that is gone in mid-work: nothing is tidied up, no last checkpoint is written."""
    with running_worker(settings, model) as worker:
        deadline = time.monotonic() + 60
        while not done(worker):
            assert time.monotonic() < deadline
            worker.round()


def test_a_worker_that_died_reads_again_in_silence_what_came_since_its_checkpoint(
    broker: RunningBroker, settings: Settings
) -> None:
    send(broker, settings, STREAM[:CUT])
    # The first checkpoint is due at once, the next one after an hour: all that came since then is read again.
    lazy = again(settings, state__checkpoint_every_ms=3_600_000)
    work_until(lazy, lambda worker: worker.source.committed(0) == CUT)
    assert read_checkpoint(settings, 0).offset < CUT  # type: ignore[union-attr]
    send(broker, settings, STREAM[CUT:])

    report = run_to_the_end(settings)

    assert report.rebuilt > 0
    assert report.counts.records == len(STREAM) - CUT
    found = forecasts(broker, settings)
    assert sum(map(len, found.values())) == len(expected(settings)) == SENSORS * (HOURS - 1)
    for values in found.values():
        assert [value["state_steps"] for value in values] == list(range(1, HOURS))


@pytest.mark.parametrize("guarantee", ["exactly_once", "at_least_once"])
def test_both_guarantees_answer_every_window_and_keep_their_state(
    broker: RunningBroker, settings: Settings, guarantee: Any
) -> None:
    settings = again(settings, kafka__processing_guarantee=guarantee)
    send(broker, settings, STREAM[:CUT])
    run_to_the_end(settings)
    send(broker, settings, STREAM[CUT:])
    report = run_to_the_end(settings)
    assert (report.restored, report.rebuilt) == (SENSORS, 0)
    found = forecasts(broker, settings)
    assert {sensor: [v["issued_at"] for v in values] for sensor, values in found.items()} == {
        f"pump-{n}": [START + hour * HOUR for hour in range(1, HOURS)] for n in range(SENSORS)
    }


def test_a_worker_of_the_same_name_takes_over_at_once_and_ends_what_was_left_open(
    broker: RunningBroker, settings: Settings
) -> None:
    settings = again(settings, kafka__group_instance_id="pump-house", kafka__session_timeout_ms=45_000)
    send(broker, settings, STREAM[:CUT])
    with running_worker(settings) as dead:
        while not dead.source.assignment or not dead.source.positions().get(0):
            dead.round()
        transactions = dead.committer._transactions  # type: ignore[attr-defined]
        transactions._begin()
        transactions._send_offsets({0: 7}, dead.source.membership())
        started = time.monotonic()
        # It neither leaves the group nor ends its transaction: a new process under its name does both.
        report = run_to_the_end(settings)
        assert time.monotonic() - started < 30
    assert report.partitions == 1
    closed_windows = CUT // (2 * SENSORS)  # two readings an hour each
    assert {sensor: len(values) for sensor, values in forecasts(broker, settings).items()} == {
        f"pump-{n}": closed_windows for n in range(SENSORS)
    }


def test_a_worker_whose_name_another_has_taken_stops_although_nothing_comes(
    broker: RunningBroker, settings: Settings
) -> None:
    settings = again(settings, kafka__group_instance_id="pump-house")
    with running_worker(settings) as older:
        until(older, lambda: 0 in older._serving)
        with running_worker(settings) as newer:
            until(newer, lambda: 0 in newer._serving)
            with pytest.raises(DeploymentError, match=r'group_instance_id = "pump-house".*a name of its own'):
                until(older, lambda: False)
            newer.round()


def test_the_hidden_state_comes_back_with_the_sensor(broker: RunningBroker, settings: Settings, model: Any) -> None:
    send(broker, settings, STREAM[:CUT])
    with running_worker(settings, model) as worker:
        worker.run(threading.Event(), exit_at_end=True)
    send(broker, settings, STREAM[CUT:])
    with running_worker(settings, model) as worker:
        report = worker.run(threading.Event(), exit_at_end=True)

    assert report.restored == SENSORS
    undisturbed = expected(settings, model)
    found = {(v["sensor"], v["issued_at"]): v for values in forecasts(broker, settings).values() for v in values}
    assert len(found) == len(undisturbed)
    for row, sensor in enumerate(undisturbed.sensors):
        value = found[sensor, int(undisturbed.issued_at_ms[row])]
        np.testing.assert_allclose(value["targets"]["value"]["mean"], undisturbed.mean[row, :, 0], rtol=1e-5, atol=1e-5)
    checkpoint = read_checkpoint(settings, 0)
    assert checkpoint is not None
    assert (checkpoint.offset, checkpoint.model) == (len(STREAM), model.version)
    assert np.abs(checkpoint.snapshot.rows["rnn.hidden"]).max() > 0


@pytest.mark.parametrize("happened", [True, False], ids=["committed after all", "not committed"])
@pytest.mark.parametrize("guarantee", ["exactly_once", "at_least_once"])
def test_a_commit_that_failed_is_looked_up_and_then_done_once(
    broker: RunningBroker, settings: Settings, happened: bool, guarantee: Any
) -> None:
    settings = again(settings, kafka__processing_guarantee=guarantee)
    send(broker, settings, STREAM)
    with running_worker(settings) as worker:
        commit, failures = worker.committer.commit, []

        def fail_every_other_time(work: Any, membership: Any) -> None:
            failing = len(failures) % 2 == 0
            if happened or not failing:
                commit(work, membership)
            failures.append(failing)
            if failing:
                raise TransactionFailed("planted")

        worker.committer.commit = fail_every_other_time  # type: ignore[method-assign]
        worker.run(threading.Event(), exit_at_end=True)
    assert any(failures)
    found = forecasts(broker, settings)
    assert {sensor: [v["state_steps"] for v in values] for sensor, values in found.items()} == {
        f"pump-{n}": list(range(1, HOURS)) for n in range(SENSORS)
    }


@pytest.mark.parametrize("moved_to", [0, 17], ids=["back", "forward"])
def test_a_worker_whose_group_stands_elsewhere_than_it_left_it_starts_the_partition_again(
    broker: RunningBroker, settings: Settings, moved_to: int
) -> None:
    """As after another worker answered in its place, unnoticed: what it holds is thrown away, not sent."""
    send(broker, settings, STREAM[:CUT])
    with running_worker(settings) as worker:
        until(worker, lambda: 0 in worker._serving and worker._serving[0].committed == CUT)
        worker._serving[0].committed = moved_to
        send(broker, settings, STREAM[CUT:])

        def fail(work: Any, membership: Any) -> None:
            del worker.committer.commit  # type: ignore[attr-defined]
            raise TransactionFailed("planted")

        worker.committer.commit = fail  # type: ignore[method-assign]
        worker.run(threading.Event(), exit_at_end=True)
    for values in forecasts(broker, settings).values():
        assert [value["state_steps"] for value in values] == list(range(1, HOURS))


@pytest.fixture(scope="module")
def model() -> Any:
    """A small GRU for the stream's series, as it was drawn: what it carries from step to step is what matters here."""
    from models.rnn import RecurrentNet, RNNForecaster
    from pipeline.service.assembly import task_settings
    from pipeline.settings import load

    shape = load(None, {}, {"forecast.horizon": 3, "forecast.season": ["4h"], "windows.max_gap": 3})
    net = RecurrentNet(task_settings(shape).spec, "gru", 8)
    return RNNForecaster(net, version="gru8-test", warmup_steps=2)


# -- loud ends


def stopped(settings: Settings, model: Any = None) -> str:
    with pytest.raises(DeploymentError) as raised, running_worker(settings, model) as worker:
        worker.run(threading.Event(), exit_at_end=True)
    return str(raised.value)


def delete_records(broker: RunningBroker, settings: Settings, before: int) -> None:
    with KafkaAdminClient(bootstrap_servers=broker.bootstrap_servers) as admin:
        admin.delete_records({TopicPartition(settings.topics.readings_topic, 0): before})


def test_a_checkpoint_of_another_layout_stops_the_worker_and_reset_lets_it_go_on(
    broker: RunningBroker, settings: Settings
) -> None:
    send(broker, settings, STREAM[:CUT])
    run_to_the_end(settings)
    (manifest,) = [r.value for r in read_all(broker, settings.topics.state_topic) if r.key == MANIFEST][-1:]
    newer = manifest.replace(b'"layout":1', b'"layout":9')
    produce_records(broker, settings.topics.state_topic, [(MANIFEST, newer)])

    said = stopped(settings)
    assert "layout is version 9, this Millrace reads and writes version 1" in said
    assert "millrace state reset" in said
    assert [row.finding for row in states.check(settings)] == [said]

    states.reset(settings, "committed")
    send(broker, settings, STREAM[CUT:])
    report = run_to_the_end(settings)
    assert (report.rebuilt, report.counts.records) == (CUT, len(STREAM) - CUT)
    assert [v["state_steps"] for v in forecasts(broker, settings)["pump-1"]] == list(range(1, HOURS))


def test_settings_that_give_a_row_another_shape_stop_the_worker(broker: RunningBroker, settings: Settings) -> None:
    send(broker, settings, STREAM[:CUT])
    run_to_the_end(settings)
    said = stopped(again(settings, forecast__season_ms=(8 * HOUR,)))
    assert "column memory.ring is <f4[68, 1], these settings give <f4[72, 1]" in said
    assert "set the settings back" in said


def test_states_whose_model_is_gone_stop_the_worker(broker: RunningBroker, settings: Settings, model: Any) -> None:
    send(broker, settings, STREAM[:CUT])
    with running_worker(settings, model) as worker:
        worker.run(threading.Event(), exit_at_end=True)
    said = stopped(settings)
    assert f'states are those of model gru8-test, and topic "{settings.topics.models_topic}" names no champion' in said
    states.reset(settings, "committed")
    assert run_to_the_end(settings).rebuilt == CUT


def test_a_first_model_takes_over_where_answers_begin_with_what_is_remembered_of_each_sensor(
    broker: RunningBroker, settings: Settings, model: Any
) -> None:
    lazy = again(settings, state__checkpoint_every_ms=3_600_000)
    send(broker, settings, STREAM[:CUT])
    work_until(lazy, lambda worker: worker.source.committed(0) == CUT)  # gone: its only checkpoint is its first
    send(broker, settings, STREAM[CUT:])
    with running_worker(settings, model) as worker:
        report = worker.run(threading.Event(), exit_at_end=True)
    assert report.rebuilt > 0
    assert report.counts.records == len(STREAM) - CUT
    statuses = [value["status"] for value in forecasts(broker, settings)["pump-2"]]
    closed_before = statuses.count("baseline")
    assert statuses == ["baseline"] * closed_before + ["ok"] * (HOURS - 1 - closed_before)
    assert 0 < closed_before < HOURS - 1
    assert [(swap.offset, swap.version, swap.state) for swap in registry.read(settings).swaps[0]] == [
        (CUT, "gru8-test", "ring")
    ]
    assert hidden_of(settings) == pytest.approx(hidden_after_a_swap(settings, model, CUT), abs=1e-5)


def hidden_of(settings: Settings) -> Any:
    return read_checkpoint(settings, 0).snapshot.rows["rnn.hidden"]  # type: ignore[union-attr]


def hidden_after_a_swap(settings: Settings, model: Any, offset: int) -> Any:
    from pipeline.service.assembly import task_settings

    task = ForecastTask(task_settings(settings))
    task.run(records(STREAM[:offset]))
    task.swap(model)
    task.run(records(STREAM[offset:], offset))
    return task.table["rnn.hidden"]


def test_another_horizon_costs_the_scores_and_nothing_else(broker: RunningBroker, settings: Settings) -> None:
    send(broker, settings, STREAM[:CUT])
    run_to_the_end(settings)
    send(broker, settings, STREAM[CUT:])
    report = run_to_the_end(again(settings, forecast__horizon=7))
    assert (report.restored, report.rebuilt) == (SENSORS, 0)
    last = forecasts(broker, settings)["pump-1"][-1]
    assert (last["horizon"], last["state_steps"]) == (7, HOURS - 1)


def test_readings_deleted_before_they_were_read_stop_the_worker_and_reset_offers_both_ways_on(
    broker: RunningBroker, settings: Settings
) -> None:
    send(broker, settings, STREAM[:CUT])
    run_to_the_end(settings)
    send(broker, settings, STREAM[CUT:])
    delete_records(broker, settings, CUT + 10)
    said = stopped(settings)
    assert f"committed offset {CUT}, the log holds [{CUT + 10}, {len(STREAM)})" in said
    with pytest.raises(DeploymentError, match=f"committed offset {CUT} is outside the log"):
        states.reset(settings, "committed")
    (row,) = states.reset(settings, "beginning")
    assert row["now committed"] == CUT + 10
    assert run_to_the_end(settings).counts.records == len(STREAM) - CUT - 10


def test_checkpoints_let_the_log_be_cut_behind_them(broker: RunningBroker, settings: Settings) -> None:
    send(broker, settings, STREAM[:CUT])
    run_to_the_end(settings)
    delete_records(broker, settings, CUT)
    send(broker, settings, STREAM[CUT:])
    assert run_to_the_end(settings).restored == SENSORS
    assert [v["state_steps"] for v in forecasts(broker, settings)["pump-1"]] == list(range(1, HOURS))


def test_an_empty_changelog_behind_a_log_that_was_cut_is_no_reason_to_start_from_nothing(
    broker: RunningBroker, settings: Settings
) -> None:
    send(broker, settings, STREAM[:CUT])
    run_to_the_end(settings)
    with KafkaAdminClient(bootstrap_servers=broker.bootstrap_servers) as admin:
        # Only a topic that is not compacted can lose records like that.
        resource = ConfigResource(ConfigResourceType.TOPIC, settings.topics.state_topic, {"cleanup.policy": "delete"})
        admin.alter_configs([resource])
        admin.delete_records({TopicPartition(settings.topics.state_topic, 0): -1})
    delete_records(broker, settings, 50)
    assert "the changelog holds no checkpoint, and readings before 50 are gone" in stopped(settings)
    states.reset(settings, "committed")
    assert run_to_the_end(settings).rebuilt == CUT - 50


def test_a_group_whose_offsets_are_forgotten_goes_on_from_its_checkpoint_when_told_to(
    broker: RunningBroker, settings: Settings
) -> None:
    send(broker, settings, STREAM[:CUT])
    run_to_the_end(settings)
    with KafkaAdminClient(bootstrap_servers=broker.bootstrap_servers) as admin:
        admin.delete_groups([settings.kafka.group_id])
    assert f"no committed offset, but a checkpoint at {CUT}" in stopped(settings)
    (row,) = states.reset(settings, "checkpoint")
    assert (row["now committed"], row["states"]) == (CUT, "kept")
    send(broker, settings, STREAM[CUT:])
    assert run_to_the_end(settings).restored == SENSORS


def test_a_checkpoint_ahead_of_the_committed_offset_is_asked_about_again_before_anybody_is_blamed(
    broker: RunningBroker, settings: Settings
) -> None:
    """The partition's real owner commits between our two questions: we were thrown out of the group and have not heard of it."""
    send(broker, settings, STREAM[:CUT])
    run_to_the_end(settings)
    with running_worker(settings) as worker:
        ask, stale = worker.source.committed, [CUT - 10]

        def committed(partition: int, wait_ms: int = 1_000) -> int | None:
            return stale.pop() if stale else ask(partition, wait_ms)

        worker.source.committed = committed  # type: ignore[method-assign]
        report = worker.run(threading.Event(), exit_at_end=True)
    assert (report.restored, report.rebuilt, report.counts.records) == (SENSORS, 0, 0)


def test_a_group_that_somebody_set_back_stops_the_worker(broker: RunningBroker, settings: Settings) -> None:
    send(broker, settings, STREAM[:CUT])
    run_to_the_end(settings)
    with KafkaAdminClient(bootstrap_servers=broker.bootstrap_servers) as admin:
        readings = TopicPartition(settings.topics.readings_topic, 0)
        admin.alter_group_offsets(settings.kafka.group_id, {readings: OffsetAndMetadata(5, "", -1)})
    assert f"checkpoint stands at offset {CUT}, but the group's committed offset is 5" in stopped(settings)
    states.reset(settings, "committed")
    report = run_to_the_end(settings)
    assert (report.rebuilt, report.counts.records) == (5, CUT - 5)


def test_another_group_does_not_take_over_a_changelog(broker: RunningBroker, settings: Settings) -> None:
    send(broker, settings, STREAM[:CUT])
    run_to_the_end(settings)
    said = stopped(again(settings, kafka__group_id="second"))
    assert f'holds states of group "{settings.kafka.group_id}", this worker is of group "second"' in said


@pytest.mark.parametrize(
    ("configs", "partitions", "says"),
    [
        ({}, 2, "partitions, as the readings: expected 1, found 2"),
        (
            {"cleanup.policy": "delete"},
            1,
            "cleanup.policy: expected compact, found delete; millrace topics create --alter",
        ),
    ],
    ids=["partitions", "not compacted"],
)
def test_a_changelog_that_cannot_serve_stops_the_worker_before_it_starts(
    broker: RunningBroker, settings: Settings, configs: dict[str, str], partitions: int, says: str
) -> None:
    name = make_topic(broker, f"{settings.topics.domain}.other-state.v1", partitions, configs)
    with pytest.raises(DeploymentError, match=f'topic "{name}": {says}'):
        require_topics(again(settings, topics__state=name))


# -- the commands


def test_check_finds_nothing_wrong_with_what_a_worker_wrote(
    broker: RunningBroker, settings: Settings, model: Any
) -> None:
    send(broker, settings, STREAM)
    with running_worker(settings, model) as worker:
        worker.run(threading.Event(), exit_at_end=True)
    (row,) = states.check(settings)
    assert (row.sensors, row.checkpoint, row.committed, row.finding) == (SENSORS, len(STREAM), len(STREAM), "")
    assert row.model == "gru8-test"


def test_check_names_a_block_that_is_missing(broker: RunningBroker, settings: Settings) -> None:
    send(broker, settings, STREAM)
    run_to_the_end(settings)
    produce_records(broker, settings.topics.state_topic, [(b"steps/00000000", None)])
    (row,) = states.check(settings)
    assert "block steps/00000000 is missing" in row.finding


def test_show_prints_what_the_checkpoint_knows_of_a_sensor(broker: RunningBroker, settings: Settings) -> None:
    send(broker, settings, STREAM)
    run_to_the_end(settings)
    shown = {row["column"]: row["value"] for row in states.show(settings, "pump-3")}
    assert shown["(checkpoint at offset)"] == len(STREAM)
    assert shown["memory.steps"] == HOURS - 1
    with pytest.raises(DeploymentError, match='knows sensor "nobody"'):
        states.show(settings, "nobody")


def test_nothing_is_reset_under_the_feet_of_a_worker(broker: RunningBroker, settings: Settings) -> None:
    with running_worker(settings) as worker:
        while not worker.source.assignment:
            worker.round()
        with pytest.raises(DeploymentError, match="has 1 members: stop its workers first"):
            states.reset(settings, "committed")


# -- a silent partition


def test_a_partition_that_falls_silent_forecasts_provisionally_once_and_its_state_knows_nothing_of_it(
    broker: RunningBroker, settings: Settings
) -> None:
    settings = again(settings, forecast__provisional_after_ms=300)
    stream = fleet(sensors=3, hours=5)
    send(broker, settings, stream)
    with running_worker(settings) as worker:
        until(worker, lambda: 0 in worker._serving and worker._serving[0].next_offset == len(stream))
        worker._serving[0].heard_ms -= HOUR  # an hour goes by
        until(worker, lambda: len(read_all(broker, settings.topics.forecasts_topic, "read_committed")) == 3 * 5)
        for _ in range(5):
            worker.round()
    found = forecasts(broker, settings)
    for values in found.values():
        assert [value["status"] for value in values] == ["baseline"] * 4 + ["provisional"]
        assert values[-1]["issued_at"] == START + 5 * HOUR
        assert values[-1]["model"] == "SeasonalNaive"
    send(broker, settings, fleet(sensors=3, hours=7)[len(stream) :])
    run_to_the_end(settings)
    for values in forecasts(broker, settings).values():
        lasting = [value for value in values if value["status"] != "provisional"]
        assert [value["state_steps"] for value in lasting] == [1, 2, 3, 4, 5, 6]


def until(worker: Any, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        worker.round()


def test_what_a_cascade_has_learned_comes_back_with_its_partition(broker: RunningBroker, settings: Settings) -> None:
    lean = again(settings, forecast__profile="lean", state__checkpoint_every_ms=3_600_000)
    send(broker, lean, STREAM[:CUT])
    work_until(lean, lambda worker: worker.source.committed(0) == CUT)
    assert read_checkpoint(lean, 0).offset < CUT  # type: ignore[union-attr]
    send(broker, lean, STREAM[CUT:])
    assert run_to_the_end(lean).rebuilt > 0

    from pipeline.service.assembly import task_settings

    task = ForecastTask(task_settings(lean))
    undisturbed = task.run(records(STREAM)).forecasts
    found = forecasts(broker, lean)
    assert sum(map(len, found.values())) == len(undisturbed)
    for row, sensor in enumerate(undisturbed.sensors):
        said = next(v for v in found[sensor] if v["issued_at"] == undisturbed.issued_at_ms[row])
        assert said["targets"]["value"]["mean"] == pytest.approx(undisturbed.mean[row, :, 0].tolist(), rel=1e-4)
    assert {said["model"] for values in found.values() for said in values[-5:]} == {"online"}
    learned = read_checkpoint(lean, 0).snapshot.partition  # type: ignore[union-attr]
    assert learned["pooled.labels"] > 0
    for name, value in task.table.partition.items():
        assert learned[name] == pytest.approx(value, rel=1e-6), name
