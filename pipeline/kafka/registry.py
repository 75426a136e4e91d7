"""The models topic read and written (its records: `pipeline.kafka.lineage`).

    read(settings)      the view as it is now
    RegistryReader      the view, kept up to date; the bytes of a version
    write(settings, decide)

Writers take turns. `write` opens the transactional id that all of them share, upon which the broker ends what another left open and
refuses whatever it may still try; only then it reads, up to where the log ended at that moment; only then it decides. So a
decision always follows from everything that was committed before it, and whoever was overtaken reads again and decides anew.
"""

from __future__ import annotations

import hashlib
import logging
import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import numpy as np
from kafka.errors import KafkaError

from pipeline.errors import BrokerUnavailable, DeploymentError
from pipeline.kafka.lineage import CHUNK, IMPORT_AGAIN, PARTITION, Record, RegistryView, Version, batches
from pipeline.kafka.membership import Membership
from pipeline.kafka.source import RecordSource
from pipeline.kafka.transactions import FINAL, TransactionalSink, TransactionFailed
from pipeline.settings import Settings
from pipeline.stream.columns import RecordColumns

log = logging.getLogger(__name__)

ATTEMPTS: Final = 5
POLL_TIMEOUT_MS: Final = 200
CATCH_UP_SECONDS: Final = 60.0
STILL_OPEN_SECONDS: Final = 30.0
"""How much longer than kafka.transaction_timeout a transaction may stay open: brokers look for those that are overdue every 10 s."""
SEEN_SECONDS: Final = 10.0
"""How long `write` waits for readers to see what it has committed."""
BACKOFF_SECONDS: Final = 0.1
"""Writers that overtook each other wait at random before they try again, up to twice as long each time."""


class RegistryReader:
    """Tails the models topic, committed records only. One thread; not to be shared.

    Keeps no bytes of models, only where they are. Making one raises DeploymentError where no broker answers or the topic does
    not exist.
    """

    def __init__(self, settings: Settings) -> None:
        self.topic = settings.topics.models_topic
        self.view = RegistryView(self.topic)
        self._settings = settings
        self._source = RecordSource(
            settings, self.topic, group=False, partitions=[PARTITION], on_assigned=lambda _: self._begin()
        )
        self._position = self._start = self._source.beginning_offsets([PARTITION])[PARTITION]

    def catch_up(self) -> None:
        """Reads to where committed records end now, that is up to the oldest transaction that is still open. Raises
        BrokerUnavailable when that takes longer than CATCH_UP_SECONDS."""
        self._read_to(self._source.end_offsets([PARTITION])[PARTITION], CATCH_UP_SECONDS)

    def catch_up_past(self, end: int, limit_seconds: float | None = None) -> None:
        """Reads to `end`, an offset of the log as it is; waits for transactions that are open there. Raises BrokerUnavailable
        when one stays open for longer than `limit_seconds` (None: longer than any may)."""
        longest = self._settings.kafka.transaction_timeout_ms / 1000 + STILL_OPEN_SECONDS
        self._read_to(end, max(longest, CATCH_UP_SECONDS) if limit_seconds is None else limit_seconds)

    def poll(self, timeout_ms: int = POLL_TIMEOUT_MS) -> bool:
        """Reads what has come, waiting up to `timeout_ms` for it. True: the view has changed."""
        changed = False
        for records in self._source.poll(timeout_ms):
            changed |= self._take(records)
        self._position = self._source.positions().get(PARTITION, self._position)
        return changed

    def fetch(self, version: str) -> bytes:
        """The bytes of a version's model.keras, verified; read from the topic anew. Raises DeploymentError where there is no
        such version, chunks are missing, or they are not what was published."""
        wanted = self.view.resolve(version)
        offsets = self.view.chunk_offsets(wanted.version)
        missing = [number for number in range(wanted.chunks) if number not in offsets]
        found = {} if missing else _read_at(self._settings, self.topic, list(offsets.values()))
        missing = missing or [number for number in range(wanted.chunks) if offsets[number] not in found]
        if missing:
            names = ", ".join(f"{number:04d}" for number in missing)
            raise self._damaged(wanted, f"{len(missing)} of its {wanted.chunks} chunks are missing ({names})")
        body = b"".join(found[offsets[number]] for number in range(wanted.chunks))
        if len(body) != wanted.size:
            raise self._damaged(wanted, f"its chunks hold {len(body)} bytes, expected {wanted.size}")
        sha256 = hashlib.sha256(body).hexdigest()
        if sha256 != wanted.sha256:
            raise self._damaged(wanted, f"sha256 {sha256}, expected {wanted.sha256}")
        return body

    def close(self) -> None:
        self._source.close()

    def __enter__(self) -> RegistryReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _begin(self) -> None:
        self._source.seek(PARTITION, self._start)

    def _read_to(self, end: int, limit_seconds: float) -> None:
        deadline = time.monotonic() + limit_seconds
        while self._position < end:
            self.poll()
            if self._position < end and time.monotonic() > deadline:
                raise BrokerUnavailable(
                    f'topic "{self.topic}": read to offset {self._position} of {end} within {limit_seconds:.0f} s. Either the broker '
                    "is gone (millrace broker status), or a transaction stays open there; one that a dead worker left ends by "
                    "itself after kafka.transaction_timeout: try again then"
                )

    def _take(self, records: RecordColumns) -> bool:
        changed = False
        for row, key in enumerate(records.keys()):
            if key is None:
                continue
            is_chunk = key.startswith(f"{CHUNK}/".encode()) and records.value_len[row] >= 0
            value = b"" if is_chunk else records.value(row)
            changed |= self.view.apply(key, value, int(records.offsets[row]))
        return changed

    def _damaged(self, version: Version, what: str) -> DeploymentError:
        return DeploymentError(
            f'topic "{self.topic}", version {version.number} ({version.version}): {what}; {IMPORT_AGAIN}, or promote another '
            "(millrace models list)"
        )


