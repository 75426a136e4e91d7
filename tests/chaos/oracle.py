"""What should have come of the input log, and whether it did.

One `ForecastTask` a partition reads the whole log once, in this process, undisturbed; where a swap record of the models topic says that
another model took over, there it takes over here as well. Against what it says are held

    every committed forecast     one for each (partition, sensor, issued_at), in order, with the same numbers
    every committed dead letter  one for each (partition, input offset), the record byte for byte
    every committed score        one for each (partition, window), the same sums
    every checkpoint             at the end of the log, the same sensors, the same rows
    every swap record            at no smaller offset than the one before, and of another model
    every forecast of a backtest one for each that was committed, and the same numbers (`tests.chaos.parity`)

Log, swap records and all else are read with kafka-python's own consumer, models from the folders that they were imported from; nothing of
Millrace's adapters stands between the topics and the verdict, but for reading the checkpoints.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import numpy as np
import orjson
from numpy.typing import NDArray

from models.forecaster import Model
from pipeline.service.assembly import task_settings
from pipeline.settings import Settings
from pipeline.stream.columns import STATUSES, Forecasts, RecordColumns
from pipeline.stream.scoring import COVERED, Scores, decode_score
from pipeline.stream.state import SensorTable
from pipeline.stream.task import ForecastTask, TaskOutput
from tests.helpers.broker import RunningBroker, read_all

TOLERANCE: Final = 1e-5
"""Largest difference, relative to max(1, |x|), that batches of different shapes may make."""
PROVISIONAL: Final = "provisional"
"""Forecasts that an idle partition's wall clock caused: no function of the log, so not held against it."""
HIDDEN: Final = "rnn.hidden"
SCORE_TOLERANCE: Final = 1e-4
"""A score is a sum of errors over scales, written with six digits."""
FLIPPED: Final = 1
"""Truths that may lie on the other side of a quantile for the last bits' sake, of one window and lead."""
SWAP_KEY: Final = b"swap/"
EXAMPLES: Final = 5


@dataclass(frozen=True, slots=True)
class Forecast:
    """One forecast, whichever way it came here."""

    partition: int
    sensor: str
    issued_at_ms: int
    numbers: NDArray[np.float64]
    """(K, 1 + Q, H): mean and quantiles; NaN where there is none."""
    status: str
    state_steps: int
    offset: int
    """Of the reading that closed its window."""
    model: str

    @property
    def key(self) -> tuple[int, str, int]:
        return self.partition, self.sensor, self.issued_at_ms

    @property
    def facts(self) -> tuple[str, int, int, str]:
        return self.status, self.state_steps, self.offset, self.model


@dataclass(frozen=True, slots=True)
class Letter:
    """One dead letter."""

    partition: int
    offset: int
    """Of the input record."""
    message_key: bytes | None
    value: bytes | None
    reason: str

    @property
    def key(self) -> tuple[int, int]:
        return self.partition, self.offset


@dataclass(frozen=True, slots=True)
class Score:
    """What one closed window showed, whichever way it came here."""

    partition: int
    window_end_ms: int
    offset: int
    """Of the reading that closed it."""
    steps: int
    model: str
    baseline: str
    leads: tuple[int, ...]
    sums: NDArray[np.float64]
    """(2, 5, L): model and baseline; MEASURES; lead."""

    @property
    def key(self) -> tuple[int, int]:
        return self.partition, self.window_end_ms

    @property
    def facts(self) -> tuple[int, int, str, str, tuple[int, ...]]:
        return self.offset, self.steps, self.model, self.baseline, self.leads


@dataclass(frozen=True, slots=True)
class Takeover:
    """A swap record."""

    partition: int
    offset: int
    """The first one that the model answers."""
    model: str


