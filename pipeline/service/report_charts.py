"""The charts of the report: errors and coverage by lead, calibration, errors over time, fans of sensors, spread over sensors.

Names and sentences that come from data are never drawn, because a chart's words are ours; the mouse shows them, escaped.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, NamedTuple

import matplotlib
import numpy as np
import pandas as pd
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from pipeline.service import picture
from pipeline.service.picture import INK, SOFT, THEME
from pipeline.service.report_figures import (
    TITLES,
    Float64,
    Forecaster,
    Mark,
    Metrics,
    Report,
    SensorFans,
    percent,
    span,
    writer,
)
from pipeline.service.words import moment

Tips = Mapping[str, Sequence[str]]
"""gid of a drawn line -> what the mouse shows over its markers."""


@dataclass(frozen=True, slots=True)
class Charts:
    """By section of the page."""

    leads: Sequence[_Chart]
    calibration: Sequence[_Chart]
    over_time: _Chart
    fans: Sequence[_Chart]
    """(sensors shown)"""
    spread: _Chart | None
    """None: too few sensors."""


def draw_charts(metrics: Metrics, forecasters: Mapping[str, Forecaster], report: Report) -> Charts:
    """All of them, each whole or with the reason why it is missing."""
    with matplotlib.rc_context({**picture.STYLE, "font.size": _FONT_SIZE}):
        return Charts(
            leads=list(_lead_charts(metrics, forecasters, report.step_ms)),
            calibration=list(_calibration_charts(metrics, forecasters, report)),
            over_time=_over_time_chart(report, forecasters),
            fans=[_fan_chart(i, fans, report) for i, fans in enumerate(report.fans)],
            spread=_spread_chart(metrics, forecasters),
        )


_FONT_SIZE: Final = 9.5
_HALF, _WIDE = 5.0, 11.0
"""Inches: of a chart that has half the page, or a phone, and of one that has the whole width. Letters come out alike in both."""


@dataclass(frozen=True, slots=True)
class _Chart:
    title: str
    text: str
    """What it shows, in a sentence or two."""
    drawings: Mapping[str, Markup] = field(default_factory=dict)
    """Class -> SVG: "half", or "wide" and "narrow", of which the page shows one."""
    missing: str = ""
    """Why nothing is drawn."""
    name: str = ""
    """Of a sensor, before the text."""


Plot = Callable[[Figure], Tips | None]


def _drawings(name: str, label: str, plot: Plot, height: float, wide: bool = False) -> dict[str, Markup]:
    """name: of no other chart in the page. height: inches."""
    drawings = {}
    for kind, width in {"wide": _WIDE, "narrow": _HALF}.items() if wide else [("half", _HALF)]:
        figure = Figure(figsize=(width, height), layout="constrained")
        tips = plot(figure)
        drawings[kind] = Markup(picture.inline_svg(figure, f"{name}-{kind}", label, tips))
    return drawings


# -- by lead


def _lead_charts(metrics: Metrics, forecasters: Mapping[str, Forecaster], step_ms: int) -> Iterable[_Chart]:
    measure = metrics.measure or "MASE"
    texts = {
        "MASE": "At the dashed 1, as far off as repeating the value of one season before was in sample.",
        "scaled_MAE": "In standard deviations of each series.",
        "MAE": "In each sensor’s own unit.",
        "pinball": "What quantile forecasts are trained for and judged by; mean over the levels, in each sensor’s own unit.",
    }
    for name in (measure, "pinball"):
        title = f"{TITLES.get(name, name)} by lead"
        curves = metrics.curves(metrics.by_lead, "lead", name)
        if len(curves) < 2:
            yield _Chart(title, texts[name], missing=_why_no_leads(curves, name))
            continue
        plot = partial(
            _draw_by_lead, curves=curves, forecasters=forecasters, step_ms=step_ms, measure=name,
            level=1.0 if name == "MASE" else None,
        )  # fmt: skip
        label = f"{title} of {len(curves.columns)} forecasters, leads {curves.index[0]} to {curves.index[-1]}"
        yield _Chart(title, texts[name], _drawings(f"lead-{name}", label, plot, 3.1))


def _why_no_leads(curves: pd.DataFrame, measure: str) -> str:
    if len(curves):
        return "There is one lead only: what is said over all leads is said of it."
    return "No forecaster gave quantiles that matured." if measure in ("pinball", "coverage") else "Nothing matured."


def _draw_by_lead(
    figure: Figure,
    curves: pd.DataFrame,
    forecasters: Mapping[str, Forecaster],
    step_ms: int,
    measure: str,
    level: float | None,
) -> Tips:
    """curves: leads x forecasters. level: a line across, to compare with."""
    axis = figure.subplots()
    unit, unit_ms = _lead_unit(int(curves.index[-1]) * step_ms)
    tips: dict[str, list[str]] = {}
    write = writer(curves.to_numpy().ravel().tolist(), measure)
    for name, curve in curves.items():
        known, who = curve.dropna(), forecasters[str(name)]
        ahead = known.index.to_numpy() * step_ms / unit_ms
        every = 1 + len(curves) // 25
        line = axis.plot(ahead, known.to_numpy(), marker=who.marker, markersize=4, markevery=every, **who.line)[0]
        line.set_gid(f"tips-{who.number}")
        tips[f"tips-{who.number}"] = [
            f"{name}, {span(lead * step_ms)} ahead: {write(value)}"
            for lead, value in zip(known.index.tolist()[::every], known.tolist()[::every])
        ]
    if level is not None:
        axis.axhline(level, color=SOFT, linewidth=1, linestyle=(0, (4, 3)), zorder=2)
    if measure == "coverage":
        _percent_axis(axis.yaxis)
        _around(axis, curves.to_numpy(), level)
    else:
        axis.set_ylim(bottom=0)
    axis.xaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 3, 6, 10]))
    axis.set_xlabel(f"{unit} ahead")
    axis.margins(x=0.02)
    picture.plain(axis)
    return tips


def _around(axis: Any, values: Float64, level: float | None) -> None:
    """A scale for shares that lets small differences look small: ten points on either side of the level at least."""
    near = [] if level is None else [level - 0.1, level + 0.1]
    low, high = np.nanmin([*values.ravel(), *near]), np.nanmax([*values.ravel(), *near])
    axis.set_ylim(max(low - 0.02, 0), min(high + 0.02, 1.005))


def _percent_axis(axis: Any) -> None:
    axis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))


def _lead_unit(most_ms: int) -> tuple[str, int]:
    """What leads up to `most_ms` are counted in."""
    units = (("days", 86_400_000, 3), ("hours", 3_600_000, 2), ("minutes", 60_000, 2), ("seconds", 1000, 0))
    return next((name, size) for name, size, least in units if most_ms >= least * size)


# -- calibration


def _calibration_charts(metrics: Metrics, forecasters: Mapping[str, Forecaster], report: Report) -> Iterable[_Chart]:
    yield _coverage_chart(metrics, forecasters, report.step_ms)
    title = "Observed against nominal levels"
    text = (
        "On the diagonal a quantile holds what it claims. Flatter than it: bands too narrow; steeper: too wide;"
        " wholly above: forecasts too high."
    )
    known = {name: shares for name, shares in report.reliability.items() if np.isfinite(shares).any()}
    if not known:
        yield _Chart(title, text, missing="No forecaster gave quantiles that matured.")
        return
    plot = partial(_draw_reliability, levels=np.array(report.levels), shares=known, forecasters=forecasters)
    label = f"Reliability diagram of {len(known)} forecasters at {len(report.levels)} levels"
    yield _Chart(title, text, _drawings("reliability", label, plot, 3.1))


def _coverage_chart(metrics: Metrics, forecasters: Mapping[str, Forecaster], step_ms: int) -> _Chart:
    title = "Coverage by lead"
    if metrics.nominal is None:
        return _Chart(title, "", missing="One quantile is no interval: there is no coverage.")
    text = f"Share of truths between the outermost quantiles; dashed: the {percent(metrics.nominal)} that should be."
    curves = metrics.curves(metrics.by_lead, "lead", "coverage")
    if len(curves) < 2:
        return _Chart(title, text, missing=_why_no_leads(curves, "coverage"))
    plot = partial(
        _draw_by_lead, curves=curves, forecasters=forecasters, step_ms=step_ms, measure="coverage",
        level=metrics.nominal,
    )  # fmt: skip
    return _Chart(title, text, _drawings("coverage", f"{title} against {percent(metrics.nominal)}", plot, 3.1))


def _draw_reliability(
    figure: Figure, levels: Float64, shares: Mapping[str, Float64], forecasters: Mapping[str, Forecaster]
) -> Tips:
    axis = figure.subplots()
    tips = {}
    axis.plot([0, 1], [0, 1], color=SOFT, linewidth=1, linestyle=(0, (4, 3)), zorder=2)
    for name, observed in shares.items():
        who, known = forecasters[name], np.isfinite(observed)
        gid = f"tips-{who.number}"
        axis.plot(levels[known], observed[known], marker=who.marker, markersize=5, **who.line)[0].set_gid(gid)
        tips[gid] = [
            f"{name}: {percent(share)} of the truths at or below its {percent(level)} quantile"
            for level, share in zip(levels[known].tolist(), observed[known].tolist())
        ]
    axis.set(xlim=(0, 1), ylim=(0, 1.005), xlabel="nominal level", ylabel="observed share", aspect="equal")
    _percent_axis(axis.xaxis)
    _percent_axis(axis.yaxis)
    picture.plain(axis)
    return tips


# -- over time

_OTHER: Final = "other"
KINDS: Final = {
    "promoted": "ink",
    "trained": "ink",
    "rolled-back": "red",
    "swap": "ink",
    "failed": "red",
    "refused": "edge",
    _OTHER: "soft",
}
"""Of marks -> colour, none that a forecaster has; from the top of the strip."""
_CHANGES: Final = ("promoted", "trained", "rolled-back", "swap")
"""After these another model answers: a line through the errors."""


class _Kind(NamedTuple):
    """Marks of one kind."""

    name: str
    marks: int
    colour: str


def mark_kinds(marks: Sequence[Mark]) -> list[_Kind]:
    counts = Counter(_drawn_kind(mark) for mark in marks)
    return [_Kind(kind, counts[kind], colour) for kind, colour in KINDS.items() if counts[kind]]


def _drawn_kind(mark: Mark) -> str:
    return mark.kind if mark.kind in KINDS else _OTHER


def _over_time_chart(report: Report, forecasters: Mapping[str, Forecaster]) -> _Chart:
    title = "Mean absolute error over time"
    text = "Of the forecasts that came true in each stretch, in the sensors’ running standard deviations."
    if not any(np.isfinite(errors).any() for errors in report.over_time.by_name.values()):
        return _Chart(title, text, missing="Nothing matured.")
    kinds = mark_kinds(report.marks)
    if kinds:
        text += " The strip on top has every decision about a model; lines go down where another model began to answer."
    plot = partial(_draw_over_time, report=report, forecasters=forecasters, kinds=kinds)
    label = ", ".join(
        [f"{title}, {len(report.over_time.by_name)} forecasters", *(f"{n} {name}" for name, n, _ in kinds)]
    )
    return _Chart(
        title, text, _drawings("over-time", label, plot, _ERRORS_HEIGHT + _ROW_HEIGHT * len(kinds), wide=True)
    )


_ERRORS_HEIGHT, _ROW_HEIGHT = 2.9, 0.2
"""Inches: of the errors over time, and of each row of marks above them."""


def _draw_over_time(
    figure: Figure, report: Report, forecasters: Mapping[str, Forecaster], kinds: Sequence[_Kind]
) -> Tips:
    tips: Tips = {}
    if kinds:
        heights = [_ROW_HEIGHT * len(kinds), _ERRORS_HEIGHT]
        strip, axis = figure.subplots(2, 1, sharex=True, height_ratios=heights)
        tips = _draw_marks(strip, axis, report.marks, kinds)
    else:
        axis = figure.subplots()
    times = picture.date_numbers(report.over_time.ends_ms)
    for name, errors in report.over_time.by_name.items():
        axis.plot(times, errors, marker="." if len(times) <= 40 else None, **forecasters[name].line)
    axis.set_ylim(bottom=0)
    axis.set_ylabel("standard deviations")
    axis.margins(x=0.01)
    picture.time_axis(axis, narrow=figure.get_figwidth() < _WIDE)
    picture.plain(axis)
    return tips


def _draw_marks(strip: Any, axis: Any, marks: Sequence[Mark], kinds: Sequence[_Kind]) -> Tips:
    """One row a kind in the strip; thin lines through the errors where another model began to answer, the thinner the more."""
    tips = {}
    for row, (kind, count, colour) in enumerate(kinds):
        own = [mark for mark in marks if _drawn_kind(mark) == kind]
        times = picture.date_numbers(np.array([mark.time_ms for mark in own], np.int64))
        look = {"color": THEME[colour][0], "alpha": 0.55 if kind == "refused" else 1.0}
        drawn = strip.plot(times, np.full(count, row), "|", markersize=8, markeredgewidth=1.4, **look)[0]
        drawn.set_gid(f"marks-{row}")
        tips[f"marks-{row}"] = [f"{moment(mark.time_ms)}, {mark.kind}: {mark.label}" for mark in own]
        if kind in _CHANGES:
            through = {**look, "alpha": 0.45, "linewidth": min(max(30 / count, 0.5), 1.1), "zorder": 2}
            axis.vlines(times, 0, 1, transform=axis.get_xaxis_transform(), **through)
    strip.set_ylim(len(kinds) - 0.4, -0.6)
    strip.set_yticks(range(len(kinds)), [f"{kind} {count:,}" for kind, count, _ in kinds], parse_math=False)
    strip.tick_params(length=0, labelbottom=False)
    strip.spines[:].set_visible(False)
    return tips


# -- sensors


def _fan_chart(number: int, fans: SensorFans, report: Report) -> _Chart:
    inside, shown = _held_in_view(fans, report.step_ms)
    band = percent(report.levels[-1] - report.levels[0]) if report.levels else ""
    held = f"{inside} of the {shown} truths in view that were forecast lie in the {band} band" if shown else ""
    text = "; ".join(filter(None, (fans.why, held)))
    if not fans.fans and not np.isfinite(fans.values).any():
        return _Chart("", text, missing="No readings and no forecasts in this stretch.", name=fans.unique_id)
    label = f"{fans.unique_id}: measured values and {len(fans.fans)} forecasts"
    plot = partial(_draw_fans, fans=fans, step_ms=report.step_ms)
    return _Chart("", text, _drawings(f"fans-{number}", label, plot, 2.3, wide=True), name=fans.unique_id)


def _held_in_view(fans: SensorFans, step_ms: int) -> tuple[int, int]:
    """Truths between the outermost quantiles, and those that were forecast at all."""
    truths = dict(zip((fans.starts_ms + step_ms).tolist(), fans.values.tolist()))
    inside = shown = 0
    for fan in (fan for fan in fans.fans if len(fan.levels) > 1):
        truth = np.array([truths.get(end, math.nan) for end in fan.ends_ms.tolist()])
        known = np.isfinite(truth) & np.isfinite(fan.quantiles).all(axis=1)
        inside += int((known & (truth >= fan.quantiles[:, 0]) & (truth <= fan.quantiles[:, -1])).sum())
        shown += int(known.sum())
    return inside, shown


def _draw_fans(figure: Figure, fans: SensorFans, step_ms: int) -> None:
    """A window stands at its end, when its value is known: left of a cutoff is what the forecast had seen."""
    axis = figure.subplots()
    for fan in fans.fans:
        picture.draw_fan(axis, fan)
    axis.plot(picture.date_numbers(fans.starts_ms + step_ms), fans.values, color=INK, linewidth=1.2, zorder=3)
    cutoffs = picture.date_numbers(np.array([fan.cutoff_ms for fan in fans.fans], np.int64))
    look: dict[str, Any] = {"color": picture.EDGE, "linewidth": 0.9, "linestyles": "dashed"}
    axis.vlines(cutoffs, 0, 1, transform=axis.get_xaxis_transform(), **look)
    axis.margins(x=0.005)
    picture.time_axis(axis, narrow=figure.get_figwidth() < _WIDE)
    picture.plain(axis)


class _Band(NamedTuple):
    text: str
    opacity: float


def band_keys(levels: Sequence[float]) -> list[_Band]:
    """Opacity as it is seen, on the bands that lie below."""
    keys, through = [], 1.0
    for i, (low, high) in enumerate(picture.bands(levels)):
        through *= 1 - picture.band_opacity(i)
        keys.append(_Band(f"{100 * low:g} to {100 * high:g} %", round(1 - through, 3)))
    return keys


def _spread_chart(metrics: Metrics, forecasters: Mapping[str, Forecaster]) -> _Chart | None:
    """How errors spread over sensors; None: too few of them."""
    if metrics.measure is None:
        return None
    curves = metrics.curves(metrics.by_sensor, "unique_id", metrics.measure)
    if len(curves) < _ENOUGH_SENSORS:
        return None
    title = f"{TITLES.get(metrics.measure, metrics.measure)} across sensors"
    text = "Share of sensors whose error is at most this; a curve further left and up is better."
    plot = partial(_draw_spread, curves=curves, forecasters=forecasters)
    return _Chart(
        title, text, _drawings("spread", f"{title}, cumulated over {len(curves):,} sensors", plot, 2.6, wide=True)
    )


_ENOUGH_SENSORS: Final = 12


def _draw_spread(figure: Figure, curves: pd.DataFrame, forecasters: Mapping[str, Forecaster]) -> None:
    axis = figure.subplots()
    for name, errors in curves.items():
        known = np.sort(errors.dropna().to_numpy())
        if len(known):
            axis.step([0, *known], np.arange(len(known) + 1) / len(known), where="post", **forecasters[str(name)].line)
    axis.set(xlim=(0, 1.02 * float(np.nanquantile(curves.to_numpy(), 0.98)) or 1.0), ylim=(0, 1.02))
    _percent_axis(axis.yaxis)
    axis.set_ylabel("of sensors")
    picture.plain(axis)
