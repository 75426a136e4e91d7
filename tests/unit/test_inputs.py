"""What a backtest reads: nothing of what comes after a boundary, everything of what comes before it, and each refused record once."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import DeploymentError
from pipeline.service.files import FileBatch
from pipeline.service.inputs import FileInput, TopicInput, Waiting, readings_of
from pipeline.stream.columns import Readings, RecordColumns
from pipeline.stream.serdes import ReadingFormat

TIMES = st.lists(st.integers(-5, 30), max_size=40)
CUTS = st.sets(st.integers(1, 39))
BOUNDARIES = st.lists(st.integers(-6, 32), max_size=6)
FORMAT = ReadingFormat(("value",), max_ahead_ms=None)


def batches(
    times: Sequence[int], cuts: set[int] = frozenset(), fields: tuple[str, ...] = ("value",)
) -> list[FileBatch]:  # type: ignore[assignment]
    """The reading at place n has the value n. Each batch numbers its sensors in its own way."""
    parts = np.split(np.arange(len(times)), sorted(cut for cut in cuts if cut < len(times)))
    found = []
    for number, rows in enumerate(part for part in parts if len(part)):
        sensors = ["a", "b", "c"] if number % 2 else ["c", "b", "a"]
        codes = np.array([sensors.index("abc"[row % 3]) for row in rows], np.int32)
        values = np.repeat(rows[:, None].astype(np.float64), len(fields), axis=1) + np.arange(len(fields)) * 100
        found.append(
            FileBatch(sensors, codes, np.array(times, np.int64)[rows], values, fields, (rows[-1] + 1) / len(times))
        )
    return found


def taken(parts: Iterator[tuple[int, Readings]]) -> list[tuple[int, int]]:
    """(partition, offset) of each reading, and a look at whether the reading is whole."""
    found = []
    for partition, readings in parts:
        assert len(readings)
        places = readings.offsets.tolist()
        assert readings.values[:, 0].tolist() == [float(place) for place in places]
        assert readings.sensors == [b"abc"[place % 3 : place % 3 + 1] for place in places]
        found += [(partition, place) for place in places]
    return found


def before(times: Sequence[int], start: int, boundary: int | None) -> int:
    """The slow way: the place of the first reading of this time or later."""
    while start < len(times) and (boundary is None or times[start] < boundary):
        start += 1
    return start


# -- what waits


def test_what_waits_is_handed_out_up_to_the_first_reading_that_is_too_late() -> None:
    #  8 9 7 | 10 8 11      the 8 that comes behind the 10 waits with it: order within a partition is the log's
    waiting = Waiting()
    for batch in batches([8, 9, 7, 10, 8, 11], {2, 5}):
        waiting.add(readings_of(batch, ("value",), int(batch.values[0, 0])))
    assert [part.event_time_ms.tolist() for part in waiting.until(10)] == [[8, 9], [7]]
    assert waiting
    assert waiting.next_ms == 10
    assert list(waiting.until(10)) == []
    assert [part.event_time_ms.tolist() for part in waiting.until(None)] == [[10, 8], [11]]
    assert not waiting


def test_nothing_that_waits_is_nothing() -> None:
    waiting = Waiting()
    waiting.add(Readings.none(1))
    assert not waiting
    assert list(waiting.until(None)) == []


# -- a file


@given(TIMES, CUTS, BOUNDARIES)
def test_however_a_file_is_cut_the_same_readings_come_before_each_boundary(
    times: list[int], cuts: set[int], boundaries: list[int]
) -> None:
    source, place = FileInput(batches(times, cuts), ("value",), "file"), 0
    for boundary in [*boundaries, None]:
        assert source.next_ms() == (times[place] if place < len(times) else None)
        stop = before(times, place, boundary)
        assert taken(source.until(boundary)) == [(0, at) for at in range(place, stop)]
        place = stop
    assert source.next_ms() is None
    assert source.share_read == 1.0
    assert not source.rejected


@given(TIMES, CUTS, CUTS, st.integers(0, 45), BOUNDARIES)
def test_what_was_taken_in_before_is_skipped_however_the_file_is_cut_then(
    times: list[int], cuts: set[int], other: set[int], skip: int, boundaries: list[int]
) -> None:
    first, taken_in = FileInput(batches(times, cuts), ("value",), "file"), []
    for boundary in boundaries:
        taken_in += taken(first.until(boundary))
    place = len(taken_in)
    again = FileInput(batches(times, other), ("value",), "file", skip=place)
    assert taken(again.until(None)) == [(0, at) for at in range(place, len(times))]
    beyond = FileInput(batches(times, other), ("value",), "file", skip=skip)
    assert taken(beyond.until(None)) == [(0, at) for at in range(skip, len(times))]


def test_a_file_is_read_no_further_than_is_asked_for() -> None:
    read = []

    def reading() -> Iterator[FileBatch]:
        for batch in batches([1, 2, 3, 4, 5, 6, 7, 8], {2, 4, 6}):
            read.append(int(batch.event_time_ms[-1]))
            yield batch

    source = FileInput(reading(), ("value",), "file")
    assert read == []
    assert source.next_ms() == 1
    assert read == [2]
    assert len(taken(source.until(3))) == 2
    assert read == [2, 4]  # the boundary is seen when the reading behind it is
    assert source.share_read == 0.5


def test_an_empty_batch_is_no_reading() -> None:
    empty = FileBatch([], np.empty(0, np.int32), np.empty(0, np.int64), np.empty((0, 1)), ("value",))
    source = FileInput([empty, *batches([3, 4]), empty], ("value",), "file", skip=1)
    assert taken(source.until(None)) == [(0, 1)]


def test_a_file_ends_a_topic_does_not() -> None:
    assert FileInput([], ("value",), "file").ends
    assert FileInput([], ("value",), "file").partitions == (0,)
    assert not TopicInput.ends


def test_fields_are_found_by_their_names_whatever_their_order_in_the_file() -> None:
    (batch,) = batches([1, 2], fields=("heat", "rpm", "noise"))
    found = readings_of(batch, ("noise", "heat"), 5)
    assert found.values.tolist() == [[200.0, 0.0], [201.0, 1.0]]
    assert found.offsets.tolist() == [5, 6]


def test_a_field_that_the_file_does_not_have_is_named() -> None:
    source = FileInput(batches([1], fields=("heat", "rpm")), ("heat", "pressure"), "file")
    with pytest.raises(DeploymentError, match=r"no field 'pressure': it has heat, rpm; set readings\.fields"):
        source.next_ms()


# -- a topic; the real one is in tests/integration


class Log:
    """A topic in memory with what TopicInput asks of a RecordSource. Entries: an event time; None: a refused record; ...: an offset
    that no record has, as a control record's."""

    topic = "plant.readings.v1"

    def __init__(self, partitions: Mapping[int, Sequence[Any]], chunk: Callable[[], int] = lambda: 3) -> None:
        self._log = partitions
        self._chunk = chunk
        self._at: dict[int, int] = {}
        self._paused: set[int] = set()
        self.on_assigned: Any = None
        self.fetched = dict.fromkeys(partitions, 0)

    @property
    def assignment(self) -> list[int]:
        return sorted(self._at)

    def seek(self, partition: int, offset: int) -> None:
        self._at[partition] = offset

    def pause(self, partitions: set[int]) -> None:
        assert set(partitions) <= set(self._at)
        self._paused |= set(partitions)

    def resume(self, partitions: set[int]) -> None:
        self._paused -= set(partitions)

    def positions(self) -> dict[int, int]:
        """Now and then one is left out, as the real one does while it is not sure of it."""
        return {partition: at for partition, at in self._at.items() if self._chunk()}

    def poll(self, timeout_ms: int) -> list[RecordColumns]:
        if not self._at:  # as the real one: the assignment comes with the first poll
            self._at = dict.fromkeys(self._log, 0)
            self.on_assigned(sorted(self._log))
        assert set(self._at) - self._paused, "everything is paused: this poll would wait forever"
        found = []
        for partition in sorted(set(self._at) - self._paused):
            start = self._at[partition]
            stop = min(start + self._chunk(), len(self._log[partition]))
            rows = [self._record(partition, at) for at in range(start, stop) if self._log[partition][at] is not ...]
            self._at[partition] = stop
            self.fetched[partition] += len(rows)
            if rows:
                found.append(RecordColumns.build(self.topic, partition, rows))
        return found

    def _record(self, partition: int, offset: int) -> Any:
        time = self._log[partition][offset]
        if time is None:
            return offset, -1, b"a", b"no reading", ()
        return (
            offset,
            -1,
            b"abc"[offset % 3 : offset % 3 + 1],
            json.dumps({"ts": time + BASE, "value": offset}).encode(),
            (),
        )


