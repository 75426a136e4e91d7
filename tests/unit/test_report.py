"""The backtest report, read back the way a browser does: parsed, its references followed, its numbers looked for."""

import math
import re
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from pipeline.service.picture import THEME, Fan
from pipeline.service.report import write_report
from pipeline.service.report_figures import MEASURES, Mark, OverTime, Report, SensorFans

HOUR_MS, DAY_MS = 3_600_000, 86_400_000
START_MS = 1_704_067_200_000
LEVELS = (0.1, 0.5, 0.9)
HORIZON = 6
SENSORS = ("pump-001", "fan-002", "tank-003")
MASE = {"Millrace": 0.8208, "LastValue": 1.53, "SeasonalNaive": 1.08}
BANDLESS = ("LastValue", "SeasonalNaive")


# -- what goes in


def row(sensor: str | None, lead: int | None, forecaster: str, mase: float) -> dict[str, Any]:
    banded = math.nan if forecaster in BANDLESS else 1.0
    values = {
        "labels": 1234, "MAE": 3 * mase, "RMSE": 4 * mase, "MSE": 16 * mase**2, "MASE": mase, "sMAPE": 0.05 * mase,
        "pinball": mase * banded, "coverage": 0.793 * banded, "width": 7.5 * banded,
        "scaled_MAE": 0.5 * mase, "scaled_MSE": 0.25 * mase**2,
    }  # fmt: skip
    return {"unique_id": sensor, "lead": lead, "forecaster": forecaster, **values}


def metrics(mase: dict[str, float] = MASE, sensors: Sequence[str] = SENSORS, horizon: int = HORIZON) -> pd.DataFrame:
    rows = [row(None, None, name, value) for name, value in mase.items()]
    rows += [
        row(None, lead, name, value * (0.7 + 0.1 * lead))
        for lead in range(1, horizon + 1)
        for name, value in mase.items()
    ]
    rows += [row(s, None, name, value * (1 + i / 10)) for i, s in enumerate(sensors) for name, value in mase.items()]
    return pd.DataFrame(rows).astype({"lead": "Int64"})


def sensor_fans(
    unique_id: str, count: int = 4, levels: tuple[float, ...] = LEVELS, horizon: int = HORIZON
) -> SensorFans:
    """Each fan is right in the middle, but for its last step, which is far off."""
    steps = np.arange(96)
    values = 20 + 5 * np.sin(steps / 24 * 2 * np.pi)
    fans = []
    for cutoff in range(24, 24 + 18 * count, 18):
        ahead = cutoff + np.arange(horizon)
        middle = values[ahead].copy()
        middle[-1] += 100
        quantiles = middle[:, None] + np.linspace(-1, 1, len(levels)) if len(levels) > 1 else middle[:, None]
        ends = START_MS + (ahead + 1) * HOUR_MS
        fans.append(Fan(START_MS + cutoff * HOUR_MS, ends, middle, quantiles, levels))
    return SensorFans(unique_id, "worst (MASE 2.3)", START_MS + steps * HOUR_MS, values, tuple(fans))


def over_time(names: Iterable[str] = MASE, days: int = 60) -> OverTime:
    errors = {name: 0.5 + i + 0.1 * np.sin(np.arange(days)) for i, name in enumerate(names)}
    for values in errors.values():
        values[:3] = np.nan
    return OverTime(START_MS + np.arange(1, days + 1) * DAY_MS, errors)


MARKS = (
    Mark(START_MS + 2 * DAY_MS, "refused", "Its pinball loss was no lower."),
    Mark(START_MS + DAY_MS, "promoted", "It was better by 4 %."),
    Mark(START_MS + 3 * DAY_MS, "rolled-back", "By hand."),
)


def report(**changes: Any) -> Report:
    rates = {"Millrace": np.array([0.12, 0.5, 0.913]), **{name: np.full(3, np.nan) for name in BANDLESS}}
    whole = Report(
        title="ETTh1 & friends",
        facts=[("Data", "2024-01-01 to 2024-03-01"), ("Speed", "138,000 × event time")],
        metrics=metrics(),
        levels=LEVELS,
        step_ms=HOUR_MS,
        reliability=rates,
        over_time=over_time(),
        marks=MARKS,
        fans=[sensor_fans(name) for name in SENSORS],
        settings='[stream]\nwindow = "1h"\n',
        notes=["9 windows were empty."],
    )
    return replace(whole, **changes)


