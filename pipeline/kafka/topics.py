"""The topics that the settings need: what they must look like, making them, and holding a cluster against it.

- readings: `topics.partitions` partitions, kept by the record's timestamp, for ever unless set: a replay of last year
  has last year's timestamps, and time-based retention would delete it as it comes.
- forecasts, dead letters: as many partitions, kept by arrival: those about last year are as new as the others.
- state: as many partitions, compacted: the last checkpoint of each block of sensors is the state.
- models: one partition, compacted. control: one partition, kept for 7 days.
- scores: as many partitions as the readings, kept by arrival.

Partition *p* of readings, forecasts, dead letters, state and scores belong together, so their counts must be equal.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from kafka.admin import ConfigResource, ConfigResourceType, KafkaAdminClient
from kafka.errors import (
    KafkaError,
    KafkaTimeoutError,
    TopicAlreadyExistsError,
    UnknownTopicOrPartitionError,
    for_code,
)

from pipeline.errors import DeploymentError
from pipeline.settings import Settings

UNREACHABLE_AFTER_MS = 8_000
REQUEST_TIMEOUT_MS = 15_000
CONTROL_RETENTION_MS = 7 * 24 * 3_600_000
SCORES_RETENTION_MS = 90 * 24 * 3_600_000
FOREVER_MS = -1
WITH_READINGS = frozenset(
    {"forecasts", "dead_letters", "state", "scores"}
)  # partition p of these belongs to p of the readings
TUNING = frozenset(
    {"min.cleanable.dirty.ratio", "segment.bytes"}
)  # set at creation; a topic that differs works all the same


@dataclass(frozen=True)
class TopicSpec:
    """What one topic must look like. `role` is its key in [topics]; `configs` are Kafka's topic configs, as text."""

    role: str
    name: str
    partitions: int
    replication_factor: int
    configs: Mapping[str, str]


@dataclass(frozen=True)
class Finding:
    """One thing about one topic that is not as the settings need it, and what mends it."""

    topic: str
    what: str
    expected: str
    found: str
    mend: str


def required(settings: Settings) -> tuple[TopicSpec, ...]:
    """The seven topics, readings first."""
    topics = settings.topics
    # Recovery reads the whole log, and compaction leaves the newest segment alone: by default that is a gigabyte. It also
    # waits until half of the log is outdated by default. (50 MB: as Kafka Streams sets it for its changelogs.)
    compacted = {"cleanup.policy": "compact", "min.cleanable.dirty.ratio": "0.1", "segment.bytes": "52428800"}
    readings = _by_arrival(topics.readings_retention_ms) | {"message.timestamp.type": "CreateTime"}
    shapes: tuple[tuple[str, str, int, dict[str, str]], ...] = (
        ("readings", topics.readings_topic, topics.partitions, readings),
        ("forecasts", topics.forecasts_topic, topics.partitions, _by_arrival(topics.forecasts_retention_ms)),
        ("dead_letters", topics.dead_letters_topic, topics.partitions, _by_arrival(topics.dead_letters_retention_ms)),
        ("state", topics.state_topic, topics.partitions, compacted),
        ("models", topics.models_topic, 1, compacted),
        ("control", topics.control_topic, 1, _by_arrival(CONTROL_RETENTION_MS)),
        ("scores", topics.scores_topic, topics.partitions, _by_arrival(SCORES_RETENTION_MS)),
    )
    return tuple(
        TopicSpec(role, name, partitions, topics.replication_factor, configs)
        for role, name, partitions, configs in shapes
    )


def create(settings: Settings, *, alter: bool = False) -> list[dict[str, str | int]]:
    """Makes the topics that are missing. One row a topic: topic, partitions, done.

    A topic that exists is left as it is, unless `alter`: then its configs (not its partitions) become what is needed.

    Raises:
        DeploymentError: no broker answers, or it refuses.
    """
    with _admin(settings) as admin:
        found = _describe(admin, required(settings))
        return [_create_one(admin, spec, found[spec.name], alter=alter) for spec in required(settings)]


