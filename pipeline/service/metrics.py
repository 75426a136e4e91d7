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
millrace_model_info{version}                 1 for the champion that this worker serves
millrace_model_swaps_total                   partitions that a new champion has taken over while they were served
millrace_model_swap_duration_seconds         how long a partition's answers waited for that
millrace_model_load_failures_total           champions that could not be loaded: the one before goes on serving
millrace_score_labels_total{forecaster,lead} forecasts whose truth has come; the following are sums over them, so that a quotient of
                                             rates is a mean: errors in running standard deviations of each sensor
millrace_score_absolute_error_total, millrace_score_squared_error_total, millrace_score_pinball_loss_total,
millrace_score_covered_total                 truths between the outermost quantiles

Of the trainer:
millrace_trainer_on_duty                     1 for the trainer that works, 0 for those that stand by
millrace_trainer_event_time_seconds          newest window end that it knows of, epoch
millrace_trainings_total{trigger,result}     result: promoted | refused | failed
millrace_training_duration_seconds           reading history, training and scoring
millrace_training_progress_ratio             of the training under way; 0: none is
millrace_training_loss                       of the training under way
millrace_gate_pinball_loss{forecaster}       on the newest held-back slice: challenger, champion, baselines
millrace_rollbacks_total                     champions that were taken back
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from pipeline.errors import DeploymentError
from pipeline.stream.scoring import MEASURES, Scores

MODEL = "Millrace"
"""How the model is called beside the baselines, whatever its version: labels stay few."""
SLOW = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
SCORE_TEXTS = (
    "Forecasts whose truth has come.",
    "Their absolute errors, in running standard deviations of the sensor.",
    "Their squared errors, likewise.",
    "Their pinball loss, mean over the levels.",
    "Truths between the outermost quantiles.",
)
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
        self.model_info = Gauge(
            "millrace_model_info", "The champion that this worker serves.", ["version"], registry=registry
        )
        self.swaps = Counter(
            "millrace_model_swaps", "Partitions that a new champion has taken over.", registry=registry
        )
        self.swap_seconds = Histogram(
            "millrace_model_swap_duration_seconds",
            "How long a partition's answers waited for a new champion to take over.",
            buckets=FAST,
            registry=registry,
        )
        self.load_failures = Counter(
            "millrace_model_load_failures", "Champions that could not be loaded.", registry=registry
        )
        self._scores = [
            Counter(f"millrace_score_{measure}", text, ["forecaster", "lead"], registry=registry)
            for measure, text in zip(MEASURES, SCORE_TEXTS)
        ]
        for result in ("committed", "failed"):
            self.transactions.labels(result)
        self.show_partitions(0, 0)

    def show_model(self, version: str) -> None:
        self.model_info.clear()
        if version:
            self.model_info.labels(version).set(1)

    def score(self, scores: Scores) -> None:
        """Add up what closed windows have shown."""
        total = scores.sums.sum(axis=0)
        for forecaster, sums in ((MODEL, total[0]), (scores.baseline, total[1])):
            for counter, row in zip(self._scores, sums.tolist()):
                for lead, value in zip(scores.leads, row):
                    counter.labels(forecaster, str(lead)).inc(value)

    def show_partitions(self, restoring: int, serving: int) -> None:
        self.partitions.labels("restoring").set(restoring)
        self.partitions.labels("serving").set(serving)

    def forget_partition(self, partition: int) -> None:
        """Its series ends when the partition goes to another worker."""
        with suppress(KeyError):  # it never wrote one
            self.checkpoint_time.remove(str(partition))


class TrainerMetrics:
    """What a trainer counts."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self.on_duty = Gauge(
            "millrace_trainer_on_duty", "Whether this trainer is the one that works.", registry=registry
        )
        self._event_time = Gauge(
            "millrace_trainer_event_time_seconds", "Newest window end that it knows of, epoch.", registry=registry
        )
        self.trainings = Counter(
            "millrace_trainings", "Trainings, by trigger and result.", ["trigger", "result"], registry=registry
        )
        self.training_seconds = Histogram(
            "millrace_training_duration_seconds",
            "Reading history, training and scoring.",
            buckets=(*SLOW, 1800, 3600),
            registry=registry,
        )
        self.training_progress = Gauge(
            "millrace_training_progress_ratio", "Of the training under way; 0: none is.", registry=registry
        )
        self.training_loss = Gauge("millrace_training_loss", "Of the training under way.", registry=registry)
        self.gate_pinball = Gauge(
            "millrace_gate_pinball_loss", "On the newest held-back slice.", ["forecaster"], registry=registry
        )
        self.rollbacks = Counter("millrace_rollbacks", "Champions that were taken back.", registry=registry)

    def show_event_time(self, now_ms: int | None) -> None:
        if now_ms is not None:
            self._event_time.set(now_ms / 1000)


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
