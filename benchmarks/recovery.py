"""From `kill -9` to the next forecast, and what keeping the states costs.

    python -m benchmarks.recovery [--sensors 1000,200000] [--hours 6]

One local broker, four partitions, a GRU of 64 units, a worker with a static name (kafka.group_instance_id), default settings
else. Every sensor sends a reading a minute of event time, two of which make a window; the stream goes on while the worker is killed,
and the time runs from the kill until the first forecast that nobody had seen before is committed: until the model is loaded
(interpreter, TensorFlow, weights), all partitions are restored (group, changelog), the forecast is there (replay, compilation, and
waiting for the stream's next window to close; one column says how often that is). All are seconds since the kill; the first two are
told by the worker's own log. The reference is a start of interpreter, TensorFlow and model alone, in the same run.

What the changelog costs: bytes that the checkpoints of a quiet minute wrote, per sensor and hour of wall time, before compression,
and what the topic takes on the broker's disk per sensor in the end, compaction included.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.throughput import PARTITIONS, START_MS

READING_MS = 60_000
WINDOW = "2m"
PER_WINDOW = 2
QUIET_SECONDS = 40.0
ANSWER_SECONDS = 180.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sensors", default="1000,200000")
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    from pipeline.kafka.broker import LocalBroker

    with tempfile.TemporaryDirectory(prefix="millrace-recovery-") as scratch:
        folder = Path(scratch)
        broker = LocalBroker(folder / "broker", port=0)
        broker.start()
        try:
            rows = [
                measure(folder, broker.bootstrap_servers, int(count), arguments.rounds)
                for count in arguments.sensors.split(",")
            ]
        finally:
            broker.stop()
    print_table(rows)


def measure(folder: Path, servers: str, sensors: int, rounds: int) -> dict[str, Any]:
    from pipeline.kafka import topics
    from pipeline.service.children import Child
    from pipeline.settings import load

    domain = f"recovery{sensors}"
    config, port = folder / f"{domain}.toml", free_port()
    config.write_text(
        f'[kafka]\nbootstrap_servers = "{servers}"\ngroup_instance_id = "bench"\n'
        f'[topics]\ndomain = "{domain}"\npartitions = {PARTITIONS}\n[windows]\nsize = "{WINDOW}"\n'
        f'[forecast]\nseason = ["4h"]\n'
        f'[http]\nport = {port}\n[model]\npath = "{folder / "model"}"\n'
    )
    settings = load(config, {})
    make_model_for(settings, folder)
    topics.create(settings)
    load_ = Stream(settings, sensors)
    watch = Watch(settings)
    log = folder / f"{domain}.log"
    worker = Child(["run", "--config", str(config)], log)
    try:
        load_.start()
        watch.until(lambda: watch.newest > 0, worker)
        watch.quiet(QUIET_SECONDS / 4)
        before, started = checkpoint_bytes(port), time.monotonic()
        watch.quiet(QUIET_SECONDS)
        written, hours = checkpoint_bytes(port) - before, (time.monotonic() - started) / 3600
        kills = []
        for _ in range(rounds):
            worker, timing = kill_and_wait(worker, watch, config, log)
            kills.append(timing)
            watch.quiet(QUIET_SECONDS / 4)
        return {
            "sensors": sensors,
            "readings per second": load_.sent / load_.seconds,
            "bytes per sensor and hour": written / sensors / hours,
            "bytes on disk": disk_bytes(folder, settings.topics.state_topic) / sensors,
            "window seconds": PER_WINDOW * load_.seconds / max(1, load_.sent / sensors),
            "state": state_bytes(settings),
            "reference": start_alone(folder / "model"),
            **min(kills, key=lambda timing: float(timing["all"])),
        }
    finally:
        load_.stop()
        worker.stop()
        watch.close()


def make_model_for(settings: Any, folder: Path) -> None:
    from models.sequences import Sequences
    from pipeline.service.assembly import task_settings
    from pipeline.service.fitting import fit

    spec = task_settings(settings).spec
    steps, sensors = 400, 8
    sensor = np.repeat(np.arange(sensors, dtype=np.int32), steps)
    end_ms = np.tile(START_MS + spec.step_ms * np.arange(1, steps + 1), sensors)
    values = np.random.default_rng(0).normal(0, 1, (steps * sensors, 1))
    quick = Sequences(sensor, end_ms, values, np.zeros(len(sensor), np.bool_))
    import msgspec

    training = msgspec.structs.replace(settings.training, epochs=1, lanes=8)
    fit(msgspec.structs.replace(settings, training=training), spec, quick, folder / "model")


def kill_and_wait(worker: Any, watch: Watch, config: Path, log: Path) -> tuple[Any, dict[str, float]]:
    """Kills the worker, starts another of the same name at once, and tells how long what took, in seconds."""
    from pipeline.service.children import Child

    worker.kill()
    killed = time.monotonic()
    watch.poll()  # its last words
    newest = watch.newest
    again = Child(["run", "--config", str(config)], log)
    seen: dict[str, float] = {}
    restored = re.compile(r"(\d+) sensors restored")

    def progress() -> bool:
        said = again.output()
        if "model" not in seen and re.search(r"^model ", said, re.M):
            seen["model"] = time.monotonic() - killed
        if "restored" not in seen and len(restored.findall(said)) == PARTITIONS:
            seen["restored"] = time.monotonic() - killed
            seen["sensors restored"] = sum(map(int, restored.findall(said)))
        if watch.newest > newest:
            seen.setdefault("all", time.monotonic() - killed)
        return "all" in seen and "restored" in seen

    watch.until(progress, again)
    return again, seen


def start_alone(model: Path) -> float:
    """Interpreter, TensorFlow and the weights, and nothing else: the best of two, in seconds."""
    code = f"from pathlib import Path; from models.artifact import load; load(Path({str(model)!r}))"
    times = []
    for _ in range(2):
        started = time.monotonic()
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
        times.append(time.monotonic() - started)
    return min(times)


class Stream:
    """A reading a sensor and minute of event time, as fast as a quarter of what a worker can take."""

    PER_SECOND = 40_000

    def __init__(self, settings: Any, sensors: int) -> None:
        from pipeline.kafka.sink import partition_for

        self._settings = settings
        self._keys = [b"sensor-%d" % number for number in range(sensors)]
        partition = np.array([partition_for(key, PARTITIONS) for key in self._keys])
        self._groups = [[self._keys[i] for i in np.flatnonzero(partition == p)] for p in range(PARTITIONS)]
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.sent = 0
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    def start(self) -> None:
        self._started = time.monotonic()
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join(30)

    def _run(self) -> None:
        from pipeline.kafka.sink import RecordSink
        from pipeline.stream.columns import OutgoingRecords

        # A few sensors are not sent faster than ten minutes of theirs a second.
        per_second = min(self.PER_SECOND, 10 * len(self._keys))
        rng, now_ms = np.random.default_rng(0), START_MS
        with RecordSink(self._settings) as sink:
            while not self._stopped.is_set():
                for partition, own in enumerate(self._groups):
                    values = [
                        b'{"ts":%d,"value":%r}' % (now_ms, v) for v in rng.normal(0, 1, len(own)).round(4).tolist()
                    ]
                    topic = self._settings.topics.readings_topic
                    stamps = np.full(len(own), now_ms, np.int64)
                    sink.deliver([OutgoingRecords(topic, partition, own, values, timestamps_ms=stamps)])
                    self.sent += len(own)
                now_ms += READING_MS
                ahead = self.sent / per_second - self.seconds
                self._stopped.wait(max(0.0, ahead))


class Watch:
    """Sees which forecasts are committed, from outside."""

    def __init__(self, settings: Any) -> None:
        from pipeline.kafka.source import RecordSource

        topic = settings.topics.forecasts_topic
        self._source = RecordSource(settings, topic, group=False)
        self._source.on_assigned = lambda partitions: [self._source.seek(p, 0) for p in partitions]
        self.newest = 0
        """Forecasts seen so far: one that nobody had seen before makes it grow."""

    def poll(self, timeout_ms: int = 20) -> None:
        for records in self._source.poll(timeout_ms):
            self.newest += len(records)

    def until(self, true: Callable[[], bool], worker: Any) -> None:
        deadline = time.monotonic() + ANSWER_SECONDS
        while not true():
            worker.check()
            self.poll()
            if time.monotonic() > deadline:
                raise TimeoutError(f"no answer within {ANSWER_SECONDS} s\n{worker.output()[-2000:]}")

    def quiet(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self.poll()

    def close(self) -> None:
        self._source.close()


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def checkpoint_bytes(port: int) -> float:
    """What the worker says that it has written."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        found = re.search(r"^millrace_checkpoint_bytes_total (\S+)", answer.read().decode(), re.M)
    assert found is not None
    return float(found[1])


def disk_bytes(folder: Path, topic: str) -> int:
    """What a topic takes on the broker's disk, indexes aside."""
    return sum(path.stat().st_size for path in (folder / "broker" / "data").glob(f"{topic}-*/*.log"))


def state_bytes(settings: Any) -> int:
    from pipeline.service.assembly import bytes_per_sensor

    return sum(bytes_per_sensor(settings).values())


def print_table(rows: list[dict[str, Any]]) -> None:
    print(
        "| sensors | readings/s | model loaded, s | all restored | first new forecast | a window every, s | TensorFlow start alone "
        "| state, B a sensor | changelog written, KB a sensor and hour | on disk, B a sensor |"
    )
    print("|---" * 10 + "|")
    for row in rows:
        print(
            f"| {row['sensors']:,} | {row['readings per second']:,.0f} | {row['model']:.1f} | {row['restored']:.1f} "
            f"| {row['all']:.1f} | {row['window seconds']:.1f} | {row['reference']:.1f} | {row['state']} "
            f"| {row['bytes per sensor and hour'] / 1000:.0f} | {row['bytes on disk']:.0f} |"
        )


if __name__ == "__main__":
    main()
