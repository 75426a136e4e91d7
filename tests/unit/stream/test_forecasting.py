"""A task with a recurrent network in it: who answers, and that cutting the log changes nothing."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from models.rnn import RecurrentNet, RNNForecaster
from pipeline.stream.columns import BASELINE, OK, PROVISIONAL, STALE, WARMING
from pipeline.stream.task import ForecastTask, TaskSettings
from tests.helpers.streams import HOUR, START, cut, fleet, reading, records, task_settings

pytestmark = pytest.mark.keras


def make_model(settings: TaskSettings, warmup_steps: int) -> RNNForecaster:
    keras.utils.set_random_seed(3)
    net = RecurrentNet(settings.spec, "gru", 8, dense=8)
    random = np.random.default_rng(0)
    net.model.set_weights([w + 0.2 * random.standard_normal(w.shape) for w in net.model.get_weights()])
    return RNNForecaster(net, version="test", warmup_steps=warmup_steps)


def test_what_a_broken_model_cannot_say_the_baseline_says_and_the_status_tells() -> None:
    settings, log = task_settings(), records(fleet(sensors=2, hours=8))
    model = make_model(settings, warmup_steps=2)
    model.net.model.set_weights([w * np.nan for w in model.net.model.get_weights()])
    broken, baseline = ForecastTask(settings, model).run(log).forecasts, ForecastTask(settings).run(log).forecasts
    assert broken.status.tolist() == [WARMING] * 2 + [BASELINE] * 12
    np.testing.assert_array_equal(broken.mean, baseline.mean)
    np.testing.assert_array_equal(broken.quantiles, baseline.quantiles)


def test_provisional_answers_of_model_and_baseline_come_apart_each_under_its_name() -> None:
    settings = task_settings()
    log = [reading("old", START + hour * HOUR, value=float(hour)) for hour in range(6)]
    log.append(reading("young", START + 5 * HOUR + 1, value=1.0))
    task = ForecastTask(settings, make_model(settings, warmup_steps=3))
    task.run(records(log))
    by_model, by_baseline = task.provisional("t", 0, HOUR, len(log) - 1)
    assert (by_model.model, by_model.sensors) == ("test", ["old"])
    assert (by_baseline.model, by_baseline.sensors) == ("SeasonalNaive", ["young"])
    assert {*by_model.status.tolist(), *by_baseline.status.tolist()} == {PROVISIONAL}


def test_a_target_never_observed_leaves_the_others_to_the_model() -> None:
    settings = task_settings(fields=("a", "b"))
    model = make_model(settings, warmup_steps=0)
    found = ForecastTask(settings, model).run(
        records([reading("pump", START + hour * HOUR, a=float(hour), b=None) for hour in range(5)])
    )
    assert found.forecasts.status.tolist() == [OK] * 4
    assert np.isfinite(found.forecasts.mean[:, :, 0]).all()
    assert np.isnan(found.forecasts.mean[:, :, 1]).all()


def test_with_a_model_too_one_record_at_a_time_gives_what_the_whole_log_gives() -> None:
    settings = task_settings(max_gap_steps=2)
    model = make_model(settings, warmup_steps=2)
    log = fleet(sensors=3, hours=12)
    # A sensor that comes late, falls silent and is reset in the middle of the log.
    for place, hour in ((20, 3), (24, 4), (60, 9), (66, 10)):
        log.insert(place, reading("late", START + hour * HOUR, value=float(hour)))
    whole, single = ForecastTask(settings, model), ForecastTask(settings, model)
    expected = whole.run(records(log)).forecasts
    parts = [single.run(records(part, first)).forecasts for first, part in cut(log, range(1, len(log)))]
    assert set(expected.status.tolist()) == {WARMING, OK, STALE}
    for name in ("issued_at_ms", "offset", "status", "state_steps"):
        joined = np.concatenate([getattr(part, name) for part in parts])
        np.testing.assert_array_equal(joined, getattr(expected, name))
    np.testing.assert_allclose(np.concatenate([part.mean for part in parts]), expected.mean, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(single.table["rnn.hidden"], whole.table["rnn.hidden"], atol=1e-5)
