"""CSV and Parquet files (and DataFrames) of any column layout -> readings, batch by batch, in bounded memory.

    wide    time, pump-1, pump-2, …       each value column is a sensor; its reading has one field, `value`
    long    time, id, temperature, …      one row a reading; every other numeric column is a field
    single  time, temperature, …          the whole file is one sensor, named in the layout

Rows keep the file's order. An empty cell, NaN and infinity are missing values. Times without an offset are UTC.
"""

from __future__ import annotations

import csv
import difflib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from pipeline.errors import DeploymentError, SettingsError
from pipeline.service.times import TimeError, TimeParser
from pipeline.stream.columns import Float64, Int32, Int64

ALL_COLUMNS: Final = ("*",)
"""As value_columns: every numeric column that is not the time."""
BLOCK_BYTES: Final = 2**21
"""Of a CSV file at once: large enough that the cost of a batch does not count, small enough for any memory."""
SAMPLE_BYTES: Final = 2**20
"""What is looked at to find the encoding, the separator and the types of the columns."""
READINGS_AT_ONCE: Final = 100_000
"""Aim for the size of a FileBatch read from Parquet."""
_MISSING: Final = [*pa_csv.ConvertOptions().null_values, "None", "none", "-", "?"]


class LayoutError(SettingsError):
    """What was said about the file's columns does not fit the file: the user acts. Exit status 2."""


class FileError(DeploymentError):
    """The file holds something that is no reading: the message names row and column."""


@dataclass(frozen=True, slots=True)
class FileLayout:
    """What the columns of a file mean. Just one of `value_columns` (wide), `id_column` (long) and `sensor` (single) is needed;
    with `id_column` or `sensor`, `value_columns` chooses the fields."""

    time_column: str
    value_columns: tuple[str, ...] = ()
    id_column: str = ""
    sensor: str = ""
    field: str = "value"
    """Wide: the name of the one field."""
    time_format: str = ""
    """A strptime format, or "s", "ms", "us", "ns" for epochs; empty: found out."""
    separator: str = ""
    """CSV: empty: found out."""
    decimal: str = "."
    """CSV: the decimal point."""
    encoding: str = ""
    """CSV: empty: UTF-8, or Latin-1 where the file is not."""

    @property
    def is_wide(self) -> bool:
        return not self.id_column and not self.sensor


@dataclass(frozen=True, slots=True)
class FileBatch:
    """n readings in the order of the file."""

    sensors: list[str]
    """Names of the sensors that may occur in this batch."""
    codes: Int32
    """(n) index into `sensors`."""
    event_time_ms: Int64
    """(n)"""
    values: Float64
    """(n, F) NaN = missing."""
    field_names: tuple[str, ...]
    """F names."""
    share_read: float = 0.0
    """How much of the file has been read, 0 to 1, for progress bars."""

    def __len__(self) -> int:
        return len(self.codes)


@dataclass(frozen=True, slots=True)
class FileColumn:
    """A column as found in the head of a file."""

    name: str
    is_numeric: bool
    example: str


def read_file(
    source: Path | pd.DataFrame, layout: FileLayout, from_ms: int | None = None, to_ms: int | None = None
) -> Iterator[FileBatch]:
    """The readings of a file, or of a DataFrame, whose event time is inside [from_ms ---- to_ms), in the file's order.

    Raises LayoutError for a layout that does not fit the file, FileError for a cell that cannot be read; both name row and column
    as far as they have one."""
    table, path = _open(source, layout), _name(source)
    layout = _resolved(layout, table.columns(), path)
    times = TimeParser(layout.time_format)
    row = 0
    for batch, share in table.batches(layout):
        try:
            event_time_ms = times.parse(batch.column(layout.time_column))
        except TimeError as error:
            where = f"{path}, column {layout.time_column!r}"
            if error.row is not None:
                where += f", row {row + error.row + 1}"
            raise FileError(f"{where}: {error}") from None
        values = _numbers(batch, layout.value_columns, path, row)
        keep = _inside(event_time_ms, from_ms, to_ms)
        if layout.is_wide:
            out = _wide(layout, event_time_ms[keep], values[keep], share)
        else:
            sensors, codes = _sensors(batch, layout, path, row)
            out = FileBatch(sensors, codes[keep], event_time_ms[keep], values[keep], layout.value_columns, share)
        row += len(batch)
        if len(out):
            yield out


