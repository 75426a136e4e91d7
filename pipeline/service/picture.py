"""Forecasts against what came: a picture without a browser (PNG), and a page that holds it and the figures (HTML).

What every drawing here shares (fans, axes, colours by theme, charts inside a page) is public: the report draws with it too.
"""

from __future__ import annotations

import base64
import html
import importlib
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

THEME: Final = {
    "ink": ("#1c2733", "#e4e9ee"),
    "ground": ("#f6f8fa", "#12181e"),
    "card": ("#ffffff", "#1a222a"),
    "line": ("#dfe5ea", "#2c3742"),
    "soft": ("#5c6873", "#9aa7b3"),
    "grid": ("#d9dfe5", "#2e3944"),
    "edge": ("#8b96a1", "#6b7783"),
    "tick": ("#46525e", "#aab5bf"),
    "blue": ("#0b72b9", "#4fabe9"),
    "orange": ("#d1782a", "#e59a55"),
    "grey": ("#7a7f87", "#a3a9b1"),
    "green": ("#4d9a5b", "#72bd80"),
    "violet": ("#8a5fb0", "#b692d8"),
    "red": ("#c0392b", "#e8786c"),
}
"""Name -> colour on light and on dark ground. Drawings use the light one; inside a page it gives way to the reader's theme."""
INK, SOFT, GRID, EDGE, TICK, BLUE = (THEME[name][0] for name in ("ink", "soft", "grid", "edge", "tick", "blue"))
LINES: Final = ("blue", "orange", "grey", "green", "violet")
"""Colours of forecasters, in their order."""
STYLE: Final[Any] = {
    "font.size": 10,
    "axes.edgecolor": EDGE,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": TICK,
    "ytick.color": TICK,
    "svg.fonttype": "none",  # text stays text: found, read aloud, and in the page's font
}
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
    with matplotlib.rc_context(STYLE):
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
    fan = panel.fan
    times, ahead = date_numbers(panel.ends_ms), date_numbers(fan.ends_ms)
    draw_fan(axis, fan)
    axis.plot(times, panel.values, color=INK, linewidth=1.3, label="measured")
    cutoff = date_numbers(np.array([fan.cutoff_ms]))[0]
    axis.axvline(cutoff, color=EDGE, linewidth=1, linestyle=(0, (4, 3)))
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
        color=SOFT,
    )
    time_axis(axis)
    axis.set_xlim(times[0], max(times[-1], ahead[-1]))
    axis.set_title(panel.sensor, loc="left", fontsize=11, fontweight="bold")
    axis.set_ylabel(panel.label)
    axis.set_xlabel("event time (UTC)")
    plain(axis)


def draw_fan(axis: Any, fan: Fan) -> None:
    """Bands from the outermost pair of quantiles inwards, each darker where it lies on the last, and the median. One step is a bar
    for each band, and a dot."""
    ahead = date_numbers(fan.ends_ms)
    single = len(ahead) == 1
    for i, (low, high) in enumerate(bands(fan.levels)):
        edges = ahead, fan.quantiles[:, i], fan.quantiles[:, -1 - i]
        look = {"color": BLUE, "alpha": band_opacity(i), "label": f"{100 * low:g} to {100 * high:g} % quantile"}
        if single:
            axis.vlines(*edges, linewidth=5, **look)
        else:
            axis.fill_between(*edges, linewidth=0, **look)
    marker = {"marker": "o", "markersize": 4} if single else {}
    axis.plot(ahead, fan.middle, color=BLUE, linewidth=1.8, label="forecast (median)", **marker)