BASE = 1_769_700_000_000


class Reader:
    """Takes in what comes and stops where it is told, as `Passage` does."""

    def __init__(self, log: Mapping[int, Sequence[Any]], seed: int, starts: Any = None, ends: Any = None) -> None:
        self.log, self._random = log, random.Random(seed)
        self.ends = ends or {partition: len(entries) for partition, entries in log.items()}
        self.positions = dict(starts or dict.fromkeys(log, 0))
        self._first = dict(self.positions)
        self._open({})

    def _open(self, rejected: Mapping[str, int]) -> None:
        source = Log(self.log, lambda: self._random.randint(0, 4))
        self.source = source
        self.input = TopicInput(source, FORMAT, dict(self.positions), self.ends)  # type: ignore[arg-type]
        self.input.rejected.update(rejected)

    def again(self) -> None:
        self._open(dict(self.input.rejected))

    def until(self, boundary: int | None, stop_after: int | None = None) -> list[tuple[int, int]]:
        found, limit = [], None if boundary is None else boundary + BASE
        for number, (partition, readings) in enumerate(self.input.until(limit)):
            found += taken(iter([(partition, readings)]))
            self.positions[partition] = int(readings.offsets[-1]) + 1
            assert sum(self.input.rejected.values()) <= self.refused_before_positions()
            if number + 1 == stop_after:
                break
        return found

    def refused_before_positions(self, ends: bool = False) -> int:
        return sum(
            self.log[p][at] is None
            for p in self.log
            for at in range(self._first[p], self.ends[p] if ends else self.positions[p])
        )

    def slowly(self, boundary: int | None) -> dict[int, list[int]]:
        """Offsets that come before it, of each partition."""
        found = {}
        for partition, entries in self.log.items():
            ahead = [
                at for at in range(self.positions[partition], self.ends[partition]) if isinstance(entries[at], int)
            ]
            count = before([entries[at] for at in ahead], 0, boundary)
            found[partition] = ahead[:count]
        return found


