"""What a backtest leaves behind beside its forecasts: metrics.csv, settings.toml, report.html."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from models.measures import MEASURES
from pipeline.service.matching import SERVICE, Matching, level_column
from pipeline.service.passage import Outcome
from pipeline.service.picture import Fan
from pipeline.service.report import write_report
from pipeline.service.report_figures import Mark, OverTime, Report, SensorFans
from pipeline.service.timeline import Change
from pipeline.service.words import moment
from pipeline.settings import Settings, format_duration, to_toml

METRICS_FILE: Final = "metrics.csv"
REPORT_FILE: Final = "report.html"
SETTINGS_FILE: Final = "settings.toml"
FANS: Final = 4
"""Forecasts shown of a sensor, one after the other."""
BEFORE: Final = 3
"""Horizons shown before the first of them."""
WORST: Final = 2


def metrics_frame(matching: Matching) -> pd.DataFrame:
    """One row a forecaster: over all (unique_id and lead empty), by lead (unique_id empty), by series (lead empty)."""
    figures = matching.errors.figures(*matching.in_sample.units())
    names, rows = matching.series_names, []

    def take(found: Mapping[str, Any], unique_id: Any, lead: Any) -> pd.DataFrame:
        """found: measure -> (n, F)."""
        n = next(iter(found.values())).shape[0]
        columns = {
            "unique_id": np.repeat(unique_id, len(figures.forecasters)),
            "lead": np.repeat(lead, len(figures.forecasters)),
            "forecaster": list(figures.forecasters) * n,
            "labels": found["labels"].reshape(-1).astype(np.int64),
        }
        return pd.DataFrame(columns | {name: found[name].reshape(-1) for name in MEASURES})

    over_all = {name: values[None] for name, values in figures.over_all().items()}
    by_lead = figures.by_lead()
    by_series = {name: values[: len(names)] for name, values in figures.by_series().items()}
    leads = np.arange(1, len(by_lead["labels"]) + 1)
    rows = [take(over_all, [None], [None]), take(by_lead, [None] * len(leads), leads)]
    if names:
        rows.append(take(by_series, names, [None] * len(names)))
    return pd.concat([part.astype({"unique_id": object, "lead": "Int64"}) for part in rows], ignore_index=True)


def write_results(
    out: Path,
    forecasts: Path,
    outcome: Outcome,
    settings: Settings,
    *,
    title: str,
    sensors: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> pd.DataFrame:
    """metrics.csv, settings.toml and report.html beside `forecasts`; returns the metrics. sensors: those that the report shows."""
    metrics = metrics_frame(outcome.matching)
    metrics.to_csv(out / METRICS_FILE, index=False)
    (out / SETTINGS_FILE).write_text(to_toml(settings), encoding="utf-8")
    shape, rule = outcome.matching.shape, outcome.matching.rule
    shown = _shown(metrics, outcome.matching.series_names, sensors)
    report = Report(
        title=title,
        facts=_facts(outcome),
        metrics=metrics,
        levels=shape.levels,
        step_ms=rule.hop_ms,
        reliability=outcome.matching.errors.reliability,
        over_time=OverTime(
            outcome.over_time.ends_ms(), dict(zip((SERVICE, shape.beside[-1]), outcome.over_time.errors()))
        ),
        marks=[Mark(change.time_ms, change.kind, _label(change)) for change in outcome.changes],
        fans=[_fans_of(forecasts, name, why, outcome.matching) for name, why in shown],
        settings=to_toml(settings),
        notes=notes,
    )
    write_report(out / REPORT_FILE, report)
    return metrics


def overall(metrics: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows over all, for a table in the terminal: rounded, without what is not known."""
    rows = metrics[metrics["unique_id"].isna() & metrics["lead"].isna()]
    return [
        {"forecaster": row["forecaster"], "labels": int(row["labels"])}
        | {name: None if pd.isna(row[name]) else float(f"{row[name]:.4g}") for name in MEASURES}
        for _, row in rows.iterrows()
    ]


def speed_up(outcome: Outcome) -> float | None:
    """Event time gone through in a second of ours."""
    if outcome.first_ms is None or outcome.last_ms is None or not outcome.seconds:
        return None
    return (outcome.last_ms - outcome.first_ms) / 1000 / outcome.seconds


