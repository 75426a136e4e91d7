"""Copying a topic, without a broker: the merge against a slow oracle, pace, partitions, and a log in memory to read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from pipeline import cli
from pipeline.errors import BrokerUnavailable
from pipeline.kafka.sink import partition_for
from pipeline.service import copy as copying
from pipeline.service.copy import FETCHES_AHEAD, Merge, MergedRecords, RecordCopier, TimeRange, find_spans, read
from pipeline.service.replay import NO_TIME, READINGS_AT_ONCE, at_pace
from pipeline.stream.columns import RecordColumns
from tests.helpers.clock import Wall

Record = tuple[int, int, bytes | None, bytes | None, Sequence[tuple[str, bytes | None]]]
"""(offset, timestamp_ms, key, value, headers)."""


def records_of(timestamps: Sequence[int], partition: int = 0, offset: int = 0) -> RecordColumns:
    rows = [(offset + n, time_ms, b"k", b"%d" % n, ()) for n, time_ms in enumerate(timestamps)]
    return RecordColumns.build("t", partition, rows)


def spans_of(logs: Sequence[Sequence[object]]) -> dict[int, tuple[int, int]]:
    return {partition: (0, len(log)) for partition, log in enumerate(logs)}


def left(batches: Sequence[MergedRecords | None]) -> list[tuple[int, int]]:
    """(partition, offset) in the order in which they left."""
    return [
        (batch.parts[part].partition, int(batch.parts[part].offsets[row]))
        for batch in batches
        if batch is not None
        for part, row in zip(batch.part.tolist(), batch.row.tolist())
    ]


def merged(logs: Sequence[Sequence[int]], wanted: TimeRange | None = None) -> list[tuple[int, int]]:
    """Each log whole, in one piece."""
    merge = Merge(spans_of(logs), wanted)
    for partition, log in enumerate(logs):
        merge.add(records_of(log, partition))
    return left([merge.take()])


def oracle(logs: Sequence[Sequence[int]], wanted: TimeRange) -> list[tuple[int, int]]:
    """The rules one record at a time: due when the newest before it was, the range's end at the latest."""
    low = NO_TIME if wanted.from_ms is None else wanted.from_ms
    high = 2**62 if wanted.to_ms is None else wanted.to_ms
    rows = []
    for partition, log in enumerate(logs):
        reached = NO_TIME
        for offset, time_ms in enumerate(log):
            reached = max(reached, NO_TIME if time_ms < 0 else min(time_ms, high))
            if low <= (reached if time_ms < 0 else time_ms) < high:
                rows.append((reached, partition, offset))
    return [(partition, offset) for _, partition, offset in sorted(rows)]


LOGS = st.lists(st.lists(st.integers(-1, 12), max_size=8), min_size=1, max_size=4)
RANGES = st.builds(TimeRange, st.none() | st.integers(0, 12), st.none() | st.integers(0, 12))


@given(LOGS, RANGES, st.data())
def test_in_whatever_pieces_records_come_they_leave_as_the_oracle_says(logs, wanted, data):
    merge = Merge(spans_of(logs), wanted)
    batches, shares = [], [merge.share]
    while merge.unfinished:
        partition = data.draw(st.sampled_from(sorted(merge.unfinished)))
        start = merge.position[partition]
        stop = data.draw(st.integers(start + 1, len(logs[partition])))
        merge.add(records_of(logs[partition][start:stop], partition, start))
        batches.append(merge.take())
        shares += [] if batches[-1] is None else batches[-1].share_read.tolist()
        shares.append(merge.share)
    assert left(batches) == oracle(logs, wanted)
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


@given(LOGS)
def test_the_order_within_a_partition_is_kept_and_nothing_is_lost(logs):
    found = merged(logs)
    for partition, log in enumerate(logs):
        assert [offset for p, offset in found if p == partition] == list(range(len(log)))


