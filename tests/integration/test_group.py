"""Workers of one group: partitions move between them while readings flow, and every window has its forecast, once."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

from pipeline.service.worker import WorkerReport
from pipeline.settings import Settings
from tests.helpers.broker import RunningBroker, produce_records
from tests.helpers.settings import again
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
        self.generation: int | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            with running_worker(self.settings) as worker:
                while not self.stop.is_set():
                    worker.round()
                    self.partitions = set(worker.source.assignment)
                    membership = worker.source.membership()
                    self.generation = membership.metadata.generation_id if membership else None
                self.report = worker.report
        except BaseException as failure:
            self.failure = failure

    def end(self) -> None:
        self.stop.set()
        self._thread.join(60)
        assert not self._thread.is_alive()
        if self.failure:
            raise self.failure


def test_from_one_worker_to_three_and_back_while_readings_flow(
    broker: RunningBroker, domain: str, tmp_path: Path
) -> None:
    settings = make_settings(broker, domain, tmp_path)
    parts = [part for _, part in cut(fleet(sensors=SENSORS, hours=HOURS), [400, 800, 1200])]
    first = Member(settings)
    send(broker, settings, parts[0])
    wait(lambda: len(first.partitions) == 3, "the first worker has all partitions")
    second, third = Member(settings), Member(settings)
    send(broker, settings, parts[1])
    members = (first, second, third)
    wait(lambda: all(len(member.partitions) == 1 for member in members), "each has one")
    assert set.union(*(member.partitions for member in members)) == {0, 1, 2}
    send(broker, settings, parts[2])
    first.end()
    third.end()
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


def test_a_rolling_restart_of_static_members_moves_no_partition(
    broker: RunningBroker, domain: str, tmp_path: Path
) -> None:
    settings = make_settings(broker, domain, tmp_path)
    stream = fleet(sensors=SENSORS, hours=20)
    names = {name: again(settings, kafka__group_instance_id=name) for name in ("north", "south")}
    north, south = Member(names["north"]), Member(names["south"])
    send(broker, settings, stream[: len(stream) // 2])
    held, generation = settled(north, south)
    north.end()
    north = Member(names["north"])
    send(broker, settings, stream[len(stream) // 2 :])
    assert settled(north, south) == (held, generation)
    due = SENSORS * 19
    wait(lambda: sum(map(len, forecasts(broker, settings).values())) == due, "every window is forecast")
    north.end()
    south.end()
    assert all(
        [value["state_steps"] for value in values] == list(range(1, 20))
        for values in forecasts(broker, settings).values()
    )


def settled(first: Member, second: Member, seconds: float = 4.0) -> tuple[set[int], int | None]:
    """The second's partitions and generation, once they share all of them and nothing has changed for two heartbeats."""
    since, before = time.monotonic(), None
    deadline = since + 60
    while time.monotonic() - since < seconds:
        assert time.monotonic() < deadline, f"the group does not settle: {before}, {first.failure}, {second.failure}"
        now = (set(first.partitions), first.generation, set(second.partitions), second.generation)
        shared = len(now[0] | now[2]) == 3 and now[0] and now[2] and now[1] == now[3] is not None
        if now != before or not shared:
            since, before = time.monotonic(), now
        time.sleep(0.1)
    return before[2], before[3]  # type: ignore[index]


def send(broker: RunningBroker, settings: Settings, pairs: Any) -> None:
    produce_records(broker, settings.topics.readings_topic, pairs)


def wait(condition: Any, what: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.2)
