"""A local Apache Kafka: one KRaft JVM on loopback, for trying things out, for the demo and for the tests.

    broker = LocalBroker(Path(".millrace/broker"))
    broker.start()      # returns when the broker answers
    broker.stop()       # topics and offsets stay in the folder

The data folder holds everything one broker is:

    broker.json         what stays the same between starts: cluster id, ports
    broker.pid          the process, while it runs
    broker.log          what the JVM printed
    server.properties   written anew at each start
    log4j2.yaml         likewise
    data/               Kafka's own storage

Two brokers are two data folders. Every client port and controller port is chosen so that they do not meet.
"""

import base64
import os
import random
import shlex
import signal
import socket
import subprocess
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
from kafka.admin import KafkaAdminClient
from kafka.errors import KafkaError

from pipeline.errors import DeploymentError
from pipeline.kafka import jars

HOST = "127.0.0.1"
DEFAULT_PORT = 9092
DEFAULT_DATA_DIR = Path(".millrace/broker")
DEFAULT_JVM_OPTIONS = "-Xms256m -Xmx512m"
START_TIMEOUT_SECONDS = 120.0  # about 4 when the machine is idle; a loaded one takes long
STOP_TIMEOUT_SECONDS = 20.0
# Below the range from which the kernel gives ports to outgoing connections (32768 and up on Linux), so that none of
# those takes a port between our look at it and the JVM's, or while the broker is stopped.
FREE_PORTS = range(20_000, 32_768)
LOG_ROTATE_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True)
class BrokerStatus:
    """What is known of a broker. Stopped: `pid` is None, `address` where it answered last (None: never started)."""

    running: bool
    pid: int | None
    address: str | None
    data_dir: Path
    version: str