def test_partitions_are_merged_by_time():
    #  partition 0   1     4  2     7        the 2 came late, after the 4
    #  partition 1      3        5
    assert merged([[1, 4, 2, 7], [3, 5]]) == [(0, 0), (1, 0), (0, 1), (0, 2), (1, 1), (0, 3)]


def test_at_the_same_time_the_lower_partition_goes_first():
    assert merged([[5], [5], [4]]) == [(2, 0), (0, 0), (1, 0)]


def test_a_record_waits_while_another_partition_may_bring_an_earlier_one():
    merge = Merge({0: (0, 2), 1: (0, 2)})
    merge.add(records_of([1, 9], 0))
    assert merge.take() is None
    merge.add(records_of([5], 1))
    assert left([merge.take()]) == [(0, 0), (1, 0)]
    merge.passed({1: 2})  # an aborted transaction: nothing to read there
    assert left([merge.take()]) == [(0, 1)]
    assert not merge.unfinished


def test_only_record_timestamps_inside_the_range_are_copied_out_of_order_or_not():
    # [3 ---- 6)
    assert merged([[3, 6, 5, 2, 7, 4]], TimeRange(3, 6)) == [(0, 0), (0, 2), (0, 5)]


def test_what_was_in_the_log_after_the_end_was_fixed_is_left_alone():
    merge = Merge({0: (0, 2)})
    merge.add(records_of([1, 2, 3, 4], 0))
    assert left([merge.take()]) == [(0, 0), (0, 1)]
    assert not merge.unfinished


def test_a_partition_past_the_range_holds_up_nobody():
    merge = Merge({0: (0, 100), 1: (0, 100)}, TimeRange(None, 10))
    merge.add(records_of([1, 10], 0))
    merge.add(records_of([5, 9], 1))
    assert left([merge.take()]) == [(0, 0), (1, 0), (1, 1)]


def test_a_record_without_a_timestamp_counts_as_the_newest_before_it():
    assert merged([[1, -1, 5], [2]]) == [(0, 0), (0, 1), (1, 0), (0, 2)]
    assert merged([[1, -1, 5, -1]], TimeRange(None, 4)) == [(0, 0), (0, 1)]
    assert merged([[1, -1, 5, -1]], TimeRange(4, None)) == [(0, 2), (0, 3)]


def test_before_any_timestamp_it_is_copied_first_unless_a_start_was_asked_for():
    assert merged([[4], [-1, 3]]) == [(1, 0), (1, 1), (0, 0)]
    assert merged([[-1, 3]], TimeRange(None, 4)) == [(0, 0), (0, 1)]
    assert merged([[-1, 3]], TimeRange(0, None)) == [(0, 1)]


def test_partitions_that_are_ahead_are_not_read_on_and_the_slowest_always_is():
    merge = Merge({0: (0, 100), 1: (0, 100), 2: (0, 0)})
    assert merge.wanted == {0, 1}
    for n in range(FETCHES_AHEAD):
        merge.add(records_of([50 + n], 0, n))
        assert merge.take() is None
    assert merge.wanted == {1}
    merge.add(records_of([60], 1))
    assert len(merge.take() or ()) == FETCHES_AHEAD
    assert merge.wanted == {0, 1}


def test_while_too_many_bytes_wait_only_partitions_without_any_are_read_on(monkeypatch):
    monkeypatch.setattr(copying, "WAITING_BYTES", 1)
    merge = Merge({0: (0, 100), 1: (0, 100)})
    merge.add(records_of([50], 0))
    assert merge.take() is None
    assert merge.wanted == {1}


