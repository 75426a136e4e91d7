"""What the report says, before it is a page: what is handed in, who is held against whom, and how numbers are written.

Forecasters stand in one order and one colour throughout: Millrace, which is what the service answered, then the baselines.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pipeline.service.picture import LINES, THEME, Fan

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]
Writer = Callable[[float], str]

SERVICE: Final = "Millrace"
ERRORS: Final = ("MASE", "scaled_MAE", "scaled_MSE", "MAE", "RMSE", "MSE", "sMAPE", "pinball")
"""The lower, the better; as columns stand in the tables. After them: coverage (the nearer to nominal, the better) and width."""
MEASURES: Final = (*ERRORS, "coverage", "width")
TITLES: Final = {
    "scaled_MAE": "scaled MAE",
    "scaled_MSE": "scaled MSE",
    "pinball": "Pinball",
    "coverage": "Coverage",
    "width": "Width",
}


@dataclass(frozen=True, slots=True)
class OverTime:
    """Matured error as the live service measures it."""

    ends_ms: Int64
    """(n) ends of time bins, ascending."""
    by_name: Mapping[str, Float64]
    """Forecaster -> (n) mean absolute error in the sensors' running standard deviations; NaN = nothing matured."""


@dataclass(frozen=True, slots=True)
class Mark:
    """A retraining, or another change of the model that answers."""

    time_ms: int
    kind: str
    """promoted, refused, failed, rolled-back, trained or swap."""
    label: str
    """One sentence."""


@dataclass(frozen=True, slots=True)
class SensorFans:
    """A stretch of one sensor, and what was said of it."""

    unique_id: str
    why: str
    """Why this sensor is shown, such as "worst (MASE 2.3)"."""
    starts_ms: Int64
    """(m) windows by their start, ascending."""
    values: Float64
    """(m) NaN = no reading."""
    fans: tuple[Fan, ...]
    """Forecasts that do not overlap, by their cutoff."""


@dataclass(frozen=True, slots=True)
class Report:
    """All that the page says."""

    title: str
    facts: Sequence[tuple[str, str]]
    """What was measured, as name and value: data range, sensors, model, time taken."""
    metrics: pd.DataFrame
    """unique_id (None = all), lead (Int64, 1 = next step; NA = all), forecaster, labels, MEASURES (models/measures.py says what each
    is; coverage and sMAPE as shares). NaN = not known, such as pinball of a forecaster without quantiles."""
    levels: tuple[float, ...]
    """(Q) of the quantiles, ascending."""
    step_ms: int
    reliability: Mapping[str, Float64]
    """Forecaster -> (Q) share of truths at or below each quantile."""
    over_time: OverTime
    marks: Sequence[Mark]
    fans: Sequence[SensorFans]
    settings: str
    """TOML"""
    notes: Sequence[str] = ()
    """Warnings, in view."""


# -- the figures


class Metrics:
    """The metrics by what they are over, and what is held against what."""

    def __init__(self, metrics: pd.DataFrame, levels: Sequence[float]) -> None:
        frame = metrics.reindex(columns=["unique_id", "lead", "forecaster", "labels", *MEASURES])
        numbers = frame[["labels", *MEASURES]].astype("float64")
        frame[["labels", *MEASURES]] = numbers.where(np.isfinite(numbers))
        if len(levels) < 2:
            frame[["coverage", "width"]] = math.nan
        every_sensor, every_lead = frame["unique_id"].isna(), frame["lead"].isna()
        names = dict.fromkeys(frame["forecaster"].dropna().astype(str))
        self.names = tuple(sorted(names, key=lambda name: name != SERVICE))
        """The service first."""
        self.overall = frame[every_sensor & every_lead].set_index("forecaster").reindex(list(self.names))
        self.by_lead = frame[every_sensor & ~every_lead].astype({"lead": "int64"})
        self.by_sensor = frame[~every_sensor & every_lead]
        self.nominal = levels[-1] - levels[0] if len(levels) > 1 else None
        """Share of truths that should lie between the outermost quantiles; None: there is no interval."""
        self.measure = next((name for name in ("MASE", "scaled_MAE", "MAE") if self._known(name)), None)
        """What forecasters are held against each other by; None: the service has no error."""
        self.rival = self.best_baseline(self.measure)

    def of(self, name: str, measure: str) -> float:
        """Over all sensors and leads; NaN = not known."""
        return float(self.overall[measure].get(name, math.nan))

    def best_baseline(self, measure: str | None) -> str | None:
        """The one with the lowest value; None: no baseline has any."""
        if measure is None:
            return None
        known = self.overall[measure].iloc[1:].dropna()
        return None if known.empty else str(known.idxmin())

    def curves(self, frame: pd.DataFrame, index: str, measure: str) -> pd.DataFrame:
        """Leads or sensors x forecasters, rows in which nothing is known left out."""
        pivot = frame.pivot(index=index, columns="forecaster", values=measure)
        return pivot.reindex(columns=list(self.names)).dropna(how="all")

    def _known(self, measure: str) -> bool:
        return bool(self.names) and math.isfinite(self.of(self.names[0], measure))


