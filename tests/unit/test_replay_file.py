"""Files of any layout to readings, and readings to records, without a broker."""

from __future__ import annotations

import gzip
import json
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.kafka.sink import Partitioner, partition_for
from pipeline.service.files import FileBatch, FileError, FileLayout, LayoutError, read_columns, read_file
from pipeline.service.replay import READINGS_AT_ONCE, ReadingEncoder, check_speed, encode_values, paced
from pipeline.stream.columns import RecordColumns
from pipeline.stream.serdes import ReadingDecoder, ReadingFormat
from tests.helpers.clock import Wall

HOUR = 3_600_000
START = 1_467_331_200_000  # 2016-07-01T00:00Z
WIDE = FileLayout("date", ("a", "b"))


def written(folder: Path, content: str | bytes, name: str = "file.csv") -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def readings(
    path: Path | pd.DataFrame, layout: FileLayout, from_ms: int | None = None, to_ms: int | None = None
) -> list[tuple]:
    """(sensor, event time, *values) of each reading; None for a missing value."""
    return [
        (batch.sensors[code], time_ms, *(None if np.isnan(value) else value for value in row))
        for batch in read_file(path, layout, from_ms, to_ms)
        for code, time_ms, row in zip(batch.codes.tolist(), batch.event_time_ms.tolist(), batch.values.tolist())
    ]


def test_in_a_wide_file_each_value_column_is_a_sensor(tmp_path):
    path = written(tmp_path, "date,a,b,c\n2016-07-01 00:00:00,1,2,x\n2016-07-01 01:00:00,3.5,,x\n")
    expected = [("a", START, 1.0), ("b", START, 2.0), ("a", START + HOUR, 3.5), ("b", START + HOUR, None)]
    assert readings(path, WIDE) == expected
    assert readings(path, FileLayout("date", ("*",))) == expected
    assert next(read_file(path, WIDE)).field_names == ("value",)


def test_in_a_long_file_each_row_is_a_reading_and_every_other_numeric_column_a_field(tmp_path):
    path = written(tmp_path, "t,machine,note,heat,rpm\n0,007,x,1.5,10\n60,8,y,NA,20\n60,007,,3,nan\n")
    layout = FileLayout("t", id_column="machine")
    batch = next(read_file(path, layout))
    assert batch.field_names == ("heat", "rpm")
    assert readings(path, layout) == [("007", 0, 1.5, 10.0), ("8", 60_000, None, 20.0), ("007", 60_000, 3.0, None)]


def test_the_fields_of_a_long_file_can_be_chosen(tmp_path):
    path = written(tmp_path, "t,machine,heat,rpm\n0,7,1.5,10\n")
    assert readings(path, FileLayout("t", ("rpm",), id_column="machine")) == [("7", 0, 10.0)]


def test_a_whole_file_can_be_one_sensor(tmp_path):
    path = written(tmp_path, "datetime;Current;Pressure\r\n2016-07-01 00:00:00;0.5;-1\r\n")
    assert readings(path, FileLayout("datetime", sensor="rig")) == [("rig", START, 0.5, -1.0)]


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_the_separator_is_found_out(tmp_path, separator):
    path = written(tmp_path, "date,a,b\n2016-07-01,1,2\n".replace(",", separator))
    assert readings(path, WIDE) == [("a", START, 1.0), ("b", START, 2.0)]


def test_a_decimal_comma_is_read_where_it_is_said(tmp_path):
    path = written(tmp_path, "date;a;b\n01.07.2016 00:00;1,5;2\n")
    layout = FileLayout("date", ("a", "b"), decimal=",")
    assert readings(path, layout) == [("a", START, 1.5), ("b", START, 2.0)]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "latin-1", "utf-16"])
def test_the_encoding_is_found_out(tmp_path, encoding):
    path = written(tmp_path, "date,T (°C),SWDR (W/m²)\n2016-07-01,1,2\n".encode(encoding))
    assert readings(path, FileLayout("date", ("T (°C)", "SWDR (W/m²)")))[0] == ("T (°C)", START, 1.0)


def test_a_compressed_file_is_read_as_it_is(tmp_path):
    path = written(tmp_path, gzip.compress(b"date,a,b\n2016-07-01,1,2\n"), "file.csv.gz")
    assert readings(path, WIDE) == [("a", START, 1.0), ("b", START, 2.0)]