@dataclass(slots=True)
class Findings:
    """What differs between what was expected and what was seen, of one kind of record."""

    expected: int = 0
    seen: int = 0
    lost: int = 0
    repeated: int = 0
    """Records beyond the first of their key."""
    unexpected: int = 0
    wrong: int = 0
    """Right key, wrong content (numbers aside)."""
    out_of_order: int = 0
    largest_difference: float = 0.0
    tolerance: float = TOLERANCE
    examples: list[str] = field(default_factory=list)

    @property
    def different(self) -> bool:
        return self.largest_difference > self.tolerance

    @property
    def ok(self) -> bool:
        counted = self.lost + self.repeated + self.unexpected + self.wrong + self.out_of_order
        return counted == 0 and not self.different

    def note(self, what: str, keys: Iterable[object]) -> int:
        """How many keys there are; the first of them are kept as examples."""
        listed = list(keys)
        self.examples += [f"{what}: {key}" for key in listed[:EXAMPLES]]
        return len(listed)


@dataclass(slots=True)
class StateFindings:
    """What differs between the checkpoints and the oracle's tables."""

    partitions: int = 0
    sensors: int = 0
    problems: list[str] = field(default_factory=list)
    largest_difference: float = 0.0
    """Over every float column."""
    largest_hidden_difference: float = 0.0

    @property
    def ok(self) -> bool:
        return not self.problems and self.largest_difference <= TOLERANCE


@dataclass(slots=True)
class SwapFindings:
    """What is wrong with the swap records themselves."""

    seen: int = 0
    by_partition: dict[int, int] = field(default_factory=dict)
    again: int = 0
    """A model took over from itself: the states that it had made were not there any more."""
    backwards: int = 0
    examples: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return self.again + self.backwards == 0