def check(settings: Settings) -> list[Finding]:
    """Everything about the seven topics that is not as the settings need it; an empty list: all is well.

    Raises:
        DeploymentError: no broker answers, or it refuses.
    """
    specs = required(settings)
    with _admin(settings) as admin:
        found = _describe(admin, specs)
    return [finding for spec in specs for finding in _compare(spec, found, settings)]


def require(settings: Settings, *names: str) -> None:
    """Raises DeploymentError, with what mends it, unless these topics exist, with the partitions that they need, and none of them
    that is to be compacted is deleted by age."""
    compacted = {spec.name for spec in required(settings) if spec.configs["cleanup.policy"] == "compact"}
    for finding in check(settings):
        vital = finding.what == "topic" or finding.what.startswith("partitions")
        vital |= finding.what == "cleanup.policy" and finding.topic in compacted
        if vital and finding.topic in names:
            raise DeploymentError(
                f'topic "{finding.topic}": {finding.what}: expected {finding.expected}, found {finding.found}; {finding.mend}'
            )


def group_members(settings: Settings, group_id: str) -> int:
    """How many members a consumer group has now; 0 where it does not exist.

    Raises:
        DeploymentError: no broker answers, or it refuses.
    """
    with _admin(settings) as admin:
        found = admin.describe_groups([group_id])
        return sum(len(group["members"]) for group in found.values() if group.get("group_state") not in (None, "Dead"))


@dataclass(frozen=True)
class _Found:
    """A topic as the cluster has it."""

    partitions: int
    replication_factor: int
    configs: Mapping[str, str]


def _create_one(admin: KafkaAdminClient, spec: TopicSpec, found: _Found | None, *, alter: bool) -> dict[str, str | int]:
    done = "exists"
    if found is None:
        done = "created" if _make(admin, spec) else "exists"
    elif alter and (changes := {key: value for key, value in spec.configs.items() if found.configs.get(key) != value}):
        _alter(admin, spec.name, changes)
        done = "altered: " + ", ".join(f"{key}={value}" for key, value in changes.items())
    return {"topic": spec.name, "partitions": found.partitions if found else spec.partitions, "done": done}


def _make(admin: KafkaAdminClient, spec: TopicSpec) -> bool:
    """False: another process made it in the meantime."""
    request = {
        spec.name: {
            "num_partitions": spec.partitions,
            "replication_factor": spec.replication_factor,
            "configs": dict(spec.configs),
        }
    }
    try:
        admin.create_topics(request, timeout_ms=REQUEST_TIMEOUT_MS, wait_for_metadata=True)
    except TopicAlreadyExistsError:
        return False
    except KafkaError as error:
        raise DeploymentError(f"The broker refused to create topic {spec.name}: {error}") from error
    return True


def _alter(admin: KafkaAdminClient, name: str, changes: Mapping[str, str]) -> None:
    resource = ConfigResource(ConfigResourceType.TOPIC, name, dict(changes))
    answer = admin.alter_configs([resource])["topic"][name]
    if answer != "OK":
        raise DeploymentError(f"The broker refused to alter topic {name} ({dict(changes)}): {answer}")


def _describe(admin: KafkaAdminClient, specs: Sequence[TopicSpec]) -> dict[str, _Found | None]:
    """Each topic as the cluster has it, None where it is missing."""
    found: dict[str, _Found | None] = {spec.name: None for spec in specs}
    topics: list[dict[str, Any]] = [t for t in admin.describe_topics(list(found)) if _exists(t)]
    if not topics:
        return found
    resources = [ConfigResource(ConfigResourceType.TOPIC, topic["name"]) for topic in topics]
    configs = admin.describe_configs(resources, config_filter="all")["topic"]
    for topic in topics:
        found[topic["name"]] = _Found(
            partitions=len(topic["partitions"]),
            replication_factor=min(len(partition["replica_nodes"]) for partition in topic["partitions"]),
            configs={key: entry["value"] for key, entry in configs[topic["name"]].items()},
        )
    return found