def _facts(outcome: Outcome) -> list[tuple[str, str]]:
    counts, matching = outcome.counts, outcome.matching
    refused = sum(outcome.rejected.values())
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(outcome.rejected.items()))
    facts = [
        ("Readings", f"{counts.readings:,}"),
        ("Refused", f"{refused:,} ({reasons})" if refused else ""),
        ("Late", f"{counts.late:,}" if counts.late else ""),
        ("Sensors", f"{len(matching.series):,}"),
        ("Steps", f"{counts.steps:,} of {format_duration(matching.rule.hop_ms)}"),
        ("Forecasts kept", f"{matching.forecasts:,}, {matching.shape.horizon} steps ahead"),
        ("Time taken", _seconds(outcome.seconds)),
    ]
    if outcome.first_ms is not None and outcome.last_ms is not None:
        facts.insert(0, ("Data", f"{moment(outcome.first_ms)} to {moment(outcome.last_ms)} UTC"))
    if (speed := speed_up(outcome)) is not None:
        facts.append(("Event time", f"{speed:,.0f} times as fast as it was lived"))
    return [(name, text) for name, text in facts if text]


def _label(change: Change) -> str:
    version = f"{change.version}: " if change.version else ""
    return version + change.reason


def _shown(metrics: pd.DataFrame, names: Sequence[str], chosen: Sequence[str]) -> list[tuple[str, str]]:
    """Sensors of the report, and why: the chosen ones, a typical one, the worst."""
    rows = metrics[metrics["unique_id"].notna() & (metrics["forecaster"] == SERVICE)]
    errors = rows.set_index("unique_id")["MASE"].dropna().sort_values()
    wanted = [(name, "chosen") for name in names if name in chosen or name.rsplit("/", 1)[0] in chosen]
    if len(errors):
        middle = errors.index[(len(errors) - 1) // 2]
        wanted.append((middle, f"typical (median MASE {errors[middle]:.2f})"))
        worst = [(name, f"worst (MASE {errors[name]:.2f})") for name in errors.index[::-1][:WORST]]
        wanted += worst
    if not wanted:
        wanted = [(name, "first") for name in names[:1]]
    return list({name: (name, why) for name, why in reversed(wanted)}.values())[::-1]


def _fans_of(forecasts: Path, unique_id: str, why: str, matching: Matching) -> SensorFans:
    """The newest forecasts that do not overlap and whose truth is known."""
    shape, rule = matching.shape, matching.rule
    horizon_ms = rule.hop_ms * shape.horizon
    stretch_ms = (FANS + 1) * (horizon_ms + rule.hop_ms * matching.kept.stride)
    frame = _newest(forecasts, unique_id, stretch_ms + BEFORE * horizon_ms)
    truth = frame.dropna(subset=["y"]).drop_duplicates("ds").sort_values("ds")
    starts, values = truth["ds"].to_numpy(np.int64), truth["y"].to_numpy(np.float64)
    newest_ms = int(starts[-1]) if len(starts) else 0
    taken: list[int] = []
    for cutoff_ms in np.unique(frame["cutoff"].to_numpy(np.int64))[::-1].tolist():
        if cutoff_ms + horizon_ms <= newest_ms and (not taken or taken[-1] - cutoff_ms >= horizon_ms):
            taken.append(cutoff_ms)
    taken = taken[:FANS][::-1]
    grid, series = starts, values
    if taken:
        grid = np.arange(taken[0] - BEFORE * horizon_ms, newest_ms + 1, rule.hop_ms)
        series = np.full(len(grid), np.nan)
        inside = starts >= grid[0]
        series[(starts[inside] - grid[0]) // rule.hop_ms] = values[inside]
    return SensorFans(unique_id, why, grid, series, tuple(_fan(frame, cutoff_ms, shape.levels) for cutoff_ms in taken))


def _fan(frame: pd.DataFrame, cutoff_ms: int, levels: Sequence[float]) -> Fan:
    rows = frame[frame["cutoff"] == cutoff_ms].sort_values("lead")
    given = tuple(level for level in levels if rows[level_column(level)].notna().all())
    quantiles = np.stack([rows[level_column(level)].to_numpy(np.float64) for level in given], axis=1)
    middle = quantiles[:, given.index(0.5)] if 0.5 in given else rows[SERVICE].to_numpy(np.float64)
    return Fan(cutoff_ms, rows["ds"].to_numpy(np.int64), middle, quantiles, given)


def _newest(forecasts: Path, unique_id: str, stretch_ms: int) -> pd.DataFrame:
    """The rows of one series whose cutoff is no older than so long before the newest one with a truth; times in ms."""
    rows = ds.dataset(forecasts, format="parquet")
    own = ds.field("unique_id") == unique_id
    cutoffs = rows.to_table(columns=["cutoff"], filter=own & ds.field("y").is_valid())["cutoff"]
    newest = pc.max(cutoffs).as_py()
    since = datetime.min if newest is None else newest - timedelta(milliseconds=stretch_ms)
    table = rows.to_table(filter=own & (ds.field("cutoff") >= pa.scalar(since, pa.timestamp("ms"))))
    for name in ("ds", "cutoff"):
        at = table.schema.get_field_index(name)
        table = table.set_column(at, name, table.column(name).cast(pa.timestamp("ms")).cast(pa.int64()))
    frame: pd.DataFrame = table.to_pandas()
    return frame


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.1f} min"
