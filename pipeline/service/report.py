"""The backtest report: one HTML file that needs nothing else, in the reader's theme, for screen, phone and paper.

Forecasters stand in one order and one colour throughout: Millrace, which is what the service answered, then the baselines. Names and
sentences come from data and are escaped; none of them is ever drawn, because a chart's words are ours.

[1] Hyndman, R. J. and Koehler, A. B. (2006), Another look at measures of forecast accuracy, Int. J. Forecasting 22(4).
[2] Gneiting, T., Balabdaoui, F. and Raftery, A. E. (2007), Probabilistic forecasts, calibration and sharpness, JRSS B 69(2).
"""

from __future__ import annotations

import importlib.resources
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import jinja2
import matplotlib
import numpy as np
import pandas as pd
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from pipeline.service import picture
from pipeline.service.picture import CSS, INK, LINES, SOFT, THEME, Fan

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]
Writer = Callable[[float], str]
Tips = Mapping[str, Sequence[str]]
"""gid of a drawn line -> what the mouse shows over its markers."""

SERVICE: Final = "Millrace"
ERRORS: Final = ("MASE", "scaled_MAE", "scaled_MSE", "MAE", "RMSE", "MSE", "sMAPE", "pinball")
"""The lower, the better; as columns stand in the tables. After them: coverage (the nearer to nominal, the better) and width."""
MEASURES: Final = (*ERRORS, "coverage", "width")
SHOWN_AT_EITHER_END: Final = 10
"""Sensors of a long table: the worst and the best."""


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
    """promoted, refused, failed, rolled-back or swap."""
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


def write_report(path: Path, report: Report) -> Path:
    """Write the page to `path`, and return it. Whatever is missing is said in its place."""
    metrics = _Metrics(report.metrics, report.levels)
    forecasters = _forecasters(metrics, report)
    with matplotlib.rc_context({**picture.STYLE, "font.size": _FONT_SIZE}):
        charts = {
            "leads": list(_lead_charts(metrics, forecasters, report.step_ms)),
            "calibration": list(_calibration_charts(metrics, forecasters, report)),
            "over_time": _over_time_chart(report, forecasters),
            "fans": [_fan_chart(i, fans, report) for i, fans in enumerate(report.fans)],
            "spread": _spread_chart(metrics, forecasters),
        }
    page = _environment().from_string(importlib.resources.files(__package__).joinpath(_TEMPLATE).read_text("utf-8"))
    text = page.render(
        css=Markup(CSS),
        report=report,
        charts=charts,
        forecasters=list(forecasters.values()),
        verdict=_verdict(metrics),
        tiles=list(_tiles(metrics)),
        overall=_overall_table(metrics, forecasters),
        sensors=_sensor_table(metrics),
        by_lead=_lead_table(metrics, forecasters, report.step_ms),
        marks=_mark_kinds(report.marks),
        kind_colours=_KINDS,
        bands=_band_keys(report.levels),
        nominal=None if metrics.nominal is None else _percent(metrics.nominal),
    )
    path.write_text(text, encoding="utf-8", errors="xmlcharrefreplace")
    return path


_TEMPLATE: Final = "report.html.j2"


