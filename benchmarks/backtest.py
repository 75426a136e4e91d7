"""Ten million readings through a backtest, from a Parquet file and from a topic: readings a second, and peak memory.

    python -m benchmarks.backtest [--readings 10000000] [--sensors 1000] [--stride 24] [--only file|topic]

A fleet that sends a reading every quarter of an hour; windows of an hour, 24 steps ahead, a GRU of 64 units. Each figure is
`millrace backtest` (without its report's time: what the command itself says) as a process of its own, its peak memory the
largest resident size that the kernel saw. The reference, in the same run: the same readings through decoding and windows only
(`StepTask`), which is what reading costs without forecasting anything. `--stride` says which cutoffs are kept: every forecast is made
in any case, because the state needs its step, but a day's forecasts of 24 leads each are 576 rows a sensor in the file.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.recovery import make_model_for
from benchmarks.throughput import START_MS

READING_MS = 15 * 60_000
ROWS_AT_ONCE = 500
PARTITIONS = 4
MEASURE = """
import resource, subprocess, sys
done = subprocess.run(sys.argv[1:], capture_output=True, text=True)
sys.stdout.write(done.stderr)
print("PEAK", resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024, done.returncode)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readings", type=int, default=10_000_000)
    parser.add_argument("--sensors", type=int, default=1_000)
    parser.add_argument("--stride", type=int, default=24)
    parser.add_argument("--only", choices=["file", "topic"])
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="millrace-backtest-") as scratch:
        folder = Path(scratch)
        file = write_file(folder / "fleet.parquet", given.readings, given.sensors)
        rows = []
        if given.only != "topic":
            rows += from_file(folder, file, given)
        if given.only != "file":
            rows += from_topic(folder, file, given)
    print(
        "\n| from | readings | seconds | readings/s | of decoding and windows alone | peak MiB |\n|---|---|---|---|---|---|"
    )
    for row in rows:
        cells = (row["from"], f"{given.readings:,}", f"{row['seconds']:.1f}", f"{given.readings / row['seconds']:,.0f}")
        print(f"| {' | '.join(cells)} | {row['reference'] / row['seconds']:.2f} | {row['peak']:,.0f} |")


def write_file(path: Path, readings: int, sensors: int) -> Path:
    """Wide: a row a quarter of an hour, a column a sensor."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    random, rows = np.random.default_rng(0), readings // sensors
    level, amplitude, phase = (
        random.normal(20, 5, sensors),
        random.uniform(1, 4, sensors),
        random.uniform(0, 6, sensors),
    )
    names = [f"sensor-{number:05d}" for number in range(sensors)]
    schema = pa.schema([("time", pa.timestamp("ms")), *((name, pa.float64()) for name in names)])
    with pq.ParquetWriter(path, schema, use_dictionary=False) as writer:
        for first in range(0, rows, ROWS_AT_ONCE):
            at = np.arange(first, min(first + ROWS_AT_ONCE, rows))
            times = START_MS + READING_MS * at
            values = (
                level
                + amplitude * np.sin(2 * np.pi * at[:, None] / 96 + phase)
                + random.normal(0, 0.3, (len(at), sensors))
            )
            columns = [pa.array(times, pa.timestamp("ms")), *(pa.array(np.round(column, 3)) for column in values.T)]
            writer.write_table(pa.table(columns, schema=schema))
    return path


def config(folder: Path, servers: str = "127.0.0.1:9092") -> Path:
    path = folder / "millrace.toml"
    path.write_text(
        f'[kafka]\nbootstrap_servers = "{servers}"\n[topics]\ndomain = "backtest"\npartitions = {PARTITIONS}\n'
        f'[readings]\nfields = ["value"]\n[windows]\nsize = "1h"\n[forecast]\nseason = ["24h"]\n'
        f'[model]\npath = "{folder / "model"}"\n'
    )
    return path


def from_file(folder: Path, file: Path, given: argparse.Namespace) -> list[dict[str, Any]]:
    from pipeline.service.assembly import task_settings
    from pipeline.service.files import FileLayout, read_file
    from pipeline.service.inputs import FileInput
    from pipeline.settings import load

    settings = load(config(folder), {})
    make_model_for(settings, folder)
    core = task_settings(settings)
    source = FileInput(read_file(file, FileLayout("time", ("*",))), core.format.fields, "file")
    seconds = windows_alone(core, source)
    data = ["--data", str(file), "--time-column", "time", "--value-columns", "*"]
    return [{"from": "Parquet", "reference": seconds} | measured(folder, data, given)]


def from_topic(folder: Path, file: Path, given: argparse.Namespace) -> list[dict[str, Any]]:
    from pipeline.kafka import topics
    from pipeline.kafka.broker import LocalBroker
    from pipeline.kafka.source import RecordSource
    from pipeline.service.assembly import task_settings
    from pipeline.service.inputs import TopicInput
    from pipeline.settings import load

    broker = LocalBroker(folder / "broker", port=0)
    broker.start()
    try:
        path = config(folder, broker.bootstrap_servers)
        settings = load(path, {})
        if not (folder / "model").exists():
            make_model_for(settings, folder)
        topics.create(settings)
        send = ["replay", str(file), "--time-column", "time", "--value-columns", "*", "--config", str(path)]
        subprocess.run([sys.executable, "-m", "pipeline.cli", *send], check=True, capture_output=True)
        core = task_settings(settings)
        with RecordSource(settings, settings.topics.readings_topic, group=False) as source:
            everything = source.partitions
            starts, ends = source.beginning_offsets(everything), source.end_offsets(everything)
            seconds = windows_alone(core, TopicInput(source, core.format, starts, ends))
        model = ["--model", str(folder / "model")]
        return [{"from": "topic", "reference": seconds} | measured(folder, model, given)]
    finally:
        broker.stop()


def windows_alone(core: Any, source: Any) -> float:
    """Seconds."""
    from pipeline.stream.task import StepTask

    tasks = {partition: StepTask(core) for partition in source.partitions}
    began = time.monotonic()
    for partition, readings in source.until(None):
        tasks[partition].advance(readings)
    return time.monotonic() - began


def measured(folder: Path, arguments: list[str], given: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, "-m", "pipeline.cli", "backtest", *arguments, "--stride", str(given.stride)]
    command += ["--config", str(folder / "millrace.toml"), "--out", str(folder / "out"), "--overwrite"]
    done = subprocess.run([sys.executable, "-c", MEASURE, *command], capture_output=True, text=True, check=True)
    said = re.search(r"([\d,]+) readings, ([\d,]+) forecasts in ([\d.]+) s", done.stdout)
    peak, status = done.stdout.rsplit("PEAK", 1)[1].split()
    if said is None or status != "0":
        raise SystemExit(f"the backtest failed:\n{done.stdout}\n{json.dumps(command)}")
    print(said[0], flush=True)
    return {"seconds": float(said[3]), "peak": float(peak)}


if __name__ == "__main__":
    main()
