"""The harness itself, and a short run of it: kills inside and outside of transactions, rebalances, one planted fault.

`python -m tests.chaos` is the long one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.stream.columns import OutgoingRecords
from pipeline.stream.state import SensorTable
from tests.chaos import harness
from tests.chaos.load import BAD, GRACE_TICKS, PER_WINDOW, Fleet
from tests.chaos.oracle import (
    TOLERANCE,
    Findings,
    Forecast,
    Letter,
    StateFindings,
    Verdict,
    compare_forecasts,
    compare_letters,
    compare_state,
)
from tests.chaos.plan import ChaosPlan, ChaosReport
from tests.chaos.worker import FAULTS, POINTS, die_at, first_half, intervene, up_to_half_a_checkpoint

MINUTE = 60_000


def forecast(sensor: str = "pump-1", minute: int = 1, value: float = 20.0, **changed: object) -> Forecast:
    numbers = np.full((1, 4, 3), value)
    made = Forecast(0, sensor, minute * MINUTE, numbers, "ok", minute, 10 * minute, "gru16-0")
    return replace(made, **changed)  # type: ignore[arg-type]


STREAM = [forecast(sensor, minute) for minute in range(1, 6) for sensor in ("pump-1", "pump-2")]


# -- the oracle's comparison


def test_the_same_forecasts_are_no_finding() -> None:
    found = compare_forecasts(STREAM, list(STREAM))
    assert found.ok
    assert (found.expected, found.seen, found.examples) == (10, 10, [])


def test_forecasts_of_two_sensors_may_come_in_any_order_between_them() -> None:
    by_sensor = sorted(STREAM, key=lambda f: (f.sensor, f.issued_at_ms))
    assert compare_forecasts(STREAM, by_sensor).ok


def test_a_lost_forecast_is_found() -> None:
    found = compare_forecasts(STREAM, STREAM[:4] + STREAM[5:])
    assert (found.lost, found.repeated, found.unexpected, found.ok) == (1, 0, 0, False)
    assert found.examples == [f"lost: {STREAM[4].key}"]


def test_a_repeated_forecast_is_found_and_counts_each_time() -> None:
    found = compare_forecasts(STREAM, [*STREAM, STREAM[3], STREAM[3]])
    assert (found.lost, found.repeated, found.out_of_order, found.ok) == (0, 2, 0, False)


def test_a_forecast_that_nobody_expected_is_found() -> None:
    found = compare_forecasts(STREAM, [*STREAM, forecast("pump-1", 99)])
    assert (found.unexpected, found.ok) == (1, False)


@pytest.mark.parametrize(
    "changed",
    [{"status": "stale"}, {"state_steps": 1}, {"offset": 1}, {"model": "another"}],
    ids=lambda c: next(iter(c)),
)
def test_a_forecast_with_another_provenance_is_found(changed: dict[str, object]) -> None:
    found = compare_forecasts(STREAM, [*STREAM[:-1], replace(STREAM[-1], **changed)])  # type: ignore[arg-type]
    assert (found.wrong, found.lost, found.ok) == (1, 0, False)


def test_a_forecast_that_is_off_in_one_number_is_found() -> None:
    numbers = STREAM[2].numbers.copy()
    numbers[0, 3, 2] *= 1 + 3 * TOLERANCE
    found = compare_forecasts(STREAM, [*STREAM[:2], replace(STREAM[2], numbers=numbers), *STREAM[3:]])
    assert found.largest_difference == pytest.approx(3 * TOLERANCE)
    assert (found.lost, found.wrong, found.ok) == (0, 0, False)


def test_a_difference_in_the_last_bits_is_no_finding() -> None:
    found = compare_forecasts(STREAM, [replace(f, numbers=f.numbers * (1 + 1e-7)) for f in STREAM])
    assert found.ok
    assert 0 < found.largest_difference < TOLERANCE


def test_a_number_that_is_missing_is_no_small_difference() -> None:
    numbers = STREAM[0].numbers.copy()
    numbers[0, 0, 0] = np.nan
    found = compare_forecasts(STREAM, [replace(STREAM[0], numbers=numbers), *STREAM[1:]])
    assert found.largest_difference == float("inf")


def test_a_repeat_that_is_wrong_is_found_although_the_first_was_right() -> None:
    found = compare_forecasts(STREAM, [*STREAM, forecast("pump-2", 5, value=21.0)])
    assert (found.repeated, found.ok) == (1, False)
    assert found.largest_difference == pytest.approx(0.05)


def test_forecasts_of_one_sensor_out_of_order_are_found() -> None:
    found = compare_forecasts(STREAM, [*STREAM[2:4], *STREAM[:2], *STREAM[4:]])
    assert (found.out_of_order, found.lost, found.ok) == (2, 0, False)


def test_dead_letters_are_counted_by_the_offset_they_came_from() -> None:
    letters = [Letter(0, offset, b"pump-1", b"?", "not-json") for offset in (3, 7, 9)]
    assert compare_letters(letters, letters).ok
    assert compare_letters(letters, letters[1:]).lost == 1
    assert compare_letters(letters, [*letters, letters[0]]).repeated == 1
    assert compare_letters(letters, [replace(letters[0], value=b"!"), *letters[1:]]).wrong == 1


@pytest.fixture
def table() -> SensorTable:
    from models.forecaster import Column

    columns = [Column("rnn.hidden", (1, 4), np.dtype(np.float32)), Column("memory.steps", (), np.dtype(np.int32))]
    table = SensorTable(columns)
    slots = table.slots([b"pump-1", b"pump-2"])
    rows = {"rnn.hidden": np.ones((2, 1, 4), np.float32), "memory.steps": np.array([3, 4], np.int32)}
    table.scatter(slots, rows)
    return table


def test_equal_rows_are_no_finding(table: SensorTable) -> None:
    snapshot = table.snapshot()
    assert compare_state(table, snapshot.sensors, snapshot.rows).ok


def test_a_hidden_state_that_was_forgotten_is_found(table: SensorTable) -> None:
    snapshot = table.snapshot()
    snapshot.rows["rnn.hidden"][1] = 0
    found = compare_state(table, snapshot.sensors, snapshot.rows)
    assert (found.largest_hidden_difference, found.ok) == (1.0, False)


def test_a_count_that_is_off_by_one_is_found(table: SensorTable) -> None:
    snapshot = table.snapshot()
    snapshot.rows["memory.steps"][0] += 1
    found = compare_state(table, snapshot.sensors, snapshot.rows)
    assert (found.problems, found.ok) == (["column memory.steps differs"], False)


def test_sensors_in_another_order_are_found(table: SensorTable) -> None:
    snapshot = table.snapshot()
    assert not compare_state(table, snapshot.sensors[::-1], snapshot.rows).ok


def test_a_verdict_names_what_it_found() -> None:
    fine = Verdict(100, Findings(10, 10), Findings(), StateFindings())
    assert (fine.ok, fine.symptoms) == (True, set())
    bad = replace(fine, forecasts=Findings(10, 9, lost=2, repeated=1, largest_difference=0.5))
    assert (bad.ok, bad.symptoms) == (False, {"lost", "repeated", "different"})
    assert "lost 2, repeated 1" in str(bad)


# -- deaths and faults


class Died(BaseException):
    """In place of SIGKILL."""


def make_sink() -> tuple[type, list[object]]:
    """A class with the steps of TransactionalSink, and the list in which it notes what was done."""
    done: list[object] = []

    class Sink:
        def commit(self, batches: list[OutgoingRecords]) -> None:
            self._begin()
            self._send(batches)
            self._flush()
            self._send_offsets({0: 1}, None)
            self._commit()

        def _begin(self) -> None:
            done.append("begin")

        def _send(self, batches: list[OutgoingRecords]) -> None:
            done.append([(batch.topic, list(batch.keys)) for batch in batches])

        def _flush(self) -> None:
            done.append("flush")

        def _send_offsets(self, offsets: dict[int, int], membership: None) -> None:
            done.append("offsets")

        def _commit(self) -> None:
            done.append("commit")

    return Sink, done


def batch(topic: str, *keys: bytes) -> OutgoingRecords:
    return OutgoingRecords(topic, 0, list(keys), list(keys))


FORECASTS, STATE = "c.forecasts.v1", "c.state.v1"
PLAIN = [batch(FORECASTS, b"a", b"b", b"c", b"d")]
WITH_CHECKPOINT = [batch(STATE, b"windows", b"steps", b"partition", b"manifest"), batch(FORECASTS, b"a", b"b")]
SENT_PLAIN = [(FORECASTS, [b"a", b"b", b"c", b"d"])]

LAST_STEPS = {
    "after-begin": ["begin"],
    "mid-send": ["begin", [(FORECASTS, [b"a", b"b"])], "flush"],
    "after-flush": ["begin", SENT_PLAIN, "flush"],
    "after-offsets": ["begin", SENT_PLAIN, "flush", "offsets"],
    "mid-commit": ["begin", SENT_PLAIN, "flush", "offsets", "commit"],
    "after-commit": ["begin", SENT_PLAIN, "flush", "offsets", "commit"],
}


def dies(point: str) -> None:
    raise Died(point)


@pytest.mark.parametrize("point", LAST_STEPS)
def test_a_worker_dies_at_the_point_named_when_it_comes_there_the_second_time(point: str) -> None:
    sink, done = make_sink()
    die_at(sink, point, 2, dies)
    sink().commit(PLAIN)
    done.clear()
    with pytest.raises(Died, match=point):
        sink().commit(PLAIN)
    assert done == LAST_STEPS[point]


def test_a_death_in_a_checkpoint_waits_for_one_and_leaves_it_half_written() -> None:
    sink, done = make_sink()
    die_at(sink, "mid-checkpoint", 1, dies)
    sink().commit(PLAIN)
    done.clear()
    with pytest.raises(Died):
        sink().commit(WITH_CHECKPOINT)
    assert done == ["begin", [(FORECASTS, [b"a", b"b"]), (STATE, [b"windows", b"steps"])], "flush"]


def test_of_several_checkpoints_only_the_last_is_cut() -> None:
    two = [batch(STATE, b"1", b"2"), batch(STATE, b"3", b"4"), *PLAIN]
    assert [list(b.keys) for b in up_to_half_a_checkpoint(two)] == [[b"a", b"b", b"c", b"d"], [b"1", b"2"], [b"3"]]


def test_half_of_several_batches_is_the_first_of_them() -> None:
    assert first_half([*PLAIN, *WITH_CHECKPOINT]) == PLAIN


def test_there_is_no_point_of_another_name() -> None:
    with pytest.raises(ValueError, match="expected one of after-begin, mid-send"):
        die_at(make_sink()[0], "nowhere", 1, dies)


def test_offsets_committed_early_are_a_transaction_of_their_own(tmp_path: Path) -> None:
    sink, done = make_sink()
    intervene(sink, tmp_path, "", "commits-early")
    sink().commit(PLAIN)
    assert done == ["begin", "flush", "offsets", "commit", "begin", SENT_PLAIN, "flush", "commit"]


def test_a_death_after_the_commit_falls_between_the_two_when_offsets_are_early(tmp_path: Path) -> None:
    sink, done = make_sink()
    die_at(sink, "after-commit", 1, dies)
    intervene(sink, tmp_path, "", "commits-early")
    with pytest.raises(Died):
        sink().commit(PLAIN)
    assert done == ["begin", "flush", "offsets", "commit"]


# -- the load


def messages(seed: int, ticks: int) -> list[tuple[bytes, bytes | None]]:
    fleet = Fleet(40, seed)
    return [message for _ in range(ticks) for message in fleet.tick()]


def test_the_load_is_the_same_for_the_same_seed() -> None:
    assert messages(1, 60) == messages(1, 60)
    assert messages(1, 60) != messages(2, 60)


def test_the_load_has_broken_late_and_missing_readings_in_it() -> None:
    import orjson

    fleet, late, broken, missing, total = Fleet(40, 0), 0, 0, 0, 0
    for _ in range(40 * PER_WINDOW):
        for _, value in fleet.tick():
            total += 1
            if value in BAD:
                broken += 1
                continue
            read = orjson.loads(value or b"")
            missing += read["value"] is None
            late += read["ts"] < fleet.now_ms - (GRACE_TICKS + 1) * 10_000
    for count in (late, broken, missing):
        assert 0.005 < count / total < 0.02


# -- on a real broker


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return harness.make_model(tmp_path_factory.mktemp("chaos") / "model")


SHORT = ChaosPlan(
    readings=15_000, kills=6, rebalances=2, pauses=0, broker_restarts=0, sensors=60, seed=1, deadline_seconds=200.0
)


@pytest.fixture
def run(model: Path, tmp_path: Path) -> Callable[[ChaosPlan], ChaosReport]:
    return lambda plan: harness.run(replace(plan, model=model, out=tmp_path / "chaos"), print)


@pytest.mark.broker
@pytest.mark.keras
def test_killed_and_moved_workers_leave_what_an_undisturbed_one_would_have(
    run: Callable[[ChaosPlan], ChaosReport],
) -> None:
    report = run(SHORT)
    assert report.ok, str(report)


@pytest.mark.broker
@pytest.mark.keras
def test_forecasts_sent_outside_of_the_transaction_are_found(
    run: Callable[[ChaosPlan], ChaosReport],
) -> None:
    report = run(replace(SHORT, readings=5_000, kills=2, rebalances=0, workers=2, fault="outside"))
    assert report.found, str(report)


def test_every_fault_has_a_symptom_and_deaths_that_show_it() -> None:
    for fault in FAULTS.values():
        assert fault.symptom in {"lost", "repeated", "different"}
        assert set(fault.points) <= set(POINTS)
