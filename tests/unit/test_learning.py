"""When the trainer learns again and when a champion is taken back: scores in, decisions out."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.service.learning import DAY_MS, Learner, LearningRule
from pipeline.settings import parse
from pipeline.stream.scoring import Sums, WindowScore

HOUR = 3_600_000
START = 500_000 * HOUR
RULE = LearningRule(
    step_ms=HOUR,
    season_windows=24,
    first_windows=100,
    every_ms=None,
    every_steps=0,
    on_drift=False,
    drift_threshold=12.0,
    settle_ms=0,
    cooldown_ms=6 * HOUR,
    max_per_day=4,
    min_labels=1000,
    rollback=True,
    rollback_margin=0.2,
    probation_ms=48 * HOUR,
)
NONE = Sums(*[[0.0, 0.0]] * 5)


def score(hour, model="a", error=1.0, partition=0, baseline=1.0, labels=(100.0, 100.0), steps=100, leads=(1, 24)):
    """The window that ends `hour` hours after the start; errors are means, of the baseline twice as large at the second lead."""

    def sums(mean):
        total = [count * mean * lead for count, lead in zip(labels, (1, 2))]
        return Sums(list(labels), total, total, total, list(labels))

    both = {"model": sums(error), "baseline": sums(baseline)} if model else {"model": NONE, "baseline": sums(baseline)}
    return WindowScore(partition, START + hour * HOUR, 10 * hour, steps, model, "SeasonalNaive", leads, both)


def noisy(hour, level=1.0, seed=0, **other):
    rng = np.random.default_rng([seed, hour])
    return score(hour, error=level * (1 + 0.1 * rng.normal()), **other)


def fed(learner, hours, level=1.0, **other):
    for hour in hours:
        learner.observe(noisy(hour, level, **other))
    return learner


def serving(rule=RULE, version="a", previous="", since_ms=START):
    learner = Learner(rule)
    learner.champion(version, previous, since_ms)
    return learner


# Settings.


def test_empty_settle_and_probation_follow_from_the_longest_season():
    rule = LearningRule.of(parse('[forecast]\nseason = ["24h", "7d"]\nhorizon = 12'))
    assert (rule.settle_ms, rule.probation_ms, rule.season_windows) == (7 * DAY_MS, 14 * DAY_MS, 168)
    assert rule.first_windows == 4 * 168


def test_without_a_season_they_follow_from_the_horizon():
    rule = LearningRule.of(parse('[windows]\nsize = "1m"\n[forecast]\nseason = []\nhorizon = 30'))
    assert (rule.settle_ms, rule.probation_ms, rule.season_windows) == (30 * 60_000, 60 * 60_000, 0)
    assert rule.first_windows == 120


def test_what_is_set_is_taken():
    text = (
        '[retraining]\nsettle = "0s"\nprobation = "3h"\nevery = ""\nevery_steps = 7\nmax_per_day = 2\ncooldown = "1h"'
    )
    rule = LearningRule.of(parse(text))
    assert (rule.settle_ms, rule.probation_ms, rule.every_ms, rule.every_steps) == (0, 3 * HOUR, None, 7)
    assert (rule.max_per_day, rule.cooldown_ms, rule.min_windows) == (2, HOUR, 3)


# The clock.


def test_now_is_the_greatest_window_end_of_any_partition():
    learner = serving()
    assert learner.now_ms is None
    assert learner.due() is None
    for hour, partition in ((5, 0), (3, 1), (7, 0), (4, 1)):
        learner.observe(score(hour, partition=partition))
    assert learner.now_ms == START + 7 * HOUR


# The first training.


def test_the_first_training_is_due_once_there_are_enough_windows():
    learner = Learner(RULE)
    for hour in range(99):
        learner.observe(score(hour, model="", partition=0))
        learner.observe(score(hour, model="", partition=1))
        assert learner.due() is None
    learner.observe(score(99, model=""))
    due = learner.due()
    assert (due.trigger, due.until_ms) == ("first", START + 99 * HOUR)
    assert due.reason == "there is no model yet, and 100 windows to learn one from"


@pytest.mark.parametrize(("every_ms", "pause"), [(24 * HOUR, 24), (None, 6)])
def test_a_first_training_that_came_to_nothing_is_tried_again_later(every_ms, pause):
    learner = Learner(replace(RULE, every_ms=every_ms))
    for hour in range(100):
        learner.observe(score(hour, model=""))
    learner.decided(learner.now_ms, trained=True)
    for hour in range(100, 99 + pause):
        learner.observe(score(hour, model=""))
        assert learner.due() is None
    learner.observe(score(99 + pause, model=""))
    assert learner.due().trigger == "first"


# Schedule and steps.


def test_the_schedule_counts_from_when_the_champion_began_to_serve():
    learner = fed(serving(replace(RULE, every_ms=24 * HOUR), since_ms=START + 5 * HOUR), range(29))
    assert learner.due() is None
    due = fed(learner, [29]).due()
    assert (due.trigger, due.until_ms) == ("schedule", START + 29 * HOUR)
    assert due.reason == "1 days have passed, and it learns every 1 days"


def test_the_schedule_counts_from_the_first_window_where_nothing_else_is_known():
    learner = fed(serving(replace(RULE, every_ms=24 * HOUR), since_ms=None), range(3, 27))
    assert learner.due() is None
    assert fed(learner, [27]).due().trigger == "schedule"


def test_the_schedule_counts_from_the_newest_training_and_not_from_a_rollback():
    learner = fed(serving(replace(RULE, every_ms=24 * HOUR)), range(41))
    learner.decided(START + 20 * HOUR, trained=True)
    learner.decided(START + 40 * HOUR, trained=False)
    assert learner.due() is None
    assert fed(learner, range(41, 44)).due() is None
    assert fed(learner, [44]).due().trigger == "schedule"


def test_after_so_many_steps_of_all_sensors():
    learner = fed(serving(replace(RULE, every_steps=1000)), range(9))
    assert learner.due() is None
    due = fed(learner, [9]).due()
    assert (due.trigger, due.reason) == ("steps", "1000 steps have passed, and it learns every 1000")
    learner.decided(learner.now_ms, trained=True)
    assert fed(learner, range(10, 19)).due() is None
    assert fed(learner, [19]).due().trigger == "steps"


def test_a_window_that_a_partition_is_past_is_not_counted_twice():
    learner = serving(replace(RULE, every_steps=1000))
    for hour in [0, 1, 2, 3, 4, 2, 3, 4, 4, 5, 6, 7, 8]:
        learner.observe(score(hour))
    assert learner.due() is None
    assert fed(learner, [9]).due() is not None


# Drift.

DRIFT = replace(RULE, on_drift=True)


def test_a_risen_error_is_due_when_the_alarm_has_settled():
    learner = fed(serving(replace(DRIFT, settle_ms=24 * HOUR)), range(100))
    alarm = None
    for hour in range(100, 200):
        fed(learner, [hour], level=2.0)
        if learner.due():
            alarm = hour
            break
    assert alarm == 127
    due = learner.due()
    assert due.trigger == "drift"
    assert due.reason.startswith(
        "the error of a in partition 0 has been above its usual size since an alarm 1 days ago"
    )


def test_an_error_that_has_fallen_again_before_the_alarm_settled_is_no_reason_to_learn():
    learner = fed(serving(replace(DRIFT, settle_ms=48 * HOUR)), range(100))
    fed(learner, range(100, 106), level=2.0)
    for hour in range(106, 250):
        assert fed(learner, [hour]).due() is None


def test_drift_that_is_switched_off_is_never_due():
    learner = fed(serving(), range(100))
    assert fed(learner, range(100, 200), level=3.0).due() is None


def test_one_wild_window_is_no_drift():
    learner = fed(serving(DRIFT), range(100))
    fed(learner, [100], level=1000.0)
    for hour in range(101, 150):
        assert fed(learner, [hour]).due() is None


def test_no_alarm_counts_within_the_cooldown_after_a_decision():
    learner = fed(serving(replace(DRIFT, cooldown_ms=30 * HOUR)), range(100))
    learner.decided(learner.now_ms, trained=False)
    found = next(hour for hour in range(100, 200) if fed(learner, [hour], level=2.0).due())
    assert found == 99 + 30


def test_an_alarm_from_before_a_decision_does_not_count_after_it():
    learner = fed(fed(serving(replace(DRIFT, cooldown_ms=0)), range(100)), range(100, 110), level=2.0)
    assert learner.due().trigger == "drift"
    learner.decided(learner.now_ms, trained=True)
    assert learner.due() is None
    found = next(hour for hour in range(110, 200) if fed(learner, [hour], level=2.0).due())
    assert found == 113, "the refused training has not mended it: the test begins anew, against the same reference"


def test_an_alarm_about_a_version_that_no_longer_serves_does_not_count():
    learner = fed(fed(serving(DRIFT), range(100)), range(100, 110), level=2.0)
    learner.champion("b", "a", learner.now_ms)
    assert learner.due() is None
    assert fed(learner, range(110, 115), level=2.0).due() is None, "the partition has yet to swap"
    assert fed(learner, range(115, 250), level=2.0, model="b").due() is None, "and that error is usual for b"
    assert fed(learner, range(250, 254), level=4.0, model="b").due().trigger == "drift"


def test_after_a_rollback_the_detectors_restart():
    learner = fed(fed(serving(DRIFT), range(100)), range(100, 110), level=2.0, model="b")
    learner.champion("a", "", None)
    learner.decided(START + 109 * HOUR, trained=False)
    for hour in range(110, 180):
        assert fed(learner, [hour], level=1.5).due() is None


def test_the_season_of_the_error_is_no_drift():
    learner = serving(DRIFT)
    for hour in range(1000):
        fed(learner, [hour], level=1 + 0.8 * np.sin(2 * np.pi * hour / 24))
        assert learner.due() is None


def test_any_partition_may_drift():
    learner = serving(DRIFT)
    for hour in range(120):
        learner.observe(noisy(hour, seed=1, partition=0))
        learner.observe(noisy(hour, 2.0 if hour >= 100 else 1.0, seed=2, partition=1))
    assert "partition 1" in learner.due().reason


def test_other_leads_do_not_compare_and_what_was_known_is_forgotten():
    learner = fed(fed(serving(DRIFT), range(100)), range(100, 110), level=2.0)
    assert learner.due()
    assert fed(learner, range(110, 200), level=5.0, leads=(1, 12)).due() is None


# Storms.


def storm(rule, hours, level=lambda hour: 3.0 if hour >= 100 else 1.0):
    """Hours at which trainings began; each is refused at once."""
    learner, begun = serving(rule), []
    for hour in range(hours):
        fed(learner, [hour], level=level(hour))
        if learner.due():
            begun.append(hour)
            learner.decided(learner.now_ms, trained=True)
    return begun


def most_in_a_day(begun):
    return max((sum(hour <= other < hour + 24 for other in begun) for hour in begun), default=0)


@pytest.mark.parametrize("max_per_day", [1, 2, 4])
def test_an_error_that_stays_high_begins_no_more_trainings_than_the_budget_has(max_per_day):
    begun = storm(replace(DRIFT, cooldown_ms=0, max_per_day=max_per_day), 400)
    assert most_in_a_day(begun) == max_per_day


def test_an_error_that_stays_high_keeps_the_cooldown():
    begun = storm(replace(DRIFT, cooldown_ms=10 * HOUR), 400)
    assert len(begun) >= 10
    assert min(np.diff(begun)) >= 10


def test_an_error_that_stays_high_waits_for_something_new_to_learn_from():
    assert min(np.diff(storm(replace(DRIFT, settle_ms=24 * HOUR), 400))) >= 24


def test_the_budget_is_for_all_triggers_together():
    rule = replace(DRIFT, every_ms=HOUR, every_steps=100, cooldown_ms=0, max_per_day=3)
    assert most_in_a_day(storm(rule, 300)) == 3


def test_the_budget_of_a_day_ends_with_the_day():
    learner = fed(serving(replace(RULE, every_ms=HOUR, max_per_day=1)), range(10))
    learner.decided(START + 9 * HOUR, trained=True)
    assert fed(learner, range(10, 33)).due() is None
    assert fed(learner, [33]).due().trigger == "schedule"


def test_a_request_does_not_use_the_budget_but_the_schedule_counts_from_it():
    learner = fed(serving(replace(RULE, every_ms=2 * HOUR, max_per_day=1)), range(10))
    learner.decided(START + 9 * HOUR, trained=True, requested=True)
    assert fed(learner, [10]).due() is None
    assert fed(learner, [11]).due().trigger == "schedule"


@settings(max_examples=40, deadline=None)
@given(
    levels=st.lists(st.sampled_from([0.5, 1.0, 2.0, 5.0, 50.0]), min_size=10, max_size=25),
    max_per_day=st.integers(1, 4),
    cooldown=st.integers(0, 12),
    every=st.sampled_from([None, 1, 5, 24]),
    every_steps=st.sampled_from([0, 100, 700]),
    settle=st.sampled_from([0, 3, 24]),
)
def test_never_more_than_the_budget_in_any_day(levels, max_per_day, cooldown, every, every_steps, settle):
    rule = replace(
        DRIFT,
        max_per_day=max_per_day,
        cooldown_ms=cooldown * HOUR,
        every_ms=None if every is None else every * HOUR,
        every_steps=every_steps,
        settle_ms=settle * HOUR,
    )
    assert most_in_a_day(storm(rule, 15 * len(levels), lambda hour: levels[hour // 15])) <= max_per_day


# Replay.


def test_the_same_calls_make_the_same_decisions():
    rule = replace(DRIFT, every_ms=30 * HOUR)
    assert storm(rule, 300) == storm(rule, 300)


def test_while_old_scores_are_read_again_nothing_is_due_and_then_all_is_as_before():
    rule = replace(DRIFT, every_ms=30 * HOUR, every_steps=3000, settle_ms=6 * HOUR)
    learner, decisions = serving(rule), []
    for hour in range(160):
        fed(learner, [hour], level=2.0 if hour >= 100 else 1.0)
        if learner.due():
            decisions.append(learner.now_ms)
            learner.decided(learner.now_ms, trained=True)
    again = serving(rule)
    for decided_ms in decisions:
        again.decided(decided_ms, trained=True)
    for hour in range(160):
        assert again.due() is None
        fed(again, [hour], level=2.0 if hour >= 100 else 1.0)
    for hour in range(160, 260):
        assert fed(again, [hour], level=2.0).due() == fed(learner, [hour], level=2.0).due()


# Rollback.


def swapped(after, rule=RULE, before=1.0, hours=12, previous="a", baseline=1.0, **other):
    """After 60 hours of version a, `hours` of version b."""
    learner = fed(serving(rule), range(60), level=before)
    learner.champion("b", previous, START + 59 * HOUR)
    return fed(learner, range(60, 60 + hours), level=after, model="b", baseline=baseline, **other)


def test_a_champion_that_is_worse_than_the_one_before_disappoints():
    found = swapped(1.5).disappointment()
    assert (found.version, found.previous) == ("b", "a")
    assert found.figures["ratio"] == pytest.approx(1.5, rel=0.1)
    assert found.figures["before"] == pytest.approx(1.0, rel=0.1)
    assert found.figures["labels"] == 2400
    assert found.figures["windows"] == 12
    assert "of b is" in found.reason
    assert "that of a was" in found.reason


@pytest.mark.parametrize(("after", "expected"), [(0.5, False), (1.0, False), (1.19, False), (1.21, True), (3.0, True)])
def test_the_margin_of_a_rollback(after, expected):
    learner = serving()
    for hour in range(60):
        learner.observe(score(hour))
    learner.champion("b", "a", None)
    for hour in range(60, 72):
        learner.observe(score(hour, model="b", error=after))
    assert (learner.disappointment() is not None) is expected


def test_a_world_that_got_harder_for_the_baseline_too_is_not_the_champions_fault():
    assert swapped(3.0, baseline=3.0).disappointment() is None


def test_it_is_told_once_for_each_version():
    learner = swapped(1.5)
    assert learner.disappointment() is not None
    assert fed(learner, [72], level=1.5, model="b").disappointment() is None


@pytest.mark.parametrize(
    ("rule", "other"),
    [
        (replace(RULE, rollback=False), {}),
        (RULE, {"previous": ""}),
        (RULE, {"hours": 5}),
        (RULE, {"labels": (40.0, 40.0)}),
        (RULE, {"hours": 49 + 1}),
    ],
)
def test_no_champion_is_taken_back_without_rule_predecessor_windows_labels_or_after_its_probation(rule, other):
    assert swapped(1.5, rule, **other).disappointment() is None


def test_the_last_window_of_the_probation_still_counts():
    assert swapped(1.5, hours=49).disappointment() is not None


@pytest.mark.parametrize("wild", [1, 2, 3])
def test_a_few_wild_windows_do_not_take_a_champion_back(wild):
    learner = swapped(0.9, hours=6 - wild)
    assert fed(learner, range(66 - wild, 66), level=1000.0, model="b").disappointment() is None


@pytest.mark.parametrize(("after", "expected"), [(1.1, False), (1.3, True)])
def test_without_scores_of_the_champion_before_the_baseline_is_the_measure(after, expected):
    learner = serving(version="b", previous="a", since_ms=None)
    found = fed(learner, range(12), level=after, model="b").disappointment()
    assert (found is not None) is expected
    assert not expected or (found.figures["before"], found.figures["labels_before"]) == (1.0, 0.0)


def test_an_hour_of_the_day_that_is_always_bad_is_held_against_the_same_hour():
    """The swap comes just before twelve hours that are twice as hard for either version."""
    learner = serving()
    for hour in range(60):
        learner.observe(noisy(hour, 2.0 if hour % 24 >= 12 else 1.0))
    learner.champion("b", "a", None)
    for hour in range(60, 72):
        learner.observe(noisy(hour, 2.0, model="b"))
    assert learner.disappointment() is None


def test_leads_are_compared_only_where_both_have_labels():
    """The long lead, at which version a was bad, has none yet after the swap."""
    learner = serving()
    for hour in range(60):
        both = score(hour).scores
        hard = Sums(*[[short, 5 * long] for short, long in zip(*[iter(_rows(both["model"]))] * 2)])
        hard = Sums(both["model"].labels, hard.absolute_error, hard.squared_error, hard.pinball_loss, hard.covered)
        learner.observe(replace_scores(score(hour), hard))
    learner.champion("b", "a", None)
    for hour in range(60, 72):
        learner.observe(score(hour, model="b", error=1.5, labels=(100.0, 0.0)))
    assert learner.disappointment().figures["before"] == pytest.approx(1.0)


def _rows(sums):
    return [value for name in sums.__struct_fields__ for value in getattr(sums, name)]


def replace_scores(window, model):
    return WindowScore(
        window.partition,
        window.window_end,
        window.offset,
        window.steps,
        window.model,
        window.baseline,
        window.leads,
        {"model": model, "baseline": window.scores["baseline"]},
    )


def test_partitions_that_swap_at_different_times_and_arrive_interleaved_are_one_comparison():
    learner = serving()
    for hour in range(60):
        for partition in (0, 1):
            learner.observe(noisy(hour, seed=partition, partition=partition))
    learner.champion("b", "a", None)
    for hour in range(60, 72):
        learner.observe(noisy(hour, 1.5, model="b", partition=0))
        if hour >= 64:
            learner.observe(noisy(hour - 4, 1.5 if hour >= 67 else 1.0, model="b" if hour >= 67 else "a", partition=1))
    found = learner.disappointment()
    assert found.figures["ratio"] == pytest.approx(1.5, rel=0.1)
    assert found.figures["before"] == pytest.approx(1.0, rel=0.1)
    assert found.figures["windows"] == 12


def test_memory_is_bounded_however_many_windows_and_versions_pass():
    learner = serving()
    for hour in range(2000):
        version = f"v{hour // 100}"
        if hour % 100 == 0 and hour:
            learner.champion(version, f"v{hour // 100 - 1}", None)
            learner.decided(START + hour * HOUR, trained=True)
        fed(learner, [hour], model=version)
    assert len(learner._trails) <= 4
    assert all(len(trail.opening) <= 48 and len(trail.recent) <= 48 for trail in learner._trails.values())
    assert len(learner._begun_ms) <= 1


def test_partitions_read_one_after_the_other_come_to_the_same_and_keep_no_more():
    learner, other = serving(version="b", previous="a"), serving(version="b", previous="a")
    windows = [(hour, partition) for hour in range(300) for partition in (0, 1)]
    for found, order in ((learner, windows), (other, sorted(windows, key=lambda window: window[1]))):
        for hour, partition in order:
            found.observe(
                noisy(hour, 1.5 if hour >= 288 else 1.0, model="b" if hour >= 288 else "a", partition=partition)
            )
        assert all(len(trail.recent) <= 96 for trail in found._trails.values())
    one, another = learner.disappointment(), other.disappointment()
    assert one.figures == pytest.approx(another.figures)