def read_columns(path: Path, layout: FileLayout | None = None) -> list[FileColumn]:
    """The columns of a file, from its head; the layout only tells how to read it (separator, encoding)."""
    return _open(path, layout or FileLayout("")).columns()


def _wide(layout: FileLayout, event_time_ms: Int64, values: Float64, share: float) -> FileBatch:
    """Row after row, and within a row sensor after sensor: event time keeps its order."""
    rows, sensors = values.shape
    return FileBatch(
        list(layout.value_columns),
        np.tile(np.arange(sensors, dtype=np.int32), rows),
        np.repeat(event_time_ms, sensors),
        values.reshape(-1, 1),
        (layout.field,),
        share,
    )


def _sensors(batch: pa.RecordBatch, layout: FileLayout, path: str, first_row: int) -> tuple[list[str], Int32]:
    if layout.sensor:
        return [layout.sensor], np.zeros(len(batch), np.int32)
    column = batch.column(layout.id_column)
    text = column if pa.types.is_string(column.type) else column.cast(pa.string())
    empty = pc.fill_null(pc.equal(pc.utf8_trim_whitespace(text), ""), True)
    if pc.any(empty).as_py():
        row = first_row + pc.index(empty, True).as_py() + 1
        raise FileError(f"{path}, column {layout.id_column!r}, row {row}: empty; expected a sensor id")
    encoded = text.dictionary_encode()
    return encoded.dictionary.to_pylist(), encoded.indices.to_numpy(zero_copy_only=False).astype(np.int32)


def _numbers(batch: pa.RecordBatch, names: Sequence[str], path: str, first_row: int) -> Float64:
    """(n, len(names)) float64."""
    values = np.empty((len(batch), len(names)))
    for k, name in enumerate(names):
        column = batch.column(name)
        try:
            numbers = column if pa.types.is_float64(column.type) else column.cast(pa.float64())
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            raise FileError(f"{path}, column {name!r}: {column.type}; expected numbers") from None
        values[:, k] = numbers.to_numpy(zero_copy_only=False)
    values[np.isinf(values)] = np.nan
    return values


def _inside(event_time_ms: Int64, from_ms: int | None, to_ms: int | None) -> Any:
    keep = np.ones(len(event_time_ms), np.bool_)
    if from_ms is not None:
        keep &= event_time_ms >= from_ms
    if to_ms is not None:
        keep &= event_time_ms < to_ms
    return keep


def _resolved(layout: FileLayout, columns: Sequence[FileColumn], path: str) -> FileLayout:
    """The layout with its value columns filled in, every name in it checked against the file."""
    if not layout.time_column:
        raise LayoutError(f"no time column was named (--time-column); {_list_columns(path, columns)}")
    _require(path, columns, "time", layout.time_column)
    if layout.id_column and layout.sensor:
        raise LayoutError("an id column and one sensor's name were both given; expected one of the two")
    if layout.id_column:
        _require(path, columns, "id", layout.id_column)
    chosen = layout.value_columns
    if not chosen and layout.is_wide:
        raise LayoutError(
            "what the columns mean was not said: expected --value-columns (wide file: each is a sensor), --id-column "
            "(long file) or --sensor (the whole file is one sensor); " + _list_columns(path, columns)
        )
    others = (layout.time_column, layout.id_column)
    if not chosen or chosen == ALL_COLUMNS:
        chosen = tuple(column.name for column in columns if column.is_numeric and column.name not in others)
        if not chosen:
            raise LayoutError(f"no other column holds numbers; {_list_columns(path, columns)}")
    for name in chosen:
        _require(path, columns, "value", name)
        if name in others:
            raise LayoutError(f"column {name!r} is a value column and the time or id as well; remove it from one")
    if len(set(chosen)) < len(chosen):
        raise LayoutError(f"value columns {', '.join(chosen)}: expected each once")
    return replace(layout, value_columns=chosen)


