"""A fleet whose behaviour changes in mid-stream, with retraining and without: matured error over time.

    python -m benchmarks.drift [--sensors 60] [--out docs/img]

The same log goes through the service's own parts in event time, without a broker: `ForecastTask`, `Learner`, `challenge` and the gate,
`swap`. Training takes no event time here. Three changes come one after the other, to all sensors at once:

    level        every sensor moves by six of its amplitudes
    amplitude    the daily rhythm grows to three times its size
    season       the rhythm of 24 hours becomes one of 16

Errors are absolute errors of the point forecast, mean over leads 1, 5 and 24, in units of each sensor's own first amplitude (not
of its running deviation, which grows when something changes and so would make errors look smaller), at the hour in which they matured.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.service.assembly import task_settings
from pipeline.service.fitting import challenge
from pipeline.service.history import History
from pipeline.service.learning import Learner, LearningRule
from pipeline.settings import Settings, load
from pipeline.stream.columns import Forecasts, RecordColumns
from pipeline.stream.scoring import decode_score, encode_scores
from pipeline.stream.task import ForecastTask, StepTask

HOUR_MS = 3_600_000
START_MS = 1_735_689_600_000
CHANGES = {"level": 28, "amplitude": 49, "season": 70}
"""Day of each."""
DAYS = 91
LEADS = (1, 5, 24)
HISTORY = "14d"
RECOVERED = 1.1
"""Within ten percent of where the error settles before the next change."""


def settings_of() -> Settings:
    return load(
        None,
        {},
        {
            "readings.fields": ["value"],
            "model.units": 32,
            "training.epochs": 12,
            "training.history": HISTORY,
            "retraining.every": "2d",
        },
    )


def fleet(sensors: int, seed: int = 0) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Values (hours, sensors), and the unit of each sensor's errors (sensors)."""
    random = np.random.default_rng(seed)
    hours = np.arange(DAYS * 24)
    day = hours[:, None] / 24
    amplitude = random.uniform(1, 4, sensors)
    phase = random.uniform(0, 2 * np.pi, sensors)
    size = np.where(day >= CHANGES["amplitude"], 3.0, 1.0)
    period = np.where(day >= CHANGES["season"], 16, 24)
    rhythm = size * amplitude * np.sin(2 * np.pi * hours[:, None] / period + phase)
    noise = np.zeros((len(hours), sensors))
    for hour in range(1, len(hours)):
        noise[hour] = 0.7 * noise[hour - 1] + random.normal(0, 0.3, sensors)
    level = random.normal(50, 20, sensors) + 6 * amplitude * (day >= CHANGES["level"])
    return level + rhythm + noise * amplitude, amplitude


def log_of(values: NDArray[np.float64]) -> Iterator[RecordColumns]:
    """A day at a time."""
    hours, sensors = values.shape
    keys = [b"sensor-%03d" % sensor for sensor in range(sensors)]
    for first in range(0, hours, 24):
        rows = [
            (hour * sensors + sensor, -1, keys[sensor], _value(hour, values[hour, sensor]), ())
            for hour in range(first, first + 24)
            for sensor in range(sensors)
        ]
        yield RecordColumns.build("plant.readings.v1", 0, rows)


def _value(hour: int, value: float) -> bytes:
    return json.dumps({"ts": START_MS + hour * HOUR_MS, "value": round(float(value), 4)}).encode()


@dataclass
class Run:
    """What one pass over the log showed."""

    name: str
    error: NDArray[np.float64]
    """(hours) mean error of what matured in the hour; NaN where nothing did."""
    decisions: list[tuple[float, str, str, str]] = field(default_factory=list)
    """Day, kind, trigger, reason."""


def run(values: NDArray[np.float64], unit: NDArray[np.float64], learns: bool) -> Run:
    settings = settings_of()
    core = task_settings(settings)
    task, steps, history = ForecastTask(core), StepTask(core), History(core)
    learner = Learner(LearningRule.of(settings))
    said = np.full((len(LEADS), *values.shape), np.nan)
    found = Run("retraining" if learns else "first model only", np.empty(0))
    champion: Any = None
    for records in log_of(values):
        output = task.run(records)
        history.add(steps, steps.process(records)[0])
        _note(output.forecasts, said)
        for value in encode_scores(output.scores, "scores").values:
            learner.observe(decode_score(value or b""))
        due = learner.due()
        if due is None or (champion is not None and not learns):
            continue
        history.forget_before(due.until_ms - (settings.training.history_ms or 0))
        sequences = history.sequences(to_ms=due.until_ms)
        outcome = challenge(settings, core.spec, sequences, champion, changed_ms=due.changed_ms)
        kind = "promoted" if outcome.verdict.promoted else "refused"
        day = (due.until_ms - START_MS) / HOUR_MS / 24
        found.decisions.append((day, kind, due.trigger, outcome.verdict.reason))
        print(f"{found.name}: day {day:.1f} {kind} ({due.trigger}): {outcome.verdict.reason}", flush=True)
        learner.decided(due.until_ms, trained=True)
        if outcome.verdict.promoted:
            previous = champion.version if champion else ""
            champion = outcome.model.forecaster
            task.swap(champion)
            learner.champion(champion.version, previous, due.until_ms)
    found.error = errors(said, values, unit)
    return found


