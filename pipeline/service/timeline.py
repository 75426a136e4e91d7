"""Which model answers when, in a backtest.

    Given       one model, from the beginning to the end
    Fresh       none before a moment; there one is trained on what came before, and answers from there on
    Scheduled   the live rule in event time: `Learner`, training, gate, rollback. Training takes no event time
    Recorded    what the workers wrote down: in each partition, from which offset on which version answered

A backtest goes from boundary to boundary: all readings before `next_ms`, then `arrive`, which knows of nothing later.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from models.artifact import MANIFEST_FILE, MODEL_FILE, load
from models.forecaster import Model, SeriesSpec
from models.training import TrainingProgress
from pipeline.errors import DeploymentError
from pipeline.kafka.lineage import Swap
from pipeline.service.fitting import challenge, fit
from pipeline.service.history import History
from pipeline.service.learning import Disappointment, Due, Learner, LearningRule
from pipeline.service.words import moment
from pipeline.settings import Settings
from pipeline.stream.columns import Readings
from pipeline.stream.scoring import decode_score, encode_scores
from pipeline.stream.task import ForecastTask, TaskOutput, TaskSettings

log = logging.getLogger(__name__)

LOOKS_A_PERIOD: Final = 8
"""How often in a retraining period it is asked whether something is due, at most once a step."""
NO_BETTER: Final = (
    "the model did not beat the baselines on the newest part of what it was trained on, which was held back"
)
_CHANGE: Final = "change"
Tell = Callable[[TrainingProgress], None]


@dataclass(frozen=True, slots=True)
class Change:
    """What happened to the model that answers, or might have."""

    time_ms: int
    """Event time."""
    kind: str
    """promoted, refused, failed, rolled-back, trained, swap"""
    version: str
    reason: str
    """One sentence."""
    trigger: str = ""
    note: str = ""
    """What whoever reads the figures should know of it."""


@dataclass(frozen=True, slots=True)
class Part:
    """Readings of one partition, and who takes over before them."""

    readings: Readings
    swaps: bool = False
    model: Model | None = None


class Shelf:
    """Models in folders by their version, loaded once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._loaded: dict[str, Model] = {}

    def put(self, model: Model) -> Model:
        """It is at hand from now on."""
        self._loaded[model.version] = model
        return model

    def store(self, model: Model, manifest: Mapping[str, Any], body: bytes) -> Model:
        """The same, and it is there after a restart."""
        own = self.folder / model.version
        own.mkdir(parents=True, exist_ok=True)
        (own / MODEL_FILE).write_bytes(body)
        (own / MANIFEST_FILE).write_text(json.dumps(manifest), encoding="utf-8")
        return self.put(model)

    def get(self, version: str) -> Model | None:
        """None for the empty version. Raises ArtifactError where it is not there."""
        if not version:
            return None
        if version not in self._loaded:
            self._loaded[version] = load(self.folder / version)
        return self._loaded[version]


class Timeline:
    """Nobody answers but the baseline; what the others begin with."""

    def __init__(self, shelf: Shelf) -> None:
        self.shelf = shelf
        self.changes: list[Change] = []
        self.journal: list[bytes] = []
        """What `resume` is told, line by line; whoever keeps it takes the lines away."""
        self.learned_to_ms: int | None = None
        """Event time up to which a model that was given has seen the data; None: not known."""

    @property
    def identity(self) -> str:
        """Of a model that was given: another one makes another backtest."""
        return ""

    @property
    def specs(self) -> Sequence[SeriesSpec]:
        """Of the models that may answer, beside the settings' own."""
        return ()

    @property
    def history(self) -> History | None:
        """What is learned from, while anything is."""
        return None

    def first(self, partition: int) -> Model | None:
        """Who answers from the beginning."""
        return None

    def next_ms(self, next_reading_ms: int) -> int | None:
        """The boundary after this event time, and before any reading of it or later; None: there is none any more."""
        return None

    def parts(self, partition: int, readings: Readings) -> Iterator[Part]:
        """The readings, cut where another model takes over."""
        yield Part(readings)

    def observe(self, task: ForecastTask, output: TaskOutput) -> None:
        """What a call of a task made."""

    def arrive(self, boundary_ms: int, more: bool) -> Model | None:
        """All readings before the boundary have been taken in; more: there are others. Who answers from here on, None: nobody new."""
        return None

    def finish(self) -> None:
        """There are no more readings. Raises DeploymentError where something was to happen that never came."""

    def resume(self, changes: Sequence[Change], journal: Iterable[bytes], positions: Mapping[int, int]) -> None:
        """Go on where another left off. `history` is restored by itself. positions: next offset of each partition."""
        self.changes = list(changes)


