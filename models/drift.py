"""Has the model's error risen? Page-Hinkley over the windows of one partition, each held against its own phase of the season.

    errors by lead ──/ level of the lead──> mean over leads ──/ profile of the phase──> 1 + residual ──/ deviation──> z
    statistic = max(0, statistic + clip(z) - delta)            alarm above the threshold, over below half of it

1. **Like with like.** Each lead is divided by its own usual error before leads are averaged, so that it makes no difference which of
   them have labels: right after a swap only the short ones do.
2. **Season.** A profile over the longest season (in at most MOST_BINS bins) says how the error usually goes up and down. Its means are
   shrunk to the overall mean by a one-way analysis of variance (Efron, B. and Morris, C. (1973), Stein's estimation rule and its
   competitors, J. Am. Stat. Assoc. 68), so that errors without a season get a flat one.
3. **Deviation.** Within phases, times sqrt((1 + r) / (1 - r)) with r the lag-1 autocorrelation of the residuals (0 to 0.9): the
   deviation of a sum of an AR(1) sequence, which is what the statistic is. Errors of long leads overlap and are correlated. It is never
   taken for less than MIN_DEVIATION: a rise of a few percent is no drift, however exactly a large fleet measures it.
4. **One wild window does not alarm**: z is clipped; with the default threshold of 12 at least four windows must be wild.
5. **The reference does not learn from drift**: it stands still while the statistic is above half the threshold.
6. **Before the first alarm** two seasons must have been seen, and 50 windows: two, because variation within a phase and between phases
   cannot be told apart from one. After a swap (`restart`) profile and deviation are kept, and each lead learns its new level
   over RELEARN windows. A model that serves less than a season (without one: 25 windows) before the first profile is there
   teaches nothing.
7. **The baseline's error is not used.** Dividing by it would tell a world that is harder for everybody from a model that is wrong, but
   the seasonal naive is wrong for a season after every change too: the alarm comes a season later (below). What is gained where errors
   of the whole fleet wander by 20 % with r = 0.9 (most rises of 50 % are missed without it) is left to the schedule, and a learning that
   brings nothing to the gate.

Simulated: three leads, season 24 (errors up and down by half), 50 windows and two seasons learned, threshold 12; windows until a rise at
window 300 alarms, median of 30 (most); false alarms in 10,000 windows or more. spread: standard deviation of a window's error, as a
share of it.

    errors of a window                      false alarms per 1,000      + 50 %       + 100 %
    independent, spread 0.10                         0.0                4  (5)        4  (4)
    independent, spread 0.25                         0.0                8 (18)        5  (7)
    AR(1) 0.5, spread 0.10                           0.0                4  (8)        4  (4)
    AR(1) 0.5, spread 0.25                           0.0               16 (51)        6 (16)
    AR(1) 0.5 and season, spread 0.25                0.0               17 (45)        6 (16)
    AR(1) 0.9, spread 0.10                           0.2                7 (24)        4  (5)
    AR(1) 0.9, spread 0.25                           0.2               49 (10 missed) 10 (1 missed)
    one sensor, normal errors (spread 0.75)          0.0               21 (51)       10 (21)
    AR(1) 0.5, spread 0.10, over the baseline's      0.05              30 (34)       28 (28)

A season that the rule is not told of counts as correlation, and makes the detector nearly deaf.

Page, E. S. (1954), Continuous inspection schemes, Biometrika 41; Hinkley, D. V. (1971), Inference about the change-point from
cumulative sum tests, Biometrika 58.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

Float64 = NDArray[np.float64]

DELTA: Final = 0.5
"""Rise that is tolerated for good, in deviations."""
CLIP: Final = 4.0
"""A window counts for no more than so many deviations."""
MOST_BINS: Final = 168
"""A week of hours."""
LEARN: Final = 50
"""Windows before the first alarm, at least: the level is then known to 0.14 deviations, well inside DELTA."""
RELEARN: Final = 25
"""Windows of each lead after a swap: 0.2 deviations."""
TINY: Final = 1e-12
"""Stands for an error of 0, so that a model that was never wrong has a level to rise from."""
MIN_DEVIATION: Final = 0.05
"""Of the error's ratio to its usual size."""
MAX_CORRELATION: Final = 0.9
MEMORY: Final = 5
"""The reference remembers so many times what it first learned from; older windows fade."""


@dataclass(frozen=True, slots=True)
class DriftRule:
    """threshold: in deviations. season_windows: length of the longest season, 0 if there is none."""

    threshold: float = 12.0
    season_windows: int = 0

    @property
    def bins(self) -> int:
        return max(1, min(self.season_windows, MOST_BINS))

    @property
    def learning_windows(self) -> int:
        return max(2 * self.season_windows, LEARN)

    @property
    def shortest_stretch(self) -> int:
        """Windows of one model from which its levels can be told."""
        return max(self.season_windows, RELEARN)

    @property
    def clip(self) -> float:
        """Below the threshold, however low that is: two windows in a row are never enough."""
        return min(CLIP, DELTA + self.threshold / 2)

    def phase(self, window: int) -> int:
        """Bin of the window with this number (window end // step)."""
        return window % self.season_windows * self.bins // self.season_windows if self.season_windows else 0