def _environment() -> jinja2.Environment:
    """Escapes everything that is not Markup, and stumbles over a misspelt name."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["instant"] = _instant
    return environment


# -- the figures


class _Metrics:
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
class _Forecaster:
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


def _forecasters(metrics: _Metrics, report: Report) -> dict[str, _Forecaster]:
    names = dict.fromkeys([*metrics.names, *report.over_time.by_name, *report.reliability])
    return {
        name: _Forecaster(i, name, LINES[i % len(LINES)], *_MARKERS[i % len(_MARKERS)], 2.2 if i == 0 else 1.4)
        for i, name in enumerate(names)
    }


# -- the verdict

_SPOKEN: Final = {"scaled_MAE": "mean absolute error in standard deviations", "MAE": "mean absolute error"}


def _verdict(metrics: _Metrics) -> str:
    """One sentence, as good or as bad as the figures."""
    if metrics.measure is None:
        who = f"{metrics.names[0]} said" if metrics.names else "was said"
        return f"Nothing that {who} could be held against what came: there is no error to report."
    service, measure = metrics.names[0], metrics.measure
    mine = metrics.of(service, measure)
    spoken = f"{service}’s {_SPOKEN.get(measure, measure)}"
    if metrics.rival is None:
        sentence = f"{spoken} over all leads is {_pair(mine, mine)[0]}, with no baseline to hold it against"
    else:
        theirs = metrics.of(metrics.rival, measure)
        ours, its = _pair(mine, theirs)
        best = ", the best baseline" if len(metrics.names) > 2 else ""
        worse = ": that baseline forecast better" if mine > theirs else ""
        change = _change(mine, theirs)
        sentence = f"{spoken} {ours} over all leads is {change} {metrics.rival}’s {its}{best}{worse}"
    return f"{sentence}{_held(metrics)}."


def _held(metrics: _Metrics) -> str:
    """How its intervals did; far from nominal is said in words."""
    coverage = metrics.of(metrics.names[0], "coverage")
    if metrics.nominal is None or not math.isfinite(coverage):
        return ""
    off = coverage - metrics.nominal
    judged = "" if abs(off) <= _OFF_NOMINAL else ": they are too narrow" if off < 0 else ": they are too wide"
    return f"; its {_percent(metrics.nominal)} intervals held {_percent(coverage)} of the truths{judged}"


_OFF_NOMINAL: Final = 0.05
"""Coverage further from nominal than this is called wrong."""


class _Tile(NamedTuple):
    name: str
    value: str
    note: str
    tone: str = ""
    """good, bad or none."""


def _tiles(metrics: _Metrics) -> Iterable[_Tile]:
    if metrics.measure is None:
        return
    for measure in (metrics.measure, "pinball"):
        yield from _error_tile(metrics, measure)
    service = metrics.names[0]
    coverage = metrics.of(service, "coverage")
    if metrics.nominal is not None and math.isfinite(coverage):
        near = abs(coverage - metrics.nominal) <= _OFF_NOMINAL
        yield _Tile("Coverage", _percent(coverage), f"nominal {_percent(metrics.nominal)}", "good" if near else "bad")
    if metrics.rival is None:
        return
    for what, frame, index in (("Leads", metrics.by_lead, "lead"), ("Sensors", metrics.by_sensor, "unique_id")):
        both = metrics.curves(frame, index, metrics.measure)[[service, metrics.rival]].dropna()
        if len(both) > 1:
            ahead = int((both[service] < both[metrics.rival]).sum())
            tone = "good" if 2 * ahead > len(both) else "bad"
            yield _Tile(f"{what} ahead", f"{ahead:,} of {len(both):,}", f"of {metrics.rival}", tone)


def _error_tile(metrics: _Metrics, measure: str) -> Iterable[_Tile]:
    mine, rival = metrics.of(metrics.names[0], measure), metrics.best_baseline(measure)
    if not math.isfinite(mine):
        return
    name = _TITLES.get(measure, measure)
    if rival is None:
        yield _Tile(name, _pair(mine, mine)[0], "no baseline has one" if len(metrics.names) > 1 else "no baseline")
    else:
        theirs = metrics.of(rival, measure)
        ours, its = _pair(mine, theirs)
        yield _Tile(name, ours, f"{_change(mine, theirs)} {rival}’s {its}", "good" if mine < theirs else "bad")


# -- tables


class _Cell(NamedTuple):
    text: str
    kind: str = "number"
    """number, text, name (heads its row) or change (with a bar)."""
    best: bool = False
    key: _Forecaster | None = None
    span: int = 1
    """Rows."""
    share: float = 0.0
    """Of a change, as a bar: -1 ... 1."""


@dataclass(frozen=True, slots=True)
class _Table:
    name: str
    head: Sequence[_Cell]
    rows: Sequence[Sequence[_Cell]]
    note: str = ""
    cut: int = 0
    """Rows before the place where others are left out; 0 = all are there."""


_TITLES: Final = {
    "scaled_MAE": "scaled MAE",
    "scaled_MSE": "scaled MSE",
    "pinball": "Pinball",
    "coverage": "Coverage",
    "width": "Width",
}


def _heads(columns: Iterable[str]) -> list[_Cell]:
    return [_Cell(_TITLES.get(column, column)) for column in columns]


def _overall_table(metrics: _Metrics, forecasters: Mapping[str, _Forecaster]) -> _Table:
    frame = metrics.overall
    values = {column: frame[column].tolist() for column in MEASURES}
    cells = {column: _column(of, column, metrics.nominal, _writer(of, column)) for column, of in values.items()}
    rows = [
        [
            _Cell(name, "name", key=forecasters[name]),
            *(cells[column][i] for column in MEASURES),
            _Cell(_count(frame["labels"].iloc[i])),
        ]
        for i, name in enumerate(metrics.names)
    ]
    return _Table("Metrics over all", [_Cell("Forecaster", "text"), *_heads(MEASURES), _Cell("Labels")], rows)


def _column(values: Sequence[float], measure: str, nominal: float | None, write: Writer) -> list[_Cell]:
    """One measure of all forecasters, the best marked where there is a choice. Width has no best of its own: narrow is good only in
    what covers enough."""
    if measure == "coverage":
        ranks = [math.nan if nominal is None else abs(value - nominal) for value in values]
    else:
        ranks = [value if measure in ERRORS else math.nan for value in values]
    known = [rank for rank in ranks if math.isfinite(rank)]
    best = min(known) if len(known) > 1 else math.nan
    return [_Cell(write(value), best=rank == best) for value, rank in zip(values, ranks)]


def _lead_table(metrics: _Metrics, forecasters: Mapping[str, _Forecaster], step_ms: int) -> _Table:
    frame = metrics.by_lead.set_index("forecaster")
    writers = {column: _writer(frame[column].tolist(), column) for column in MEASURES}
    rows = []
    for lead in sorted(frame["lead"].unique().tolist()):
        group = frame[frame["lead"] == lead]
        group = group.loc[[name for name in metrics.names if name in group.index]]
        cells = [_column(group[column].tolist(), column, metrics.nominal, writers[column]) for column in MEASURES]
        labels = [_Cell(_count(count)) for count in group["labels"].tolist()]
        ahead = _Cell(f"{lead} ({_span(lead * step_ms)})", "name", span=len(group))
        for name, *own in zip(group.index.tolist(), *cells, labels):
            first = [] if name != group.index[0] else [ahead]
            rows.append([*first, _Cell(name, "text", key=forecasters[name]), *own])
    head = [_Cell("Lead", "text"), _Cell("Forecaster", "text"), *_heads(MEASURES), _Cell("Labels")]
    return _Table("Metrics by lead", head, rows)


def _sensor_table(metrics: _Metrics) -> _Table | None:
    """The service's error by sensor, worst first; None: nothing is known of any."""
    if metrics.measure is None:
        return None
    service, rival, measure = metrics.names[0], metrics.rival, metrics.measure
    curves = metrics.curves(metrics.by_sensor, "unique_id", measure)
    curves = curves[curves[service].notna()].sort_values(service, ascending=False, kind="stable")
    if curves.empty:
        return None
    own = metrics.by_sensor[metrics.by_sensor["forecaster"] == service].set_index("unique_id").loc[curves.index]
    mine, theirs = curves[service].tolist(), curves[rival].tolist() if rival is not None else []
    write = _writer(mine, measure)
    columns = [[_Cell(str(name), "name") for name in curves.index], [_Cell(write(error)) for error in mine]]
    if rival is not None:
        columns += [[_Cell(write(error)) for error in theirs], [_change_cell(*pair) for pair in zip(mine, theirs)]]
    extra = [column for column in ("scaled_MAE", "MAE", "pinball", "coverage") if column != measure]
    columns += [_plain_column(own[column].tolist(), column) for column in extra]
    columns.append([_Cell(_count(count)) for count in own["labels"].tolist()])
    title = _TITLES.get(measure, measure)
    against = [_Cell(f"{rival}’s"), _Cell("Difference", "change")] if rival is not None else []
    head = [_Cell("Sensor", "text"), _Cell(f"{service}’s {title}"), *against, *_heads(extra), _Cell("Labels")]
    return _cut(_Table("Sensors, worst first", head, list(zip(*columns))), metrics)


