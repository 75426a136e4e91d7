"""Which challengers may serve."""

import math
from dataclasses import replace

import pytest

from models.evaluation import Figures
from models.gate import GateRule, judge

RULE = GateRule(margin=0.01, max_lead_loss=0.05, min_labels=1000)


def figures(pinball, name="Millrace", labels=5000, leads=None, mse=0.5):
    by_lead = {"pinball": [pinball] * 3 if leads is None else leads}
    return Figures(name, pinball, mse, 0.4, 0.8, 0.8, labels, by_lead)


NAIVE = figures(0.2, "SeasonalNaive")
LAST = figures(0.3, "LastValue")


def test_a_challenger_that_beats_champion_and_baselines_is_promoted():
    verdict = judge(RULE, figures(0.1), figures(0.125), [NAIVE, LAST])
    assert verdict.promoted
    assert verdict.reason == (
        "its pinball loss 0.1 is lower than the champion's 0.125 by 20 % and the 0.2 of the baseline SeasonalNaive "
        "and the 0.3 of the baseline LastValue"
    )


@pytest.mark.parametrize(
    ("pinball", "margin", "promoted"),
    [
        (0.1440, 0.01, False),
        (0.1432, 0.01, False),
        (0.1425, 0.01, True),
        (0.1440, 0.0, False),
        (0.1439, 0.0, True),
        (0.1500, 0.0, False),
    ],
)
def test_the_margin_over_the_champion(pinball, margin, promoted):
    rule = replace(RULE, margin=margin)
    assert judge(rule, figures(pinball), figures(0.144), [NAIVE]).promoted is promoted


def test_exactly_the_margin_is_enough():
    assert judge(replace(RULE, margin=0.25), figures(0.75), figures(1.0), [figures(2.0)]).promoted


def test_the_margin_is_told_with_the_figures():
    reason = judge(RULE, figures(0.1432), figures(0.144), [NAIVE]).reason
    assert reason == "its pinball loss 0.1432 is not lower than the champion's 0.144 by 1 %"


@pytest.mark.parametrize("pinball", [0.2, 0.25, 0.31])
def test_every_baseline_must_be_beaten_champion_or_not(pinball):
    for champion in (None, figures(0.9)):
        verdict = judge(RULE, figures(pinball), champion, [LAST, NAIVE])
        assert not verdict.promoted
        assert "the baseline" in verdict.reason


def test_without_a_champion_the_baselines_decide():
    assert judge(RULE, figures(0.1999), None, [NAIVE]).promoted


def test_a_lower_mse_does_not_make_up_for_a_higher_pinball_loss():
    assert not judge(RULE, figures(0.21, mse=0.001), None, [NAIVE]).promoted


@pytest.mark.parametrize(("labels", "promoted"), [(0, False), (999, False), (1000, True)])
def test_a_decision_needs_labels(labels, promoted):
    naive = replace(NAIVE, labels=labels)
    assert judge(RULE, figures(0.1, labels=labels), None, [naive]).promoted is promoted


@pytest.mark.parametrize("name", ["pinball", "mse", "mae"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_figures_that_are_not_finite_are_refused(name, value):
    verdict = judge(RULE, replace(figures(0.1), **{name: value}), figures(0.2), [NAIVE])
    assert not verdict.promoted
    assert "not finite" in verdict.reason


def test_a_challenger_that_answered_nan_in_places_has_fewer_labels_and_is_refused():
    verdict = judge(RULE, figures(0.1, labels=4000), None, [NAIVE])
    assert (verdict.promoted, "4000 labels and SeasonalNaive against 5000" in verdict.reason) == (False, True)


def test_a_champion_measured_on_another_slice_does_not_compare():
    assert not judge(RULE, figures(0.1), figures(0.15, labels=4999), [NAIVE]).promoted


def test_a_champion_without_finite_figures_is_no_hindrance_and_that_is_told():
    verdict = judge(RULE, figures(0.1), figures(math.nan), [NAIVE])
    assert verdict.promoted
    assert "the champion has no finite figures" in verdict.reason


@pytest.mark.parametrize(("at_lead_2", "promoted"), [(0.144, True), (0.1499, True), (0.1501, False), (0.2, False)])
def test_no_lead_may_be_much_worse(at_lead_2, promoted):
    champion = figures(0.1428571, leads=[0.1428571] * 3)
    verdict = judge(RULE, figures(0.12, leads=[0.1, at_lead_2, 0.11]), champion, [NAIVE])
    assert verdict.promoted is promoted
    assert promoted or "at lead 2 its pinball loss" in verdict.reason


def test_the_worst_lead_is_named():
    verdict = judge(RULE, figures(0.1, leads=[0.15, 0.3, 0.16]), figures(0.14), [NAIVE])
    assert verdict.reason == "at lead 2 its pinball loss 0.3 is higher than the champion's 0.14 by more than 5 %"


def test_leads_without_figures_are_left_out():
    assert judge(
        RULE, figures(0.1, leads=[0.1, 0.1, math.nan]), figures(0.14, leads=[0.14, 0.14, math.nan]), []
    ).promoted


def test_another_number_of_leads_does_not_compare():
    assert not judge(RULE, figures(0.1, leads=[0.1]), figures(0.14), [NAIVE]).promoted


def test_figures_that_look_alike_are_told_with_the_digits_that_differ():
    reason = judge(RULE, figures(0.20000012), None, [replace(NAIVE, pinball=0.20000011)]).reason
    assert "0.20000012 is not lower than the 0.20000011" in reason