class Given(Timeline):
    """The same model all the time; None: the baseline."""

    def __init__(self, shelf: Shelf, model: Model | None, learned_to_ms: int | None = None) -> None:
        super().__init__(shelf)
        self._model = shelf.put(model) if model else None
        self.learned_to_ms = learned_to_ms

    @property
    def identity(self) -> str:
        return self._model.version if self._model else ""

    @property
    def specs(self) -> Sequence[SeriesSpec]:
        return [self._model.spec] if self._model else []

    def first(self, partition: int) -> Model | None:
        return self._model


class Fresh(Timeline):
    """Trained once, on what came before `until_ms`. at_end: there need be nothing after it but the windows that the end closes."""

    def __init__(
        self,
        shelf: Shelf,
        settings: Settings,
        core: TaskSettings,
        until_ms: int,
        tell: Tell | None,
        at_end: bool = False,
    ) -> None:
        super().__init__(shelf)
        self._at_end = at_end
        self._settings, self._core, self._until_ms, self._tell = settings, core, until_ms, tell
        self._history: History | None = History(core, settings.retraining.max_steps)

    @property
    def history(self) -> History | None:
        return self._history

    def next_ms(self, next_reading_ms: int) -> int | None:
        return self._until_ms if self._history is not None else None

    def observe(self, task: ForecastTask, output: TaskOutput) -> None:
        if self._history is not None:
            _remember(self._history, task, output)

    def arrive(self, boundary_ms: int, more: bool) -> Model | None:
        if not (more or self._at_end):
            return None
        history, self._history = self._history, None
        if history is None:
            return None
        try:
            sequences = history.sequences(newest_ms=self._settings.training.history_ms)
        except DeploymentError:
            raise DeploymentError(
                f"no window had closed before {moment(boundary_ms)} UTC, so there is nothing to train on; name a later time "
                "(--train-until), or an earlier beginning (--from)"
            ) from None
        folder = self.shelf.folder / "trained"
        trained = fit(self._settings, self._core.spec, sequences, folder, self._tell)
        model = self.shelf.put(trained.model.in_service)
        shutil.rmtree(self.shelf.folder / model.version, ignore_errors=True)
        folder.rename(self.shelf.folder / model.version)
        reason = f"trained on {len(sequences):,} steps of {len(history.sensors):,} sensors"
        note = "" if trained.beats_baselines else NO_BETTER
        self.changes.append(Change(boundary_ms, "trained", model.version, reason, note=note))
        return model

    def finish(self) -> None:
        if self._history is not None:
            raise DeploymentError(
                f"the data ends before {moment(self._until_ms)} UTC, so nothing was left to forecast; name an earlier time (--train-until)"
            )

    def resume(self, changes: Sequence[Change], journal: Iterable[bytes], positions: Mapping[int, int]) -> None:
        super().resume(changes, journal, positions)
        if self.changes:
            self._history = None


