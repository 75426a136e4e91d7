"""The models topic: versions, the champion, what was decided and why, and which model answered from where. One partition, compacted.

    version/gru64-5f22b123e2d0        JSON `Version`, the manifest of its artifact included
    chunk/gru64-5f22b123e2d0/0000     bytes of its model.keras, CHUNK_BYTES a record at most
    champion                          JSON `Champion`
    decision/00000007-1f0c9a3e        JSON `Decision`
    swap/00002/00000000000000099182   JSON `Swap`, written by workers inside their own transactions

What belongs together is one transaction, ordered so that a reader in the middle of it is never misled: chunks before their version,
versions before the champion, tombstones of a version before those of its chunks.

Writers take turns. `write` opens the transactional id that all of them share, upon which the broker ends what another left open and
refuses whatever it may still try; only then it reads, up to where the log ended at that moment; only then it decides. So a
decision always follows from everything that was committed before it, and whoever was overtaken reads again and decides anew.

    read(settings)      the view as it is now
    RegistryReader      the view, kept up to date; the bytes of a version
    write(settings, decide)
"""

from __future__ import annotations

import hashlib
import logging
import random
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final, Literal, TypeVar

import msgspec
import numpy as np
from kafka.errors import KafkaError

from pipeline.errors import BrokerUnavailable, DeploymentError
from pipeline.kafka.membership import Membership
from pipeline.kafka.source import RecordSource
from pipeline.kafka.transactions import FINAL, TransactionalSink, TransactionFailed
from pipeline.settings import Settings
from pipeline.stream.columns import OutgoingRecords, RecordColumns

log = logging.getLogger(__name__)

CHUNK_BYTES: Final = 900_000
"""Below the megabyte that one record may have, with room for its key and for bytes that do not compress."""
ATTEMPTS: Final = 5
POLL_TIMEOUT_MS: Final = 200
CATCH_UP_SECONDS: Final = 60.0
STILL_OPEN_SECONDS: Final = 30.0
"""How much longer than kafka.transaction_timeout a transaction may stay open: brokers look for those that are overdue every 10 s."""
SEEN_SECONDS: Final = 10.0
"""How long `write` waits for readers to see what it has committed."""
BACKOFF_SECONDS: Final = 0.1
"""Writers that overtook each other wait at random before they try again, up to twice as long each time."""

PARTITION: Final = 0
CHAMPION: Final = b"champion"
VERSION, CHUNK, DECISION, SWAP = "version", "chunk", "decision", "swap"
IMPORT_AGAIN: Final = 'import it again from its folder ("millrace models import DIR"), or train anew'

Record = tuple[bytes, bytes | None]
"""Key and value; None deletes the key (a tombstone)."""
Kind = Literal["promoted", "refused", "rolled-back", "imported", "failed"]
Trigger = Literal["schedule", "steps", "drift", "request", "first", "by-hand", "disappointed"]
S = TypeVar("S", bound=msgspec.Struct)


class Version(msgspec.Struct, frozen=True, kw_only=True):
    """One model. Its bytes are in as many chunks as `chunks` says."""

    version: str
    number: int
    """1, 2, ... in order of arrival; never given twice."""
    sha256: str
    """Of model.keras."""
    size: int
    """Of model.keras, in bytes."""
    chunks: int
    manifest: dict[str, Any]
    """What `models.artifact.save` wrote into manifest.json."""
    origin: Literal["trained", "imported"]
    parent: str = ""
    """The version whose weights it began with; empty: none."""
    learned_to_ms: int | None = None
    """It learned from windows that end at or before this event time; None: not known."""
    created_at: str
    """ISO 8601, UTC."""
    withdrawn: str = ""
    """Why it must not answer any more; empty: it may."""


