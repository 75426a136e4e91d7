"""What every forecaster is held to, whatever is inside: the guarantees of `models.forecaster.Forecaster`."""

from __future__ import annotations

import numpy as np
import pytest

from models.baselines import LastValue, SeasonalNaive
from models.forecaster import SeriesSpec
from models.sequences import empty_rows, refill
from tests.helpers.series import SPEC, STEP_MS, Bench, noisy

SPECS = {
    "two targets, two seasons": SPEC,
    "one of each": SeriesSpec(("a.mean",), (0,), STEP_MS, 1, (0.5,)),
    "uneven quantiles": SeriesSpec(("a.mean", "b.last"), (1,), STEP_MS, 7, (0.05, 0.2, 0.3, 0.9), (3,)),
}
KINDS = ("LastValue", "SeasonalNaive", "FeedForward", "simple_rnn", "lstm", "gru")
pytestmark = pytest.mark.keras


def neural(kind: str, spec: SeriesSpec):
    """With weights that are far from their cautious beginning."""
    import keras

    from models.feedforward import FeedForward, FeedForwardNet
    from models.rnn import RecurrentNet, RNNForecaster

    keras.utils.set_random_seed(3)
    if kind == "FeedForward":
        forecaster = FeedForward(FeedForwardNet(spec, 6, 8, dense=8), version="test", warmup_steps=0)
    else:
        forecaster = RNNForecaster(RecurrentNet(spec, kind, 8, 2, dense=8), version="test", warmup_steps=0)
    random = np.random.default_rng(0)
    model = forecaster.net.model
    model.set_weights([w + 0.1 * random.standard_normal(w.shape).astype("f4") for w in model.get_weights()])
    return forecaster


EVERY_SPEC = ("LastValue", "SeasonalNaive", "gru")
"""The others stand on the same memory and the same heads: where only shapes differ, one network speaks for all."""
CASES = [(kind, name) for kind in KINDS for name in SPECS if kind in EVERY_SPEC or name == "two targets, two seasons"]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def forecaster(request):
    kind, name = request.param
    spec = SPECS[name]
    return (
        {"LastValue": LastValue, "SeasonalNaive": SeasonalNaive}[kind](spec)
        if kind in ("LastValue", "SeasonalNaive")
        else neural(kind, spec)
    )


def values_for(forecaster, batch=4, steps=20, **options):
    return noisy(forecaster.spec, batch, steps, **options)


def same(found, expected, unit=1.0):
    """Equal up to float32 rounding, measured against the size of the series."""
    for ours, theirs in ((found.mean, expected.mean), (found.quantiles, expected.quantiles)):
        assert np.array_equal(np.isnan(ours), np.isnan(theirs))
        assert np.nanmax(np.abs(ours - theirs), initial=0.0) <= 1e-4 * unit


def size_of(values):
    return float(np.nanmax(np.abs(values)))


def joined(predictions):
    mean = np.concatenate([p.mean for p in predictions], axis=1)
    return type(predictions[0])(mean, np.concatenate([p.quantiles for p in predictions], axis=1))


def test_it_says_who_it_is(forecaster):
    assert forecaster.name in ("LastValue", "SeasonalNaive", "FeedForward", "Millrace")
    assert forecaster.version
    assert forecaster.warmup_steps >= 0
    names = [column.name for column in Bench(forecaster, 1).columns]
    assert len(names) == len(set(names))
    assert all("." in name for name in names)


def test_outputs_have_the_shapes_and_dtypes_of_the_contract(forecaster):
    spec, values = forecaster.spec, values_for(forecaster)
    out = Bench(forecaster, 4).advance(values)
    assert out.mean.shape == (4, 20, spec.horizon, len(spec.targets))
    assert out.quantiles.shape == (*out.mean.shape, len(spec.quantiles))
    assert out.mean.dtype == out.quantiles.dtype == np.float32


def test_rows_keep_their_shapes_and_dtypes(forecaster):
    bench = Bench(forecaster, 4)
    bench.advance(values_for(forecaster))
    for column in bench.columns:
        assert bench.rows[column.name].shape == (4, *column.shape)
        assert bench.rows[column.name].dtype == column.dtype


def test_it_answers_from_the_first_observed_value_on_and_not_before(forecaster):
    values = values_for(forecaster, steps=8, missing=0)
    values[:, :3] = np.nan
    out = Bench(forecaster, 4).advance(values)
    assert np.isnan(out.mean[:, :3]).all()
    assert np.isnan(out.quantiles[:, :3]).all()
    assert np.isfinite(out.mean[:, 3:]).all()
    assert np.isfinite(out.quantiles[:, 3:]).all()


