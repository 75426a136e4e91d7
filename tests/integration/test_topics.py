"""The seven topics on a real broker: made as the settings need them, and held against them."""

import socket
import time

import pytest
from kafka.admin import ConfigResource, ConfigResourceType, KafkaAdminClient

from pipeline.errors import DeploymentError
from pipeline.kafka import topics
from pipeline.settings import Settings, load
from tests.helpers.broker import RunningBroker, make_topic, produce_records, read_all

LAST_YEAR_MS = 1_600_000_000_000


def settings_for(broker: RunningBroker, domain: str, **more: str) -> Settings:
    overrides = {"kafka.bootstrap_servers": broker.bootstrap_servers, "topics.domain": domain}
    return load(None, environ={}, overrides=overrides | {key.replace("__", "."): value for key, value in more.items()})


@pytest.fixture
def settings(broker: RunningBroker, domain: str) -> Settings:
    return settings_for(broker, domain)


def alter(broker: RunningBroker, topic: str, **configs: str) -> None:
    resource = ConfigResource(
        ConfigResourceType.TOPIC, topic, {key.replace("_", "."): value for key, value in configs.items()}
    )
    with KafkaAdminClient(bootstrap_servers=broker.bootstrap_servers) as admin:
        assert admin.alter_configs([resource])["topic"][topic] == "OK"
        # The controller has answered; what it wrote takes a moment to reach the broker that is asked next.
        deadline = time.monotonic() + 20
        while not shown(admin, topic).items() >= {k.replace("_", "."): v for k, v in configs.items()}.items():
            assert time.monotonic() < deadline
            time.sleep(0.05)


def shown(admin: KafkaAdminClient, topic: str) -> dict[str, str]:
    """A topic's settings as the broker has them now."""
    resource = ConfigResource(ConfigResourceType.TOPIC, topic)
    found = admin.describe_configs([resource], config_filter="all")["topic"][topic]
    return {key: entry["value"] for key, entry in found.items()}


def test_what_create_makes_passes_the_check(settings):
    rows = topics.create(settings)
    assert [row["done"] for row in rows] == ["created"] * 7
    assert [row["partitions"] for row in rows] == [4, 4, 4, 4, 1, 1, 4]
    assert topics.check(settings) == []


def test_create_leaves_topics_that_exist_as_they_are(broker, settings):
    topics.create(settings)
    produce_records(broker, settings.topics.readings_topic, [(b"pump-17", b"{}")])
    assert [row["done"] for row in topics.create(settings)] == ["exists"] * 7
    assert len(read_all(broker, settings.topics.readings_topic)) == 1


def test_the_check_names_each_missing_topic_and_the_command_that_makes_it(settings):
    findings = topics.check(settings)
    assert [finding.topic for finding in findings] == [spec.name for spec in topics.required(settings)]
    assert {(finding.found, finding.mend) for finding in findings} == {("missing", "millrace topics create")}


def test_a_check_makes_no_topics(settings):
    topics.check(settings)
    assert len(topics.check(settings)) == 7


def test_readings_with_another_partition_count_are_kept_and_the_settings_are_to_follow(broker, settings):
    make_topic(broker, settings.topics.readings_topic, partitions=2, configs={"retention.ms": "-1"})
    [finding] = [f for f in topics.check(settings) if f.topic == settings.topics.readings_topic]
    assert (finding.expected, finding.found) == ("4", "2")
    assert "partitions = 2" in finding.mend


def test_forecasts_and_state_must_have_as_many_partitions_as_the_readings(broker, domain):
    two = settings_for(broker, domain, topics__partitions="2")
    make_topic(broker, two.topics.state_topic, partitions=3, configs={"cleanup.policy": "compact"})
    make_topic(
        broker, two.topics.forecasts_topic, 1, {"message.timestamp.type": "LogAppendTime", "retention.ms": "604800000"}
    )
    topics.create(two)
    findings = {finding.topic: finding for finding in topics.check(two)}
    assert findings.keys() == {two.topics.state_topic, two.topics.forecasts_topic}
    assert f"partitions create -p {two.topics.forecasts_topic}:2" in findings[two.topics.forecasts_topic].mend
    assert f"topics delete -t {two.topics.state_topic}" in findings[two.topics.state_topic].mend


def test_a_state_topic_that_is_not_compacted_is_found_and_mended(broker, settings):
    topics.create(settings)
    alter(broker, settings.topics.state_topic, cleanup_policy="delete")
    [finding] = topics.check(settings)
    assert (finding.what, finding.expected, finding.found) == ("cleanup.policy", "compact", "delete")
    assert finding.mend == "millrace topics create --alter"
    topics.create(settings, alter=True)
    assert topics.check(settings) == []


@pytest.mark.parametrize("retention_ms", ["86400000", "604800000"])
def test_readings_that_time_would_delete_are_found(broker, settings, retention_ms):
    topics.create(settings)
    alter(broker, settings.topics.readings_topic, retention_ms=retention_ms)
    [finding] = topics.check(settings)
    assert (finding.what, finding.expected, finding.found) == ("retention.ms", "-1", retention_ms)


def test_alter_changes_only_what_differs(broker, settings):
    topics.create(settings)
    alter(broker, settings.topics.forecasts_topic, retention_ms="1000")
    done = {row["topic"]: row["done"] for row in topics.create(settings, alter=True)}
    assert done.pop(settings.topics.forecasts_topic) == "altered: retention.ms=604800000"
    assert set(done.values()) == {"exists"}


def test_readings_keep_their_own_timestamps_and_forecasts_get_that_of_their_arrival(broker, settings):
    before_ms = time.time_ns() // 1_000_000
    topics.create(settings)
    old = [{"key": b"pump-17", "value": b"{}", "timestamp_ms": LAST_YEAR_MS}]
    for topic in (settings.topics.readings_topic, settings.topics.forecasts_topic):
        produce_records(broker, topic, old)
    [reading] = read_all(broker, settings.topics.readings_topic)
    [forecast] = read_all(broker, settings.topics.forecasts_topic)
    assert reading.timestamp == LAST_YEAR_MS
    assert forecast.timestamp >= before_ms


def test_names_set_in_the_settings_are_used(broker, domain):
    settings = settings_for(broker, domain, topics__readings=f"{domain}.factory-floor")
    topics.create(settings)
    make_sure = {row["topic"] for row in topics.create(settings)}
    assert f"{domain}.factory-floor" in make_sure
    assert f"{domain}.forecasts.v1" in make_sure
    assert f"{domain}.readings.v1" not in make_sure


def test_more_replicas_than_brokers_is_an_error_that_names_the_topic(broker, domain):
    settings = settings_for(broker, domain, topics__replication_factor="100")
    with pytest.raises(DeploymentError, match=rf"create topic {domain}\.readings\.v1"):
        topics.create(settings)


def test_a_broker_that_does_not_answer_is_named_with_what_to_do(monkeypatch):
    monkeypatch.setattr(topics, "UNREACHABLE_AFTER_MS", 500)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts a connection and never speaks
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        settings = load(None, environ={}, overrides={"kafka.bootstrap_servers": address})
        for call in (topics.create, topics.check):
            with pytest.raises(DeploymentError, match=rf"(?s){address}.*millrace broker start.*--bootstrap-servers"):
                call(settings)