@pytest.mark.parametrize(
    "text",
    [
        "2016-07-01",
        "2016-07-01 00:00:00",
        "2016-07-01T00:00:00Z",
        "2016-07-01T02:00:00+02:00",
        "2016/7/1 0:00",
        "01.07.2016 00:00:00",
        "1-Jul-2016",
        "20160701",
        "1467331200",
        "1467331200.0",
        "1467331200000",
        "1467331200000000",
        "1467331200000000000",
    ],
)
def test_times_are_read_however_they_are_written(tmp_path, text):
    path = written(tmp_path, f"date,a,b\n{text},1,2\n")
    assert readings(path, WIDE)[0] == ("a", START, 1.0)


@pytest.mark.parametrize(("days", "format"), [("1/{}/2010 0:00", "%m"), ("{}/1/2010 0:00", "%d")])
def test_month_and_day_are_told_apart_by_a_later_row(tmp_path, days, format):
    rows = "".join(f"{days.format(day)},1,2\n" for day in range(1, 32))
    found = readings(written(tmp_path, f"date,a,b\n{rows}"), WIDE)
    assert [time_ms for sensor, time_ms, _ in found if sensor == "a"] == [
        int(datetime(2010, 1, day, tzinfo=UTC).timestamp() * 1000) for day in range(1, 32)
    ]


def test_a_date_that_may_be_two_days_is_asked_about(tmp_path):
    path = written(tmp_path, "date,a,b\n1/2/2010 0:00,1,2\n1/3/2010 0:00,1,2\n")
    with pytest.raises(FileError, match=r"2 January 2010 .* or 1 February 2010 .*--time-format"):
        readings(path, WIDE)
    layout = FileLayout("date", ("a",), time_format="%d/%m/%Y %H:%M")
    assert readings(path, layout)[0] == ("a", 1_264_982_400_000, 1.0)


@pytest.mark.parametrize(("unit", "number"), [("s", 5), ("ms", 5_000), ("us", 5_000_000), ("ns", 5_000_000_000)])
def test_an_epoch_too_small_to_tell_its_unit_is_read_as_said(tmp_path, unit, number):
    path = written(tmp_path, f"date,a,b\n{number},1,2\n")
    assert readings(path, FileLayout("date", ("a",), time_format=unit)) == [("a", 5_000, 1.0)]


def long_frame(rows: int) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "at": pd.date_range("2016-07-01", periods=rows, freq="1min"),
            "machine": pd.Categorical([f"m{n % 3}" for n in range(rows)]),
            "heat": np.where(np.arange(rows) % 5, np.arange(rows) / 7, np.nan),
            "count": np.arange(rows, dtype=np.int32),
        }
    )


def test_parquet_and_csv_hold_the_same_readings(tmp_path):
    frame = long_frame(1_000)
    frame.to_csv(tmp_path / "f.csv", index=False)
    frame.to_parquet(tmp_path / "f.parquet")
    layout = FileLayout("at", id_column="machine")
    from_parquet = readings(tmp_path / "f.parquet", layout)
    assert from_parquet == readings(tmp_path / "f.csv", layout)
    assert len(from_parquet) == 1_000
    assert from_parquet[7] == ("m1", START + 7 * 60_000, 1.0, 7.0)


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
@pytest.mark.parametrize("zone", [None, "Europe/Berlin"])
def test_times_in_parquet_have_any_unit_and_zone(tmp_path, unit, zone):
    times = pd.DatetimeIndex(["2016-07-01"], tz="UTC").tz_convert(zone).as_unit(unit)
    pd.DataFrame({"date": times, "a": [1.0], "b": [2]}).to_parquet(tmp_path / "f.parquet")
    assert readings(tmp_path / "f.parquet", WIDE) == [("a", START, 1.0), ("b", START, 2.0)]


# -- a DataFrame in place of a file

LONG = FileLayout("ds", ("y",), id_column="unique_id")


def nixtla(**columns: object) -> pd.DataFrame:
    times = pd.to_datetime(["2016-07-01 00:00", "2016-07-01 00:00", "2016-07-01 01:00"])
    return pd.DataFrame({"unique_id": ["a", "b", "a"], "ds": times, "y": [1.0, 2.0, 3.0]} | columns)


