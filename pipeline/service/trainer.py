"""The trainer: learns again when it is due, lets the gate decide, and takes back what disappoints.

    scores, decisions ──> Learner ──> due ────────────> training ──> gate ──> decision (and version, champion): one transaction
    control topic ──────> request ──────┘ (a thread)                     └─ with the offset of the request that it answers
                          Learner ──> disappointment ──> rollback

Of several trainers of a deployment one is on duty: the member of their consumer group that has the only partition of the control
topic. What it decides is committed under that membership, so that a trainer which has lost it without noticing decides nothing.

Everything that it knows comes out of topics: scores, decisions and readings. It holds the history that it has read, and reads on from
there the next time; it may be killed at any moment, and the next one goes on.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec
from prometheus_client import CollectorRegistry

from models.forecaster import Model
from models.rnn import load_tensorflow
from models.training import TrainingProgress
from pipeline.errors import BrokerUnavailable, DeploymentError
from pipeline.kafka.lineage import (
    Decision,
    Record,
    RegistryView,
    decision_record,
    new_version,
    promote_records,
    publish_records,
    rollback_records,
    trim_records,
    utc_now,
)
from pipeline.kafka.registry import RegistryReader, write
from pipeline.kafka.source import RecordSource
from pipeline.service.assembly import task_settings
from pipeline.service.feed import load_version
from pipeline.service.fitting import Challenge, challenge
from pipeline.service.history import LEAD_IN_STEPS, TopicHistory
from pipeline.service.learning import Disappointment, Due, Learner, LearningRule
from pipeline.service.metrics import TrainerMetrics
from pipeline.service.requests import PARTITION, read_request
from pipeline.service.words import moment
from pipeline.settings import Settings
from pipeline.stream.columns import RecordColumns
from pipeline.stream.scoring import decode_score

log = logging.getLogger(__name__)

POLL_TIMEOUT_MS = 200
RETRY_SECONDS = 5.0
STOP_SECONDS = 10.0
"""How long a training that is called off may take to notice: it is looked at after every batch."""


def trainer_settings(settings: Settings) -> Settings:
    """The same deployment seen from the trainers' own consumer group."""
    kafka = settings.kafka
    name = f"{kafka.group_instance_id}-trainer" if kafka.group_instance_id else ""
    own = msgspec.structs.replace(kafka, group_id=f"{kafka.group_id}-trainer", group_instance_id=name)
    return msgspec.structs.replace(settings, kafka=own)


class Cancelled(Exception):
    """The training was called off."""