ENTRIES = st.lists(st.one_of(st.integers(0, 30), st.just(None), st.just(...)), max_size=25)
LOGS = st.dictionaries(st.sampled_from([0, 1, 5]), ENTRIES, min_size=1)


def of_partition(found: Sequence[tuple[int, int]], partition: int) -> list[int]:
    return [at for own, at in found if own == partition]


@given(log=LOGS, boundaries=BOUNDARIES, seed=st.integers(0, 99))
def test_each_partition_comes_up_to_its_first_reading_at_the_boundary_or_later(
    log: dict[int, Any], boundaries: list[int], seed: int
) -> None:
    reader = Reader(log, seed)
    for boundary in [*boundaries, None]:
        wanted, rest = reader.slowly(boundary), reader.slowly(None)
        nexts = [BASE + log[partition][ahead[0]] for partition, ahead in rest.items() if ahead]
        assert reader.input.next_ms() == min(nexts, default=None)
        found = reader.until(boundary)
        assert {partition: of_partition(found, partition) for partition in log} == wanted
    assert reader.input.next_ms() is None
    assert reader.input.share_read == 1.0
    assert sum(reader.input.rejected.values()) == reader.refused_before_positions(ends=True)


@given(log=LOGS, boundaries=BOUNDARIES, seed=st.integers(0, 99), stops=st.lists(st.integers(1, 4), max_size=3))
def test_after_a_stop_nothing_comes_twice_and_each_refused_record_counts_once(
    log: dict[int, Any], boundaries: list[int], seed: int, stops: list[int]
) -> None:
    reader, found = Reader(log, seed), []
    for stop in stops:
        for boundary in boundaries:
            found += reader.until(boundary)
        found += reader.until(None, stop_after=stop)
        reader.again()
    found += reader.until(None)
    assert reader.input.next_ms() is None
    for partition, entries in log.items():
        assert of_partition(found, partition) == [at for at, entry in enumerate(entries) if isinstance(entry, int)]
    assert sum(reader.input.rejected.values()) == reader.refused_before_positions(ends=True)


@given(log=LOGS, seed=st.integers(0, 99), data=st.data())
def test_only_what_lies_between_the_offsets_is_read(log: dict[int, Any], seed: int, data: st.DataObject) -> None:
    starts = {p: data.draw(st.integers(0, len(entries))) for p, entries in log.items()}
    ends = {p: data.draw(st.integers(starts[p], len(log[p]))) for p in log}
    reader = Reader(log, seed, starts, ends)
    found = reader.until(None)
    for partition, entries in log.items():
        wanted = [at for at in range(starts[partition], ends[partition]) if isinstance(entries[at], int)]
        assert of_partition(found, partition) == wanted
    assert reader.input.next_ms() is None
    assert sum(reader.input.rejected.values()) == reader.refused_before_positions(ends=True)


def test_a_refused_record_counts_when_it_has_been_passed_and_not_when_it_was_read() -> None:
    # partition 0: 5 x 20 x     x is read together with the 5, and passed with the 20
    source = Log({0: [5, None, 20, None], 1: [6, 7, 8, 9, 10, 11]}, lambda: 4)
    found = TopicInput(source, FORMAT, {0: 0, 1: 0}, {0: 4, 1: 6})  # type: ignore[arg-type]
    counted = []
    for boundary in (BASE + 10, BASE + 30):
        taken(found.until(boundary))
        counted.append(dict(found.rejected))
    assert counted == [{}, {"not-json": 1}]
    assert found.next_ms() is None
    assert dict(found.rejected) == {"not-json": 2}


def test_whoever_is_ahead_is_not_read_on() -> None:
    source = Log({0: [50] * 1_000, 1: [*range(40), 60]}, lambda: 2)
    found = TopicInput(source, FORMAT, {0: 0, 1: 0}, {0: 1_000, 1: 41})  # type: ignore[arg-type]
    assert len(taken(found.until(BASE + 45))) == 40
    assert source.fetched[1] == 41
    assert source.fetched[0] <= 4
    assert len(taken(found.until(None))) == 1_001


def test_a_partition_without_readings_keeps_nobody_waiting() -> None:
    reader = Reader({0: [], 1: [..., ...], 2: [None], 5: [3]}, 1)
    assert reader.input.next_ms() == BASE + 3
    assert reader.until(None) == [(5, 0)]
    assert reader.input.partitions == [0, 1, 2, 5]
