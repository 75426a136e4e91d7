"""Forecasts against what came: a picture without a browser (PNG), and a page that holds it and the figures (HTML)."""

from __future__ import annotations

import base64
import html
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

_INK, _TRUTH, _FAN, _GRID = "#1c2733", "#1c2733", "#0b72b9", "#d9dfe5"
_LINES: Final = ("#0b72b9", "#d1782a", "#7a7f87", "#4d9a5b")
_DPI: Final = 130

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Fan:
    """One forecast: what was said at `cutoff_ms` of the windows that end at `ends_ms`."""

    cutoff_ms: int
    ends_ms: NDArray[np.int64]
    """(H)"""
    middle: NDArray[np.float64]
    """(H) median"""
    quantiles: NDArray[np.float64]
    """(H, Q), levels ascending."""
    levels: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Panel:
    """One sensor: its windows before and after the cutoff, and the forecast made there."""

    sensor: str
    label: str
    """The vertical axis: quantity and unit, such as "temperature (°C)"."""
    ends_ms: NDArray[np.int64]
    """(m) window ends"""
    values: NDArray[np.float64]
    """(m) NaN = a window without readings."""
    fan: Fan


@dataclass(frozen=True, slots=True)
class LeadErrors:
    """Mean absolute error by lead of each forecaster, in the target's unit."""

    unit: str
    step_ms: int
    by_name: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    """Name -> (H), lead 1 first."""


def draw(path: Path, title: str, panels: Sequence[Panel], errors: LeadErrors | None = None) -> Path:
    """Write a PNG with one panel a sensor and, where there are any, the errors by lead below. Returns its path."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = len(panels) + bool(errors and errors.by_name)
    with matplotlib.rc_context({"font.size": 10, "axes.edgecolor": "#8b96a1", "text.color": _INK}):
        figure = Figure(figsize=(11, 1.1 + 2.6 * rows), layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        axes = figure.subplots(rows, 1, squeeze=False)[:, 0]
        figure.suptitle(title, x=0.01, ha="left", fontsize=14, fontweight="bold")
        for axis, panel in zip(axes, panels):
            _draw_panel(axis, panel)
        if panels:
            handles, labels = axes[0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside upper right", ncols=len(labels), frameon=False, fontsize=9)
        if errors and errors.by_name:
            _draw_errors(axes[-1], errors)
        figure.savefig(path, dpi=_DPI)
    return path


def _draw_panel(axis: Any, panel: Panel) -> None:
    dates: Any = importlib.import_module("matplotlib.dates")  # its functions are untyped
    fan = panel.fan
    times, ahead = dates.date2num(_moments(panel.ends_ms)), dates.date2num(_moments(fan.ends_ms))
    outer = len(fan.levels) // 2
    for i in range(outer):
        low, high = fan.levels[i], fan.levels[-1 - i]
        axis.fill_between(
            ahead,
            fan.quantiles[:, i],
            fan.quantiles[:, -1 - i],
            color=_FAN,
            alpha=0.18 if i == 0 else 0.25,
            linewidth=0,
            label=f"{100 * low:g} to {100 * high:g} % quantile",
        )
    axis.plot(ahead, fan.middle, color=_FAN, linewidth=1.8, label="forecast (median)")
    axis.plot(times, panel.values, color=_TRUTH, linewidth=1.3, label="measured")
    cutoff = dates.date2num(_moments(np.array([fan.cutoff_ms])))[0]
    axis.axvline(cutoff, color="#8b96a1", linewidth=1, linestyle=(0, (4, 3)))
    _headroom(axis)
    axis.annotate(
        "forecast made here",
        (cutoff, 1.0),
        xycoords=("data", "axes fraction"),
        xytext=(-5, -4),
        textcoords="offset points",
        ha="right",
        va="top",
        fontsize=8,
        color="#5c6873",
    )
    locator = dates.AutoDateLocator(minticks=5, maxticks=11, tz=UTC)
    axis.xaxis.set_major_locator(locator)
    axis.xaxis.set_major_formatter(dates.ConciseDateFormatter(locator, tz=UTC))
    axis.set_xlim(times[0], max(times[-1], ahead[-1]))
    axis.set_title(panel.sensor, loc="left", fontsize=11, fontweight="bold")
    axis.set_ylabel(panel.label)
    axis.set_xlabel("event time (UTC)")
    _plain(axis)


def _draw_errors(axis: Any, errors: LeadErrors) -> None:
    hours = errors.step_ms / 3_600_000
    for (name, values), colour in zip(errors.by_name.items(), _LINES):
        leads = np.arange(1, len(values) + 1) * hours
        axis.plot(leads, values, color=colour, linewidth=1.8, marker="o", markersize=3, label=name)
    axis.set_title("Mean absolute error by lead", loc="left", fontsize=11, fontweight="bold")
    axis.set_xlabel("lead (hours ahead)")
    axis.set_ylabel(f"error ({errors.unit})")
    axis.set_ylim(bottom=0)
    axis.margins(x=0.01)
    axis.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=len(errors.by_name), frameon=False, fontsize=9)
    _plain(axis)


def _plain(axis: Any) -> None:
    axis.grid(True, color=_GRID, linewidth=0.7)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    axis.tick_params(colors="#46525e", length=3)


def _headroom(axis: Any) -> None:
    """Space above the data for the note at the cutoff."""
    low, high = axis.get_ylim()
    axis.set_ylim(low, high + 0.14 * (high - low))


def _moments(times_ms: NDArray[np.int64]) -> list[datetime]:
    return [datetime.fromtimestamp(time / 1000, UTC) for time in times_ms.tolist()]


def write_page(path: Path, title: str, picture: Path, summary: str, tables: Mapping[str, Sequence[Row]]) -> Path:
    """Write one HTML file that needs nothing else: the picture inside it, and each table under its heading."""
    image = base64.b64encode(picture.read_bytes()).decode()
    sections = "\n".join(
        f"<section><h2>{html.escape(name)}</h2>{_table(rows)}</section>" for name, rows in tables.items() if rows
    )
    path.write_text(
        f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title>
<style>{_CSS}</style>
</head>
<body>
<main>
<h1>{html.escape(title)}</h1>
<p>{html.escape(summary)}</p>
<img alt="Forecast fans of some sensors against what was measured, and the mean absolute error by lead"
 src="data:image/png;base64,{image}">
{sections}
</main>
</body>
</html>
""",
        encoding="utf-8",
    )
    return path