def _require(path: str, columns: Sequence[FileColumn], role: str, name: str) -> None:
    names = [column.name for column in columns]
    if names.count(name) == 1:
        return
    if name in names:
        raise LayoutError(f"{role} column {name!r}: {path} has {names.count(name)} columns of that name; rename them")
    close = difflib.get_close_matches(name, names, 1, 0.5)
    hint = f"did you mean {close[0]!r}?" if close else _list_columns(path, columns)
    raise LayoutError(f"{role} column {name!r} is not in {path}; {hint}")


def _list_columns(path: str, columns: Iterable[FileColumn]) -> str:
    kinds = {True: "numbers", False: "text"}
    lines = [f"{c.name} ({kinds[c.is_numeric]}, such as {c.example or 'nothing'})" for c in columns]
    return f"{path} has the columns {', '.join(lines)}"


def _name(source: Path | pd.DataFrame) -> str:
    return "the DataFrame" if isinstance(source, pd.DataFrame) else str(source)


def _open(path: Path | pd.DataFrame, layout: FileLayout) -> _Csv | _Parquet | _Frame:
    if isinstance(path, pd.DataFrame):
        return _Frame(path)
    try:
        with path.open("rb") as file:
            is_parquet = file.read(4) == b"PAR1"
        return _Parquet(path) if is_parquet else _Csv(path, layout)
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror or error}; expected a CSV or Parquet file") from None