class Trainer:
    """One member of the trainers' group. One thread; trainings run in another."""

    def __init__(self, settings: Settings, control: RecordSource, metrics: TrainerMetrics | None = None) -> None:
        """control: the control topic, as a member of the group of `trainer_settings`."""
        self.settings = settings
        self.control = control
        self.metrics = metrics or TrainerMetrics(CollectorRegistry())
        self._requests: list[_Asked] = []
        self._duty: _Duty | None = None
        self._job: _Job | None = None
        self._disappointment: Disappointment | None = None
        """Told once by the learner, and kept until it is written down."""
        control.on_assigned, control.on_revoked = self._assigned, self._revoked

    @property
    def busy(self) -> bool:
        """A training is under way, or its result is yet to be written down."""
        return self._job is not None

    def run(self, stop: Callable[[], bool]) -> None:
        """Until `stop` says so; a training under way is called off."""
        try:
            while not stop():
                try:
                    self.round()
                except BrokerUnavailable as error:
                    log.warning("%s; trying again", error)
                    time.sleep(RETRY_SECONDS)
        finally:
            self.close()

    def close(self) -> None:
        self._leave_duty()

    def round(self) -> None:
        """One look at everything."""
        for records in self.control.poll(POLL_TIMEOUT_MS):
            self._take_requests(records)
        membership = self.control.membership()
        if membership is None or PARTITION not in membership.partitions:
            self.metrics.on_duty.set(0)
            return
        if self._duty is None:
            self._duty = _Duty(self.settings)
            log.info("this trainer is on duty")
        self.metrics.on_duty.set(1)
        if not self._duty.advance():
            return  # what others have seen before is still being read
        self.metrics.show_event_time(self._duty.learner.now_ms)
        self._disappointment = self._disappointment or self._duty.learner.disappointment()
        if self._disappointment is not None:  # also while something is trained: this does not wait
            self._roll_back(self._duty, self._disappointment)
        elif self._job is None:
            self._decide(self._duty)
        elif self._job.done:
            self._conclude(self._duty, self._job)

    # -- duty comes and goes: called inside poll

    def _assigned(self, partitions: Sequence[int]) -> None:
        for partition in partitions:
            committed = self.control.committed(partition)
            beginning = self.control.beginning_offsets([partition])[partition]
            self.control.seek(partition, max(beginning, committed or 0))

    def _revoked(self, partitions: Sequence[int]) -> None:
        log.info("another trainer is on duty from now on")
        self._leave_duty()

    def _leave_duty(self) -> None:
        self._requests = []
        self._disappointment = None
        self.metrics.on_duty.set(0)
        if self._job is not None:
            self._job.cancel()
            self._job = None
        if self._duty is not None:
            self._duty.close()
            self._duty = None

    def _take_requests(self, records: RecordColumns) -> None:
        for offset, value in zip(records.offsets.tolist(), records.values()):
            try:
                request = read_request(value)
            except msgspec.MsgspecError as error:
                log.error(
                    'topic "%s", offset %d: no request (%s): left aside; `millrace retrain` writes good ones',
                    self.control.topic,
                    offset,
                    error,
                )
                continue
            self._requests.append(_Asked(offset, request.reason))

    # -- deciding

    def _decide(self, duty: _Duty) -> None:
        due = self._asked(duty) or duty.learner.due()
        if due is None:
            return
        log.info("learning again up to %s: %s", f"{moment(due.until_ms)} UTC", due.reason)
        champion = duty.reader.view.champion
        asked = len(self._requests) if due.trigger == "request" else 0
        self._job = _Job(self.settings, duty, due, champion.version if champion else "", asked, self.metrics)
        self._job.start()

    def _asked(self, duty: _Duty) -> Due | None:
        now_ms = duty.learner.now_ms
        if not self._requests or now_ms is None:
            return None
        reasons = "; ".join(dict.fromkeys(asked.reason for asked in self._requests if asked.reason))
        return Due(trigger="request", until_ms=now_ms, reason=f"it was asked for{': ' if reasons else ''}{reasons}")

    def _roll_back(self, duty: _Duty, found: Disappointment) -> None:
        token, now_ms = uuid.uuid4().hex[:8], duty.learner.now_ms

        def decide(view: RegistryView) -> list[Record]:
            if view.decided(token) or view.champion is None or view.champion.version != found.version:
                return []
            decision = Decision(
                id=view.next_decision_id(token),
                kind="rolled-back",
                version=view.champion.previous,
                champion=found.version,
                trigger="disappointed",
                reason=found.reason,
                event_time_ms=now_ms,
                decided_at=utc_now(),
                figures=[{"name": "live", **found.figures}],
            )
            return rollback_records(view, decision, found.reason, now_ms)

        log.warning("taking %s back: %s", found.version, found.reason)
        if self._write(duty, decide, answered=0):
            self._disappointment = None
            self.metrics.rollbacks.inc()

    def _conclude(self, duty: _Duty, job: _Job) -> None:
        decide, result = job.decision(self.settings)
        if self._write(duty, decide, job.asked):
            self._job = None
            self.metrics.trainings.labels(job.due.trigger, result).inc()

    def _write(self, duty: _Duty, decide: Callable[[RegistryView], list[Record]], answered: int) -> bool:
        """One transaction with the offset of the requests that it answers. False: not now, the group is rearranging itself; it is
        tried again then, and when no broker answers: `decide` knows its own decision by its token."""
        membership = self.control.membership()
        if membership is None or PARTITION not in membership.partitions:
            return False
        waiting = self._requests[answered:]
        position = self.control.positions().get(PARTITION, 0)
        offset = waiting[0].offset if waiting else position
        write(self.settings, decide, {PARTITION: offset}, membership)
        self._requests = waiting
        duty.reader.catch_up()
        duty.advance()
        return True


