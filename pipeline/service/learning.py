"""When to learn again and when to take a model back: pure decisions from the scores of closed windows.

    scores ──> Learner ──> due()             first | drift | schedule | steps, within the budget of a day
                      └──> disappointment()  the version that serves against the one before it

Times are event time (epoch ms of window ends), so that a replay of the same calls makes the same decisions. Rules:

1. Nothing is due while old scores are being read again, that is while the newest window seen is older than the newest decision.
2. In any 24 hours of event time no more than `max_per_day` trainings are begun, whatever the trigger. Requests by a person are theirs.
3. A drift alarm must have stood for `settle_ms`, so that there is something new to learn from, and be younger than the decision
   before it, which must be `cooldown_ms` ago. It is over when the statistic falls or the model is swapped.
4. A decision begins the drift test anew against the same reference; an error that stays high alarms again, after a refusal too.
5. A drift detector follows one partition's scores from version to version; only one that has arrived at the champion counts.
6. A champion is judged while it is on probation, by its pinball loss relative to the baseline's: against the previous champion's
   over the stretch before the swap, at the same phases of the longest season, lead by lead over the leads that both have labels of.
   One wild window does not take a model back: most windows must agree.

Scores arrive in log order within a partition, partitions interleaved in any way. A window that a partition has been seen past is not
counted twice (a worker that sends at least once repeats itself; a state that was reset answers its log again).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal

import numpy as np

from models.drift import DriftDetector, DriftRule
from pipeline.stream.columns import Float64
from pipeline.stream.scoring import ABSOLUTE, BASELINE, LABELS, MODEL, PINBALL, WindowScore

if TYPE_CHECKING:
    from pipeline.settings import Settings

DAY_MS: Final = 86_400_000
FIRST_WINDOWS: Final = 100
"""A first model is not worth training on less; nor on fewer than four seasons or four horizons."""
MIN_WINDOWS: Final = 6
"""Windows of a new champion before it is judged; fewer where the probation is shorter. With most of them against it, three may be
wild and it stays."""
KEPT_DECISIONS: Final = 1_000
"""Where a partition's detector begins anew; more than a topic of scores goes back."""
KEPT_VERSIONS: Final = 4
"""Versions whose windows are remembered: the champion, the one before, and two that partitions may still be leaving."""

Trigger = Literal["first", "drift", "schedule", "steps", "request"]


