"""Programs beside ours: how they end, and what is told of it."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from pipeline.errors import DeploymentError
from pipeline.service import children
from pipeline.service.children import Child


def ended(child: Child) -> bool:
    child._process.wait(60)
    return child.finished()


def test_a_program_that_ends_well_has_finished(tmp_path: Path):
    with Child(["--version"], tmp_path / "log") as child:
        assert ended(child)
        assert child.output().startswith("millrace")


def test_a_program_that_fails_is_told_with_its_last_lines(tmp_path: Path):
    with (
        Child(["replya"], tmp_path / "log") as child,
        pytest.raises(DeploymentError, match="did you mean 'replay'") as told,
    ):
        ended(child)
    assert "status 2" in str(told.value)
    assert str(tmp_path / "log") in str(told.value)


def test_a_program_that_should_run_and_has_ended_is_a_failure(tmp_path: Path):
    with Child(["--version"], tmp_path / "log") as child:
        ended(child)
        with pytest.raises(DeploymentError, match="ended with status 0"):
            child.check()


def test_our_own_environment_does_not_leak_settings_into_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MILLRACE_WINDOWS__SIZE", "nonsense")
    with Child(["config", "validate"], tmp_path / "log") as child:
        assert ended(child), child.output()


def test_whatever_still_runs_ends_with_the_block(tmp_path: Path):
    # Nobody answers at this port: the service keeps trying for longer than this test runs.
    arguments = ["run", "--bootstrap-servers", "127.0.0.1:9"]
    with Child(arguments, tmp_path / "log") as child:
        assert child.running
        pid = child.pid
    assert not child.running
    assert not Path(f"/proc/{pid}").exists()


def until(true, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_companion_is_started_again_when_it_ends_and_ends_with_us(tmp_path, monkeypatch):
    monkeypatch.setattr(children, "RESTART_SECONDS", 0.05)
    starts = tmp_path / "starts"
    code = f"import os, time; open({str(starts)!r}, 'a').write(f'{{os.getpid()}}\\n'); time.sleep(600)"
    companion = children.Companion(["trainer"])
    companion._command = [sys.executable, "-c", code, "trainer"]
    with companion:
        until(lambda: starts.exists() and starts.read_text().count("\n") == 1)
        os.kill(int(starts.read_text()), signal.SIGKILL)
        until(lambda: starts.read_text().count("\n") == 2)
    second = int(starts.read_text().split()[1])
    with pytest.raises(ProcessLookupError):
        os.kill(second, 0)


def test_a_companion_notices_that_the_process_it_belongs_to_is_gone(monkeypatch):
    assert not children.ended_with_parent()
    monkeypatch.setenv(children.PARENT, str(os.getppid()))
    assert not children.ended_with_parent()
    monkeypatch.setenv(children.PARENT, str(os.getppid() + 1))
    assert children.ended_with_parent()
