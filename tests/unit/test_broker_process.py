"""Whose process a pid file names: the broker signals its own JVM and nothing else."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.errors import DeploymentError
from pipeline.kafka.broker import LocalBroker, server_properties


@pytest.fixture
def stopped(tmp_path: Path) -> LocalBroker:
    """A broker that ran once and is stopped, as its folder tells."""
    (tmp_path / "broker.json").write_text(
        '{"cluster_id":"M0000000000000000000000","port":21999,"controller_port":21998}'
    )
    return LocalBroker(tmp_path)


def test_a_pid_that_now_belongs_to_another_program_is_neither_running_nor_signalled(stopped):
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        (stopped.data_dir / "broker.pid").write_text(f"{other.pid}\n")
        assert not stopped.status().running
        assert not stopped.stop()
        assert other.poll() is None
        assert not (stopped.data_dir / "broker.pid").exists()
    finally:
        other.communicate(b"\n")


@pytest.mark.parametrize("content", ["", "not a pid", "999999999"])
def test_a_pid_file_without_a_process_counts_as_stopped(stopped, content):
    (stopped.data_dir / "broker.pid").write_text(content)
    status = stopped.status()
    assert (status.running, status.pid) == (False, None)


def test_a_stopped_broker_still_says_where_it_answered(stopped):
    assert stopped.status().address == "127.0.0.1:21999"
    assert stopped.bootstrap_servers == "127.0.0.1:21999"


def test_a_broker_that_never_ran_has_neither_address_nor_log_and_leaves_no_trace(tmp_path):
    broker = LocalBroker(tmp_path / "none")
    assert broker.status().address is None
    assert broker.logs() == []
    assert list(broker.follow()) == []
    assert not broker.stop()
    with pytest.raises(DeploymentError, match="never started"):
        _ = broker.bootstrap_servers
    assert not (tmp_path / "none").exists()


def test_a_damaged_folder_is_an_error_that_names_the_file(stopped):
    (stopped.data_dir / "broker.json").write_text('{"port": "ninety-two"}')
    with pytest.raises(DeploymentError, match=r"broker\.json"):
        stopped.status()


def test_a_taken_port_is_refused_before_any_jvm_starts(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(DeploymentError, match=f"Port {port} .* is taken"):
            LocalBroker(tmp_path, port=port)._choose_port(None)


def test_the_log_gives_its_last_lines_in_order(stopped):
    stopped.log_path.write_text("".join(f"line {i}\n" for i in range(100)))
    assert stopped.logs(2) == ["line 98", "line 99"]
    assert stopped.logs(0) == []
    assert len(stopped.logs()) == 100
    assert list(stopped.follow(2)) == ["line 98", "line 99"]


def test_bytes_that_are_no_text_do_not_break_the_log(stopped):
    stopped.log_path.write_bytes(b"caf\xe9\nlast line without an end")
    assert stopped.logs() == ["caf\N{REPLACEMENT CHARACTER}", "last line without an end"]
    assert list(stopped.follow()) == stopped.logs()


def test_everything_listens_on_loopback_only():
    properties = server_properties(port=21999, controller_port=21998, log_dir=Path("data"))
    for key in ("listeners", "advertised.listeners"):
        assert all("://127.0.0.1:" in listener for listener in properties[key].split(","))


def test_a_relative_data_folder_is_fixed_when_the_broker_is_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    broker = LocalBroker(Path("here"))
    monkeypatch.chdir("/")
    assert broker.data_dir == tmp_path / "here"
    assert os.path.isabs(broker.log_path)