def read(settings: Settings) -> RegistryView:
    """What the models topic says now. Raises DeploymentError where no broker answers, the topic does not exist, or a record
    cannot be read."""
    with RegistryReader(settings) as reader:
        reader.catch_up()
        return reader.view


def write(
    settings: Settings,
    decide: Callable[[RegistryView], Sequence[Record]],
    offsets: Mapping[int, int] | None = None,
    membership: Membership | None = None,
) -> list[Record]:
    """Decides and writes, in one transaction that no other writer can come between. Returns what was written, when readers of
    committed records see it.

    decide: from a view of everything that is committed to the records to write; empty: nothing is to be done. Called again, on
    a newer view, when another writer came in between, or when it is not known whether the transaction was committed: so
    it first looks whether what it wants is there already (`RegistryView.decided`). It may raise DeploymentError to give up.
    offsets, membership: input offsets to commit with it, also where there are no records.

    Do not call it inside a transaction of your own on this topic: it waits for that one to end.

    Raises DeploymentError where no broker answers, it refuses, or after ATTEMPTS transactions that failed.
    """
    with _Writer(settings) as writer:
        for attempt in range(ATTEMPTS):
            try:
                records = list(decide(writer.view_under_fence()))
                if records or offsets:
                    writer.commit(records, offsets, membership)
                    writer.wait_until_seen()
                return records
            except TransactionFailed as error:
                failure = error
                log.info("models topic: %s; deciding again", error)
                time.sleep(random.uniform(0.5, 1.0) * BACKOFF_SECONDS * 2**attempt)
    raise DeploymentError(
        f'topic "{settings.topics.models_topic}": nothing was decided, {ATTEMPTS} transactions failed, the last with: {failure}; '
        "other writers (millrace trainer, millrace models) were faster each time, or the brokers are in trouble: try again"
    ) from failure


class _Writer:
    """The pieces of `write`: a reader, the log's own end, and the transactions."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._topic = settings.topics.models_topic
        self._sink: TransactionalSink | None = None
        self._reader = RegistryReader(settings)
        try:
            self._log = RecordSource(
                settings, self._topic, group=False, isolation="read_uncommitted", partitions=[PARTITION]
            )
        except BaseException:
            self._reader.close()
            raise

    def view_under_fence(self) -> RegistryView:
        """Everything that was committed before this writer's turn began. Raises TransactionFailed when its turn cannot begin."""
        self._take_turn()
        # Not the end of committed records: a worker's open transaction may stand before what another writer has committed.
        self._reader.catch_up_past(self._log_end())
        return self._reader.view

    def commit(
        self, records: Sequence[Record], offsets: Mapping[int, int] | None, membership: Membership | None
    ) -> None:
        assert self._sink is not None
        self._sink.commit(batches(records, self._topic), offsets or {}, membership)

    def wait_until_seen(self) -> None:
        """A broker answers a commit when it is decided, and lets readers see it a moment later. If that takes long, which is when
        a worker has died in a transaction of its own, they see it later: it is committed all the same."""
        try:
            self._reader.catch_up_past(self._log_end(), SEEN_SECONDS)
        except DeploymentError as error:
            log.warning("what was written is committed, but readers do not see it yet: %s", error)

    def _log_end(self) -> int:
        return self._log.end_offsets([PARTITION])[PARTITION]

    def _take_turn(self) -> None:
        if self._sink is not None:
            self._sink.settle()
            return
        try:
            self._sink = TransactionalSink(self._settings, f"{self._settings.kafka.group_id}/models")
        except DeploymentError as error:
            cause = error.__cause__
            if isinstance(error, BrokerUnavailable) or not isinstance(cause, KafkaError) or isinstance(cause, FINAL):
                raise
            raise TransactionFailed(str(error)) from error

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_: object) -> None:
        if self._sink is not None:
            self._sink.close()
        self._log.close()
        self._reader.close()


def _read_at(settings: Settings, topic: str, offsets: Sequence[int]) -> dict[int, bytes]:
    """The values at these offsets, as far as they are still there. By a consumer of its own: the tail is not disturbed."""
    if not offsets:
        return {}
    found: dict[int, bytes] = {}
    start, end, position = min(offsets), max(offsets) + 1, min(offsets)
    deadline = time.monotonic() + CATCH_UP_SECONDS
    with RecordSource(settings, topic, group=False, partitions=[PARTITION]) as source:
        source.on_assigned = lambda _: source.seek(PARTITION, start)
        while position < end:
            for records in source.poll(POLL_TIMEOUT_MS):
                rows = np.flatnonzero(np.isin(records.offsets, offsets) & (records.value_len >= 0)).tolist()
                found |= {int(records.offsets[row]): records.value(row) or b"" for row in rows}
            position = source.positions().get(PARTITION, position)
            if position < end and time.monotonic() > deadline:
                raise BrokerUnavailable(
                    f'topic "{topic}": read to offset {position} of {end} within {CATCH_UP_SECONDS:.0f} s; check that the broker '
                    "runs (millrace broker status)"
                )
    return found
