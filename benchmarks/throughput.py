"""Readings per second and memory of the whole path, beside the bare `poll()` of kafka-python on the same topic.

    python -m benchmarks.throughput [--sensors 1,10000,200000] [--rounds 2]

One local broker, four partitions, ten readings a window of ~50 bytes each, lz4. Each figure is a process of its own: the bare consumer
polls and counts; the worker decodes, closes windows, runs the GRU (64 units, horizon 24, three quantiles), encodes the forecasts and
commits them: with every round one transaction (exactly once), and without (at least once); both write checkpoints of the states as
they go. All read the same records from their first to their last; interpreter and TensorFlow start, joining the group and compilation
come before the clock starts. The three are run in turn `--rounds` times and the best of each is kept, because machines are noisy.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

WINDOW_MS = 3_600_000
PER_WINDOW = 10
START_MS = 1_451_606_400_000  # 2016: Kafka refuses timestamps more than an hour ahead of its clock
WINDOWS = {1: 30_000, 10_000: 10, 200_000: 2}
PARTITIONS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sensors", default="1,10000,200000")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        kind, config = arguments.child
        print(json.dumps(bare_poll(Path(config)) if kind == "poll" else whole_path(Path(config), kind)))
        return
    from pipeline.kafka.broker import LocalBroker

    with tempfile.TemporaryDirectory(prefix="millrace-bench-") as scratch:
        folder = Path(scratch)
        make_model(folder)
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


def write_settings(folder: Path, bootstrap_servers: str, domain: str) -> Path:
    config = folder / f"{domain}.toml"
    config.write_text(
        f'[kafka]\nbootstrap_servers = "{bootstrap_servers}"\n[topics]\ndomain = "{domain}"\npartitions = {PARTITIONS}\n'
        f'[model]\npath = "{folder / "model"}"\n'
    )
    return config


def make_model(folder: Path) -> None:
    """A model of the default size; how good it is does not change what it costs."""
    from models.sequences import Sequences
    from pipeline.service.assembly import task_settings
    from pipeline.service.fitting import fit
    from pipeline.settings import load

    settings = load(None, {}, {"training.epochs": 1, "training.lanes": 8})
    hours, sensors = 400, 8
    sensor = np.repeat(np.arange(sensors, dtype=np.int32), hours)
    end_ms = np.tile(START_MS + WINDOW_MS * np.arange(1, hours + 1), sensors)
    rhythm = np.sin(np.arange(hours) * 2 * np.pi / 24)
    values = np.tile(rhythm, sensors)[:, None] + np.random.default_rng(0).normal(0, 0.1, (hours * sensors, 1))
    sequences = Sequences(sensor, end_ms, values, np.zeros(len(sensor), np.bool_))
    fit(settings, task_settings(settings).spec, sequences, folder / "model")


def measure(folder: Path, bootstrap_servers: str, sensors: int, rounds: int) -> dict[str, Any]:
    from pipeline.kafka import topics
    from pipeline.settings import load

    windows = WINDOWS.get(sensors, max(2, 1_000_000 // (sensors * PER_WINDOW)))
    config = write_settings(folder, bootstrap_servers, f"bench{sensors}")
    settings = load(config, {})
    topics.create(settings)
    readings = produce(settings, sensors, windows)
    print(f"{sensors:,} sensors: {readings:,} readings written", file=sys.stderr)
    runs: dict[str, list[dict[str, Any]]] = {kind: [] for kind in ("poll", "exactly_once", "at_least_once")}
    for _ in range(rounds):
        for kind, done in runs.items():
            done.append(child(kind, config))
            assert done[-1]["records"] == readings, (kind, done[-1], readings)
    best = {kind: min(done, key=lambda run: float(run["seconds"])) for kind, done in runs.items()}
    return {"sensors": sensors, "readings": readings, **best}


def produce(settings: Any, sensors: int, windows: int) -> int:
    from pipeline.kafka.sink import RecordSink, partition_for
    from pipeline.stream.columns import OutgoingRecords

    keys = [b"sensor-%d" % number for number in range(sensors)]
    partition = np.array([partition_for(key, PARTITIONS) for key in keys])
    groups = [(p, [keys[i] for i in np.flatnonzero(partition == p)]) for p in range(PARTITIONS)]
    rng, total = np.random.default_rng(0), 0
    # Few sensors: several moments in one send, so that record batches have the size a busy topic's have.
    moments_at_once = max(1, 5_000 // sensors)
    with RecordSink(settings) as sink:
        for first in range(0, windows * PER_WINDOW, moments_at_once):
            times = START_MS + np.arange(first, min(first + moments_at_once, windows * PER_WINDOW)) * (
                WINDOW_MS // PER_WINDOW
            )
            for number, own in groups:
                if not own:
                    continue
                stamps = np.repeat(times, len(own))
                drawn = (rng.random(len(stamps)) * 10).round(4).tolist()
                values = [b'{"ts":%d,"value":%r}' % pair for pair in zip(stamps.tolist(), drawn)]
                topic = settings.topics.readings_topic
                sink.async_send(OutgoingRecords(topic, number, own * len(times), values, timestamps_ms=stamps))
                total += len(values)
        sink.flush()
    return total


def child(kind: str, config: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.throughput", "--child", kind, str(config)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def bare_poll(config: Path) -> dict[str, Any]:
    """kafka-python's own `poll()`, records counted and dropped; default settings."""
    from kafka import KafkaConsumer, TopicPartition

    from pipeline.settings import load

    settings = load(config, {})
    consumer = KafkaConsumer(enable_auto_commit=False, auto_offset_reset="earliest", **settings.kafka.client_options())
    partitions = [TopicPartition(settings.topics.readings_topic, p) for p in range(PARTITIONS)]
    consumer.assign(partitions)
    end = sum(consumer.end_offsets(partitions).values())
    records, started = 0, time.perf_counter()
    while records < end:
        records += sum(map(len, consumer.poll(200).values()))
    seconds = time.perf_counter() - started
    return {"records": records, "seconds": seconds, "peak_mb": peak_mb()}


