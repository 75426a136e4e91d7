"""`millrace forecast`: from a file to the steps after its end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from pipeline.commands.backtest import watching
from pipeline.commands.common import CommandContext, with_context
from pipeline.commands.replay import layout_of, layout_options

SHOWN = 12
"""Rows printed."""


@click.command()
@click.option(
    "--data", "files", type=click.Path(path_type=Path, exists=True, dir_okay=False), multiple=True, required=True,
    metavar="FILE", help="A CSV or Parquet file; may be given again.",
)  # fmt: skip
@layout_options
@click.option(
    "--model",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    metavar="DIR",
    help="A trained model; else one is trained.",
)
@click.option("--horizon", type=click.IntRange(min=1), help="Steps ahead; else forecast.horizon.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    metavar="FILE",
    help="Forecasts, .csv or .parquet.",
)
@click.option(
    "--plot", type=click.Path(path_type=Path, dir_okay=False), metavar="PNG", help="A picture of the first sensors."
)
@with_context
def forecast(
    context: CommandContext,
    files: tuple[Path, ...],
    model: Path | None,
    horizon: int | None,
    out: Path,
    plot: Path | None,
    **layout: Any,
) -> None:
    """The next steps after the end of a file, with quantiles.

    Fields, step and season are told from the file unless the settings name them; a model is trained on it unless one is given.

    \b
    millrace forecast --data ETTh1.csv --time-column date --value-columns '*' --out next.csv --plot next.png
    """
    from pipeline.service.ahead import draw_ahead, look_ahead, require_suffix, write_frame

    require_suffix(out)
    if horizon is not None:
        context.overrides["forecast.horizon"] = horizon
    with watching(context) as watcher:
        ahead = look_ahead(context.settings, files, layout_of(layout), str(model or ""), watcher)
    write_frame(out, ahead.frame)
    rows = ahead.frame.head(SHOWN).drop(columns="model_version")
    context.emit(
        [
            {str(name): value.isoformat(" ") if hasattr(value, "isoformat") else value for name, value in row.items()}
            for row in rows.to_dict("records")
        ],
        title=f"The first {len(rows)} of {len(ahead.frame):,} rows",
    )
    for note in ahead.notes:
        context.note(note)
    context.note(f"{ahead.frame['unique_id'].nunique():,} series in {out}")
    if plot is not None:
        draw_ahead(
            plot, ahead, f"The next {ahead.data.core.spec.horizon} steps after {', '.join(file.name for file in files)}"
        )
        context.note(f"picture in {plot}")
