"""The next steps after a file's end: the file goes through the service's code, its end closes the last windows, the last answers count."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import pandas as pd

from pipeline.errors import DeploymentError, SettingsError
from pipeline.service.backtest import SILENT, Watcher, matching_for, model_of, spec_of
from pipeline.service.files import FileLayout
from pipeline.service.history import from_batches
from pipeline.service.inputs import FileInput
from pipeline.service.keeping import Memory
from pipeline.service.matching import SERVICE, Kept, level_column
from pipeline.service.outlook import FileData, prepared
from pipeline.service.passage import Passage, frame_of
from pipeline.service.picture import Fan, Panel, draw
from pipeline.service.timeline import Fresh, Given, Shelf, Timeline
from pipeline.settings import Settings

SUFFIXES: Final = (".csv", ".parquet")
PICTURED: Final = 4
BEFORE: Final = 4
"""Horizons of the past in the picture."""


@dataclass(frozen=True, slots=True)
class Ahead:
    """What was forecast."""

    frame: pd.DataFrame
    """The long frame (`pipeline.service.matching`) without y: the newest forecast of each sensor."""
    data: FileData
    notes: Sequence[str]


def look_ahead(
    settings: Settings, sources: Sequence[Path], layout: FileLayout, model: str, watcher: Watcher = SILENT
) -> Ahead:
    """model: a folder that `millrace train` wrote; empty: one is trained on the file. Where the file is too short for that, or the model
    no better than the baselines on the part that was held back, the baseline answers, and a note says so.

    Raises DeploymentError and SettingsError, which say what was expected."""
    data = prepared(settings, sources, layout, None, spec_of(model), watcher.note)
    end_ms = data.facts.last_ms + 1
    with tempfile.TemporaryDirectory(prefix="millrace-forecast-") as folder:
        shelf = Shelf(Path(folder))
        notes: list[str] = []
        timeline: Timeline
        if model:
            timeline = Given(shelf, model_of(model, data.core.spec, None)[0])
        else:
            timeline = Fresh(shelf, data.settings, data.core, end_ms, watcher.training, at_end=True)
        try:
            frame = _passed(data, timeline, watcher)
        except DeploymentError as error:
            if model:
                raise
            notes.append(f"no model was trained, the baseline answers: {error}")
            frame = _passed(data, Given(shelf, None), watcher)
        if any(change.note for change in timeline.changes):
            notes.append(
                "the baseline answers: on the newest part of the file, which it was not trained on, the model was no better "
                "(millrace train and --model have it answer all the same)"
            )
            frame = _passed(data, Given(shelf, None), watcher)
    silent = data.facts.sensors * len(data.core.spec.targets) - frame["unique_id"].nunique()
    if silent:
        notes.append(f"{silent:,} series ended too long before the file's end to be forecast")
    return Ahead(frame, data, notes)


def require_suffix(path: Path) -> None:
    """Raises SettingsError for a name that does not say how it is to be written."""
    if path.suffix not in SUFFIXES:
        raise SettingsError(f"--out {path}: expected a name that ends in {' or '.join(SUFFIXES)}")


def write_frame(path: Path, frame: pd.DataFrame) -> None:
    """As CSV or Parquet, by its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        frame.to_csv(path, index=False)
    else:
        frame.to_parquet(path, index=False)


def draw_ahead(path: Path, ahead: Ahead, title: str) -> Path:
    """A PNG: the newest past and the forecast of the first few series."""
    core, names = ahead.data.core, ahead.frame["unique_id"].unique()[:PICTURED]
    history = from_batches(core, ahead.data.read(None), closing=True)
    whole = history.sequences()
    horizon_ms, several = core.spec.horizon * core.spec.step_ms, len(core.spec.targets) > 1
    panels = []
    for name in names.tolist():
        sensor, target = name.rsplit("/", 1) if several else (name, core.spec.target_names[0])
        rows = ahead.frame[ahead.frame["unique_id"] == name].sort_values("lead")
        ends_ms = rows["ds"].to_numpy().astype("datetime64[ms]").astype(np.int64) + core.rule.size_ms
        cutoff_ms = int(ends_ms[0]) - core.spec.step_ms
        own = (whole.sensor == history.sensors.index(sensor)) & (whole.end_ms > cutoff_ms - BEFORE * horizon_ms)
        channel = core.spec.targets[core.spec.target_names.index(target)]
        levels = tuple(level for level in core.spec.quantiles if level_column(level) in rows)
        quantiles = np.stack([rows[level_column(level)].to_numpy(np.float64) for level in levels], axis=1)
        middle = quantiles[:, levels.index(0.5)] if 0.5 in levels else rows[SERVICE].to_numpy(np.float64)
        fan = Fan(cutoff_ms, ends_ms, middle, quantiles, levels)
        panels.append(Panel(name, target, whole.end_ms[own], whole.values[own, channel], fan))
    path.parent.mkdir(parents=True, exist_ok=True)
    return draw(path, title, panels)


def _passed(data: FileData, timeline: Timeline, watcher: Watcher) -> pd.DataFrame:
    core, keeper = data.core, Memory()
    newest_ms = int(core.rule.end_ms(np.array(data.facts.last_ms // core.rule.hop_ms)))
    # With hopping windows the last reading lies in several; the last of them ends last.
    matching = matching_for(core, timeline, Kept(newest_ms))
    source = FileInput(data.read(None), core.format.fields, "file")
    Passage(data.settings, source, timeline, matching, keeper, watcher.progress).run()
    return frame_of(keeper.tables, matching.shape.schema).drop(columns="y")
