"""What a backtest says afterwards against what was said live.

`millrace backtest` (through its own entry) reads the same topic, with the models that the workers recorded where they took over. Every
committed forecast must be in its frame, and none besides: the same answerer, the same status, the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from pipeline.service.backtest import of_topic
from pipeline.service.matching import SERVICE, level_column
from pipeline.service.question import Question
from pipeline.settings import Settings
from tests.chaos.oracle import Findings, Forecast, compare_keys, largest_difference


def compare_backtest(settings: Settings, committed: Sequence[Forecast]) -> Findings:
    """committed: those of the forecasts topic, but for provisional ones."""
    answer = of_topic(settings, Question(recorded=True))
    levels = answer.outcome.matching.shape.levels
    return compare_frame(answer.frame(), levels, settings.windows.size_ms, committed)


def compare_frame(
    frame: pd.DataFrame, levels: Sequence[float], size_ms: int, committed: Sequence[Forecast]
) -> Findings:
    """frame: the long frame of a backtest of one target."""
    backtested = {
        (str(name), int(cutoff.timestamp() * 1000) + size_ms): rows.sort_values("lead")
        for (name, cutoff), rows in frame.groupby(["unique_id", "cutoff"], sort=False)
    }
    live = {(forecast.sensor, forecast.issued_at_ms): forecast for forecast in committed}
    findings = compare_keys(list(backtested), [(one.sensor, one.issued_at_ms) for one in committed])
    columns = [SERVICE, *(level_column(level) for level in levels)]
    for key in backtested.keys() & live.keys():
        rows, forecast = backtested[key], live[key]
        said = (set(rows["status"]), set(rows["model_version"]), rows["lead"].tolist())
        numbers = rows[columns].dropna(axis=1, how="all").to_numpy(np.float64).T[None]
        leads = list(range(1, forecast.numbers.shape[2] + 1))
        if said != ({forecast.status}, {forecast.model}, leads):
            findings.wrong += findings.note("backtest says otherwise", [f"{key}: {said}, live {forecast.facts}"])
        gap = largest_difference(forecast.numbers, numbers)
        findings.largest_difference = max(findings.largest_difference, gap)
    return findings