def test_a_frame_holds_the_readings_of_the_file_it_would_be(tmp_path):
    frame = long_frame(1_000)
    frame.to_parquet(tmp_path / "f.parquet")
    layout = FileLayout("at", id_column="machine")
    assert readings(frame, layout) == readings(tmp_path / "f.parquet", layout)
    wide = pd.DataFrame({"date": pd.to_datetime(["2016-07-01"]), "a": [1], "b": [np.nan], "note": ["x"]})
    assert readings(wide, FileLayout("date", ("*",))) == [("a", START, 1.0), ("b", START, None)]


def test_a_frame_is_left_as_it_was():
    frame = nixtla(y=[1.0, np.inf, np.nan])
    before = frame.copy()
    assert [value for *_, value in readings(frame, LONG)] == [1.0, None, None]
    pd.testing.assert_frame_equal(frame, before)


@pytest.mark.parametrize(
    "y",
    [
        np.array([1, 2, 3], np.int8),
        np.array([1, 2, 3], np.float32),
        pd.array([1, 2, 3], dtype="Int64"),
        pd.array([1, 2, 3], dtype="UInt16"),
        pd.Series([1, 2.0, 3], dtype=object),
        [Decimal("1.00"), Decimal("2.00"), Decimal("3.00")],
    ],
    ids=["int8", "float32", "Int64", "UInt16", "object", "decimal"],
)
def test_values_of_a_frame_are_numbers_of_any_kind(y):
    assert readings(nixtla(y=y), LONG) == [("a", START, 1.0), ("b", START, 2.0), ("a", START + HOUR, 3.0)]


@pytest.mark.parametrize(
    "y", [pd.array([1, None, 3], dtype="Int64"), pd.Series([1, None, 3], dtype=object), [1.0, np.nan, -np.inf]]
)
def test_missing_values_of_a_frame_are_missing(y):
    assert readings(nixtla(y=y), LONG)[1] == ("b", START, None)


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
@pytest.mark.parametrize("zone", [None, "UTC", "Europe/Berlin"])
def test_times_of_a_frame_have_any_unit_and_zone(unit, zone):
    times = nixtla()["ds"].dt.as_unit(unit)
    times = times if zone is None else times.dt.tz_localize("UTC").dt.tz_convert(zone)
    assert [time for _, time, _ in readings(nixtla(ds=times), LONG)] == [START, START, START + HOUR]


def test_a_time_with_a_zone_is_that_moment_and_one_without_is_utc():
    times = nixtla()["ds"].dt.tz_localize("Europe/Berlin")  # two hours ahead of UTC in July
    assert readings(nixtla(ds=times), LONG)[0][1] == START - 2 * HOUR


