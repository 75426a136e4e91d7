"""From history to a model: `fit` for a folder, `challenge` for the gate."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from models.artifact import MODEL_FILE, save
from models.baselines import LastValue, SeasonalNaive
from models.evaluation import Figures, evaluate
from models.forecaster import Forecaster, Model, SeriesSpec
from models.gate import GateRule, Verdict, judge
from models.seasonality import MOST_STEPS, estimate_seasons
from models.sequences import Sequences
from models.training import Neural, TrainedModel, TrainingError, TrainingProgress, figures, network_of, train
from pipeline.errors import DeploymentError
from pipeline.settings import Settings, format_duration

log = logging.getLogger(__name__)

MOST_SEASONS = 2
"""A day and a week, say."""
CHALLENGER, CHAMPION = "challenger", "champion"


@dataclass(frozen=True, slots=True)
class Trained:
    """A stored model and how it compares; the model's own figures come first."""

    model: TrainedModel
    figures: list[Figures]

    @property
    def beats_baselines(self) -> bool:
        own, *baselines = self.figures
        return all(own.pinball < other.pinball and own.mse < other.mse for other in baselines)


@dataclass(frozen=True, slots=True)
class Challenge:
    """A challenger, and what the gate says of it."""

    model: TrainedModel
    manifest: dict[str, Any]
    body: bytes
    """Of model.keras."""
    figures: list[Figures]
    """challenger, champion (if it compares), baselines: on the same slice."""
    verdict: Verdict
    parent: str
    """Version whose weights it began with; empty: none."""
    seconds: float

    @property
    def version(self) -> str:
        return str(self.manifest["version"])


def fit(
    settings: Settings,
    spec: SeriesSpec,
    sequences: Sequences,
    folder: Path,
    progress: Callable[[TrainingProgress], None] | None = None,
) -> Trained:
    """Train as the settings say, score on the held-back part, and store in `folder`.

    Raises DeploymentError where the history is too short to train on."""
    spec = learned_spec(spec, sequences, None)
    trained = _train(settings, spec, sequences, None, progress)
    found = figures(trained, sequences, _baselines(spec))
    save(folder, trained, found)
    return Trained(trained, found)


def challenge(
    settings: Settings,
    spec: SeriesSpec,
    sequences: Sequences,
    champion: Model | None,
    progress: Callable[[TrainingProgress], None] | None = None,
    changed_ms: int | None = None,
) -> Challenge:
    """Train a challenger, from the champion's weights where it has their shape, and hold it, the champion and the baselines against the
    newest held-back slice. A champion with another horizon or other quantiles cannot be compared: the baselines decide.

    changed_ms: when the series began to behave otherwise. No more than half of what came since then is held back: who is judged by the
    new behaviour must have seen some of it.

    Raises DeploymentError where the history is too short to train on."""
    spec = learned_spec(spec, sequences, champion)
    trained = _train(
        settings, spec, sequences, network_of(champion), progress, _holdout(settings, sequences, changed_ms)
    )
    compares = champion is not None and champion.spec == spec
    others: list[Forecaster] = [*([champion] if champion is not None and compares else []), *_baselines(spec)]
    own, *rest = evaluate(sequences, [trained.in_service, *others], trained.holdout_from_ms, trained.before)
    own = replace(own, name=CHALLENGER)
    served = replace(rest.pop(0), name=CHAMPION) if compares else None
    retraining = settings.retraining
    rule = GateRule(retraining.margin, retraining.max_lead_loss, retraining.min_labels)
    verdict = judge(rule, own, served, rest)
    if champion is not None and not compares:
        note = f"{verdict.reason} (the champion {champion.version} forecasts another horizon or other quantiles: not compared)"
        verdict = replace(verdict, reason=note)
    found = [own, *([served] if served else []), *rest]
    with tempfile.TemporaryDirectory(prefix="millrace-challenger-") as name:
        manifest = save(Path(name), trained, found)
        body = (Path(name) / MODEL_FILE).read_bytes()
    parent = champion.version if champion is not None and trained.warm else ""
    return Challenge(trained, manifest, body, found, verdict, parent, trained.seconds)


def learned_spec(spec: SeriesSpec, sequences: Sequences, champion: Model | None) -> SeriesSpec:
    """The series with their seasons: where these are open, the champion's or, for a first model, what the history shows."""
    if not spec.seasons_open:
        return spec
    if champion is not None:
        return replace(spec, seasons=champion.spec.seasons)
    found = estimate_seasons(sequences.grid(spec.step_ms, spec.targets, MOST_STEPS), spec.step_ms, MOST_SEASONS)
    spec = replace(spec, seasons=tuple(season.steps for season in found))
    log.info("%s, told from %s steps of %s sensors", seasons_of(spec), f"{len(sequences):,}", f"{sequences.sensors:,}")
    return spec


def seasons_of(spec: SeriesSpec) -> str:
    """In words.

    >>> seasons_of(SeriesSpec(("t.mean",), (0,), 900_000, 4, (0.5,), (96, 672)))
    'seasons 1d (96 steps) and 7d (672 steps)'
    """
    lengths = [f"{format_duration(steps * spec.step_ms)} ({steps:,} steps)" for steps in spec.seasons]
    return f"season{'s' if len(lengths) > 1 else ''} {' and '.join(lengths)}" if lengths else "no season"


def _train(
    settings: Settings,
    spec: SeriesSpec,
    sequences: Sequences,
    start: Neural | None,
    progress: Callable[[TrainingProgress], None] | None,
    holdout: float | None = None,
) -> TrainedModel:
    training, model = settings.training, settings.model
    try:
        return train(
            sequences,
            spec,
            cell=model.cell,
            units=model.units,
            layers=model.layers,
            warmup_steps=settings.forecast.warmup_steps,
            chunk_steps=training.chunk_steps,
            lanes=training.lanes,
            epochs=training.epochs,
            warm_epochs=min(training.epochs, settings.retraining.epochs),
            patience=training.patience,
            learning_rate=training.learning_rate,
            holdout=holdout or training.holdout,
            seed=training.seed,
            start=start,
            progress=progress,
        )
    except TrainingError as error:
        raise DeploymentError(str(error)) from error


def _holdout(settings: Settings, sequences: Sequences, changed_ms: int | None) -> float:
    """Newest share of the steps."""
    share = settings.training.holdout
    if changed_ms is None or not len(sequences):
        return share
    middle_ms = (changed_ms + int(sequences.end_ms.max())) // 2
    return min(share, float((sequences.end_ms > middle_ms).mean()) or share)


def _baselines(spec: SeriesSpec) -> list[Forecaster]:
    return [LastValue(spec), *([SeasonalNaive(spec)] if spec.seasons else [])]