@dataclass(frozen=True, slots=True)
class LearningRule:
    """What decides, with every default resolved. Times in ms of event time."""

    step_ms: int
    season_windows: int
    """Of the longest season; 0: there is none."""
    first_windows: int
    """Windows of a partition before the first training."""
    every_ms: int | None
    every_steps: int
    """0: never."""
    on_drift: bool
    drift_threshold: float
    """In deviations."""
    settle_ms: int
    cooldown_ms: int
    max_per_day: int
    min_labels: int
    rollback: bool
    rollback_margin: float
    probation_ms: int

    @classmethod
    def of(cls, settings: Settings) -> LearningRule:
        """Empty settle: the longest season, or the horizon; empty probation: two seasons, or two horizons."""
        retraining, step_ms = settings.retraining, int(settings.windows.hop_ms)
        season_ms = int(max(settings.forecast.season_ms, default=0))
        horizon = settings.forecast.horizon
        natural_ms = season_ms or horizon * step_ms
        settle_ms, probation_ms = retraining.settle_ms, retraining.probation_ms
        return cls(
            step_ms=step_ms,
            season_windows=season_ms // step_ms,
            first_windows=max(4 * (season_ms // step_ms), 4 * horizon, FIRST_WINDOWS),
            every_ms=None if retraining.every_ms is None else int(retraining.every_ms),
            every_steps=retraining.every_steps,
            on_drift=retraining.on_drift,
            drift_threshold=retraining.drift_threshold,
            settle_ms=natural_ms if settle_ms is None else int(settle_ms),
            cooldown_ms=int(retraining.cooldown_ms),
            max_per_day=retraining.max_per_day,
            min_labels=retraining.min_labels,
            rollback=retraining.rollback,
            rollback_margin=retraining.rollback_margin,
            probation_ms=2 * natural_ms if probation_ms is None else int(probation_ms),
        )

    @property
    def drift(self) -> DriftRule:
        return DriftRule(self.drift_threshold, self.season_windows)

    @property
    def min_windows(self) -> int:
        return max(1, min(MIN_WINDOWS, self.probation_ms // self.step_ms))


@dataclass(frozen=True, slots=True)
class Due:
    """A training should begin."""

    trigger: Trigger
    until_ms: int
    """It may learn from windows that ended up to here."""
    reason: str
    """One plain sentence."""
    changed_ms: int | None = None
    """When the error began to rise, for "drift": there must be something to learn from and something to judge by after that."""


@dataclass(frozen=True, slots=True)
class Disappointment:
    """The champion should give way to the one before it."""

    version: str
    previous: str
    reason: str
    """One plain sentence."""
    figures: dict[str, float]
    """ratio: pinball loss as a share of the baseline's; before: the previous champion's (1 where it left no scores: the baseline
    itself); labels, windows: after the swap; labels_before, windows_before."""


@dataclass(slots=True)
class _Partition:
    """What is known of one partition."""

    detector: DriftDetector
    newest_ms: int = -1
    windows: int = 0
    version: str = ""
    """Whose scores came last."""
    alarm_ms: int | None = None
    """End of the window with which the standing alarm began."""


@dataclass(slots=True)
class _Trail:
    """What one version showed, over all partitions: (2, 2, L) labels and pinball loss of model and baseline, by window end."""

    first_ms: int
    opening: dict[int, Float64] = field(default_factory=dict)
    """[first_ms ---- first_ms + probation)"""
    recent: dict[int, Float64] = field(default_factory=dict)
    """(newest_ms - probation ---- newest_ms], and at most as much again where partitions are apart; in order of arrival."""
    newest_ms: int = -1


class Learner:
    """Fed with scores, the champions and the decisions, says what is to be done. A pure function of the sequence of calls; its
    memory is bounded by partitions, seasons and probation."""

    def __init__(self, rule: LearningRule) -> None:
        self.rule = rule
        self._leads: tuple[int, ...] = ()
        self._partitions: dict[int, _Partition] = {}
        self._trails: dict[str, _Trail] = {}
        """The version that scored last is last."""
        self._now_ms: int | None = None
        self._beginning_ms: int | None = None
        """End of the first window seen."""
        self._steps = 0
        """Since the training before."""
        self._version, self._previous = "", ""
        self._since_ms: int | None = None
        self._decisions_ms: list[int] = []
        """Ascending, the newest of them."""
        self._trained_ms: int | None = None
        self._begun_ms: list[int] = []
        """Trainings that count against the budget, of the newest day."""
        self._disappointed: set[str] = set()

    @property
    def now_ms(self) -> int | None:
        """The greatest window end seen in any partition, epoch ms; None before any."""
        return self._now_ms

    def observe(self, score: WindowScore) -> None:
        """Take in the score of a window. Other leads than before: what was known of errors is forgotten, it does not compare."""
        if score.leads != self._leads:
            self._forget_errors(score.leads)
        partition = self._partition(score.partition)
        if score.window_end <= partition.newest_ms:
            return
        self._now_ms = _later(self._now_ms, score.window_end)
        self._beginning_ms = score.window_end if self._beginning_ms is None else self._beginning_ms
        if self._trained_ms is None or score.window_end > self._trained_ms:
            self._steps += score.steps
        if score.model:
            sums = score.sums
            self._watch(partition, score, sums)
            self._follow(score, sums)
        partition.newest_ms = score.window_end
        partition.windows += 1

    def champion(self, version: str, previous: str, since_ms: int | None) -> None:
        """This version serves, after `previous` (empty: none), since the event time `since_ms` (None: not known). Called when it is
        promoted, when it returns by a rollback, and at the start with what the registry says; version empty: none serves."""
        self._version, self._previous, self._since_ms = version, previous, since_ms

    def decided(self, event_time_ms: int, trained: bool, requested: bool = False) -> None:
        """A training that went up to this event time has ended (promoted, refused or failed), or, trained=False, a champion was
        rolled back. requested: a person asked for it, and it does not count against the budget."""
        insort(self._decisions_ms, event_time_ms)
        del self._decisions_ms[:-KEPT_DECISIONS]
        if trained:
            if self._trained_ms is None or event_time_ms >= self._trained_ms:
                self._trained_ms, self._steps = event_time_ms, 0
            if not requested:
                self._begun_ms = [*self._begun_ms, event_time_ms]
        newest_ms = max(self._begun_ms, default=0)
        self._begun_ms = [begun_ms for begun_ms in self._begun_ms if begun_ms > newest_ms - DAY_MS]

    def due(self) -> Due | None:
        """The training that should begin now, if any. Ask when none is under way."""
        now_ms = self._now_ms
        if now_ms is None or (self._decided_ms is not None and now_ms < self._decided_ms):
            return None
        if sum(begun_ms > now_ms - DAY_MS for begun_ms in self._begun_ms) >= self.rule.max_per_day:
            return None
        if not self._version:
            return self._first(now_ms)
        return self._drift(now_ms) or self._schedule(now_ms) or self._after_steps(now_ms)

    def disappointment(self) -> Disappointment | None:
        """Whether the champion should give way; told once for each version.

        None without a previous champion, with rollback off, before it has MIN_WINDOWS windows and min_labels labels, and after
        its probation."""
        version, rule = self._version, self.rule
        trail = self._trails.get(version)
        if not rule.rollback or not self._previous or trail is None or version in self._disappointed:
            return None
        if self._now_ms is None or self._now_ms > trail.first_ms + rule.probation_ms:
            return None
        found = self._judge(trail)
        if found is not None:
            self._disappointed.add(version)
        return found

    # What comes in.

    @property
    def _decided_ms(self) -> int | None:
        return self._decisions_ms[-1] if self._decisions_ms else None

    def _decided_in(self, begin_ms: int, end_ms: int) -> bool:
        """Whether a decision was made in [begin_ms ---- end_ms)."""
        return bisect_left(self._decisions_ms, begin_ms) < bisect_left(self._decisions_ms, end_ms)

    def _forget_errors(self, leads: tuple[int, ...]) -> None:
        self._leads = leads
        self._trails.clear()
        for partition in self._partitions.values():
            partition.detector, partition.alarm_ms = DriftDetector(self.rule.drift, len(leads)), None

    def _partition(self, number: int) -> _Partition:
        if number not in self._partitions:
            self._partitions[number] = _Partition(DriftDetector(self.rule.drift, len(self._leads)))
        return self._partitions[number]

    def _watch(self, partition: _Partition, score: WindowScore, sums: Float64) -> None:
        """The partition's drift detector takes the window in."""
        detector = partition.detector
        if score.model != partition.version:
            if partition.version:
                detector.restart()
            partition.version, partition.alarm_ms = score.model, None
        if self._decided_in(partition.newest_ms, score.window_end):
            detector.rearm()
            partition.alarm_ms = None
        began = detector.observe(score.window_end // self.rule.step_ms, sums[MODEL, LABELS], sums[MODEL, ABSOLUTE])
        if began:
            partition.alarm_ms = score.window_end
        elif not detector.alarmed:
            partition.alarm_ms = None

    def _follow(self, score: WindowScore, sums: Float64) -> None:
        """The version's trail takes the window in."""
        trail = self._trails.pop(score.model, None) or _Trail(score.window_end)
        self._trails[score.model] = trail
        while len(self._trails) > KEPT_VERSIONS:
            del self._trails[self._stalest()]
        probation_ms, part = self.rule.probation_ms, sums[:, (LABELS, PINBALL)]
        if score.window_end < trail.first_ms:
            trail.first_ms = score.window_end
            for late_ms in [end_ms for end_ms in trail.opening if end_ms >= trail.first_ms + probation_ms]:
                del trail.opening[late_ms]
        if score.window_end < trail.first_ms + probation_ms:
            _add(trail.opening, score.window_end, part)
        trail.newest_ms = max(trail.newest_ms, score.window_end)
        if score.window_end > trail.newest_ms - probation_ms:
            _add(trail.recent, score.window_end, part)
        while (oldest_ms := next(iter(trail.recent))) <= trail.newest_ms - probation_ms:
            del trail.recent[oldest_ms]

    def _stalest(self) -> str:
        needed = (self._version, self._previous)
        return next(version for version in self._trails if version not in needed)

    # When to learn.

    def _first(self, now_ms: int) -> Due | None:
        windows = max((partition.windows for partition in self._partitions.values()), default=0)
        if windows < self.rule.first_windows:
            return None
        pause_ms = self.rule.cooldown_ms if self.rule.every_ms is None else self.rule.every_ms
        if self._trained_ms is not None and now_ms - self._trained_ms < pause_ms:
            return None
        return Due("first", now_ms, f"there is no model yet, and {windows} windows to learn one from")

    def _drift(self, now_ms: int) -> Due | None:
        rule, decided_ms = self.rule, self._decided_ms
        if not rule.on_drift or (decided_ms is not None and now_ms - decided_ms < rule.cooldown_ms):
            return None
        alarms = [
            (partition.alarm_ms, number)
            for number, partition in self._partitions.items()
            if partition.alarm_ms is not None
            and partition.version == self._version
            and (decided_ms is None or partition.alarm_ms > decided_ms)
            and now_ms - partition.alarm_ms >= rule.settle_ms
        ]
        if not alarms:
            return None
        alarm_ms, number = min(alarms)
        return Due(
            "drift",
            now_ms,
            f"the error of {self._version} in partition {number} has been above its usual size since an alarm "
            f"{_span(now_ms - alarm_ms)} ago (statistic {self._partitions[number].detector.statistic:.1f}, "
            f"threshold {rule.drift_threshold:g})",
            alarm_ms,
        )

    def _schedule(self, now_ms: int) -> Due | None:
        starts = (self._trained_ms, self._since_ms, self._beginning_ms)
        start_ms = next(start_ms for start_ms in starts if start_ms is not None)
        if self.rule.every_ms is None or now_ms - start_ms < self.rule.every_ms:
            return None
        return Due(
            "schedule",
            now_ms,
            f"{_span(now_ms - start_ms)} have passed, and it learns every {_span(self.rule.every_ms)}",
        )

    def _after_steps(self, now_ms: int) -> Due | None:
        if not self.rule.every_steps or self._steps < self.rule.every_steps:
            return None
        return Due("steps", now_ms, f"{self._steps} steps have passed, and it learns every {self.rule.every_steps}")

    # When to take back.

    def _judge(self, trail: _Trail) -> Disappointment | None:
        rule = self.rule
        after, before = list(trail.opening.values()), self._before(trail)
        usual = sum(before, np.zeros_like(after[0])) if before else None
        if usual is None or _labels(usual) < rule.min_labels:
            usual = None
        total = sum(after, np.zeros_like(after[0]))
        compared = _ratios(total, usual)
        if len(after) < rule.min_windows or _labels(total) < rule.min_labels or compared is None:
            return None
        ratio, limit = compared
        if not ratio > limit * (1 + rule.rollback_margin) or not _mostly_worse(after, usual):
            return None
        return Disappointment(
            self._version,
            self._previous,
            _disappointing(self._version, self._previous, ratio, limit if usual is not None else None, len(after)),
            {
                "ratio": ratio,
                "before": limit,
                "labels": _labels(total),
                "labels_before": _labels(usual) if usual is not None else 0.0,
                "windows": float(len(after)),
                "windows_before": float(len(before)) if usual is not None else 0.0,
            },
        )

    def _before(self, trail: _Trail) -> list[Float64]:
        """The previous champion's windows in (swap - probation ---- swap], at the phases that have been seen since the swap."""
        previous = self._trails.get(self._previous)
        if previous is None:
            return []
        phases = {self._phase(end_ms) for end_ms in trail.opening}
        begin_ms = trail.first_ms - self.rule.probation_ms
        return [
            sums
            for end_ms, sums in previous.recent.items()
            if begin_ms < end_ms <= trail.first_ms and self._phase(end_ms) in phases
        ]

    def _phase(self, end_ms: int) -> int:
        season = self.rule.season_windows
        return end_ms // self.rule.step_ms % season if season else 0


_COUNT, _LOSS = 0, 1
"""What a trail keeps of MEASURES."""


def _later(one_ms: int | None, other_ms: int) -> int:
    return other_ms if one_ms is None else max(one_ms, other_ms)


def _add(windows: dict[int, Float64], end_ms: int, sums: Float64) -> None:
    windows[end_ms] = windows[end_ms] + sums if end_ms in windows else sums


def _labels(sums: Float64) -> float:
    return float(sums[MODEL, _COUNT].sum())


def _ratios(after: Float64, before: Float64 | None) -> tuple[float, float] | None:
    """The model's loss as a share of the baseline's after and before, over the leads that have labels in both, each weighted by
    its labels where it has fewer; without `before` the baseline itself is the measure, 1. None if nothing compares."""
    sides = [after] if before is None else [after, before]
    known = np.all([(side[MODEL, _COUNT] > 0) & (side[BASELINE, _LOSS] > 0) for side in sides], axis=0)
    if not known.any():
        return None
    weight = np.min([side[MODEL, _COUNT, known] for side in sides], axis=0)
    shares = [np.average(side[MODEL, _LOSS, known] / side[BASELINE, _LOSS, known], weights=weight) for side in sides]
    return float(shares[0]), 1.0 if before is None else float(shares[1])


def _mostly_worse(after: list[Float64], before: Float64 | None) -> bool:
    """More than half of the windows are worse than what was before."""
    compared = [ratios for window in after if (ratios := _ratios(window, before)) is not None]
    return 2 * sum(ratio > usual for ratio, usual in compared) > len(compared)


def _disappointing(version: str, previous: str, ratio: float, before: float | None, windows: int) -> str:
    said = f"over {windows} windows the pinball loss of {version} is {ratio:.3f} of the baseline's"
    if before is None:
        return f"{said}, and {previous} left no scores to compare with"
    return f"{said}; that of {previous} was {before:.3f} before the swap"


def _span(milliseconds: int) -> str:
    """A duration for a sentence: hours and more in their largest unit that is at least one."""
    for name, size_ms in (("days", DAY_MS), ("hours", 3_600_000), ("minutes", 60_000)):
        if milliseconds >= size_ms:
            return f"{milliseconds / size_ms:.3g} {name}"
    return f"{milliseconds / 1000:.3g} seconds"
