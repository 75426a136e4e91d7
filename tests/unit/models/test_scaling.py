import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from models import scaling
from models.scaling import FORGETTING, RunningScale, RunningVariance
from models.sequences import empty_rows


def run(values, *, forgetting=FORGETTING, cuts=()):
    """values: (T,) of one channel of one sensor -> mean and scale (T,)."""
    scale = RunningScale(1, forgetting=forgetting)
    rows = empty_rows(scale.columns(), 1)
    values = np.asarray(values, float)[None, :, None]
    parts = [scale.advance(rows, part, np.isfinite(part)) for part in np.split(values, list(cuts), axis=1)]
    return tuple(np.concatenate([part[i] for part in parts], axis=1)[0, :, 0] for i in (0, 1))


def test_the_first_values_count_alike():
    values = np.random.default_rng(0).normal(50, 3, 200)
    mean, scale = run(values)
    assert mean == pytest.approx([values[: n + 1].mean() for n in range(200)])
    assert scale[1:] == pytest.approx([values[: n + 1].std() for n in range(1, 200)])


def test_old_values_fade():
    values = np.concatenate([np.random.default_rng(0).normal(0, 1, 500), np.random.default_rng(1).normal(6, 3, 500)])
    mean, scale = run(values, forgetting=1 / 50)
    assert mean[-1] == pytest.approx(6, abs=1.5)
    assert scale[-1] == pytest.approx(3, abs=1)


def test_missing_values_change_nothing():
    values = np.random.default_rng(0).normal(0, 1, 50)
    with_gaps = np.insert(values, [10, 10, 30], np.nan)
    assert run(with_gaps)[1][-1] == run(values)[1][-1]
    assert run([np.nan, np.nan])[0].tolist() == [0, 0]


def test_a_small_movement_on_a_huge_offset_keeps_its_scale():
    noise = np.random.default_rng(0).normal(0, 0.25, 400)
    _, scale = run(1e9 + noise)
    assert scale[-1] == pytest.approx(0.25, rel=0.1)


def test_a_constant_sensor_has_a_tiny_positive_scale():
    for constant in (0.0, 0.1, -1e12):
        _, scale = run([constant] * 100)
        assert (scale > 0).all()
        assert scale[-1] <= 1e-11 * max(1, abs(constant))


def test_a_sensor_that_was_constant_learns_its_scale_at_once():
    _, scale = run([0.0] * 100 + [50.0, 0.0, 50.0, 0.0] * 10)
    assert scale[-1] > 10


def test_one_spike_leaves_the_scale_nearly_as_it_was():
    values = np.random.default_rng(0).normal(0, 1, 1000)
    values[900] = 1e9
    assert run(values)[1][-1] < 1.5


def test_a_change_of_unit_is_followed():
    random = np.random.default_rng(0)
    mean, scale = run(np.concatenate([random.normal(20, 1, 2000), random.normal(20_000, 1000, 2000)]))
    assert mean[-1] == pytest.approx(20_000, rel=0.3)
    assert 500 < scale[-1] < 10_000


def test_cutting_the_steps_changes_nothing():
    values = np.random.default_rng(0).normal(0, 1, 60)
    whole, cut = run(values), run(values, cuts=(1, 2, 17, 40))
    assert np.array_equal(whole, cut)


def test_the_scale_survives_a_reset():
    assert all(column.survives_reset for column in (*RunningScale(2).columns(), *RunningVariance("x.", 2).columns()))


def test_the_variance_of_errors_is_their_mean_square():
    errors = np.random.default_rng(0).normal(1, 2, 300)
    errors[::7] = np.nan
    variance = RunningVariance("x.", 1)
    rows = empty_rows(variance.columns(), 1)
    deviation, known = variance.advance(rows, errors[None, :, None])
    assert deviation[0, -1, 0] == pytest.approx(np.sqrt(np.nanmean(errors**2)))
    assert known[0, :, 0].tolist() == [False] + [True] * 299


series = arrays.arrays(
    np.float64,
    st.tuples(st.integers(1, 3), st.integers(2, 30), st.integers(1, 2)),
    elements=st.one_of(st.just(np.nan), st.sampled_from([0.0, 1.0, 1e9, -1e30]), st.floats(-1e3, 1e3)),
)


@pytest.mark.parametrize("kind", [RunningScale, RunningVariance])
def test_a_few_series_in_plain_floats_are_bit_equal_to_many_in_columns(kind):
    @settings(max_examples=200, deadline=None)
    @given(series, st.sampled_from([FORGETTING, 0.2]))
    def check(values, forgetting):
        outcomes = []
        for few in (0, 100):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(scaling, "FEW_SERIES", few)
                state = RunningScale(values.shape[2], forgetting=forgetting)
                if kind is RunningVariance:
                    state = RunningVariance("v.", values.shape[2], forgetting=forgetting)
                rows = empty_rows(state.columns(), len(values))
                seen = (np.isfinite(values),) if kind is RunningScale else ()
                outcomes.append([*state.advance(rows, values, *seen), *rows.values()])
        for plain, columnar in zip(*outcomes, strict=True):
            np.testing.assert_array_equal(plain, columnar)

    check()
