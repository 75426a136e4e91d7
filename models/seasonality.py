"""Does anything repeat in these series? For files that come without a word about it.

    (T, S) values on a regular grid (`models.steps`) ──estimate_seasons──> [SeasonFound]

1. **Candidates**: periods of the calendar that the step divides (minute, hour, day, week, year), and where the autocorrelation of the
   series without its level has a local maximum, for cycles that no calendar knows. None is longer than a third of the data or LONGEST.
2. **Strength** of each, F = max(0, 1 - Var(R) / Var(S + R)) of Wang, Smith and Hyndman (2006), from a classical decomposition into
   level (centred moving average), season S (phase means) and remainder R. Variances are per degree of freedom, so that noise gives
   about 0 however few periods there are; phase means are those of at most STRETCH periods at a time, so that a cycle of 16.3 steps (as
   16, or as 49), or days that grow longer, are still a season. The median over the sensors counts.
3. **Evidence.** By chance F strays from 0 by about 1 / sqrt(pairs of periods compared); what is asked is a multiple of that, a larger
   one for cycles that were searched for. Periods that follow from few repetitions must be nearly perfect.
4. **It must help.** A random walk's level moves in ways that look like a wave or two. So one of these must be smaller than the change
   since the last value, at leads up to a period: the change since one period ago (over all the data and over the newest half); or
   what is left of the change since the last value once phase means have explained their part, those of the periods before an origin
   in as many periods after it. A random walk changes more over a whole period than over part of one, and its phase means explain nothing.
5. **Which.** The strongest; a calendar period in place of a neighbour, and a short period in place of its multiples, unless these
   explain clearly more. A further season is looked for in what is left when the first one is taken away.

Simulated: one sensor, at most two seasons asked for; series without a season in which one is found, per 1,000 (of 1,000; of 200 with
5,000 steps). With four independent sensors there was none in 825 of each kind.

    steps                          200     500   1,000   5,000
    random walk                      0       1       2       5
    AR(1) 0.95                       0       2       3       0
    AR(1) 0.8                        1       0       0       0
    white noise                      2       0       0       0
    trend and white noise            2       0       0       0
    twice integrated noise           0       0       0       0
    moving sum of 20                 3      40      14       0

An AR(2) wave whose phase wanders passes for a season in about one series of ten. What is not found: a cycle unknown to the calendar that
is seen five or six times with as much noise as wave.

Wang, X., Smith, K. and Hyndman, R. (2006), Characteristic-based clustering for time series data, Data Mining and Knowledge Discovery
13; Hyndman, R. J. and Athanasopoulos, G., Forecasting: Principles and Practice, 3rd ed., sections 3.4 and 4.3.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from models.steps import DAY_MS, HOUR_MS, MINUTE_MS, SECOND_MS, WEEK_MS

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]

YEAR_MS: Final = 31_556_952 * SECOND_MS
"""The mean Gregorian year: 365.2425 days."""
CALENDAR_MS: Final = {"minute": MINUTE_MS, "hour": HOUR_MS, "day": DAY_MS, "week": WEEK_MS}
LONGEST: Final = 4096
"""Steps of a period."""
MOST_STEPS: Final = 4 * LONGEST
"""The newest ones are looked at: four of the longest periods, of which the moving average takes one."""
MOST_SENSORS: Final = 12
STRETCH: Final = 12
"""Periods; 16.3 steps taken for 16 are then a fifth of a period out at the ends."""
SHORTEST_LEVEL: Final = 16
"""Steps of the moving average: one over two or three would leave of noise what alternates, which looks like a season."""
OUTLIER: Final = 4.0
"""Robust deviations beyond which a value counts for no more; a sine reaches 1.4."""
SAMPLE: Final = 2000
"""Steps, drawn at random, from which robust deviations are told: to 2 %, and no period is in step with them."""
EVENTS: Final = 0.5
"""Share of the variance that holding outliers leaves at least: at 0.1, one series of rare events in five has a season."""
UPHEAVAL: Final = 4.0
"""A period with so many times the usual power says nothing: the level jumped in it."""
PEAKS: Final = 4
"""Local maxima of the autocorrelation that are tried on each time scale."""

WEAKEST: Final = 0.15
"""Strength below which a season is not worth the name."""
NEARLY_PERFECT: Final = 0.9
"""Strength that is enough, however few the periods."""
EVIDENCE_KNOWN: Final = 2.5
"""Strength of a calendar period, as a multiple of what chance makes."""
EVIDENCE_SEARCHED: Final = 3.0
"""The same, of the best of many lags: at 2, one random walk of 500 steps in thirty has a season; at 4, a shape with noise of half its
size that is seen six times is none."""
EVIDENCE_PLENTY: Final = 10.0
"""From here on it is no chance, and need only not do harm: an oil temperature's day is plain to see, what it brings little."""
GAIN: Final = 0.05
"""Share by which typical changes must be smaller; chance makes 0.03 now and then."""
LEADS: Final = (0.15, 0.4, 0.6, 0.85)
"""Of a period; no simple fractions, at which a wave within the period might return."""
ORIGINS: Final = (1 / 2, 2 / 3, 5 / 6)
"""Of the data, from which the phase means look ahead."""
NEIGHBOUR: Final = 0.03
"""Lengths within so much of each other may be the same season."""


