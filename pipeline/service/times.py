"""Columns of times, in whatever way people write them -> epoch milliseconds.

ISO 8601            2016-07-01 00:15:00, 2016-07-01T00:15:00+02:00     without an offset: UTC
epoch               1467331200, 1467331200.5, 1467331200000, …          seconds, milliseconds, micro- or nanoseconds by size
days and slashes    1990/1/1 0:00, 1/31/2010 0:00, 31.1.2010 0:00       which is day and which month: by what fits
"""

from __future__ import annotations

from itertools import product
from typing import Any, Final

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.stream.columns import Float64, Int64

_EPOCH_UNITS: Final = {"s": 1e3, "ms": 1.0, "us": 1e-3, "ns": 1e-6}
"""Unit -> what to multiply by for milliseconds."""
_DATES: Final = (
    "%Y/%m/%d",
    "%Y.%m.%d",
    "%d.%m.%Y",
    "%m/%d/%Y",
    "%d/%m/%Y",
    "%m-%d-%Y",
    "%d-%m-%Y",
    "%m/%d/%y",
    "%d/%m/%y",
    "%d-%b-%Y",
    "%d %b %Y",
    "%d %B %Y",
)
_CLOCKS: Final = (" %H:%M", " %H:%M:%S", "", "T%H:%M:%S", " %H:%M:%S.%f", " %I:%M %p", " %I:%M:%S %p")
_HINT: Final = (
    "name its format, such as --time-format '%d.%m.%Y %H:%M' (Python's strptime), or s, ms, us, ns for epochs"
)


class TimeError(ValueError):
    """A time that cannot be read; `row` counts from 0 within the column that was parsed, None if it is about all of them."""

    def __init__(self, message: str, row: int | None = None) -> None:
        super().__init__(message)
        self.row = row


class TimeParser:
    """Parses the batches of one column. The way of writing is found out from the first batch and holds for all.

    format: a strptime format, or "s", "ms", "us", "ns" for epochs; "" = find out.
    """

    def __init__(self, format: str = "") -> None:
        self._format = format

    def parse(self, column: Any) -> Int64:
        """A pyarrow array -> (n) int64 epoch ms. Raises TimeError for a missing or unreadable time."""
        if column.null_count:
            row = pc.index(column.is_null(), True).as_py()
            raise TimeError(f"no time; expected one in every row; remove the row or {_HINT}", row)
        if pa.types.is_timestamp(column.type) or pa.types.is_date(column.type):
            return _integers(column.cast(pa.timestamp("ms", tz=getattr(column.type, "tz", None)), safe=False))
        if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
            return self._numbers(column)
        if self._format not in ("", "ISO8601", *_EPOCH_UNITS):
            return _by_format(column.to_pandas(), self._format)
        try:
            return self._numbers(column)
        except pa.ArrowInvalid:
            if self._format in _EPOCH_UNITS:
                raise TimeError(f"expected numbers, as --time-format {self._format} says", None) from None
        texts = column.to_pandas()
        if not self._format and len(texts):
            self._format = _guess(texts)
        return _by_format(texts, self._format or "ISO8601")

    def _numbers(self, column: Any) -> Int64:
        """Epochs, or dates written as 20160701. Raises ArrowInvalid for anything but numbers."""
        if pa.types.is_integer(column.type) and self._format in ("", "ms"):
            exact = column.cast(pa.int64()).to_numpy(zero_copy_only=False)
            if self._format or (len(exact) and exact.min() >= 1e11 and exact.max() < 1e14):
                return np.asarray(exact, np.int64)
        numbers = np.asarray(column.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False), np.float64)
        if (bad := np.flatnonzero(~np.isfinite(numbers))).size:
            raise TimeError(f"{numbers[bad[0]]}; expected a time", int(bad[0]))
        if self._format in _EPOCH_UNITS:
            return np.asarray(np.round(numbers * _EPOCH_UNITS[self._format]), np.int64)
        if len(numbers) and (numbers == np.round(numbers)).all() and numbers.min() > 1.9e7 and numbers.max() < 2.1e7:
            self._format = "%Y%m%d"  # as epoch seconds, all these would be days of August 1970
            return _by_format(pd.Series([str(int(number)) for number in numbers]), self._format)
        return _epochs(numbers)


def _epochs(numbers: Float64) -> Int64:
    """By size: below 1e11 seconds (until the year 5138), then milliseconds, then micro- and nanoseconds (from 1973 on)."""
    size = np.abs(numbers)
    factor = np.select([size < 1e11, size < 1e14, size < 1e17], [1e3, 1.0, 1e-3], 1e-6)
    return np.asarray(np.round(numbers * factor), np.int64)


def _integers(column: Any) -> Int64:
    return np.asarray(column.cast(pa.int64()).to_numpy(zero_copy_only=False), np.int64)


def _by_format(texts: Any, format: str) -> Int64:
    parsed = _try(texts, format)
    if (bad := np.flatnonzero(np.asarray(parsed.isna()))).size:
        row = int(bad[0])
        shown = "as the rows before" if format == "ISO8601" else f"a time such as {format} says"
        raise TimeError(f"{texts.iloc[row]!r} is no time; expected {shown}; mend the row or {_HINT}", row)
    return np.asarray(parsed.as_unit("ms").asi8, np.int64)


def _try(texts: Any, format: str) -> pd.DatetimeIndex:
    """Every text by one format; NaT where it does not fit."""
    try:
        return pd.DatetimeIndex(pd.to_datetime(texts.str.strip(), format=format, utc=True, errors="coerce"))
    except ValueError as error:
        raise TimeError(f"--time-format {format!r}: {error}") from None


def _guess(texts: Any) -> str:
    """The format that fits the first text and, of those that do, all of them."""
    first = texts.iloc[:1]
    if not _try(first, "ISO8601").isna().any():
        return "ISO8601"
    formats = [date + clock for date, clock in product(_DATES, _CLOCKS)]
    fitting = [format for format in formats if not _try(first, format).isna().any()]
    if len(fitting) > 1:
        # A format that fits the first text only by mistaking month for day soon meets a 13th month.
        fitting = [format for format in fitting if not _try(texts, format).isna().any()] or fitting[:1]
    if not fitting:
        raise TimeError(f"{texts.iloc[0]!r} is written in no way known here; {_HINT}", 0)
    if len(fitting) > 1:
        readings = " or ".join(f"{_try(first, format)[0]:%-d %B %Y} ({format})" for format in fitting)
        raise TimeError(f"{texts.iloc[0]!r} may be {readings}, and no row tells which; {_HINT}", 0)
    return fitting[0]
