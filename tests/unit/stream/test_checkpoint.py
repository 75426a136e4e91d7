import msgspec
import numpy as np
import pytest

from models.forecaster import Column
from pipeline.stream.checkpoint import (
    LAYOUT,
    MANIFEST,
    CheckpointError,
    CheckpointPolicy,
    CheckpointWriter,
    assemble,
    block_slots,
    read_manifest,
    require_columns,
)
from pipeline.stream.state import STEPS, WINDOWS, SensorTable

COLUMNS = (
    Column("window.sum", (2,), np.dtype(np.float64)),
    Column("memory.last", (), np.dtype(np.float64), fill=np.nan),
    Column("rnn.hidden", (1, 3), np.dtype(np.float32)),
)
CLOCK = (Column("window.stream_time_ms", (), np.dtype(np.int64), fill=-1),)
SLOTS = 4


def make_table() -> SensorTable:
    return SensorTable(COLUMNS, CLOCK)


def make_writer(table, written=(), slots=SLOTS, model="gru8-abc"):
    writer = CheckpointWriter(table, "group", model, 16, written)
    writer._slots = slots  # a few sensors, several blocks
    return writer


def write(topic, capture):
    """What a compacted topic holds after the capture."""
    for key, value in capture.records:
        if value is None:
            topic.pop(key, None)
        else:
            topic[key] = value
    return [key.decode() for key, _ in capture.records]


def read(topic):
    return assemble(read_manifest(topic[MANIFEST]), topic)


def fill(table, sensors, value):
    slots = table.slots(sensors)
    rows = table.gather(slots)
    for column in rows.values():
        column[:] = value
    table.scatter(slots, rows)
    table.touch(slots, WINDOWS, STEPS)
    return slots


def same(one, other):
    assert one.sensors == other.sensors
    for mine, theirs in ((one.rows, other.rows), (one.partition, other.partition)):
        assert mine.keys() == theirs.keys()
        for name in mine:
            assert mine[name].dtype == theirs[name].dtype
            np.testing.assert_array_equal(mine[name], theirs[name])


def test_what_is_read_back_is_what_the_table_held():
    table, topic = make_table(), {}
    fill(table, [b"s%d" % n for n in range(10)], 1.5)
    table.partition["window.stream_time_ms"][...] = 77
    write(topic, make_writer(table).capture(5))
    checkpoint = read(topic)
    assert (checkpoint.offset, checkpoint.model, checkpoint.manifest.group) == (5, "gru8-abc", "group")
    same(checkpoint.snapshot, table.snapshot())


def test_only_blocks_that_changed_are_written_again():
    table, topic = make_table(), {}
    writer = make_writer(table)
    fill(table, [b"s%d" % n for n in range(10)], 1.0)
    first = write(topic, writer.capture(5))
    assert [key for key in first if key.startswith("sensors")] == [f"sensors/0000000{n}" for n in range(3)]
    table["window.sum"][5] = 9.0
    table.touch(np.array([5], np.int32), WINDOWS)
    assert write(topic, writer.capture(6)) == ["windows/00000001", "partition", "manifest"]
    fill(table, [b"new"], 3.0)
    assert write(topic, writer.capture(7)) == [
        "sensors/00000002",
        "windows/00000002",
        "steps/00000002",
        "partition",
        "manifest",
    ]
    assert write(topic, writer.capture(8)) == ["partition", "manifest"]
    same(read(topic).snapshot, table.snapshot())


def test_a_sensor_of_which_only_a_late_reading_came_is_whole_too():
    table, topic = make_table(), {}
    table.touch(table.slots([b"late"]), WINDOWS)
    write(topic, make_writer(table).capture(1))
    assert np.isnan(read(topic).snapshot.rows["memory.last"]).all()


def test_a_restored_table_goes_on_where_the_old_one_stood():
    table, topic = make_table(), {}
    fill(table, [b"s%d" % n for n in range(10)], 1.0)
    write(topic, make_writer(table).capture(5))
    checkpoint = read(topic)
    again = make_table()
    writer = make_writer(again, topic)
    again.restore(checkpoint.snapshot)
    writer.restored(checkpoint.manifest)
    fill(again, [b"s9"], 4.0)
    assert "windows/00000000" not in write(topic, writer.capture(9))
    same(read(topic).snapshot, again.snapshot())