# -- what comes out


class Page(HTMLParser):
    """Elements, their attributes, and the words of each section; complains of what is closed out of order."""

    VOID = frozenset({"meta", "br", "img", "link", "input", "hr", "base", "source", "area", "col", "wbr"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.source = text
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.words: list[str] = []
        self.cells: list[tuple[str, str]] = []
        """(class, text) of each cell of a table."""
        self.rows: list[list[str]] = []
        self.sections: dict[str, str] = {}
        self.open: list[str] = []
        self._section = "header"
        self.feed(text)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "section":
            self._section = dict(attrs)["id"] or ""
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.cells.append((dict(attrs).get("class") or "", ""))
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert [tag] == self.open[-1:], f"</{tag}> at {self.getpos()}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.words.append(data)
        self.sections[self._section] = self.sections.get(self._section, "") + data
        if {"td", "th"} & set(self.open):
            kind, text = self.cells[-1]
            self.cells[-1] = kind, (text + data).lstrip()
            self.rows[-1][-1] = self.cells[-1][1]

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.words))

    def of(self, name: str) -> list[str]:
        return [value for _, attribute, value in self.attributes if attribute == name]

    @property
    def verdict(self) -> str:
        found = re.search(r'<p class="verdict">(.*?)</p>', self.source)
        assert found
        return found[1]

    @property
    def drawings(self) -> list[str]:
        return re.findall(r'<svg role="img".*?</svg>', self.source, re.DOTALL)


def written(folder: Path, **changes: Any) -> Page:
    path = folder / "report.html"
    assert write_report(path, report(**changes)) == path
    return Page(path.read_text("utf-8"))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    return written(tmp_path_factory.mktemp("report"))


def test_the_page_needs_nothing_but_itself(page: Page):
    assert not set(page.tags) & {"script", "link", "img", "iframe", "object", "embed", "image"}
    assert not page.of("src")
    assert all(reference.startswith("#") for reference in page.of("href") + page.of("xlink:href"))
    assert not re.search(r"https?:|@import|@font-face|url\((?!#)", page.source)
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]


def test_ids_are_unique_and_every_reference_has_its_target(page: Page):
    ids = Counter(page.of("id"))
    assert max(ids.values()) == 1
    wanted = {reference[1:] for reference in page.of("href")} | set(re.findall(r"url\(#([^)]+)\)", page.source))
    assert wanted
    assert wanted <= set(ids)


def test_every_forecaster_and_every_metric_over_all_is_there(page: Page):
    numbers = {
        "Millrace": ["0.821", "0.410", "0.168", "2.46", "3.28", "10.8", "4.1 %", "0.821", "79.3 %", "7.50", "1,234"],
        "LastValue": ["1.530", "0.765", "0.585", "4.59", "6.12", "37.5", "7.7 %", "–", "–", "–", "1,234"],
        "SeasonalNaive": ["1.080", "0.540", "0.292", "3.24", "4.32", "18.7", "5.4 %", "–", "–", "–", "1,234"],
    }
    rows = {row[0]: [cell.removesuffix(" (best)") for cell in row[1:]] for row in page.rows[1:4]}
    assert rows == numbers
    assert len(page.rows[0]) == 1 + len(MEASURES) + 1


def test_the_best_of_each_column_is_marked_but_no_width_and_nothing_without_rivals(page: Page):
    first = [(kind, text) for kind, text in page.cells if text.endswith("(best)")]
    assert all("best" in kind.split() for kind, _ in first)
    assert [text for _, text in first[:7]] == [f"{number} (best)" for number in page_numbers(page, "Millrace")[:7]]
    assert "7.50 (best)" not in page.text, "width has no best"
    assert "79.3 % (best)" not in page.text, "only one of them has a coverage"


def page_numbers(page: Page, forecaster: str) -> list[str]:
    return next([cell.removesuffix(" (best)") for cell in row[1:]] for row in page.rows if row[0] == forecaster)


