"""What can be told from a file alone: fields, step, season, and whether its rows stand in the order of time.

file ──look──> FileFacts ──assumed──> settings that nobody has set ──prepared──> FileData
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd

from models.forecaster import SeriesSpec
from models.seasonality import MOST_STEPS, SeasonFound, estimate_seasons
from models.steps import estimate_step, regular
from pipeline.errors import DeploymentError
from pipeline.service.assembly import task_settings
from pipeline.service.files import READINGS_AT_ONCE, FileBatch, FileLayout, read_file
from pipeline.settings import Settings, changed, format_duration
from pipeline.stream.columns import Float64, Int32, Int64
from pipeline.stream.task import TaskSettings

LOOKED_AT: Final = 2_000_000
"""Readings from which step and season are estimated: the first so many."""
SERIES_LOOKED_AT: Final = 12
BEHIND_SHARE: Final = 0.1
"""Of the readings further behind the newest before them than a window and its grace: with more, a file is in another order than that of
time, such as sensor after sensor."""
SHADES: Final = 16
"""Into so many parts each doubling of a delay is told apart."""


@dataclass(frozen=True, slots=True)
class FileFacts:
    """What was found in a file."""

    fields: tuple[str, ...]
    sensors: int
    readings: int
    first_ms: int
    """Smallest and greatest event time."""
    last_ms: int
    step_ms: int
    seasons: tuple[SeasonFound, ...]
    behind: Int64
    """(64 * SHADES) how many readings are so far behind the newest before them, by `_shade`; 0: in order."""

    def in_order(self, patience_ms: int) -> bool:
        """Few readings are as far behind as this; those that are a sixteenth less may count as well."""
        late = self.behind[int(_shade(np.array([max(patience_ms, 1)]))[0]) :].sum()
        return bool(late <= BEHIND_SHARE * self.readings)

    def __str__(self) -> str:
        season = ", ".join(
            f"{format_duration(found.steps * self.step_ms)} ({found.steps} steps, strength {found.strength:.2f})"
            for found in self.seasons
        )
        return (
            f"{self.readings:,} readings of {self.sensors:,} sensors, a step of {format_duration(self.step_ms)}, "
            f"{'season ' + season if season else 'no season'}"
        )


@dataclass(frozen=True, slots=True)
class FileData:
    """Files, and what was told from them."""

    facts: FileFacts
    settings: Settings
    core: TaskSettings
    read: Callable[[int | None], Iterator[FileBatch]]
    """From an event time on, in the order of time."""


def prepared(
    settings: Settings,
    sources: Sequence[Path | pd.DataFrame],
    layout: FileLayout,
    end_ms: int | None,
    spec: SeriesSpec | None,
    note: Callable[[str], None],
) -> FileData:
    """One look at everything: what the settings leave open is told from the data, or from the model that is to serve (spec). end_ms:
    readings before this.

    Raises DeploymentError and SettingsError, which say what was expected."""

    def batches(from_ms: int | None) -> Iterator[FileBatch]:
        for number, source in enumerate(sources):
            for batch in read_file(source, layout, from_ms, end_ms):
                yield replace(batch, share_read=(number + batch.share_read) / len(sources))

    known_ms = None if spec is None else spec.step_ms
    if settings.source_of("windows.size") != "default":
        known_ms = int(settings.windows.hop_ms)
    facts = look(batches(None), known_ms)
    note(f"{facts.readings:,} readings of {facts.sensors:,} sensors" if known_ms else str(facts))
    settings = changed(settings, assumed(settings, facts, spec), "the data" if spec is None else "the model")
    core = task_settings(settings)
    in_order = facts.in_order(core.rule.size_ms + core.rule.grace_ms)
    if not in_order:
        note("the rows do not stand in the order of time: they are sorted first, all in memory")
    return FileData(
        facts, settings, core, lambda from_ms: batches(from_ms) if in_order else in_time_order(batches(from_ms))
    )


def look(batches: Iterable[FileBatch], step_ms: int | None = None) -> FileFacts:
    """Once through the file. step_ms: known already, and with it the season is no question; None: told from the data.

    Raises DeploymentError where there is nothing to tell a step from."""
    numbers: dict[str, int] = {}
    sampled: list[tuple[Int32, Int64, Float64]] = []
    behind = np.zeros(64 * SHADES, np.int64)
    fields: tuple[str, ...] = ()
    readings, first_ms, newest_ms = 0, 2**62, -(2**62)
    for batch in batches:
        fields = fields or batch.field_names
        own = np.array([numbers.setdefault(name, len(numbers)) for name in batch.sensors], np.int32)
        newest = np.maximum(np.maximum.accumulate(batch.event_time_ms), newest_ms)
        behind += np.bincount(_shade(newest - batch.event_time_ms), minlength=len(behind))
        newest_ms, first_ms = int(newest[-1]), min(first_ms, int(batch.event_time_ms.min()))
        if readings < LOOKED_AT:
            sampled.append((own[batch.codes], batch.event_time_ms, _values(batch, fields)))
        readings += len(batch)
    if not readings:
        raise DeploymentError("the file holds no readings in this range; widen --from and --to")
    seasons: list[SeasonFound] = []
    if step_ms is None:
        times, values = _by_series(sampled)
        try:
            step_ms = estimate_step(times)
        except ValueError as error:
            raise DeploymentError(f"the step cannot be told from the file: {error}; set windows.size") from None
        seasons = estimate_seasons(regular(times, values, step_ms, MOST_STEPS), step_ms)
    return FileFacts(fields, len(numbers), readings, first_ms, newest_ms, step_ms, tuple(seasons), behind)


def assumed(settings: Settings, facts: FileFacts, spec: SeriesSpec | None = None) -> dict[str, Any]:
    """Values for the keys that were left at their defaults: what the file looks like or, where a model is to serve, what it was
    made for."""
    found: dict[str, Any] = {"readings.fields": list(facts.fields)}
    if settings.source_of("windows.size") == "default":
        found["windows.size"] = format_duration(facts.step_ms)
        found["forecast.season"] = [format_duration(season.steps * facts.step_ms) for season in facts.seasons]
    if spec is not None:
        found["windows.size"] = format_duration(spec.step_ms)
        found["forecast.season"] = [format_duration(steps * spec.step_ms) for steps in spec.seasons]
        found["forecast.horizon"], found["forecast.quantiles"] = spec.horizon, list(spec.quantiles)
    if "windows.hop" in settings.sources:
        found.pop("windows.size", None)
        if spec is None and "forecast.season" in found:
            hop_ms, lengths = settings.windows.hop_ms, [season.steps * facts.step_ms for season in facts.seasons]
            fitting = [length for length in lengths if length % hop_ms == 0 and length >= 2 * hop_ms]
            found["forecast.season"] = [format_duration(length) for length in fitting]
    return {key: value for key, value in found.items() if settings.source_of(key) == "default"}


def in_time_order(batches: Iterable[FileBatch]) -> Iterator[FileBatch]:
    """All readings by event time; those of one time stay in the file's order. Holds the whole file in memory."""
    numbers: dict[str, int] = {}
    whole = list(batches)
    if not whole:
        return
    codes = [
        np.array([numbers.setdefault(name, len(numbers)) for name in batch.sensors], np.int32)[batch.codes]
        for batch in whole
    ]
    fields = whole[0].field_names
    times, values = (
        np.concatenate([b.event_time_ms for b in whole]),
        np.concatenate([_values(b, fields) for b in whole]),
    )
    code, names = np.concatenate(codes), list(numbers)
    whole.clear()
    order = np.argsort(times, kind="stable")
    for at in range(0, len(order), READINGS_AT_ONCE):
        rows = order[at : at + READINGS_AT_ONCE]
        share = min((at + READINGS_AT_ONCE) / len(order), 1.0)
        yield FileBatch(names, code[rows], times[rows], values[rows], fields, share)