@dataclass(frozen=True, slots=True)
class SeasonFound:
    """steps: length. strength: 0 (none) to 1 (nothing else). gain: share by which it makes forecasts better than the last value, in
    the better of the two ways of the module's point 4; below 1. name: the calendar's ("day"), if it has one."""

    steps: int
    strength: float
    gain: float
    name: str | None = None


def estimate_seasons(values: Float64, step_ms: int, most: int = 1) -> list[SeasonFound]:
    """At most `most` seasons that the sensors share, ascending; empty if there is none.

    values: (T, S) on a regular grid, raw units, NaN (or infinite) = missing. step_ms: of the grid, which tells what the calendar's periods
    are. With most = 2 a day and a week both come out, where weeks explain something that days do not; with most = 1 the day, unless the
    week is clearly stronger.

    Looked at are the newest MOST_STEPS steps, at most MOST_SENSORS sensors evenly from all, and of these the ones that are observed in a
    fifth of the steps and not constant; a season of fewer than half of them is none. A period longer than a third of the steps looked
    at, or than LONGEST, is not found. A pure function of its arguments; takes less than a second.

    ValueError: values has not two dimensions, step_ms or most is not positive.
    """
    if np.ndim(values) != 2 or step_ms < 1 or most < 1:
        raise ValueError(
            f"values of shape {np.shape(values)}, step_ms={step_ms}, most={most}: expected values (steps, sensors) and positive numbers"
        )
    series = _prepared(values)
    found: list[_Accepted] = []
    while len(found) < most and series.size:
        accepted = [season for season in _accepted(series, step_ms) if _goes_with(season, found)]
        if not accepted:
            break
        found.append(_chosen(accepted, alone=most == 1))
        series = series - found[-1].fit.season_at(np.arange(len(series)))
    found.sort(key=lambda season: season.steps)
    return [SeasonFound(known.steps, known.strength, known.gain, _name(known.steps, step_ms)) for known in found]


def _prepared(values: Float64) -> Float64:
    """(T', S') What is looked at: each sensor from its median, in units of its range; spikes beyond the usual range held at it."""
    recent = values[-MOST_STEPS:, _evenly(values.shape[1], 4 * MOST_SENSORS)].astype(np.float64)
    recent[~np.isfinite(recent)] = np.nan
    recent = recent[:, np.isfinite(recent).sum(axis=0) >= max(1, 0.2 * len(recent))]
    if not recent.size:
        return recent
    low, middle, high = np.nanquantile(recent, (0.02, 0.5, 0.98), axis=0)
    reach = np.where(high > low, high - low, np.inf)
    recent = np.clip(recent, low - reach, high + reach) - middle
    size = np.nanmax(np.abs(recent), axis=0)
    varying = size > 1e-9 * np.abs(middle)
    recent = recent[:, varying] / size[varying]
    return np.asarray(recent[:, _evenly(recent.shape[1], MOST_SENSORS)], np.float64)