def whole_path(config: Path, guarantee: str) -> dict[str, Any]:
    from pipeline.kafka import topics
    from pipeline.kafka.source import RecordSource
    from pipeline.service.assembly import load_model
    from pipeline.service.commit import make_committer, open_transactions
    from pipeline.service.worker import Worker
    from pipeline.settings import load

    settings = load(config, {})
    model = load_model(settings)
    assert model is not None
    warm_up(model)
    fresh = f"bench-{time.time_ns()}"
    settings = load(
        config,
        {},
        {"kafka.group_id": fresh, "topics.state": f"{fresh}.state.v1", "kafka.processing_guarantee": guarantee},
    )
    topics.create(settings)
    before_mb = peak_mb()
    clock = StageClock()
    transactions = open_transactions(settings)
    with RecordSource(settings, settings.topics.readings_topic) as source:
        committer = make_committer(settings, transactions, source)
        worker = Worker(settings, source, committer, model)
        clock.watch(source, committer)
        while len(worker._serving) < PARTITIONS:  # joining the group is not what is measured
            worker.round()
        done = worker.report.counts.records
        clock.reset()
        started = time.perf_counter()
        report = worker.run(threading.Event(), exit_at_end=True)
        seconds = time.perf_counter() - started
        committer.close()
    transactions.close()
    assert done < report.counts.records / 10, "most of it was read before the clock started"
    table_bytes = next(iter(worker._serving.values())).task.table.bytes_per_sensor
    return {
        "checkpoints": report.checkpoints,
        "records": report.counts.records,
        "forecasts": report.counts.forecasts,
        "seconds": seconds,
        "stages": dict(clock.seconds),
        "peak_mb": peak_mb(),
        "before_mb": before_mb,
        "state_bytes_per_sensor": table_bytes,
    }


def warm_up(model: Any) -> None:
    """Compile the shapes that the run will meet."""
    for batch in (1, 16, 256, 4096):
        for steps in (1, 8, 64):
            if batch * steps <= 32_768:
                model.net.warm_up(batch, steps)


class StageClock:
    """Seconds spent in each stage, by wrapping the stages of one worker."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def reset(self) -> None:
        self.seconds = dict.fromkeys(self.seconds, 0.0)

    def watch(self, source: Any, committer: Any) -> None:
        from pipeline.service import serving
        from pipeline.stream import checkpoint, forecasting, serdes, windows

        source.poll = self._timed("poll", source.poll)
        committer.commit = self._timed("commit", committer.commit)
        serving.encode_forecasts = self._timed("encode", serving.encode_forecasts)
        for owner, name, stage in (
            (serdes.ReadingDecoder, "decode", "decode"),
            (windows.WindowOperator, "advance", "windows"),
            (forecasting.Forecasting, "advance", "forecast"),
            (checkpoint.CheckpointWriter, "capture", "checkpoint"),
        ):
            setattr(owner, name, self._timed(stage, getattr(owner, name)))

    def _timed(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        self.seconds[stage] = 0.0

        def timed(*arguments: Any, **options: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                self.seconds[stage] += time.perf_counter() - started

        return timed


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def print_table(rows: list[dict[str, Any]]) -> None:
    print(
        "| sensors | readings | bare poll, k/s | exactly once, k/s | ratio | at least once, k/s | exactly once costs "
        "| checkpoints | peak MB | of it before | state, B a sensor |"
    )
    print("|---" * 11 + "|")
    for row in rows:
        bare, once, least = (
            row[kind]["records"] / row[kind]["seconds"] / 1e3 for kind in ("poll", "exactly_once", "at_least_once")
        )
        worker = row["exactly_once"]
        print(
            f"| {row['sensors']:,} | {row['readings']:,} | {bare:.0f} | {once:.0f} | {once / bare:.2f} | {least:.0f} "
            f"| {100 * (1 - once / least):.0f} % | {worker['checkpoints']} | {worker['peak_mb']:.0f} "
            f"| {worker['before_mb']:.0f} | {worker['state_bytes_per_sensor']} |"
        )
    print("\nWhere the time goes (exactly once), microseconds a reading:\n")
    stages = list(rows[0]["exactly_once"]["stages"])
    print(f"| sensors | {' | '.join(stages)} | rest | all |")
    print("|---" * (len(stages) + 3) + "|")
    for row in rows:
        print(f"| {row['sensors']:,} | {' | '.join(f'{value:.2f}' for value in stage_costs(row['exactly_once']))} |")


def stage_costs(worker: dict[str, Any]) -> Iterator[float]:
    per_reading = 1e6 / worker["records"]
    for seconds in worker["stages"].values():
        yield seconds * per_reading
    yield (worker["seconds"] - sum(worker["stages"].values())) * per_reading
    yield worker["seconds"] * per_reading


if __name__ == "__main__":
    main()