def _plain_column(values: Sequence[float], measure: str) -> list[_Cell]:
    """Of rows whose units may differ by sensor."""
    write = _writer(values, measure) if measure in (*_SHARES, "MASE", "scaled_MAE") else _significant
    return [_Cell(write(value)) for value in values]


def _cut(table: _Table, metrics: _Metrics) -> _Table:
    """The worst and the best rows of a long table, and what was left out in words."""
    silent = metrics.by_sensor["unique_id"].nunique() - len(table.rows)
    note = f"{silent:,} more had nothing to measure." if silent else ""
    ends = SHOWN_AT_EITHER_END
    if len(table.rows) <= 2 * ends:
        return _Table(table.name, table.head, table.rows, note)
    said = f"The worst {ends} and the best {ends} of {len(table.rows):,} sensors; metrics.csv has them all."
    return _Table(table.name, table.head, [*table.rows[:ends], *table.rows[-ends:]], f"{said} {note}".strip(), ends)


def _change_cell(mine: float, theirs: float) -> _Cell:
    if not math.isfinite(theirs) or theirs <= 0:
        return _Cell(_NOTHING, "change")
    change = mine / theirs - 1
    return _Cell(f"{100 * change:+.0f} %".replace("-", "−"), "change", share=max(-1.0, min(1.0, change)))