def _evenly(count: int, most: int) -> Int64:
    return np.unique(np.linspace(0, max(0, count - 1), min(count, most)).round().astype(np.int64))


@dataclass(frozen=True, slots=True)
class _Fit:
    """Phase means of a series without its level, stretch by stretch."""

    steps: int
    strength: float
    chance: float
    """Size of strength that noise has."""
    means: Float64
    """(stretches, steps, S)"""
    start: int
    """Step at which the first stretch begins."""
    periods: int
    """Of a stretch."""

    def season_at(self, step: Int64) -> Float64:
        """(n, S) before the first stretch and after the last one, what these say."""
        stretch = (step - self.start) // (self.steps * self.periods)
        return self.means[np.clip(stretch, 0, len(self.means) - 1), (step - self.start) % self.steps]


@dataclass(frozen=True, slots=True)
class _Accepted:
    fit: _Fit
    gain: float
    known: bool
    """To the calendar."""

    @property
    def steps(self) -> int:
        return self.fit.steps

    @property
    def strength(self) -> float:
        return self.fit.strength


def _chosen(accepted: list[_Accepted], *, alone: bool) -> _Accepted:
    """alone: no shorter or longer one can stand beside it."""
    distinct = [season for season in accepted if not any(_replaces(other, season) for other in accepted)]
    # A multiple seen three times may be perfect by chance, and says little against the period itself.
    best = max(distinct, key=lambda season: season.strength - season.fit.chance)
    for season in distinct:  # ascending
        times = round(best.steps / season.steps)
        if times < 2 or abs(best.steps - times * season.steps) > NEIGHBOUR * best.steps:
            continue
        more = best.strength - season.strength
        clearly = more > max(0.05, 0.2 * (1 - season.strength), best.fit.chance)
        if not clearly or (not alone and season.strength >= 2 / 3 * best.strength):
            return season
    return best


def _replaces(other: _Accepted, season: _Accepted) -> bool:
    """Of two of nearly equal length the stronger one stays, or the calendar's, which noise makes a little weaker."""
    if other is season or abs(other.steps - season.steps) > NEIGHBOUR * max(other.steps, season.steps):
        return False
    weak, strong = sorted((other, season), key=lambda one: one.strength)
    if weak.known != strong.known and strong.strength - weak.strength <= max(0.03, 0.1 * (1 - weak.strength)):
        return other.known
    return season is weak and other is strong


def _goes_with(season: _Accepted, found: list[_Accepted]) -> bool:
    """A day that is not the same on Sundays leaves waves of 21, 28 and 84 hours behind when it is taken away: a further season is at least
    twice or at most half as long, and beside one of the calendar's it is the calendar's too."""
    return all(
        max(season.steps, other.steps) >= 2 * min(season.steps, other.steps) and (season.known or not other.known)
        for other in found
    )


