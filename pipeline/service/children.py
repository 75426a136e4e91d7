"""Programs started beside this one: their output goes to a file, they end with us, and when one fails its last lines are told."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Self

from pipeline.errors import DeploymentError

STOP_SECONDS: Final = 15.0
_LAST_LINES: Final = 12


class Child:
    """`millrace ARGUMENTS…` as a process of its own.

    It gets no settings from our environment but those named on its command line, and no Ctrl-C from our terminal."""

    def __init__(self, arguments: Sequence[str], log: Path) -> None:
        self.arguments = list(arguments)
        self.log = log
        home = str(Path(__file__).resolve().parents[2])
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MILLRACE_")}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (home, environment.get("PYTHONPATH", ""))))
        with log.open("ab") as output:
            self._begin_bytes = output.tell()
            self._process = subprocess.Popen(
                [sys.executable, "-m", "pipeline.cli", *self.arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def check(self) -> None:
        """Raises DeploymentError with its last lines if it ended with an error, or ended though it should run."""
        if not self.running:
            raise self.failure()

    def finished(self) -> bool:
        """Whether it has ended well. Raises DeploymentError with its last lines if it ended otherwise."""
        status = self._process.poll()
        if status:
            raise self.failure()
        return status == 0

    def failure(self) -> DeploymentError:
        said = "\n  ".join(self.output().splitlines()[-_LAST_LINES:]) or "(nothing)"
        return DeploymentError(
            f"`millrace {' '.join(self.arguments)}` ended with status {self._process.returncode}. Its last lines"
            f" ({self.log}):\n  {said}"
        )

    def output(self) -> str:
        """What it has printed so far."""
        with self.log.open("rb") as log:
            log.seek(self._begin_bytes)
            return log.read().decode(errors="replace")

    def kill(self) -> None:
        """Ends it as a power cut would: SIGKILL, no chance to tidy up."""
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def stop(self, timeout_seconds: float = STOP_SECONDS) -> int:
        """Asks it to end (SIGTERM), waits, and kills it if it does not. Returns its exit status."""
        if self.running:
            self._process.terminate()
            try:
                self._process.wait(timeout_seconds)
            except subprocess.TimeoutExpired:
                self.kill()
        return int(self._process.returncode)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