def _shade(delays_ms: Int64) -> Int64:
    """Each doubling in SHADES equal parts: 0 for 0, ascending.

    >>> [int(shade) for shade in _shade(np.array([0, 1, 2, 3, 4, 1024, 1087, 1088]))]
    [0, 16, 32, 40, 48, 176, 176, 177]
    """
    part, doublings = np.frexp(delays_ms.astype(np.float64))
    return np.where(delays_ms > 0, doublings * SHADES + ((2 * part - 1) * SHADES).astype(np.int64), 0).astype(np.int64)


def _values(batch: FileBatch, fields: tuple[str, ...]) -> Float64:
    """(n, F) of these fields, in this order: files that are read one after the other need not have it."""
    if batch.field_names == fields:
        return batch.values
    if missing := [name for name in fields if name not in batch.field_names]:
        raise DeploymentError(
            f"a later file has no field {missing[0]!r} as the first one has: it has {', '.join(batch.field_names)}; name the "
            "fields that all of them have (--value-columns)"
        )
    return batch.values[:, [batch.field_names.index(name) for name in fields]]


def _by_series(sampled: list[tuple[Int32, Int64, Float64]]) -> tuple[list[Int64], list[Float64]]:
    """Times and values of some sensors' fields, evenly from all."""
    code, times, values = (np.concatenate(parts) for parts in zip(*sampled))
    present = np.unique(code)
    sensors = present[np.unique(np.linspace(0, len(present) - 1, min(len(present), SERIES_LOOKED_AT)).astype(int))]
    fields = range(min(values.shape[1], max(1, SERIES_LOOKED_AT // len(sensors))))
    rows = [np.flatnonzero(code == sensor) for sensor in sensors.tolist()]
    return [times[at] for at in rows for _ in fields], [values[at, field] for at in rows for field in fields]
