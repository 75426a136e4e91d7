"""The harness itself, and a short run of it: kills inside and outside of transactions, swaps, rebalances, one planted fault.

`python -m tests.chaos` is the long one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest

from pipeline.settings import load
from pipeline.stream.columns import OutgoingRecords
from pipeline.stream.state import SensorTable
from tests.chaos import harness
from tests.chaos.load import BAD, GRACE_TICKS, PER_WINDOW, Fleet
from tests.chaos.models import VARIANTS, load_models, make_model, make_variants, shape
from tests.chaos.oracle import (
    TOLERANCE,
    Appended,
    Findings,
    Forecast,
    Letter,
    Score,
    StateFindings,
    Takeover,
    Undisturbed,
    Verdict,
    check_takeovers,
    compare_forecasts,
    compare_letters,
    compare_scores,
    compare_state,
)
from tests.chaos.parity import compare_frame
from tests.chaos.plan import ChaosPlan, ChaosReport
from tests.chaos.swaps import pauses
from tests.chaos.worker import (
    FAULTS,
    POINTS,
    SWAP_POINTS,
    all_but_checkpoints,
    die_at,
    first_half,
    intervene,
    up_to_half_a_checkpoint,
)

MINUTE = 60_000


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("chaos") / "model")


@pytest.fixture(scope="module")
def variants(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    return make_variants(tmp_path_factory.mktemp("chaos"))


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


def score(window: int, **changed: object) -> Score:
    sums = np.arange(30, dtype=np.float64).reshape(2, 5, 3) + window
    made = Score(0, window * MINUTE, 10 * window, 13, "gru16-0", "seasonal-naive", (1, 2, 6), sums)
    return replace(made, **changed)  # type: ignore[arg-type]


SCORES = [score(window) for window in range(1, 6)]


def test_the_same_scores_are_no_finding_even_if_six_digits_of_them_were_written() -> None:
    found = compare_scores(SCORES, [replace(one, sums=one.sums * (1 + 4e-6)) for one in SCORES])
    assert (found.ok, found.expected, found.seen) == (True, 5, 5)


def test_a_lost_score_is_found() -> None:
    found = compare_scores(SCORES, [*SCORES[:2], *SCORES[3:]])
    assert (found.lost, found.repeated, found.ok) == (1, 0, False)
    assert found.examples == [f"lost: {SCORES[2].key}"]


def test_a_repeated_score_is_found() -> None:
    found = compare_scores(SCORES, [*SCORES, SCORES[1]])
    assert (found.lost, found.repeated, found.ok) == (0, 1, False)


@pytest.mark.parametrize(
    "changed", [{"offset": 1}, {"steps": 12}, {"model": "another"}, {"leads": (1, 2)}], ids=lambda c: next(iter(c))
)
def test_a_score_with_another_provenance_is_found(changed: dict[str, object]) -> None:
    found = compare_scores(SCORES, [replace(SCORES[0], **changed), *SCORES[1:]])  # type: ignore[arg-type]
    assert (found.wrong, found.ok) == (1, False)


def test_a_score_with_another_sum_is_found() -> None:
    sums = SCORES[0].sums.copy()
    sums[0, 1, 2] *= 1.001
    found = compare_scores(SCORES, [replace(SCORES[0], sums=sums), *SCORES[1:]])
    assert (found.different, found.ok) == (True, False)
    assert found.examples == [f"differs: {SCORES[0].key}"]


def test_a_truth_that_lies_on_a_quantile_may_be_covered_or_not() -> None:
    one, two = SCORES[0].sums.copy(), SCORES[0].sums.copy()
    one[0, 4, 0] += 1
    two[0, 4, 0] += 2
    assert compare_scores(SCORES[:1], [replace(SCORES[0], sums=one)]).ok
    assert not compare_scores(SCORES[:1], [replace(SCORES[0], sums=two)]).ok


def test_scores_that_are_lost_or_repeated_are_so_in_the_verdict() -> None:
    fine = Verdict(100, Findings(10, 10), Findings(), StateFindings())
    bad = replace(fine, scores=compare_scores(SCORES, [*SCORES[1:], SCORES[1]]))
    assert (bad.ok, bad.lost, bad.repeated, bad.symptoms) == (False, 1, 1, {"lost", "repeated"})
    assert "score lost: (0, 60000)" in bad.details


# -- the oracle's models


def test_models_may_take_over_in_turn_and_come_back() -> None:
    found = check_takeovers([Takeover(0, 0, "a"), Takeover(1, 0, "a"), Takeover(0, 7, "b"), Takeover(0, 7, "a")])
    assert (found.ok, found.seen, found.by_partition) == (True, 4, {0: 3, 1: 1})


def test_a_model_that_takes_over_from_itself_is_found() -> None:
    found = check_takeovers([Takeover(0, 0, "a"), Takeover(0, 7, "b"), Takeover(0, 9, "b")])
    assert (found.again, found.backwards, found.ok) == (1, 0, False)
    fine = Verdict(100, Findings(10, 10), Findings(), StateFindings())
    assert replace(fine, swaps=found).symptoms == {"taken over twice"}


def test_a_model_that_takes_over_before_the_one_before_it_is_found() -> None:
    found = check_takeovers([Takeover(0, 0, "a"), Takeover(0, 9, "b"), Takeover(0, 8, "c")])
    assert (found.again, found.backwards, found.ok) == (0, 1, False)


class Record(NamedTuple):
    """As kafka-python gives it."""

    offset: int
    timestamp: int
    key: bytes
    value: bytes | None
    headers: tuple[tuple[str, bytes], ...] = ()


@pytest.fixture(scope="module")
def undisturbed(model: Path, variants: tuple[Path, ...]) -> Callable[[Sequence[tuple[int, str]]], Undisturbed]:
    """The whole run of one partition, given who takes over where."""
    settings = load(None, {}, shape(model) | {"topics.partitions": 1})
    fleet = Fleet(6, 0)
    sent = [message for _ in range(40 * PER_WINDOW) for message in fleet.tick()]
    log = [Record(2 * n, fleet.now_ms, key, value) for n, (key, value) in enumerate(sent)]
    models = dict(zip(("first", *VARIANTS), load_models([model, *variants]).values()))
    return lambda timeline: Undisturbed(settings, models, [Takeover(0, at, name) for at, name in timeline], {0: log})


@pytest.mark.keras
@pytest.mark.parametrize("name", VARIANTS)
def test_a_model_of_any_shape_takes_over_at_the_very_record(
    name: str, undisturbed: Callable[[Sequence[tuple[int, str]]], Undisturbed]
) -> None:
    run = undisturbed([(0, "first"), (2000, name)])
    version = run.tasks[0].version
    assert {f.offset >= 2000 for f in run.forecasts if f.model == version} == {True}
    assert {f.model for f in run.forecasts if f.offset >= 2000 and f.status == "ok"} == {version}
    assert compare_forecasts(run.forecasts, run.forecasts).ok


@pytest.mark.keras
def test_a_swap_at_the_wrong_offset_is_found(
    undisturbed: Callable[[Sequence[tuple[int, str]]], Undisturbed],
) -> None:
    right, late = (undisturbed([(0, "first"), (at, "another-seed")]) for at in (2000, 2400))
    found = compare_forecasts(right.forecasts, late.forecasts)
    assert (found.lost, found.wrong > 0, found.different, found.ok) == (0, True, True, False)
    assert compare_scores(right.scores, late.scores).wrong > 0


@pytest.mark.keras
def test_a_swap_that_nobody_made_is_found(
    undisturbed: Callable[[Sequence[tuple[int, str]]], Undisturbed],
) -> None:
    right, also = undisturbed([(0, "first")]), undisturbed([(0, "first"), (2000, "first")])
    found = compare_forecasts(right.forecasts, also.forecasts)
    assert (found.lost, found.wrong) == (0, 0)
    assert not compare_scores(right.scores, also.scores).ok


# -- pauses


def test_the_longest_pause_is_that_of_one_partition_while_others_go_on() -> None:
    first = [Appended(0, ms) for ms in range(0, 10_000, 500)]
    second = [Appended(1, ms) for ms in (*range(0, 3_000, 500), *range(5_000, 10_000, 500))]
    found = pauses([*first, *first, *second], 0, 10_000)
    assert found is not None
    assert (found.median, found.longest, found.longest_anywhere) == (0.5, 2.5, 0.5)


def test_pauses_count_only_while_readings_came() -> None:
    said = [Appended(0, ms) for ms in (0, 9_000, 9_500, 10_000, 20_000)]
    found = pauses(said, 9_000, 20_000)
    assert found is not None
    assert found.longest == 0.5
    assert pauses(said, 30_000, 40_000) is None


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


FORECASTS, STATE, MODELS = "c.forecasts.v1", "c.state.v1", "c.models.v1"
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


WITH_SWAP = [
    batch(MODELS, b"swap/00000/7"),
    batch(FORECASTS, b"a", b"b"),
    batch(STATE, b"steps", b"manifest"),
]
SENT_SWAP = [(MODELS, [b"swap/00000/7"]), (FORECASTS, [b"a", b"b"])]
LAST_STEPS_OF_SWAP = {
    "mid-swap": ["begin", SENT_SWAP, "flush"],
    "after-swap-commit": [
        "begin",
        [*SENT_SWAP, (STATE, [b"steps", b"manifest"])],
        "flush",
        "offsets",
        "commit",
    ],
}


@pytest.mark.parametrize("point", SWAP_POINTS)
def test_a_death_in_a_swap_waits_for_one(point: str) -> None:
    sink, done = make_sink()
    die_at(sink, point, 1, dies)
    sink().commit(PLAIN)
    sink().commit(WITH_CHECKPOINT)
    done.clear()
    with pytest.raises(Died, match=point):
        sink().commit(WITH_SWAP)
    assert done == LAST_STEPS_OF_SWAP[point]


def test_a_swap_without_its_checkpoint_is_all_but_the_states() -> None:
    assert all_but_checkpoints(WITH_SWAP) == WITH_SWAP[:2]


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


# -- what a backtest is held against


def long_frame(forecasts: Sequence[Forecast]) -> pd.DataFrame:
    rows = [
        {
            "unique_id": one.sensor,
            "cutoff": pd.Timestamp(one.issued_at_ms - MINUTE, unit="ms"),
            "lead": lead + 1,
            "status": one.status,
            "model_version": one.model,
            "Millrace": one.numbers[0, 0, lead],
        }
        | {f"Millrace-q{level:g}": one.numbers[0, 1 + q, lead] for q, level in enumerate(LEVELS)}
        for one in forecasts
        for lead in range(one.numbers.shape[2])
    ]
    return pd.DataFrame(rows)


LEVELS = (0.1, 0.5, 0.9)


def test_a_backtest_that_says_the_same_is_no_finding() -> None:
    found = compare_frame(long_frame(STREAM), LEVELS, MINUTE, STREAM)
    assert found.ok
    assert (found.expected, found.seen) == (10, 10)


def test_a_backtest_that_leaves_one_out_or_says_one_more_is_found() -> None:
    assert compare_frame(long_frame(STREAM[1:]), LEVELS, MINUTE, STREAM).unexpected == 1
    assert compare_frame(long_frame(STREAM), LEVELS, MINUTE, STREAM[1:]).lost == 1


@pytest.mark.parametrize("changed", [{"status": "stale"}, {"model": "another"}], ids=lambda c: next(iter(c)))
def test_a_backtest_with_another_provenance_is_found(changed: dict[str, object]) -> None:
    other = [*STREAM[:-1], replace(STREAM[-1], **changed)]  # type: ignore[arg-type]
    assert compare_frame(long_frame(other), LEVELS, MINUTE, STREAM).wrong == 1


def test_a_backtest_that_is_off_in_one_number_is_found() -> None:
    frame = long_frame(STREAM)
    frame.loc[3, "Millrace-q0.9"] += 0.01
    found = compare_frame(frame, LEVELS, MINUTE, STREAM)
    assert not found.ok
    assert found.largest_difference == pytest.approx(0.0005)


# -- on a real broker


SHORT = ChaosPlan(
    readings=15_000,
    kills=4,
    rebalances=1,
    pauses=0,
    broker_restarts=0,
    swaps=3,
    sensors=60,
    seed=1,
    deadline_seconds=200.0,
)


@pytest.fixture
def run(model: Path, variants: tuple[Path, ...], tmp_path: Path) -> Callable[[ChaosPlan], ChaosReport]:
    return lambda plan: harness.run(replace(plan, model=model, variants=variants, out=tmp_path / "chaos"), print)


@pytest.fixture(scope="module")
def report(model: Path, variants: tuple[Path, ...], tmp_path_factory: pytest.TempPathFactory) -> ChaosReport:
    out = tmp_path_factory.mktemp("short") / "chaos"
    return harness.run(replace(SHORT, model=model, variants=variants, out=out), print)


@pytest.mark.broker
@pytest.mark.keras
def test_killed_and_moved_workers_leave_what_an_undisturbed_one_would_have(report: ChaosReport) -> None:
    assert report.ok, str(report)


@pytest.mark.broker
@pytest.mark.keras
def test_a_backtest_repeats_what_was_said_live_through_kills_rebalances_and_swaps(report: ChaosReport) -> None:
    assert report.verdict is not None
    found = report.verdict.backtest
    assert found.ok, str(report)
    assert found.expected == found.seen == report.verdict.forecasts.expected > 1_000
    assert found.largest_difference <= TOLERANCE
    assert report.kills.total() >= SHORT.kills
    assert report.verdict.swaps.seen > report.verdict.state.partitions  # first models and later ones


@pytest.mark.broker
@pytest.mark.keras
def test_forecasts_sent_outside_of_the_transaction_are_found(
    run: Callable[[ChaosPlan], ChaosReport],
) -> None:
    report = run(replace(SHORT, readings=5_000, kills=2, rebalances=0, swaps=0, workers=2, fault="outside"))
    assert report.found, str(report)


def test_every_fault_has_a_symptom_and_deaths_that_show_it() -> None:
    for fault in FAULTS.values():
        assert fault.symptom in {"lost", "repeated", "different", "taken over twice"}
        assert set(fault.points) <= {*POINTS, *(SWAP_POINTS if fault.swaps else ())}
