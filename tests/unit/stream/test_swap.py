"""Another model takes over: what is remembered, what each sensor begins with, and what is left behind."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import keras
import numpy as np
import pytest

from models.features import SeriesMemory, look_back
from models.forecaster import SeriesSpec
from models.rnn import RecurrentNet, RNNForecaster
from models.sequences import empty_rows
from pipeline.stream.checkpoint import CheckpointWriter, assemble, read_manifest
from pipeline.stream.scoring import LABELS, MODEL
from pipeline.stream.task import ForecastTask
from tests.helpers.series import SPEC, block, noisy
from tests.helpers.streams import fleet, records, task_settings

pytestmark = pytest.mark.keras
SETTINGS = replace(task_settings(horizon=3), rewarm_steps=16)
LOG = fleet(sensors=5, hours=40)


def make_model(cell="gru", units=8, layers=1, seed=0, spec=SETTINGS.spec, version="") -> RNNForecaster:
    keras.utils.set_random_seed(seed)
    net = RecurrentNet(spec, cell, units, layers, dense=8)
    random = np.random.default_rng(seed)
    net.model.set_weights([w + 0.2 * random.standard_normal(w.shape) for w in net.model.get_weights()])
    return RNNForecaster(net, version=version or f"{cell}{units}-{seed}", warmup_steps=2)


@pytest.mark.parametrize("batch", [1, 20])
def test_what_is_recalled_is_what_was_shown_in_the_first_place(batch):
    memory = SeriesMemory(SPEC, SPEC.seasons[0] + 16)
    rows = empty_rows(memory.columns(), batch)
    values = noisy(SPEC, batch, 40)
    values[:, -3:, 2] = np.nan
    shown = memory.advance(rows, block(values))
    before = {name: column.copy() for name, column in rows.items()}
    steps, again = memory.recall(rows, np.full(batch, 40 * SPEC.step_ms), 16)
    assert again.shape == (batch, 16)
    assert steps.live.all()
    np.testing.assert_array_equal(again.end_ms, shown.end_ms[:, -16:])
    np.testing.assert_array_equal(again.steps, shown.steps[:, -16:])
    np.testing.assert_array_equal(again.observed, shown.observed[:, -16:])
    np.testing.assert_allclose(again.values, shown.values[:, -16:], rtol=1e-6, atol=1e-3)
    np.testing.assert_allclose(again.last, shown.last[:, -16:], rtol=1e-6, atol=1e-3)
    np.testing.assert_allclose(again.season_values(), shown.season_values()[:, -16:], rtol=1e-6, atol=1e-3)
    np.testing.assert_array_equal(again.season_known, shown.season_known[:, -16:])
    np.testing.assert_allclose(again.calendar(), shown.calendar()[:, -16:], atol=1e-6)
    np.testing.assert_allclose(again.channel_scale[:, -1], shown.channel_scale[:, -1])
    for name, column in rows.items():
        np.testing.assert_array_equal(column, before[name])


def test_no_more_is_recalled_than_came_since_the_last_reset():
    memory = SeriesMemory(SPEC, SPEC.seasons[0] + 16)
    rows = empty_rows(memory.columns(), 3)
    live = np.arange(9) < np.array([9, 4, 0])[:, None]
    values = np.where(live[..., None], noisy(SPEC, 3, 9, missing=0), np.nan)
    shown = memory.advance(rows, block(values, live=live))
    steps, again = memory.recall(rows, np.array([9, 4, 0]) * SPEC.step_ms, 16)
    np.testing.assert_array_equal(steps.live, live)
    np.testing.assert_allclose(again.values, shown.values, rtol=1e-6, atol=1e-3)
    np.testing.assert_array_equal(again.steps[live], shown.steps[live])
    np.testing.assert_array_equal(again.end_ms[live], shown.end_ms[live])


@pytest.mark.parametrize("cell", ["gru", "lstm", "simple_rnn"])
def test_a_swap_late_in_the_log_soon_says_what_the_model_would_have_said_anyway(cell):
    model = make_model(cell)
    reference, swapped = ForecastTask(SETTINGS, model), ForecastTask(SETTINGS)
    cold = ForecastTask(replace(SETTINGS, rewarm_steps=0))
    early, late = records(LOG[:330]), records(LOG[330:], 330)
    for task in (reference, swapped, cold):
        task.run(early)
    swapped.swap(model)
    cold.swap(model)
    expected, found, without = (task.run(late).forecasts for task in (reference, swapped, cold))
    assert found.sensors == expected.sensors
    difference, unwarmed = (np.abs(one.mean - expected.mean)[:5].max() for one in (found, without))
    assert difference < 0.1 * unwarmed


def test_each_sensor_begins_with_its_own_past_and_no_other():
    model = make_model("lstm", layers=2)
    task = ForecastTask(SETTINGS)
    task.run(records(LOG[:330]))
    task.swap(model)
    for sensor in range(5):
        alone = ForecastTask(SETTINGS)
        own = [pair for pair in LOG[:330] if pair[0] == b"pump-%d" % sensor]
        # The others move stream time, which closes this sensor's windows.
        alone.run(records([pair if pair in own else (pair[0], b'{"ts": 0}') for pair in own]))
        if int(alone.table["memory.steps"][0]) != int(task.table["memory.steps"][sensor]):
            alone.run(records([LOG[329]], 10_000))
        alone.swap(model)
        np.testing.assert_allclose(
            task.table["rnn.hidden"][task.table.sensors.index(b"pump-%d" % sensor)],
            alone.table["rnn.hidden"][0],
            atol=1e-6,
        )


def test_a_model_of_another_shape_takes_over_with_its_own_horizon_and_quantiles():
    spec = replace(SETTINGS.spec, horizon=5, quantiles=(0.05, 0.5, 0.9, 0.95))
    task = ForecastTask(SETTINGS, make_model("gru", 8))
    task.run(records(LOG[:300]))
    task.swap(make_model("lstm", 6, layers=2, spec=spec, version="lstm6-b"))
    found = task.run(records(LOG[300:], 300)).forecasts
    assert (found.mean.shape[1:], found.quantiles.shape[1:]) == ((5, 1), (5, 1, 4))
    assert found.model == "lstm6-b"
    assert task.table["rnn.hidden"].shape == (5, 2, 12)
    writer = CheckpointWriter(task.table, "g", task.version, 256)
    blocks = dict(writer.capture(400).records)
    manifest = read_manifest(blocks.pop(b"manifest"))
    other = ForecastTask(SETTINGS, make_model("lstm", 6, layers=2, spec=spec))
    other.table.restore(assemble(manifest, blocks).snapshot)
    np.testing.assert_array_equal(other.table["rnn.hidden"], task.table["rnn.hidden"])


def test_what_the_old_model_had_said_of_steps_to_come_is_not_held_against_the_new_one():
    task = ForecastTask(SETTINGS, make_model(seed=1))
    task.run(records(LOG[:300]))
    task.swap(make_model(seed=2))
    after = task.run(records(LOG[300:], 300)).scores
    assert after.model == "gru8-2"
    labels = after.sums[:, MODEL, LABELS]
    leads = np.array(after.leads)
    for window in range(3):
        assert (labels[window] > 0).tolist() == (leads <= window).tolist()


def test_a_model_for_another_series_is_refused():
    other = replace(SETTINGS.spec, step_ms=60_000)
    with pytest.raises(ValueError, match="made for step_ms = 60000, the stream delivers 3600000"):
        ForecastTask(SETTINGS).swap(make_model(spec=other))


def test_fifty_swaps_compile_nothing_and_leave_no_model_behind():
    task = ForecastTask(SETTINGS, make_model())
    task.run(records(LOG[:300]))
    task.swap(make_model(seed=1))
    program = task.forecasting.model.net.program
    compiled = list(program.shapes)
    gone = []
    for seed in range(50):
        gone.append(weakref.ref(task.forecasting.model.net.model))
        task.swap(make_model(seed=seed + 2))
        assert task.forecasting.model.net.program is program
    assert program.shapes == compiled
    gc.collect()
    assert sum(reference() is not None for reference in gone) == 0


def test_without_a_season_too_the_last_steps_are_recalled_with_what_stood_before_them():
    spec = SeriesSpec(("value.mean",), (0,), 3_600_000, 2, (0.5,))
    memory = SeriesMemory(spec, look_back(spec) + 4)
    rows = empty_rows(memory.columns(), 1)
    shown = memory.advance(rows, block(np.arange(40.0)[None, :, None]))
    steps, again = memory.recall(rows, np.array([40 * spec.step_ms]), 99)
    assert again.values[0, :, 0].tolist() == [36.0, 37.0, 38.0, 39.0]
    np.testing.assert_allclose(again.local[:, -1], shown.local[:, -1])
    np.testing.assert_allclose(again.differences()[:, -1], shown.differences()[:, -1])
    assert steps.live.all()
