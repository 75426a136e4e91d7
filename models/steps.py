"""How long is a step of these readings? For files that come without a word about it.

times ──estimate_step──> step_ms        times, values ──regular──> (T, S), on a grid of such steps
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]

SECOND_MS: Final = 1000
MINUTE_MS: Final = 60 * SECOND_MS
HOUR_MS: Final = 60 * MINUTE_MS
DAY_MS: Final = 24 * HOUR_MS
WEEK_MS: Final = 7 * DAY_MS
USUAL_MS: Final = (
    *(unit * decade for decade in (1, 10, 100) for unit in (1, 2, 5)),
    *(unit * count for unit in (SECOND_MS, MINUTE_MS) for count in (1, 2, 5, 10, 15, 20, 30)),
    *(HOUR_MS * count for count in (1, 2, 3, 4, 6, 8, 12)),
    DAY_MS,
    WEEK_MS,
)
VOTES: Final = 100
"""A sensor with so many differences between readings has as much say as one with more."""


def estimate_step(times_ms: Sequence[Int64]) -> int:
    """The time between readings, ms. times_ms: event times of each sensor, in any order, duplicates allowed.

    Where one difference makes up half of a sensor's differences, and nine in ten are multiples of it, it is the step, exactly; gaps so
    make no difference. Where times jitter or are irregular, their median difference is rounded to the nearest (by ratio) of USUAL_MS:
    1-2-5 below a second; 1, 2, 5, 10, 15, 20, 30 s or min; 1, 2, 3, 4, 6, 8, 12 h; 1 d, 7 d; and to whole days beyond a week. Of sensors
    that differ, the median counts.

    Months and years have no fixed length: 31 d comes out for monthly readings, 91 d or 92 d for quarters, 365 d for years. On a grid of
    such steps some hold two readings or none; better count one step a reading.

    >>> estimate_step([np.array([0, 7000, 14_000, 14_000, 35_000])])
    7000
    >>> estimate_step([np.array([0, 59_200, 120_700, 180_100])])
    60000

    ValueError: no sensor has two distinct times.
    """
    ordered = [np.unique(np.asarray(times, np.int64)) for times in times_ms]
    differences = [times[1:] - times[:-1] for times in ordered]
    own = sorted((_own_step(gaps), min(len(gaps), VOTES)) for gaps in differences if len(gaps))
    if not own:
        readings = sum(len(times) for times in times_ms)
        raise ValueError(
            f"{readings} readings of {len(times_ms)} sensors, none with two distinct times: a step needs at least two readings of one "
            "sensor at different times"
        )
    steps, votes = (np.array(column, np.int64) for column in zip(*own))
    return int(steps[np.searchsorted(np.cumsum(votes), votes.sum() / 2)])


def regular(times_ms: Sequence[Int64], values: Sequence[Float64], step_ms: int, most_steps: int) -> Float64:
    """(T, S) Mean of the readings in each window [k step, (k + 1) step) of epoch time, from the first to the last of any sensor; NaN =
    none. The grid that `models.seasonality` asks for.

    times_ms, values: (n) of each of S sensors, in any order; readings that are not finite are left out. T is at most `most_steps`, the
    newest ones: a reading of 1970 does not ask for a grid of fifty years (one of 2070 hides the others).

    ValueError: times and values do not match, or step_ms or most_steps is not positive.
    """
    if step_ms < 1 or most_steps < 1:
        raise ValueError(f"step_ms={step_ms}, most_steps={most_steps}: expected positive numbers")
    lengths = [(len(times), len(column)) for times, column in zip(times_ms, values)]
    if len(times_ms) != len(values) or any(times != column for times, column in lengths):
        raise ValueError(
            f"{len(times_ms)} sensors with times and {len(values)} with values, (times, values) {lengths[:5]}: expected one value a time"
        )
    known = [np.isfinite(column) for column in values]
    windows = [np.asarray(times, np.int64)[keep] // step_ms for times, keep in zip(times_ms, known)]
    seen = [window for window in windows if len(window)]
    last = max((int(window.max()) for window in seen), default=-1)
    first = max(min((int(window.min()) for window in seen), default=0), last + 1 - most_steps)
    grid = np.full((last + 1 - first, len(values)), np.nan)
    for sensor, (window, column, keep) in enumerate(zip(windows, values, known)):
        within = window >= first
        at = window[within] - first
        count = np.bincount(at, minlength=len(grid))
        total = np.bincount(at, np.asarray(column, np.float64)[keep][within], minlength=len(grid))
        grid[count > 0, sensor] = total[count > 0] / count[count > 0]
    return grid


def _own_step(gaps: Int64) -> int:
    """gaps: (n >= 1) positive differences of one sensor's times."""
    lengths, counts = np.unique(gaps, return_counts=True)
    most_common = int(lengths[counts.argmax()])
    if 2 * counts.max() >= len(gaps) and (gaps % most_common == 0).mean() >= 0.9:
        return most_common
    middle = float(np.median(gaps))
    if middle > WEEK_MS:
        return round(middle / DAY_MS) * DAY_MS
    return min(USUAL_MS, key=lambda usual: abs(np.log(middle / usual)))
