"""When one partition has something to commit, and what."""

import pytest

from pipeline.errors import DeploymentError
from pipeline.service.serving import NOWHERE, Serving, require_small_rows
from pipeline.settings import load
from pipeline.stream.checkpoint import CheckpointPolicy, CheckpointWriter
from pipeline.stream.task import ForecastTask
from tests.helpers.streams import fleet, records, task_settings

TOPICS = load(None, {}, {"topics.domain": "plant"}).topics


def serving(committed=None, start=0, emit_from=0, stands_at=0, every_ms=1_000):
    task = ForecastTask(task_settings(), emit_from=emit_from)
    writer = CheckpointWriter(task.table, "g", "", 256)
    return Serving(3, TOPICS, task, writer, CheckpointPolicy(every_ms, 0, 0.5, stands_at), committed, start, 0)


def take(one, pairs, first=0, now_ms=0):
    return one.run(records(pairs, first), now_ms)


def test_nothing_came_nothing_is_due():
    assert serving(committed=0).work(0, 0, at_end=False) is None


def test_what_was_made_leaves_once_with_the_offset_that_follows_from_it():
    one = serving(committed=0)
    take(one, fleet(sensors=2, hours=3))
    work = one.work(12, 100, at_end=False)
    assert (work.offset, work.capture) == (12, None)
    assert [(batch.topic, len(batch)) for batch in work.outgoing] == [("plant.forecasts.v1", 4), ("plant.scores.v1", 2)]
    one.committed_work(work, 100, 1)
    assert (one.committed, one.emit_from) == (12, 12)
    assert one.work(12, 200, at_end=False) is None


def test_offsets_that_only_hold_control_records_are_committed_too():
    one = serving(committed=5, start=5, emit_from=5, stands_at=5)
    assert one.work(7, 0, at_end=False).offset == 7


def test_a_checkpoint_in_mid_replay_leaves_the_committed_offset_where_it_is():
    one = serving(committed=12, emit_from=12, stands_at=0)
    take(one, fleet(sensors=2, hours=3)[:8])
    assert one.work(8, 100, at_end=False) is None
    work = one.work(8, 600, at_end=False)
    assert (work.offset, work.capture.offset, work.outgoing) == (12, 8, [])


def test_the_first_checkpoint_is_due_at_once_and_a_last_one_at_the_end():
    fresh = serving(stands_at=None)
    assert fresh.work(0, 0, at_end=False).capture.offset == 0
    one = serving(committed=0, every_ms=10**9)
    take(one, fleet(sensors=2, hours=3))
    assert one.work(12, 1, at_end=False).capture is None
    assert one.work(12, 1, at_end=True).capture.offset == 12


def test_a_position_behind_what_was_taken_in_is_not_believed():
    one = serving(committed=0, stands_at=NOWHERE)
    take(one, fleet(sensors=2, hours=3))
    assert one.work(0, 10**6, at_end=True) is None


def test_records_that_come_again_are_a_bug_and_no_second_answer():
    one = serving(committed=0)
    take(one, fleet(sensors=2, hours=3))
    with pytest.raises(RuntimeError, match=r"plant\.readings\.v1-0: offset 5 came after 11"):
        take(one, fleet(sensors=2, hours=3), first=5)


def test_silence_is_answered_once_and_not_while_rebuilding():
    one = serving(committed=0)
    take(one, fleet(sensors=2, hours=3), now_ms=1_000)
    topic = "plant.readings.v1"
    assert one.speak_provisionally(1_500, 1_000, topic) == 0
    assert one.speak_provisionally(1_000 + 3_600_000, 1_000, topic) == 2
    assert one.speak_provisionally(1_000 + 9_000_000, 1_000, topic) == 0
    rebuilding = serving(committed=100, emit_from=100)
    take(rebuilding, fleet(sensors=2, hours=3))
    assert rebuilding.speak_provisionally(10**9, 1_000, topic) == 0


def test_a_row_that_no_record_can_hold_is_refused_before_anything_is_read():
    require_small_rows(task_settings(), None, 256)
    with pytest.raises(DeploymentError, match=r"1,200,\d\d\d bytes \(steps\).*forecast\.season"):
        require_small_rows(task_settings(seasons=(300_000,)), None, 256)