def _note(forecasts: Forecasts, said: NDArray[np.float64]) -> None:
    """said: (leads, hours, sensors) by the hour spoken of."""
    hour = (forecasts.issued_at_ms - START_MS) // HOUR_MS - 1
    sensor = np.array([int(name[-3:]) for name in forecasts.sensors], np.int64)
    for row, lead in enumerate(LEADS):
        inside = hour + lead < said.shape[1]
        said[row, hour[inside] + lead, sensor[inside]] = forecasts.mean[inside, lead - 1, 0]


def errors(said: NDArray[np.float64], values: NDArray[np.float64], unit: NDArray[np.float64]) -> NDArray[np.float64]:
    known = np.isfinite(said)
    error = np.where(known, np.abs(said - values) / unit, 0.0).sum(axis=(0, 2))
    return error / np.where(known.any(axis=(0, 2)), known.sum(axis=(0, 2)), np.nan)


def seasonal_naive(values: NDArray[np.float64]) -> NDArray[np.float64]:
    said = np.full((len(LEADS), *values.shape), np.nan)
    said[:, 24:] = values[:-24]
    return said


def between(error: NDArray[np.float64], first_day: float, end_day: float) -> float:
    return float(np.nanmean(error[round(first_day * 24) : round(end_day * 24)]))


def recovery_days(error: NDArray[np.float64], change: float, end: float) -> float | None:
    """From the change to the end of the first whole day whose error is what it settles to (the last five days before `end`)."""
    settled = between(error, end - 5, end)
    for hour in range(24, int((end - change) * 24) + 1):
        at = change + hour / 24
        if between(error, at - 1, at) <= RECOVERED * settled:
            return at - change
    return None


def print_table(on: Run, off: Run, naive: NDArray[np.float64]) -> None:
    print(
        "\n| change | before (5 days) | 2 days after, on / off / seasonal naive | last 5 days before the next, on / off / seasonal naive | "
        "settled within 10 % after, on | alarm or schedule: first promotion after |\n|---|---|---|---|---|---|"
    )
    days = [*CHANGES.values(), DAYS]
    for (name, day), end in zip(CHANGES.items(), days[1:]):
        recovered = recovery_days(on.error, day, end)
        promoted = next(((at, why) for at, kind, why, _ in on.decisions if kind == "promoted" and at > day), None)
        after, last = (
            " / ".join(f"{between(error, *span):.3f}" for error in (on.error, off.error, naive))
            for span in ((day, day + 2), (end - 5, end))
        )
        cells = [
            f"{name}, day {day}",
            f"{between(on.error, day - 5, day):.3f}",
            after,
            last,
            "-" if recovered is None else f"{recovered:.1f} d",
            "-" if promoted is None else f"{promoted[0] - day:.1f} d ({promoted[1]})",
        ]
        print("| " + " | ".join(cells) + " |")


def plot(on: Run, off: Run, naive: NDArray[np.float64], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(10, 4.4), layout="constrained")
    for error, label, colour in (
        (naive, "seasonal naive", "#999999"),
        (off.error, "first model only", "#c2553b"),
        (on.error, "retraining on schedule and on drift", "#1f5f8b"),
    ):
        smooth = np.convolve(error, np.ones(24) / 24, "valid")
        axes.plot((np.arange(len(smooth)) + 24) / 24, smooth, label=label, color=colour, linewidth=1.6)
    for at, kind, trigger, _ in on.decisions:
        if kind == "promoted":
            colour = "#d99a00" if trigger == "drift" else "#1f5f8b"
            axes.axvline(at, color=colour, alpha=0.6, linewidth=0.9, linestyle=":")
    axes.plot([], [], ":", color="#1f5f8b", label="promotion (schedule)")
    axes.plot([], [], ":", color="#d99a00", label="promotion (drift)")
    for name, day in CHANGES.items():
        axes.axvline(day, color="black", linewidth=1.2, linestyle="--")
        axes.annotate(f" {name} changes", (day, 0.97), xycoords=("data", "axes fraction"), fontsize=8, va="top")
    axes.set(
        xlabel="day",
        ylabel="matured absolute error, in amplitudes\n(mean of 24 hours)",
        xlim=(0, DAYS),
        yscale="log",
    )
    axes.legend(loc="upper left", fontsize=8, framealpha=0.9)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sensors", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("docs/img"))
    given = parser.parse_args()
    values, unit = fleet(given.sensors)
    on, off = run(values, unit, learns=True), run(values, unit, learns=False)
    naive = errors(seasonal_naive(values), values, unit)
    print_table(on, off, naive)
    given.out.mkdir(parents=True, exist_ok=True)
    plot(on, off, naive, given.out / "drift.png")


if __name__ == "__main__":
    main()
