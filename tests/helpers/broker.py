"""The broker of the tests, and plain kafka-python around it: nothing of ours between a test and what a topic holds."""

import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kafka import KafkaConsumer, KafkaProducer, TopicPartition
from kafka.admin import KafkaAdminClient
from kafka.errors import KafkaError

from pipeline.kafka import jars
from pipeline.kafka.broker import LocalBroker
from tests.helpers.ports import free_port

HOST = "127.0.0.1"
READ_DEADLINE_SECONDS = 60.0


@dataclass(frozen=True)
class RunningBroker:
    """Where the broker of this test session answers, and what kind it is: local, docker or cluster."""

    bootstrap_servers: str
    kind: str
    local: LocalBroker | None = None


def local_broker(folder: Path) -> Iterator[RunningBroker]:
    started = LocalBroker(folder / "broker", port=0)
    started.start()
    try:
        yield RunningBroker(started.bootstrap_servers, "local", started)
    finally:
        started.stop()


def broker_in_container() -> Iterator[RunningBroker]:
    """apache/kafka with two listeners: one for itself (transactions talk through it), one advertised to the host."""
    os.environ.setdefault("TESTCONTAINERS_RYUK_DISABLED", "true")  # the container is stopped here, no reaper needed
    from testcontainers.core.container import DockerContainer

    port = free_port()
    container = DockerContainer(f"apache/kafka:{jars.kafka_version(jars.resource('pom.xml'))}")
    container.with_bind_ports(29092, port)
    for key, value in container_environment(port).items():
        container.with_env(key, value)
    with container:
        address = f"{HOST}:{port}"
        _wait_until_it_answers(address, lambda: "\n".join(part.decode() for part in container.get_logs()))
        yield RunningBroker(address, "docker")


def existing_cluster(address: str) -> Iterator[RunningBroker]:
    _wait_until_it_answers(address, lambda: f"is MILLRACE_TEST_BROKER={address} right?")
    yield RunningBroker(address, "cluster")


def container_environment(host_port: int) -> dict[str, str]:
    """Settings of apache/kafka (KAFKA_A_B becomes a.b) so that 127.0.0.1:host_port reaches its port 29092."""
    return {
        "KAFKA_NODE_ID": "1",
        "KAFKA_PROCESS_ROLES": "broker,controller",
        "KAFKA_CONTROLLER_QUORUM_VOTERS": "1@localhost:9093",
        "KAFKA_LISTENERS": "PLAINTEXT://:9092,HOST://:29092,CONTROLLER://:9093",
        "KAFKA_ADVERTISED_LISTENERS": f"PLAINTEXT://localhost:9092,HOST://{HOST}:{host_port}",
        "KAFKA_LISTENER_SECURITY_PROTOCOL_MAP": "PLAINTEXT:PLAINTEXT,HOST:PLAINTEXT,CONTROLLER:PLAINTEXT",
        "KAFKA_INTER_BROKER_LISTENER_NAME": "PLAINTEXT",
        "KAFKA_CONTROLLER_LISTENER_NAMES": "CONTROLLER",
        "KAFKA_AUTO_CREATE_TOPICS_ENABLE": "false",
        "KAFKA_GROUP_INITIAL_REBALANCE_DELAY_MS": "0",
        "KAFKA_OFFSETS_TOPIC_REPLICATION_FACTOR": "1",
        "KAFKA_OFFSETS_TOPIC_NUM_PARTITIONS": "4",
        "KAFKA_TRANSACTION_STATE_LOG_REPLICATION_FACTOR": "1",
        "KAFKA_TRANSACTION_STATE_LOG_MIN_ISR": "1",
        "KAFKA_TRANSACTION_STATE_LOG_NUM_PARTITIONS": "4",
        "KAFKA_SHARE_COORDINATOR_STATE_TOPIC_REPLICATION_FACTOR": "1",
        "KAFKA_SHARE_COORDINATOR_STATE_TOPIC_MIN_ISR": "1",
    }


def make_topic(broker: RunningBroker, name: str, partitions: int = 1, configs: Mapping[str, str] | None = None) -> str:
    """Creates a topic and returns its name once every partition has a leader."""
    shape = {"num_partitions": partitions, "replication_factor": 1, "configs": dict(configs or {})}
    with KafkaAdminClient(bootstrap_servers=broker.bootstrap_servers) as admin:
        admin.create_topics({name: shape}, wait_for_metadata=True)
    return name


def produce_records(
    broker: RunningBroker,
    topic: str,
    records: Iterable[tuple[bytes | None, bytes | None]] | Iterable[Mapping[str, Any]],
    **producer_options: Any,
) -> list[Any]:
    """Sends (key, value) pairs, or mappings of `KafkaProducer.send`'s arguments (key, value, partition, headers,
    timestamp_ms), in order. Returns the metadata of each: partition, offset, timestamp."""
    producer = KafkaProducer(bootstrap_servers=broker.bootstrap_servers, **producer_options)
    try:
        futures = []
        for record in records:
            arguments = record if isinstance(record, Mapping) else {"key": record[0], "value": record[1]}
            futures.append(producer.send(topic, **arguments))
        producer.flush()
        return [future.get(timeout=READ_DEADLINE_SECONDS) for future in futures]
    finally:
        producer.close()


def read_all(broker: RunningBroker, topic: str, isolation: str = "read_uncommitted") -> list[Any]:
    """Every record that the topic holds now, by (partition, offset), as kafka-python's own iterator decodes them."""
    consumer = KafkaConsumer(
        bootstrap_servers=broker.bootstrap_servers,
        isolation_level=isolation,
        auto_offset_reset="earliest",
        enable_auto_commit=False,
        group_id=None,
    )
    try:
        partitions = [TopicPartition(topic, number) for number in sorted(consumer.partitions_for_topic(topic) or ())]
        if not partitions:
            raise AssertionError(f"topic {topic} does not exist")
        consumer.assign(partitions)
        return sorted(_read_to_the_end(consumer, partitions), key=lambda record: (record.partition, record.offset))
    finally:
        consumer.close()


def _read_to_the_end(consumer: Any, partitions: Sequence[TopicPartition]) -> list[Any]:
    consumer.seek_to_beginning(*partitions)
    ends = consumer.end_offsets(partitions)
    deadline, records = time.monotonic() + READ_DEADLINE_SECONDS, []
    while any(consumer.position(partition) < ends[partition] for partition in partitions):
        for batch in consumer.poll(timeout_ms=200).values():
            records.extend(record for record in batch)
        if time.monotonic() > deadline:
            reached = {partition: consumer.position(partition) for partition in partitions}
            raise AssertionError(f"{partitions[0].topic}: read to {reached}, its end is {ends}")
    return records


def _wait_until_it_answers(address: str, why: Any) -> None:
    deadline = time.monotonic() + 60.0
    while True:
        try:
            with KafkaAdminClient(bootstrap_servers=address, bootstrap_timeout_ms=3_000) as admin:
                if admin.describe_cluster()["brokers"]:
                    return
        except KafkaError:
            pass
        if time.monotonic() > deadline:
            raise AssertionError(f"no broker answered at {address} within 60 s: {why()}")
        time.sleep(0.2)
