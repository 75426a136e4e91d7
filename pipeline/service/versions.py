"""The versions on the models topic, for a person and for a worker that starts: `millrace models`, and a first champion.

Whatever changes who answers is one transaction with the decision that says why (`pipeline.kafka.registry`).
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from models.artifact import MANIFEST_FILE, MODEL_FILE, ArtifactError, read_manifest
from pipeline.errors import BrokerUnavailable, DeploymentError
from pipeline.kafka.lineage import (
    Champion,
    Decision,
    Kind,
    Record,
    RegistryView,
    Trigger,
    Version,
    decision_record,
    new_version,
    previous_champion,
    promote_records,
    publish_records,
    rollback_records,
    trim_records,
    utc_now,
)
from pipeline.kafka.registry import RegistryReader, read, write
from pipeline.service.assembly import task_settings
from pipeline.settings import Settings

FIGURES = ("pinball", "mse", "mae", "coverage", "expected_coverage", "labels")
RETRAIN = 'train a model with these settings ("millrace train"), or set them back'


@dataclass(frozen=True, slots=True)
class Artifact:
    """A model folder, read and verified."""

    folder: Path
    manifest: dict[str, Any]
    body: bytes
    """Of model.keras."""

    @property
    def version(self) -> str:
        return str(self.manifest["version"])


@dataclass(slots=True)
class Imported:
    """What became of a folder."""

    version: Version
    decisions: list[Decision] = field(default_factory=list)
    """Empty: the topic held this version already, and nothing was to be done."""


def list_rows(settings: Settings) -> list[dict[str, Any]]:
    """One row a version, in order of arrival. Raises DeploymentError where the topic cannot be read."""
    view = read(settings)
    return [
        {
            "number": version.number,
            "version": version.version,
            "network": network_of(version),
            "learned to": instant(version.learned_to_ms),
            "pinball": holdout_pinball(version),
            "state": state_of(view, version),
            "bytes": version.size,
        }
        for version in view.by_number
    ]


def decision_rows(settings: Settings) -> list[dict[str, Any]]:
    """One row a decision, in the order in which they were taken; those about versions that were refused or are gone, too.
    Raises DeploymentError where the topic cannot be read."""
    return [
        {
            "decided at": decision.decided_at,
            "event time": instant(decision.event_time_ms),
            "decision": decision.kind,
            "trigger": decision.trigger,
            "version": decision.version,
            "champion before": decision.champion,
            "pinball": {figures["name"]: _rounded(figures.get("pinball")) for figures in decision.figures},
            "reason": decision.reason,
        }
        for decision in read(settings).decisions
    ]


def show_rows(settings: Settings, name: str) -> list[dict[str, Any]]:
    """Everything about one version: the version itself, its manifest, its figures, the decisions that name it. Raises
    DeploymentError where there is no such version."""
    view = read(settings)
    version = view.resolve(name)
    return [
        {"about": about, "name": key, "value": value}
        for about, pairs in (
            ("version", _version_pairs(view, version)),
            ("manifest", _manifest_pairs(version)),
            ("figures", _figure_pairs(version)),
            ("decision", _decision_pairs(view, version)),
        )
        for key, value in pairs
    ]


def promote(settings: Settings, name: str, force: bool = False) -> Decision | None:
    """Makes a version champion. None: it is already.

    Raises DeploymentError for a version that does not exist, that was withdrawn (unless `force`), or that is made for other
    settings.
    """
    token, made = _token(), list[Decision]()

    def decide(view: RegistryView) -> list[Record]:
        if view.decided(token):
            return []
        made.clear()
        version = view.resolve(name)
        if view.champion and view.champion.version == version.version:
            return []
        require_promotable(settings, version, force)
        reason = "promoted by hand" + (", although it was withdrawn: " + version.withdrawn if version.withdrawn else "")
        made.append(_by_hand(view, token, "promoted", version.version, reason, version.manifest))
        return promote_records(view, version, made[0])

    write(settings, decide)
    return made[0] if made else None


def rollback(settings: Settings, reason: str = "rolled back by hand") -> Decision:
    """Makes the previous champion champion again, and marks the one that leaves as withdrawn, with the reason.

    Raises DeploymentError where there is none, or where it is made for other settings.
    """
    token, made = _token(), list[Decision]()

    def decide(view: RegistryView) -> list[Record]:
        if view.decided(token):
            return []
        made.clear()
        returning = previous_champion(view)
        require_promotable(settings, returning, force=True)
        made.append(_by_hand(view, token, "rolled-back", returning.version, reason, returning.manifest))
        return rollback_records(view, made[0], withdrawn=reason)

    write(settings, decide)
    return made[0]


def export(settings: Settings, name: str, folder: Path) -> Version:
    """Writes a version into a folder that `millrace train` might have written. Raises DeploymentError where there is no such
    version, its bytes are damaged, or the folder holds something else."""
    require_room(folder)
    with RegistryReader(settings) as reader:
        reader.catch_up()
        version = reader.view.resolve(name)
        body = reader.fetch(version.version)
    write_folder(folder, version.manifest, body)
    return version


def import_folder(settings: Settings, folder: Path, promote: bool = False) -> Imported:
    """Puts the model of a folder on the topic, and with `promote` makes it champion. Versions beyond
    `retraining.keep_versions` go. A version that is there already is left as it is, unless its chunks are damaged: then they are
    written again.

    Raises DeploymentError where the folder holds no whole model, or, with `promote`, where `promote` would.
    """
    artifact = read_folder(folder)
    token, repair = _token(), _is_damaged(settings, artifact.version)
    done: list[Imported] = []

    def decide(view: RegistryView) -> list[Record]:
        if view.decided(token):
            return []
        known = view.versions.get(artifact.version)
        version = known or _version_of(view, artifact)
        done[:] = [Imported(version)]
        records: list[Record] = []
        if known is None or repair:
            again = "" if known is None else ": what the topic held of it was damaged"
            reason = f"imported from {folder}{again}"
            done[0].decisions.append(_by_hand(view, token, "imported", version.version, reason, artifact.manifest))
            records += [*publish_records(version, artifact.body), decision_record(done[0].decisions[0])]
        if promote and not (view.champion and view.champion.version == version.version):
            require_promotable(settings, version, force=False)
            ahead, reason = len(done[0].decisions), f"promoted by hand, with its import from {folder}"
            promoted = _by_hand(view, token, "promoted", version.version, reason, artifact.manifest, ahead)
            done[0].decisions.append(promoted)
            records += promote_records(view, version, promoted)
        if not records:
            return []
        return [*records, *trim_records(view, settings.retraining.keep_versions, {version.version})]

    write(settings, decide)
    return done[0]


def ensure_champion(settings: Settings) -> Champion | None:
    """The champion; where there is none, the model in the folder `model.path` is put on the topic and becomes it. None: there
    is no such folder either. Safe when several workers do it at once: one of them imports, all of them return the same.

    Raises DeploymentError where the folder holds no whole model, or one that is made for other settings.
    """
    champion, folder = read(settings).champion, Path(settings.model.path)
    if champion is not None or not folder.exists():
        return champion
    artifact = read_folder(folder)
    require_spec(settings, str(folder / MANIFEST_FILE), artifact.manifest)
    token, found = _token(), list[Champion]()

    def decide(view: RegistryView) -> list[Record]:
        if view.champion is not None:
            found[:] = [view.champion]
            return []
        known = view.versions.get(artifact.version)
        version = known or _version_of(view, artifact)
        reason = f"the topic named no champion: imported from the folder {folder}"
        decision = _decision(view, token, "imported", version.version, "first", reason, artifact.manifest)
        found[:] = [Champion(version=version.version, decision=decision.id)]
        published = [] if known else publish_records(version, artifact.body)
        return [*published, *promote_records(view, version, decision)]

    write(settings, decide)
    return found[0]


# -- what promote and import ask of a model


def require_promotable(settings: Settings, version: Version, force: bool) -> None:
    """Raises DeploymentError where this version must not answer: it was withdrawn (unless `force`), or speaks of other series."""
    label = f"version {version.number} ({version.version})"
    if version.withdrawn and not force:
        raise DeploymentError(
            f"{label} was withdrawn: {version.withdrawn}; promote another, or this one all the same with --force"
        )
    require_spec(settings, label, version.manifest)


def require_spec(settings: Settings, label: str, manifest: dict[str, Any]) -> None:
    """Raises DeploymentError, naming the keys, where a manifest speaks of other series than the settings. Horizon and quantiles
    are the model's own."""
    spec = task_settings(settings).spec
    ours = json.loads(json.dumps(asdict(spec)))
    theirs = manifest["spec"]
    different = [key for key in ours if theirs.get(key) != ours[key] and key not in spec.brought]
    if different:
        found = ", ".join(f"{key}={theirs.get(key)!r}" for key in different)
        expected = ", ".join(f"{key}={ours[key]!r}" for key in different)
        raise DeploymentError(f"{label}: made for {found}; expected {expected} as the settings say; {RETRAIN}")