@pytest.mark.parametrize("divisor", [1_000, 1])
def test_times_of_a_frame_may_be_epochs_by_their_size(divisor):
    times = [time_ms // divisor for time_ms in (START, START, START + HOUR)]
    assert [time for _, time, _ in readings(nixtla(ds=times), LONG)] == [START, START, START + HOUR]


@pytest.mark.parametrize(
    "ds",
    [
        pd.Series([datetime(2016, 7, 1)] * 3, dtype=object),
        pd.Series([date(2016, 7, 1)] * 3, dtype=object),
        ["2016-07-01", "2016-07-01", "2016-07-01"],
        pd.Series(["2016-07-01"] * 3, dtype=object),
    ],
    ids=["datetime", "date", "text", "object"],
)
def test_times_of_a_frame_may_be_objects_and_texts(ds):
    assert {time for _, time, _ in readings(nixtla(ds=ds), LONG)} == {START}


def test_times_of_a_frame_may_lie_before_1970():
    times = pd.to_datetime(["1969-12-31 23:00", "1960-01-01 00:00", "1970-01-01 00:00"])
    assert [time for _, time, _ in readings(nixtla(ds=times), LONG)] == [-HOUR, -315_619_200_000, 0]


@pytest.mark.parametrize(
    ("ids", "names"),
    [
        ([1, 2, 1], ["1", "2", "1"]),
        (pd.Categorical(["x", "y", "x"]), ["x", "y", "x"]),
        (["ä", "b", "ä"], ["ä", "b", "ä"]),
    ],
)
def test_ids_of_a_frame_are_texts_numbers_or_categories(ids, names):
    assert [sensor for sensor, *_ in readings(nixtla(unique_id=ids), LONG)] == names


def test_the_index_of_a_frame_tells_nothing():
    frame = nixtla()
    for index in ([5, 5, 5], ["x", "y", "z"], pd.date_range("2020", periods=3)):
        assert readings(frame.set_axis(index), LONG) == readings(frame, LONG)
    with pytest.raises(LayoutError, match=r"time column 'ds' is not in the DataFrame.*unique_id"):
        readings(frame.set_index("ds"), LONG)


def test_a_frame_of_many_rows_comes_in_batches_that_say_how_far_they_are():
    frame = pd.DataFrame({"date": START + np.arange(120_000) * 1_000, "a": 1.0, "b": np.arange(120_000.0)})
    batches = list(read_file(frame, WIDE, to_ms=START + 110_000_000))
    assert len(batches) > 1
    assert max(map(len, batches)) <= 100_000
    assert np.array_equal(np.concatenate([batch.values[1::2, 0] for batch in batches]), np.arange(110_000))
    shares = [batch.share_read for batch in batches]
    assert shares == sorted(shares)
    assert shares[-1] > 0.9


def test_a_frame_without_rows_has_no_readings():
    assert list(read_file(nixtla().iloc[:0], LONG)) == []


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"y": pd.Series([1, "warm", 2.0], dtype=object)}, ["neither times, texts nor numbers", "column y", "'warm'"]),
        ({"y": [1j, 2j, 3j]}, ["neither times, texts nor numbers", "column y"]),
        ({"y": ["1", "2", "warm"]}, ["the DataFrame, column 'y'", "expected numbers"]),
        ({"y": nixtla()["ds"]}, ["the DataFrame, column 'y'", "timestamp", "expected numbers"]),
        ({"unique_id": pd.Series([1, "b", 2], dtype=object)}, ["neither times, texts nor numbers", "column unique_id"]),
        ({"unique_id": ["a", None, "b"]}, ["column 'unique_id', row 2: empty"]),
        ({"unique_id": ["a", "b", np.nan]}, ["column 'unique_id', row 3: empty"]),
        ({"ds": pd.to_datetime(["2016-07-01", None, "2016-07-02"])}, ["column 'ds', row 2: no time"]),
        ({"ds": ["2016-07-01", "soon", "2016-07-02"]}, ["column 'ds', row 2: 'soon' is no time"]),
    ],
)
def test_what_a_frame_holds_that_is_no_reading_is_named(columns, words):
    with pytest.raises(FileError) as caught:
        readings(nixtla(**columns), LONG)
    for word in words:
        assert word in str(caught.value)


def test_a_file_of_many_blocks_is_read_in_batches_that_say_how_far_they_are(tmp_path):
    frame = long_frame(120_000)
    frame.to_csv(tmp_path / "f.csv", index=False)
    batches = list(read_file(tmp_path / "f.csv", FileLayout("at", id_column="machine")))
    assert len(batches) > 1
    assert np.array_equal(np.concatenate([b.values[:, 1] for b in batches]), frame["count"])
    assert np.array_equal(np.concatenate([b.event_time_ms for b in batches]), START + np.arange(120_000) * 60_000)
    shares = [batch.share_read for batch in batches]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_only_what_lies_inside_the_range_is_read(tmp_path):
    # [from ---- to)
    path = written(tmp_path, "date,a,b\n" + "".join(f"2016-07-01 0{hour}:00:00,{hour},0\n" for hour in range(5)))
    found = readings(path, FileLayout("date", ("a",)), START + HOUR, START + 3 * HOUR)
    assert [value for _, _, value in found] == [1.0, 2.0]


def test_infinity_is_a_missing_value(tmp_path):
    assert readings(written(tmp_path, "date,a,b\n2016-07-01,inf,-inf\n"), WIDE) == [
        ("a", START, None),
        ("b", START, None),
    ]


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        (FileLayout(""), ["no time column", "date (text, such as 2016-07-01)", "a (numbers, such as 1)"]),
        (FileLayout("date"), ["--value-columns", "--id-column", "a (numbers, such as 1)"]),
        (FileLayout("dat", ("a",)), ["time column 'dat'", "did you mean 'date'?"]),
        (FileLayout("date", ("pressure",)), ["value column 'pressure'", "has the columns date"]),
        (FileLayout("date", id_column="names"), ["id column 'names'", "did you mean 'name'?"]),
        (FileLayout("date", ("date",)), ["column 'date' is a value column and the time"]),
        (FileLayout("date", ("a", "a")), ["each once"]),
        (FileLayout("date", ("a",), id_column="name", sensor="x"), ["one of the two"]),
        (FileLayout("date", ("a",), encoding="klingon"), ["encoding 'klingon' is unknown"]),
        (FileLayout("date", ("a",), separator="::"), ["one character"]),
    ],
)
def test_a_layout_that_does_not_fit_is_told_what_the_file_has(tmp_path, layout, words):
    path = written(tmp_path, "date,name,a\n2016-07-01,x,1\n")
    with pytest.raises(LayoutError) as caught:
        readings(path, layout)
    for word in words:
        assert word in str(caught.value)


