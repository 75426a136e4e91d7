"""AutoETS, AutoARIMA and their kin beside the service, at the same cutoffs: statsforecast's, the extra `stats`.

Each is fitted anew at every cutoff, on the newest steps of that sensor alone; missing values are filled forward. That is honest and slow
(a quarter of a second a fit and more): keep every so many cutoffs only (`--stride`).

Garza, F. et al. (2022), StatsForecast: lightning fast forecasting with statistical and econometric models, PyCon.
"""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
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
        except ImportError as error:
            raise DeploymentError(
                f"{', '.join(names)} come from statsforecast, which is not installed ({error}); pip install statsforecast"
            ) from None
        for name in names:
            if name not in known.__all__:
                raise SettingsError(f"--beside {name}: statsforecast has no such model; expected one {_SUCH_AS}")
        self._percent = sorted({_interval(level) for level in self._levels if level != 0.5}) or None
        self._models = [_made(known, name, season) for name in names]
        self._banded = [_gives_intervals(name, model) for name, model in zip(names, self._models)]
        self._fallback = known.SeasonalNaive(season_length=season) if season > 1 else known.Naive()

    def forecast(self, histories: Sequence[Float64]) -> list[Said]:
        """histories: n arrays of steps in time order, NaN = missing. One `Said` a model: (n, H) and (n, H, Q), or no quantiles where the
        model knows none; NaN where a history is too short. A model that cannot be fitted to a history is stood in for by the (seasonal)
        naive one."""
        shape = len(histories), self._horizon
        said = [
            Said(np.full(shape, np.nan), np.full((*shape, len(self._levels)), np.nan) if banded else None)
            for banded in self._banded
        ]
        for row, history in enumerate(map(_filled, histories)):
            if len(history) < FEWEST_STEPS:
                continue
            for model, one in zip(self._models, said):
                found = self._ask(model, history, None if one.quantiles is None else self._percent)
                one.mean[row] = found["mean"]
                if one.quantiles is not None:
                    one.quantiles[row] = np.stack([found[_key(level)] for level in self._levels], axis=1)
        return said

    def _ask(self, model: Any, history: Float64, percent: Sequence[float] | None) -> Mapping[str, Float64]:
        """mean, lo-80.0, hi-80.0, ... -> (H). One by one: StatsForecast itself takes these by their place, and each model, the stand-in
        too, has them in an order of its own."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                found: Mapping[str, Float64] = model.forecast(y=history, h=self._horizon, level=percent)
            except Exception:
                found = self._fallback.forecast(y=history, h=self._horizon, level=percent)
        return found


def _interval(level: float) -> float:
    """Nominal coverage, in percent, of the interval that a quantile is one end of."""
    return round(100 * abs(2 * level - 1), 6)


def _key(level: float) -> str:
    """
    >>> _key(0.1), _key(0.9), _key(0.5)
    ('lo-80.0', 'hi-80.0', 'mean')
    """
    if level == 0.5:
        return "mean"
    return f"{'lo' if level < 0.5 else 'hi'}-{_interval(level)}"


def _made(known: Any, name: str, season: int) -> Any:
    kind = getattr(known, name)
    takes = inspect.signature(kind).parameters
    needed = [word for word, one in takes.items() if one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD]
    lacking = [word for word in needed if word != "season_length"]
    if lacking:
        raise SettingsError(
            f"--beside {name}: it cannot be made without {', '.join(lacking)}; expected one that needs a season at most, {_SUCH_AS}"
        )
    with _saying_what_is_missing(name):
        return kind(season_length=season) if "season_length" in takes else kind()


def _gives_intervals(name: str, model: Any) -> bool:
    """Some know none, and raise for those who ask: what stands in for a model that raises must not stand in for these."""
    with _saying_what_is_missing(name), warnings.catch_warnings():
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