# -- folders


def read_folder(folder: Path) -> Artifact:
    """A model folder, verified against its manifest; no TensorFlow. Raises DeploymentError where it is not whole."""
    try:
        manifest = read_manifest(folder)
    except ArtifactError as error:
        raise DeploymentError(str(error)) from error
    path = folder / MODEL_FILE
    if not path.is_file():
        raise DeploymentError(f"{path}: no such file; expected the weights that {MANIFEST_FILE} names; copy it there")
    body = path.read_bytes()
    found = hashlib.sha256(body).hexdigest()
    if found != manifest["sha256"]:
        raise DeploymentError(
            f"{path}: sha256 {found}; expected {manifest['sha256']} as in {MANIFEST_FILE}; copy the folder again, or train again"
        )
    return Artifact(folder, manifest, body)


def require_room(folder: Path) -> None:
    """Raises DeploymentError for a folder that holds anything but a model."""
    if folder.exists() and not folder.is_dir():
        raise DeploymentError(f"{folder} is a file; expected a folder, or none yet; name another")
    if folder.is_dir() and not (folder / MANIFEST_FILE).is_file() and any(folder.iterdir()):
        raise DeploymentError(
            f"{folder} is not empty and holds no model; expected a model folder, an empty one, or none; name another"
        )


def write_folder(folder: Path, manifest: dict[str, Any], body: bytes) -> None:
    """A folder that `models.artifact.load` reads. Each file appears whole or not at all, the manifest last."""
    folder.mkdir(parents=True, exist_ok=True)
    described = (json.dumps(manifest, indent=2, allow_nan=False) + "\n").encode()
    with tempfile.TemporaryDirectory(dir=folder, prefix=".writing-") as scratch:
        for name, content in ((MODEL_FILE, body), (MANIFEST_FILE, described)):
            with (Path(scratch) / name).open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for name in (MODEL_FILE, MANIFEST_FILE):
            os.replace(Path(scratch) / name, folder / name)


