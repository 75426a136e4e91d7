"""Who is believed, what waits for its label, and quantiles that keep what they promise."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

import models.cascade
from models.mixture import PLACES, USUAL_STEPS, Calibration, Distances, Matured, Mixture, SaidBefore
from models.sequences import empty_rows
from models.stages import interpolation, lead_places
from tests.helpers.lean import daily_fleet, lean_settings, said_of

LEVELS = (0.05, 0.25, 0.5, 0.9, 0.99)


def partition(part) -> dict[str, np.ndarray]:
    return {c.name: np.full(c.shape, c.fill, c.dtype) for c in part.partition_columns()}


class Judged:
    """A mixture of experts of a few series, told label after label."""

    def __init__(self, experts=("last", "season", "pooled"), stands_for=(0, 1, 2), *, horizon=4, batch=2) -> None:
        self.mixture = Mixture(experts, stands_for, 1, 24, horizon, 1)
        self.rows = empty_rows(self.mixture.columns(), batch)
        self.shared = partition(self.mixture)
        self.leads = len(lead_places(horizon, PLACES))

    def tell(self, label, said, pending=24) -> None:
        """label: (B, c); said: (B, c, E): of every lead alike."""
        batch = len(label)
        self.mixture.forget(self.rows, np.full(batch, pending))
        for number in range(self.leads):
            matured = Matured(label[:, :, None], said[:, :, None, :])
            self.mixture.learn(self.rows, self.shared, number, 1, matured)
        self.mixture.settle(self.rows, self.shared)

    @property
    def weights(self) -> np.ndarray:
        return self.mixture.weights(self.mixture.losses(self.rows, self.shared))


def test_before_anything_is_known_the_baseline_is_believed():
    found = Judged().weights
    assert found.shape == (2, 1, 4, 3)
    assert (found[..., 1] > 0.999).all()


def test_the_better_expert_gets_believed_series_by_series():
    judged, random = Judged(), np.random.default_rng(0)
    for _ in range(30):
        label = random.standard_normal((2, 24))
        said = label[..., None] + random.standard_normal((2, 24, 3)) * [[[2.0, 1.0, 0.3]], [[0.3, 1.0, 2.0]]]
        judged.tell(label, said)
    assert (judged.weights[0, ..., 2] > 0.99).all()
    assert (judged.weights[1, ..., 0] > 0.99).all()


def test_where_all_else_fails_the_baseline_is_believed_again():
    judged, random = Judged(), np.random.default_rng(0)
    for day in range(120):
        label = random.standard_normal((2, 24))
        size = [2.0, 1.0, 0.3] if day < 30 else [30.0, 1.0, 30.0]
        judged.tell(label, label[..., None] + random.standard_normal((2, 24, 3)) * size)
    assert (judged.weights[..., 1] > 0.99).all()


@pytest.mark.parametrize("size", [0.0, 1e-12, 1.0, 1e12])
def test_weights_sum_to_one_whatever_the_errors(size):
    judged, random = Judged(), np.random.default_rng(1)
    for _ in range(5):
        label = size * random.standard_normal((2, 24))
        judged.tell(label, np.zeros((2, 24, 3)))
    assert np.isfinite(judged.weights).all()
    np.testing.assert_allclose(judged.weights.sum(axis=-1), 1.0, rtol=1e-5)


def test_a_new_series_believes_whom_the_partition_believes():
    judged, random = Judged(batch=3), np.random.default_rng(0)
    for _ in range(30):
        label = random.standard_normal((3, 24))
        label[2] = np.nan
        judged.tell(label, np.nan_to_num(label)[..., None] + random.standard_normal((3, 24, 3)) * [2.0, 1.0, 0.3])
    assert (judged.rows["mixture.count"][2] == 0).all()
    assert (judged.weights[2, ..., 2] > 0.99).all()


def test_bursts_that_come_once_in_some_weeks_are_not_forgotten_in_between():
    """The pooled one is better on calm days, and useless on the others: two memories, of which the longer one holds several bursts."""
    judged, random = Judged(), np.random.default_rng(0)
    believed = []
    for day in range(160):
        burst = day % 20 == 19
        label = random.standard_normal((2, 24))
        judged.tell(label, label[..., None] + random.standard_normal((2, 24, 3)) * [8.0, 1.0, 5.0 if burst else 0.8])
        believed.append(judged.weights[..., 1].min())
    assert judged.rows["mixture.count"].shape == (2, 1, 4, 2)
    assert judged.rows["mixture.loss"].shape == (2, 1, 4, 2, 3)
    counts = judged.rows["mixture.count"][0, 0, 0] / 24
    np.testing.assert_allclose(counts, [10.5, 48.5], atol=2)
    assert min(believed[100:]) > 0.9


def test_one_spike_does_not_make_all_experts_alike():
    judged, random = Judged(), np.random.default_rng(0)
    for day in range(60):
        label = random.standard_normal((2, 24))
        said = label[..., None] + random.standard_normal((2, 24, 3)) * [2.0, 1.0, 0.3]
        if day == 50:
            label[0, 3] = 1e9
        judged.tell(label, said)
    assert (judged.weights[0, ..., 2] > 0.95).all()


def test_what_never_moved_may_begin_to_move():
    judged, random = Judged(), np.random.default_rng(0)
    for _ in range(3):
        judged.tell(np.zeros((2, 24)), np.zeros((2, 24, 3)))
    for _ in range(30):
        label = random.standard_normal((2, 24))
        judged.tell(label, label[..., None] + random.standard_normal((2, 24, 3)) * [2.0, 1.0, 0.3])
    losses = judged.mixture.losses(judged.rows, judged.shared)
    assert (losses[..., 2] > 0.01).all()
    assert (judged.weights[..., 2] > 0.9).all()


def test_what_is_usual_is_not_what_one_series_that_has_gone_mad_does():
    judged, random = Judged(batch=10), np.random.default_rng(0)
    for day in range(40):
        label = random.standard_normal((10, 24))
        said = label[..., None] + random.standard_normal((10, 24, 3)) * [2.0, 1.0, 0.3]
        if day >= 35:
            said[0] += 1e5
        judged.tell(label, said)
    usual = judged.shared["mixture.usual"][0, 0]
    np.testing.assert_allclose(usual, [[4.0, 1.0, 0.09]] * 2, rtol=0.15)


def test_an_expert_that_says_absurd_things_is_not_believed_any_more():
    judged, random = Judged(), np.random.default_rng(0)
    for day in range(60):
        label = random.standard_normal((2, 24))
        said = label[..., None] + random.standard_normal((2, 24, 3)) * [2.0, 1.0, 0.3]
        if day >= 10:
            said[..., 2] = np.inf  # as half precision keeps 70,000 units
        judged.tell(label, said)
    assert (judged.weights[..., 2] < 0.01).all()


def test_an_expert_that_says_nothing_is_judged_and_spoken_for_by_the_one_it_stands_on():
    judged = Judged(("last", "season", "network over last"), (0, 1, 0))
    label, random = np.zeros((2, 24)), np.random.default_rng(0)
    said = random.standard_normal((2, 24, 3))
    said[..., 2] = np.nan
    judged.tell(label, said)
    loss = judged.rows["mixture.loss"]
    np.testing.assert_array_equal(loss[..., 2], loss[..., 0])
    experts = [np.full((2, 1, 3, 4), value, np.float32) for value in (1.0, 2.0, np.nan)]
    weights = np.full((2, 1, 4, 3), 1 / 3, np.float32)
    np.testing.assert_allclose(judged.mixture.mixed(experts, weights), 4 / 3, rtol=1e-6)


def test_labels_that_are_missing_change_nothing_but_what_is_forgotten():
    judged, random = Judged(), np.random.default_rng(0)
    judged.tell(random.standard_normal((2, 24)), np.zeros((2, 24, 3)))
    before = judged.rows["mixture.loss"] / judged.rows["mixture.count"][..., None]
    judged.tell(np.full((2, 24), np.nan), np.zeros((2, 24, 3)))
    np.testing.assert_allclose(judged.rows["mixture.loss"] / judged.rows["mixture.count"][..., None], before, rtol=1e-5)
    assert (judged.rows["mixture.count"] < 24).all()


def test_losses_lean_on_what_is_usual_as_on_so_many_steps():
    judged = Judged()
    judged.shared["mixture.usual"][:] = 2.0
    judged.rows["mixture.count"][:] = USUAL_STEPS
    judged.rows["mixture.loss"][:] = 4.0 * USUAL_STEPS
    np.testing.assert_allclose(judged.mixture.losses(judged.rows, judged.shared), 3.0, rtol=1e-6)


# -- what waits


@pytest.mark.parametrize(("horizon", "epoch"), [(1, 4), (3, 4), (12, 12), (24, 24), (48, 24), (7, 24)])
@pytest.mark.parametrize("cuts", ["whole", "single", "ragged"])
def test_what_was_said_of_each_lead_comes_back_when_its_step_has_closed(horizon, epoch, cuts):
    random = np.random.default_rng(horizon)
    before = SaidBefore(horizon, 1, 2, epoch)
    rows = empty_rows(before.columns(), 2)
    total, leads = 5 * (epoch + horizon), before.leads
    said = random.standard_normal((2, total + 1, 1, len(leads), 2)).astype(np.float16).astype(np.float32)
    value = random.standard_normal((2, total + 1, 1))
    ends = [0]
    while ends[-1] < total:
        ends.append(min(total, ends[-1] + (epoch if cuts != "ragged" else int(random.integers(1, epoch + 1)))))
    expected = {(b, m, o) for b in range(2) for m in range(len(leads)) for o in range(1, total + 1)}
    expected = {(b, m, o) for b, m, o in expected if o % before.stride[m] == 0 and o + leads[m] <= total}
    came = {}
    for first, last in itertools.pairwise(ends):
        places = range(first, last) if cuts == "single" else [first]
        for at in places:
            steps = np.arange(at, at + 1 if cuts == "single" else last) + 1
            ordinals = np.broadcast_to(steps.astype(np.int32), (2, len(steps)))
            before.keep(rows, ordinals, np.ones(ordinals.shape, bool), said[:, steps])
        window = value[:, max(0, last - (epoch + horizon + 8)) : last + 1]
        for m, lead in enumerate(leads.tolist()):
            distances = Distances(window, np.zeros_like(window))
            found = before.matured(rows, m, np.full(2, last), np.full(2, last - first), distances)
            for b, c in zip(*np.nonzero(np.isfinite(found.label[..., 0]))):
                origin = last - lead
                origin = origin // before.stride[m] * before.stride[m] - c * before.stride[m]
                assert (b, m, origin) not in came, "each of them once"
                came[b, m, origin] = found.label[b, c, 0], found.said[b, c, 0]
    assert came.keys() == expected
    for (b, m, origin), (label, answer) in came.items():
        assert label == value[b, origin + leads[m], 0]
        np.testing.assert_array_equal(answer, said[b, origin, 0, m])


def test_padding_is_not_kept():
    before = SaidBefore(3, 1, 1, 4)
    rows = empty_rows(before.columns(), 1)
    steps, live = np.array([[1, 2, 2, 2]], np.int32), np.array([[True, True, False, False]])
    before.keep(rows, steps, live, np.arange(4.0)[None, :, None, None, None].repeat(3, 3).astype(np.float32))
    assert np.nanmax(rows["said.before"]) == 1.0


# -- quantiles


def calibrated(levels, noise, *, rate_steps=4000, batch=8, said=1.0, seed=0):
    """Coverage of each level over the second half; noise: standard deviation at each step as a function of its share."""
    part = Calibration("c.", levels, 1, 1)
    rows, shared = empty_rows(part.columns(), batch), partition(part)
    random = np.random.default_rng(seed)
    below = np.zeros(len(levels))
    days = rate_steps // 24
    spread = np.full((batch, 1, 1, 1, len(part.tracked)), said, np.float32) * part._normal
    for day in range(days):
        off = part.offsets(rows, shared, spread)
        assert np.isfinite(off).all()
        assert (np.diff(off, axis=-1) >= 0).all()
        label = noise(day / days) * random.standard_normal((batch, 24, 1))
        if day >= days // 2:
            below += (label[..., None] <= off[:, :, 0]).mean(axis=(0, 1, 2)) / (days - days // 2)
        told = np.broadcast_to(off[:, :, 0, 0, part.tracked][:, :, None], (batch, 1, 1, len(part.tracked)))
        said_before = np.repeat(told, 24, axis=1).astype(np.float16).astype(np.float64)
        part.learn(rows, shared, 0, 1, Matured(label, said_before))
        part.settle(rows, shared)
    return below


@pytest.mark.parametrize("width", [0.2, 1.0, 5.0])
def test_quantiles_keep_what_they_promise_on_noise_of_another_width(width):
    """In the end: an outer quantile that begins five times too wide needs log(5) / (RATE * 0.01) = 32,000 steps to come in."""
    found = calibrated(LEVELS, lambda share: width, rate_steps=80_000, batch=2)
    np.testing.assert_allclose(found, LEVELS, atol=0.015)


def test_quantiles_keep_what_they_promise_on_noise_that_grows_and_shrinks():
    found = calibrated(LEVELS, lambda share: np.exp(np.sin(2 * np.pi * 2 * share)), rate_steps=8000)
    np.testing.assert_allclose(found, LEVELS, atol=0.02)


@pytest.mark.parametrize("levels", [(0.1, 0.9), (0.9,), (0.05,), (0.6, 0.7), (0.5,), (0.49, 0.5, 0.51)])
def test_any_levels_will_do(levels):
    found = calibrated(levels, lambda share: 2.0)
    np.testing.assert_allclose(found, levels, atol=0.03)


def test_quantiles_ascend_however_their_widths_have_come_apart():
    part = Calibration("c.", (0.05, 0.1, 0.5, 0.8, 0.95), 12, 1)
    rows, shared = empty_rows(part.columns(), 50), partition(part)
    random = np.random.default_rng(0)
    rows["c.width"][:] = random.uniform(-4, 4, rows["c.width"].shape)
    spread = np.abs(random.standard_normal((50, 1, 3, 12, 4))).astype(np.float32)
    off = part.offsets(rows, shared, spread)
    assert np.isfinite(off).all()
    assert (np.diff(off, axis=-1) >= 0).all()
    assert (off[..., 2] == 0).all()


def test_a_new_series_is_as_wide_as_is_usual():
    part = Calibration("c.", LEVELS, 3, 1)
    rows, shared = empty_rows(part.columns(), 3), partition(part)
    rows["c.width"][:2] = [[[[1.0] * 4] * 3], [[[3.0] * 4] * 3]]
    part.settle(rows, shared)
    spread = np.ones((3, 1, 1, 3, 4), np.float32)
    np.testing.assert_allclose(np.abs(part.offsets(rows, shared, spread)[2, ..., 0]), np.exp(2.0), rtol=1e-5)


def test_what_width_is_usual_is_not_what_one_series_that_has_gone_mad_has():
    part = Calibration("c.", LEVELS, 3, 1)
    rows, shared = empty_rows(part.columns(), 5), partition(part)
    rows["c.width"][:] = np.array([0.9, 1.0, 4.0, 1.1, np.nan])[:, None, None, None]
    part.settle(rows, shared)
    np.testing.assert_allclose(shared["c.usual"], 1.05, rtol=1e-6)
    part.settle(empty_rows(part.columns(), 2), shared)  # nobody knows anything: what was usual stays
    np.testing.assert_allclose(shared["c.usual"], 1.05, rtol=1e-6)


def test_between_the_leads_that_are_tracked_it_is_interpolated():
    leads = lead_places(24, PLACES)
    expand = interpolation(24, leads)
    np.testing.assert_allclose(expand.sum(axis=1), 1.0, rtol=1e-6)
    np.testing.assert_allclose(expand @ leads, np.arange(1, 25), rtol=1e-5)


# -- through the whole


def test_half_precision_of_what_was_said_does_no_harm(monkeypatch):
    values = daily_fleet(40 * 24, 3)
    half = said_of(values, lean_settings(12))
    columns = SaidBefore.columns
    monkeypatch.setattr(
        models.cascade.SaidBefore,
        "columns",
        lambda self: tuple(replace(column, dtype=np.dtype(np.float32)) for column in columns(self)),
    )
    single = said_of(values, lean_settings(12))
    known = half.status >= 0
    unit = values.std(axis=0)[None, :, None]
    difference = np.abs(half.mean - single.mean) / unit
    assert np.nanmax(difference) < 0.005
    covered = [np.nanmean(one.coverage(values)[known]) for one in (half, single)]
    assert abs(covered[0] - covered[1]) < 0.003