def test_states_begun_anew_leave_no_block_of_the_old_ones_behind():
    table, topic = make_table(), {}
    fill(table, [b"s%d" % n for n in range(10)], 1.0)
    write(topic, make_writer(table).capture(5))
    fewer = make_table()
    fill(fewer, [b"t0"], 2.0)
    write(topic, make_writer(fewer, topic).capture(2))
    assert sorted(key.decode() for key in topic) == [
        "manifest",
        "partition",
        "sensors/00000000",
        "steps/00000000",
        "windows/00000000",
    ]
    same(read(topic).snapshot, fewer.snapshot())


def test_blocks_of_another_size_are_written_anew():
    table, topic = make_table(), {}
    fill(table, [b"s%d" % n for n in range(10)], 1.0)
    write(topic, make_writer(table, slots=2).capture(5))
    checkpoint, again = read(topic), make_table()
    writer = make_writer(again, topic, slots=8)
    again.restore(checkpoint.snapshot)
    writer.restored(checkpoint.manifest)
    write(topic, writer.capture(5))
    assert len(topic) == 2 + 3 * 2
    same(read(topic).snapshot, table.snapshot())


def test_an_empty_table_is_a_checkpoint_as_well():
    topic = {}
    write(topic, make_writer(make_table()).capture(42))
    assert read(topic).offset == 42
    assert read(topic).snapshot.sensors == ()


def damaged(change):
    table, topic = make_table(), {}
    fill(table, [b"s%d" % n for n in range(10)], 1.0)
    write(topic, make_writer(table).capture(5))
    change(topic)
    with pytest.raises(CheckpointError) as raised:
        read(topic)
    return raised.value


def test_a_missing_block_is_named():
    error = damaged(lambda topic: topic.pop(b"steps/00000002"))
    assert error.reason == "damaged"
    assert "steps/00000002 is missing" in str(error)


def test_a_block_of_another_checkpoint_is_noticed():
    def older(topic):
        value = bytearray(topic[b"windows/00000001"])
        value[-1] ^= 1
        topic[b"windows/00000001"] = bytes(value)

    error = damaged(older)
    assert error.reason == "damaged"
    assert "windows/00000001 is not the one" in str(error)


def test_another_layout_is_refused_before_anything_else_is_believed():
    def newer(topic):
        topic[MANIFEST] = b'{"layout": %d, "whatever": true}' % (LAYOUT + 1)

    error = damaged(newer)
    assert error.reason == "layout"
    assert f"version {LAYOUT + 1}, this Millrace reads and writes version {LAYOUT}" in str(error)


@pytest.mark.parametrize("value", [b"", b"{}", b'{"layout": 1}', b"\xff"])
def test_what_is_no_manifest_is_damage(value):
    assert damaged(lambda topic: topic.update({MANIFEST: value})).reason == "damaged"


def test_rows_of_another_shape_are_refused_with_both_shapes():
    table, topic = make_table(), {}
    fill(table, [b"a"], 1.0)
    write(topic, make_writer(table).capture(5))
    other = SensorTable((*COLUMNS[:2], Column("rnn.hidden", (1, 8), np.dtype(np.float32))), CLOCK)
    with pytest.raises(CheckpointError, match=r"rnn.hidden is <f4\[1, 3\], these settings give <f4\[1, 8\]") as raised:
        require_columns(read(topic).manifest, other)
    assert raised.value.reason == "columns"
    require_columns(read(topic).manifest, make_table())


def test_the_manifest_is_readable_json():
    table, topic = make_table(), {}
    fill(table, [b"a"], 1.0)
    write(topic, make_writer(table).capture(5))
    assert msgspec.json.decode(topic[MANIFEST])["offset"] == 5


@pytest.mark.parametrize(("bytes_per_row", "expected"), [(4, 1024), (4_000, 64), (300_000, 1), (800_000, 1)])
def test_a_block_fits_into_a_record(bytes_per_row, expected):
    columns = [Column("memory.ring", (bytes_per_row // 4,), np.dtype(np.float32))]
    assert block_slots(columns, max_sensor_bytes=256) == expected


def test_checkpoints_take_no_more_than_a_tenth_of_the_time():
    policy = CheckpointPolicy(every_ms=1_000, now_ms=0, phase=0.5, stands_at=3)
    assert not policy.should_checkpoint(499, 4)
    assert policy.should_checkpoint(500, 4)
    policy.done(now_ms=1_000, took_ms=400, offset=4)
    assert not policy.should_checkpoint(4_999, 5)
    assert policy.should_checkpoint(5_000, 5)
    assert not policy.should_checkpoint(5_000, 4)  # nothing came
