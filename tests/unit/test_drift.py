"""When the error counts as risen. How well, over seeded sequences: see the two tables at the end."""

import numpy as np
import pytest

from models.drift import LEARN, RELEARN, DriftDetector, DriftRule

USUAL = np.array([1.0, 1.8, 3.0])
"""Of leads 1, 5, 24."""
SENSORS = 100.0


def errors(windows, seed=0, spread=0.1, correlation=0.0, season=0):
    """(windows, 3) mean absolute errors: a common AR(1) part and a part of each lead, up and down by half with the season."""
    rng = np.random.default_rng(seed)
    shocks = rng.normal(size=windows)
    common = np.empty(windows)
    common[0] = shocks[0]
    for t in range(1, windows):
        common[t] = correlation * common[t - 1] + np.sqrt(1 - correlation**2) * shocks[t]
    noise = spread * (np.sqrt(0.7) * common[:, None] + np.sqrt(0.3) * rng.normal(size=(windows, 3)))
    phase = 1 + 0.5 * np.sin(2 * np.pi * np.arange(windows) / season) if season else np.ones(windows)
    return np.maximum(phase[:, None] * (1 + noise), 0.01) * USUAL


def alarms(detector, sequence, first=0, labels=SENSORS):
    """Windows with which an alarm begins."""
    counts = np.broadcast_to(labels, sequence.shape)
    return [
        first + t
        for t in range(len(sequence))
        if detector.observe(first + t, counts[t], np.where(counts[t] > 0, sequence[t] * counts[t], 0.0))
    ]


def learned(season=24, threshold=12.0, windows=200, **kind):
    """A detector that has seen a quiet stretch."""
    detector = DriftDetector(DriftRule(threshold, season), 3)
    assert alarms(detector, errors(windows, **kind)) == []
    return detector


@pytest.mark.parametrize(("season", "needed"), [(0, LEARN), (24, LEARN), (48, 96), (2016, 4032)])
def test_no_alarm_is_possible_before_two_seasons_and_fifty_windows(season, needed):
    detector = DriftDetector(DriftRule(12.0, season), 3)
    assert alarms(detector, errors(needed - 1)) == []
    assert not detector.ready
    alarms(detector, errors(1), first=needed - 1)
    assert detector.ready


def test_an_error_that_doubles_alarms_once():
    detector = learned()
    assert alarms(detector, 2 * errors(100, seed=1), first=200) == [203]
    assert detector.alarmed


def test_an_error_that_falls_by_half_does_not_alarm():
    assert alarms(learned(), 0.5 * errors(200, seed=1), first=200) == []


def test_one_wild_window_does_not_alarm_however_wild_and_leaves_the_reference_alone():
    detector, undisturbed = learned(), learned()
    sequence = errors(100, seed=1)
    sequence[10] *= 1e9
    assert alarms(detector, sequence, first=200) == []
    alarms(undisturbed, errors(100, seed=1), first=200)
    assert detector.statistic <= 0.5 * 12
    assert alarms(detector, 2 * errors(10, seed=2), first=300) == alarms(undisturbed, 2 * errors(10, seed=2), first=300)


def test_one_wild_window_while_it_learns_does_not_make_it_deaf():
    sequence = errors(200)
    sequence[20] *= 1e9
    detector = DriftDetector(DriftRule(12.0, 24), 3)
    assert alarms(detector, sequence) == []
    assert alarms(detector, 2 * errors(20, seed=1), first=200)[0] <= 210


@pytest.mark.parametrize("threshold", [0.5, 3.0, 12.0])
def test_two_wild_windows_in_a_row_do_not_alarm_at_any_threshold(threshold):
    detector = DriftDetector(DriftRule(threshold, 0), 3)
    flat = np.tile(USUAL, (60, 1))
    alarms(detector, flat)
    assert alarms(detector, 100 * flat[:2], first=60) == []
    assert alarms(detector, 100 * flat[:4], first=62)


def test_an_alarm_ends_below_half_the_threshold_and_only_then_can_there_be_another():
    detector = learned()
    alarms(detector, 2 * errors(50, seed=1), first=200)
    at = 250
    while detector.alarmed:
        assert alarms(detector, errors(1, seed=at), first=at) == []
        assert detector.alarmed == (detector.statistic >= 6)
        at += 1
        assert at < 400
    assert alarms(detector, 2 * errors(50, seed=2), first=at) != []


def test_an_error_that_stays_high_does_not_become_usual():
    detector = learned()
    alarms(detector, 2 * errors(500, seed=1), first=200)
    detector.rearm()
    assert not detector.alarmed
    assert alarms(detector, 2 * errors(50, seed=2), first=700) == [703]


def test_after_a_swap_a_lower_error_is_the_new_usual_and_a_rise_back_to_the_old_one_alarms():
    detector = learned()
    detector.restart()
    assert not detector.ready
    assert alarms(detector, 0.6 * errors(RELEARN + 50, seed=1), first=200) == []
    assert alarms(detector, errors(50, seed=2), first=275)