_CSS: Final = """
:root { color-scheme: light dark; --ink: #1c2733; --ground: #f6f8fa; --card: #fff; --line: #dfe5ea; --soft: #5c6873; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e9ee; --ground: #12181e; --card: #1a222a; --line: #2c3742; --soft: #9aa7b3; } }
body { margin: 0; font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--ground); }
main { max-width: 72rem; margin: 0 auto; padding: 2rem 1rem 4rem; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
p { color: var(--soft); margin: 0 0 1rem; }
img { width: 100%; height: auto; border: 1px solid var(--line); border-radius: 8px; background: #fff; }
section { overflow-x: auto; }
table { border-collapse: collapse; background: var(--card); border: 1px solid var(--line); }
th, td { padding: .35rem .9rem; text-align: left; border-bottom: 1px solid var(--line); }
th { font-weight: 600; color: var(--soft); } td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
"""


def _table(rows: Sequence[Row]) -> str:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    numeric = {name for name in columns if all(isinstance(row.get(name), int | float | None) for row in rows)}

    def cell(tag: str, name: str, text: str) -> str:
        kind = ' class="number"' if name in numeric else ""
        return f"<{tag}{kind}>{html.escape(text)}</{tag}>"

    head = "".join(cell("th", name, name) for name in columns)
    body = "".join(
        "<tr>" + "".join(cell("td", name, _text(row.get(name))) for name in columns) + "</tr>" for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