# -- how things are called in tables


def network_of(version: Version) -> str:
    """Such as "gru 64" or "lstm 2 x 32"."""
    shape = version.manifest["architecture"]
    layers = shape.get("layers", 1)
    return f"{shape.get('cell', shape['kind'])} {f'{layers} x ' if layers != 1 else ''}{shape.get('units', '')}".strip()


def holdout_pinball(version: Version) -> float | None:
    """Of the model itself, on its own held-back part: comparable among versions only where those are alike."""
    figures = version.manifest.get("figures") or [{}]
    pinball = figures[0].get("pinball")
    return None if pinball is None else round(float(pinball), 4)


def state_of(view: RegistryView, version: Version) -> str:
    if view.champion and version.version == view.champion.version:
        return "champion"
    if version.withdrawn:
        return f"withdrawn: {version.withdrawn}"
    return "previous" if view.champion and version.version == view.champion.previous else ""


def instant(time_ms: int | None) -> str:
    """Epoch ms as ISO 8601, UTC; empty where it is not known.

    >>> instant(1769700000000)
    '2026-01-29T15:20:00+00:00'
    """
    return "" if time_ms is None else datetime.fromtimestamp(time_ms / 1000, UTC).isoformat(timespec="seconds")


Pairs = Iterator[tuple[str, Any]]


def _version_pairs(view: RegistryView, version: Version) -> Pairs:
    yield from (("version", version.version), ("number", version.number), ("state", state_of(view, version)))
    yield from (("origin", version.origin), ("parent", version.parent), ("created at", version.created_at))
    yield "learned to", instant(version.learned_to_ms)
    yield from (("bytes", version.size), ("chunks", version.chunks))


def _manifest_pairs(version: Version) -> Pairs:
    for key, value in version.manifest.items():
        if key not in ("figures", "epochs", "version"):
            yield key, instant(value) if key.endswith("_ms") else value


def _figure_pairs(version: Version) -> Pairs:
    for figures in version.manifest.get("figures") or []:
        yield figures["name"], {key: _rounded(figures.get(key)) for key in FIGURES}


def _decision_pairs(view: RegistryView, version: Version) -> Pairs:
    for decision in view.decisions:
        if version.version in (decision.version, decision.champion):
            about = "" if decision.version == version.version else f" {decision.version or 'nothing'}"
            yield decision.id, f"{decision.decided_at} {decision.kind}{about} ({decision.trigger}): {decision.reason}"


def _rounded(value: Any) -> Any:
    return round(value, 4) if isinstance(value, float) else value


# -- helpers


def _version_of(view: RegistryView, artifact: Artifact) -> Version:
    return new_version(
        view,
        artifact.manifest,
        artifact.body,
        origin="imported",
        learned_to_ms=(artifact.manifest.get("data") or {}).get("to_ms"),
        created_at=utc_now(),
    )


def _is_damaged(settings: Settings, version: str) -> bool:
    """Whether the topic knows this version, but cannot give it back."""
    with RegistryReader(settings) as reader:
        reader.catch_up()
        if version not in reader.view.versions:
            return False
        try:
            reader.fetch(version)
        except BrokerUnavailable:
            raise
        except DeploymentError:
            return True
        return False


def _token() -> str:
    return uuid.uuid4().hex[:8]


def _by_hand(
    view: RegistryView, token: str, kind: Kind, version: str, reason: str, manifest: dict[str, Any], ahead: int = 0
) -> Decision:
    return _decision(view, token, kind, version, "by-hand", reason, manifest, ahead)


def _decision(
    view: RegistryView,
    token: str,
    kind: Kind,
    version: str,
    trigger: Trigger,
    reason: str,
    manifest: dict[str, Any],
    ahead: int = 0,
) -> Decision:
    return Decision(
        id=view.next_decision_id(token, ahead),
        kind=kind,
        version=version,
        champion=view.champion.version if view.champion else "",
        trigger=trigger,
        reason=reason,
        decided_at=utc_now(),
        figures=list(manifest.get("figures") or []),
    )