def test_the_best_coverage_is_the_nearest_to_nominal(tmp_path: Path):
    frame = metrics({"Millrace": 0.8, "AutoETS": 0.9})
    frame.loc[frame["forecaster"] == "AutoETS", "coverage"] = 0.99
    page = written(tmp_path, metrics=frame, over_time=over_time(["Millrace"]), fans=[])
    assert "79.3 % (best)" in page.text
    assert "99.0 % (best)" not in page.text


@pytest.mark.parametrize(
    ("mase", "expected"),
    [
        (
            MASE,
            "Millrace’s MASE 0.82 over all leads is 24 % below SeasonalNaive’s 1.08, the best baseline;"
            " its 80 % intervals held 79.3 % of the truths.",
        ),
        (
            {"Millrace": 1.2, "SeasonalNaive": 1.0},
            "Millrace’s MASE 1.20 over all leads is 20 % above SeasonalNaive’s 1.00: that baseline forecast better;"
            " its 80 % intervals held 79.3 % of the truths.",
        ),
        (
            {"SeasonalNaive": 1.0, "Millrace": 1.0},
            "Millrace’s MASE 1.00 over all leads is the same as SeasonalNaive’s 1.00;"
            " its 80 % intervals held 79.3 % of the truths.",
        ),
        (
            {"Millrace": 0.9},
            "Millrace’s MASE over all leads is 0.90, with no baseline to hold it against;"
            " its 80 % intervals held 79.3 % of the truths.",
        ),
    ],
)
def test_the_verdict_says_what_the_metrics_say(tmp_path: Path, mase: dict[str, float], expected: str):
    page = written(tmp_path, metrics=metrics(mase), over_time=over_time([]), fans=[], reliability={})
    assert page.verdict == expected


@pytest.mark.parametrize(("coverage", "words"), [(0.6, "they are too narrow."), (0.97, "they are too wide.")])
def test_intervals_that_do_not_hold_what_they_claim_are_named_in_the_verdict(
    tmp_path: Path, coverage: float, words: str
):
    frame = metrics()
    frame.loc[frame["forecaster"] == "Millrace", "coverage"] = coverage
    assert written(tmp_path, metrics=frame, fans=[], marks=[]).verdict.endswith(words)


def test_without_mase_the_verdict_and_charts_go_by_the_scaled_error(tmp_path: Path):
    page = written(tmp_path, metrics=metrics().assign(MASE=np.nan), fans=[])
    assert "mean absolute error in standard deviations 0.41 over all leads is 24 % below" in page.verdict
    assert "scaled MAE by lead" in page.sections["leads"]


def test_every_chart_is_named_and_follows_the_theme(page: Page):
    assert len(page.drawings) == 4 + 2 * (1 + len(SENSORS))
    light = {colour for colour, _ in THEME.values()}
    for drawing in page.drawings:
        ET.fromstring(drawing)
        assert re.match(r'<svg role="img" aria-label="[^"]+" viewBox="0 0 [\d.]+ [\d.]+">', drawing)
        assert not light & set(re.findall(r"#[0-9a-f]{6}\b", drawing))
        assert "#000000" not in drawing, "black ink would vanish on a dark ground"
    for name, (day, night) in THEME.items():
        assert page.source.count(f"--{name}: {day};") == page.source.count(f"--{name}: {night};") == 1


def test_the_mouse_reads_every_point_of_a_lead_chart(page: Page):
    titles = re.findall(r"<title>(.*?)</title>", page.drawings[0])
    assert len(titles) == HORIZON * len(MASE)
    assert "Millrace, 3 h ahead: 0.821" in titles
    assert "Millrace: 91.3 % of the truths at or below its 90 % quantile" in page.source


def test_marks_are_counted_drawn_and_listed_by_time(page: Page):
    wide = next(drawing for drawing in page.drawings if "Mean absolute error over time" in drawing)
    assert len(re.findall("<title>", wide)) == len(MARKS)
    assert "2024-01-02 00:00, promoted: It was better by 4 %." in wide
    for row_name in ("promoted 1", "rolled-back 1", "refused 1"):
        assert f">{row_name}</text>" in wide
    assert [row[1] for row in page.rows if row[0].startswith("2024-01-0")] == ["promoted", "refused", "rolled-back"]
    assert "1 promoted, 1 rolled-back, 1 refused" in page.sections["more"]


