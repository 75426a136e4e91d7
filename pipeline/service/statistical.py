"""AutoETS, AutoARIMA and their kin beside the service, at the same cutoffs: statsforecast's, an extra (`millrace[stats]`).

Each is fitted anew at every cutoff, on the newest steps of that sensor alone; missing values are filled forward. That is honest and slow
(a tenth of a second a fit and more): keep every so many cutoffs only (`--stride`).

Garza, F. et al. (2022), StatsForecast: lightning fast forecasting with statistical and econometric models, PyCon.
"""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import numpy as np
import pandas as pd

from models.measures import Said
from pipeline.errors import DeploymentError, SettingsError
from pipeline.stream.columns import Float64

FEWEST_STEPS: Final = 12
"""Fewer are no series to these models: they say nothing."""
_SUCH_AS: Final = "such as AutoETS, AutoARIMA or AutoTheta"


class Statistical:
    """Models by their names in `statsforecast.models`.

    season: steps, 1 = none. history_steps: the newest so many that a fit sees. Raises SettingsError for a name that there is not or that
    a name alone does not make, DeploymentError where a library is not installed."""

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
                raise SettingsError(f"--beside {name}: statsforecast has no such model; expected one {_SUCH_AS}")
        fallback = known.SeasonalNaive(season_length=season) if season > 1 else known.Naive()
        models = [_made(known, name, season) for name in names]
        self._banded = [model for model in models if _gives_intervals(model)]
        self._bare = [model for model in models if model not in self._banded]
        self._fallback = fallback

    def forecast(self, histories: Sequence[Float64]) -> list[Said]:
        """histories: n arrays of steps in time order, NaN = missing. One `Said` a model: (n, H) and (n, H, Q), or no quantiles where the
        model knows none; NaN where a history is too short. A model that cannot be fitted to a history is stood in for by the (seasonal)
        naive one."""
        shape = len(histories), self._horizon
        bands = {model.alias: np.full((*shape, len(self._levels)), np.nan) for model in self._banded}
        said = {name: Said(np.full(shape, np.nan), bands.get(name)) for name in self.names}
        filled = [_filled(history) for history in histories]
        rows = [row for row, history in enumerate(filled) if len(history) >= FEWEST_STEPS]
        if not rows:
            return list(said.values())
        lengths = [len(filled[row]) for row in rows]
        frame = pd.DataFrame(
            {
                "unique_id": np.repeat(rows, lengths),
                "ds": np.concatenate([np.arange(length) for length in lengths]),
                "y": np.concatenate([filled[row] for row in rows]),
            }
        )
        for models, percent in ((self._banded, self._percent()), (self._bare, None)):
            if not models:
                continue
            forecaster = self._library.StatsForecast(models=models, freq=1, fallback_model=self._fallback, n_jobs=1)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = forecaster.forecast(df=frame, h=self._horizon, level=percent).sort_values(["unique_id", "ds"])
            for name in (model.alias for model in models):
                said[name].mean[rows] = found[name].to_numpy().reshape(-1, self._horizon)
                for q, level in enumerate(self._levels if name in bands else ()):
                    bands[name][rows, :, q] = found[_column(name, level)].to_numpy().reshape(-1, self._horizon)
        return list(said.values())

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


def _made(known: Any, name: str, season: int) -> Any:
    kind = getattr(known, name)
    takes = inspect.signature(kind).parameters
    lacking = [word for word, one in takes.items() if one.default is one.empty and word != "season_length"]
    if lacking:
        raise SettingsError(
            f"--beside {name}: it cannot be made without {', '.join(lacking)}; expected one that needs a season at most, {_SUCH_AS}"
        )
    with _saying_what_is_missing(name):
        model = kind(season_length=season) if "season_length" in takes else kind()
    model.alias = name
    return model


def _gives_intervals(model: Any) -> bool:
    """Some know none, and raise for those who ask: what stands in for a model that raises must not stand in for these."""
    with _saying_what_is_missing(model.alias), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model.forecast(y=np.sin(np.arange(2.0 * FEWEST_STEPS)), h=1, level=[80])
        except ImportError:
            raise
        except Exception as error:
            return "prediction_intervals" not in str(error)
    return True


@contextmanager
def _saying_what_is_missing(name: str) -> Iterator[None]:
    """Some models need a library that statsforecast itself does without."""
    try:
        yield
    except ImportError as error:
        raise DeploymentError(f"--beside {name}: {error} Install it, or leave the model out") from None


def _filled(history: Float64) -> Float64:
    """Missing values as the value before them; what is missing at the beginning is left out."""
    known = pd.Series(np.where(np.isfinite(history), history, np.nan)).ffill().dropna()
    return np.asarray(known, np.float64)
