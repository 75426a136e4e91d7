"""Forecasts side by side with what came of them: the long frame, row by row as truth matures.

    unique_id   the sensor; `sensor/target` where there are several targets
    ds          start of the window spoken of, UTC without a zone
    cutoff      start of the window consumed last: ds = cutoff + lead steps
    lead        1 ... horizon
    y           what the window brought; null where it held no value, or has not closed
    status      ok, warming, baseline or stale
    model_version   who answered
    Millrace, Millrace-q0.1, ...   the answer: point forecast and quantiles
    LastValue, SeasonalNaive, ...  point forecasts of the baselines

(The column names of Nixtla's libraries, so that utilsforecast takes the frame as it is.)

A forecast waits here until its last window has closed; what waits is bounded by sensors and horizon, not by time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from models.measures import ErrorSums, InSample, Said
from pipeline.errors import SettingsError
from pipeline.service.statistical import Statistical
from pipeline.stream.columns import OK, STALE, STATUSES, Bool, Float64, Int64, Steps
from pipeline.stream.task import ForecastTask, TaskOutput
from pipeline.stream.windows import NEVER, WindowRule

SERVICE: Final = "Millrace"
WINDOW_BITS: Final = 42
"""Of a key: windows of a millisecond from 1900 to 2039. The rest is left for two million sensors."""
WINDOW_ORIGIN: Final = 1 << (WINDOW_BITS - 1)
SETTLE_ROWS: Final = 16_384
"""Forecasts that wait at least before the ripe ones among them are looked for."""
STEPS_A_ROW: Final = 16
"""So many times as many steps may be heard of in between: while nobody forecasts, truth must not pile up."""

Rows = dict[str, NDArray[Any]]
_LINE_COLUMNS: Final = ("lines", "newest", "naive_window", "naive_said")


@dataclass(frozen=True, slots=True)
class Kept:
    """Which forecasts are of interest."""

    from_ms: int | None = None
    """Issued at or after this time."""
    stride: int = 1
    """Every n-th window of the grid."""

    def of(self, steps: Steps) -> Bool:
        """(m)"""
        chosen: Bool = steps.window % self.stride == 0
        return chosen if self.from_ms is None else chosen & (steps.end_ms >= self.from_ms)


@dataclass(frozen=True, slots=True)
class FrameShape:
    """What the frame has room for."""

    targets: tuple[str, ...]
    horizon: int
    """The longest of any model."""
    levels: tuple[float, ...]
    """Those of all models, ascending."""
    beside: tuple[str, ...]
    """Baselines, in the order of `ForecastTask.beside`; the last one is what MASE divides by."""
    season: int = 1
    """Steps that this last one goes back."""
    outside: tuple[str, ...] = ()
    """Forecasters that are asked when truth is matched (`Matching.outside`)."""

    def __post_init__(self) -> None:
        for name in self.outside:
            if self.forecasters.count(name) > 1:
                raise SettingsError(f"--beside {name}: a column has that name already; expected each name once")

    @property
    def forecasters(self) -> tuple[str, ...]:
        return SERVICE, *self.beside, *self.outside

    @property
    def schema(self) -> pa.Schema:
        names = [SERVICE, *(level_column(level) for level in self.levels), *self.forecasters[1:]]
        coded = pa.dictionary(pa.int32(), pa.string())
        return pa.schema(
            [
                ("unique_id", coded),
                ("ds", pa.timestamp("ms")),
                ("cutoff", pa.timestamp("ms")),
                ("lead", pa.int32()),
                ("y", pa.float64()),
                ("status", coded),
                ("model_version", coded),
                *((name, pa.float32()) for name in names),
            ]
        )


def level_column(level: float) -> str:
    """
    >>> level_column(0.1)
    'Millrace-q0.1'
    """
    return f"{SERVICE}-q{level:g}"


@dataclass(slots=True)
class Matching:
    """Takes in the outputs of all partitions' tasks, and gives rows of the long frame. What it counts is of the rows that it gave."""

    rule: WindowRule
    shape: FrameShape
    kept: Kept
    outside: Statistical | None = None
    errors: ErrorSums = field(init=False)
    in_sample: InSample = field(default_factory=InSample)
    series: list[str] = field(default_factory=list)
    """Sensors in order of appearance; target k of sensor s is series s * K + k of `errors`."""
    forecasts: int = 0
    """Given so far."""
    _series_of: dict[str, int] = field(default_factory=dict)
    _lines: Int64 = field(default_factory=lambda: np.empty(0, np.int64))
    """A line is a sensor in a partition -> its place in `series`."""
    _line_of_slot: dict[int, Int64] = field(default_factory=dict)
    _newest: Int64 = field(default_factory=lambda: np.zeros(0, np.int64))
    """(lines) newest closed window."""
    _naive_window: Int64 = field(default_factory=lambda: np.zeros(0, np.int64))
    """(lines) window after which was said naively ..."""
    _naive_said: Float64 = field(init=False)
    """(lines, K) ... this of the next one."""
    _truth: list[Rows] = field(default_factory=list)
    _waiting: dict[tuple[int, tuple[float, ...]], list[Rows]] = field(default_factory=dict)
    """By horizon and levels: both come with the model."""
    _who: list[str] = field(default_factory=list)
    _count: int = 0
    """Forecasts taken in since the last look for ripe ones ..."""
    _heard: int = 0
    """... and steps ..."""
    _remembered: int = 0
    """... beside those that were still needed then."""

    def __post_init__(self) -> None:
        self.errors = ErrorSums(self.shape.forecasters, self.shape.horizon, self.shape.levels)
        self._naive_said = np.zeros((0, len(self.shape.targets)))

    @property
    def series_names(self) -> list[str]:
        """unique_id of each series of `errors`."""
        if len(self.shape.targets) == 1:
            return list(self.series)
        return [f"{sensor}/{target}" for sensor in self.series for target in self.shape.targets]

    @property
    def is_full(self) -> bool:
        """It is time to `settle`."""
        forecasts, steps = max(SETTLE_ROWS, 2 * len(self._lines)), max(STEPS_A_ROW * SETTLE_ROWS, self._remembered)
        return self._count >= forecasts or self._heard >= steps

    def add(self, partition: int, task: ForecastTask, output: TaskOutput) -> None:
        """Take over what one call of a task made."""
        steps, answers, spec = output.steps, output.answers, task.spec
        if not len(steps):
            return
        line = self._line(partition, task.table.sensors)[steps.slot]
        truth = steps.values[:, list(spec.targets)]
        self._truth.append({"line": line, "window": steps.window, "values": truth})
        self._heard += len(steps)
        np.maximum.at(self._newest, line, steps.window)
        self._note_naive(line, steps, output, truth)
        rows = np.flatnonzero(answers.known & self.kept.of(steps))
        if not len(rows):
            return
        waiting: Rows = {
            "line": line[rows],
            "window": steps.window[rows],
            "issued": steps.end_ms[rows],
            "status": answers.status[rows],
            "who": self._answerers(task)[answers.status[rows]],
            "mean": answers.mean[rows],
            "quantiles": answers.quantiles[rows],
        }
        for number, said in enumerate(answers.beside):
            waiting[f"mean{number}"], waiting[f"quantiles{number}"] = said.mean[rows], said.quantiles[rows]
        self._waiting.setdefault((spec.horizon, spec.quantiles), []).append(waiting)
        self._count += len(rows)

    def settle(self, final: bool = False) -> list[pa.Table]:
        """The rows whose truth is known by now, ordered by cutoff; final: all that wait, with what is known."""
        self._count = self._heard = 0
        if not self._truth:
            return []
        truth = _joined(self._truth)
        truth = _take(truth, np.argsort(_key(truth["line"], truth["window"]), kind="stable"))
        tables = []
        for (horizon, levels), parts in self._waiting.items():
            rows = _joined(parts)
            ripe = final | (rows["window"] + horizon <= self._newest[rows["line"]])
            parts[:] = [_take(rows, ~ripe)]
            if ripe.any():
                tables.append(self._given(_take(rows, ripe), truth, horizon, levels))
        self._waiting = {shape: parts for shape, parts in self._waiting.items() if len(parts[0]["line"])}
        back = self.shape.horizon + (self.outside.history_steps if self.outside else 0)
        needed = truth["window"] > self._newest[truth["line"]] - back
        self._truth = [_take(truth, needed)]
        self._remembered = int(needed.sum())
        return tables

    def state(self) -> tuple[Rows, dict[str, Any]]:
        """All that is known, as arrays and as what JSON can hold; `restore` takes it back."""
        errors, shapes = self.errors, list(self._waiting)
        arrays: Rows = {"sums": errors.sums, "below": errors.below, "of_level": errors.of_level}
        arrays |= {f"in_sample.{name}": column for name, column in self.in_sample.state().items()}
        arrays |= {f"_{name}": getattr(self, f"_{name}") for name in _LINE_COLUMNS}
        arrays |= {f"line_of_slot.{partition}": lines for partition, lines in self._line_of_slot.items()}
        if self._truth:
            arrays |= {f"truth.{name}": column for name, column in _joined(self._truth).items()}
        for number, parts in enumerate(self._waiting.values()):
            arrays |= {f"waiting{number}.{name}": column for name, column in _joined(parts).items()}
        facts = {"series": self.series, "forecasts": self.forecasts, "who": self._who, "shapes": shapes}
        return arrays, facts

    def restore(self, arrays: Mapping[str, NDArray[Any]], facts: Mapping[str, Any]) -> None:
        def of(prefix: str) -> Rows:
            return {name.removeprefix(prefix): column for name, column in arrays.items() if name.startswith(prefix)}

        self.errors.sums, self.errors.below, self.errors.of_level = (arrays[n] for n in ("sums", "below", "of_level"))
        self.in_sample.restore(of("in_sample."))
        for name in _LINE_COLUMNS:
            setattr(self, f"_{name}", arrays[f"_{name}"])
        self._line_of_slot = {int(partition): lines for partition, lines in of("line_of_slot.").items()}
        self._truth = [truth] if (truth := of("truth.")) else []
        self._remembered = len(truth.get("line", ()))
        shapes = [(horizon, tuple(levels)) for horizon, levels in facts["shapes"]]
        self._waiting = {shape: [of(f"waiting{number}.")] for number, shape in enumerate(shapes)}
        self.series, self.forecasts, self._who = list(facts["series"]), facts["forecasts"], list(facts["who"])
        self._series_of = {name: number for number, name in enumerate(self.series)}

    # -- taking in

    def _line(self, partition: int, sensors: Sequence[bytes]) -> Int64:
        """(slots) the line of each."""
        known = self._line_of_slot.get(partition, self._lines[:0])
        if len(known) == len(sensors):
            return known
        new = [sensor.decode() for sensor in sensors[len(known) :]]
        for name in new:
            if name not in self._series_of:
                self._series_of[name] = len(self.series)
                self.series.append(name)
        self.in_sample.grow(len(self.series) * len(self.shape.targets))
        first = len(self._lines)
        self._lines = np.append(self._lines, [self._series_of[name] for name in new])
        self._line_of_slot[partition] = known = np.append(known, np.arange(first, len(self._lines)))
        self._newest = _grown(self._newest, len(self._lines), NEVER)
        self._naive_window = _grown(self._naive_window, len(self._lines), NEVER)
        self._naive_said = _grown(self._naive_said, len(self._lines), np.nan)
        return known

    def _answerers(self, task: ForecastTask) -> NDArray[np.int32]:
        """(statuses) who answered, as a place in `_who`."""
        baseline = task.forecasting.baseline.version
        names = [task.version if status in (OK, STALE) else baseline for status in range(len(STATUSES))]
        for name in names:
            if name not in self._who:
                self._who.append(name)
        return np.array([self._who.index(name) for name in names], np.int32)

    def _note_naive(self, line: Int64, steps: Steps, output: TaskOutput, truth: Float64) -> None:
        """The error of repeating one season ago, one step ahead: what the last of the forecasters beside had said of this window."""
        naive = output.answers.beside[-1].mean[:, 0].astype(np.float64)
        order = np.lexsort((steps.window, line))
        line, window = line[order], steps.window[order]
        first = np.flatnonzero(np.diff(line, prepend=-1))
        last = np.append(first[1:], len(line)) - 1
        before_window, before = np.roll(window, 1), np.roll(naive[order], 1, axis=0)
        before_window[first], before[first] = self._naive_window[line[first]], self._naive_said[line[first]]
        follows = (before_window == window - 1) & (output.answers.state_steps[order] > self.shape.season)
        said = np.where(follows[:, None], before, np.nan)
        self._naive_window[line[last]], self._naive_said[line[last]] = window[last], naive[order][last]
        past = np.zeros(len(line), np.bool_) if self.kept.from_ms is None else steps.end_ms[order] <= self.kept.from_ms
        targets = truth.shape[1]
        for k in range(targets):
            self.in_sample.add(self._lines[line] * targets + k, truth[order, k], said[:, k], past)

    # -- giving

    def _given(self, rows: Rows, truth: Rows, horizon: int, levels: tuple[float, ...]) -> pa.Table:
        order = np.lexsort((rows["line"], rows["window"]))
        rows = _take(rows, order)
        sensor = self._lines[rows["line"]]
        came = _came(rows, truth, horizon)
        targets = came.shape[2]
        strangers = [self._ask_outside(rows, truth, k, levels) for k in range(targets)]
        for k in range(targets):
            own = [
                Said(rows[f"mean{n}"][:, :, k], rows[f"quantiles{n}"][:, :, k])
                for n in ("", *range(len(self.shape.beside)))
            ]
            self.errors.add(sensor * targets + k, came[:, :, k], [*own, *strangers[k]], levels)
        self.forecasts += len(sensor)
        return self._table(rows, sensor, came, levels, strangers)

    def _ask_outside(self, rows: Rows, truth: Rows, target: int, levels: Sequence[float]) -> list[Said]:
        """One a forecaster, each (n, H), with the quantiles that the model has."""
        if self.outside is None:
            return []
        horizon, chosen = rows["mean"].shape[1], [self.shape.levels.index(level) for level in levels]
        return [
            Said(said.mean[:, :horizon], None if said.quantiles is None else said.quantiles[:, :horizon, chosen])
            for said in self.outside.forecast(_histories(rows, truth, target, self.outside.history_steps))
        ]

    def _table(
        self, rows: Rows, sensor: Int64, came: Float64, levels: tuple[float, ...], strangers: list[list[Said]]
    ) -> pa.Table:
        """n forecasts -> n * K * H rows."""
        n, horizon, targets = came.shape

        def of_forecast(column: NDArray[Any]) -> NDArray[Any]:
            return np.repeat(column, targets * horizon)

        def of_lead(column: NDArray[Any]) -> NDArray[Any]:
            return np.ascontiguousarray(column.transpose(0, 2, 1)).reshape(-1)

        lead = np.tile(np.arange(1, horizon + 1, dtype=np.int32), n * targets)
        cutoff = of_forecast(rows["issued"] - self.rule.size_ms)
        series = np.repeat((sensor[:, None] * targets + np.arange(targets)).reshape(-1), horizon).astype(np.int32)
        columns = [
            pa.DictionaryArray.from_arrays(series, pa.array(self.series_names, pa.string())),
            pa.array(cutoff + lead.astype(np.int64) * self.rule.hop_ms, pa.timestamp("ms")),
            pa.array(cutoff, pa.timestamp("ms")),
            pa.array(lead),
            pa.array(of_lead(came), from_pandas=True),
            pa.DictionaryArray.from_arrays(of_forecast(rows["status"]).astype(np.int32), pa.array(STATUSES)),
            pa.DictionaryArray.from_arrays(of_forecast(rows["who"]), pa.array(self._who, pa.string())),
            pa.array(of_lead(rows["mean"]), from_pandas=True),
        ]
        for level in self.shape.levels:
            if level in levels:
                quantile = rows["quantiles"][..., levels.index(level)]
                columns.append(pa.array(of_lead(quantile), from_pandas=True))
            else:
                columns.append(pa.nulls(len(lead), pa.float32()))
        columns += [pa.array(of_lead(rows[f"mean{k}"]), from_pandas=True) for k in range(len(self.shape.beside))]
        for number in range(len(self.shape.outside)):
            mean = np.stack([said[number].mean for said in strangers], axis=2).astype(np.float32)
            columns.append(pa.array(of_lead(mean), from_pandas=True))
        return pa.table(columns, self.shape.schema.names)


