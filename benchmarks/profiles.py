"""What a step of a sensor costs in each profile, beside the bare step of the network, and what a sensor's state takes.

    python -m benchmarks.profiles [--sensors 7,1000,100000] [--profiles base,lean,accuracy] [--horizon 24] [--season 24] [--columns]

Generated readings, one a window, go through `ForecastTask.take`: windows, memory, baseline, stages, a network with random weights (a GRU
of 64 units, three quantiles), scores. Live is one window of all sensors at a time, catch-up many windows at once. Every epoch begins with
a lesson of all sensors: "worst" is that window. A mean has lessons in proportion, one an epoch.

The state is warmed up through a few epochs of at most WARMED sensors, and copied to as many as are asked for: what a step costs does not
depend on what the state says. Of many sensors only a few windows of an epoch are measured (--steps).

Figures are microseconds of CPU time a sensor-step, one thread, whoever else keeps the machine busy; in brackets their ratio to the bare
step, `Network.unroll` of profile base on as many rows, one step. Each profile is a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Final

import numpy as np

from models import cascade, mixture, regression
from models.cascade import Cascade, epoch_steps
from models.features import SeriesMemory
from models.forecaster import SeriesSpec
from models.rnn import STEP_BUCKETS, RecurrentNet, RNNForecaster
from models.seasonal_average import SeasonalAverage
from models.training import in_profile
from models.volatility import Volatility
from pipeline.service.assembly import PROFILES
from pipeline.stream.columns import Readings
from pipeline.stream.scoring import Scorer
from pipeline.stream.serdes import ReadingFormat
from pipeline.stream.state import SensorTable, Snapshot
from pipeline.stream.task import ForecastTask, TaskSettings
from pipeline.stream.windows import WindowOperator, WindowRule

ONE_THREAD: Final = ("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")
STEP_MS: Final = 3_600_000
FIRST_WINDOW: Final = 405_600
"""Of the readings, in 2016."""
UNITS, WARMUP_STEPS, REWARM_STEPS = 64, 12, 64
WARMED: Final = 500
WARM_EPOCHS: Final = 4
BLOCK_CELLS, BLOCK_ROWS = 32_768, 4_096
"""As `iter_blocks` cuts."""
MOST_EPOCHS: Final = 8
AT_ONCE: Final = 8
"""Windows of a catch-up of many sensors."""
LARGE_COLUMNS: Final = 10
PARTS: Final[dict[str, Sequence[tuple[Any, str]]]] = {
    "windows": ((WindowOperator, "advance"), (SensorTable, "slots")),
    "memory": ((SeriesMemory, "advance"), (SensorTable, "gather"), (SensorTable, "scatter")),
    "volatility": ((Volatility, "advance"), (SeasonalAverage, "advance")),
    "features": ((cascade, "lag_features"),),
    "pooled": ((regression.PooledRidge, "forecast"),),
    "own": ((regression.OwnRidge, "forecast"),),
    "network": ((RNNForecaster, "offsets"), (RNNForecaster, "advance"), (Cascade, "_ground")),
    "mixture": (
        *((mixture.Mixture, name) for name in ("losses", "weights", "mixed")),
        *((mixture.Calibration, name) for name in ("gaussian", "distances", "offsets")),
        (Cascade, "_keep"),
    ),
    "scoring": ((Scorer, "advance"),),
    "lessons": ((Cascade, "teach"),),
}
"""What belongs to which part. Calls inside a part are its own, so that a lesson's features are the lesson's."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sensors", default="7,1000,100000")
    parser.add_argument("--profiles", default=",".join(PROFILES))
    parser.add_argument("--horizon", type=int, default=24)
    parser.add_argument("--season", type=int, default=24, help="steps; 0: none")
    parser.add_argument("--steps", type=int, default=300_000, help="sensor-steps of one measurement, about, at most")
    parser.add_argument("--columns", action="store_true", help="the larger columns of the state as well")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    counts = [int(count) for count in given.sensors.split(",")]
    if given.child:
        print(json.dumps([measured(given, count) for count in counts]))
        return
    found = [row for profile in given.profiles.split(",") for row in child(profile)]
    print_tables(sorted(found, key=lambda row: counts.index(row["sensors"])), given.columns)


