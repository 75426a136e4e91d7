"""Where a partition begins: pure decisions from what the group, the log and the changelog say.

    log          [beginning ------------------------------------ end)
    changelog                 s   checkpoint: the state after the readings before s
    group                            c   committed: everything before c has been answered

Restore the checkpoint, read [s, c) again in silence, answer from c on. A model that is not the checkpoint's takes over at c.
Where that cannot be, a person decides: nothing here starts again from nothing without being told to.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.errors import DeploymentError
from pipeline.stream.checkpoint import Manifest


@dataclass(frozen=True, slots=True)
class Found:
    """What there is of one partition when a worker gets it."""

    topic: str
    partition: int
    group: str
    beginning: int
    """The oldest offset that the log still has."""
    end: int
    committed: int | None
    manifest: Manifest | None
    model: str
    """Version of the champion; empty: there is none."""
    models_topic: str


@dataclass(frozen=True, slots=True)
class Start:
    """How a partition begins."""

    restore: bool
    """From the checkpoint; else with empty states."""
    offset: int
    """The first reading to take in."""
    emit_from: int
    """The first reading to answer."""
    note: str = ""
    """Something out of the ordinary that a person should read in the log."""


def plan_start(found: Found) -> Start:
    """Raises DeploymentError, with what mends it, where going on would lose, repeat or forget something."""
    manifest, committed = found.manifest, found.committed
    if manifest is not None and manifest.group != found.group:
        raise _stop(
            found,
            f'the changelog holds states of group "{manifest.group}", this worker is of group "{found.group}"',
            "set kafka.group_id back, or give this group a changelog of its own with topics.state",
        )
    if committed is None:
        return _first_start(found)
    if not found.beginning <= committed <= found.end:
        raise _stop(
            found,
            f'the group "{found.group}" has committed offset {committed}, the log holds [{found.beginning}, {found.end}): '
            "retention or a new topic of the same name took the readings away",
            "lengthen topics.readings_retention, and choose where to go on: `millrace state reset --to beginning` answers "
            "all that is left, `--to end` what comes from now on",
        )
    if manifest is None:
        return _without_checkpoint(found, committed)
    if manifest.offset > committed:
        raise _stop(
            found,
            f"the checkpoint stands at offset {manifest.offset}, but the group's committed offset is {committed}: somebody "
            "set the group back",
            "to answer again from there, `millrace state reset` lets the states be rebuilt from the log; or set the offset "
            "forward again",
        )
    if manifest.sensors and manifest.model and not found.model:
        raise _stop(
            found,
            f'the states are those of model {manifest.model}, and topic "{found.models_topic}" names no champion',
            "put a model into service (`millrace models import FOLDER --promote`), or restore the topic; or `millrace state "
            "reset` lets the states be rebuilt for the baseline alone",
        )
    if not found.beginning <= manifest.offset <= found.end:
        raise _stop(
            found,
            f"the checkpoint stands at offset {manifest.offset}, the log holds [{found.beginning}, {found.end}): readings "
            f"that it has yet to take in, up to the committed offset {committed}, are gone",
            "lengthen topics.readings_retention; `millrace state reset` lets the states be rebuilt from what is left",
        )
    note = ""
    if manifest.sensors and manifest.model != found.model:
        was = f"model {manifest.model}" if manifest.model else "no model"
        note = f"the states were made with {was}: from offset {committed} on {found.model} answers"
    return Start(True, manifest.offset, committed, note)


def _first_start(found: Found) -> Start:
    if found.manifest is not None:
        raise _stop(
            found,
            f'the group "{found.group}" has no committed offset, but a checkpoint at {found.manifest.offset}: Kafka forgets '
            "the offsets of a group that is away for long (offsets.retention.minutes)",
            "`millrace state reset --to checkpoint` goes on from there; forecasts made since that checkpoint are sent again",
        )
    return Start(False, found.beginning, found.beginning)


def _without_checkpoint(found: Found, committed: int) -> Start:
    if found.beginning > 0:
        raise _stop(
            found,
            f"the group has answered up to offset {committed}, the changelog holds no checkpoint, and readings before "
            f"{found.beginning} are gone: the states cannot be what they were",
            "restore the state topic; or `millrace state reset` lets them be rebuilt from what is left",
        )
    return Start(False, 0, committed, f"no checkpoint: reading the log from its beginning to offset {committed}")


def _stop(found: Found, what: str, mend: str) -> DeploymentError:
    return DeploymentError(f'topic "{found.topic}", partition {found.partition}: {what}; {mend}')
