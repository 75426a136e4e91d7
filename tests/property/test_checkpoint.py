"""State survives: whatever way a log is cut, checkpointed and taken up again, the table is the same."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.stream.checkpoint import MANIFEST, CheckpointWriter, assemble, read_manifest
from pipeline.stream.state import Snapshot
from pipeline.stream.task import ForecastTask
from tests.helpers.streams import HOUR, START, cut, reading, records, task_settings

SETTINGS = task_settings(grace_ms=HOUR // 2, aggregates=("mean", "last"))

events = st.lists(
    st.tuples(st.sampled_from("abcdefg"), st.integers(0, 12 * HOUR), st.one_of(st.none(), st.floats(-5, 5, width=32))),
    min_size=1,
    max_size=60,
)


def stream(found):
    return [reading(name, START + at, value=value) for name, at, value in found]


def equal(one: Snapshot, other: Snapshot) -> None:
    assert one.sensors == other.sensors
    for name, values in one.rows.items():
        np.testing.assert_array_equal(values, other.rows[name], err_msg=name)
    for name, values in one.partition.items():
        np.testing.assert_array_equal(values, other.partition[name], err_msg=name)


@settings(max_examples=60, deadline=None)
@given(events, st.sets(st.integers(1, 59), max_size=6), st.sets(st.integers(1, 59), max_size=6))
def test_restored_at_any_offsets_the_table_is_that_of_an_undisturbed_run(found, checkpoints, crashes) -> None:
    """A crash forgets everything since the newest checkpoint; reading again from there brings it back."""
    pairs = stream(found)
    undisturbed = ForecastTask(SETTINGS)
    undisturbed.run(records(pairs))
    topic: dict[bytes, bytes] = {}
    task, writer = begin(topic)
    for first, part in cut(pairs, [edge for edge in checkpoints | crashes if edge < len(pairs)]):
        if first in crashes:
            task, writer = begin(topic)
            stands_at = read_manifest(topic[MANIFEST]).offset if MANIFEST in topic else 0
            if stands_at < first:
                task.run(records(pairs[stands_at:first], stands_at))
        if first in checkpoints:
            topic.update({key: value for key, value in writer.capture(first).records if value is not None})
        task.run(records(part, first))
    equal(task.table.snapshot(), undisturbed.table.snapshot())


def begin(topic: dict[bytes, bytes]) -> tuple[ForecastTask, CheckpointWriter]:
    task = ForecastTask(SETTINGS)
    if MANIFEST not in topic:
        return task, CheckpointWriter(task.table, "g", "", 16)
    checkpoint = assemble(read_manifest(topic[MANIFEST]), topic)
    writer = CheckpointWriter(task.table, "g", "", 16, topic)
    task.table.restore(checkpoint.snapshot)
    writer.restored(checkpoint.manifest)
    return task, writer


@settings(max_examples=40, deadline=None)
@given(events, st.sets(st.integers(1, 59), max_size=8))
def test_what_a_row_holds_does_not_depend_on_how_the_log_was_cut(found, edges) -> None:
    pairs = stream(found)
    whole, pieces = ForecastTask(SETTINGS), ForecastTask(SETTINGS)
    whole.run(records(pairs))
    for first, part in cut(pairs, [edge for edge in edges if edge < len(pairs)]):
        pieces.run(records(part, first))
    equal(whole.table.snapshot(), pieces.table.snapshot())


@settings(max_examples=40, deadline=None)
@given(events, st.integers(0, 6 * HOUR))
def test_provisional_forecasts_leave_no_trace(found, idle_ms) -> None:
    task = ForecastTask(SETTINGS)
    task.run(records(stream(found)))
    before = task.table.snapshot()
    task.provisional("t", 0, idle_ms, len(found) - 1)
    equal(before, task.table.snapshot())
