"""What the models topic says: versions, the champion, what was decided and why, and which model answered from where; and the records
that say it. Pure; `pipeline.kafka.registry` reads and writes them. One partition, compacted.

    version/gru64-5f22b123e2d0        JSON `Version`, the manifest of its artifact included
    chunk/gru64-5f22b123e2d0/0000     bytes of its model.keras, CHUNK_BYTES a record at most
    champion                          JSON `Champion`
    decision/00000007-1f0c9a3e        JSON `Decision`
    swap/00002/00000000000000099182   JSON `Swap`, written by workers inside their own transactions

What belongs together is one transaction, ordered so that a reader in the middle of it is never misled: chunks before their version,
versions before the champion, tombstones of a version before those of its chunks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final, Literal, TypeVar

import msgspec

from pipeline.errors import DeploymentError
from pipeline.stream.columns import OutgoingRecords

CHUNK_BYTES: Final = 900_000
"""Below the megabyte that one record may have, with room for its key and for bytes that do not compress."""
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
