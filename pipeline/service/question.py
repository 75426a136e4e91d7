"""What is asked of a backtest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from pipeline.errors import SettingsError
from pipeline.service.history import LEAD_IN_STEPS
from pipeline.stream.task import TaskSettings

Place = int | Mapping[int, int] | None
"""A time (epoch ms), or an offset of each partition."""


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked of a backtest. At most one of model, train_until_ms, retrain_every and recorded."""

    model: str = ""
    """A folder that `millrace train` wrote, or a version of the models topic."""
    train_until_ms: int | None = None
    retrain_every: str = ""
    """A duration of event time."""
    recorded: bool = False
    """The models that answered live, where the workers wrote that they took over."""
    start: Place = None
    """Forecasts from here on; a given or recorded model has its state warmed by what came before."""
    end: Place = None
    """Readings before this."""
    lead_in_ms: int | None = None
    """How far before a start in time is read; None: LEAD_IN_STEPS windows."""
    stride: int = 1
    """Every n-th window is a cutoff."""
    beside: tuple[str, ...] = ()
    """Names in `statsforecast.models`."""
    history_steps: int = 0
    """What these see of a sensor; 0: ten seasons, or ten horizons."""
    out: Path | None = None
    overwrite: bool = False

    @property
    def start_ms(self) -> int | None:
        return self.start if isinstance(self.start, int) else None

    @property
    def learns(self) -> bool:
        return self.train_until_ms is not None or bool(self.retrain_every)

    @property
    def has_model(self) -> bool:
        """Something was said about who answers."""
        return self.learns or self.recorded or bool(self.model)

    @property
    def kept_from_ms(self) -> int | None:
        """Forecasts issued before this are of no interest."""
        return self.start_ms if self.train_until_ms is None else self.train_until_ms

    def reads_from_ms(self, core: TaskSettings) -> int | None:
        """Where a start in time has reading begin."""
        if self.start_ms is None or self.learns:
            return self.start_ms
        lead_in_ms = LEAD_IN_STEPS * core.rule.hop_ms if self.lead_in_ms is None else self.lead_in_ms
        return self.start_ms - lead_in_ms

    def facts(self) -> dict[str, Any]:
        """For JSON: all that shapes what is said, but for the model's name, which may be a folder's."""
        found = asdict(self) | {"start": str(self.start), "end": str(self.end)}
        return {name: value for name, value in found.items() if name not in ("model", "out", "overwrite")}

    def __post_init__(self) -> None:
        ways = {
            "--model": bool(self.model),
            "--train-until": self.train_until_ms is not None,
            "--retrain-every": bool(self.retrain_every),
            "--recorded": self.recorded,
        }
        chosen = [name for name, given in ways.items() if given]
        if len(chosen) > 1:
            raise SettingsError(
                f"{' and '.join(chosen)} were given: expected one of them, they say which model answers"
            )
        if self.stride < 1:
            raise SettingsError(f"--stride {self.stride}: expected a whole number of windows, at least 1")


def epoch_ms(moment: Any) -> int | None:
    """A time as pandas reads it; UTC without a zone. Raises SettingsError for anything else."""
    if moment is None:
        return None
    if isinstance(moment, int | float) and moment == moment:  # as readings: below 1e11 it is epoch seconds
        return round(moment * 1000 if abs(moment) < 1e11 else moment)
    try:
        found = pd.Timestamp(moment)
    except (ValueError, TypeError) as error:
        raise SettingsError(f"{moment!r} is no time ({error}); expected one such as 2026-01-31") from None
    if pd.isna(found):
        raise SettingsError(f"{moment!r} is no time; expected one such as 2026-01-31")
    return int((found.tz_localize("UTC") if found.tzinfo is None else found).timestamp() * 1000)
