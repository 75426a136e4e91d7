"""May the challenger serve? One rule over figures that were all measured on the same held-back slice.

1. It has spoken: finite figures, on no fewer labels than a decision needs, and on as many as the others.
2. It beats every baseline in pinball loss, which is what a forecast's quantiles are trained for and judged by; a model that beats
   a baseline in mse alone has a good mean and misleading intervals.
3. It beats the champion in pinball loss by `margin`, so that two equal models do not take turns by chance.
4. At no lead is its pinball loss much higher than the champion's: a mean over leads must not hide one that was spoilt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from models.evaluation import Figures


@dataclass(frozen=True, slots=True)
class GateRule:
    """What a challenger must show. Shares: 0.01 is 1 %."""

    margin: float
    """Its pinball loss is lower than the champion's by this share."""
    max_lead_loss: float
    """At no lead is its pinball loss higher than the champion's by more than this share."""
    min_labels: int
    """Labels that a decision needs."""


@dataclass(frozen=True, slots=True)
class Verdict:
    promoted: bool
    reason: str
    """One plain sentence with figures."""


def judge(rule: GateRule, challenger: Figures, champion: Figures | None, baselines: Sequence[Figures]) -> Verdict:
    """Promoted, unless something speaks against it; the first of the reasons is told.

    champion: None if there is none, or if it was made for another series; then the baselines alone decide. A champion that
    answered with NaN is no hindrance: whatever has figures is better.
    """
    others = [*baselines, *([champion] if champion is not None and _speaks(champion) else [])]
    against = _figures(rule, challenger, others) or _baselines(challenger, baselines)
    if against is None and champion is not None and _speaks(champion):
        against = _champion(rule, challenger, champion) or _leads(rule, challenger, champion)
    return Verdict(against is None, against or _praise(challenger, champion, baselines))


def _speaks(figures: Figures) -> bool:
    return figures.labels > 0 and all(math.isfinite(value) for value in (figures.pinball, figures.mse, figures.mae))


def _figures(rule: GateRule, challenger: Figures, others: Sequence[Figures]) -> str | None:
    if challenger.labels == 0:
        return "it was held against no label at all"
    if not _speaks(challenger):
        return f"its figures are not finite (pinball loss {challenger.pinball}, mse {challenger.mse}, mae {challenger.mae})"
    if challenger.labels < rule.min_labels:
        return f"it was held against {challenger.labels} labels, a decision needs {rule.min_labels}"
    for other in others:
        if not _speaks(other):
            return f"{other.name} has no finite figures to compare with"
        if other.labels != challenger.labels:
            return f"it was held against {challenger.labels} labels and {other.name} against {other.labels}: they do not compare"
    return None


def _baselines(challenger: Figures, baselines: Sequence[Figures]) -> str | None:
    for baseline in baselines:
        if not challenger.pinball < baseline.pinball:
            ours, theirs = _pair(challenger.pinball, baseline.pinball)
            return f"its pinball loss {ours} is not lower than the {theirs} of the baseline {baseline.name}"
    return None


def _champion(rule: GateRule, challenger: Figures, champion: Figures) -> str | None:
    if challenger.pinball < champion.pinball and challenger.pinball <= champion.pinball * (1 - rule.margin):
        return None
    ours, theirs = _pair(challenger.pinball, champion.pinball)
    by = f" by {_percent(rule.margin)}" if rule.margin else ""
    return f"its pinball loss {ours} is not lower than the champion's {theirs}{by}"


def _leads(rule: GateRule, challenger: Figures, champion: Figures) -> str | None:
    """The lead at which it falls behind most."""
    ours, theirs = challenger.by_lead["pinball"], champion.by_lead["pinball"]
    if len(ours) != len(theirs):
        return f"it forecasts {len(ours)} leads and the champion {len(theirs)}: they do not compare"
    known = [lead for lead in range(len(ours)) if math.isfinite(ours[lead]) and math.isfinite(theirs[lead])]
    worse = [lead for lead in known if ours[lead] > theirs[lead] * (1 + rule.max_lead_loss)]
    if not worse:
        return None
    worst = max(worse, key=lambda lead: ours[lead] / max(theirs[lead], 1e-300))
    mine, its = _pair(ours[worst], theirs[worst])
    return (
        f"at lead {worst + 1} its pinball loss {mine} is higher than the champion's {its} "
        f"by more than {_percent(rule.max_lead_loss)}"
    )


def _praise(challenger: Figures, champion: Figures | None, baselines: Sequence[Figures]) -> str:
    beaten = [f"the {baseline.pinball:.4g} of the baseline {baseline.name}" for baseline in baselines]
    if champion is not None and _speaks(champion):
        gain = _percent(1 - challenger.pinball / champion.pinball)
        beaten.insert(0, f"the champion's {champion.pinball:.4g} by {gain}")
    if not beaten:
        return f"its pinball loss is {challenger.pinball:.4g}, and there is nothing to hold it against"
    silent = "; the champion has no finite figures" if champion is not None and not _speaks(champion) else ""
    return f"its pinball loss {challenger.pinball:.4g} is lower than {' and '.join(beaten)}{silent}"


def _pair(ours: float, theirs: float) -> tuple[str, str]:
    """With as many digits as it takes to tell them apart, four or more."""
    digits = 4
    while digits < 17 and ours != theirs and f"{ours:.{digits}g}" == f"{theirs:.{digits}g}":
        digits += 1
    return f"{ours:.{digits}g}", f"{theirs:.{digits}g}"


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