def test_quantiles_never_cross(forecaster):
    out = Bench(forecaster, 8).advance(values_for(forecaster, 8, 40, missing=0.2))
    spread = np.diff(out.quantiles, axis=-1)
    assert not (spread < 0).any()


def test_a_sensors_outcome_does_not_depend_on_the_others(forecaster):
    values = values_for(forecaster)
    together = Bench(forecaster, 4).advance(values)
    for sensor in range(4):
        alone = Bench(forecaster, 1).advance(values[[sensor]])
        same(alone, type(together)(together.mean[[sensor]], together.quantiles[[sensor]]), size_of(values))


@pytest.mark.parametrize("cuts", [(1,), (3, 4, 12)])
def test_the_outcome_does_not_depend_on_how_the_steps_were_cut(forecaster, cuts):
    values = values_for(forecaster)
    whole, bench = Bench(forecaster, 4).advance(values), Bench(forecaster, 4)
    same(joined([bench.advance(part) for part in np.split(values, cuts, axis=1)]), whole, size_of(values))


def test_padding_changes_nothing(forecaster):
    values = values_for(forecaster)
    lengths = np.array([20, 11, 3, 0])
    live = np.arange(20) < lengths[:, None]
    padded, plain = Bench(forecaster, 4), Bench(forecaster, 4)
    out, whole = padded.advance(np.where(live[..., None], values, 1e6), live), plain.advance(values)
    for sensor, length in enumerate(lengths):
        same(
            type(out)(out.mean[sensor, None, :length], out.quantiles[sensor, None, :length]),
            type(out)(whole.mean[sensor, None, :length], whole.quantiles[sensor, None, :length]),
            size_of(values),
        )
        alone = Bench(forecaster, 1)
        if length:
            alone.advance(values[[sensor], :length])
        for name, column in alone.rows.items():
            assert padded.rows[name][sensor] == pytest.approx(column[0], rel=1e-4, abs=1e-5, nan_ok=True), name


def test_a_constant_sensor_is_forecast_as_constant(forecaster):
    shape = (1, 30, len(forecaster.spec.channels))
    for constant in (0.0, 21.5, -1e6):
        out = Bench(forecaster, 1).advance(np.full(shape, constant))
        assert out.mean[0, 1:] == pytest.approx(constant, rel=1e-6, abs=1e-9)
        assert out.quantiles[0, 1:] == pytest.approx(constant, rel=1e-6, abs=1e-9)


def test_a_step_without_any_value_is_answered_from_what_is_remembered(forecaster):
    values = values_for(forecaster, missing=0)
    values[:, 12:] = np.nan
    out = Bench(forecaster, 4).advance(values)
    assert np.isfinite(out.mean).all()
    assert np.isfinite(out.quantiles).all()


def test_a_spike_and_absurd_values_leave_everything_finite(forecaster):
    values = values_for(forecaster, steps=60, missing=0)
    values[0, 30], values[1, 30], values[2, 30], values[3, 30] = 1e9, np.inf, 1e300, -1e300
    out = Bench(forecaster, 4).advance(values)
    assert np.isfinite(out.mean).all()
    assert np.isfinite(out.quantiles).all()
    reach = np.abs(out.mean[0, -1]).max()
    assert reach < 1e9


def test_restored_rows_go_on_as_if_nothing_had_happened(forecaster):
    values = values_for(forecaster)
    bench = Bench(forecaster, 4)
    bench.advance(values[:, :12])
    order = [2, 0, 3, 1]
    restored = bench.take(order)
    same(
        restored.advance(values[order, 12:]),
        (lambda out: type(out)(out.mean[order], out.quantiles[order]))(bench.advance(values[:, 12:])),
        size_of(values),
    )


def test_after_a_reset_nothing_of_the_old_values_is_left(forecaster):
    """Only the running statistics survive: two pasts with the same statistics give the same future."""
    values = values_for(forecaster, 1, missing=0)
    bench, other = Bench(forecaster, 1), Bench(forecaster, 1)
    bench.advance(values)
    survivors = {column.name for column in bench.columns if column.survives_reset}
    refill(bench.rows, bench.columns, np.array([True]))
    other.rows = {
        name: bench.rows[name].copy() if name in survivors else column
        for name, column in empty_rows(other.columns, 1).items()
    }
    other.steps = bench.steps
    new = values_for(forecaster, 1, seed=1, missing=0)
    same(bench.advance(new), other.advance(new), size_of(new))