def test_sixty_retrainings_and_more_keep_a_row_for_each_kind(tmp_path: Path):
    kinds = ("promoted", "refused", "failed", "swap", "rolled-back", "something new")
    marks = [Mark(START_MS + i * DAY_MS // 4, kinds[i % len(kinds)], f"number {i}") for i in range(240)]
    page = written(tmp_path, marks=marks, fans=[])
    wide = next(drawing for drawing in page.drawings if "over time" in drawing)
    assert len(re.findall("<title>", wide)) == 240
    assert all(f">{kind} 40</text>" in wide for kind in (*kinds[:-1], "other"))


def test_fans_say_why_they_are_shown_and_how_many_truths_they_held(page: Page):
    # The last of the six steps of each of four fans is far off.
    for name in SENSORS:
        expected = f"{name} worst (MASE 2.3); 20 of the 24 truths in view that were forecast lie in the 80 % band"
        assert expected in re.sub(r"\s+", " ", page.sections["fans"])
    assert "10 to 90 %" in page.sections["fans"]


def test_sensors_stand_worst_first_with_the_difference_to_the_best_baseline(page: Page):
    rows = [row for row in page.rows if row[0] in SENSORS]
    assert [row[0] for row in rows] == ["tank-003", "fan-002", "pump-001"]
    assert [row[1:4] for row in rows] == [
        ["0.985", "1.296", "−24 %"],
        ["0.903", "1.188", "−24 %"],
        ["0.821", "1.080", "−24 %"],
    ]


def test_metrics_by_lead_facts_notes_and_settings_are_there(page: Page):
    more = page.sections["more"]
    assert all(f"{lead} ({lead} h)" in more for lead in range(1, HORIZON + 1))
    assert "18 rows" in more
    assert 'window = "1h"' in more
    for words in ("ETTh1 & friends", "138,000 × event time", "9 windows were empty."):
        assert words in page.sections["header"]


def test_hostile_names_are_words_and_nothing_else(tmp_path: Path):
    evil = '"><img src=x onerror=alert(1)><script>alert(2)</script>&amp;$\\alpha_'
    page = written(
        tmp_path,
        title=f"title {evil}",
        facts=[(f"fact {evil}", f"value {evil}")],
        metrics=metrics({"Millrace": 0.8, f"base {evil}": 0.9}, sensors=(f"sensor {evil}", "other")),
        reliability={f"base {evil}": np.array([0.1, 0.4, 0.8])},
        over_time=over_time([f"base {evil}"]),
        marks=[Mark(START_MS, f"kind {evil}", f"label {evil}")],
        fans=[replace(sensor_fans(f"fan {evil}"), why=f"why {evil}")],
        settings=f"settings {evil}",
        notes=[f"note {evil}"],
    )
    assert not {"script", "img"} & set(page.tags)
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    for name in ("title", "fact", "value", "base", "sensor", "kind", "label", "fan", "why", "settings", "note"):
        assert f"{name} {evil}" in page.text, name
    for drawing in page.drawings:
        ET.fromstring(drawing)


def test_the_same_report_gives_the_same_bytes(tmp_path: Path, page: Page):
    assert written(tmp_path).source == page.source


def test_a_long_table_of_sensors_is_cut_to_the_worst_and_the_best_ten(tmp_path: Path):
    names = [f"sensor-{i:04d}" for i in range(1000)]
    page = written(tmp_path, metrics=metrics(sensors=names), fans=[])
    shown = [row[0] for row in page.rows if row[0].startswith("sensor-")]
    assert shown == [*reversed(names[-10:]), *reversed(names[:10])]
    assert "The worst 10 and the best 10 of 1,000 sensors; metrics.csv has them all." in page.sections["sensors"]
    assert "MASE across sensors" in page.sections["sensors"]


def test_six_sensors_with_four_fans_each_stay_below_two_megabytes(tmp_path: Path):
    fans = [sensor_fans(f"sensor-{i}", levels=(0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95)) for i in range(6)]
    assert len(written(tmp_path, fans=fans).source.encode()) < 2_000_000


def test_one_sensor_and_no_marks(tmp_path: Path):
    page = written(tmp_path, metrics=metrics(sensors=("only",)), marks=[], fans=[sensor_fans("only")])
    assert "One model answered from beginning to end." in page.sections["more"]
    assert len([row for row in page.rows if row[0] == "only"]) == 1
    assert "The strip on top" not in page.text


def test_a_single_lead_is_said_not_drawn_and_its_fans_are_dots(tmp_path: Path):
    page = written(tmp_path, metrics=metrics(horizon=1), fans=[sensor_fans("pump-001", horizon=1)])
    assert page.sections["leads"].count("There is one lead only") == 2
    assert "There is one lead only" in page.sections["calibration"]
    assert "Leads ahead" not in page.text
    assert len(page.drawings) == 1 + 2 + 2


def test_a_day_of_seconds_and_a_week_of_hours_have_leads_in_their_own_unit(tmp_path: Path):
    for step_ms, horizon, unit in ((1000, 60, "seconds"), (60_000, 30, "minutes"), (HOUR_MS, 168, "days")):
        page = written(tmp_path, metrics=metrics(horizon=horizon), step_ms=step_ms, fans=[], marks=[])
        assert f">{unit} ahead</text>" in page.drawings[0]


@pytest.mark.parametrize("empty", [metrics().iloc[:0], pd.DataFrame()])
def test_without_any_label_the_page_says_so_instead_of_drawing(tmp_path: Path, empty: pd.DataFrame):
    nothing = OverTime(np.array([START_MS]), {"Millrace": np.array([np.nan])})
    page = written(tmp_path, metrics=empty, reliability={}, over_time=nothing, marks=[], fans=[], notes=[], facts=[])
    assert page.verdict.startswith("Nothing that was said could be held against what came")
    assert not page.drawings
    assert "There are no metrics." in page.sections["overall"]
    assert "Nothing matured." in page.sections["leads"]
    assert "Nothing matured." in page.sections["over-time"]
    assert "No sensor has forecasts to show." in page.sections["fans"]
    assert "No sensor has an error to show." in page.sections["sensors"]


def test_metrics_that_are_not_known_are_dashes_never_nan(tmp_path: Path):
    frame = metrics()
    frame[list(MEASURES)] = np.nan
    frame["labels"] = 0
    unknown = {name: np.full(3, np.nan) for name in MASE}
    page = written(tmp_path, metrics=frame, reliability=unknown, over_time=over_time([]), fans=[])
    assert page.verdict.startswith("Nothing that Millrace said could be held against what came")
    assert page_numbers(page, "Millrace") == ["–"] * len(MEASURES) + ["0"]
    assert not page.drawings
    assert "nan" not in page.text.lower().replace("finance", "")


def test_infinite_metrics_are_not_known_either(tmp_path: Path):
    frame = metrics()
    frame.loc[frame["forecaster"] == "SeasonalNaive", "MASE"] = np.inf
    page = written(tmp_path, metrics=frame, fans=[], marks=[])
    assert "below LastValue’s 1.53" in page.verdict
    assert "inf" not in page_numbers(page, "SeasonalNaive")


def test_one_quantile_is_no_interval(tmp_path: Path):
    fans = [sensor_fans("pump-001", levels=(0.5,))]
    page = written(tmp_path, levels=(0.5,), reliability={"Millrace": np.array([0.48])}, fans=fans)
    assert "intervals" not in page.verdict
    assert "One quantile is no interval" in page.sections["calibration"]
    assert page_numbers(page, "Millrace")[8] == "–"
    assert "truths in view" not in page.sections["fans"]


def test_one_time_bin_is_a_dot(tmp_path: Path):
    once = OverTime(np.array([START_MS]), {"Millrace": np.array([0.4])})
    page = written(tmp_path, over_time=once, marks=[], fans=[])
    assert "<use" in next(drawing for drawing in page.drawings if "over time" in drawing)


def test_the_template_travels_with_the_package():
    assert files("pipeline.service").joinpath("report.html.j2").is_file()
