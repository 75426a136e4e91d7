"""The workers of a chaos run as processes, and their consumer group asked from outside."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

from kafka import KafkaConsumer, TopicPartition
from kafka.errors import KafkaError

from pipeline.settings import Settings
from tests.chaos.worker import DEATH

ROOT: Final = Path(__file__).resolve().parents[2]
LAST_LINES: Final = 25


class WorkerProcess:
    """One worker, with whatever is to happen to it. Its output is appended to `log`."""

    def __init__(self, config: Path, log: Path, death: str = "", fault: str = "") -> None:
        self.log = log
        self._born = time.monotonic()
        self.appointment = death.partition(":")[0]
        """The point at which it is to die; empty: none."""
        command = [sys.executable, "-m", "tests.chaos.worker"]
        command += ["--die-at", death] if death else []
        command += ["--fault", fault] if fault else []
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MILLRACE_")}
        environment |= {"PYTHONPATH": str(ROOT), "TF_NUM_INTRAOP_THREADS": "1", "TF_NUM_INTEROP_THREADS": "1"}
        with log.open("ab") as output:
            output.write(f"\n== {time.strftime('%H:%M:%S')} starts {death}\n".encode())
            output.flush()
            self._begin = output.tell()
            self._process = subprocess.Popen(
                [*command, "--", "run", "--config", str(config), "-v"],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=ROOT,
                start_new_session=True,
            )

    @property
    def status(self) -> int | None:
        """Exit status, negative for a signal; None while it runs."""
        return self._process.poll()

    @property
    def age_seconds(self) -> float:
        return time.monotonic() - self._born

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def resident_bytes(self) -> int:
        """0 for one that has ended."""
        try:
            status = Path(f"/proc/{self.pid}/status").read_text(encoding="ascii")
        except FileNotFoundError:
            return 0
        sizes = [line.split()[1] for line in status.splitlines() if line.startswith("VmRSS:")]
        return 1024 * int(sizes[0]) if sizes else 0

    @property
    def kept_its_appointment(self) -> bool:
        return bool(self.appointment) and self.status == -signal.SIGKILL and DEATH + self.appointment in self.said()

    def pause(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            self._process.kill()
        self._process.wait()

    def ask_to_stop(self) -> None:
        with suppress(ProcessLookupError):
            self._process.terminate()

    def wait(self, timeout_seconds: float) -> int | None:
        """Its exit status; None if it still runs after that time."""
        try:
            return self._process.wait(max(0.0, timeout_seconds))
        except subprocess.TimeoutExpired:
            return None

    def said(self) -> str:
        with self.log.open("rb") as log:
            log.seek(self._begin)
            return log.read().decode(errors="replace")

    def last_lines(self) -> str:
        return "\n    ".join(self.said().splitlines()[-LAST_LINES:]) or "(nothing)"


class Group:
    """How far the workers' group has come, asked from outside of it."""

    def __init__(self, settings: Settings) -> None:
        self._partitions = [
            TopicPartition(settings.topics.readings_topic, partition) for partition in range(settings.topics.partitions)
        ]
        self._consumer = KafkaConsumer(
            bootstrap_servers=settings.kafka.bootstrap_servers.split(","),
            group_id=settings.kafka.group_id,
            enable_auto_commit=False,
            request_timeout_ms=3_000,
            reconnect_backoff_max_ms=1_000,
        )

    def has_committed_everywhere(self) -> bool:
        committed = self._committed()
        return committed is not None and all(committed)

    def lag(self) -> int | None:
        """Records not yet committed; None while no broker says."""
        committed = self._committed()
        try:
            ends = self._consumer.end_offsets(self._partitions, timeout_ms=3_000)
        except KafkaError:
            return None
        return None if committed is None else sum(ends[tp] - at for tp, at in zip(self._partitions, committed))

    def _committed(self) -> list[int] | None:
        try:
            return [self._consumer.committed(tp, timeout_ms=3_000) or 0 for tp in self._partitions]
        except KafkaError:
            return None

    def __enter__(self) -> Group:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(KafkaError):
            self._consumer.close(autocommit=False, timeout_ms=2_000)
