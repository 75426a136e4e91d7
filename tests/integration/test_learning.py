"""Learning on a real broker: a first model, one that is taken back, requests, and one trainer at a time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.artifact import save
from models.sequences import Sequences
from models.training import train
from pipeline.errors import DeploymentError
from pipeline.kafka import registry
from pipeline.kafka.lineage import RegistryView
from pipeline.kafka.source import RecordSource
from pipeline.service import versions
from pipeline.service.assembly import task_settings
from pipeline.service.feed import ModelFeed
from pipeline.service.requests import ask_to_retrain
from pipeline.service.trainer import Trainer, trainer_settings
from pipeline.settings import Settings
from tests.helpers.broker import RunningBroker, produce_records, read_all
from tests.helpers.settings import again
from tests.helpers.streams import HOUR, START, reading
from tests.helpers.workers import running_worker
from tests.integration.test_worker import forecasts, make_settings

pytestmark = pytest.mark.keras
SENSORS, SEASON = 12, 4


@pytest.fixture
def settings(broker: RunningBroker, domain: str, tmp_path: Path) -> Settings:
    return make_settings(
        broker,
        domain,
        tmp_path,
        **{
            "topics.partitions": 2,
            "kafka.session_timeout": "6s",
            "model.units": 8,
            "training.epochs": 3,
            "training.lanes": 8,
            "training.chunk": 24,
            "retraining.min_labels": 50,
            "retraining.every": "",
            "retraining.on_drift": False,
            "retraining.probation": "40h",
            "retraining.keep_versions": 3,
        },
    )


class Plant:
    """Readings that a seasonal naive forecast cannot follow: a rhythm and a disturbance that dies away slowly."""

    def __init__(self, broker: RunningBroker, settings: Settings) -> None:
        self._broker, self._topic = broker, settings.topics.readings_topic
        self._random = np.random.default_rng(0)
        self._level = self._random.normal(20, 5, SENSORS)
        self._disturbance = np.zeros(SENSORS)
        self.hours = 0

    def run(self, hours: int) -> None:
        pairs = []
        for hour in range(self.hours, self.hours + hours):
            self._disturbance = 0.8 * self._disturbance + self._random.normal(0, 1, SENSORS)
            values = self._level + 2 * np.sin(2 * np.pi * hour / SEASON) + self._disturbance
            pairs += [reading(f"pump-{n}", START + hour * HOUR, value=float(value)) for n, value in enumerate(values)]
        self.hours += hours
        produce_records(self._broker, self._topic, pairs)


def past() -> Sequences:
    """A history of the plant's kind."""
    steps = 300
    random = np.random.default_rng(1)
    disturbance = np.zeros((steps, SENSORS))
    for step in range(1, steps):
        disturbance[step] = 0.8 * disturbance[step - 1] + random.normal(0, 1, SENSORS)
    values = 20 + 2 * np.sin(2 * np.pi * np.arange(steps)[:, None] / SEASON) + disturbance
    sensor = np.tile(np.arange(SENSORS, dtype=np.int32), steps)
    end_ms = np.repeat(START - HOUR * np.arange(steps)[::-1], SENSORS)
    return Sequences(sensor, end_ms, values.reshape(-1, 1), np.zeros(len(sensor), np.bool_))


class Deployment:
    """A worker with its feed and a trainer, driven by the test, round by round."""

    def __init__(self, settings: Settings, stack: ExitStack) -> None:
        self.settings = settings
        versions.ensure_champion(settings)
        feed = ModelFeed(settings, task_settings(settings).spec)
        stack.callback(feed.close)
        model = feed.first()
        self.worker = stack.enter_context(running_worker(settings, model, feed=feed))
        feed.start()
        self.trainer = stack.enter_context(a_trainer(settings))

    def until(self, done: Callable[[], bool], what: str, seconds: float = 120.0) -> None:
        deadline = time.monotonic() + seconds
        while not done():
            assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
            self.worker.round()
            self.trainer.round()

    def until_read(self, readings: int) -> None:
        self.until(
            lambda: self.worker.report.counts.records >= readings and not self.worker._work, f"{readings} readings"
        )
        self.until(self.trainer_has_seen_all, "the trainer has seen all scores")

    def trainer_has_seen_all(self) -> bool:
        duty = self.trainer._duty
        if duty is None:
            return False
        ends, positions = duty._scores.end_offsets(), duty._scores.positions()
        return all(positions.get(partition) == end for partition, end in ends.items())

    def until_decided(self, decisions: int) -> RegistryView:
        view = RegistryView()

        def is_there() -> bool:
            nonlocal view
            duty = self.trainer._duty
            view = duty.reader.view if duty else view
            return len(view.decisions) >= decisions and not self.trainer.busy

        self.until(is_there, f"{decisions} decisions")
        return view

    def until_served_by(self, version: str) -> None:
        serving = self.worker._serving
        self.until(lambda: len(serving) == 2 and {one.version for one in serving.values()} == {version}, version)


