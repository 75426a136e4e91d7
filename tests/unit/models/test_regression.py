"""Online ridge regressions, held against the same written down for whole arrays."""

from __future__ import annotations

import numpy as np
import pytest

from models.regression import (
    FORGETTING,
    HUBER,
    HUBER_FROM,
    LABELS,
    LARGEST_LABEL,
    LEAST_VARIANCE,
    OWN_PENALTY,
    POOLED_PENALTY,
    OwnRidge,
    PooledRidge,
    ResidualSpread,
)
from models.sequences import empty_rows
from models.stages import Lesson, View, interpolation

FEATURES, HORIZON, PAIRS = 5, 3, 24
TRUE = np.random.default_rng(7).standard_normal((FEATURES, HORIZON)) / 2


def partition(stage) -> dict[str, np.ndarray]:
    return {c.name: np.full(c.shape, c.fill, c.dtype) for c in stage.partition_columns()}


def lesson(x, label, weight=None, targets=1) -> Lesson:
    x = x.astype(np.float32)
    weight = np.ones(x.shape[:2], np.float32) if weight is None else weight.astype(np.float32)
    return Lesson(View(x, x[..., :2], targets), label.astype(np.float32), weight, np.full(len(x), x.shape[1]))


def pairs(series: int, epochs: int, *, noise=0.3, seed=0, truth=TRUE):
    """(epochs, N, P, p) features and (epochs, N, P, H) labels."""
    random = np.random.default_rng(seed)
    x = random.standard_normal((epochs, series, PAIRS, FEATURES))
    x[..., 0] = 1.0
    return x, x @ truth + noise * random.standard_normal((*x.shape[:3], HORIZON))


