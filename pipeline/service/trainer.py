"""From history to a model folder, with its figures beside the baselines'."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from models.artifact import save
from models.baselines import LastValue, SeasonalNaive
from models.evaluation import Figures
from models.forecaster import SeriesSpec
from models.sequences import Sequences
from models.training import TrainedModel, TrainingError, TrainingProgress, figures, train
from pipeline.errors import DeploymentError
from pipeline.settings import Settings


@dataclass(frozen=True, slots=True)
class Trained:
    """A stored model and how it compares; the model's own figures come first."""

    model: TrainedModel
    figures: list[Figures]

    @property
    def beats_baselines(self) -> bool:
        own, *baselines = self.figures
        return all(own.pinball < other.pinball and own.mse < other.mse for other in baselines)


def fit(
    settings: Settings,
    spec: SeriesSpec,
    sequences: Sequences,
    folder: Path,
    progress: Callable[[TrainingProgress], None] | None = None,
) -> Trained:
    """Train as the settings say, score on the held-back part, and store in `folder`.

    Raises DeploymentError where the history is too short to train on."""
    training, model = settings.training, settings.model
    try:
        trained = train(
            sequences,
            spec,
            cell=model.cell,
            units=model.units,
            layers=model.layers,
            warmup_steps=settings.forecast.warmup_steps,
            chunk_steps=training.chunk_steps,
            lanes=training.lanes,
            epochs=training.epochs,
            patience=training.patience,
            learning_rate=training.learning_rate,
            holdout=training.holdout,
            seed=training.seed,
            progress=progress,
        )
    except TrainingError as error:
        raise DeploymentError(str(error)) from error
    baselines = [LastValue(spec), *([SeasonalNaive(spec)] if spec.seasons else [])]
    found = figures(trained, sequences, baselines)
    save(folder, trained, found)
    return Trained(trained, found)
