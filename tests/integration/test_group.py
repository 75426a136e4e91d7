"""Two workers of one group: partitions move between them, and every window still has its forecast."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

from pipeline.service.worker import WorkerReport
from pipeline.settings import Settings
from tests.helpers.broker import RunningBroker, produce_records
from tests.helpers.streams import HOUR, START, cut, fleet
from tests.helpers.workers import running_worker
from tests.integration.test_worker import forecasts, make_settings

SENSORS, HOURS = 12, 60


class Member:
    """A worker on a thread of its own."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.stop = threading.Event()
        self.report: WorkerReport | None = None
        self.failure: BaseException | None = None
        self.partitions: set[int] = set()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            with running_worker(self.settings) as worker:
                while not self.stop.is_set():
                    worker.round()
                    self.partitions = set(worker.source.assignment)
                self.report = worker.report
        except BaseException as failure:
            self.failure = failure

    def end(self) -> None:
        self.stop.set()
        self._thread.join(60)
        assert not self._thread.is_alive()
        if self.failure:
            raise self.failure


def test_partitions_move_to_a_second_worker_and_back_and_no_forecast_is_missing(
    broker: RunningBroker, domain: str, tmp_path: Path
) -> None:
    settings = make_settings(broker, domain, tmp_path)
    parts = [part for _, part in cut(fleet(sensors=SENSORS, hours=HOURS), [400, 800, 1200])]
    first = Member(settings)
    send(broker, settings, parts[0])
    wait(lambda: len(first.partitions) == 3, "the first worker has all partitions")
    second = Member(settings)
    send(broker, settings, parts[1])
    wait(lambda: second.partitions and first.partitions.isdisjoint(second.partitions), "they share the partitions")
    send(broker, settings, parts[2])
    first.end()
    wait(lambda: len(second.partitions) == 3, "the second has them all")
    send(broker, settings, parts[3])
    due = [START + hour * HOUR for hour in range(1, HOURS)]

    def complete() -> bool:
        return all(value[-1]["issued_at"] == due[-1] for value in forecasts(broker, settings).values())

    wait(complete, "the newest windows are forecast")
    second.end()

    found = forecasts(broker, settings)
    assert len(found) == SENSORS
    for sensor, values in found.items():
        assert [value["issued_at"] for value in values] == due, sensor
        assert [value["state_steps"] for value in values] == list(range(1, HOURS))
    undisturbed = make_settings(broker, domain + "b", tmp_path)
    send(broker, undisturbed, [pair for part in parts for pair in part])
    alone = Member(undisturbed)
    wait(lambda: len(forecasts(broker, undisturbed)) == SENSORS, "the undisturbed run has begun")
    wait(lambda: all(v[-1]["issued_at"] == due[-1] for v in forecasts(broker, undisturbed).values()), "and ended")
    alone.end()
    assert found == forecasts(broker, undisturbed)


def send(broker: RunningBroker, settings: Settings, pairs: Any) -> None:
    produce_records(broker, settings.topics.readings_topic, pairs)


def wait(condition: Any, what: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.2)
