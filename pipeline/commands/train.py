"""`millrace train`: a model from history, in a topic or in files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.commands.common import INSTANT, CommandContext, with_context
from pipeline.commands.replay import layout_of, layout_options
from pipeline.errors import DeploymentError, SettingsError

if TYPE_CHECKING:
    from rich.progress import Progress

    from models.evaluation import Figures
    from models.training import TrainedModel, TrainingProgress
    from pipeline.service.fitting import Trained
    from pipeline.service.history import History


@click.command()
@click.option("--from", "from_ms", type=INSTANT, help="Only history from this time on.")
@click.option("--to", "to_ms", type=INSTANT, help="Only history before this time.")
@click.option(
    "--data", "files", type=click.Path(path_type=Path, exists=True, dir_okay=False), multiple=True, metavar="FILE",
    help="History from a CSV or Parquet file instead of the readings topic; may be given again.",
)  # fmt: skip
@layout_options
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Folder of the model; else model.path.")
@with_context
def train(
    context: CommandContext,
    from_ms: int | None,
    to_ms: int | None,
    files: tuple[Path, ...],
    out: Path | None,
    **layout: Any,
) -> None:
    """Train the model on history, print its figures on the newest part beside the baselines', and store it.

    The newest share `training.holdout` of the history is not trained on; the figures are measured there, in standard
    deviations of each sensor."""
    from pipeline.service.assembly import task_settings
    from pipeline.service.fitting import fit

    if not files and any(value for name, value in layout.items() if name != "decimal" and name != "field"):
        raise SettingsError(
            "the columns of a file were named, but no file: add --data FILE, or leave them out to read the topic"
        )
    folder = out or Path(context.settings.model.path)
    _require_writable(folder)
    with context.progress() as progress:
        history = _history(context, progress, from_ms, to_ms, files, layout)
        sequences = history.sequences(from_ms, to_ms, context.settings.training.history_ms)
        context.note(
            f"{history.readings:,} readings of {len(history.sensors):,} sensors, {len(sequences):,} steps"
            + (f", {history.rejected:,} refused or late" if history.rejected else "")
        )
        bar = progress.add_task("starting TensorFlow", total=context.settings.training.epochs)

        def show(at: TrainingProgress) -> None:
            loss = f"loss {at.loss:.4f}" + (
                f", early stopping {at.stopping_loss:.4f}" if at.stopping_loss is not None else ""
            )
            progress.update(bar, completed=at.epoch - 1 + at.done, description=f"epoch {at.epoch}/{at.epochs} {loss}")

        trained = fit(context.settings, task_settings(context.settings).spec, sequences, folder, show)
    if context.settings.forecast.estimate_season:
        from pipeline.service.fitting import seasons_of

        context.note(f"{seasons_of(trained.model.forecaster.spec)}, told from the history (forecast.estimate_season)")
    _report(context, trained, folder)


def _require_writable(folder: Path) -> None:
    """Told before the training, not after it. Makes nothing: a folder without a model in it is an error to `millrace run`."""
    nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        found = "not writable" if nearest.is_dir() else "no folder"
        raise DeploymentError(
            f"the model cannot go to {folder}: {nearest} is {found}; name another with --out or [model] path"
        )


def _history(
    context: CommandContext,
    progress: Progress,
    from_ms: int | None,
    to_ms: int | None,
    files: tuple[Path, ...],
    layout: dict[str, Any],
) -> History:
    from pipeline.kafka.source import RecordSource
    from pipeline.service.assembly import task_settings
    from pipeline.service.files import read_file
    from pipeline.service.history import from_batches, from_topic

    settings = context.settings
    core = task_settings(settings)
    if files:
        batches = (batch for path in files for batch in read_file(path, layout_of(dict(layout)), from_ms, to_ms))
        return from_batches(core, batches)
    bar = progress.add_task(f"reading {settings.topics.readings_topic}", total=None)

    def show(read: int, total: int) -> None:
        progress.update(bar, completed=read, total=total)

    with RecordSource(settings, settings.topics.readings_topic, group=False) as source:
        return from_topic(core, source, from_ms, to_ms, show)


def _report(context: CommandContext, trained: Trained, folder: Path) -> None:
    context.emit(
        [_row(figures) for figures in trained.figures], title="held back: errors in standard deviations of each sensor"
    )
    model: TrainedModel = trained.model
    context.note(
        f"model {model.forecaster.version} in {folder}: best of epoch {model.best_epoch} of {len(model.history)}, "
        f"{model.data['steps']:,} steps of {model.data['sensors']:,} sensors, {model.seconds:.0f} s"
    )
    context.note(
        f"to serve it: `millrace models import {folder} --promote`, at any time; a worker that finds no champion when it starts "
        "takes what is at model.path"
    )
    if not trained.beats_baselines:
        context.note(
            "it does not beat the baselines on this history: give it more history, or more epochs, before you serve it"
        )


def _row(figures: Figures) -> dict[str, Any]:
    if not figures.labels:
        raise DeploymentError(
            "the held-back part holds no truth to score against: give more history, or a smaller training.holdout"
        )
    return {
        "forecaster": figures.name,
        "pinball": round(figures.pinball, 4),
        "MSE": round(figures.mse, 4),
        "MAE": round(figures.mae, 4),
        f"coverage of {figures.expected_coverage:.0%}": f"{figures.coverage:.1%}",
        "labels": figures.labels,
    }
