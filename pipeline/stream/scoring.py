"""Forecasts held against what came: each step is the truth of what was said of it 1, 5, 24 ... steps before.

    step n      said of n + lead ────────────────┐
    step n + lead                      truth ────┴──> errors of this lead, in the sensor's running standard deviations

What was said waits in the sensor's own row, a ring of `lead` places for each lead: the place of step n is read (it was written
`lead` steps ago) and then written anew. A reset empties the rings. Model and baseline are held against the same labels; where only
one of the two had spoken, neither is scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from models.features import Context
from models.forecaster import Column, Prediction, Rows, SeriesSpec
from models.measures import pinball_loss
from pipeline.stream.columns import Bool, Float64, Int64, OutgoingRecords, Steps

MODEL, BASELINE = 0, 1
MEASURES: Final = ("labels", "absolute_error", "squared_error", "pinball_loss", "covered")
"""Sums over labels. Errors in standard deviations, squared error in their squares, pinball loss as the mean over the levels; covered:
truths between the outermost quantiles."""
LABELS, ABSOLUTE, SQUARED, PINBALL, COVERED = range(len(MEASURES))
MODEL_COLUMN: Final = "score.model"
BASELINE_COLUMN: Final = "score.baseline"


def default_leads(horizon: int) -> tuple[int, ...]:
    """The first, the last, and the one between them by ratio.

    >>> default_leads(24), default_leads(2), default_leads(1)
    ((1, 5, 24), (1, 2), (1,))
    """
    return tuple(np.unique(np.round(np.geomspace(1, horizon, 3)).astype(int)).tolist())


@dataclass(frozen=True, slots=True)
class Scores:
    """What m closed windows of one partition showed."""

    partition: int
    model: str
    """Version whose forecasts matured; empty: there was none, and the baseline is scored alone."""
    baseline: str
    leads: tuple[int, ...]
    end_ms: Int64
    """(m)"""
    offset: Int64
    """(m) of the reading that closed the window."""
    steps: Int64
    """(m) sensors that made a step, gaps included."""
    sums: Float64
    """(m, 2, 5, L): model and baseline; MEASURES; lead."""

    def __len__(self) -> int:
        return len(self.end_ms)


class Sums(msgspec.Struct, frozen=True):
    """MEASURES by lead."""

    labels: list[float]
    absolute_error: list[float]
    squared_error: list[float]
    pinball_loss: list[float]
    covered: list[float]


class WindowScore(msgspec.Struct, frozen=True):
    """One closed window of one partition, as a record of the scores topic has it."""

    partition: int
    window_end: int
    """Epoch ms."""
    offset: int
    """Of the reading that closed it."""
    steps: int
    """Sensors that made a step."""
    model: str
    """Version whose forecasts matured; empty: none."""
    baseline: str
    leads: tuple[int, ...]
    scores: dict[str, Sums]
    """"model" and "baseline", over the same labels."""

    @property
    def sums(self) -> Float64:
        """(2, 5, L): model and baseline; MEASURES; lead."""
        rows = [[getattr(self.scores[who], name) for name in MEASURES] for who in ("model", "baseline")]
        return np.array(rows, np.float64)


class Scorer:
    """Keeps what was said in the rows, and scores it when its step has come."""

    def __init__(self, spec: SeriesSpec, leads: Sequence[int]) -> None:
        self.spec = spec
        self.leads = np.array(leads, np.int64)
        self._begin = np.concatenate([[0], np.cumsum(self.leads)[:-1]])
        self._levels = np.array(spec.quantiles)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(2, 5, L) of one step's sums."""
        return 2, len(MEASURES), len(self.leads)

    def columns(self) -> tuple[Column, ...]:
        places = (int(self.leads.sum()), len(self.spec.targets), 1 + len(self.spec.quantiles))
        return tuple(
            Column(name, places, np.dtype(np.float32), fill=np.nan) for name in (MODEL_COLUMN, BASELINE_COLUMN)
        )

    def advance(
        self, rows: Rows, live: Bool, context: Context, model: Prediction | None, spoke: Bool, baseline: Prediction
    ) -> Float64:
        """Score what a block's steps make known, then keep what was said at them. spoke: (B, T) where the model's answer counts.

        Returns (B, T, 2, 5, L); 0 where nothing was known and in padding."""
        batch, steps = live.shape
        sums = np.zeros((batch, steps, *self.shape))
        for step in range(steps):
            at = np.flatnonzero(live[:, step])
            place = self._begin + context.steps[at, step, None] % self.leads
            said = np.stack([rows[name][at[:, None], place] for name in (MODEL_COLUMN, BASELINE_COLUMN)], axis=1)
            truth = context.target_values[at, step][:, None, None, :]
            sums[at, step] = self._score(
                said, truth, context.scale[at, step][:, None, None, :], paired=model is not None
            )
            rows[BASELINE_COLUMN][at[:, None], place] = self._said(baseline, at, step)
            if model is not None:
                answer = self._said(model, at, step)
                answer[~spoke[at, step]] = np.nan
                rows[MODEL_COLUMN][at[:, None], place] = answer
        return sums

    def _said(self, prediction: Prediction, at: Int64, step: int) -> NDArray[np.float32]:
        """(n, L, K, 1 + Q): mean and quantiles."""
        mean = prediction.mean[at[:, None], step, self.leads - 1]
        quantiles = prediction.quantiles[at[:, None], step, self.leads - 1]
        return np.concatenate([mean[..., None], quantiles], axis=-1)

    def _score(self, said: NDArray[np.float32], truth: Float64, unit: Float64, paired: bool) -> Float64:
        """said: (n, 2, L, K, 1 + Q); truth, unit: (n, 1, 1, K) -> (n, 2, 5, L)."""
        said = said.astype(np.float64)
        error = (truth - said[..., 0]) / unit
        known = np.isfinite(error)
        if paired:
            known &= known[:, ::-1]
        shortfall = (truth[..., None] - said[..., 1:]) / unit[..., None]
        pinball = pinball_loss(shortfall, self._levels)
        covered = (truth >= said[..., 1]) & (truth <= said[..., -1])
        measures = (known, np.abs(error), error**2, pinball, covered)
        return np.stack([np.where(known, measure, 0.0).sum(axis=-1) for measure in measures], axis=2)