def test_at_a_speed_each_record_leaves_when_its_time_has_come_whatever_its_partition():
    #  event time   0s   1s   2s   3s        at speed 2, after the 1 s that the first fetch takes
    #  partition 0  x         x
    #  partition 1       x         x
    wall, leaving = Wall(), []

    def batches() -> Iterator[MergedRecords]:
        merge = Merge({0: (0, 2), 1: (0, 2)})
        merge.add(records_of([0, 2000], 0))
        merge.add(records_of([1000, 3000], 1))
        wall.sleep(1.0)
        yield merge.take()

    for piece in at_pace(batches(), MergedRecords.cut, 2.0, lambda: wall.seconds, wall.sleep):
        leaving += [(at, wall.seconds - 101) for at in left([piece])]
    assert leaving == [((0, 0), 0.0), ((1, 0), 0.5), ((0, 1), 1.0), ((1, 1), 1.5)]


def test_records_without_a_time_leave_at_once_and_the_clock_starts_with_the_first_that_has_one():
    wall, leaving = Wall(), []
    merges = [Merge({0: (0, len(log))}) for log in ([-1, -1], [-1, 5000, -1, 6000])]
    for merge, log in zip(merges, ([-1, -1], [-1, 5000, -1, 6000])):
        merge.add(records_of(log))
    for piece in at_pace((m.take() for m in merges), MergedRecords.cut, 1.0, lambda: wall.seconds, wall.sleep):
        leaving += [wall.seconds - 100] * len(piece)
    assert leaving == [0.0, 0.0, 0.0, 0.0, 0.0, 1.0]


def test_a_cut_of_merged_records_is_those_rows():
    merge = Merge({0: (0, 3)})
    merge.add(records_of([1, 2, 3]))
    whole = merge.take()
    assert whole is not None
    piece = whole.cut(1, 3)
    assert (left([piece]), piece.event_time_ms.tolist()) == ([(0, 1), (0, 2)], [2, 3])
    assert piece.share_read[-1] == 1.0


def sent(
    logs: Sequence[Sequence[Record]], target_partitions: int, at_once: int = READINGS_AT_ONCE
) -> dict[int, list[tuple[int, bytes | None, bytes | None, tuple[tuple[str, bytes | None], ...]]]]:
    """Target partition -> (timestamp_ms, key, value, headers) in the order of sending."""
    merge = Merge(spans_of(logs))
    for partition, log in enumerate(logs):
        merge.add(RecordColumns.build("t", partition, log))
    whole = merge.take()
    copier = RecordCopier("to", len(logs), target_partitions)
    found: dict[int, list] = {}
    for start in range(0, len(whole or ()), at_once):
        for out in copier.encode(whole.cut(start, min(start + at_once, len(whole)))):
            headers = [()] * len(out) if out.headers is None else out.headers
            rows = zip(out.timestamps_ms.tolist(), out.keys, out.values, headers)
            assert out.topic == "to"
            found.setdefault(out.partition, []).extend(rows)
    return found


BYTES = st.none() | st.binary(max_size=4)
HEADERS = st.lists(st.tuples(st.text(max_size=3), BYTES), max_size=3)
RECORDS = st.lists(st.tuples(st.integers(-1, 5), BYTES, BYTES, HEADERS), max_size=6)


@given(st.lists(RECORDS, min_size=1, max_size=3), st.integers(1, 7))
def test_key_value_headers_and_timestamp_stay_byte_for_byte(logs, at_once):
    numbered = [[(n, *record) for n, record in enumerate(log)] for log in logs]
    found = sent(numbered, len(logs), at_once)
    for partition, log in enumerate(logs):
        assert found.get(partition, []) == [(time, key, value, tuple(h)) for time, key, value, h in log]


def test_zeros_at_the_end_of_a_key_or_value_stay():
    assert sent([[(0, 1, b"k\0", b"v\0\0", [("h", b"\0")])]], 1) == {0: [(1, b"k\0", b"v\0\0", (("h", b"\0"),))]}


def test_a_null_header_stays_null_and_a_tombstone_a_tombstone():
    headers = [("a", b"1"), ("a", None), ("", b"")]
    assert sent([[(0, 1, b"k", None, headers), (1, 2, None, b"", [])]], 1) == {
        0: [(1, b"k", None, tuple(headers)), (2, None, b"", ())]
    }