class _Frame:
    def __init__(self, frame: pd.DataFrame) -> None:
        for name, kind in frame.dtypes.items():
            if isinstance(kind, pd.PeriodDtype) or kind.kind == "m":
                raise FileError(
                    f"the DataFrame's column {name!r} holds {kind}; expected times, texts or numbers: turn it into a time, such as with "
                    ".dt.to_timestamp()"
                )
        try:
            self._table = pa.Table.from_pandas(frame, preserve_index=False)
        except (pa.ArrowException, TypeError) as error:
            raise FileError(f"the DataFrame holds a column that is neither times, texts nor numbers: {error}") from None
        except ValueError as error:
            raise FileError(f"the DataFrame cannot be read ({error}); expected each column's name once") from None

    def columns(self) -> list[FileColumn]:
        return [
            FileColumn(name, _is_numeric(column.type), _example(column))
            for name, column in zip(self._table.column_names, self._table.columns)
        ]

    def batches(self, layout: FileLayout) -> Iterator[tuple[pa.RecordBatch, float]]:
        rows = max(1, READINGS_AT_ONCE // (len(layout.value_columns) if layout.is_wide else 1))
        total, seen = max(len(self._table), 1), 0
        for batch in self._table.select(_needed(layout)).to_batches(rows):
            seen += len(batch)
            yield batch, seen / total


class _Parquet:
    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = pq.ParquetFile(path)
        except pa.ArrowException as error:
            raise FileError(f"{path} is a damaged Parquet file: {error}") from None

    def columns(self) -> list[FileColumn]:
        schema = self._file.schema_arrow
        head = next(self._file.iter_batches(batch_size=1), None)
        return [
            FileColumn(
                field.name,
                _is_numeric(field.type),
                _example(head.column(i)) if head is not None else "",
            )
            for i, field in enumerate(schema)
        ]

    def batches(self, layout: FileLayout) -> Iterator[tuple[pa.RecordBatch, float]]:
        rows = max(1, READINGS_AT_ONCE // (len(layout.value_columns) if layout.is_wide else 1))
        total, seen = max(self._file.metadata.num_rows, 1), 0
        for batch in self._file.iter_batches(batch_size=rows, columns=_needed(layout)):
            seen += len(batch)
            yield batch, seen / total


class _Csv:
    def __init__(self, path: Path, layout: FileLayout) -> None:
        self.path = path
        with pa.input_stream(str(path), compression="detect") as stream:
            head = stream.read(SAMPLE_BYTES)
        if not head.strip():
            raise FileError(f"{path} is empty; expected a CSV file whose first line names the columns")
        self._encoding = layout.encoding or _encoding_of(head)
        self._decimal = layout.decimal
        try:
            first_line = head.decode(self._encoding, "replace").splitlines()[0]
        except LookupError:
            raise LayoutError(
                f"encoding {layout.encoding!r} is unknown; expected one such as utf-8 or latin-1"
            ) from None
        self._separator = {"\\t": "\t", "tab": "\t"}.get(layout.separator, layout.separator) or _separator_of(
            first_line
        )
        if len(self._separator) != 1 or self._decimal not in (".", ","):
            raise LayoutError("the separator must be one character (or tab), the decimal point '.' or ','")
        self._names = next(csv.reader([first_line.removeprefix("\ufeff")], delimiter=self._separator))
        self._head = head

    def columns(self) -> list[FileColumn]:
        """Types as Arrow guesses them from the head, cut at its last whole line."""
        head = self._head if len(self._head) < SAMPLE_BYTES else self._head[: self._head.rfind(b"\n") + 1]
        try:
            table = pa_csv.read_csv(
                pa.BufferReader(head),
                read_options=pa_csv.ReadOptions(encoding=self._encoding, use_threads=False),
                parse_options=self._parse_options(),
                convert_options=pa_csv.ConvertOptions(null_values=_MISSING, decimal_point=self._decimal),
            )
        except pa.ArrowException as error:
            raise self._broken(error) from None
        # A column that is empty so far may hold numbers later: only text rules it out.
        kinds = (pa.types.is_integer, pa.types.is_floating, pa.types.is_null)
        return [
            FileColumn(name, any(kind(column.type) for kind in kinds), _example(column))
            for name, column in zip(table.column_names, table.columns)
        ]

    def batches(self, layout: FileLayout) -> Iterator[tuple[pa.RecordBatch, float]]:
        types = {name: pa.float64() for name in layout.value_columns}
        types |= {name: pa.string() for name in (layout.time_column, layout.id_column) if name}
        size = max(self.path.stat().st_size, 1)
        with pa.OSFile(str(self.path)) as raw:
            codec = _codec_of(self.path)
            stream = pa.CompressedInputStream(raw, codec) if codec else raw
            try:
                reader = pa_csv.open_csv(
                    stream,
                    read_options=pa_csv.ReadOptions(block_size=BLOCK_BYTES, encoding=self._encoding, use_threads=False),
                    parse_options=self._parse_options(),
                    convert_options=pa_csv.ConvertOptions(
                        column_types=types,
                        include_columns=_needed(layout),
                        null_values=_MISSING,
                        decimal_point=self._decimal,
                    ),
                )
                for batch in reader:
                    yield batch, min(raw.tell() / size, 1.0)
            except pa.ArrowException as error:
                raise self._broken(error) from None

    def _parse_options(self) -> Any:
        return pa_csv.ParseOptions(delimiter=self._separator)

    def _broken(self, error: Exception) -> FileError:
        """Arrow's words, with the column's name for its number."""
        text = str(error)
        for index, name in enumerate(self._names):
            text = text.replace(f"In CSV column #{index}:", f"column {name!r}:")
        if "UTF8" in text or "codec" in text:
            text += "; name the file's encoding (--encoding latin-1)"
        return FileError(f"{self.path}: {text}")


def _is_numeric(kind: Any) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind))


def _needed(layout: FileLayout) -> list[str]:
    return [layout.time_column, *([layout.id_column] if layout.id_column else []), *layout.value_columns]


def _codec_of(path: Path) -> str | None:
    return {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".lz4": "lz4"}.get(path.suffix)


def _encoding_of(head: bytes) -> str:
    """UTF-8 or, where the head is not, Latin-1, in which every byte means something. The head's end may cut a character."""
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16"
    try:
        head.decode("utf-8")
    except UnicodeDecodeError as error:
        return "utf-8" if error.start > len(head) - 4 and len(head) == SAMPLE_BYTES else "latin-1"
    return "utf-8"


def _separator_of(header: str) -> str:
    """The candidate that splits the header into most columns; a comma where it has just one."""
    return max(",;\t|", key=lambda candidate: len(next(csv.reader([header], delimiter=candidate))))


def _example(column: Any) -> str:
    present = column.drop_null()
    return str(present[0].as_py()) if len(present) else ""