def test_a_swap_ends_the_alarm():
    detector = learned()
    alarms(detector, 2 * errors(20, seed=1), first=200)
    detector.restart()
    assert (detector.alarmed, detector.statistic) == (False, 0.0)
    assert alarms(detector, 2 * errors(100, seed=2), first=220) == []


def test_models_that_serve_a_season_each_teach_one_profile_between_them():
    """Daily swaps must not leave the detector learning for ever."""
    detector = DriftDetector(DriftRule(12.0, 48), 3)
    sequence = errors(600, season=48)
    for day in range(3):
        assert alarms(detector, (1 + day) * sequence[48 * day :][:48], first=48 * day) == []
        detector.restart()
    assert alarms(detector, sequence[144:240], first=144) == []
    assert detector.ready
    assert alarms(detector, 2 * sequence[240:260], first=240)


def test_only_short_leads_have_labels_after_a_swap_and_that_is_no_drift():
    detector = learned()
    labels = np.full((100, 3), SENSORS)
    labels[:5, 1] = labels[:24, 2] = 0
    detector.restart()
    assert alarms(detector, errors(100, seed=1), first=200, labels=labels) == []
    assert alarms(detector, 2 * errors(10, seed=2), first=300)


def test_only_long_leads_with_labels_are_no_drift_either():
    """Their errors are three times as large."""
    assert alarms(learned(), errors(100, seed=1), first=200, labels=np.array([0, 0, SENSORS])) == []


def test_windows_with_less_than_half_the_usual_labels_are_left_out():
    detector = learned()
    assert alarms(detector, 5 * errors(20, seed=1), first=200, labels=20.0) == []
    assert detector.statistic < 6
    assert alarms(detector, 5 * errors(20, seed=1), first=220, labels=90.0)


def test_a_fleet_that_shrank_for_good_is_watched_again():
    detector = learned()
    assert alarms(detector, errors(100, seed=1), first=200, labels=20.0) == []
    assert alarms(detector, 2 * errors(20, seed=2), first=300, labels=20.0)


@pytest.mark.parametrize(("labels", "error"), [(0.0, 0.0), (SENSORS, np.nan), (SENSORS, np.inf)])
def test_windows_without_labels_or_figures_change_nothing(labels, error):
    detector = learned()
    before = detector.statistic
    assert alarms(detector, np.full((20, 3), error), first=200, labels=labels) == []
    assert detector.statistic == before


def test_a_rise_of_two_percent_is_no_drift_however_exactly_it_is_measured():
    detector = learned(spread=0.001)
    assert alarms(detector, 1.02 * errors(500, seed=1, spread=0.001), first=200) == []
    assert alarms(detector, 1.2 * errors(50, seed=2, spread=0.001), first=700)


def test_a_model_that_was_never_wrong_alarms_when_it_begins_to_be():
    detector = DriftDetector(DriftRule(12.0, 0), 3)
    assert alarms(detector, np.zeros((100, 3))) == []
    assert alarms(detector, np.ones((10, 3)), first=100) == [103]


def test_a_season_longer_than_a_week_of_hours_shares_its_bins():
    rule = DriftRule(12.0, 2016)
    phases = [rule.phase(window) for window in range(4032)]
    assert rule.bins == 168
    assert phases[:2016] == phases[2016:]
    assert np.bincount(phases).tolist() == [24] * 168


KINDS = {
    "independent": {"spread": 0.25},
    "AR(1) 0.5": {"spread": 0.25, "correlation": 0.5},
    "seasonal": {"spread": 0.25, "season": 24},
    "seasonal, AR(1) 0.5": {"spread": 0.25, "season": 24, "correlation": 0.5},
    "small fleet-wide spread, AR(1) 0.9": {"spread": 0.1, "correlation": 0.9},
}


@pytest.mark.parametrize("kind", KINDS)
def test_false_alarms_are_fewer_than_one_in_a_thousand_windows(kind):
    found = [
        len(alarms(DriftDetector(DriftRule(12.0, 24), 3), errors(2000, seed=seed, **KINDS[kind]))) for seed in range(2)
    ]
    assert sum(found) < 4


@pytest.mark.parametrize(
    ("kind", "rise", "median", "most"),
    [
        ("independent", 0.5, 12, 20),
        ("independent", 1.0, 6, 10),
        ("AR(1) 0.5", 0.5, 20, 60),
        ("AR(1) 0.5", 1.0, 8, 20),
        ("seasonal", 0.5, 12, 20),
        ("seasonal", 1.0, 6, 10),
        ("seasonal, AR(1) 0.5", 0.5, 24, 60),
        ("seasonal, AR(1) 0.5", 1.0, 8, 20),
        ("small fleet-wide spread, AR(1) 0.9", 0.5, 10, 40),
        ("small fleet-wide spread, AR(1) 0.9", 1.0, 5, 10),
    ],
)
def test_a_rise_is_found_within(kind, rise, median, most):
    delays = []
    for seed in range(10):
        sequence = errors(280, seed=100 + seed, **KINDS[kind])
        sequence[200:] *= 1 + rise
        found = [at - 199 for at in alarms(DriftDetector(DriftRule(12.0, 24), 3), sequence) if at >= 200]
        delays.append(found[0] if found else 10_000)
    assert np.median(delays) <= median
    assert max(delays) <= most