def test_with_as_many_partitions_a_record_keeps_its_number_whatever_its_key():
    logs = [[(0, 1, b"same", b"0", ())], [(0, 2, b"same", b"1", ())], [(0, 3, None, b"2", ())]]
    assert {p: [row[2] for row in rows] for p, rows in sent(logs, 3).items()} == {0: [b"0"], 1: [b"1"], 2: [b"2"]}
    assert "as the source" in RecordCopier("to", 3, 3).rule


def test_with_another_number_a_record_goes_by_its_key_as_kafka_has_it():
    keys = [b"pump-%d" % n for n in range(50)] + [b""]
    found = sent([[(n, n, key, b"v", ()) for n, key in enumerate(keys)], []], 5)
    assert {key: p for p, rows in found.items() for _, key, _, _ in rows} == {k: partition_for(k, 5) for k in keys}
    assert "by its key" in RecordCopier("to", 2, 5).rule


def test_without_a_key_it_goes_to_its_partition_modulo_the_number_in_its_order():
    logs = [[(n, 3 - p, None, b"%d-%d" % (p, n), ()) for n in range(3)] for p in range(3)]
    values = {p: [value for _, _, value, _ in rows] for p, rows in sent(logs, 2, at_once=2).items()}
    assert values == {0: [b"2-0", b"2-1", b"2-2", b"0-0", b"0-1", b"0-2"], 1: [b"1-0", b"1-1", b"1-2"]}


def test_by_key_too_the_partitions_of_the_source_meet_in_the_order_of_time():
    logs = [[(0, 1, b"a", b"1", ()), (1, 4, b"a", b"4", ())], [(0, 2, b"b", b"2", ()), (1, 3, b"b", b"3", ())]]
    assert [value for _, _, value, _ in sent(logs, 1)[0]] == [b"1", b"2", b"3", b"4"]


class LogInMemory:
    """As much of a RecordSource as reading needs. It grows: each poll adds a record at time 99 to every partition."""

    def __init__(self, logs: Sequence[Sequence[int]], per_poll: int = 2) -> None:
        self.topic = "t"
        self.partitions = list(range(len(logs)))
        self.logs = [list(log) for log in logs]
        self.per_poll = per_poll
        self.on_assigned = None
        self.at: dict[int, int] = {}
        self.paused: set[int] = set()

    def poll(self, timeout_ms: int) -> list[RecordColumns]:
        if not self.at:
            self.on_assigned(self.partitions)
        out = []
        for partition in set(self.partitions) - self.paused:
            start, log = self.at[partition], self.logs[partition]
            piece = log[start : start + self.per_poll]
            self.at[partition] += len(piece)
            if piece:
                out.append(records_of(piece, partition, start))
        for log in self.logs:
            log.append(99)
        return out

    def positions(self) -> dict[int, int]:
        return dict(self.at)

    def seek(self, partition: int, offset: int) -> None:
        self.at[partition] = offset

    def pause(self, partitions: set[int]) -> None:
        self.paused |= set(partitions)

    def resume(self, partitions: set[int]) -> None:
        self.paused -= set(partitions)

    def beginning_offsets(self, partitions: Sequence[int]) -> dict[int, int]:
        return dict.fromkeys(partitions, 0)

    def end_offsets(self, partitions: Sequence[int]) -> dict[int, int]:
        return {partition: len(self.logs[partition]) for partition in partitions}

    def offsets_for_time(self, time_ms: int, partitions: Sequence[int]) -> dict[int, int]:
        assert time_ms >= 0, "the client refuses it"
        return {
            p: next((n for n, at in enumerate(self.logs[p]) if at >= time_ms), len(self.logs[p])) for p in partitions
        }


