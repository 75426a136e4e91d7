"""Small streams for tests of the core."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from models.forecaster import SeriesSpec
from pipeline.stream.columns import RecordColumns
from pipeline.stream.serdes import ReadingFormat
from pipeline.stream.task import TaskSettings
from pipeline.stream.windows import WindowRule

HOUR = 3_600_000
START = 1_769_700_000_000 // HOUR * HOUR


def task_settings(
    fields: tuple[str, ...] = ("value",), horizon: int = 3, seasons: tuple[int, ...] = (4,), **rule: Any
) -> TaskSettings:
    window_rule = WindowRule(
        **{"size_ms": HOUR, "hop_ms": HOUR, "grace_ms": 0, "fields": fields, "max_gap_steps": 3} | rule
    )
    targets = tuple(f * len(window_rule.aggregates) for f in range(len(fields)))
    spec = SeriesSpec(window_rule.channels, targets, window_rule.hop_ms, horizon, (0.1, 0.5, 0.9), seasons)
    return TaskSettings(ReadingFormat(fields), window_rule, spec)


def reading(sensor: str, ts: int, **fields: float | None) -> tuple[bytes, bytes]:
    return sensor.encode(), json.dumps({"ts": ts, **fields}).encode()


def records(
    pairs: Iterable[tuple[bytes | None, bytes | None]], first_offset: int = 0, partition: int = 0
) -> RecordColumns:
    return RecordColumns.build(
        "plant.readings.v1", partition, [(first_offset + i, -1, key, value, ()) for i, (key, value) in enumerate(pairs)]
    )


def fleet(sensors: int, hours: int, per_hour: int = 2, seed: int = 0) -> list[tuple[bytes, bytes]]:
    """Readings of a small fleet in event-time order: a rhythm of four hours, noise, no gaps."""
    rng = np.random.default_rng(seed)
    level = rng.normal(20, 5, sensors)
    out = []
    for hour in range(hours):
        for part in range(per_hour):
            ts = START + hour * HOUR + part * (HOUR // per_hour)
            for s in range(sensors):
                value = level[s] + np.sin(2 * np.pi * hour / 4) + rng.normal(0, 0.1)
                out.append(reading(f"pump-{s}", ts, value=round(float(value), 6)))
    return out


def cut(pairs: Sequence[Any], edges: Iterable[int]) -> list[tuple[int, Sequence[Any]]]:
    """(first offset, part) for each non-empty part."""
    marks = [0, *sorted(edges), len(pairs)]
    return [(start, pairs[start:stop]) for start, stop in itertools.pairwise(marks) if stop > start]
