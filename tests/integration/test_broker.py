"""The local broker as a user meets it. These start brokers of their own, besides the one that the other tests share."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from kafka import KafkaConsumer, KafkaProducer, TopicPartition
from kafka.admin import KafkaAdminClient

from pipeline.errors import DeploymentError
from pipeline.kafka import jars
from pipeline.kafka.broker import LocalBroker
from tests.helpers.broker import RunningBroker, make_topic, produce_records, read_all

DAY_MS = 86_400_000
WAIT_SECONDS = 60.0
ROOT = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.broker,
    # Without a kind, the broker of all tests is a local one, and a missing Java fails them rather than skipping these.
    pytest.mark.skipif(
        bool(os.environ.get("MILLRACE_TEST_BROKER")) and not (shutil.which("java") and shutil.which("mvn")),
        reason="the broker of these tests is another one, and a local one needs Java and Maven",
    ),
]


@pytest.fixture
def local(tmp_path: Path) -> Iterator[LocalBroker]:
    """A broker that is not started yet, on a free port; stopped in the end whatever the test did."""
    broker = LocalBroker(tmp_path / "broker", port=0)
    yield broker
    broker.stop()


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalBroker]:
    """One that runs, for tests that leave it running."""
    broker = LocalBroker(tmp_path_factory.mktemp("running") / "broker", port=0)
    broker.start()
    yield broker
    broker.stop()


def reached(broker: LocalBroker) -> RunningBroker:
    return RunningBroker(broker.bootstrap_servers, "local", broker)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"did not come true within {WAIT_SECONDS:.0f} s"
        time.sleep(0.1)


def millrace(*arguments: str, cwd: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pipeline.cli", *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environ,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_started_broker_answers_where_its_status_says(running):
    status = running.status()
    assert status.running
    assert status.pid is not None
    assert status.address == running.bootstrap_servers
    with KafkaAdminClient(bootstrap_servers=status.address) as admin:
        assert len(admin.describe_cluster()["brokers"]) == 1


def test_a_running_broker_is_left_alone_by_a_second_start(running):
    pid = running.status().pid
    assert running.start().pid == pid
    assert LocalBroker(running.data_dir).start().pid == pid
    with pytest.raises(DeploymentError, match="stop it first"):
        LocalBroker(running.data_dir, port=1234).start()


def test_two_brokers_side_by_side_know_nothing_of_each_other(running, broker, domain):
    assert running.bootstrap_servers != broker.bootstrap_servers
    make_topic(reached(running), domain)
    with KafkaAdminClient(bootstrap_servers=broker.bootstrap_servers) as admin:
        assert domain not in admin.list_topics()


def test_a_port_that_another_program_uses_is_named_with_a_way_out(running, tmp_path):
    port = int(running.bootstrap_servers.split(":")[1])
    with pytest.raises(DeploymentError, match=rf"Port {port} .* is taken .*--port .*--bootstrap-servers"):
        LocalBroker(tmp_path, port=port).start()


def test_an_aborted_transaction_is_not_among_the_committed_records(broker, domain):
    topic = make_topic(broker, domain)
    producer = KafkaProducer(bootstrap_servers=broker.bootstrap_servers, transactional_id=domain)
    producer.init_transactions()
    for value, end in ((b"aborted", producer.abort_transaction), (b"committed", producer.commit_transaction)):
        producer.begin_transaction()
        producer.send(topic, value).get(timeout=WAIT_SECONDS)
        end()
    producer.close()
    assert [record.value for record in read_all(broker, topic, "read_committed")] == [b"committed"]
    assert [record.value for record in read_all(broker, topic)] == [b"aborted", b"committed"]


def test_records_and_port_outlive_a_stop_and_a_kill(local):
    """Its controller port may go to another program meanwhile: the broker takes another and serves its old records."""
    pid = local.start().pid
    address, topic = local.bootstrap_servers, make_topic(reached(local), "kept")
    produce_records(reached(local), topic, [(b"1", b"before the kill")], acks="all")
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not local.status().running)
    with socket_on(identity(local)["controller_port"]):
        assert local.start().pid != pid
    produce_records(reached(local), topic, [(b"2", b"before the stop")])
    assert local.stop()
    assert not local.stop()
    assert local.start().address == address
    assert [record.value for record in read_all(reached(local), topic)] == [b"before the kill", b"before the stop"]


def test_two_starts_of_one_folder_at_once_make_one_broker(local):
    pids: list[int | None] = []
    starts = [threading.Thread(target=lambda: pids.append(LocalBroker(local.data_dir, 0).start().pid)) for _ in "ab"]
    for start in starts:
        start.start()
    for start in starts:
        start.join()
    assert len(pids) == 2
    assert pids[0] == pids[1]


def socket_on(port: int) -> socket.socket:
    """Takes a port as soon as the process that had it has let go."""
    taken: list[socket.socket] = []

    def take() -> bool:
        with contextlib.suppress(OSError):
            taken.append(socket.create_server(("127.0.0.1", port)))
        return bool(taken)

    wait_for(take)
    return taken[0]


def identity(local: LocalBroker) -> dict[str, Any]:
    return json.loads((local.data_dir / "broker.json").read_text())


def test_two_processes_that_resolve_the_jars_at_once_both_get_all_of_them(tmp_path):
    script = "import pathlib, sys; from pipeline.kafka import jars; print(jars.resolve(pathlib.Path(sys.argv[1])))"
    command = [sys.executable, "-c", script, str(tmp_path)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) for _ in "ab"]
    folders = {process.communicate(timeout=240)[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0, 0]
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == [Path(folder) for folder in folders]
    names = {path.name for path in Path(folders.pop()).iterdir()}
    assert f"kafka_2.13-{jars.kafka_version(jars.resource('pom.xml'))}.jar" in names
    assert len(names) > 50
    assert jars.resolve(tmp_path, environ={"PATH": ""}).is_dir()  # from the cache: no Maven needed


def test_a_replay_of_last_year_needs_readings_that_are_kept_for_ever(tmp_path):
    """The trap: time-based retention looks at record timestamps, so a topic kept for 7 days loses old ones at once."""
    hasty = {"log.initial.task.delay.ms": "200", "log.retention.check.interval.ms": "200"}
    local = LocalBroker(tmp_path / "broker", port=0, properties=hasty)
    try:
        local.start()
        last_year_ms = time.time_ns() // 1_000_000 - 365 * DAY_MS
        records = [{"value": b"x" * 100_000, "timestamp_ms": last_year_ms + i} for i in range(30)]
        for topic, retention_ms in (("for-ever", -1), ("seven-days", 7 * DAY_MS)):
            make_topic(reached(local), topic, 1, {"retention.ms": str(retention_ms), "segment.bytes": str(1024 * 1024)})
            produce_records(reached(local), topic, records)
        wait_for(lambda: _first_offset(local, "seven-days") == 30)
        assert _first_offset(local, "for-ever") == 0
        assert len(read_all(reached(local), "for-ever")) == 30
    finally:
        local.stop()


def _first_offset(local: LocalBroker, topic: str) -> int:
    partition = TopicPartition(topic, 0)
    consumer = KafkaConsumer(bootstrap_servers=local.bootstrap_servers)
    try:
        return int(consumer.beginning_offsets([partition])[partition])
    finally:
        consumer.close()


def test_a_broker_that_dies_while_starting_shows_why(local):
    (local.data_dir / "data").mkdir(parents=True)
    (local.data_dir / "data" / "meta.properties").write_text("version=1\nnode.id=7\ncluster.id=of-another-broker\n")
    with pytest.raises(DeploymentError, match=r"died while starting(.|\n)*of-another-broker|node"):
        local.start()
    assert not local.status().running
    assert not (local.data_dir / "broker.pid").exists()


def test_a_setting_that_kafka_refuses_is_shown(tmp_path):
    local = LocalBroker(tmp_path / "broker", port=0, properties={"log.segment.bytes": "not a number"})
    with pytest.raises(DeploymentError, match="not a number"):
        local.start()


def test_the_log_can_be_followed_until_the_broker_stops(local):
    local.start()
    lines: list[str] = []
    follower = threading.Thread(target=lambda: lines.extend(local.follow(1)))
    follower.start()
    wait_for(lambda: len(lines) > 0)  # the last line there was: from here on it follows
    local.stop()
    follower.join(timeout=WAIT_SECONDS)
    assert not follower.is_alive()
    assert any("shut down completed" in line for line in lines)
    assert lines == local.logs(len(lines))


def test_the_command_line_starts_reports_and_stops_it(tmp_path):
    started = millrace("broker", "start", "--port", "0", cwd=tmp_path)
    try:
        assert started.returncode == 0, started.stderr
        [row] = json.loads(millrace("broker", "status", "--format", "json", cwd=tmp_path).stdout)
        assert row["state"] == "running"
        assert Path(row["data_dir"]) == tmp_path / ".millrace" / "broker"
        again = millrace("broker", "start", cwd=tmp_path)
        assert (again.returncode, "already" in again.stderr) == (0, True)
        created = millrace("topics", "create", "--bootstrap-servers", row["address"], cwd=tmp_path)
        assert created.returncode == 0, created.stderr
        checked = millrace("topics", "check", "--bootstrap-servers", row["address"], cwd=tmp_path)
        assert checked.returncode == 0, checked.stderr
        missing = millrace(
            "topics", "check", "--bootstrap-servers", row["address"], cwd=tmp_path, MILLRACE_TOPICS__DOMAIN="other"
        )
        assert missing.returncode == 1
        assert "millrace topics create" in missing.stdout
        assert "Kafka Server started" in millrace("broker", "logs", "-n", "1000", cwd=tmp_path).stdout
    finally:
        stopped = millrace("broker", "stop", cwd=tmp_path)
    assert stopped.returncode == 0
    assert "has stopped" in stopped.stderr
