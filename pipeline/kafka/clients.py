"""Consumers and producers as Millrace uses them: made in one place, bounded in time, their failures told in
Millrace's words."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import kafka
from kafka import KafkaConsumer, KafkaProducer
from kafka.errors import (
    AuthorizationError,
    KafkaConfigurationError,
    KafkaError,
    RetriableError,
    SaslAuthenticationFailedError,
)

from pipeline.errors import BrokerUnavailable, DeploymentError

log = logging.getLogger(__name__)

KNOWN_CLIENT_VERSION = "3.0.12"
"""The kafka-python release whose private parts `columnar.py` and `sink.py` hook into: the fetcher's PartitionRecords,
its fetch_records, the producer's accumulator. They were read and tested against this release only; another one may
move them silently, so with any other the client's public, slower interface serves. Raise this together with the pin
in pyproject.toml, after tests/contract has passed."""

BOOTSTRAP_TIMEOUT_MS = 15_000
REQUEST_TIMEOUT_MS = 30_000
RECONNECT_BACKOFF_MAX_MS = 5_000
"""The client's default of 30 s leaves a broker that has come back unnoticed for as long."""
METADATA_TIMEOUT_MS = 15_000
"""How long a topic may be unknown to the broker, which a topic created a moment ago is."""
MAX_REQUEST_BYTES = 1_048_576
"""Kafka's default for max.request.size; a broker's default message.max.bytes is 12 bytes more."""


class KafkaSettings(Protocol):
    """The part of `settings.kafka` that the clients need."""

    @property
    def bootstrap_servers(self) -> str: ...
    @property
    def group_id(self) -> str: ...
    @property
    def group_instance_id(self) -> str: ...
    @property
    def session_timeout_ms(self) -> int: ...
    @property
    def transaction_timeout_ms(self) -> int: ...
    @property
    def compression(self) -> str: ...
    def client_options(self) -> dict[str, Any]: ...


class HasKafka(Protocol):
    @property
    def kafka(self) -> KafkaSettings: ...


def client_is_known() -> bool:
    """Whether the installed client is the one the fast paths were written for."""
    return bool(kafka.__version__ == KNOWN_CLIENT_VERSION)


def fast_path(wanted: bool | None, what: str) -> bool:
    """`wanted`: True and False decide; None = wherever the client is known. Says so in the log when it had to be
    refused."""
    if wanted is not None:
        return wanted
    if client_is_known():
        return True
    log.warning(
        "%s: kafka-python %s is installed, the fast path was written for %s; the client's own path serves, slower. "
        'Install "kafka-python==%s" to have it back.',
        what,
        kafka.__version__,
        KNOWN_CLIENT_VERSION,
        KNOWN_CLIENT_VERSION,
    )
    return False


def make_consumer(settings: HasKafka, **options: Any) -> Any:
    """A KafkaConsumer that never commits, creates topics or resets offsets on its own.

    Raises DeploymentError when no broker answers or it refuses us.
    """
    defaults: dict[str, Any] = {
        "auto_offset_reset": "none",
        "enable_auto_commit": False,
        "allow_auto_create_topics": False,
        "metrics_enabled": False,
        "bootstrap_timeout_ms": BOOTSTRAP_TIMEOUT_MS,
        "request_timeout_ms": REQUEST_TIMEOUT_MS,
        "reconnect_backoff_max_ms": RECONNECT_BACKOFF_MAX_MS,
    }
    with telling_deployment_errors(f"connecting to {settings.kafka.bootstrap_servers}"):
        return KafkaConsumer(**(defaults | settings.kafka.client_options() | options))


def make_producer(settings: HasKafka, **options: Any) -> Any:
    """An idempotent KafkaProducer that waits for all replicas. Raises DeploymentError when no broker answers or it
    refuses us."""
    compression = settings.kafka.compression
    defaults: dict[str, Any] = {
        "acks": "all",
        "enable_idempotence": True,
        "compression_type": None if compression == "none" else compression,
        "max_request_size": MAX_REQUEST_BYTES,
        "max_block_ms": METADATA_TIMEOUT_MS,
        "allow_auto_create_topics": False,
        "metrics_enabled": False,
        "bootstrap_timeout_ms": BOOTSTRAP_TIMEOUT_MS,
        "request_timeout_ms": REQUEST_TIMEOUT_MS,
        "reconnect_backoff_max_ms": RECONNECT_BACKOFF_MAX_MS,
    }
    with telling_deployment_errors(f"connecting to {settings.kafka.bootstrap_servers}"):
        return KafkaProducer(**(defaults | settings.kafka.client_options() | options))


@contextmanager
def telling_deployment_errors(doing: str) -> Iterator[None]:
    """Turns the client's errors into DeploymentError, with a hint at who has to do what."""
    try:
        yield
    except (SaslAuthenticationFailedError, AuthorizationError) as error:
        raise DeploymentError(
            f"{doing}: the broker refused us ({describe(error)}); check kafka.security_protocol, kafka.sasl_* and"
            " the ACLs"
        ) from error
    except KafkaConfigurationError as error:
        raise DeploymentError(f"{doing}: {describe(error)}; check the [kafka] settings") from error
    except KafkaError as error:
        kind = BrokerUnavailable if isinstance(error, RetriableError) else DeploymentError
        raise kind(
            f"{doing}: {describe(error)}; check that the broker runs (millrace broker status) and"
            " kafka.bootstrap_servers"
        ) from error


def describe(error: BaseException) -> str:
    """The error's class and text; some of the client's texts begin with the class, or are nothing else."""
    name = type(error).__name__
    text = str(error).strip().removeprefix(f"{name}: ")
    return f"{name}: {text}" if text and text != name else name


def missing_topic(topic: str) -> DeploymentError:
    return DeploymentError(
        f'topic "{topic}" does not exist on the broker; create it with "millrace topics create" or check topics.domain'
    )
