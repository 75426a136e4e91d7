import numpy as np
import pytest

from models.forecaster import Column
from pipeline.stream.state import SensorTable

COLUMNS = (
    Column("hidden", (2, 3), np.dtype(np.float32)),
    Column("last", (), np.dtype(np.float64), fill=np.nan),
    Column("mean", (), np.dtype(np.float64), fill=7.0, survives_reset=True),
)
CLOCK = (Column("stream_time", (), np.dtype(np.int64), fill=-1),)


def make_table(capacity: int = 2) -> SensorTable:
    return SensorTable(COLUMNS, CLOCK, capacity)


def test_sensors_get_slots_in_order_of_first_appearance_and_keep_them_while_the_table_grows() -> None:
    table = make_table()
    first = table.slots([b"b", b"a", b"b"])
    table.scatter(first[:2], {"last": np.array([1.0, 2.0])})
    later = table.slots([b"s%d" % i for i in range(1000)] + [b"a", b"b"])
    assert first.tolist() == [0, 1, 0]
    assert later.tolist() == [*range(2, 1002), 1, 0]
    assert table["last"][:2].tolist() == [1.0, 2.0]
    assert np.isnan(table["last"][2:]).all()
    assert table.sensors[:3] == [b"b", b"a", b"s0"]


def test_names_are_the_sensors_ids_as_texts_however_the_table_grew() -> None:
    table = make_table()
    first = table.slots(["Pumpe-Süd".encode(), b"a"])
    assert table.names(first[::-1]) == ["a", "Pumpe-Süd"]
    later = table.slots([b"s%d" % i for i in range(500)] + [b"a"])
    assert table.names(later) == [f"s{i}" for i in range(500)] + ["a"]
    assert table.names(first) == ["Pumpe-Süd", "a"]
    assert table.names(np.empty(0, np.int32)) == []


def test_names_are_those_of_what_was_restored() -> None:
    table, other = make_table(), make_table()
    table.names(table.slots([b"old-1", b"old-2", b"old-3"]))
    other.slots([b"new-1", b"new-2"])
    table.restore(other.snapshot())
    assert table.names(np.array([1, 0], np.int32)) == ["new-2", "new-1"]
    assert table.names(table.slots([b"new-3", b"new-1"])) == ["new-3", "new-1"]


def test_gathered_rows_are_copies_until_they_are_scattered() -> None:
    table = make_table()
    slots = table.slots([b"a", b"b"])
    rows = table.gather(slots)
    rows["hidden"][:] = 5
    assert (table["hidden"] == 0).all()
    table.scatter(slots, rows)
    assert (table["hidden"] == 5).all()


def test_a_reset_forgets_all_but_what_survives_it() -> None:
    table = make_table()
    slots = table.slots([b"a", b"b"])
    table.scatter(slots, {"hidden": np.ones((2, 2, 3), np.float32), "last": np.ones(2), "mean": np.ones(2)})
    table.refill(slots[:1], table.columns)
    assert (table["hidden"][0] == 0).all()
    assert (table["hidden"][1] == 1).all()
    assert np.isnan(table["last"][0])
    assert table["mean"].tolist() == [1.0, 1.0]


def test_a_restored_table_equals_the_one_it_was_taken_from_and_shares_nothing_with_it() -> None:
    table = make_table()
    slots = table.slots([b"a", b"b", b"c"])
    table.scatter(slots, {"last": np.array([1.0, 2.0, 3.0])})
    table.partition["stream_time"][...] = 99
    snapshot = table.snapshot()
    other = make_table()
    other.slots([b"x"] * 1 + [b"y%d" % i for i in range(9)])
    other.restore(snapshot)
    table["last"][:] = 0
    table.partition["stream_time"][...] = 0
    assert other.sensors == [b"a", b"b", b"c"]
    assert other["last"].tolist() == [1.0, 2.0, 3.0]
    assert int(other.partition["stream_time"]) == 99
    assert np.isnan(other.gather(other.slots([b"new"]))["last"]).all()


def test_a_snapshot_with_other_columns_is_refused() -> None:
    with pytest.raises(ValueError, match="snapshot holds columns"):
        SensorTable(COLUMNS[:1]).restore(make_table().snapshot())


def test_bytes_per_sensor_is_the_sum_of_the_columns() -> None:
    assert make_table().bytes_per_sensor == 2 * 3 * 4 + 8 + 8
