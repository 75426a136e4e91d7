"""Small models for the load's series. How good they are does not matter, that their hidden state matters does."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from models.forecaster import Model
from pipeline.settings import load
from tests.chaos.load import LONGEST_GAP, SEASON, START_MS, WINDOW_MS

UNITS, HORIZON, WARMUP = 16, 6, 6
VARIANTS: Final[Mapping[str, Mapping[str, Any]]] = {
    "another-cell": {"model.cell": "lstm", "model.units": 12, "training.seed": 1},
    "another-horizon": {"forecast.horizon": 9, "training.seed": 2},
    "another-seed": {"training.seed": 3},
}
"""Name -> in what its settings differ from those of the workers."""


def shape(model: Path) -> dict[str, Any]:
    """The settings that model, workers and oracle share."""
    return {
        "readings.fields": ["value"],
        "windows.size": "1m",
        "windows.grace": "20s",
        "windows.max_gap": LONGEST_GAP,
        "forecast.horizon": HORIZON,
        "forecast.season": [f"{SEASON}m"],
        "forecast.warmup": WARMUP,
        "model.units": UNITS,
        "model.path": str(model),
        "training.epochs": 2,
        "training.lanes": 8,
        "training.chunk": 48,
    }


def make_model(folder: Path, changed: Mapping[str, Any] | None = None) -> Path:
    """A small GRU, or what the changed settings say."""
    from models.sequences import Sequences
    from pipeline.service.assembly import task_settings
    from pipeline.service.fitting import fit

    settings = load(None, {}, shape(folder) | dict(changed or {}))
    steps, sensors = 20 * SEASON, 8
    sensor = np.repeat(np.arange(sensors, dtype=np.int32), steps)
    end_ms = np.tile(START_MS - WINDOW_MS * np.arange(steps)[::-1], sensors)
    wave = 20 + 4 * np.sin(2 * np.pi * np.arange(steps) / SEASON)
    noise = np.random.default_rng(settings.training.seed).normal(0, 0.5, (sensors * steps, 1))
    values = np.tile(wave, sensors)[:, None] + noise
    fit(
        settings,
        task_settings(settings).spec,
        Sequences(sensor, end_ms, values, np.zeros(len(sensor), np.bool_)),
        folder,
    )
    return folder


def make_variants(folder: Path) -> tuple[Path, ...]:
    """Models that differ from the first in all in which a model may differ."""
    return tuple(make_model(folder / name, changed) for name, changed in VARIANTS.items())


def load_models(folders: Iterable[Path]) -> dict[str, Model]:
    """By version, each as its folder has it."""
    from models.artifact import load as load_artifact

    models = [load_artifact(folder) for folder in folders]
    return {model.version: model for model in models}


def version_of(folder: Path) -> str:
    return str(json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["version"])