def _exists(topic: Mapping[str, Any]) -> bool:
    error = for_code(topic["error_code"])
    if error is UnknownTopicOrPartitionError:
        return False
    if topic["error_code"]:
        raise DeploymentError(f"The broker does not describe topic {topic['name']}: {error.__name__}.")
    return True


def _compare(spec: TopicSpec, found: Mapping[str, _Found | None], settings: Settings) -> Iterator[Finding]:
    topic = found[spec.name]
    if topic is None:
        yield Finding(spec.name, "topic", "exists", "missing", "millrace topics create")
        return
    yield from _compare_partitions(spec, topic, found[settings.topics.readings_topic], settings)
    if topic.replication_factor < spec.replication_factor:
        expected, has = str(spec.replication_factor), str(topic.replication_factor)
        mend = "set [topics] replication_factor to what it has, or reassign its replicas (kafka-reassign-partitions)"
        yield Finding(spec.name, "replication factor", expected, has, mend)
    for key, expected in spec.configs.items():
        has = topic.configs.get(key, "")
        if key not in TUNING and has != expected:
            yield Finding(spec.name, key, expected, has, "millrace topics create --alter")


def _compare_partitions(
    spec: TopicSpec, topic: _Found, readings: _Found | None, settings: Settings
) -> Iterator[Finding]:
    """Readings are held against the settings, what goes with them against the readings, the rest against 1."""
    expected = spec.partitions
    if spec.role in WITH_READINGS and readings is not None:
        expected = readings.partitions
    if topic.partitions == expected:
        return
    admin = f"python -m kafka.admin -b {settings.kafka.bootstrap_servers}"
    if spec.role == "readings":
        mend = f"set [topics] partitions = {topic.partitions}: more partitions would send keys elsewhere"
    elif topic.partitions < expected:
        mend = f"{admin} partitions create -p {spec.name}:{expected}"
    else:
        mend = f"{admin} topics delete -t {spec.name} (its records go), then millrace topics create"
    what = "partitions, as the readings" if spec.role in WITH_READINGS else "partitions"
    yield Finding(spec.name, what, str(expected), str(topic.partitions), mend)


@contextmanager
def _admin(settings: Settings) -> Iterator[KafkaAdminClient]:
    """An admin client, or a clear error within ten seconds; what the broker refuses meanwhile becomes an error too."""
    options = settings.kafka.client_options()
    try:
        client = KafkaAdminClient(
            **options, bootstrap_timeout_ms=UNREACHABLE_AFTER_MS, request_timeout_ms=REQUEST_TIMEOUT_MS
        )
    except KafkaTimeoutError as error:
        raise DeploymentError(_unreachable(settings)) from error
    except KafkaError as error:
        raise DeploymentError(f"{_unreachable(settings)} The client says: {error}") from error
    try:
        yield client
    except KafkaError as error:
        raise DeploymentError(f"The broker at {settings.kafka.bootstrap_servers} refused: {error}") from error
    finally:
        client.close()


def _unreachable(settings: Settings) -> str:
    host, _, port = settings.kafka.bootstrap_servers.partition(":")
    # The settings may name a port of their own for the local broker; the command does not read them.
    with_port = f" --port {port}" if host in ("127.0.0.1", "localhost") and port.isdigit() and port != "9092" else ""
    return (
        f"No Kafka broker answered at {settings.kafka.bootstrap_servers} within {UNREACHABLE_AFTER_MS / 1000:.0f} s. "
        f"Start one with `millrace broker start{with_port}`, or name another with --bootstrap-servers HOST:PORT or "
        "[kafka] bootstrap_servers; for a secured cluster see [kafka] security_protocol."
    )


def _by_arrival(retention_ms: int | None) -> dict[str, str]:
    """Configs of a topic whose records are kept for a time after they arrived, whatever time they speak of."""
    return {
        "cleanup.policy": "delete",
        "message.timestamp.type": "LogAppendTime",
        "retention.ms": str(FOREVER_MS if retention_ms is None else retention_ms),
    }
