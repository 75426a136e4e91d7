"""A fleet whose behaviour changes in mid-stream, with retraining and without: matured error over time.

    python -m benchmarks.drift [--sensors 60] [--out docs/img]

The same log goes through the service's own parts in event time, without a broker: `ForecastTask`, `Learner`, `challenge` and the gate,
`swap`. Training takes no event time here. Three changes come one after the other, to all sensors at once:

    level        every sensor moves by six of its amplitudes
    amplitude    the daily rhythm grows to three times its size
    season       the rhythm of 24 hours becomes one of 16

Errors are absolute errors in running standard deviations, mean over the scored leads; both runs have the same unit at every moment.
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
from pipeline.stream.columns import RecordColumns
from pipeline.stream.scoring import ABSOLUTE, BASELINE, LABELS, MODEL, decode_score, encode_scores
from pipeline.stream.task import ForecastTask, StepTask

HOUR_MS = 3_600_000
START_MS = 1_735_689_600_000
CHANGES = {"level": 28, "amplitude": 49, "season": 70}
"""Day of each."""
DAYS = 91
HISTORY = "14d"
RECOVERED = 1.1
"""Within ten percent of where the error settles before the next change."""


def settings_of(sensors: int) -> Settings:
    return load(
        None,
        {},
        {
            "readings.fields": ["value"],
            "model.units": 32,
            "training.epochs": 12,
            "training.history": HISTORY,
            "retraining.every": "7d",
        },
    )


def fleet(sensors: int, seed: int = 0) -> NDArray[np.float64]:
    """(hours, sensors)"""
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
    return np.asarray(level + rhythm + noise * amplitude)


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
    day: list[float] = field(default_factory=list)
    error: list[float] = field(default_factory=list)
    baseline: list[float] = field(default_factory=list)
    decisions: list[tuple[float, str, str, str]] = field(default_factory=list)
    """Day, kind, trigger, reason."""


def run(values: NDArray[np.float64], learns: bool) -> Run:
    settings = settings_of(values.shape[1])
    core = task_settings(settings)
    task, steps, history = ForecastTask(core), StepTask(core), History(core)
    learner = Learner(LearningRule.of(settings))
    found = Run("retraining" if learns else "first model only")
    champion: Any = None
    for records in log_of(values):
        output = task.run(records)
        history.add(steps, steps.process(records)[0])
        for value in encode_scores(output.scores, "scores").values:
            score = decode_score(value or b"")
            learner.observe(score)
            _note(found, score.window_end, score.sums)
        due = learner.due()
        if due is None or (champion is not None and not learns):
            continue
        history.forget_before(due.until_ms - settings.training.history_ms)
        outcome = challenge(settings, core.spec, history.sequences(to_ms=due.until_ms), champion)
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
    return found


def _note(found: Run, end_ms: int, sums: NDArray[np.float64]) -> None:
    if sums[BASELINE, LABELS].sum():
        found.day.append((end_ms - START_MS) / HOUR_MS / 24)
        labels = np.maximum(sums[:, LABELS], 1)
        mean = (sums[:, ABSOLUTE] / labels).mean(axis=1)
        found.error.append(float(mean[MODEL]) if sums[MODEL, LABELS].sum() else float("nan"))
        found.baseline.append(float(mean[BASELINE]))


def between(run: Run, values: list[float], first: float, end: float) -> float:
    day = np.array(run.day)
    return float(np.nanmean(np.array(values)[(day > first) & (day <= end)]))


def recovery_days(run: Run, change: float, end: float) -> float | None:
    """From the change until the error of a whole day is back to where it settles (the last five days before `end`)."""
    settled = between(run, run.error, end - 5, end)
    for hour in range(24, int((end - change) * 24) + 1):
        at = change + hour / 24
        if between(run, run.error, at - 1, at) <= RECOVERED * settled:
            return at - 1 - change if hour > 24 else 0.0
    return None


def print_table(on: Run, off: Run) -> None:
    print(
        "\n| change | day | before | 2 days after, on / off | last 5 days before the next, on / off / seasonal naive | "
        "recovered after | first promotion after |\n|---|---|---|---|---|---|---|"
    )
    days = [*CHANGES.values(), DAYS]
    for (name, day), end in zip(CHANGES.items(), days[1:]):
        recovered = recovery_days(on, day, end)
        promoted = next((at for at, kind, *_ in on.decisions if kind == "promoted" and at > day), None)
        cells = [
            name,
            str(day),
            f"{between(on, on.error, day - 5, day):.3f}",
            f"{between(on, on.error, day, day + 2):.3f} / {between(off, off.error, day, day + 2):.3f}",
            f"{between(on, on.error, end - 5, end):.3f} / {between(off, off.error, end - 5, end):.3f} / "
            f"{between(on, on.baseline, end - 5, end):.3f}",
            "-" if recovered is None else f"{recovered:.1f} d",
            "-" if promoted is None else f"{promoted - day:.1f} d",
        ]
        print("| " + " | ".join(cells) + " |")


def plot(on: Run, off: Run, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(10, 4.2), layout="constrained")
    for one, values, label, colour in (
        (off, off.baseline, "seasonal naive", "#999999"),
        (off, off.error, "first model only", "#c2553b"),
        (on, on.error, "retraining on schedule and on drift", "#1f5f8b"),
    ):
        smooth = np.convolve(np.nan_to_num(values, nan=np.nan), np.ones(24) / 24, "valid")
        axes.plot(one.day[23:], smooth, label=label, color=colour, linewidth=1.6)
    for at, kind, trigger, _ in on.decisions:
        axes.axvline(at, color="#1f5f8b", alpha=0.5, linewidth=0.8, linestyle="-" if kind == "promoted" else ":")
        if kind == "promoted":
            axes.annotate(
                trigger, (at, 1), xycoords=("data", "axes fraction"), rotation=90, fontsize=7, va="top", ha="right"
            )
    for name, day in CHANGES.items():
        axes.axvline(day, color="black", linewidth=1.2, linestyle="--")
        axes.annotate(f" {name} changes", (day, 0.02), xycoords=("data", "axes fraction"), fontsize=8)
    axes.set(xlabel="day", ylabel="matured absolute error, sd (mean of a day)", ylim=(0, None))
    axes.legend(loc="upper left", fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sensors", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("docs/img"))
    given = parser.parse_args()
    values = fleet(given.sensors)
    on, off = run(values, learns=True), run(values, learns=False)
    print_table(on, off)
    given.out.mkdir(parents=True, exist_ok=True)
    plot(on, off, given.out / "drift.png")


if __name__ == "__main__":
    main()