class Champion(msgspec.Struct, frozen=True, kw_only=True):
    """The version that answers."""

    version: str
    previous: str = ""
    """Who answered before, and returns if this one disappoints; empty: nobody."""
    decision: str
    """Id of the decision that made it champion."""
    since_ms: int | None = None
    """Event time of that decision; None: not known."""


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """What was decided about a version, and from which figures."""

    id: str
    """`RegistryView.next_decision_id`; ids sort in the order of the decisions."""
    kind: Kind
    version: str = ""
    """The one decided on; of "rolled-back" the one that returned; empty for "failed"."""
    champion: str = ""
    """Who was champion before; empty: nobody."""
    trigger: Trigger
    reason: str
    """One sentence."""
    event_time_ms: int | None = None
    decided_at: str
    """ISO 8601, UTC, by the clock."""
    figures: list[dict[str, Any]] = []
    """`models.evaluation.Figures.to_dict` of the challenger, the champion and the baselines; NaN is written as null."""


class Swap(msgspec.Struct, frozen=True, kw_only=True):
    """From this input offset on `version` answers in this partition."""

    partition: int
    offset: int
    """The first input offset that it answers."""
    version: str
    """Empty: none, the baseline answers."""
    state: Literal["start", "ring"]
    """Where its hidden states come from: there were no sensors yet, or each sensor's ring of recent steps."""


class RegistryView:
    """What the models topic says, at the moment up to which it was read. Grows in place as its reader reads on."""

    def __init__(self, topic: str = "") -> None:
        self.topic = topic
        self.versions: dict[str, Version] = {}
        self.champion: Champion | None = None
        self._decisions: dict[str, Decision] = {}
        self._swaps: dict[tuple[int, int], Swap] = {}
        self._chunks: dict[str, dict[int, int]] = {}

    @property
    def decisions(self) -> list[Decision]:
        """In the order in which they were taken."""
        return [self._decisions[id] for id in sorted(self._decisions)]

    @property
    def swaps(self) -> dict[int, list[Swap]]:
        """By partition, each list by offset."""
        found: dict[int, list[Swap]] = {}
        for partition, offset in sorted(self._swaps):
            found.setdefault(partition, []).append(self._swaps[partition, offset])
        return found

    @property
    def by_number(self) -> list[Version]:
        """All versions, in order of arrival."""
        return sorted(self.versions.values(), key=lambda version: version.number)

    @property
    def next_number(self) -> int:
        return max((version.number for version in self.versions.values()), default=0) + 1

    def next_decision_id(self, token: str, ahead: int = 0) -> str:
        """An id that sorts after all others. token: what its writer knows it by (`decided`), without "/"; ahead: how many
        decisions of the same transaction come before it."""
        numbers = [int(id.partition("-")[0]) for id in self._decisions if id.partition("-")[0].isdecimal()]
        return f"{max(numbers, default=0) + 1 + ahead:08d}-{token}"

    def decided(self, token: str) -> bool:
        """Whether a decision with this token is there: what was not known to be committed was."""
        return any(id.partition("-")[2] == token for id in self._decisions)

    def resolve(self, text: str) -> Version:
        """A version by its name or its number. Raises DeploymentError, naming those that there are."""
        found = self.versions.get(text)
        if found is None and text.isdecimal():
            found = next((version for version in self.versions.values() if version.number == int(text)), None)
        if found is not None:
            return found
        if not self.versions:
            raise DeploymentError(
                f'topic "{self.topic}" holds no model, so none is called {text!r}; train one ("millrace train") and import it '
                '("millrace models import DIR")'
            )
        known = ", ".join(f"{version.number} ({version.version})" for version in self.by_number)
        raise DeploymentError(f'topic "{self.topic}" holds no version {text!r}; expected one of {known}')

    def chunk_offsets(self, version: str) -> dict[int, int]:
        """Where each chunk of a version stands: its number -> its offset."""
        return dict(self._chunks.get(version, {}))

    def apply(self, key: bytes, value: bytes | None, offset: int) -> bool:
        """Takes in one record; the value of a chunk is not looked at but for None. False for a key that this version of
        Millrace does not know. Raises DeploymentError for a value that cannot be read."""
        kind, _, name = key.decode("utf-8", "replace").partition("/")
        if key == CHAMPION:
            self.champion = None if value is None else self._read(key, value, Champion)
        elif kind == VERSION:
            _put(self.versions, name, None if value is None else self._read(key, value, Version))
        elif kind == DECISION:
            _put(self._decisions, name, None if value is None else self._read(key, value, Decision))
        elif kind == SWAP:
            _put(self._swaps, self._numbers(key, name), None if value is None else self._read(key, value, Swap))
        elif kind == CHUNK:
            version, _, number = name.rpartition("/")
            (chunk,) = self._numbers(key, number)
            _put(self._chunks.setdefault(version, {}), chunk, None if value is None else offset)
        else:
            return False
        return True

    def _read(self, key: bytes, value: bytes, shape: type[S]) -> S:
        try:
            return msgspec.json.decode(value, type=shape)
        except msgspec.DecodeError as error:
            raise self._unreadable(key, f"{error}; expected a {shape.__name__} as JSON") from error

    def _numbers(self, key: bytes, text: str) -> tuple[Any, ...]:
        try:
            return tuple(int(part) for part in text.split("/"))
        except ValueError:
            raise self._unreadable(key, "its last parts are no numbers") from None

    def _unreadable(self, key: bytes, why: str) -> DeploymentError:
        return DeploymentError(
            f'topic "{self.topic}", key {key.decode("utf-8", "replace")!r}: {why}; something other than this version of Millrace '
            "wrote it: run the version that did, or delete the key (send it with no value)"
        )


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