@dataclass(frozen=True, slots=True)
class Forecaster:
    """How one looks in every chart and key."""

    number: int
    name: str
    colour: str
    """A role of the theme."""
    marker: str
    outline: str
    """The marker as an SVG path around (14, 5), for keys."""
    width: float

    @property
    def line(self) -> dict[str, Any]:
        return {"color": THEME[self.colour][0], "linewidth": self.width, "zorder": 4 if self.number == 0 else 3}


_MARKERS: Final = (
    ("o", "M11 5a3 3 0 1 0 6 0a3 3 0 1 0 -6 0z"),
    ("s", "M11.4 2.4h5.2v5.2h-5.2z"),
    ("^", "M14 1.6l3.2 6h-6.4z"),
    ("D", "M14 1.4l3.6 3.6l-3.6 3.6l-3.6 -3.6z"),
    ("v", "M14 8.4l3.2 -6h-6.4z"),
)


def forecasters_of(metrics: Metrics, report: Report) -> dict[str, Forecaster]:
    names = dict.fromkeys([*metrics.names, *report.over_time.by_name, *report.reliability])
    return {
        name: Forecaster(i, name, LINES[i % len(LINES)], *_MARKERS[i % len(_MARKERS)], 2.2 if i == 0 else 1.4)
        for i, name in enumerate(names)
    }


# -- words and numbers

NOTHING: Final = "–"


def writer(values: Sequence[float], measure: str) -> Writer:
    """Writes one column: as many decimals for all as give the smallest three digits."""
    if measure in SHARES:
        return lambda share: f"{100 * share:.1f} %" if math.isfinite(share) else NOTHING
    sizes = [abs(value) for value in values if math.isfinite(value) and value]
    decimals = min(max(2 - math.floor(math.log10(min(sizes))), 0), 6) if sizes else 2

    def write(value: float) -> str:
        if not math.isfinite(value):
            return NOTHING
        text = f"{value:,.{decimals}f}"
        return f"{value:.2e}" if value and not float(text.replace(",", "")) else text

    return write


SHARES: Final = ("coverage", "sMAPE")


def significant(value: float) -> str:
    return f"{value:,.4g}" if math.isfinite(value) else NOTHING


def percent(share: float) -> str:
    """
    >>> percent(0.8), percent(0.7931)
    ('80 %', '79.3 %')
    """
    return f"{100 * share:.1f}".removesuffix(".0") + " %" if math.isfinite(share) else NOTHING


def pair(one: float, other: float) -> tuple[str, str]:
    """Two numbers, with as many digits as tell them apart.

    >>> pair(0.8, 1.08), pair(0.8213, 0.8249), pair(123.0, 1524.2), pair(0.00123, 0.2)
    (('0.80', '1.08'), ('0.821', '0.825'), ('123', '1,524'), ('0.0012', '0.2000'))
    """
    smaller = min(abs(one), abs(other)) or max(abs(one), abs(other)) or 1.0
    size = math.floor(math.log10(smaller))
    least = min(max(2 - size, 0), 2) if size >= -1 else min(1 - size, 9)
    texts = [(f"{one:,.{digits}f}", f"{other:,.{digits}f}") for digits in range(least, least + 3)]
    return next((both for both in texts if both[0] != both[1]), texts[0])


def change(mine: float, theirs: float) -> str:
    """
    >>> change(0.82, 1.08), change(1.08, 0.82), change(1.0, 1.004), change(1, 1), change(1, 0)
    ('24 % below', '32 % above', '0.4 % below', 'the same as', 'above')
    """
    if mine == theirs:
        return "the same as"
    side = "below" if mine < theirs else "above"
    if not theirs:
        return side
    off = 100 * abs(mine / theirs - 1)
    return f"{off:,.0f} % {side}" if off >= 1 else f"{off:.1g} % {side}"


def count(value: float) -> str:
    return f"{value:,.0f}" if math.isfinite(value) else NOTHING


def span(ms: int) -> str:
    """
    >>> span(5_400_000), span(86_400_000), span(250)
    ('1 h 30 min', '1 d', '250 ms')
    """
    parts = []
    for unit, size in (("d", 86_400_000), ("h", 3_600_000), ("min", 60_000), ("s", 1000), ("ms", 1)):
        whole, ms = divmod(ms, size)
        if whole:
            parts.append(f"{whole} {unit}")
    return " ".join(parts[:2])