class _Identity(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """broker.json: what one broker keeps between starts."""

    cluster_id: str
    port: int
    controller_port: int


class LocalBroker:
    """One broker in one data folder.

    Args:
        data_dir: where the broker lives; made when missing.
        port: for clients, on 127.0.0.1. None: the one this folder used last, else 9092. 0: a free one.
        properties: Kafka's server.properties, added to those written here or in their place.
        cache_dir: where the jars are kept (default: $XDG_CACHE_HOME/millrace or ~/.cache/millrace).
        jvm_options: for the java command line, such as "-Xmx2g" (default: $KAFKA_HEAP_OPTS, else -Xms256m -Xmx512m).
    """

    def __init__(
        self,
        data_dir: Path = DEFAULT_DATA_DIR,
        port: int | None = None,
        *,
        properties: Mapping[str, str] | None = None,
        cache_dir: Path | None = None,
        jvm_options: str | None = None,
    ) -> None:
        self.data_dir = data_dir.absolute()
        self._requested_port = port
        self._properties = dict(properties or {})
        self._cache_dir = cache_dir
        self._jvm_options = jvm_options or os.environ.get("KAFKA_HEAP_OPTS") or DEFAULT_JVM_OPTIONS
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def bootstrap_servers(self) -> str:
        """The address for clients, once started."""
        identity = self._identity()
        if identity is None:
            raise DeploymentError(f"The broker in {self.data_dir} was never started, so it has no address yet.")
        return _address(identity.port)

    def start(self) -> BrokerStatus:
        """Starts the broker and returns when it answers; where it runs already, returns its status at once.

        Raises:
            DeploymentError: no Java, no jars, the port is taken, or the broker died or did not answer while starting.
        """
        self.data_dir.mkdir(parents=True, exist_ok=True)
        with jars.exclusive(self.data_dir / "broker.lock"):
            status = self.status()
            if status.running:
                self._refuse_another_port(status)
                return status
            java = jars.find_java()
            classpath = str(jars.resolve(self._cache_dir) / "*")
            identity = self._choose_identity()
            self._write_configuration(identity)
            self._format(java, classpath)
            self._launch(java, classpath)
            self._wait_until_it_answers(identity)
        return self.status()

    def stop(self) -> bool:
        """Stops the broker and waits for its end: SIGTERM first, SIGKILL after 20 s. False: it was not running."""
        if not self.data_dir.is_dir():
            return False
        with jars.exclusive(self.data_dir / "broker.lock"):
            pid = self._running_pid()
            if pid is not None:
                self._end(pid)
            (self.data_dir / "broker.pid").unlink(missing_ok=True)
        return pid is not None

    def status(self) -> BrokerStatus:
        """Running or not, and where. Looks at the process, so a broker that was killed counts as stopped."""
        identity, pid = self._identity(), self._running_pid()
        return BrokerStatus(
            running=pid is not None,
            pid=pid,
            address=_address(identity.port) if identity else None,
            data_dir=self.data_dir,
            version=jars.kafka_version(jars.resource("pom.xml")),
        )

    def logs(self, lines: int | None = None) -> list[str]:
        """The last lines of the log, oldest first; None: all. Empty when the broker was never started."""
        if not self.log_path.is_file():
            return []
        with self.log_path.open(encoding="utf-8", errors="replace") as log:
            return [line.rstrip("\n") for line in deque(log, maxlen=lines)]

    def follow(self, lines: int | None = None, poll_seconds: float = 0.25) -> Iterator[str]:
        """The last lines of the log, as `logs` has them, then new ones as they come, until the broker has stopped."""
        if not self.log_path.is_file():
            return
        with self.log_path.open("rb") as log:
            *whole, rest = log.read().split(b"\n")
            yield from (line.decode(errors="replace") for line in (whole if lines is None else deque(whole, lines)))
            running = True
            while running:
                running = self._running_pid() is not None  # asked before reading, so that its last words are read
                *whole, rest = (rest + log.read()).split(b"\n")
                yield from (line.decode(errors="replace") for line in whole)
                time.sleep(poll_seconds if running else 0.0)
            if rest:
                yield rest.decode(errors="replace")

    @property
    def log_path(self) -> Path:
        """Where the JVM's output goes."""
        return self.data_dir / "broker.log"

    # -- who we are: the files of the data folder

    def _identity(self) -> _Identity | None:
        path = self.data_dir / "broker.json"
        if not path.is_file():
            return None
        try:
            return msgspec.json.decode(path.read_bytes(), type=_Identity)
        except msgspec.DecodeError as error:
            raise DeploymentError(
                f"{path} is not what a broker wrote there ({error}): move the folder {self.data_dir} away, "
                "or name another with --data-dir."
            ) from error

    def _choose_identity(self) -> _Identity:
        known = self._identity()
        port = self._choose_port(known)
        controller_port = known.controller_port if known else 0
        if controller_port == port or not _is_free(controller_port):
            controller_port = _free_port(but=port)
        # Kafka wants 16 random bytes, URL-safe base64 without padding (kafka-storage random-uuid). One that began
        # with "-" would be read as an option by the formatter's command line.
        cluster_id = known.cluster_id if known else "M" + base64.urlsafe_b64encode(os.urandom(16)).decode()[1:22]
        identity = _Identity(cluster_id, port, controller_port)
        _write_whole(self.data_dir / "broker.json", msgspec.json.encode(identity))
        return identity

    def _choose_port(self, known: _Identity | None) -> int:
        if known:
            _wait_until_free(known.port)
        if self._requested_port == 0:
            return known.port if known and _is_free(known.port) else _free_port()
        port = self._requested_port or (known.port if known else DEFAULT_PORT)
        if not _is_free(port):
            raise DeploymentError(
                f"Port {port} on {HOST} is taken by another program (another broker?). Choose another with --port "
                f"({_free_port()} is free; 0 picks one). If it is a Kafka broker, use that one: "
                f"--bootstrap-servers {_address(port)}."
            )
        return port

    def _refuse_another_port(self, status: BrokerStatus) -> None:
        if self._requested_port and status.address != _address(self._requested_port):
            raise DeploymentError(
                f"The broker in {self.data_dir} runs at {status.address} already, not at port {self._requested_port}: "
                "stop it first (millrace broker stop), or give the new one a folder of its own with --data-dir."
            )

    def _write_configuration(self, identity: _Identity) -> None:
        settings = server_properties(identity.port, identity.controller_port, self.data_dir / "data") | self._properties
        text = "".join(f"{key}={value}\n" for key, value in settings.items())
        _write_whole(self._properties_path, text.encode())
        _write_whole(self.data_dir / "log4j2.yaml", jars.resource("log4j2.yaml"))

    @property
    def _properties_path(self) -> Path:
        return self.data_dir / "server.properties"

    # -- the process

    def _java_command(self, java: str, classpath: str) -> list[str]:
        logging = f"-Dlog4j2.configurationFile={self.data_dir / 'log4j2.yaml'}"
        return [java, *shlex.split(self._jvm_options), logging, "-cp", classpath]

    def _format(self, java: str, classpath: str) -> None:
        """Prepares Kafka's storage; skipped where that has been done, because it costs a second JVM."""
        identity = self._identity()
        if identity is None or (self.data_dir / "data" / "meta.properties").is_file():
            return
        arguments = ["format", "--ignore-formatted", "-t", identity.cluster_id, "-c", str(self._properties_path)]
        done = subprocess.run(
            [*self._java_command(java, classpath), "kafka.tools.StorageTool", *arguments],
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        if done.returncode != 0:
            said = (done.stdout + done.stderr).splitlines()
            raise DeploymentError(_failure("Kafka could not format its storage", said))

    def _launch(self, java: str, classpath: str) -> None:
        if self.log_path.is_file() and self.log_path.stat().st_size > LOG_ROTATE_BYTES:
            self.log_path.replace(self.log_path.with_suffix(".log.1"))
        command = [*self._java_command(java, classpath), "kafka.Kafka", str(self._properties_path)]
        with self.log_path.open("ab") as log:
            self._log_begin_bytes = log.tell()
            # A session of its own: Ctrl-C in the terminal that started it must not stop the broker.
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        _write_whole(self.data_dir / "broker.pid", f"{self._process.pid}\n".encode())

    def _wait_until_it_answers(self, identity: _Identity) -> None:
        """Asks for the cluster's metadata until our own cluster id and a live broker come back: less is not ready."""
        deadline = time.monotonic() + START_TIMEOUT_SECONDS
        try:
            while not _answers(identity):
                self._raise_if_it_failed(identity, too_late=time.monotonic() > deadline)
                time.sleep(0.1)
        except BaseException:  # Ctrl-C too: what does not answer must not stay behind
            if (pid := self._running_pid()) is not None:
                self._end(pid)
            (self.data_dir / "broker.pid").unlink(missing_ok=True)
            raise

    def _raise_if_it_failed(self, identity: _Identity, *, too_late: bool) -> None:
        exit_status = self._process.poll() if self._process else None
        if exit_status is not None:
            raise DeploymentError(
                _failure(f"The broker died while starting (exit status {exit_status})", self._new_log())
            )
        if too_late:
            what = f"The broker did not answer at {_address(identity.port)} within {START_TIMEOUT_SECONDS:.0f} s"
            raise DeploymentError(_failure(f"{what} and was stopped", self._new_log()))

    def _new_log(self) -> list[str]:
        with self.log_path.open("rb") as log:
            log.seek(self._log_begin_bytes)
            return log.read().decode(errors="replace").splitlines()

    def _running_pid(self) -> int | None:
        """The pid of our JVM, if it lives.

        A pid file can outlive its process, and the kernel gives pids out again: a process is ours only if its command
        line names our own server.properties.
        """
        try:
            pid = int((self.data_dir / "broker.pid").read_text())
        except (FileNotFoundError, ValueError):
            return None
        return pid if str(self._properties_path) in _command_line(pid) else None

    def _end(self, pid: int) -> None:
        for number, timeout_seconds in ((signal.SIGTERM, STOP_TIMEOUT_SECONDS), (signal.SIGKILL, 5.0)):
            if self._running_pid() == pid:
                os.kill(pid, number)
            if self._wait_for_end(pid, timeout_seconds):
                return
        raise DeploymentError(f"The broker (pid {pid}) did not end, not even on SIGKILL: see `ps -p {pid}`.")

    def _wait_for_end(self, pid: int, timeout_seconds: float) -> bool:
        deadline = time.monotonic() + timeout_seconds
        while self._running_pid() == pid:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        if self._process is not None and self._process.pid == pid:
            self._process.wait(timeout=5.0)
        return True


def server_properties(port: int, controller_port: int, log_dir: Path) -> dict[str, str]:
    """server.properties of one node that is broker and controller, on loopback.

    Internal topics have few partitions: a faster start, and less for a coordinator to load.
    """
    return {
        "process.roles": "broker,controller",
        "node.id": "1",
        "controller.quorum.voters": f"1@{HOST}:{controller_port}",
        "listeners": f"PLAINTEXT://{HOST}:{port},CONTROLLER://{HOST}:{controller_port}",
        "advertised.listeners": f"PLAINTEXT://{HOST}:{port}",
        "inter.broker.listener.name": "PLAINTEXT",
        "controller.listener.names": "CONTROLLER",
        "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
        "log.dirs": str(log_dir),
        "auto.create.topics.enable": "false",  # a typing error in a topic's name must be an error
        "group.initial.rebalance.delay.ms": "0",
        "log.cleaner.dedupe.buffer.size": "1048577",  # the least Kafka takes; the default is 128 MB of heap
        "offsets.topic.replication.factor": "1",
        "offsets.topic.num.partitions": "4",
        "transaction.state.log.replication.factor": "1",
        "transaction.state.log.min.isr": "1",
        "transaction.state.log.num.partitions": "4",
        "share.coordinator.state.topic.replication.factor": "1",
        "share.coordinator.state.topic.min.isr": "1",
        "share.coordinator.state.topic.num.partitions": "1",
    }


def _address(port: int) -> str:
    return f"{HOST}:{port}"


def _is_free(port: int) -> bool:
    if not 0 < port < 65_536:
        return False
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # As the JVM binds: a port on which only closed connections linger is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
        return True


def _wait_until_free(port: int, at_most_seconds: float = 2.0) -> None:
    """A broker that was killed a moment ago can hold its ports a little longer than its process is to be seen."""
    deadline = time.monotonic() + at_most_seconds
    while not _is_free(port) and time.monotonic() < deadline:
        time.sleep(0.05)


def _free_port(but: int = 0) -> int:
    """A free port, other than `but`. Random, so that brokers that start at the same moment choose differently."""
    for port in random.sample(FREE_PORTS, 200):
        if port != but and _is_free(port):
            return port
    raise DeploymentError(f"No free port found between {FREE_PORTS.start} and {FREE_PORTS.stop}: name one with --port.")


def _answers(identity: _Identity) -> bool:
    """Whether our broker answers a metadata request and is in service: a fenced one is not in the cluster's list."""
    try:
        with socket.create_connection((HOST, identity.port), timeout=1.0):
            pass
        with KafkaAdminClient(
            bootstrap_servers=_address(identity.port), bootstrap_timeout_ms=2_000, request_timeout_ms=5_000
        ) as admin:
            cluster = admin.describe_cluster()
    except (OSError, KafkaError):
        return False
    return cluster["cluster_id"] == identity.cluster_id and any(
        not broker.get("is_fenced") for broker in cluster["brokers"]
    )


def _command_line(pid: int) -> str:
    """The command line of a process; empty when there is none, or when it has ended and waits to be reaped."""
    if Path("/proc/self/cmdline").exists():
        try:
            return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            return ""
    listing = subprocess.run(["ps", "-o", "command=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return listing.stdout


def _write_whole(path: Path, content: bytes) -> None:
    """Writes a file so that a reader sees the old content or the new, never a half."""
    scratch = path.with_name(path.name + ".new")
    scratch.write_bytes(content)
    scratch.replace(path)


def _failure(what: str, log: list[str]) -> str:
    """What happened and the last log lines that say why; frames of a Java stack trace say it too, at length, and go."""
    telling = [line for line in log if line.strip() and not line.startswith("\tat ")]
    hint = ""
    if any("UnsupportedClassVersionError" in line for line in log):
        hint = "\nThis Java is too old: Kafka 4 needs 17 or newer (Debian: apt-get install openjdk-17-jre-headless)."
    return f"{what}. Its last lines:\n  " + "\n  ".join(telling[-12:]) + hint