def _came(rows: Rows, truth: Rows, horizon: int) -> Float64:
    """(n, H, K) what the windows spoken of brought; NaN where that is not known.

    truth: by line and window, ascending. The windows of a line mostly follow one another, so that lead h is found h places further on."""
    keys = _key(truth["line"], truth["window"])
    wanted = _key(rows["line"], rows["window"])[:, None] + np.arange(1, horizon + 1)
    place = np.searchsorted(keys, wanted[:, 0] - 1)[:, None] + np.arange(1, horizon + 1)
    place = np.minimum(place, len(keys) - 1)
    missed = keys[place] != wanted
    place[missed] = np.minimum(np.searchsorted(keys, wanted[missed]), len(keys) - 1)
    return np.where((keys[place] == wanted)[..., None], truth["values"][place], np.nan)


def _histories(rows: Rows, truth: Rows, target: int, steps: int) -> list[Float64]:
    """What each forecast could have known of its target: the newest windows up to its cutoff, at most `steps`; NaN = no value.
    Begins with the first window that there is."""
    keys, windows, values = _key(truth["line"], truth["window"]), truth["window"], truth["values"][:, target]
    first = np.searchsorted(keys, _key(rows["line"], rows["window"] - steps + 1))
    end = np.searchsorted(keys, _key(rows["line"], rows["window"]), side="right")
    found = []
    for start, stop in zip(first.tolist(), end.tolist()):
        place = windows[start:stop] - windows[start]
        history = np.full(int(place[-1]) + 1, np.nan)
        history[place] = values[start:stop]
        found.append(history)
    return found


def _key(line: Int64, window: Int64) -> Int64:
    return (line << WINDOW_BITS) + window + WINDOW_ORIGIN


def _joined(parts: Sequence[Rows]) -> Rows:
    if len(parts) == 1:
        return parts[0]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _take(rows: Rows, chosen: NDArray[Any]) -> Rows:
    return {name: column[chosen] for name, column in rows.items()}


def _grown(column: NDArray[Any], size: int, fill: float) -> NDArray[Any]:
    """With room for `size` rows and some more."""
    if size <= len(column):
        return column
    grown = np.full((max(size, len(column) + len(column) // 2), *column.shape[1:]), fill, column.dtype)
    grown[: len(column)] = column
    return grown