class _Kind(NamedTuple):
    """Marks of one kind."""

    name: str
    marks: int
    colour: str


def _mark_kinds(marks: Sequence[Mark]) -> list[_Kind]:
    counts = Counter(_drawn_kind(mark) for mark in marks)
    return [_Kind(kind, counts[kind], colour) for kind, colour in _KINDS.items() if counts[kind]]


def _drawn_kind(mark: Mark) -> str:
    return mark.kind if mark.kind in _KINDS else _OTHER


# -- words and numbers

_NOTHING: Final = "–"


def _writer(values: Sequence[float], measure: str) -> Writer:
    """Writes one column: as many decimals for all as give the smallest three digits."""
    if measure in _SHARES:
        return lambda share: f"{100 * share:.1f} %" if math.isfinite(share) else _NOTHING
    sizes = [abs(value) for value in values if math.isfinite(value) and value]
    decimals = min(max(2 - math.floor(math.log10(min(sizes))), 0), 6) if sizes else 2

    def write(value: float) -> str:
        if not math.isfinite(value):
            return _NOTHING
        text = f"{value:,.{decimals}f}"
        return f"{value:.2e}" if value and not float(text.replace(",", "")) else text

    return write


_SHARES: Final = ("coverage", "sMAPE")


def _significant(value: float) -> str:
    return f"{value:,.4g}" if math.isfinite(value) else _NOTHING


def _percent(share: float) -> str:
    """
    >>> _percent(0.8), _percent(0.7931)
    ('80 %', '79.3 %')
    """
    return f"{100 * share:.1f}".removesuffix(".0") + " %" if math.isfinite(share) else _NOTHING


def _pair(one: float, other: float) -> tuple[str, str]:
    """Two numbers, with as many digits as tell them apart.

    >>> _pair(0.8, 1.08), _pair(0.8213, 0.8249), _pair(123.0, 1524.2), _pair(0.00123, 0.2)
    (('0.80', '1.08'), ('0.821', '0.825'), ('123', '1,524'), ('0.0012', '0.2000'))
    """
    smaller = min(abs(one), abs(other)) or max(abs(one), abs(other)) or 1.0
    size = math.floor(math.log10(smaller))
    least = min(max(2 - size, 0), 2) if size >= -1 else min(1 - size, 9)
    texts = [(f"{one:,.{digits}f}", f"{other:,.{digits}f}") for digits in range(least, least + 3)]
    return next((pair for pair in texts if pair[0] != pair[1]), texts[0])


def _change(mine: float, theirs: float) -> str:
    """
    >>> _change(0.82, 1.08), _change(1.08, 0.82), _change(1.0, 1.004), _change(1, 1), _change(1, 0)
    ('24 % below', '32 % above', '0.4 % below', 'the same as', 'above')
    """
    if mine == theirs:
        return "the same as"
    side = "below" if mine < theirs else "above"
    if not theirs:
        return side
    percent = 100 * abs(mine / theirs - 1)
    return f"{percent:,.0f} % {side}" if percent >= 1 else f"{percent:.1g} % {side}"