@dataclass(frozen=True, slots=True)
class _Asked:
    """A request that waits."""

    offset: int
    reason: str


class _Duty:
    """What a trainer on duty keeps: decisions and scores as they come, in the order of event time, and the history it has read."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.learner = Learner(LearningRule.of(settings))
        self.reader = RegistryReader(settings)
        self.history: TopicHistory | None = None
        self._readings: RecordSource | None = None
        self._pending: list[Decision] = []
        self._known = 0
        self._scores = RecordSource(
            settings, settings.topics.scores_topic, group=False, on_assigned=self._from_the_beginning
        )
        self._there = self._scores.end_offsets(self._scores.partitions)
        """Scores that were there when the duty began: nothing is decided before they are known."""
        self.reader.catch_up()

    def advance(self) -> bool:
        """Take in what is new. False until everything is known that was there when the duty began."""
        self.reader.poll(0)
        self._pending += self.reader.view.decisions[self._known :]
        self._known = len(self.reader.view.decisions)
        for records in self._scores.poll(0 if self._caught_up() else POLL_TIMEOUT_MS):
            self._observe(records)
        if not self._caught_up():
            return False
        self._apply_decisions(None)
        return True

    def topic_history(self, from_ms: int | None) -> TopicHistory:
        """From the thread that trains; the next training reads on where this one stopped."""
        if self.history is None:
            self._readings = RecordSource(self._settings, self._settings.topics.readings_topic, group=False)
            most = self._settings.retraining.max_steps
            self.history = TopicHistory(task_settings(self._settings), self._readings, from_ms, most)
        return self.history

    def close(self) -> None:
        self._scores.close()
        self.reader.close()
        if self._readings is not None:
            self._readings.close()

    def _from_the_beginning(self, partitions: Sequence[int]) -> None:
        for partition, offset in self._scores.beginning_offsets(partitions).items():
            self._scores.seek(partition, offset)

    def _caught_up(self) -> bool:
        positions = self._scores.positions()
        return all(positions.get(partition, -1) >= end for partition, end in self._there.items() if end)

    def _observe(self, records: RecordColumns) -> None:
        for value in records.values():
            try:
                score = decode_score(value or b"")
            except msgspec.MsgspecError as error:
                log.error('topic "%s": a record is no score (%s): left aside', self._scores.topic, error)
                continue
            self._apply_decisions(score.window_end)
            self.learner.observe(score)

    def _apply_decisions(self, until_ms: int | None) -> None:
        """Those up to this event time; None: all. One without an event time goes with the one before it."""
        while self._pending:
            decision = self._pending[0]
            if until_ms is not None and decision.event_time_ms is not None and decision.event_time_ms > until_ms:
                return
            self._pending.pop(0)
            # A first champion is imported; whatever else is imported does not serve yet.
            if decision.kind in ("promoted", "rolled-back") or (decision.kind, decision.trigger) == (
                "imported",
                "first",
            ):
                previous = decision.champion if decision.kind == "promoted" else ""
                self.learner.champion(decision.version, previous, decision.event_time_ms)
            if decision.event_time_ms is not None:
                self.learner.decided(
                    decision.event_time_ms, decision.kind != "rolled-back", requested=decision.trigger == "request"
                )


@dataclass
class _Job:
    """One training, in a thread of its own."""

    settings: Settings
    duty: _Duty
    due: Due
    champion: str
    """Version that serves while it trains; empty: none."""
    asked: int
    """Requests that it answers: the oldest so many."""
    metrics: TrainerMetrics
    token: str = field(default_factory=lambda: uuid.uuid4().hex[:8])
    _outcome: Challenge | None = None
    _failure: str = ""
    _cancelled: threading.Event = field(default_factory=threading.Event)
    _epoch: int = 0

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="millrace: training", daemon=True)
        self._thread.start()

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()

    def cancel(self) -> None:
        self._cancelled.set()
        self._thread.join(STOP_SECONDS)

    def decision(self, settings: Settings) -> tuple[Callable[[RegistryView], list[Record]], str]:
        """What is to be written of it, and "promoted", "refused" or "failed"."""
        outcome = self._outcome

        def decide(view: RegistryView) -> list[Record]:
            if view.decided(self.token):
                return []
            serving = view.champion.version if view.champion else ""
            if outcome is not None and outcome.verdict.promoted and serving == self.champion:
                version = new_version(
                    view,
                    outcome.manifest,
                    outcome.body,
                    origin="trained",
                    created_at=utc_now(),
                    parent=outcome.parent,
                    learned_to_ms=self.due.until_ms,
                )
                decision = self._decision(view, "promoted", serving, outcome.verdict.reason)
                spare = {version.version, serving}
                return [
                    *publish_records(version, outcome.body),
                    *promote_records(view, version, decision, self.due.until_ms),
                    *trim_records(view, settings.retraining.keep_versions, spare),
                ]
            if outcome is None:
                return [decision_record(self._decision(view, "failed", serving, self._failure))]
            reason = outcome.verdict.reason
            if outcome.verdict.promoted:
                reason = f"while it was trained {serving or 'nobody'} took the place of {self.champion or 'nobody'}: {reason}"
            return [decision_record(self._decision(view, "refused", serving, reason))]

        result = "failed" if outcome is None else "promoted" if outcome.verdict.promoted else "refused"
        said = self._failure if outcome is None else f"{outcome.version}: {outcome.verdict.reason}"
        log.info("%s after %s: %s", result, self.due.trigger, said)
        return decide, result

    def _decision(self, view: RegistryView, kind: str, serving: str, reason: str) -> Decision:
        outcome = self._outcome
        return Decision(
            id=view.next_decision_id(self.token),
            kind=kind,  # type: ignore[arg-type]
            version=outcome.version if outcome else "",
            champion=serving,
            trigger=self.due.trigger,
            reason=f"{self.due.reason}; {reason}",
            event_time_ms=self.due.until_ms,
            decided_at=utc_now(),
            figures=[figures.to_dict() for figures in outcome.figures] if outcome else [],
        )

    def _run(self) -> None:
        started = time.monotonic()
        try:
            self._outcome = self._train()
        except Cancelled:
            self._failure = "it was called off"
        except DeploymentError as error:
            self._failure = str(error)
        except Exception as error:
            log.exception("a training failed")
            self._failure = f"{type(error).__name__}: {error}"
        self.metrics.training_progress.set(0)
        if self._outcome is not None:
            self.metrics.training_seconds.observe(time.monotonic() - started)
            for figures in self._outcome.figures:
                self.metrics.gate_pinball.labels(figures.name).set(figures.pinball)

    def _train(self) -> Challenge:
        settings, until_ms = self.settings, self.due.until_ms
        load_tensorflow(settings.retraining.threads)
        newest_ms = settings.training.history_ms
        lead_in_ms = LEAD_IN_STEPS * settings.windows.hop_ms
        source = self.duty.topic_history(None if newest_ms is None else until_ms - newest_ms - lead_in_ms)
        history = source.read(on_progress=lambda read, total: self._go_on())
        if newest_ms is not None:
            history.forget_before(until_ms - newest_ms)
        sequences = history.sequences(to_ms=until_ms)
        one_in = f" (one in {history.one_in} of {len(history.sensors):,})" if history.one_in > 1 else ""
        log.info("training on %s steps%s", f"{len(sequences):,}", one_in)
        spec = task_settings(settings).spec
        return challenge(settings, spec, sequences, self._champion(), self._show, self.due.changed_ms)

    def _champion(self) -> Model | None:
        if not self.champion:
            return None
        with RegistryReader(self.settings) as reader:
            reader.catch_up()
            return load_version(reader, self.champion, task_settings(self.settings).spec)

    def _show(self, at: TrainingProgress) -> None:
        self._go_on()
        self.metrics.training_progress.set((at.epoch - 1 + at.done) / at.epochs)
        self.metrics.training_loss.set(at.loss)
        if at.stopping_loss is not None:
            log.info("epoch %d of %d: loss %.4f, early stopping %.4f", at.epoch, at.epochs, at.loss, at.stopping_loss)

    def _go_on(self) -> None:
        if self._cancelled.is_set():
            raise Cancelled