def by_window(
    steps: Steps, sums: Float64, chosen: Bool, partition: int, model: str, baseline: str, leads: Sequence[int]
) -> Scores:
    """The sums of m steps (m, 2, 5, L), ordered by (window, slot), gathered window by window; of the chosen steps only."""
    rows = np.flatnonzero(chosen)
    end_ms = steps.end_ms[rows]
    first = np.flatnonzero(np.diff(end_ms, prepend=-1)) if len(rows) else np.empty(0, np.int64)
    total = np.add.reduceat(sums[rows], first, axis=0) if len(rows) else sums[:0]
    return Scores(
        partition=partition,
        model=model,
        baseline=baseline,
        leads=tuple(int(lead) for lead in leads),
        end_ms=end_ms[first],
        offset=steps.offset[rows][first],
        steps=np.diff(np.append(first, len(rows))),
        sums=total,
    )


def encode_scores(scores: Scores, topic: str) -> OutgoingRecords:
    """One JSON record a window, keyed by the partition's number."""
    values = [
        msgspec.json.encode(
            WindowScore(
                partition=scores.partition,
                window_end=end_ms,
                offset=offset,
                steps=steps,
                model=scores.model,
                baseline=scores.baseline,
                leads=scores.leads,
                scores={who: _sums(sums[row]) for row, who in enumerate(("model", "baseline"))},
            )
        )
        for end_ms, offset, steps, sums in zip(
            scores.end_ms.tolist(), scores.offset.tolist(), scores.steps.tolist(), scores.sums
        )
    ]
    return OutgoingRecords(topic, scores.partition, [b"%d" % scores.partition] * len(values), values)


def decode_score(value: bytes) -> WindowScore:
    """Raises msgspec.MsgspecError for what is no score."""
    return msgspec.json.decode(value, type=WindowScore)


def _sums(rows: NDArray[Any]) -> Sums:
    """(5, L); six digits are plenty, and keep the records small."""
    return Sums(*([float(f"{value:.6g}") for value in row] for row in rows.tolist()))
