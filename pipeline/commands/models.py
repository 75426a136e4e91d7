"""`millrace models list|show|promote|rollback|export|import`: the versions on the models topic."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipeline.commands.common import CommandContext, with_context

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pipeline.kafka.lineage import Decision

FOLDER = click.Path(path_type=Path)


@click.group()
def models() -> None:
    """Versions on the models topic. VERSION is a version's name or its number. Workers take over a new champion within
    seconds."""


@models.command("list")
@click.option("--decisions", is_flag=True, help="What was decided instead, and why: also about what was refused.")
@with_context
def list_(context: CommandContext, decisions: bool) -> None:
    """All versions, in order of arrival. `pinball`: of each on its own held-back part."""
    from pipeline.service import versions

    if decisions:
        context.emit(versions.decision_rows(context.settings), title="Decisions")
        return
    rows = versions.list_rows(context.settings)
    if rows or context.format == "json":
        context.emit(rows, title="Models")
    else:
        context.note(
            f'topic "{context.settings.topics.models_topic}" holds no model yet: millrace train, then millrace models import DIR'
        )


@models.command()
@click.argument("version")
@with_context
def show(context: CommandContext, version: str) -> None:
    """VERSION's manifest, its figures beside the baselines', and the decisions about it."""
    from pipeline.service import versions

    context.emit(versions.show_rows(context.settings, version), title=f"Model {version}")


@models.command()
@click.argument("version")
@click.option("--force", is_flag=True, help="Also a version that was withdrawn.")
@with_context
def promote(context: CommandContext, version: str, force: bool) -> None:
    """Make VERSION the champion: it answers from now on."""
    from pipeline.service import versions

    decision = versions.promote(context.settings, version, force)
    _tell(context, [decision] if decision else [])
    if decision is None:
        context.note(f"{version} is the champion already")


@models.command()
@click.option(
    "--reason", default="rolled back by hand", show_default=True, help="Why: what the version is marked with."
)
@with_context
def rollback(context: CommandContext, reason: str) -> None:
    """Let the previous champion answer again, and mark the present one as withdrawn."""
    from pipeline.service import versions

    _tell(context, [versions.rollback(context.settings, reason)])


@models.command()
@click.argument("version")
@click.argument("folder", metavar="DIR", type=FOLDER)
@with_context
def export(context: CommandContext, version: str, folder: Path) -> None:
    """Write VERSION into the folder DIR, as `millrace train` would have."""
    from pipeline.service import versions

    found = versions.export(context.settings, version, folder)
    context.emit([{"version": found.version, "folder": str(folder), "bytes": found.size}], title="Exported")


@models.command("import")
@click.argument("folder", metavar="DIR", type=FOLDER)
@click.option("--promote", is_flag=True, help="Make it the champion, too.")
@with_context
def import_(context: CommandContext, folder: Path, promote: bool) -> None:
    """Put the model in the folder DIR on the topic; the oldest beyond retraining.keep_versions go."""
    from pipeline.service import versions

    done = versions.import_folder(context.settings, folder, promote)
    _tell(context, done.decisions)
    if not done.decisions:
        context.note(f"version {done.version.number} ({done.version.version}) is there already")


def _tell(context: CommandContext, decisions: Sequence[Decision]) -> None:
    """What was decided, and nothing in text where nothing was."""
    rows = [
        {
            "decision": decision.id,
            "kind": decision.kind,
            "version": decision.version,
            "champion before": decision.champion,
            "reason": decision.reason,
        }
        for decision in decisions
    ]
    if rows or context.format == "json":
        context.emit(rows, title="Decided")