def taught_pooled(x, label, weight=None, targets=1, series=None):
    """stage, rows, shared and, of each epoch, the importance that its series had."""
    stage = PooledRidge(FEATURES, HORIZON, targets, PAIRS)
    rows, shared = empty_rows(stage.columns(), (series or x.shape[1]) // targets), partition(stage)
    importance = []
    for number in range(len(x)):
        importance.append(1.0 / (stage._spread.overall(rows) + LEAST_VARIANCE))
        part = lesson(x[number], label[number], None if weight is None else weight[number], targets)
        stage.learn(rows, shared, part, np.zeros_like(part.label), stage.forecast(rows, shared, part.view))
        stage.settle(shared)
    return stage, rows, shared, importance


def test_the_pooled_ridge_finds_the_coefficients_of_a_fleet():
    x, label = pairs(6, 60)
    stage, rows, shared, _ = taught_pooled(x, label)
    np.testing.assert_allclose(shared["pooled.weights"][0], TRUE, atol=0.02)
    assert shared[LABELS].tolist() == [6 * 60 * PAIRS]
    view = lesson(x[0], label[0]).view
    np.testing.assert_allclose(stage.forecast(rows, shared, view), x[0] @ TRUE, atol=0.1)


def test_it_finds_the_coefficients_of_an_autoregressive_fleet():
    """z[t] = 0.6 z[t-1] - 0.3 z[t-2] + e: the forecast of lead h is what the recursion gives."""
    random = np.random.default_rng(1)
    steps, series = 60 * PAIRS + 10, 5
    z = np.zeros((series, steps))
    for t in range(2, steps):
        z[:, t] = 0.6 * z[:, t - 1] - 0.3 * z[:, t - 2] + random.standard_normal(series)
    at = np.arange(2, steps - HORIZON)[: 58 * PAIRS]
    columns = [
        np.ones((series, len(at))),
        z[:, at],
        z[:, at - 1],
        z[:, at - 2],
        random.standard_normal((series, len(at))),
    ]
    x = np.stack(columns, axis=2).reshape(series, -1, PAIRS, FEATURES).transpose(1, 0, 2, 3)
    label = np.stack([z[:, at + h] for h in (1, 2, 3)], axis=2).reshape(series, -1, PAIRS, HORIZON)
    _, _, shared, _ = taught_pooled(x, label.transpose(1, 0, 2, 3))
    first = np.array([0.6, -0.3])
    second = 0.6 * first + [-0.3, 0]
    third = 0.6 * second - 0.3 * first
    expected = np.array([first, second, third]).T
    np.testing.assert_allclose(shared["pooled.weights"][0][1:3], expected, atol=0.04)
    np.testing.assert_allclose(shared["pooled.weights"][0][[0, 3, 4]], 0, atol=0.04)


def test_it_equals_a_ridge_of_whole_arrays_weighted_and_forgetting():
    x, label = pairs(4, 12)
    weight = np.random.default_rng(3).uniform(0, 1, x.shape[:3])
    _, _, shared, importance = taught_pooled(x, label, weight)
    x32, gram, moment = x.astype(np.float32).astype(float), np.zeros((FEATURES, FEATURES)), 0
    for number in range(12):
        age = FORGETTING ** (PAIRS * (11 - number))
        w = (weight[number] * importance[number][:, None]).reshape(-1) * age
        flat, y = x32[number].reshape(-1, FEATURES), label[number].reshape(-1, HORIZON)
        gram += (flat * w[:, None]).T @ flat
        moment += (flat * w[:, None]).T @ y
    expected = np.linalg.solve(gram + POOLED_PENALTY * np.eye(FEATURES), moment)
    np.testing.assert_allclose(shared["pooled.weights"][0], expected, rtol=1e-4, atol=1e-5)


def test_a_noisy_series_counts_less_than_a_calm_one():
    x, label = pairs(2, 40, noise=0.2)
    other = x[:, 1] @ (TRUE + 1.0) + 8 * np.random.default_rng(2).standard_normal(label[:, 1].shape)
    label[:, 1] = other
    _, _, shared, importance = taught_pooled(x, label)
    assert importance[-1][0] > 50 * importance[-1][1]
    np.testing.assert_allclose(shared["pooled.weights"][0], TRUE, atol=0.2)


def test_each_target_has_a_regression_of_its_own():
    x, label = pairs(6, 40)
    label[:, 1::2] *= -1
    stage, rows, shared, _ = taught_pooled(x, label, targets=2)
    np.testing.assert_allclose(shared["pooled.weights"], [TRUE, -TRUE], atol=0.05)
    view = View(x[0].astype(np.float32), x[0][..., :2].astype(np.float32), 2)
    sign = np.tile([1, -1], 3)[:, None, None]
    np.testing.assert_allclose(stage.forecast(rows, shared, view), sign * (x[0] @ TRUE), atol=0.2)


def test_pairs_without_weight_teach_nothing():
    x, label = pairs(3, 10)
    _, rows, shared, _ = taught_pooled(x, label, np.zeros(x.shape[:3]))
    for values in (*shared.values(), *rows.values()):
        assert (values == 0).all()


def test_a_missing_label_is_what_is_forecast_today_and_leaves_nothing_undefined():
    x, label = pairs(4, 60)
    label[np.random.default_rng(0).random(label.shape) < 0.2] = np.nan
    _, rows, shared, _ = taught_pooled(x, label)
    np.testing.assert_allclose(shared["pooled.weights"][0], TRUE, atol=0.05)
    for values in (*shared.values(), *rows.values()):
        assert np.isfinite(values).all()


def test_what_was_learned_is_forgotten_in_ten_thousand_steps():
    x, label = pairs(3, 60)
    stage, _, shared, _ = taught_pooled(x, label)
    before = shared["pooled.gram"].copy()
    for _ in range(round(10_000 / PAIRS)):
        stage.settle(shared)
    np.testing.assert_allclose(shared["pooled.gram"], before * FORGETTING ** (round(10_000 / PAIRS) * PAIRS))


def test_labels_beyond_what_is_usual_are_held_once_the_series_is_known():
    spread = ResidualSpread("x.", HORIZON, 1)
    rows = empty_rows(spread.columns(), 2)
    random = np.random.default_rng(0)
    residual = random.standard_normal((2, 1000, HORIZON)).astype(np.float32)
    np.testing.assert_array_equal(spread.held(rows, residual, np.ones((2, 1000), np.float32)), residual)
    assert (rows["x.count"] > HUBER_FROM).all()
    wild = np.full((2, 1, HORIZON), 1e6, np.float32)
    wild[1] = np.nan
    held = spread.held(rows, wild, np.ones((2, 1), np.float32))
    np.testing.assert_allclose(held[0], HUBER, rtol=0.15)
    assert np.isnan(held[1]).all()
    fresh = spread.held(empty_rows(spread.columns(), 2), wild, np.ones((2, 1), np.float32))
    np.testing.assert_allclose(fresh[0], LARGEST_LABEL)


def test_a_series_with_a_gap_each_night_gets_to_know_its_spread_all_the_same():
    spread = ResidualSpread("x.", 24, 1)
    rows = empty_rows(spread.columns(), 1)
    values = np.random.default_rng(0).standard_normal(3024)
    values[np.arange(3024) % 24 < 8] = np.nan
    residual = np.lib.stride_tricks.sliding_window_view(values, 24)[None, :3000].astype(np.float32)
    spread.held(rows, residual, np.ones((1, 3000), np.float32))
    np.testing.assert_allclose(rows["x.variance"], 1.0, rtol=0.2)


def test_each_lead_knows_of_how_many_labels_it_knows():
    spread = ResidualSpread("x.", 3, 1)
    rows = empty_rows(spread.columns(), 1)
    residual = np.ones((1, 600, 3), np.float32)
    residual[0, 400:, 2] = np.nan
    spread.held(rows, residual, np.ones((1, 600), np.float32))
    np.testing.assert_allclose(rows["x.count"][0, 0], [600, 600, 400])
    wild = spread.held(rows, np.full((1, 1, 3), 100.0, np.float32), np.ones((1, 1), np.float32))
    np.testing.assert_allclose(wild[0, 0], [HUBER, HUBER, 100.0], rtol=0.01)  # HUBER_FROM lies between 400 and 600


def own(features=FEATURES, knots=HORIZON, of="full") -> OwnRidge:
    return OwnRidge("own", features, HORIZON, 1, knots, of)


def test_an_own_ridge_begins_at_zero():
    stage = own()
    rows = empty_rows(stage.columns(), 3)
    x, label = pairs(3, 1)
    assert (stage.forecast(rows, {}, lesson(x[0], label[0]).view) == 0).all()


def test_it_learns_what_one_sensor_alone_does():
    x, label = pairs(3, 60, truth=np.zeros_like(TRUE))
    label[:, 1] += x[:, 1] @ TRUE
    stage = own()
    rows = empty_rows(stage.columns(), 3)
    for number in range(60):
        part = lesson(x[number], label[number])
        stage.learn(rows, {}, part, np.zeros_like(part.label), stage.forecast(rows, {}, part.view))
    found = rows["own.weights"][:, 0]
    shrunk = 60 * PAIRS / (60 * PAIRS + OWN_PENALTY)
    np.testing.assert_allclose(found[1], shrunk * TRUE, atol=0.06)
    np.testing.assert_allclose(found[[0, 2]], 0, atol=0.05)


@pytest.mark.parametrize("knots", [2, HORIZON])
def test_it_equals_a_ridge_of_whole_arrays_on_the_knots(knots):
    x, label = pairs(2, 15)
    before = 0.5 * label + 0.1
    stage = own(knots=knots)
    rows = empty_rows(stage.columns(), 2)
    for number in range(15):
        part = lesson(x[number], label[number])
        stage.learn(rows, {}, part, before[number].astype(np.float32), stage.forecast(rows, {}, part.view))
    places = (np.arange(knots) + 0.5) * HORIZON / knots + 0.5
    expand = interpolation(HORIZON, places).astype(float)
    for series in range(2):
        gram, moment = np.zeros((FEATURES, FEATURES)), np.zeros((FEATURES, knots))
        for number in range(15):
            age = FORGETTING ** (PAIRS * (14 - number))
            own_x = x[number, series]
            onto_knots = np.linalg.lstsq(expand, (label - before)[number, series].T, rcond=None)[0].T
            gram, moment = gram + age * own_x.T @ own_x, moment + age * own_x.T @ onto_knots
        expected = np.linalg.solve(gram + OWN_PENALTY * np.eye(FEATURES), moment)
        np.testing.assert_allclose(rows["own.weights"][series, 0], expected, rtol=2e-3, atol=1e-4)


def test_half_of_a_symmetric_matrix_is_kept_and_the_whole_one_is_meant():
    x, label = pairs(2, 3)
    stage = own()
    rows = empty_rows(stage.columns(), 2)
    assert rows["own.gram"].shape == (2, 1, FEATURES * (FEATURES + 1) // 2)
    for number in range(3):
        part = lesson(x[number], label[number])
        stage.learn(rows, {}, part, np.zeros_like(part.label), np.zeros_like(part.label))
    for series in range(2):
        whole = sum(FORGETTING ** (PAIRS * (2 - n)) * x[n, series].T @ x[n, series] for n in range(3))
        np.testing.assert_allclose(rows["own.gram"][series, 0], whole[np.tril_indices(FEATURES)], rtol=1e-3, atol=1e-3)


def test_of_a_small_regression_only_the_small_view_is_seen():
    x, label = pairs(2, 2)
    stage = own(features=2, of="small")
    rows = empty_rows(stage.columns(), 2)
    part = lesson(x[0], label[0])
    stage.learn(rows, {}, part, np.zeros_like(part.label), np.zeros_like(part.label))
    assert rows["own.weights"].shape == (2, 1, 2, HORIZON)
    assert stage.forecast(rows, {}, part.view).shape == (2, PAIRS, HORIZON)


def test_a_sensor_without_news_keeps_its_weights():
    x, label = pairs(2, 5)
    stage = own()
    rows = empty_rows(stage.columns(), 2)
    for number in range(5):
        part = lesson(x[number], label[number])
        stage.learn(rows, {}, part, np.zeros_like(part.label), np.zeros_like(part.label))
    before = rows["own.weights"].copy()
    quiet = lesson(x[0], np.full_like(label[0], np.nan), np.zeros(x.shape[1:3]))
    quiet = Lesson(quiet.view, quiet.label, quiet.weight, np.zeros(2, np.int64))
    stage.learn(rows, {}, quiet, np.zeros_like(quiet.label), np.zeros_like(quiet.label))
    np.testing.assert_allclose(rows["own.weights"], before, rtol=1e-5)