class Scheduled(Timeline):
    """Learns again as the live trainer would have."""

    def __init__(self, shelf: Shelf, settings: Settings, core: TaskSettings, tell: Tell | None) -> None:
        super().__init__(shelf)
        self._settings, self._core, self._tell = settings, core, tell
        self._learner = Learner(LearningRule.of(settings))
        self._history = History(core, settings.retraining.max_steps)
        step_ms = int(settings.windows.hop_ms)
        every_ms = settings.retraining.every_ms or LOOKS_A_PERIOD * step_ms
        self._look_ms = max(int(every_ms) // LOOKS_A_PERIOD // step_ms, 1) * step_ms
        self._serving = ""

    @property
    def history(self) -> History | None:
        return self._history

    def next_ms(self, next_reading_ms: int) -> int | None:
        return (next_reading_ms // self._look_ms + 1) * self._look_ms

    def observe(self, task: ForecastTask, output: TaskOutput) -> None:
        _remember(self._history, task, output)
        for value in encode_scores(output.scores, "scores").values:
            self.journal.append(value or b"")
            self._learner.observe(decode_score(value or b""))

    def arrive(self, boundary_ms: int, more: bool) -> Model | None:
        found = self._learner.disappointment()
        if found is not None:
            return self._roll_back(found)
        due = self._learner.due()
        return None if due is None else self._learn(due)

    def _learn(self, due: Due) -> Model | None:
        newest_ms = self._settings.training.history_ms
        champion: Any = self.shelf.get(self._serving)
        try:
            if newest_ms is not None:
                self._history.forget_before(due.until_ms - newest_ms)
            sequences = self._history.sequences(to_ms=due.until_ms)
            outcome = challenge(self._settings, self._core.spec, sequences, champion, self._tell, due.changed_ms)
        except DeploymentError as error:
            self._note(Change(due.until_ms, "failed", "", f"{due.reason}; {error}", due.trigger))
            return None
        model = None
        if outcome.verdict.promoted:
            model = self.shelf.store(outcome.model.in_service, outcome.manifest, outcome.body)
        kind, reason = "promoted" if model else "refused", f"{due.reason}; {outcome.verdict.reason}"
        self._note(Change(due.until_ms, kind, outcome.version, reason, due.trigger))
        return model

    def _roll_back(self, found: Disappointment) -> Model | None:
        now_ms = self._learner.now_ms or 0
        self._note(Change(now_ms, "rolled-back", found.previous, found.reason, "disappointed"))
        return self.shelf.get(found.previous)

    def _note(self, change: Change) -> None:
        """The learner hears of it as the live one does."""
        self.changes.append(change)
        self.journal.append(json.dumps({_CHANGE: asdict(change)}).encode())
        log.info("%s UTC %s after %s: %s", moment(change.time_ms), change.kind, change.trigger, change.reason)
        self._hear(change)

    def _hear(self, change: Change) -> None:
        if change.kind == "promoted":
            self._learner.champion(change.version, self._serving, change.time_ms)
            self._serving = change.version
        elif change.kind == "rolled-back":
            self._learner.champion(change.version, "", change.time_ms)
            self._serving = change.version
        self._learner.decided(change.time_ms, trained=change.kind != "rolled-back")

    def resume(self, changes: Sequence[Change], journal: Iterable[bytes], positions: Mapping[int, int]) -> None:
        super().resume(changes, journal, positions)
        for line in journal:
            entry = json.loads(line)
            if _CHANGE in entry:
                self._hear(Change(**entry[_CHANGE]))
            else:
                self._learner.observe(decode_score(line))


class Recorded(Timeline):
    """What the workers wrote down. swaps: by partition, each list by offset; fetch: a version's model; starts: first offset read."""

    def __init__(
        self,
        shelf: Shelf,
        swaps: Mapping[int, Sequence[Swap]],
        starts: Mapping[int, int],
        fetch: Callable[[str], Model],
    ) -> None:
        super().__init__(shelf)
        self._first = {p: _serving_at(swaps.get(p, ()), start) for p, start in starts.items()}
        self._ahead = {p: [swap for swap in swaps.get(p, ()) if swap.offset > start] for p, start in starts.items()}
        named = {*self._first.values(), *(swap.version for ahead in self._ahead.values() for swap in ahead)} - {""}
        self._models = {version: shelf.put(fetch(version)) for version in sorted(named)}

    @property
    def specs(self) -> Sequence[SeriesSpec]:
        return [model.spec for model in self._models.values()]

    def first(self, partition: int) -> Model | None:
        return self._models.get(self._first[partition])

    def parts(self, partition: int, readings: Readings) -> Iterator[Part]:
        ahead, part = self._ahead[partition], Part(readings)
        while ahead and ahead[0].offset <= readings.offsets[-1]:
            swap = ahead.pop(0)
            at = int((readings.offsets < swap.offset).sum())
            yield replace(part, readings=readings.take(slice(0, at)))
            readings = readings.take(slice(at, None))
            part = Part(readings, swaps=True, model=self._models.get(swap.version))
            where = f"partition {partition}, offset {swap.offset}"
            self.changes.append(Change(int(readings.event_time_ms[0]), "swap", swap.version, where))
        yield part

    def resume(self, changes: Sequence[Change], journal: Iterable[bytes], positions: Mapping[int, int]) -> None:
        super().resume(changes, journal, positions)
        for partition, position in positions.items():
            self._ahead[partition] = [swap for swap in self._ahead[partition] if swap.offset >= position]


def _remember(history: History, task: ForecastTask, output: TaskOutput) -> None:
    history.add(task, output.steps)
    history.readings += output.counts.readings


def _serving_at(swaps: Sequence[Swap], offset: int) -> str:
    return next((swap.version for swap in reversed(swaps) if swap.offset <= offset), "")