def bands(levels: Sequence[float]) -> list[tuple[float, float]]:
    """Pairs of levels, outermost first. levels: ascending.

    >>> bands((0.1, 0.25, 0.5, 0.75, 0.9)), bands((0.5,))
    ([(0.1, 0.9), (0.25, 0.75)], [])
    """
    return [(levels[i], levels[-1 - i]) for i in range(len(levels) // 2)]


def band_opacity(i: int) -> float:
    """Of the i-th band from outside."""
    return 0.18 if i == 0 else 0.25


def _draw_errors(axis: Any, errors: LeadErrors) -> None:
    hours = errors.step_ms / 3_600_000
    for (name, values), colour in zip(errors.by_name.items(), LINES):
        leads = np.arange(1, len(values) + 1) * hours
        axis.plot(leads, values, color=THEME[colour][0], linewidth=1.8, marker="o", markersize=3, label=name)
    axis.set_title("Mean absolute error by lead", loc="left", fontsize=11, fontweight="bold")
    axis.set_xlabel("lead (hours ahead)")
    axis.set_ylabel(f"error ({errors.unit})")
    axis.set_ylim(bottom=0)
    axis.margins(x=0.01)
    axis.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=len(errors.by_name), frameon=False, fontsize=9)
    plain(axis)


def plain(axis: Any) -> None:
    """A light grid behind the data and two spines."""
    axis.grid(True, color=GRID, linewidth=0.7)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    axis.tick_params(colors=TICK, length=3)


def time_axis(axis: Any, narrow: bool = False) -> None:
    """UTC along the bottom. The fewest and the most ticks are such that matplotlib finds a step between them for every range."""
    dates: Any = importlib.import_module("matplotlib.dates")  # its functions are untyped
    fewest, most = (3, 8) if narrow else (5, 11)
    locator = dates.AutoDateLocator(minticks=fewest, maxticks=most, tz=UTC)
    axis.xaxis.set_major_locator(locator)
    axis.xaxis.set_major_formatter(dates.ConciseDateFormatter(locator, tz=UTC))


def _headroom(axis: Any) -> None:
    """Space above the data for the note at the cutoff."""
    low, high = axis.get_ylim()
    axis.set_ylim(low, high + 0.14 * (high - low))


def date_numbers(times_ms: NDArray[np.int64]) -> NDArray[np.float64]:
    """(n) epoch ms -> (n) what a time axis counts in: days."""
    return times_ms / 86_400_000


def inline_svg(figure: Any, name: str, label: str, tips: Mapping[str, Sequence[str]] | None = None) -> str:
    """A matplotlib figure as an SVG element that stands inside a page, in its font and theme; it needs nothing else.

    name: of no other chart in the page. label: what a screen reader says of it. tips: gid of a drawn line -> what the mouse shows
    over each of its markers, in their order."""
    import matplotlib

    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}), io.StringIO() as file:
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
        svg = file.getvalue()
    for gid, texts in (tips or {}).items():
        svg = _with_tips(svg, gid, texts)
    view = re.search(r'viewBox="[^"]*"', svg)
    body = svg[svg.index("<g ") : svg.rindex("</svg>")]
    return f'<svg role="img" aria-label="{html.escape(label)}" {view[0] if view else ""}>{_small(body, name)}</svg>'


def _with_tips(svg: str, gid: str, texts: Sequence[str]) -> str:
    """A title inside each of the first markers that follow."""
    titles = iter(f"<title>{html.escape(text)}</title>" for text in texts)
    head, mark, tail = svg.partition(f'<g id="{gid}">')
    markers = r"<use ([^>]*)/>"
    tail = re.sub(markers, lambda use: f"<use {use[1]}>{next(titles)}</use>", tail, count=len(texts)) if texts else tail
    return head + mark + tail


def _small(svg: str, name: str) -> str:
    """Only ids that something refers to, and those the page's own; colours of the theme; two decimals."""
    used = set(re.findall(r'(?:url\(|href=")#([^")]+)', svg))
    own = {light: f"var(--{role})" for role, (light, _) in THEME.items()}

    def tag(found: re.Match[str]) -> str:
        text = re.sub(r' id="([^"]*)"', lambda had: f' id="{name}-{had[1]}"' if had[1] in used else "", found[0])
        text = re.sub(r'(url\(#|xlink:href="#)', rf"\g<1>{name}-", text).replace("xlink:href", "href")
        text = re.sub(r'font-family: [^;"]*;? ?| transform="rotate\(-0 [^"]*"', "", text)
        text = re.sub(r"-?\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}".rstrip("0").rstrip("."), text)
        return re.sub(r"#[0-9a-f]{6}\b", lambda colour: own.get(colour[0], colour[0]), text)

    return re.sub(r"\n\s*", "\n", re.sub(r"<[^>]*>", tag, svg))


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
<style>{CSS}{_PICTURE_CSS}</style>
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


def _theme(index: int) -> str:
    return " ".join(f"--{name}: {colours[index]};" for name, colours in THEME.items())


CSS: Final = f"""
:root {{ color-scheme: light dark; {_theme(0)} }}
@media screen and (prefers-color-scheme: dark) {{ :root {{ {_theme(1)} }} }}
body {{ margin: 0; font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--ground); }}
main {{ max-width: 72rem; margin: 0 auto; padding: 2rem 1rem 4rem; }}
h1 {{ font-size: 1.6rem; margin: 0 0 .25rem; }} h2 {{ font-size: 1.1rem; margin: 2rem 0 .5rem; }}
p {{ color: var(--soft); margin: 0 0 1rem; }}
table {{ border-collapse: collapse; background: var(--card); border: 1px solid var(--line); }}
th, td {{ padding: .35rem .9rem; text-align: left; border-bottom: 1px solid var(--line); }}
th {{ font-weight: 600; color: var(--soft); }}
td.number, th.number {{ text-align: right; font-variant-numeric: tabular-nums; }}
svg {{ stroke-linejoin: round; }}
"""
"""Of every page: colours by name, text, tables."""
_PICTURE_CSS: Final = """
img { width: 100%; height: auto; border: 1px solid var(--line); border-radius: 8px; background: #fff; }
section { overflow-x: auto; }
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