def test_a_name_that_two_columns_bear_is_refused(tmp_path):
    with pytest.raises(LayoutError, match="2 columns of that name"):
        readings(written(tmp_path, "date,a,a\n2016-07-01,1,2\n"), FileLayout("date", ("a",)))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("date,a,b\n2016-07-01,1,2\n2016-07-02,1,warm\n", ["'b'", "#3", "'warm'"]),
        ("date,a,b\n2016-07-01,1,2\nsome day,1,2\n", ["'date', row 2", "'some day' is no time", "--time-format"]),
        ("date,a,b\n2016-07-01,1,2\n,1,2\n", ["'date', row 2", "no time"]),
        ("date,a,b\nMonday,1,2\n", ["'date', row 1", "'Monday' is written in no way known here"]),
        ("date,a,b\n2016-07-01,1\n", ["Expected 3 columns, got 2"]),
        ("", ["is empty"]),
        ("PAR1 and then nothing", ["damaged Parquet"]),
    ],
)
def test_a_cell_that_cannot_be_read_is_named_by_row_and_column(tmp_path, content, words):
    path = written(tmp_path, content)
    with pytest.raises(FileError) as caught:
        readings(path, WIDE)
    for word in [str(path), *words]:
        assert word in str(caught.value)


def test_a_row_without_a_sensor_id_is_refused(tmp_path):
    path = written(tmp_path, "t,id,v\n0,a,1\n1,,2\n")
    with pytest.raises(FileError, match="column 'id', row 2: empty"):
        readings(path, FileLayout("t", id_column="id"))


def test_a_missing_file_is_an_error_not_a_traceback(tmp_path):
    with pytest.raises(FileError, match="No such file"):
        read_columns(tmp_path / "gone.csv")


def test_columns_are_listed_with_an_example(tmp_path):
    path = written(tmp_path, "date,name,a,empty\n2016-07-01,x,,\n2016-07-02,y,2.5,\n")
    assert [(c.name, c.is_numeric, c.example) for c in read_columns(path)] == [
        ("date", False, "2016-07-01"),
        ("name", False, "x"),
        ("a", True, "2.5"),
        ("empty", True, ""),
    ]


def batch_of(values: list[list[float]], names: tuple[str, ...], sensors: list[str] | None = None) -> FileBatch:
    sensors = sensors or ["pump-1", 'odd "é" 100%']
    n = len(values)
    codes = np.arange(n, dtype=np.int32) % len(sensors)
    return FileBatch(sensors, codes, START + np.arange(n) * 1000, np.array(values).reshape(n, len(names)), names)


@given(st.lists(st.tuples(*[st.floats(allow_infinity=False)] * 2), max_size=20))
def test_values_written_by_column_are_those_written_one_by_one(rows):
    names = ("heat", '100 % "rpm"')
    batch = batch_of([list(row) for row in rows], names)
    one_by_one = [
        {"ts": START + i * 1000, "who": batch.sensors[i % 2]}
        | {name: None if np.isnan(value) else value for name, value in zip(names, row)}
        for i, row in enumerate(rows)
    ]
    assert [json.loads(text) for text in encode_values(batch, "ts", "who")] == one_by_one


def test_without_a_field_for_it_the_event_time_is_the_timestamp_alone():
    batch = batch_of([[1.5]], ("value",))
    assert encode_values(batch, event_time="") == [b'{"value":1.5}']
    [records] = ReadingEncoder("t", Partitioner(1), event_time="").encode(batch)
    assert records.timestamps_ms is not None
    assert records.timestamps_ms.tolist() == [START]