@contextmanager
def a_trainer(settings: Settings) -> Iterator[Trainer]:
    with RecordSource(trainer_settings(settings), settings.topics.control_topic) as control:
        trainer = Trainer(settings, control)
        try:
            yield trainer
        finally:
            trainer.close()


def poisoned(settings: Settings, folder: Path) -> str:
    """A model whose weights were all thrown off after its training: no gate would let it through."""
    model = train(past(), task_settings(settings).spec, units=8, epochs=1, warmup_steps=settings.forecast.warmup_steps)
    weights = model.net.model.get_weights()
    model.net.model.set_weights([weight + 0.8 for weight in weights])
    return str(save(folder, model)["version"])


def test_a_first_model_is_learned_and_served_and_one_forced_into_its_place_is_taken_back(
    broker: RunningBroker, settings: Settings, tmp_path: Path
) -> None:
    plant = Plant(broker, settings)
    plant.run(150)
    with ExitStack() as stack:
        deployment = Deployment(settings, stack)
        deployment.until_read(150 * SENSORS)
        view = deployment.until_decided(1)
        (first,) = view.decisions
        assert (first.kind, first.trigger, first.version) == ("promoted", "first", view.champion.version)  # type: ignore[union-attr]
        assert [figures["name"] for figures in first.figures] == ["challenger", "LastValue", "SeasonalNaive"]
        assert first.event_time_ms <= START + 150 * HOUR  # type: ignore[operator]
        deployment.until_served_by(first.version)

        plant.run(40)
        deployment.until_read(190 * SENSORS)
        bad = poisoned(settings, tmp_path / "poison")
        versions.import_folder(settings, tmp_path / "poison", promote=False)
        versions.promote(settings, bad, force=True)
        deployment.until_served_by(bad)
        plant.run(30)
        deployment.until_read(220 * SENSORS)
        deployment.until_served_by(first.version)

        view = registry.read(settings)
        assert [decision.kind for decision in view.decisions][-1] == "rolled-back"
        last = view.decisions[-1]
        assert (last.version, last.champion, last.trigger) == (first.version, bad, "disappointed")
        assert view.versions[bad].withdrawn == last.reason
        plant.run(5)
        deployment.until_read(225 * SENSORS)
    answered = [value["model"] for value in forecasts(broker, settings)["pump-3"]]
    assert len(answered) == 224  # one for each closed window, whoever answered
    assert list(dict.fromkeys(answered)) == ["SeasonalNaive", first.version, bad]
    assert answered[-1] == first.version
    scored = read_all(broker, settings.topics.scores_topic)
    assert len(scored) == 2 * 224


def test_a_request_is_answered_once_with_a_decision_and_outlives_the_trainer(
    broker: RunningBroker, settings: Settings
) -> None:
    settings = again(settings, retraining__every_ms=None)
    plant = Plant(broker, settings)
    plant.run(90)  # too few for a first model by itself
    with ExitStack() as stack:
        deployment = Deployment(settings, stack)
        deployment.until_read(90 * SENSORS)
        ask_to_retrain(settings, "a new sensor head was mounted")
        deployment.until(lambda: deployment.trainer.busy, "a training")
        deployment.trainer.close()  # it is gone before it could answer
    with ExitStack() as stack:
        deployment = Deployment(settings, stack)
        view = deployment.until_decided(1)
        deployment.until(deployment.trainer_has_seen_all, "scores")
        for _ in range(10):
            deployment.trainer.round()
    assert len(registry.read(settings).decisions) == 1
    (decision,) = view.decisions
    assert decision.trigger == "request"
    assert "a new sensor head was mounted" in decision.reason


def test_of_two_trainers_one_works_and_the_other_takes_its_place(broker: RunningBroker, settings: Settings) -> None:
    with ExitStack() as first_stack, ExitStack() as stack:
        first = first_stack.enter_context(a_trainer(settings))
        wait_for(lambda: first._duty is not None, first)
        second = stack.enter_context(a_trainer(settings))
        for _ in range(20):  # at once, as two processes would
            both = [threading.Thread(target=trainer.round) for trainer in (first, second)]
            for thread in both:
                thread.start()
            for thread in both:
                thread.join()
        assert (first._duty is None) != (second._duty is None)
        gone, other = (first, second) if first._duty else (second, first)
        gone.close()
        gone.control.close()
        wait_for(lambda: other._duty is not None, other)


def wait_for(true: Callable[[], bool], trainer: Trainer, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        trainer.round()


def test_a_model_that_was_made_for_other_readings_does_not_get_into_service(
    broker: RunningBroker, settings: Settings, tmp_path: Path
) -> None:
    fit_for_minutes: Any = again(
        settings, windows__size_ms=60_000, windows__hop_ms=60_000, forecast__season_ms=(240_000,)
    )
    spec = task_settings(fit_for_minutes).spec
    model = train(past(), spec, units=8, epochs=1)
    save(tmp_path / "minutes", model)
    versions.import_folder(settings, tmp_path / "minutes", promote=False)
    with pytest.raises(DeploymentError, match="step_ms"):
        versions.promote(settings, model.forecaster.version, force=True)