class DriftDetector:
    """One partition's sequence of windows. State is a pure function of the calls, and bounded by the season's length."""

    def __init__(self, rule: DriftRule, leads: int) -> None:
        self.rule = rule
        self.statistic = 0.0
        """In deviations; at most one window's worth above the threshold, so that an alarm ends soon after its cause."""
        self.alarmed = False
        """From the window on which the statistic exceeded the threshold, until it is below half of it."""
        self._first: _FirstLearning | None = _FirstLearning(rule)
        self._season = _Season(rule)
        self._levels = _Levels(leads, MEMORY * rule.learning_windows)
        self._usual_labels = _Levels(leads, LEARN)

    @property
    def ready(self) -> bool:
        """True once the reference is there and some lead is held against it."""
        return self._first is None and bool(self._levels.known.any())

    def observe(self, window: int, labels: ArrayLike, errors: ArrayLike) -> bool:
        """Take in the next window; True if the alarm begins with it.

        window: its number, window end // step. labels, errors: (L) how many, and the sum of absolute errors over them. A lead
        without labels, or with less than half of its usual number, is left out.
        """
        count, total = np.asarray(labels, np.float64), np.asarray(errors, np.float64)
        enough = (count > 0) & np.isfinite(total) & (2 * count >= self._usual_labels.mean)
        self._usual_labels.add(count, count > 0)
        if not enough.any():
            return False
        error = np.where(enough, np.maximum(total / np.maximum(count, 1), TINY), np.nan)
        phase = self.rule.phase(window)
        if self._first is not None:
            self._learn(self._first, phase, error)
            return False
        return self._test(phase, error)

    def rearm(self) -> None:
        """Begin the test anew against the same reference: somebody has looked at the alarm."""
        self.statistic, self.alarmed = 0.0, False

    def restart(self) -> None:
        """Another model serves: begin anew, with levels to be learned."""
        self.rearm()
        self._levels.forget()
        if self._first is not None:
            self._first.cut()

    def _learn(self, first: _FirstLearning, phase: int, error: Float64) -> None:
        first.windows.append((phase, error))
        if first.seen >= self.rule.learning_windows:
            level, count = first.cut()
            self._levels.mean, self._levels.count = level, count
            self._season.learn(first.ratios)
            self._first = None

    def _test(self, phase: int, error: Float64) -> bool:
        usual, deviation = self._season.profile[phase], self._season.deviation
        tested = np.isfinite(error) & self._levels.known
        if not tested.any():
            self._levels.add(self._bounded(error / usual), np.isfinite(error))
            return False
        ratio = float((error[tested] / self._levels.mean[tested]).mean())
        z = min(max((ratio / usual - 1.0) / deviation, -self.rule.clip), self.rule.clip)
        self.statistic = min(max(0.0, self.statistic + z - DELTA), self.rule.threshold + self.rule.clip)
        began = not self.alarmed and self.statistic > self.rule.threshold
        self.alarmed = began or (self.alarmed and 2 * self.statistic >= self.rule.threshold)
        if not self.alarmed and 2 * self.statistic <= self.rule.threshold:
            self._levels.add(self._bounded(error / usual), np.isfinite(error))
            self._season.add(phase, usual * (1.0 + z * deviation))
        return began

    def _bounded(self, error: Float64) -> Float64:
        """(L) No further above its level than a window may count, once there is a level worth the name."""
        most = self._levels.mean * (1.0 + CLIP * self._season.deviation)
        return np.where(self._levels.count >= 5, np.minimum(error, most), error)


class _FirstLearning:
    """Windows gathered until there are enough for a profile; each stretch of one model with levels of its own."""

    def __init__(self, rule: DriftRule) -> None:
        self.rule = rule
        self.windows: list[tuple[int, Float64]] = []
        """(phase, (L) mean error) of the model that serves now."""
        self.ratios: list[tuple[int, float]] = []
        """(phase, error in units of its level) of the models before."""

    @property
    def seen(self) -> int:
        return len(self.ratios) + (len(self.windows) if len(self.windows) >= self.rule.shortest_stretch else 0)

    def cut(self) -> tuple[Float64, Float64]:
        """The stretch ends: its (L) levels and the windows that they were learned from."""
        windows, self.windows = self.windows, []
        if len(windows) < self.rule.shortest_stretch:
            return np.zeros(0), np.zeros(0)
        error = _without_outliers(np.stack([error for _, error in windows]))
        count = np.isfinite(error).sum(axis=0).astype(np.float64)
        level = np.nansum(error, axis=0) / np.maximum(count, 1)
        trusted = count >= RELEARN
        ratio = np.where(trusted, error / np.maximum(level, TINY), np.nan)
        for (phase, _), row in zip(windows, ratio):
            if np.isfinite(row).any():
                self.ratios.append((phase, float(np.nanmean(row))))
        return level, count