def child(profile: str) -> list[dict[str, Any]]:
    """The same command for one profile, with one thread, which has to be known before NumPy is loaded."""
    command = [sys.executable, "-m", "benchmarks.profiles", *sys.argv[1:], "--profiles", profile, "--child"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
        env=os.environ | dict.fromkeys(ONE_THREAD, "1"),
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    rows: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return rows


# -- one profile, in a process of its own


class Fleet:
    """A task of many sensors that begins warm, and its readings: a rhythm of each sensor's own amplitude and phase, and noise.

    before_lesson: windows that can be read before the one with the next lesson."""

    def __init__(self, spec: SeriesSpec, sensors: int, before_lesson: int) -> None:
        self.spec, self.sensors = spec, sensors
        self.epoch = epoch_steps(spec.horizon)
        self.model = in_profile(random_network(spec))
        self.window = FIRST_WINDOW // self.epoch * self.epoch
        """The next to be read: the first of an epoch."""
        self._random = np.random.default_rng(0)
        self._names = [b"sensor-%d" % number for number in range(sensors)]
        self._amplitude = self._random.uniform(1, 5, sensors)
        self._phase = self._random.uniform(0, 2 * np.pi, sensors)
        warmed = min(sensors, WARMED)
        self.task = self._task()
        self._take(WARM_EPOCHS * self.epoch + max(self.spec.seasons, default=0), warmed)
        self._take((self.to_lesson - before_lesson) % self.epoch, warmed)
        if sensors > warmed:
            small, self.task = self.task, self._task()
            self.task.table.restore(repeated(small.table.snapshot(), self._names))

    def _task(self) -> ForecastTask:
        rule = WindowRule(STEP_MS, STEP_MS, 0, ("value",))
        format = ReadingFormat(("value",))
        return ForecastTask(TaskSettings(format, rule, self.spec, rewarm_steps=REWARM_STEPS), self.model)

    def compile(self, steps: int) -> None:
        """All that XLA has to for so many windows at once, before the clock runs."""
        network = self.model.network if isinstance(self.model, Cascade) else self.model
        assert isinstance(network, RNNForecaster)
        room = min(
            BLOCK_ROWS, BLOCK_CELLS // next(size for size in STEP_BUCKETS if size >= min(steps, STEP_BUCKETS[-1]))
        )
        for rows in {min(self.sensors, room), self.sensors % room} - {0}:
            network.net.warm_up(rows, min(steps, STEP_BUCKETS[-1]))

    @property
    def to_lesson(self) -> int:
        """Windows to be read before the one with a lesson. Window w closes with the first reading of w + 1, and ends with (w + 1) *
        STEP_MS: the lesson comes before the step of the last window of a round one."""
        return -self.window % self.epoch

    def live(self, windows: int) -> tuple[list[float], list[float]]:
        """CPU seconds of windows one at a time: ordinary ones, those with a lesson."""
        seconds: tuple[list[float], list[float]] = [], []
        for _ in range(windows):
            seconds[self.to_lesson == 0].append(self._take(1))
        return seconds

    def catch_up(self, windows: int) -> float:
        """CPU seconds of so many windows, all in one."""
        return self._take(windows)

    def _take(self, windows: int, sensors: int | None = None) -> float:
        if not windows:
            return 0.0
        readings = self._readings(windows, sensors or self.sensors)
        started = time.process_time()
        self.task.take("bench", 0, readings)
        return time.process_time() - started

    def _readings(self, windows: int, sensors: int) -> Readings:
        at = self.window + np.arange(windows)
        self.window += windows
        turn = 2 * np.pi * at[:, None] / max(self.spec.seasons, default=24)
        values = 20 + self._amplitude[:sensors] * np.sin(turn + self._phase[:sensors])
        values += self._random.normal(0, 0.3, values.shape)
        rows = np.arange(values.size)
        times = np.repeat(at * STEP_MS, sensors)
        return Readings(self._names[:sensors] * windows, rows, times, values.reshape(-1, 1), rows)


def repeated(snapshot: Snapshot, names: Sequence[bytes]) -> Snapshot:
    """As many sensors as there are names, each in the state of one of the snapshot's."""
    source = np.arange(len(names)) % len(snapshot.sensors)
    return Snapshot(tuple(names), {name: column[source] for name, column in snapshot.rows.items()}, snapshot.partition)


def random_network(spec: SeriesSpec) -> RNNForecaster:
    """Untrained heads say nothing; these say something small."""
    net = RecurrentNet(spec, "gru", UNITS)
    random = np.random.default_rng(0)
    net.model.set_weights([random.normal(0, 0.05, weight.shape) for weight in net.model.get_weights()])
    return RNNForecaster(type(net)(net.model, spec), version="random", warmup_steps=WARMUP_STEPS)


def measured(given: argparse.Namespace, sensors: int) -> dict[str, Any]:
    spec = SeriesSpec(
        channels=("value.mean",),
        targets=(0,),
        step_ms=STEP_MS,
        horizon=given.horizon,
        quantiles=(0.1, 0.5, 0.9),
        seasons=(given.season,) if given.season else (),
        profile=given.profiles,
    )
    epoch = epoch_steps(spec.horizon)
    epochs = min(MOST_EPOCHS, given.steps // (sensors * epoch))
    # Where no whole epoch can be afforded: the last windows before a lesson, it, and a stretch after it.
    windows = epochs * epoch or max(2, min(epoch, given.steps // sensors))
    at_once = windows if epochs else min(epoch, max(AT_ONCE, windows))
    bare = bare_step(spec, sensors, given.steps)
    fleet = Fleet(spec, sensors, windows + 1 if not epochs else 1)
    fleet.compile(1)
    fleet.compile(at_once if spec.profile == "base" else min(at_once, epoch))
    fleet.live(2)  # what the first calls allocate is not what is measured
    with split() as live_parts:
        ordinary, lessons = fleet.live(windows)
    if epochs:
        fleet.live(fleet.to_lesson)
    with split() as late_parts:
        late = fleet.catch_up(at_once)
    usual, worst = statistics.mean(ordinary), statistics.mean(lessons)
    extra = 0.0 if epochs else max(0.0, worst - usual) / epoch
    """Of a lesson that the windows of the catch-up have not seen."""
    seconds = {
        "bare": bare,
        "live": ((epoch - 1) * usual + worst) / epoch,
        "ordinary": usual,
        "late": late / at_once + extra,
    }
    live_parts["lessons"] *= windows / (len(lessons) * epoch)
    late_parts["lessons"] += extra * at_once
    per_step = 1e6 / sensors
    return {
        "profile": spec.profile,
        "sensors": sensors,
        "us": {name: value * per_step for name, value in seconds.items()},
        "parts": {
            "live": {part: spent * per_step / windows for part, spent in live_parts.items()},
            "late": {part: spent * per_step / at_once for part, spent in late_parts.items()},
        },
        "ordinary_ms": usual * 1e3,
        "worst_ms": max(lessons) * 1e3,
        "columns": {name: column.bytes_per_sensor for name, column in fleet.task.table.columns.items()},
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def bare_step(spec: SeriesSpec, sensors: int, most: int) -> float:
    """CPU seconds of one step of the network of profile base for all sensors."""
    net = random_network(replace(spec, profile="base")).net
    x = np.random.default_rng(0).normal(0, 1, (sensors, 1, net.input_size)).astype(np.float32)
    mask, state = np.ones((sensors, 1), np.bool_), net.empty_state(sensors)
    seconds = []
    net.unroll(x, mask, state)
    for _ in range(max(3, min(200, most // sensors))):
        started = time.process_time()
        _, _, state = net.unroll(x, mask, state)
        seconds.append(time.process_time() - started)
    return statistics.mean(seconds)


@contextmanager
def split() -> Iterator[dict[str, float]]:
    """CPU seconds by part, while it is open."""
    seconds = dict.fromkeys(PARTS, 0.0)
    inside = False

    def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal inside
            if inside:
                return function(*arguments, **options)
            inside, started = True, time.process_time()
            try:
                return function(*arguments, **options)
            finally:
                seconds[part] += time.process_time() - started
                inside = False

        return call

    before = [(owner, name, getattr(owner, name)) for places in PARTS.values() for owner, name in places]
    for part, places in PARTS.items():
        for owner, name in places:
            setattr(owner, name, timed(part, getattr(owner, name)))
    try:
        yield seconds
    finally:
        for owner, name, function in before:
            setattr(owner, name, function)


# -- tables


def print_tables(rows: Sequence[dict[str, Any]], columns: bool) -> None:
    print(
        "| sensors | profile | bare RNN step, us | live, us | without lessons, us | a window, ms | the worst, ms | catch-up, us "
        "| state, B a sensor | peak MB |"
    )
    print("|---" * 10 + "|")
    for row in rows:
        us = row["us"]
        live, ordinary, late = (
            f"{us[name]:.1f} ({us[name] / us['bare']:.1f})" for name in ("live", "ordinary", "late")
        )
        print(
            f"| {row['sensors']:,} | {row['profile']} | {us['bare']:.1f} | {live} | {ordinary} | {row['ordinary_ms']:.1f} "
            f"| {row['worst_ms']:.1f} | {late} | {sum(row['columns'].values()):,} | {row['peak_mb']:,.0f} |"
        )
    print("\nWhere the time goes, microseconds a sensor-step:\n")
    print(f"| sensors | profile | | {' | '.join(PARTS)} | rest | all |")
    print("|---" * (len(PARTS) + 5) + "|")
    for row in rows:
        for kind, title in (("live", "live"), ("late", "catch-up")):
            parts = [row["parts"][kind][part] for part in PARTS]
            total = row["us"][kind]
            figures = " | ".join(f"{value:.2f}" for value in (*parts, total - sum(parts), total))
            print(f"| {row['sensors']:,} | {row['profile']} | {title} | {figures} |")
    if columns:
        print_columns(rows)


def print_columns(rows: Sequence[dict[str, Any]]) -> None:
    """The larger ones, of any profile."""
    by_profile = {row["profile"]: row["columns"] for row in rows}
    size = {
        name: max(found.get(name, 0) for found in by_profile.values())
        for found in by_profile.values()
        for name in found
    }
    large = sorted(size, key=lambda name: -size[name])[:LARGE_COLUMNS]
    print("\nBytes a sensor:\n")
    print(f"| column | {' | '.join(by_profile)} |")
    print("|---" * (len(by_profile) + 1) + "|")
    for name in large:
        print(f"| `{name}` | {' | '.join(f'{found.get(name, 0):,}' for found in by_profile.values())} |")
    rest = [sum(value for name, value in found.items() if name not in large) for found in by_profile.values()]
    print(f"| the others | {' | '.join(f'{value:,}' for value in rest)} |")


if __name__ == "__main__":
    main()