def _count(value: float) -> str:
    return f"{value:,.0f}" if math.isfinite(value) else _NOTHING


def _span(ms: int) -> str:
    """
    >>> _span(5_400_000), _span(86_400_000), _span(250)
    ('1 h 30 min', '1 d', '250 ms')
    """
    parts = []
    for unit, size in (("d", 86_400_000), ("h", 3_600_000), ("min", 60_000), ("s", 1000), ("ms", 1)):
        count, ms = divmod(ms, size)
        if count:
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2])


def _instant(time_ms: int) -> str:
    """
    >>> _instant(1_700_000_000_000)
    '2023-11-14 22:13'
    """
    return datetime.fromtimestamp(time_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M")


# -- charts

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


def _lead_charts(metrics: _Metrics, forecasters: Mapping[str, _Forecaster], step_ms: int) -> Iterable[_Chart]:
    measure = metrics.measure or "MASE"
    texts = {
        "MASE": "At the dashed 1, as far off as repeating the value of one season before was in sample.",
        "scaled_MAE": "In standard deviations of each series.",
        "MAE": "In each sensor’s own unit.",
        "pinball": "What quantile forecasts are trained for and judged by; mean over the levels, in each sensor’s own unit.",
    }
    for name in (measure, "pinball"):
        title = f"{_TITLES.get(name, name)} by lead"
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
    forecasters: Mapping[str, _Forecaster],
    step_ms: int,
    measure: str,
    level: float | None,
) -> Tips:
    """curves: leads x forecasters. level: a line across, to compare with."""
    axis = figure.subplots()
    unit, unit_ms = _lead_unit(int(curves.index[-1]) * step_ms)
    tips: dict[str, list[str]] = {}
    write = _writer(curves.to_numpy().ravel().tolist(), measure)
    for name, curve in curves.items():
        known, who = curve.dropna(), forecasters[str(name)]
        ahead = known.index.to_numpy() * step_ms / unit_ms
        every = 1 + len(curves) // 25
        line = axis.plot(ahead, known.to_numpy(), marker=who.marker, markersize=4, markevery=every, **who.line)[0]
        line.set_gid(f"tips-{who.number}")
        tips[f"tips-{who.number}"] = [
            f"{name}, {_span(lead * step_ms)} ahead: {write(value)}"
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


def _calibration_charts(metrics: _Metrics, forecasters: Mapping[str, _Forecaster], report: Report) -> Iterable[_Chart]:
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


def _coverage_chart(metrics: _Metrics, forecasters: Mapping[str, _Forecaster], step_ms: int) -> _Chart:
    title = "Coverage by lead"
    if metrics.nominal is None:
        return _Chart(title, "", missing="One quantile is no interval: there is no coverage.")
    text = f"Share of truths between the outermost quantiles; dashed: the {_percent(metrics.nominal)} that should be."
    curves = metrics.curves(metrics.by_lead, "lead", "coverage")
    if len(curves) < 2:
        return _Chart(title, text, missing=_why_no_leads(curves, "coverage"))
    plot = partial(
        _draw_by_lead, curves=curves, forecasters=forecasters, step_ms=step_ms, measure="coverage",
        level=metrics.nominal,
    )  # fmt: skip
    return _Chart(title, text, _drawings("coverage", f"{title} against {_percent(metrics.nominal)}", plot, 3.1))


def _draw_reliability(
    figure: Figure, levels: Float64, shares: Mapping[str, Float64], forecasters: Mapping[str, _Forecaster]
) -> Tips:
    axis = figure.subplots()
    tips = {}
    axis.plot([0, 1], [0, 1], color=SOFT, linewidth=1, linestyle=(0, (4, 3)), zorder=2)
    for name, observed in shares.items():
        who, known = forecasters[name], np.isfinite(observed)
        gid = f"tips-{who.number}"
        axis.plot(levels[known], observed[known], marker=who.marker, markersize=5, **who.line)[0].set_gid(gid)
        tips[gid] = [
            f"{name}: {_percent(share)} of the truths at or below its {_percent(level)} quantile"
            for level, share in zip(levels[known].tolist(), observed[known].tolist())
        ]
    axis.set(xlim=(0, 1), ylim=(0, 1.005), xlabel="nominal level", ylabel="observed share", aspect="equal")
    _percent_axis(axis.xaxis)
    _percent_axis(axis.yaxis)
    picture.plain(axis)
    return tips


_OTHER: Final = "other"
_KINDS: Final = {
    "promoted": "ink",
    "rolled-back": "red",
    "swap": "ink",
    "failed": "red",
    "refused": "edge",
    _OTHER: "soft",
}
"""Of marks -> colour, none that a forecaster has; from the top of the strip."""
_CHANGES: Final = ("promoted", "rolled-back", "swap")
"""After these another model answers: a line through the errors."""


def _over_time_chart(report: Report, forecasters: Mapping[str, _Forecaster]) -> _Chart:
    title = "Mean absolute error over time"
    text = "Of the forecasts that came true in each stretch, in the sensors’ running standard deviations."
    if not any(np.isfinite(errors).any() for errors in report.over_time.by_name.values()):
        return _Chart(title, text, missing="Nothing matured.")
    kinds = _mark_kinds(report.marks)
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
    figure: Figure, report: Report, forecasters: Mapping[str, _Forecaster], kinds: Sequence[_Kind]
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
        tips[f"marks-{row}"] = [f"{_instant(mark.time_ms)}, {mark.kind}: {mark.label}" for mark in own]
        if kind in _CHANGES:
            through = {**look, "alpha": 0.45, "linewidth": min(max(30 / count, 0.5), 1.1), "zorder": 2}
            axis.vlines(times, 0, 1, transform=axis.get_xaxis_transform(), **through)
    strip.set_ylim(len(kinds) - 0.4, -0.6)
    strip.set_yticks(range(len(kinds)), [f"{kind} {count:,}" for kind, count, _ in kinds], parse_math=False)
    strip.tick_params(length=0, labelbottom=False)
    strip.spines[:].set_visible(False)
    return tips


def _fan_chart(number: int, fans: SensorFans, report: Report) -> _Chart:
    inside, shown = _held_in_view(fans, report.step_ms)
    band = _percent(report.levels[-1] - report.levels[0]) if report.levels else ""
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


def _spread_chart(metrics: _Metrics, forecasters: Mapping[str, _Forecaster]) -> _Chart | None:
    """How errors spread over sensors; None: too few of them."""
    if metrics.measure is None:
        return None
    curves = metrics.curves(metrics.by_sensor, "unique_id", metrics.measure)
    if len(curves) < _ENOUGH_SENSORS:
        return None
    title = f"{_TITLES.get(metrics.measure, metrics.measure)} across sensors"
    text = "Share of sensors whose error is at most this; a curve further left and up is better."
    plot = partial(_draw_spread, curves=curves, forecasters=forecasters)
    return _Chart(
        title, text, _drawings("spread", f"{title}, cumulated over {len(curves):,} sensors", plot, 2.6, wide=True)
    )


_ENOUGH_SENSORS: Final = 12


def _draw_spread(figure: Figure, curves: pd.DataFrame, forecasters: Mapping[str, _Forecaster]) -> None:
    axis = figure.subplots()
    for name, errors in curves.items():
        known = np.sort(errors.dropna().to_numpy())
        if len(known):
            axis.step([0, *known], np.arange(len(known) + 1) / len(known), where="post", **forecasters[str(name)].line)
    axis.set(xlim=(0, 1.02 * float(np.nanquantile(curves.to_numpy(), 0.98)) or 1.0), ylim=(0, 1.02))
    _percent_axis(axis.yaxis)
    axis.set_ylabel("of sensors")
    picture.plain(axis)


class _Band(NamedTuple):
    text: str
    opacity: float


def _band_keys(levels: Sequence[float]) -> list[_Band]:
    """Opacity as it is seen, on the bands that lie below."""
    keys, through = [], 1.0
    for i, (low, high) in enumerate(picture.bands(levels)):
        through *= 1 - picture.band_opacity(i)
        keys.append(_Band(f"{100 * low:g} to {100 * high:g} %", round(1 - through, 3)))
    return keys