# -- records: pure


def new_version(
    view: RegistryView,
    manifest: Mapping[str, Any],
    body: bytes,
    *,
    origin: Literal["trained", "imported"],
    created_at: str,
    parent: str = "",
    learned_to_ms: int | None = None,
) -> Version:
    """The next version. manifest: as `models.artifact` wrote it; body: the bytes of model.keras. Raises DeploymentError where
    the bytes are not those that the manifest names, or the version's name would not do in a key."""
    version, sha256 = str(manifest["version"]), hashlib.sha256(body).hexdigest()
    if sha256 != manifest["sha256"]:
        raise DeploymentError(
            f"model {version}: model.keras has sha256 {sha256}, expected {manifest['sha256']} as in its manifest; copy the folder "
            "again, or train again"
        )
    if not version or "/" in version:
        raise DeploymentError(f"model version={version!r}: expected a name without a slash; train again")
    return Version(
        version=version,
        number=view.next_number,
        sha256=sha256,
        size=len(body),
        chunks=-(-len(body) // CHUNK_BYTES),
        manifest=dict(manifest),
        origin=origin,
        parent=parent,
        learned_to_ms=learned_to_ms,
        created_at=created_at,
    )


def chunks(version: str, body: bytes) -> list[Record]:
    """The bytes of model.keras, cut.

    >>> [(key, len(value)) for key, value in chunks("gru64-5f22b123e2d0", bytes(1_000_000))]
    [(b'chunk/gru64-5f22b123e2d0/0000', 900000), (b'chunk/gru64-5f22b123e2d0/0001', 100000)]
    """
    starts = range(0, len(body), CHUNK_BYTES)
    return [(chunk_key(version, n), body[start : start + CHUNK_BYTES]) for n, start in enumerate(starts)]


def chunk_key(version: str, number: int) -> bytes:
    return f"{CHUNK}/{version}/{number:04d}".encode()


def publish_records(version: Version, body: bytes) -> list[Record]:
    """A version with its bytes, which come first."""
    return [*chunks(version.version, body), version_record(version)]


def promote_records(
    view: RegistryView, version: Version, decision: Decision, since_ms: int | None = None
) -> list[Record]:
    """`version` becomes champion, by this decision, and the view's champion its previous one. If it was withdrawn, it is so no
    longer."""
    previous = "" if view.champion is None else view.champion.version
    champion = Champion(version=version.version, previous=previous, decision=decision.id, since_ms=since_ms)
    restored = [version_record(msgspec.structs.replace(version, withdrawn=""))] if version.withdrawn else []
    return [*restored, decision_record(decision), champion_record(champion)]


def rollback_records(
    view: RegistryView, decision: Decision, withdrawn: str, since_ms: int | None = None
) -> list[Record]:
    """The previous champion returns, by this decision, and the champion is marked with the reason `withdrawn`. There is nothing
    to roll back to after that. Raises DeploymentError where there is no previous champion."""
    returning, leaving = previous_champion(view), view.versions.get(view.champion.version if view.champion else "")
    champion = Champion(version=returning.version, decision=decision.id, since_ms=since_ms)
    marked = [version_record(msgspec.structs.replace(leaving, withdrawn=withdrawn))] if leaving else []
    return [*marked, decision_record(decision), champion_record(champion)]


def previous_champion(view: RegistryView) -> Version:
    """The version that a rollback returns to. Raises DeploymentError where there is none."""
    champion = view.champion
    if champion is None:
        raise DeploymentError(
            f'topic "{view.topic}" names no champion, so there is nothing to roll back; promote a version ("millrace models promote")'
        )
    if champion.previous not in view.versions:
        raise DeploymentError(
            f"champion {champion.version} has no previous version to return to; promote another "
            '("millrace models list", "millrace models promote VERSION")'
        )
    return view.versions[champion.previous]


def trim_records(view: RegistryView, keep: int, spare: Collection[str] = ()) -> list[Record]:
    """Tombstones of the oldest versions, so that `keep` are left; their decisions and swaps stay.

    spare: versions that stay in any case, as the view's champion and its previous one do; those that the view does not
    know yet count as well.
    """
    champion = view.champion
    stay = {*spare, *((champion.version, champion.previous) if champion else ())}
    total = len(view.versions.keys() | set(spare))
    dropped = [version for version in view.by_number if version.version not in stay][: max(0, total - keep)]
    return [record for version in dropped for record in _tombstones(view, version)]


def version_record(version: Version) -> Record:
    return f"{VERSION}/{version.version}".encode(), msgspec.json.encode(version)


def champion_record(champion: Champion) -> Record:
    return CHAMPION, msgspec.json.encode(champion)


def decision_record(decision: Decision) -> Record:
    return f"{DECISION}/{decision.id}".encode(), msgspec.json.encode(decision)


def swap_record(swap: Swap) -> tuple[bytes, bytes]:
    """Key and value, for a worker to send to partition 0 of the models topic in its own transaction.

    >>> swap_record(Swap(partition=2, offset=99182, version="gru64-5f22b123e2d0", state="ring"))[0]
    b'swap/00002/00000000000000099182'
    """
    return f"{SWAP}/{swap.partition:05d}/{swap.offset:020d}".encode(), msgspec.json.encode(swap)


def batches(records: Sequence[Record], topic: str) -> list[OutgoingRecords]:
    """Records of this module, ready to be sent."""
    if not records:
        return []
    keys, values = zip(*records)
    return [OutgoingRecords(topic, PARTITION, keys, values)]


def utc_now() -> str:
    """The wall clock as `created_at` and `decided_at` hold it: ISO 8601, whole seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _tombstones(view: RegistryView, version: Version) -> list[Record]:
    numbers = sorted(view.chunk_offsets(version.version).keys() | set(range(version.chunks)))
    return [
        (f"{VERSION}/{version.version}".encode(), None),
        *((chunk_key(version.version, n), None) for n in numbers),
    ]


def _put(entries: dict[Any, Any], name: Any, entry: Any) -> None:
    if entry is None:
        entries.pop(name, None)
    else:
        entries[name] = entry


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
