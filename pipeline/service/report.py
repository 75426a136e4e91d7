"""The backtest report: one HTML file that needs nothing else, in the reader's theme, for screen, phone and paper.

report_figures.py has what it says, report_charts.py what it draws; here are its words, its tables and the page. Names and sentences
come from data and are escaped.

[1] Hyndman, R. J. and Koehler, A. B. (2006), Another look at measures of forecast accuracy, Int. J. Forecasting 22(4).
[2] Gneiting, T., Balabdaoui, F. and Raftery, A. E. (2007), Probabilistic forecasts, calibration and sharpness, JRSS B 69(2).
"""

from __future__ import annotations

import importlib.resources
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

import jinja2
from markupsafe import Markup

from pipeline.service.picture import CSS
from pipeline.service.report_charts import KINDS, band_keys, draw_charts, mark_kinds
from pipeline.service.report_figures import (
    ERRORS,
    MEASURES,
    NOTHING,
    SHARES,
    TITLES,
    Forecaster,
    Metrics,
    Report,
    Writer,
    change,
    count,
    forecasters_of,
    pair,
    percent,
    significant,
    span,
    writer,
)
from pipeline.service.words import moment

SHOWN_AT_EITHER_END: Final = 10
"""Sensors of a long table: the worst and the best."""


def write_report(path: Path, report: Report) -> Path:
    """Write the page to `path`, and return it. Whatever is missing is said in its place."""
    metrics = Metrics(report.metrics, report.levels)
    forecasters = forecasters_of(metrics, report)
    charts = draw_charts(metrics, forecasters, report)
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
        marks=mark_kinds(report.marks),
        kind_colours=KINDS,
        bands=band_keys(report.levels),
        nominal=None if metrics.nominal is None else percent(metrics.nominal),
    )
    path.write_text(text, encoding="utf-8", errors="xmlcharrefreplace")
    return path


_TEMPLATE: Final = "report.html.j2"