class Appended(NamedTuple):
    """When the broker took a record in."""

    partition: int
    time_ms: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether what was committed is what an undisturbed run would have said."""

    readings: int
    """Records in the input log."""
    forecasts: Findings
    letters: Findings
    state: StateFindings
    scores: Findings = field(default_factory=lambda: Findings(tolerance=SCORE_TOLERANCE))
    swaps: SwapFindings = field(default_factory=SwapFindings)
    backtest: Findings = field(default_factory=Findings)
    """expected: what a backtest of the same log says; seen: what was committed."""
    provisional: int = 0
    committed: tuple[Appended, ...] = ()
    """Of the forecasts, by partition, in the order of the topic."""

    @property
    def ok(self) -> bool:
        return self.state.ok and self.swaps.ok and self.backtest.ok and all(found.ok for found in self._records)

    @property
    def lost(self) -> int:
        return sum(found.lost for found in self._records)

    @property
    def repeated(self) -> int:
        return sum(found.repeated for found in self._records)

    @property
    def different(self) -> bool:
        """Something is there once, as it should, and is not what it should be."""
        return self.state.largest_difference > TOLERANCE or any(found.different for found in self._records)

    @property
    def symptoms(self) -> set[str]:
        found = {"lost": self.lost > 0, "repeated": self.repeated > 0, "different": self.different}
        found |= {"taken over twice": self.swaps.again > 0}
        return {name for name, there in found.items() if there}

    @property
    def details(self) -> list[str]:
        kinds = (
            ("", self.forecasts),
            ("", self.letters),
            ("score ", self.scores),
            ("", self.swaps),
            ("backtest: ", self.backtest),
        )
        return [kind + example for kind, found in kinds for example in found.examples] + self.state.problems

    @property
    def _records(self) -> tuple[Findings, Findings, Findings]:
        return self.forecasts, self.letters, self.scores

    def __str__(self) -> str:
        forecasts, letters, scores, state = self.forecasts, self.letters, self.scores, self.state
        wrong = sum(found.wrong + found.out_of_order for found in self._records) + len(state.problems)
        return (
            f"{'as undisturbed' if self.ok else 'NOT as undisturbed'}: {self.readings:,} readings, "
            f"{forecasts.seen:,} of {forecasts.expected:,} forecasts, {letters.seen:,} of {letters.expected:,} dead letters, "
            f"{scores.seen:,} of {scores.expected:,} scores, {self.swaps.seen:,} swap records, "
            f"{self.backtest.expected:,} forecasts of a backtest; "
            f"lost {self.lost}, repeated {self.repeated}, unexpected {sum(found.unexpected for found in self._records)}, "
            f"wrong {wrong}, taken over twice {self.swaps.again}; "
            f"largest difference: forecasts {forecasts.largest_difference:.1e}, scores {scores.largest_difference:.1e}, "
            f"backtest {self.backtest.largest_difference:.1e}, "
            f"hidden state {state.largest_hidden_difference:.1e}, all state {state.largest_difference:.1e}"
        )


def judge(settings: Settings, models: Mapping[str, Model]) -> Verdict:
    """Reads the topics to their ends and compares. Everything must be quiet: workers and producers have stopped. models: by version,
    every one that may have taken over."""
    from tests.chaos.parity import compare_backtest

    topics = settings.topics
    cluster = RunningBroker(settings.kafka.bootstrap_servers, "cluster")

    def committed(topic: str) -> list[Any]:
        return read_all(cluster, topic, "read_committed")

    log: dict[int, list[Any]] = {partition: [] for partition in range(topics.partitions)}
    for record in committed(topics.readings_topic):
        log[record.partition].append(record)
    takeovers = [takeover_of(r) for r in committed(topics.models_topic) if r.key.startswith(SWAP_KEY) and r.value]
    expected = Undisturbed(settings, models, takeovers, log)
    said = committed(topics.forecasts_topic)
    forecasts = [forecast_of(r) for r in said]
    lasting = [forecast for forecast in forecasts if forecast.status != PROVISIONAL]
    return Verdict(
        readings=sum(map(len, log.values())),
        forecasts=compare_forecasts(expected.forecasts, lasting),
        letters=compare_letters(expected.letters, [letter_of(r) for r in committed(topics.dead_letters_topic)]),
        state=_compare_checkpoints(settings, expected.tasks, expected.ends),
        scores=compare_scores(expected.scores, [score_of(r) for r in committed(topics.scores_topic)]),
        swaps=check_takeovers(takeovers),
        backtest=compare_backtest(settings, lasting),
        provisional=len(forecasts) - len(lasting),
        committed=tuple(Appended(r.partition, r.timestamp) for r in said),
    )


def compare_forecasts(expected: Sequence[Forecast], seen: Sequence[Forecast]) -> Findings:
    """seen: by partition, in the order of the topic."""
    findings = compare_keys([f.key for f in expected], [f.key for f in seen])
    first_seen = _first_of_each(seen)
    pairs = [(forecast, first_seen[forecast.key]) for forecast in expected if forecast.key in first_seen]
    findings.wrong = findings.note(
        "wrong",
        (f"{ours.key}: {theirs.facts}, expected {ours.facts}" for ours, theirs in pairs if ours.facts != theirs.facts),
    )
    # A repeated forecast may be right the first time and wrong the second: every one is compared.
    right = {forecast.key: forecast for forecast in expected}
    for forecast in seen:
        if forecast.key in right:
            gap = largest_difference(right[forecast.key].numbers, forecast.numbers)
            if gap > TOLERANCE and findings.largest_difference <= TOLERANCE:
                findings.note(f"differs by {gap:.1e}", [forecast.key])
            findings.largest_difference = max(findings.largest_difference, gap)
    findings.out_of_order = findings.note("out of order", _out_of_order(seen))
    return findings


def compare_letters(expected: Sequence[Letter], seen: Sequence[Letter]) -> Findings:
    """seen: by partition, in the order of the topic."""
    findings = compare_keys([letter.key for letter in expected], [letter.key for letter in seen])
    first_seen = _first_of_each(seen)
    findings.wrong = findings.note(
        "wrong letter", (letter.key for letter in expected if first_seen.get(letter.key, letter) != letter)
    )
    return findings


def compare_scores(expected: Sequence[Score], seen: Sequence[Score]) -> Findings:
    """seen: by partition, in the order of the topic."""
    findings = compare_keys([score.key for score in expected], [score.key for score in seen])
    findings.tolerance = SCORE_TOLERANCE
    right = {score.key: score for score in expected}
    pairs = [(right[score.key], score) for score in seen if score.key in right]
    findings.wrong = findings.note(
        "wrong",
        (f"{ours.key}: {theirs.facts}, expected {ours.facts}" for ours, theirs in pairs if ours.facts != theirs.facts),
    )
    gaps = {theirs.key: _score_difference(ours.sums, theirs.sums) for ours, theirs in pairs}
    findings.note("differs", (key for key, gap in gaps.items() if gap > SCORE_TOLERANCE))
    findings.largest_difference = max(gaps.values(), default=0.0)
    return findings


def check_takeovers(takeovers: Iterable[Takeover]) -> SwapFindings:
    """takeovers: in the order of the topic. A model may come back, but never take over from itself: a swap and the states made by
    it are one transaction, so whoever finds the one finds the other."""
    findings, before = SwapFindings(), dict[int, Takeover]()
    for one in takeovers:
        findings.seen += 1
        findings.by_partition[one.partition] = findings.by_partition.get(one.partition, 0) + 1
        last = before.get(one.partition)
        if last and one.model == last.model:
            findings.again += 1
            findings.examples.append(f"takes over twice: {one}, after offset {last.offset}")
        if last and one.offset < last.offset:
            findings.backwards += 1
            findings.examples.append(f"takes over before the one before: {one}, after {last}")
        before[one.partition] = one
    return findings


def compare_state(expected: SensorTable, sensors: Sequence[bytes], rows: Mapping[str, NDArray[Any]]) -> StateFindings:
    """Every column of every sensor of one partition: whole numbers exactly, others within the tolerance."""
    findings = StateFindings(partitions=1, sensors=len(sensors))
    if list(sensors) != expected.sensors:
        findings.problems.append(
            f"sensors are {len(sensors)}, expected {len(expected.sensors)}, or their order differs"
        )
        return findings
    if set(rows) != set(expected.columns):
        findings.problems.append(f"columns are {sorted(rows)}, expected {sorted(expected.columns)}")
        return findings
    for name, found in rows.items():
        ours = expected[name]
        if not np.issubdtype(ours.dtype, np.floating):
            if not np.array_equal(ours, found):
                findings.problems.append(f"column {name} differs")
            continue
        gap = largest_difference(ours, found)
        if gap > TOLERANCE:
            findings.problems.append(f"column {name} differs by {gap:.1e}")
        findings.largest_difference = max(findings.largest_difference, gap)
        if name == HIDDEN:
            findings.largest_hidden_difference = gap
    return findings


def largest_difference(expected: NDArray[Any], found: NDArray[Any]) -> float:
    """Relative to max(1, |expected|). Infinite where only one of the two is a finite number; NaN equals NaN.

    >>> largest_difference(np.array([100.0, np.nan]), np.array([101.0, np.nan]))
    0.01
    >>> largest_difference(np.array([1.0]), np.array([np.nan]))
    inf
    """
    ours, theirs = np.asarray(expected, np.float64), np.asarray(found, np.float64)
    if ours.shape != theirs.shape:
        return float("inf")
    same = (ours == theirs) | (np.isnan(ours) & np.isnan(theirs))
    with np.errstate(invalid="ignore"):
        gap = np.where(same, 0.0, np.abs(ours - theirs) / np.maximum(1.0, np.abs(ours)))
    return float(np.max(np.where(np.isfinite(gap), gap, np.inf), initial=0.0))


def forecast_of(record: Any) -> Forecast:
    """A record of the forecasts topic."""
    value = orjson.loads(record.value)
    targets = [list(target.values()) for target in value["targets"].values()]
    if value["sensor"].encode() != record.key:
        raise AssertionError(
            f"forecasts-{record.partition}@{record.offset}: key {record.key!r}, sensor {value['sensor']!r}"
        )
    return Forecast(
        partition=record.partition,
        sensor=value["sensor"],
        issued_at_ms=value["issued_at"],
        numbers=np.array(targets, np.float64),
        status=value["status"],
        state_steps=value["state_steps"],
        offset=value["source"]["offset"],
        model=value["model"],
    )


def letter_of(record: Any) -> Letter:
    """A record of the dead-letter topic."""
    headers = dict(record.headers)
    return Letter(
        partition=int(headers["__connect.errors.partition"]),
        offset=int(headers["__connect.errors.offset"]),
        message_key=record.key,
        value=record.value,
        reason=headers["millrace.reason"].decode(),
    )


def score_of(record: Any) -> Score:
    """A record of the scores topic."""
    one = decode_score(record.value)
    if record.key != b"%d" % one.partition or record.partition != one.partition:
        raise AssertionError(
            f"scores-{record.partition}@{record.offset}: key {record.key!r}, partition {one.partition}"
        )
    return Score(
        one.partition, one.window_end, one.offset, one.steps, one.model, one.baseline, one.leads, one.sums
    )  # fmt: skip


def takeover_of(record: Any) -> Takeover:
    """A swap record of the models topic."""
    value = orjson.loads(record.value)
    found = Takeover(value["partition"], value["offset"], value["version"])
    if record.key != b"swap/%05d/%020d" % (found.partition, found.offset):
        raise AssertionError(f"models-{record.partition}@{record.offset}: key {record.key!r}, value {value}")
    return found


class Undisturbed:
    """One task a partition, without a model until the first takes over; between two swaps all of the log at once."""

    def __init__(
        self,
        settings: Settings,
        models: Mapping[str, Model],
        takeovers: Sequence[Takeover],
        log: Mapping[int, Sequence[Any]],
    ) -> None:
        self.forecasts: list[Forecast] = []
        self.letters: list[Letter] = []
        self.scores: list[Score] = []
        self.ends: dict[int, int] = {}
        self.tasks: dict[int, ForecastTask] = {}
        shape = task_settings(settings)
        for partition, records in log.items():
            own = [one for one in takeovers if one.partition == partition]
            self.ends[partition] = records[-1].offset + 1 if records else 0
            columns = RecordColumns.build(
                settings.topics.readings_topic,
                partition,
                ((r.offset, r.timestamp, r.key, r.value, r.headers or ()) for r in records),
            )
            self.tasks[partition] = self._run(ForecastTask(shape), columns, own, models)

    def _run(
        self, task: ForecastTask, records: RecordColumns, takeovers: Sequence[Takeover], models: Mapping[str, Model]
    ) -> ForecastTask:
        cuts = np.searchsorted(records.offsets, [one.offset for one in takeovers]).tolist()
        for one, start, stop in zip((None, *takeovers), (0, *cuts), (*cuts, len(records))):
            if one is not None:
                task.swap(models[one.model] if one.model else None)
            if stop > start:
                self._keep(task.run(records.take(slice(start, stop))))
        return task

    def _keep(self, output: TaskOutput) -> None:
        self.forecasts += _expected(output.forecasts)
        self.scores += _expected_scores(output.scores)
        self.letters += [
            Letter(letter.partition, letter.offset, letter.key, letter.value, letter.reason)
            for letter in output.dead_letters
        ]


def _expected(forecasts: Forecasts) -> list[Forecast]:
    mean = forecasts.mean.transpose(0, 2, 1)[:, :, None]  # (m, K, 1, H)
    quantiles = forecasts.quantiles.transpose(0, 2, 3, 1)  # (m, K, Q, H)
    numbers = np.concatenate([mean, quantiles], axis=2).astype(np.float64)
    found = []
    for row, sensor in enumerate(forecasts.sensors):
        status = STATUSES[forecasts.status[row]]
        found.append(
            Forecast(
                partition=forecasts.partition,
                sensor=sensor,
                issued_at_ms=int(forecasts.issued_at_ms[row]),
                numbers=numbers[row],
                status=status,
                state_steps=int(forecasts.state_steps[row]),
                offset=int(forecasts.offset[row]),
                model=forecasts.baseline if status in ("warming", "baseline") else forecasts.model,
            )
        )
    return found


def _expected_scores(scores: Scores) -> list[Score]:
    rows = zip(scores.end_ms.tolist(), scores.offset.tolist(), scores.steps.tolist(), scores.sums)
    return [
        Score(scores.partition, end_ms, offset, steps, scores.model, scores.baseline, scores.leads, sums)
        for end_ms, offset, steps, sums in rows
    ]


def _score_difference(expected: NDArray[np.float64], found: NDArray[np.float64]) -> float:
    """As `largest_difference`, but for truths that lie on a quantile."""
    if expected.shape != found.shape:
        return float("inf")
    flipped = np.abs(expected[:, COVERED] - found[:, COVERED]) <= FLIPPED
    ours = expected.copy()
    ours[:, COVERED] = np.where(flipped, found[:, COVERED], expected[:, COVERED])
    return largest_difference(ours, found)


def compare_keys(expected: Sequence[Hashable], seen: Sequence[Hashable]) -> Findings:
    findings = Findings(expected=len(expected), seen=len(seen))
    wanted, times = set(expected), Counter(seen)
    findings.lost = findings.note("lost", (key for key in expected if key not in times))
    findings.unexpected = findings.note("unexpected", (key for key in times if key not in wanted))
    findings.note("repeated", (key for key, count in times.items() if count > 1))
    findings.repeated = sum(times.values()) - len(times)
    return findings


def _first_of_each(records: Iterable[Any]) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for record in records:
        found.setdefault(record.key, record)
    return found


def _out_of_order(seen: Iterable[Forecast]) -> list[tuple[int, str, int]]:
    """Forecasts of a sensor that come after a later one; one that is only repeated does not count."""
    newest: defaultdict[tuple[int, str], int] = defaultdict(lambda: -1)
    known: set[tuple[int, str, int]] = set()
    found = []
    for forecast in seen:
        own = forecast.partition, forecast.sensor
        if forecast.issued_at_ms < newest[own] and forecast.key not in known:
            found.append(forecast.key)
        newest[own] = max(newest[own], forecast.issued_at_ms)
        known.add(forecast.key)
    return found


def _compare_checkpoints(
    settings: Settings, tasks: Mapping[int, ForecastTask], ends: Mapping[int, int]
) -> StateFindings:
    from pipeline.kafka.changelog import read_checkpoint

    total = StateFindings()
    for partition, task in tasks.items():
        where = f"checkpoint of partition {partition}"
        checkpoint = read_checkpoint(settings, partition)
        if checkpoint is None:
            if ends[partition]:
                total.problems.append(f"{where}: there is none")
            continue
        if checkpoint.offset != ends[partition]:
            total.problems.append(f"{where} stands at {checkpoint.offset}, the log ends at {ends[partition]}")
            continue
        model = task.forecasting.model
        if checkpoint.model != (model.version if model else ""):
            total.problems.append(f"{where} belongs to model {checkpoint.model!r}")
        _add(total, where, compare_state(task.table, checkpoint.snapshot.sensors, checkpoint.snapshot.rows))
        _compare_partition_columns(total, where, task.table.partition, checkpoint.snapshot.partition)
    return total


def _add(total: StateFindings, where: str, one: StateFindings) -> None:
    total.partitions += one.partitions
    total.sensors += one.sensors
    total.problems += [f"{where}: {problem}" for problem in one.problems]
    total.largest_difference = max(total.largest_difference, one.largest_difference)
    total.largest_hidden_difference = max(total.largest_hidden_difference, one.largest_hidden_difference)


def _compare_partition_columns(
    total: StateFindings, where: str, expected: Mapping[str, NDArray[Any]], found: Mapping[str, NDArray[Any]]
) -> None:
    different = [n for n in sorted(expected.keys() | found.keys()) if not np.array_equal(expected.get(n), found.get(n))]
    total.problems += [f"{where}: {name} differs" for name in different]