@given(LOGS, RANGES, st.integers(1, 4))
def test_a_log_that_grows_is_read_to_the_end_that_was_found_at_the_start(logs, wanted, per_poll):
    source = LogInMemory(logs, per_poll)
    merge = Merge(find_spans(source, wanted), wanted)
    shares: list[float] = []
    found = left(list(read(source, merge, lambda: False, lambda: 0.0, shares.append)))
    # Reading begins at the range's first record, before which the oracle, too, has found nothing.
    assert found == oracle(logs, wanted)
    assert shares[-1] == 1.0


def test_asked_to_stop_reading_stops():
    source = LogInMemory([[1, 2, 3, 4]], per_poll=1)
    merge = Merge(find_spans(source, TimeRange()))
    asked = accumulate([False, False, True], initial=False)
    assert left(list(read(source, merge, lambda: next(asked), lambda: 0.0))) == [(0, 0), (0, 1), (0, 2)]


def test_a_source_that_falls_silent_is_told_with_what_to_check():
    source, wall = LogInMemory([[1, 2], [3]], per_poll=0), Wall()
    merge = Merge(find_spans(source, TimeRange()))

    def clock() -> float:
        wall.seconds += 10
        return wall.seconds

    with pytest.raises(BrokerUnavailable, match=r"nothing came for 60 s.*\[0, 1\].*broker status"):
        list(read(source, merge, lambda: False, clock))


def test_a_range_before_1970_begins_at_the_beginning():
    assert find_spans(LogInMemory([[-1, 5]]), TimeRange(-1000)) == {0: (0, 2)}


def test_an_empty_range_is_told_what_the_topic_holds():
    source = LogInMemory([[1_467_331_200_000, 1_467_331_200_500], [], [1_467_417_600_000, 1_467_331_201_000]])
    assert copying.held(source) == (1_467_331_200_000, 1_467_417_600_000)
    told = copying.nothing_copied(source, TimeRange(1_500_000_000_000))
    assert "[2017-07-14T02:40:00Z, the end)" in told
    assert "from 2016-07-01T00:00:00Z to 2016-07-02T00:00:00Z" in told
    assert "holds no records" in copying.nothing_copied(LogInMemory([[], []]), TimeRange())
    assert "no timestamps" in copying.nothing_copied(LogInMemory([[-1]]), TimeRange(5))


def test_at_full_speed_too_records_leave_in_the_order_of_time():
    logs = [[3 * n + p for n in range(1000)] for p in range(3)]
    source = LogInMemory(logs, per_poll=100)
    batches = read(source, Merge(find_spans(source, TimeRange())), lambda: False, lambda: 0.0)
    pieces = at_pace(batches, MergedRecords.cut, None, lambda: 0.0, lambda _: False)
    assert left(list(pieces)) == [(n % 3, n // 3) for n in range(3000)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["name a FILE", "--from-topic"]),
        ([__file__, "--from-topic", "a"], ["test_copy.py", "--from-topic 'a'", "name one of the two"]),
        ([__file__, "--from-servers", "b:1"], ["--from-servers 'b:1' needs --from-topic"]),
        (["--from-topic", "a", "--sensor", "x", "--decimal", "."], ["--sensor, --decimal", "copied as they are"]),
        (["--from-topic", "plant.readings.v1"], ["both source and target", "--topic", "--from-servers"]),
        (["--from-topic", "a", "--from-servers", "b"], ['"b" (--from-servers)', "expected host:port"]),
        (["--from-topic", "a", "--from", "2026-02-01", "--to", "2026-01-01"], ["[2026-02-01", "--from must lie before --to"]),
        (["--from-topic", "a", "--speed", "0"], ["a number above 0"]),
    ],
)  # fmt: skip
def test_wrong_use_is_told_with_its_mend_before_a_broker_is_asked(arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MILLRACE_CONFIG", raising=False)
    monkeypatch.delenv("MILLRACE_TOPICS__DOMAIN", raising=False)
    result = CliRunner().invoke(cli.main, ["replay", *arguments])
    assert result.exit_code == 2
    for word in words:
        assert word in result.stderr
