"""From settings to the objects of the core: the one place that knows both."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from models.forecaster import Forecaster, SeriesSpec
from pipeline.errors import DeploymentError
from pipeline.stream.serdes import ReadingFormat
from pipeline.stream.task import ForecastTask, TaskSettings
from pipeline.stream.windows import WindowRule

if TYPE_CHECKING:
    from pipeline.settings import Settings

PROFILES: Final = ("base", "lean", "accuracy")


def task_settings(settings: Settings) -> TaskSettings:
    """What shapes the outcome of a task, taken out of the settings."""
    readings, windows = settings.readings, settings.windows
    rule = WindowRule(
        size_ms=windows.size_ms,
        hop_ms=windows.hop_ms,
        grace_ms=windows.grace_ms,
        fields=readings.fields,
        aggregates=windows.aggregates,
        max_gap_steps=windows.max_gap_steps,
    )
    format = ReadingFormat(
        fields=readings.fields,
        event_time=readings.event_time,
        sensor=readings.sensor,
        max_ahead_ms=readings.max_ahead_ms,
        max_behind_ms=readings.max_behind_ms,
        max_bytes=readings.max_bytes,
        max_sensor_bytes=readings.max_sensor_bytes,
    )
    return TaskSettings(
        format,
        rule,
        series_spec(settings, rule),
        windows.late == "dead-letter",
        settings.model.rewarm_steps,
        settings.scoring.leads,
    )


def series_spec(settings: Settings, rule: WindowRule) -> SeriesSpec:
    """A target is its field's first aggregate."""
    targets = tuple(rule.fields.index(field) * len(rule.aggregates) for field in settings.readings.targets)
    return SeriesSpec(
        channels=rule.channels,
        targets=targets,
        step_ms=rule.hop_ms,
        horizon=settings.forecast.horizon,
        quantiles=settings.forecast.quantiles,
        seasons=tuple(sorted({season_ms // rule.hop_ms for season_ms in settings.forecast.season_ms})),
        seasons_open=settings.forecast.estimate_season,
        profile=settings.forecast.profile,
    )


def load_model(settings: Settings) -> Forecaster | None:
    """The trained model that the settings name; None while nobody has trained one.

    Raises DeploymentError if there is one, but damaged or made for another series."""
    folder = Path(settings.model.path)
    if not folder.exists():
        return None
    from models.artifact import ArtifactError, load

    try:
        return load(folder, expect=task_settings(settings).spec)
    except ArtifactError as error:
        raise DeploymentError(str(error)) from error


def bytes_per_sensor(settings: Settings) -> dict[str, int]:
    """State of one sensor by column, in bytes, the hidden state of the configured network included."""
    columns = ForecastTask(task_settings(settings)).table.columns
    model = settings.model
    # An LSTM carries a hidden and a cell state. Known without the model itself, which would cost a start of TensorFlow.
    per_unit = np.dtype(np.float32).itemsize * (2 if model.cell == "lstm" else 1)
    return {name: column.bytes_per_sensor for name, column in columns.items()} | {
        "rnn.hidden": model.layers * model.units * per_unit
    }


def bytes_by_profile(settings: Settings) -> dict[str, int]:
    """State of one sensor in each profile, in bytes."""
    from pipeline.settings import changed

    return {
        profile: sum(bytes_per_sensor(changed(settings, {"forecast.profile": profile}, "computed")).values())
        for profile in PROFILES
    }