def test_the_decoder_of_the_stream_reads_back_what_was_written():
    values = np.random.default_rng(0).normal(size=(100, 2))
    values[::7, 0] = np.nan
    batch = batch_of(values.tolist(), ("heat", "rpm"), [f"pump-{n}" for n in range(7)])
    decoder = ReadingDecoder(ReadingFormat(("heat", "rpm")))
    seen: dict[tuple[bytes, int], list[float]] = {}
    for records in ReadingEncoder("t", Partitioner(4)).encode(batch):
        assert records.timestamps_ms is not None
        assert {partition_for(key, 4) for key in records.keys if key} == {records.partition}
        rows = zip(range(len(records)), records.timestamps_ms.tolist(), records.keys, records.values)
        columns = RecordColumns.build("t", records.partition, [(*row, ()) for row in rows])
        decoded, rejected = decoder.decode(columns)
        assert not rejected
        seen |= dict(zip(zip(decoded.sensors, decoded.event_time_ms.tolist()), decoded.values.tolist()))
    wanted = {
        (batch.sensors[code].encode(), time): row
        for code, time, row in zip(batch.codes.tolist(), batch.event_time_ms.tolist(), batch.values.tolist())
    }
    assert seen.keys() == wanted.keys()
    np.testing.assert_array_equal([seen[key] for key in wanted], list(wanted.values()))


def test_a_time_before_1970_is_refused_since_no_record_can_bear_it():
    batch = FileBatch(["a"], np.zeros(1, np.int32), np.array([-1]), np.ones((1, 1)), ("value",))
    with pytest.raises(FileError, match=r"1969-12-31.*before 1970"):
        ReadingEncoder("t", Partitioner(1)).encode(batch)


def test_at_a_speed_each_reading_leaves_when_its_time_has_come():
    #  event time  0s -- 1s -- 2s -- …     at speed 2 one leaves every half second
    wall, left = Wall(), []
    for piece in paced([batch_of([[1.0]] * 3, ("v",)), shifted(3)], 2.0, lambda: wall.seconds, wall.sleep):
        left += [(time_ms - START, wall.seconds - 100) for time_ms in piece.event_time_ms.tolist()]
    assert left == [(n * 1000, n / 2) for n in range(6)]


def shifted(seconds: int) -> FileBatch:
    batch = batch_of([[1.0]] * 3, ("v",))
    return FileBatch(batch.sensors, batch.codes, batch.event_time_ms + seconds * 1000, batch.values, batch.field_names)


def test_a_reading_out_of_order_leaves_at_once_and_in_its_place():
    times = np.array([0, 4000, 1000, 5000])
    batch = FileBatch(["a"], np.zeros(4, np.int32), times, np.ones((4, 1)), ("v",))
    wall, left = Wall(), []
    for piece in paced([batch], 1.0, lambda: wall.seconds, wall.sleep):
        left += [(time_ms, wall.seconds - 100) for time_ms in piece.event_time_ms.tolist()]
    assert left == [(0, 0.0), (4000, 4.0), (1000, 4.0), (5000, 5.0)]


def test_asked_to_stop_it_stops_between_two_pieces():
    wall = Wall(stop_after=1.0)
    pieces = list(paced([batch_of([[1.0]] * 3, ("v",))], 1.0, lambda: wall.seconds, wall.sleep))
    assert sum(map(len, pieces)) == 1
    at_full_speed = paced([batch_of([[1.0]] * (3 * READINGS_AT_ONCE), ("v",))], None, lambda: 0.0, lambda _: False)
    next(at_full_speed)
    assert sum(map(len, at_full_speed)) == 2 * READINGS_AT_ONCE


def test_pieces_of_a_batch_of_many_sensors_keep_each_reading_with_its_sensor():
    batch = batch_of([[float(n)] for n in range(50)], ("v",), [f"pump-{n}" for n in range(50)])
    wall, left = Wall(), []
    for piece in paced([batch], 10.0, lambda: wall.seconds, wall.sleep):
        assert len(piece.sensors) <= len(piece)
        left += [(piece.sensors[code], row[0]) for code, row in zip(piece.codes.tolist(), piece.values.tolist())]
    assert left == [(f"pump-{n}", float(n)) for n in range(50)]


def test_a_speed_is_max_or_a_positive_number():
    assert (check_speed("max"), check_speed("60")) == (None, 60.0)
    for text in ("0", "-1", "inf", "nan", "fast"):
        with pytest.raises(ValueError, match=r".+"):
            check_speed(text)
