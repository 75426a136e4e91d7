"""One passage through a log or a file: what the service would have said, by the service's own code.

    Input ──readings, up to a boundary──> ForecastTask ──> Matching ──> Keeper (forecasts.parquet, a DataFrame)
                                              │  └─ scores ──> ErrorOverTime
    Timeline <── steps, scores ───────────────┘
        └── who answers from here on ──> ForecastTask.swap

Event time alone drives it: nothing waits, nothing asks a clock for anything but progress bars and checkpoints.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final

import numpy as np
import pandas as pd
import pyarrow as pa

from models.baselines import LastValue, SeasonalNaive
from models.forecaster import Model
from pipeline.service.assembly import task_settings
from pipeline.service.inputs import Input
from pipeline.service.keeping import CODED, Folder, Keeper
from pipeline.service.matching import Matching
from pipeline.service.timeline import Change, Timeline
from pipeline.settings import Settings
from pipeline.stream.columns import Counts, Float64, Int64, Readings
from pipeline.stream.forecasting import Baseline
from pipeline.stream.scoring import ABSOLUTE, LABELS, Scores
from pipeline.stream.state import Snapshot
from pipeline.stream.task import ForecastTask, TaskOutput, TaskSettings

READINGS_AT_ONCE: Final = 20_000
"""Bounds what one call of a task makes: a forecast a reading in the worst case, each a few kilobytes."""
CHECKPOINT_SECONDS: Final = 60.0
BINS: Final = 400
"""Of event time, at most, in which the error over time is gathered."""


@dataclass(slots=True)
class ErrorOverTime:
    """Matured error of model and baseline by event time, as the live service measures it: sums over the scored leads, in running
    standard deviations of each sensor. Bins grow with the time covered, so that there are never more than BINS."""

    bin_ms: int
    sums: dict[int, Float64] = field(default_factory=dict)
    """Number of the bin -> (2, 2): model and baseline; labels and absolute errors."""

    def add(self, scores: Scores) -> None:
        if not len(scores):
            return
        sums = scores.sums[:, :, (LABELS, ABSOLUTE)].sum(axis=-1)
        for end_ms, own in zip(scores.end_ms.tolist(), sums):
            number = (end_ms - 1) // self.bin_ms
            self.sums[number] = self.sums[number] + own if number in self.sums else own
        while len(self.sums) > BINS:
            self.bin_ms *= 2
            halved: dict[int, Float64] = {}
            for number, own in self.sums.items():
                halved[number // 2] = halved[number // 2] + own if number // 2 in halved else own
            self.sums = halved

    def ends_ms(self) -> Int64:
        return (np.array(sorted(self.sums), np.int64) + 1) * self.bin_ms

    def errors(self) -> tuple[Float64, Float64]:
        """(n) of the model and (n) of the baseline; NaN where nothing matured."""
        whole = np.array([self.sums[number] for number in sorted(self.sums)]).reshape(-1, 2, 2)
        with np.errstate(invalid="ignore"):
            errors = whole[:, :, 1] / np.where(whole[:, :, 0] > 0, whole[:, :, 0], np.nan)
        return errors[:, 0], errors[:, 1]


@dataclass(slots=True)
class Progress:
    """How far a passage has come."""

    share_read: float
    event_ms: int | None
    forecasts: int


@dataclass(slots=True)
class Outcome:
    """What a passage found, beside the forecasts themselves."""

    matching: Matching
    over_time: ErrorOverTime
    changes: Sequence[Change]
    counts: Counts
    rejected: Mapping[str, int]
    first_ms: int | None
    """Smallest and greatest event time read."""
    last_ms: int | None
    seconds: float
    """That it took, all sittings together."""


class Passage:
    """One run. keeper: takes the forecasts; where it is a Folder, the run can be stopped and gone on with."""

    def __init__(
        self,
        settings: Settings,
        input: Input,
        timeline: Timeline,
        matching: Matching,
        keeper: Keeper,
        on_progress: Callable[[Progress], None] = lambda at: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.core = task_settings(settings)
        self.input, self.timeline, self.matching = input, timeline, matching
        self._keeper, self._folder = keeper, keeper if isinstance(keeper, Folder) else None
        self._on_progress, self._clock = on_progress, clock
        self._tasks = {p: self._task(self.timeline.first(p)) for p in input.partitions}
        self._positions: dict[int, int] = {}
        self._over_time = ErrorOverTime(int(settings.windows.hop_ms))
        self._counts = Counts()
        self._first_ms: int | None = None
        self._last_ms: int | None = None
        self._seconds_before = 0.0
        self._began = self._saved_at = clock()

    def run(self) -> Outcome:
        """From where it stands to the end of the input."""
        while (next_ms := self.input.next_ms()) is not None:
            boundary_ms = self.timeline.next_ms(next_ms)
            for partition, readings in self.input.until(boundary_ms):
                self._take(partition, readings)
                self._tell()
            if boundary_ms is not None:
                self._arrive(boundary_ms)
        self.timeline.finish()
        if self.input.ends:
            for partition, task in self._tasks.items():
                self._keep(partition, task, task.finish(self.input.topic, partition, self._positions.get(partition, 0)))
        for table in self.matching.settle(final=True):
            self._keeper.write(table)
        return Outcome(
            self.matching, self._over_time, self.timeline.changes, self._counts, self.input.rejected,
            self._first_ms, self._last_ms, self._seconds,
        )  # fmt: skip

    @property
    def _seconds(self) -> float:
        return self._seconds_before + self._clock() - self._began

    def _task(self, model: Model | None) -> ForecastTask:
        return ForecastTask(self.core, model, beside=baselines_of(self.core))

    def _take(self, partition: int, readings: Readings) -> None:
        task = self._tasks[partition]
        for part in self.timeline.parts(partition, readings):
            if part.swaps:
                task.swap(part.model)
            for at in range(0, len(part.readings), READINGS_AT_ONCE):
                piece = part.readings.take(slice(at, at + READINGS_AT_ONCE))
                self._keep(partition, task, task.take(self.input.topic, partition, piece))
                self._positions[partition] = int(piece.offsets[-1]) + 1
                first, last = int(piece.event_time_ms.min()), int(piece.event_time_ms.max())
                self._first_ms = first if self._first_ms is None else min(first, self._first_ms)
                self._last_ms = last if self._last_ms is None else max(last, self._last_ms)

    def _keep(self, partition: int, task: ForecastTask, output: TaskOutput) -> None:
        self._counts.add(output.counts)
        self.timeline.observe(task, output)
        self.matching.add(partition, task, output)
        self._over_time.add(output.scores)
        if self.matching.is_full:
            for table in self.matching.settle():
                self._keeper.write(table)

    def _arrive(self, boundary_ms: int) -> None:
        changes, more = len(self.timeline.changes), self.input.next_ms() is not None
        model = self.timeline.arrive(boundary_ms, more)
        if model is not None:
            for task in self._tasks.values():
                task.swap(model)
        # A training is dear. At the end there is nothing to go on with: what was refused behind the last reading has been counted.
        if more and len(self.timeline.changes) > changes:
            self._save()

    def _tell(self) -> None:
        self._on_progress(Progress(self.input.share_read, self._last_ms, self.matching.forecasts))
        if self._clock() - self._saved_at > CHECKPOINT_SECONDS:
            self._save()

    # -- stopping and going on

    def _save(self) -> None:
        self._saved_at = self._clock()
        if self._folder is None:
            return
        matching, facts = self.matching.state()
        arrays = {f"matching.{name}": column for name, column in matching.items()}
        sensors, versions = {}, {}
        for partition, task in self._tasks.items():
            snapshot = task.table.snapshot()
            sensors[partition], versions[partition] = [name.decode() for name in snapshot.sensors], task.version
            arrays |= {f"rows{partition}.{name}": column for name, column in snapshot.rows.items()}
            arrays |= {f"partition{partition}.{name}": column for name, column in snapshot.partition.items()}
        history = self.timeline.history
        of_history, history_facts = history.state() if history else ({}, None)
        arrays |= {f"history.{name}": column for name, column in of_history.items()}
        bins = self._over_time
        if bins.sums:
            arrays["bins"], arrays["bin_sums"] = np.array(list(bins.sums)), np.array(list(bins.sums.values()))
        self._folder.save(
            arrays,
            {
                "matching": facts,
                "sensors": sensors,
                "versions": versions,
                "history": history_facts,
                "bin_ms": bins.bin_ms,
                "positions": self._positions,
                "changes": [asdict(change) for change in self.timeline.changes],
                "counts": {**asdict(self._counts)},
                "rejected": dict(self.input.rejected),
                "range": [self._first_ms, self._last_ms],
                "seconds": self._seconds,
            },
            self.timeline.journal,
        )
        self.timeline.journal.clear()

    def resume(self) -> None:
        """As `_save` left it, if it was ever called. The input must stand at the positions that were saved."""
        folder = self._folder
        if folder is None or folder.saved is None:
            return
        arrays, facts = folder.saved.arrays, folder.saved.facts

        def of(prefix: str) -> dict[str, Any]:
            return {name.removeprefix(prefix): column for name, column in arrays.items() if name.startswith(prefix)}

        self.matching.restore(of("matching."), facts["matching"])
        self._positions = {int(partition): offset for partition, offset in facts["positions"].items()}
        self.timeline.resume([Change(**change) for change in facts["changes"]], folder.journal(), self._positions)
        if self.timeline.history is not None and facts["history"] is not None:
            self.timeline.history.restore(of("history."), facts["history"])
        for partition in self._tasks:
            task = self._task(self.timeline.shelf.get(facts["versions"][str(partition)]))
            names = tuple(name.encode() for name in facts["sensors"][str(partition)])
            task.table.restore(Snapshot(names, of(f"rows{partition}."), of(f"partition{partition}.")))
            self._tasks[partition] = task
        self._over_time = ErrorOverTime(facts["bin_ms"], dict(zip(of("bins").get("", ()), of("bin_sums").get("", ()))))
        self._counts = Counts(**facts["counts"])
        self.input.rejected.update(facts["rejected"])
        self._first_ms, self._last_ms = facts["range"]
        self._seconds_before = facts["seconds"]


def baselines_of(core: TaskSettings) -> tuple[Baseline, ...]:
    """Those that stand beside; the last is what MASE divides by."""
    return (LastValue, SeasonalNaive) if core.spec.seasons else (LastValue,)


def frame_of(tables: Sequence[pa.Table], schema: pa.Schema) -> pd.DataFrame:
    """The long frame; texts are texts."""
    whole = pa.concat_tables(tables) if tables else schema.empty_table()
    for name in CODED:
        at = whole.schema.get_field_index(name)
        whole = whole.set_column(at, name, whole.column(name).cast(pa.string()))
    frame: pd.DataFrame = whole.to_pandas()
    return frame