def _accepted(series: Float64, step_ms: int) -> Iterator[_Accepted]:
    longest = min(len(series) // 3, LONGEST)
    known = {steps for steps in _calendar(step_ms) if 2 <= steps <= longest}
    # Out of step with the calendar's by less than a quarter over all the data: nothing can tell them apart.
    other = {
        steps
        for steps in _searched(series, longest)
        if all(4 * abs(steps - period) * len(series) > period**2 for period in known)
    }
    for steps in sorted(known | other):
        fit = _fitted(series, steps)
        needed = (EVIDENCE_KNOWN if steps in known else EVIDENCE_SEARCHED) * fit.chance
        if fit.strength < min(max(WEAKEST, needed), NEARLY_PERFECT):
            continue
        gain = _gain(series, steps)
        if gain > (GAIN if fit.strength < EVIDENCE_PLENTY * fit.chance else 0.0):
            yield _Accepted(fit, gain, steps in known)


def _calendar(step_ms: int) -> list[int]:
    """Lengths in steps. A year is rounded, by a fiftieth at most."""
    steps = [period // step_ms for period in CALENDAR_MS.values() if period % step_ms == 0]
    year = round(YEAR_MS / step_ms)
    return [*steps, year] if year and abs(year * step_ms - YEAR_MS) <= YEAR_MS / 50 else steps


def _name(steps: int, step_ms: int) -> str | None:
    for name, period_ms in CALENDAR_MS.items():
        if steps * step_ms == period_ms:
            return name
    return "year" if steps == round(YEAR_MS / step_ms) and _calendar(step_ms)[-1:] == [steps] else None


def _searched(series: Float64, longest: int) -> set[int]:
    """Local maxima of the autocorrelation, on several time scales: a moving level hides short cycles from the longer ones' view."""
    found: set[int] = set()
    scale = 2 * longest
    while scale >= 4:
        correlation = _autocorrelation(_held(series - _level(series, scale)), longest)
        found.update(_peaks(correlation, min(longest, scale // 2)))
        scale //= 4
    return found


def _autocorrelation(series: Float64, longest: int) -> Float64:
    """(longest + 1) of lags from 0 on, each the mean of itself and its multiples up to four (a wrong period soon is out of step at them);
    the median over the sensors."""
    seen = np.isfinite(series)
    pairs = np.maximum(_products(seen.astype(np.float64)).round(), 1)
    products = _products(np.where(seen, series, 0.0)) / pairs
    by_lag = np.median(products / np.maximum(products[0], 1e-300), axis=1)
    lags = np.arange(longest + 1)
    total, count = np.zeros(len(lags)), np.zeros(len(lags))
    for multiple in (1, 2, 3, 4):
        within = lags[multiple * lags <= 0.75 * len(series)]
        total[within] += by_lag[multiple * within]
        count[within] += 1
    return total / np.maximum(count, 1)


def _products(series: Float64) -> Float64:
    """(T, S) sum over t of x[t] x[t + lag], lags from 0 on."""
    size = 1 << (2 * len(series) - 1).bit_length()
    spectrum = np.fft.rfft(series, size, axis=0)
    return np.asarray(np.fft.irfft(np.abs(spectrum) ** 2, size, axis=0)[: len(series)], np.float64)


def _peaks(correlation: Float64, longest: int) -> list[int]:
    """The highest local maxima at lags from 2 on, no two within a tenth of each other."""
    lag = np.arange(2, min(longest, len(correlation) - 2) + 1)
    here = correlation[lag]
    top = lag[(here > correlation[lag - 1]) & (here >= correlation[lag + 1]) & (here > 0.05)]
    peaks: list[int] = []
    for peak in top[np.argsort(-correlation[top], kind="stable")].tolist():
        if len(peaks) < PEAKS and all(abs(peak - other) > 0.1 * other for other in peaks):
            peaks.append(peak)
    return peaks


def _held(series: Float64, like: Float64 | None = None) -> Float64:
    """Clipped at OUTLIER robust deviations of each sensor, or of `like`. As it is where that would take away most of what varies: a
    sensor that mostly rests has events, not outliers."""
    sample = series if like is None else like
    if len(sample) > SAMPLE:
        sample = sample[np.random.default_rng(0).integers(len(sample), size=SAMPLE)]
    middle = _median(sample)
    distance = np.abs(sample - middle)
    reach = OUTLIER * 1.4826 * _median(distance)
    kept = np.nansum(np.minimum(distance, reach) ** 2, axis=0) >= EVENTS * np.nansum(distance**2, axis=0)
    reach = np.where(kept, reach, np.inf)
    return np.asarray(np.clip(series, middle - reach, middle + reach), np.float64)


def _median(values: Float64, axis: int = 0) -> Float64:
    """Of the known values along the axis, which stays with length 1; 0 where there are none."""
    ordered = np.sort(values, axis=axis)  # NaN last
    count = np.isfinite(values).sum(axis=axis, keepdims=True)
    below, above = (np.take_along_axis(ordered, at, axis) for at in (np.maximum(count - 1, 0) // 2, count // 2))
    return np.where(count > 0, (below + above) / 2, 0.0)


def _level(series: Float64, window: int) -> Float64:
    """(T, S) centred moving average; the first and last of an even window count half. Cut short at the ends. Missing values are taken
    from the line between their neighbours: left out, a trend would look like a season of the weekends without readings."""
    sums = np.concatenate([np.zeros((1, series.shape[1])), np.cumsum(_filled(series), axis=0)])
    averages = [
        _averages(sums, -(window // 2), (window + 1) // 2),
        _averages(sums, -((window - 1) // 2), window // 2 + 1),
    ]
    return np.asarray(np.mean(averages, axis=0), np.float64)


def _averages(sums: Float64, before: int, after: int) -> Float64:
    """(T, S) from t + before until t + after, which is not among them. sums: (T + 1, S) of what is before t."""
    at, last = np.arange(len(sums) - 1), len(sums) - 1
    first, until = np.maximum(at + before, 0), np.minimum(at + after, last)
    return np.asarray((sums[until] - sums[first]) / (until - first)[:, None], np.float64)


def _filled(series: Float64) -> Float64:
    missing = np.isnan(series)
    if not missing.any():
        return series
    filled, at = series.copy(), np.arange(len(series))
    for sensor in np.flatnonzero(missing.any(axis=0)):
        gone = missing[:, sensor]
        filled[gone, sensor] = 0.0 if gone.all() else np.interp(at[gone], at[~gone], series[~gone, sensor])
    return filled


def _fitted(series: Float64, steps: int) -> _Fit:
    """Classical decomposition. The level's window is the shortest multiple of the period from SHORTEST_LEVEL on; the ends, where it is
    cut short, are left out."""
    window = steps * -(-SHORTEST_LEVEL // steps)
    count = (len(series) - window) // steps
    if count < 2:
        return _Fit(steps, 0.0, np.inf, np.zeros((1, steps, series.shape[1])), 0, 1)
    stretches = -(-count // STRETCH)
    periods = count // stretches
    end = len(series) - window // 2
    start = end - stretches * periods * steps
    rest = (series - _level(series, window))[start:end].reshape(stretches, periods, steps, -1)
    means, strength = _analysed(_without_upheavals(_held_by_phase(rest)))
    chance = float(np.sqrt(2 / (min(steps - 1, 4) * stretches * periods * (periods - 1) / 2)))
    return _Fit(steps, strength, chance, means, start, periods)


def _held_by_phase(rest: Float64) -> Float64:
    """(stretches, periods, phases, S) Outliers held, around the phase's median: a season of pulses has none. Of two values the median is
    in their middle and would make them one, so that two periods are held around the median of all."""
    centre = _median(rest, axis=1) if rest.shape[1] > 2 else np.zeros((1, 1, 1, 1))
    distance = (rest - centre).reshape(-1, rest.shape[-1])
    return centre + _held(distance).reshape(rest.shape)


def _without_upheavals(rest: Float64) -> Float64:
    """Periods with several times the power of most are left out: the level jumped there."""
    seen = np.isfinite(rest)
    power = np.where(seen, rest, 0.0) ** 2
    power = power.sum(axis=2, keepdims=True) / np.maximum(seen.sum(axis=2, keepdims=True), 1)
    usual = np.median(power, axis=(0, 1), keepdims=True)
    return np.where(power > UPHEAVAL * usual, np.nan, rest)


def _analysed(rest: Float64) -> tuple[Float64, float]:
    """Phase means (stretches, phases, S) and strength: one-way analysis of variance within each stretch. rest: (stretches, periods,
    phases, S). Phases seen once say nothing."""
    seen = np.isfinite(rest)
    values = np.where(seen, rest, 0.0)
    count = seen.sum(axis=1, keepdims=True)
    means = values.sum(axis=1, keepdims=True) / np.maximum(count, 1)
    use = seen & (count >= 2)
    used = use.sum(axis=(1, 2), keepdims=True)
    middle = np.where(use, values, 0.0).sum(axis=(1, 2), keepdims=True) / np.maximum(used, 1)
    remainder = (np.where(use, values - means, 0.0) ** 2).sum(axis=(0, 1, 2))
    whole = (np.where(use, values - middle, 0.0) ** 2).sum(axis=(0, 1, 2))
    total = used.sum(axis=(0, 1, 2))
    remainder_freedom = np.maximum(total - (count >= 2).sum(axis=(0, 1, 2)), 1)
    whole_freedom = np.maximum(total - (used > 0).sum(axis=(0, 1, 2)), 1)
    # Series are in units of their range: below this there is only rounding.
    moving = whole > 1e-20 * whole_freedom
    share = (remainder / remainder_freedom) / np.where(moving, whole / whole_freedom, 1.0)
    return means[:, 0], max(0.0, float(np.median(np.where(moving, 1 - share, 0.0))))


def _gain(series: Float64, steps: int) -> float:
    """Share by which changes are smaller than those since the last value, for the better of the two ways of knowing the season."""
    leads = sorted({max(1, round(share * steps)) for share in LEADS} - {steps})
    return max(_gain_of_last_period(series, steps, leads), _gain_of_phase_means(series, steps, leads))


def _gain_of_last_period(series: Float64, steps: int, leads: list[int]) -> float:
    """The smaller of what it is over all the data and over the newest half, or one and a half periods."""
    newest = min(len(series) // 2, len(series) - 3 * steps // 2) - steps
    sizes = [_held(series[steps:] - series[steps - lead : -lead]) for lead in (*leads, steps)]
    gains = []
    for since in (0, max(newest, 0)):
        *short, whole = (_typical(change[since:]) for change in sizes)
        gains.append(_median_gain(whole, np.mean(short, axis=0)))
    return min(gains)


def _gain_of_phase_means(series: Float64, steps: int, leads: list[int]) -> float:
    """Phase means of the periods before an origin added to the last value, in as many periods after it; over the ORIGINS."""
    plain, explained = [], []
    for origin in ORIGINS:
        cut = round(origin * len(series))
        begin = max(0, cut - STRETCH * steps - 2 * max(steps, SHORTEST_LEVEL))
        fit = _fitted(series[begin:cut], steps)
        since = cut - steps // 2  # where the phase means end
        after = series[since : cut + STRETCH * steps]
        season = fit.season_at(np.arange(since - begin, since - begin + len(after)))
        for lead in leads:
            change = after[lead:] - after[:-lead]
            plain.append(_typical(_held(change)))
            explained.append(_typical(_held(change - (season[lead:] - season[:-lead]), change)))
    return _median_gain(np.mean(explained, axis=0), np.mean(plain, axis=0))


def _typical(change: Float64) -> Float64:
    """(S) mean distance from the mean, which a trend is; NaN where nothing is known."""
    known = np.isfinite(change)
    count = np.maximum(known.sum(axis=0), 1)
    middle = np.where(known, change, 0.0).sum(axis=0) / count
    distance = np.where(known, np.abs(change - middle), 0.0).sum(axis=0) / count
    return np.where(known.any(axis=0), distance, np.nan)


def _median_gain(size: Float64, reference: Float64) -> float:
    """Below 0 without any reference."""
    known = np.isfinite(size) & np.isfinite(reference) & (reference > 0)
    return float(np.median(np.where(known, 1 - size / np.where(known, reference, 1.0), -1.0)))
