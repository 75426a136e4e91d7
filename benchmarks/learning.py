"""What learning costs those who are waiting for a forecast: latency while the trainer trains, against quiet.

    python -m benchmarks.learning [--sensors 500] [--seconds 40]

One local broker and, on the same cores, `millrace run --with-trainer`. A reading of every sensor comes each second, windows of two
seconds close all the time. Latency is the time from the reading that closed a window (its record's timestamp, set when it was sent) to the
append of the forecast record (the forecasts topic keeps the time of appending; the commit follows within some ten milliseconds). Phases:

    quiet       nobody trains
    training    the trainer reads its history, trains and scores, because `millrace retrain` asked it to
    swap        from the decision until two seconds after the last partition was taken over
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from kafka import KafkaConsumer

from pipeline.kafka import registry, topics
from pipeline.kafka.broker import LocalBroker
from pipeline.kafka.partitioner import partition_for
from pipeline.kafka.sink import RecordSink
from pipeline.service.requests import ask_to_retrain
from pipeline.settings import Settings, load
from pipeline.stream.columns import OutgoingRecords

WINDOW_MS = 2_000
HISTORY_WINDOWS = 400
SEASON = 12
WAIT_SECONDS = 180.0


def settings_text(bootstrap_servers: str, folder: Path) -> str:
    return f"""
[kafka]
bootstrap_servers = "{bootstrap_servers}"
[topics]
domain = "learning"
[readings]
fields = ["value"]
[windows]
size = "2s"
[forecast]
horizon = 12
season = ["24s"]
[model]
path = "{folder / "model"}"
[training]
epochs = 20
patience = 20
[retraining]
every = ""
on_drift = false
margin = 0.0
max_lead_loss = 10.0
min_labels = 10
"""


class Stream:
    """Readings now and in the past, a thread that sends one of each sensor each second."""

    def __init__(self, settings: Settings, sensors: int) -> None:
        self._settings = settings
        self._random = np.random.default_rng(0)
        self._phase = self._random.uniform(0, 6.28, sensors)
        self._keys = [b"sensor-%05d" % sensor for sensor in range(sensors)]
        self._partition = np.array([partition_for(key, settings.topics.partitions) for key in self._keys])
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def history(self, until_ms: int) -> None:
        with RecordSink(self._settings) as sink:
            for window in range(HISTORY_WINDOWS):
                sink.deliver(list(self._batches(until_ms - (HISTORY_WINDOWS - window) * WINDOW_MS + 1)))

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        with RecordSink(self._settings) as sink:
            while not self._stop.wait(1.0 - time.time() % 1.0):
                sink.deliver(list(self._batches(time.time_ns() // 1_000_000)))

    def _batches(self, now_ms: int) -> Any:
        rhythm = np.sin(2 * np.pi * now_ms / (SEASON * WINDOW_MS) + self._phase)
        values = 20 + 3 * rhythm + self._random.normal(0, 0.5, len(self._keys))
        for partition in range(self._settings.topics.partitions):
            rows = np.flatnonzero(self._partition == partition)
            yield OutgoingRecords(
                self._settings.topics.readings_topic,
                partition,
                [self._keys[row] for row in rows],
                [b'{"ts": %d, "value": %.3f}' % (now_ms, values[row]) for row in rows],
                timestamps_ms=np.full(len(rows), now_ms, np.int64),
            )


def decisions(settings: Settings, trigger: str) -> int:
    return sum(decision.trigger == trigger for decision in registry.read(settings).decisions)


def wait_until(true: Any, what: str) -> float:
    deadline = time.monotonic() + WAIT_SECONDS
    while not true():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {WAIT_SECONDS:.0f} s: {what}")
        time.sleep(0.1)
    return time.time()


def records(settings: Settings, topic: str) -> Any:
    consumer = KafkaConsumer(
        topic,
        bootstrap_servers=settings.kafka.bootstrap_servers,
        auto_offset_reset="earliest",
        isolation_level="read_committed",
        consumer_timeout_ms=3_000,
    )
    yield from consumer
    consumer.close()


def latencies(settings: Settings, from_s: float) -> tuple[np.ndarray, np.ndarray]:
    """(n) when each forecast was appended (epoch s), and how long its last reading had been there (ms)."""
    sent = {(r.partition, r.offset): r.timestamp for r in records(settings, settings.topics.readings_topic)}
    found = []
    for record in records(settings, settings.topics.forecasts_topic):
        source = json.loads(record.value)["source"]
        closed_ms = sent[source["partition"], source["offset"]]
        if closed_ms >= from_s * 1000:
            found.append((record.timestamp / 1000, record.timestamp - closed_ms))
    times, waits = np.array(found).T
    return times, waits


def resident_mb(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) / 1024


def measure(settings: Settings, config: Path, sensors: int, seconds: float) -> None:
    stream = Stream(settings, sensors)
    stream.history(time.time_ns() // 1_000_000 // WINDOW_MS * WINDOW_MS)
    command = [sys.executable, "-m", "pipeline.cli", "run", "--with-trainer", "--config", str(config)]
    worker = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=config.with_suffix(".log").open("wb"),
        env=os.environ | {"PYTHONPATH": "."},
    )
    try:
        stream.start()
        wait_until(lambda: decisions(settings, "first"), "a first model")
        wait_until(lambda: len(registry.read(settings).swaps) == settings.topics.partitions, "its turn")
        time.sleep(10)  # compiled, and caught up
        before_mb, quiet_from = resident_mb(worker.pid), time.time()
        time.sleep(seconds)
        asked = time.time()
        ask_to_retrain(settings, "benchmark")
        decided = wait_until(lambda: decisions(settings, "request"), "a decision")
        swapped = wait_until(
            lambda: all(
                swaps[-1].version == registry.read(settings).champion.version  # type: ignore[union-attr]
                for swaps in registry.read(settings).swaps.values()
            ),
            "the swap",
        )
        time.sleep(5)
        after_mb = resident_mb(worker.pid)
    finally:
        worker.send_signal(signal.SIGTERM)
        worker.wait(60)
        stream.stop()
    times, waits = latencies(settings, quiet_from)
    print(f"training took {decided - asked:.0f} s; worker {before_mb:.0f} MB before, {after_mb:.0f} MB after")
    print("| phase | forecasts | median ms | 99 % ms | longest ms |\n|---|---|---|---|---|")
    for phase, first, end in (
        ("quiet", quiet_from, asked),
        ("training", asked, decided),
        ("swap", decided, swapped + 2.0),
    ):
        own = waits[(times >= first) & (times < end)]
        cells = [
            phase,
            f"{len(own):,}",
            *(f"{value:.0f}" for value in (np.median(own), np.quantile(own, 0.99), own.max())),
        ]
        print("| " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sensors", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=40.0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="millrace-learning-") as name:
        folder = Path(name)
        broker = LocalBroker(folder / "broker", port=0)
        broker.start()
        try:
            config = folder / "learning.toml"
            config.write_text(settings_text(broker.bootstrap_servers, folder), encoding="utf-8")
            settings = load(config, {})
            topics.create(settings)
            measure(settings, config, given.sensors, given.seconds)
        except BaseException:
            log = config.with_suffix(".log")
            print(log.read_text(errors="replace")[-3000:] if log.exists() else "", file=sys.stderr)
            raise
        finally:
            broker.stop()


if __name__ == "__main__":
    main()