def _environment() -> jinja2.Environment:
    """Escapes everything that is not Markup, and stumbles over a misspelt name."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["instant"] = moment
    return environment


# -- the verdict

_SPOKEN: Final = {"scaled_MAE": "mean absolute error in standard deviations", "MAE": "mean absolute error"}


def _verdict(metrics: Metrics) -> str:
    """One sentence, as good or as bad as the figures."""
    if metrics.measure is None:
        who = f"{metrics.names[0]} said" if metrics.names else "was said"
        return f"Nothing that {who} could be held against what came: there is no error to report."
    service, measure = metrics.names[0], metrics.measure
    mine = metrics.of(service, measure)
    spoken = f"{service}’s {_SPOKEN.get(measure, measure)}"
    if metrics.rival is None:
        sentence = f"{spoken} over all leads is {pair(mine, mine)[0]}, with no baseline to hold it against"
    else:
        theirs = metrics.of(metrics.rival, measure)
        ours, its = pair(mine, theirs)
        best = ", the best baseline" if len(metrics.names) > 2 else ""
        worse = ": that baseline forecast better" if mine > theirs else ""
        sentence = f"{spoken} {ours} over all leads is {change(mine, theirs)} {metrics.rival}’s {its}{best}{worse}"
    return f"{sentence}{_held(metrics)}."


def _held(metrics: Metrics) -> str:
    """How its intervals did; far from nominal is said in words."""
    coverage = metrics.of(metrics.names[0], "coverage")
    if metrics.nominal is None or not math.isfinite(coverage):
        return ""
    off = coverage - metrics.nominal
    judged = "" if abs(off) <= _OFF_NOMINAL else ": they are too narrow" if off < 0 else ": they are too wide"
    return f"; its {percent(metrics.nominal)} intervals held {percent(coverage)} of the truths{judged}"


_OFF_NOMINAL: Final = 0.05
"""Coverage further from nominal than this is called wrong."""


class _Tile(NamedTuple):
    name: str
    value: str
    note: str
    tone: str = ""
    """good, bad or none."""


def _tiles(metrics: Metrics) -> Iterable[_Tile]:
    if metrics.measure is None:
        return
    for measure in (metrics.measure, "pinball"):
        yield from _error_tile(metrics, measure)
    service = metrics.names[0]
    coverage = metrics.of(service, "coverage")
    if metrics.nominal is not None and math.isfinite(coverage):
        near = abs(coverage - metrics.nominal) <= _OFF_NOMINAL
        yield _Tile("Coverage", percent(coverage), f"nominal {percent(metrics.nominal)}", "good" if near else "bad")
    if metrics.rival is None:
        return
    for what, frame, index in (("Leads", metrics.by_lead, "lead"), ("Sensors", metrics.by_sensor, "unique_id")):
        both = metrics.curves(frame, index, metrics.measure)[[service, metrics.rival]].dropna()
        if len(both) > 1:
            ahead = int((both[service] < both[metrics.rival]).sum())
            tone = "good" if 2 * ahead > len(both) else "bad"
            yield _Tile(f"{what} ahead", f"{ahead:,} of {len(both):,}", f"of {metrics.rival}", tone)


def _error_tile(metrics: Metrics, measure: str) -> Iterable[_Tile]:
    mine, rival = metrics.of(metrics.names[0], measure), metrics.best_baseline(measure)
    if not math.isfinite(mine):
        return
    name = TITLES.get(measure, measure)
    if rival is None:
        yield _Tile(name, pair(mine, mine)[0], "no baseline has one" if len(metrics.names) > 1 else "no baseline")
    else:
        theirs = metrics.of(rival, measure)
        ours, its = pair(mine, theirs)
        yield _Tile(name, ours, f"{change(mine, theirs)} {rival}’s {its}", "good" if mine < theirs else "bad")


# -- tables


class _Cell(NamedTuple):
    text: str
    kind: str = "number"
    """number, text, name (heads its row) or change (with a bar)."""
    best: bool = False
    key: Forecaster | None = None
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


def _heads(columns: Iterable[str]) -> list[_Cell]:
    return [_Cell(TITLES.get(column, column)) for column in columns]


def _overall_table(metrics: Metrics, forecasters: Mapping[str, Forecaster]) -> _Table:
    frame = metrics.overall
    values = {column: frame[column].tolist() for column in MEASURES}
    cells = {column: _column(of, column, metrics.nominal, writer(of, column)) for column, of in values.items()}
    rows = [
        [
            _Cell(name, "name", key=forecasters[name]),
            *(cells[column][i] for column in MEASURES),
            _Cell(count(frame["labels"].iloc[i])),
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


def _lead_table(metrics: Metrics, forecasters: Mapping[str, Forecaster], step_ms: int) -> _Table:
    frame = metrics.by_lead.set_index("forecaster")
    writers = {column: writer(frame[column].tolist(), column) for column in MEASURES}
    rows = []
    for lead in sorted(frame["lead"].unique().tolist()):
        group = frame[frame["lead"] == lead]
        group = group.loc[[name for name in metrics.names if name in group.index]]
        cells = [_column(group[column].tolist(), column, metrics.nominal, writers[column]) for column in MEASURES]
        labels = [_Cell(count(known)) for known in group["labels"].tolist()]
        ahead = _Cell(f"{lead} ({span(lead * step_ms)})", "name", span=len(group))
        for name, *own in zip(group.index.tolist(), *cells, labels):
            first = [] if name != group.index[0] else [ahead]
            rows.append([*first, _Cell(name, "text", key=forecasters[name]), *own])
    head = [_Cell("Lead", "text"), _Cell("Forecaster", "text"), *_heads(MEASURES), _Cell("Labels")]
    return _Table("Metrics by lead", head, rows)


def _sensor_table(metrics: Metrics) -> _Table | None:
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
    write = writer(mine, measure)
    columns = [[_Cell(str(name), "name") for name in curves.index], [_Cell(write(error)) for error in mine]]
    if rival is not None:
        columns += [[_Cell(write(error)) for error in theirs], [_change_cell(*both) for both in zip(mine, theirs)]]
    extra = [column for column in ("scaled_MAE", "MAE", "pinball", "coverage") if column != measure]
    columns += [_plain_column(own[column].tolist(), column) for column in extra]
    columns.append([_Cell(count(known)) for known in own["labels"].tolist()])
    title = TITLES.get(measure, measure)
    against = [_Cell(f"{rival}’s"), _Cell("Difference", "change")] if rival is not None else []
    head = [_Cell("Sensor", "text"), _Cell(f"{service}’s {title}"), *against, *_heads(extra), _Cell("Labels")]
    return _cut(_Table("Sensors, worst first", head, list(zip(*columns))), metrics)


def _plain_column(values: Sequence[float], measure: str) -> list[_Cell]:
    """Of rows whose units may differ by sensor."""
    write = writer(values, measure) if measure in (*SHARES, "MASE", "scaled_MAE") else significant
    return [_Cell(write(value)) for value in values]


def _cut(table: _Table, metrics: Metrics) -> _Table:
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
        return _Cell(NOTHING, "change")
    more = mine / theirs - 1
    return _Cell(f"{100 * more:+.0f} %".replace("-", "−"), "change", share=max(-1.0, min(1.0, more)))
