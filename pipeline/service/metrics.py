"""Every metric, in one place. The registry is handed in; labels are bounded (never a sensor's id); base units.

millrace_restore_duration_seconds            how long a partition took from its arrival to its first answer's readiness
millrace_restored_sensors_total              sensors whose states came out of the changelog
millrace_restored_bytes_total                what was read of the changelog for that
millrace_replayed_records_total              readings taken in again in silence after a restore
millrace_transactions_total{result}          committed | failed (and tried again)
millrace_commit_duration_seconds             one commit of a round: forecasts, dead letters, checkpoints, offsets
millrace_checkpoints_total                   checkpoints of a partition written
millrace_checkpoint_bytes_total              what they held, before compression
millrace_checkpoint_timestamp_seconds{partition}   when a partition's newest was written, epoch
millrace_partitions{phase}                   restoring | serving
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from pipeline.errors import DeploymentError

SLOW = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
FAST = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class WorkerMetrics:
    """What a worker counts."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self.restore_seconds = Histogram(
            "millrace_restore_duration_seconds",
            "From a partition's arrival until its state is back and its readings are read on.",
            buckets=SLOW,
            registry=registry,
        )
        self.restored_sensors = Counter(
            "millrace_restored_sensors", "Sensors whose states came out of the changelog.", registry=registry
        )
        self.restored_bytes = Counter(
            "millrace_restored_bytes", "Bytes of state read from the changelog.", registry=registry
        )
        self.replayed_records = Counter(
            "millrace_replayed_records", "Readings taken in again in silence to rebuild state.", registry=registry
        )
        self.transactions = Counter(
            "millrace_transactions", "Commits of a round, by result.", ["result"], registry=registry
        )
        self.commit_seconds = Histogram(
            "millrace_commit_duration_seconds", "One commit of a round.", buckets=FAST, registry=registry
        )
        self.checkpoints = Counter("millrace_checkpoints", "Checkpoints of a partition written.", registry=registry)
        self.checkpoint_bytes = Counter(
            "millrace_checkpoint_bytes", "Bytes of state written to the changelog, uncompressed.", registry=registry
        )
        self.checkpoint_time = Gauge(
            "millrace_checkpoint_timestamp_seconds",
            "When the newest checkpoint of a partition was written, epoch seconds.",
            ["partition"],
            registry=registry,
        )
        self.partitions = Gauge(
            "millrace_partitions", "Partitions of this worker, by phase.", ["phase"], registry=registry
        )
        for result in ("committed", "failed"):
            self.transactions.labels(result)
        self.show_partitions(0, 0)

    def show_partitions(self, restoring: int, serving: int) -> None:
        self.partitions.labels("restoring").set(restoring)
        self.partitions.labels("serving").set(serving)

    def forget_partition(self, partition: int) -> None:
        """Its series ends when the partition goes to another worker."""
        with suppress(KeyError):  # it never wrote one
            self.checkpoint_time.remove(str(partition))


@contextmanager
def expose(address: str, port: int) -> Iterator[CollectorRegistry]:
    """A registry, and `/metrics` of it on address:port while the context lasts; port 0: nowhere.

    Raises DeploymentError where the port cannot be had."""
    registry = CollectorRegistry()
    if not port:
        yield registry
        return
    try:
        server, thread = start_http_server(port, address, registry)
    except OSError as error:
        raise DeploymentError(
            f"cannot listen on {address}:{port} ({error.strerror}): choose another http.port, or 0 for none"
        ) from error
    try:
        yield registry
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
