"""AutoETS, AutoARIMA and their kin beside the service, at the same cutoffs: statsforecast's, an extra (`millrace[stats]`).

Each is fitted anew at every cutoff, on the newest steps of that sensor alone; missing values are filled forward. That is honest and slow
(a tenth of a second a fit and more): keep every so many cutoffs only (`--stride`).

Garza, F. et al. (2022), StatsForecast: lightning fast forecasting with statistical and econometric models, PyCon.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import pandas as pd

from models.measures import Said
from pipeline.errors import DeploymentError, SettingsError
from pipeline.stream.columns import Float64

FEWEST_STEPS: Final = 12
"""Fewer are no series to these models: they say nothing."""


class Statistical:
    """Models by their names in `statsforecast.models`.

    season: steps, 1 = none. history_steps: the newest so many that a fit sees. Raises SettingsError for a name that there is not,
    DeploymentError where the library is not installed."""

    def __init__(
        self, names: Sequence[str], season: int, horizon: int, levels: Sequence[float], history_steps: int
    ) -> None:
        self.names = tuple(names)
        self.history_steps = history_steps
        self._horizon = horizon
        self._levels = tuple(levels)
        try:
            known: Any = importlib.import_module("statsforecast.models")
            self._library: Any = importlib.import_module("statsforecast")
        except ImportError as error:
            raise DeploymentError(
                f"{', '.join(names)} come from statsforecast, which is not installed ({error}); pip install 'millrace[stats]'"
            ) from None
        for name in names:
            if name not in known.__all__:
                raise SettingsError(
                    f"--beside {name}: statsforecast has no such model; expected one such as AutoETS, AutoARIMA or AutoTheta"
                )
        fallback = known.SeasonalNaive(season_length=season) if season > 1 else known.Naive()
        self._models = [_made(getattr(known, name), season) for name in names]
        self._fallback = fallback

    def forecast(self, histories: Sequence[Float64]) -> list[Said]:
        """histories: n arrays of steps in time order, NaN = missing. One `Said` a model: (n, H) and (n, H, Q); NaN where a history is
        too short. A model that cannot be fitted to a history is stood in for by the (seasonal) naive one."""
        n = len(histories)
        said = [
            Said(np.full((n, self._horizon), np.nan), np.full((n, self._horizon, len(self._levels)), np.nan))
            for _ in self.names
        ]
        filled = [pd.Series(history).ffill().dropna().to_numpy() for history in histories]
        rows = [row for row, history in enumerate(filled) if len(history) >= FEWEST_STEPS]
        if not rows:
            return said
        lengths = [len(filled[row]) for row in rows]
        frame = pd.DataFrame(
            {
                "unique_id": np.repeat(rows, lengths),
                "ds": np.concatenate([np.arange(length) for length in lengths]),
                "y": np.concatenate([filled[row] for row in rows]),
            }
        )
        forecaster = self._library.StatsForecast(models=self._models, freq=1, fallback_model=self._fallback, n_jobs=1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = forecaster.forecast(df=frame, h=self._horizon, level=self._percent())
        found = found.sort_values(["unique_id", "ds"])
        for name, one in zip(self.names, said):
            assert one.quantiles is not None
            one.mean[rows] = found[name].to_numpy().reshape(-1, self._horizon)
            for q, level in enumerate(self._levels):
                one.quantiles[rows, :, q] = found[_column(name, level)].to_numpy().reshape(-1, self._horizon)
        return said

    def _percent(self) -> list[float]:
        return sorted({_interval(level) for level in self._levels if level != 0.5})


def _interval(level: float) -> float:
    """Nominal coverage, in percent, of the interval that a quantile is one end of."""
    return round(100 * abs(2 * level - 1), 6)


def _column(name: str, level: float) -> str:
    """
    >>> _column("AutoETS", 0.1), _column("AutoETS", 0.9), _column("AutoETS", 0.5)
    ('AutoETS-lo-80.0', 'AutoETS-hi-80.0', 'AutoETS')
    """
    if level == 0.5:
        return name
    return f"{name}-{'lo' if level < 0.5 else 'hi'}-{_interval(level)}"


def _made(kind: Any, season: int) -> Any:
    try:
        return kind(season_length=season)
    except TypeError:
        return kind()