def _without_outliers(error: Float64) -> Float64:
    """(n, L) With what lies more than five robust deviations above the median brought down to there."""
    kept = error.copy()
    for lead in range(error.shape[1]):
        known = error[np.isfinite(error[:, lead]), lead]
        if len(known):
            middle = float(np.median(known))
            spread = 1.4826 * float(np.median(np.abs(known - middle)))
            kept[:, lead] = np.minimum(error[:, lead], middle + 5 * max(spread, MIN_DEVIATION * middle))
    return kept


class _Levels:
    """Running mean by lead that forgets beyond `memory` values."""

    def __init__(self, leads: int, memory: int) -> None:
        self.mean: Float64 = np.zeros(leads)
        self.count: Float64 = np.zeros(leads)
        self.memory = memory

    @property
    def known(self) -> NDArray[np.bool_]:
        return np.asarray(self.count >= RELEARN)

    def add(self, value: Float64, where: NDArray[np.bool_]) -> None:
        self.count = np.where(where, np.minimum(self.count + 1, self.memory), self.count)
        self.mean = np.where(where, self.mean + (value - self.mean) / np.maximum(self.count, 1), self.mean)

    def forget(self) -> None:
        self.mean, self.count = np.zeros_like(self.mean), np.zeros_like(self.count)


class _Season:
    """Mean and deviation of the error's ratio to its level, by phase; the lag-1 autocorrelation of what is left."""

    def __init__(self, rule: DriftRule) -> None:
        self.count: Float64 = np.zeros(rule.bins)
        self.mean: Float64 = np.ones(rule.bins)
        self.squares: Float64 = np.zeros(rule.bins)
        """Sum of squared distances to the mean of the phase."""
        self.memory = MEMORY * rule.learning_windows
        self.profile: Float64 = np.ones(rule.bins)
        self.deviation = MIN_DEVIATION
        self._previous = 0.0
        self._products, self._powers, self._pairs = 0.0, 0.0, 0
        self._within = 0.0

    def learn(self, ratios: list[tuple[int, float]]) -> None:
        """(phase, ratio) of the first windows, in order."""
        for phase, ratio in ratios:
            self._gather(phase, ratio)
        self._describe()
        for phase, ratio in ratios:
            self._correlate(ratio / self.profile[phase] - 1.0)
        self._describe()

    def add(self, phase: int, ratio: float) -> None:
        self._correlate(ratio / self.profile[phase] - 1.0)
        self._gather(phase, ratio)
        self._describe()

    def _gather(self, phase: int, ratio: float) -> None:
        """Welford's update; beyond the memory the phase forgets a value's worth first."""
        most = max(self.memory / len(self.count), 2.0)
        if self.count[phase] >= most:
            self.squares[phase] *= (most - 1) / self.count[phase]
            self.count[phase] = most - 1
        self.count[phase] += 1
        before = ratio - self.mean[phase] if self.count[phase] > 1 else 0.0
        self.mean[phase] = self.mean[phase] + before / self.count[phase] if self.count[phase] > 1 else ratio
        self.squares[phase] += before * (ratio - self.mean[phase])

    def _correlate(self, residual: float) -> None:
        self._pairs = min(self._pairs + 1, self.memory)
        self._products += (residual * self._previous - self._products) / self._pairs
        self._powers += (residual**2 - self._powers) / self._pairs
        self._previous = residual

    def _describe(self) -> None:
        """Profile and deviation from the sums."""
        seen = self.count > 0
        count, mean = self.count[seen], self.mean[seen]
        overall = float((count * mean).sum() / count.sum())
        freedom = float((count - 1).sum())
        within = float((self.squares[seen] / np.maximum(mean, TINY) ** 2).sum()) / freedom if freedom > 0 else 0.0
        noise = within * overall**2 / count
        between = max(0.0, float(mean.var(ddof=1) - noise.mean())) if len(mean) > 1 else 0.0
        weight = between / np.maximum(between + noise, 1e-300)
        self.profile = np.full(len(self.count), overall)
        self.profile[seen] = np.maximum(overall + weight * (mean - overall), 0.1 * overall)
        correlation = min(max(self._products / max(self._powers, 1e-300), 0.0), MAX_CORRELATION)
        self.deviation = max(float(np.sqrt(within * (1 + correlation) / (1 - correlation))), MIN_DEVIATION)
