"""Programs started beside this one. A `Child`'s output goes to a file, and when it fails its last lines are told; a `Companion` speaks
where we speak, and is started again when it ends. Both end with us."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Self

from pipeline.errors import DeploymentError

log = logging.getLogger(__name__)

STOP_SECONDS: Final = 15.0
RESTART_SECONDS: Final = 10.0
PARENT: Final = "MILLRACE_PARENT"
"""Environment of a companion: the process that it belongs to."""
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


class Companion:
    """`millrace ARGUMENTS…` beside this process for as long as the context lasts: our environment, our standard error.

    When it ends by itself it is started again, after a while. It notices by itself when we are gone without a word
    (`ended_with_parent`)."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self._command = [sys.executable, "-m", "pipeline.cli", *arguments]
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look_after, name="millrace: companion", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _look_after(self) -> None:
        environment = os.environ | {PARENT: str(os.getpid())}
        while not self._stop.is_set():
            process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=sys.stderr.fileno(),
                env=environment,
                start_new_session=True,
            )
            while process.poll() is None and not self._stop.wait(0.2):
                pass
            if process.poll() is None:
                _end(process)
            elif not self._stop.is_set():
                log.warning("millrace %s ended with status %d: starting it again", self._command[3], process.returncode)
                self._stop.wait(RESTART_SECONDS)


def ended_with_parent() -> bool:
    """Whether the process that this one accompanies is gone."""
    parent = os.environ.get(PARENT)
    return parent is not None and os.getppid() != int(parent)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
