"""Three brokers on loopback, for what one cannot show: leaders that die while the others go on.

    with LocalCluster(folder) as cluster:
        cluster.kill(1)         # SIGKILL: its partitions get other leaders
        cluster.restart(1)      # returns once it is in service and every replica is in sync again

Each node is a `LocalBroker` whose `broker.json` was written beforehand, so that all bear one cluster id and know each
other's controllers. Every topic has three replicas, two of which must have a record before it counts (min ISR 2): with one
node down nothing stops, with two down nothing is acknowledged.
"""

from __future__ import annotations

import base64
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, Self

import msgspec
from kafka.admin import KafkaAdminClient
from kafka.errors import KafkaError

from pipeline.kafka import jars
from pipeline.kafka.broker import HOST, LocalBroker, _free_port, _Identity

JVM_OPTIONS: Final = "-Xms128m -Xmx384m"
SYNC_SECONDS: Final = 90.0
"""How long a node that came back may take to catch up; on two loaded cores ten seconds are usual."""


class LocalCluster:
    """Nodes are numbered from 1. `folder` holds one broker's folder for each: node-1, node-2 …"""

    def __init__(self, folder: Path, nodes: int = 3) -> None:
        self.folder = folder
        self._identities = _identities(nodes)
        quorum = ",".join(f"{n}@{HOST}:{one.controller_port}" for n, one in self._identities.items())
        self._brokers = {
            number: LocalBroker(
                folder / f"node-{number}",
                properties=_properties(number, nodes, quorum),
                jvm_options=JVM_OPTIONS,
            )
            for number in self._identities
        }

    @property
    def nodes(self) -> list[int]:
        return list(self._brokers)

    @property
    def bootstrap_servers(self) -> str:
        """All nodes, whether they run or not."""
        return ",".join(f"{HOST}:{one.port}" for one in self._identities.values())

    def start(self) -> None:
        """Starts every node and returns when all are in service."""
        jars.resolve()  # once, not three times side by side
        for number, broker in self._brokers.items():
            broker.data_dir.mkdir(parents=True, exist_ok=True)
            path = broker.data_dir / "broker.json"
            path.write_bytes(msgspec.json.encode(self._identities[number]))
        try:
            # A node answers only once it has found a majority: one after the other none would ever come up.
            with ThreadPoolExecutor(len(self._brokers)) as side_by_side:
                list(side_by_side.map(LocalBroker.start, self._brokers.values()))
            self.wait_until_in_sync()
        except BaseException:
            self.stop()
            raise

    def kill(self, node: int) -> None:
        """SIGKILL, and gone when this returns. Nothing happens where it does not run."""
        broker = self._brokers[node]
        pid = broker.status().pid
        if pid is None:
            return
        os.kill(pid, signal.SIGKILL)
        if broker._process is not None:
            broker._process.wait(timeout=10.0)

    def restart(self, node: int) -> None:
        """Starts a node that was killed, and waits until every partition has all its replicas in sync."""
        self._brokers[node].start()
        self._require_its_ports(node)
        self.wait_until_in_sync()

    def stop(self) -> None:
        """Ends every node at once: what it held is thrown away with the folder. A node told politely would wait for a
        majority that is just going, too."""
        for node in self.nodes:
            self.kill(node)

    def wait_until_in_sync(self, timeout_seconds: float = SYNC_SECONDS) -> None:
        """Returns when all nodes are in service and no partition lacks a replica."""
        deadline = time.monotonic() + timeout_seconds
        while (missing := self._missing()) is not None:
            if time.monotonic() > deadline:
                raise AssertionError(f"the cluster is not whole after {timeout_seconds:.0f} s: {missing}")
            time.sleep(0.3)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _require_its_ports(self, node: int) -> None:
        if self._brokers[node]._identity() != self._identities[node]:
            raise AssertionError(f"node {node} came back on other ports: another program took one of its own")

    def _missing(self) -> str | None:
        """What the cluster lacks; None: nothing."""
        try:
            with KafkaAdminClient(
                bootstrap_servers=self.bootstrap_servers.split(","),
                bootstrap_timeout_ms=5_000,
                request_timeout_ms=5_000,
            ) as admin:
                in_service = {b["broker_id"] for b in admin.describe_cluster()["brokers"] if not b.get("is_fenced")}
                if in_service != set(self.nodes):
                    return f"nodes in service: {sorted(in_service)}"
                behind = _behind(admin.describe_topics())
        except (OSError, KafkaError) as error:
            return repr(error)
        return f"replicas behind: {behind}" if behind else None


def _identities(nodes: int) -> dict[int, _Identity]:
    # Kafka wants 16 random bytes, URL-safe base64 without padding, and no "-" in front.
    cluster_id = "M" + base64.urlsafe_b64encode(os.urandom(16)).decode()[1:22]
    ports: list[int] = []
    while len(ports) < 2 * nodes:
        port = _free_port()
        if port not in ports:
            ports.append(port)
    return {n + 1: _Identity(cluster_id, ports[2 * n], ports[2 * n + 1]) for n in range(nodes)}


def _properties(node: int, nodes: int, quorum: str) -> dict[str, str]:
    in_sync = str(max(1, nodes - 1))
    return {
        "node.id": str(node),
        "controller.quorum.voters": quorum,
        "broker.session.timeout.ms": "6000",
        "default.replication.factor": str(nodes),
        "min.insync.replicas": in_sync,
        "offsets.topic.replication.factor": str(nodes),
        "transaction.state.log.replication.factor": str(nodes),
        "transaction.state.log.min.isr": in_sync,
        "transaction.abort.timed.out.transaction.cleanup.interval.ms": "1000",
        "share.coordinator.state.topic.replication.factor": str(nodes),
        "share.coordinator.state.topic.min.isr": in_sync,
    }


def _behind(topics: list[dict[str, object]]) -> list[str]:
    """Partitions some replica of which is not in sync, as topic-partition."""
    return [
        f"{topic['name']}-{partition['partition_index']}"
        for topic in topics
        for partition in topic["partitions"]
        if len(partition["isr_nodes"]) < len(partition["replica_nodes"]) or partition["leader_id"] < 0
    ]
