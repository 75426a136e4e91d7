"""Stages that learn while they run are a function of the log too: of nothing else, however it was cut, stopped or shared."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from models.artifact import load, save
from models.cascade import EPOCH, NEVER, PENDING, Cascade
from models.features import MEMORY_RING
from models.mixture import Calibration, Mixture
from models.regression import LABELS, PooledRidge
from models.sequences import Sequences
from models.training import train
from pipeline.stream.checkpoint import CheckpointWriter, assemble, read_manifest
from pipeline.stream.columns import BASELINE, OK
from pipeline.stream.task import ForecastTask
from tests.helpers.lean import DAY, Said, daily_fleet, gathered, lean_settings, readings
from tests.helpers.streams import HOUR

SENSORS = 4
NAMES = [f"pump-{s}" for s in range(SENSORS)]
SPLIT = 5 * DAY
CASES = [
    (12, "lean", (DAY,), "a window a poll"),
    (1, "lean", (DAY,), "ragged"),
    (5, "accuracy", (8, 24), "a window a poll"),
    (5, "accuracy", (8, 24), "ragged"),
    (24, "lean", (), "ragged"),
]


def eventful(steps: int = 7 * DAY, sensors: int = SENSORS) -> np.ndarray:
    """Holes, a silence with a reset, a late beginning, a spike."""
    values = daily_fleet(steps, sensors, seed=3)
    values[np.random.default_rng(1).random(values.shape) < 0.05] = np.nan
    values[100:115, 1] = np.nan
    values[:60, 2] = np.nan
    values[150, 0] = 1e5
    values[np.arange(steps) % 7 == 0, 0] = 1.0  # somebody moves stream time
    return values


def run(task: ForecastTask, values: np.ndarray, edges=()) -> Said:
    """edges: rows of the readings at which a poll ends."""
    whole = readings(values)
    marks = [0, *sorted({int(edge) for edge in edges}), len(whole)]
    outputs = [task.take("t", 0, whole.take(slice(*pair))) for pair in itertools.pairwise(marks)]
    return gathered(outputs, len(values), NAMES)


def same(found: Said, expected: Said, tolerance: float = 1e-5) -> None:
    np.testing.assert_array_equal(found.status, expected.status)
    for ours, theirs in ((found.mean, expected.mean), (found.quantiles, expected.quantiles)):
        size = np.nanmax(np.abs(theirs), axis=(0, *range(2, theirs.ndim)), keepdims=True)
        np.testing.assert_allclose(ours / size, theirs / size, rtol=tolerance, atol=tolerance)


def equal_tables(found: ForecastTask, expected: ForecastTask, *, exactly: bool = False) -> None:
    assert found.table.sensors == expected.table.sensors
    tables = [
        {name: one.table[name] for name in one.table.columns} | dict(one.table.partition) for one in (found, expected)
    ]
    for name, theirs in tables[1].items():
        ours = tables[0][name]
        if exactly or theirs.dtype.kind in "iub":
            np.testing.assert_array_equal(ours, theirs, err_msg=name)
            continue
        half = theirs.dtype == np.float16
        finite = theirs[np.isfinite(theirs)].astype(float)
        size = float(np.abs(finite).max()) if len(finite) else 1.0
        np.testing.assert_allclose(
            ours.astype(float), theirs.astype(float), rtol=2e-3 if half else 1e-4, atol=1e-5 * size, err_msg=name
        )


# -- however it was cut


@pytest.mark.parametrize(("horizon", "profile", "seasons", "cut"), CASES)
def test_however_the_log_was_cut_the_forecasts_and_what_was_learned_are_the_same(horizon, profile, seasons, cut):
    settings, values = lean_settings(horizon, seasons, profile=profile), eventful()
    whole, parts = ForecastTask(settings), ForecastTask(settings)
    expected = run(whole, values)
    per_step = np.cumsum((~np.isnan(values)).sum(axis=1))
    ragged = np.random.default_rng(4).integers(1, per_step[-1], 60)
    found = run(parts, values, per_step[:-1] if cut == "a window a poll" else ragged)
    same(found, expected)
    equal_tables(parts, whole)
    assert int(parts.table.partition[EPOCH]) == int(whole.table.partition[EPOCH])
    assert (expected.status == OK).any()


def test_a_poll_of_many_days_learns_at_every_border_between():
    settings, values = lean_settings(12), eventful()
    whole = ForecastTask(settings)
    run(whole, values)
    assert (whole.table[PENDING] <= whole.forecasting.cascade.epoch_steps).all()
    assert whole.table.partition[LABELS][0] > 100


def test_a_poll_without_records_changes_nothing():
    settings, values = lean_settings(12), eventful()
    task, other = ForecastTask(settings), ForecastTask(settings)
    run(task, values)
    run(other, values)
    for _ in range(3):
        task.take("t", 0, readings(values[:0]))
    equal_tables(task, other, exactly=True)


def test_who_asks_for_a_provisional_answer_leaves_no_trace():
    settings, values = lean_settings(12), eventful()
    task, other = ForecastTask(settings), ForecastTask(settings)
    for one in (task, other):
        run(one, values)
    found = task.provisional("t", 0, 30 * 3_600_000, 10_000)
    assert sum(map(len, found)) == SENSORS
    equal_tables(task, other, exactly=True)


# -- however often it was stopped


@pytest.mark.parametrize(
    ("horizon", "after_a_border", "how"),
    [(12, 0, "checkpoint"), (12, 1, "snapshot"), (12, 5, "checkpoint"), (1, 0, "snapshot"), (1, 1, "checkpoint")],
)
def test_what_is_restored_goes_on_as_if_nothing_had_happened(horizon, after_a_border, how):
    settings, values = lean_settings(horizon), eventful()
    stop = SPLIT + after_a_border
    reference, first, second = (ForecastTask(settings) for _ in range(3))
    edge = int((~np.isnan(values[:stop])).sum())
    whole = readings(values)
    early, late = whole.take(slice(0, edge)), whole.take(slice(edge, len(whole)))
    for task in (reference, first):
        task.take("t", 0, early)
    if how == "snapshot":
        second.table.restore(first.table.snapshot())
    else:
        writer = CheckpointWriter(first.table, "g", first.version, 256)
        blocks = dict(writer.capture(400).records)
        second.table.restore(assemble(read_manifest(blocks.pop(b"manifest")), blocks).snapshot)
    equal_tables(second, first, exactly=True)
    expected, found = (gathered([task.take("t", 0, late)], len(values), NAMES) for task in (reference, second))
    np.testing.assert_array_equal(found.mean, expected.mean)
    np.testing.assert_array_equal(found.quantiles, expected.quantiles)
    np.testing.assert_array_equal(found.status, expected.status)
    equal_tables(second, reference, exactly=True)


def test_checkpoints_of_what_changed_add_up_to_the_whole():
    """A lesson changes rows of sensors that made no step: they belong into the next checkpoint as well."""
    settings, values = lean_settings(12), eventful()
    values[100:, 3] = np.nan  # falls silent, with a lesson still to come
    task, restored = ForecastTask(settings), ForecastTask(settings)
    writer, blocks = CheckpointWriter(task.table, "g", task.version, 256), {}
    whole = readings(values)
    for number, first in enumerate(range(0, len(whole), 37)):
        task.take("t", 0, whole.take(slice(first, min(first + 37, len(whole)))))
        capture = writer.capture(number)
        blocks.update(dict(capture.records))
    manifest = read_manifest(blocks.pop(b"manifest"))
    restored.table.restore(assemble(manifest, blocks).snapshot)
    equal_tables(restored, task, exactly=True)


# -- whoever else is there


def test_but_for_what_is_shared_a_sensor_is_what_it_would_be_alone(monkeypatch):
    """What is shared is kept as it began; then the neighbours cannot be told from a sensor's own columns."""
    for kind in (PooledRidge, Mixture, Calibration):
        monkeypatch.setattr(kind, "settle", lambda self, *states: None)
    settings, values = lean_settings(12), daily_fleet(8 * DAY, SENSORS, seed=3)
    values[:-1][np.random.default_rng(1).random(values[:-1].shape) < 0.05] = np.nan
    together = ForecastTask(settings)
    run(together, values)
    assert np.abs(together.table["own.weights"]).max() > 0
    for sensor in range(SENSORS):
        alone = ForecastTask(settings)
        alone.take("t", 0, readings(values[:, [sensor]], [NAMES[sensor]]))
        for column in alone.forecasting.cascade.online_columns():
            ours, theirs = alone.table[column.name][0], together.table[column.name][sensor]
            half = column.dtype == np.float16
            np.testing.assert_allclose(
                ours.astype(float), theirs.astype(float), rtol=2e-3 if half else 1e-4, atol=1e-4, err_msg=column.name
            )


def test_the_order_in_which_sensors_first_came_does_not_matter():
    settings, values = lean_settings(12), daily_fleet(10 * DAY, SENSORS, seed=3)
    order = [2, 0, 3, 1]
    one, other = ForecastTask(settings), ForecastTask(settings)
    expected = run(one, values)
    found = gathered([other.take("t", 0, readings(values[:, order], [NAMES[s] for s in order]))], len(values), NAMES)
    same(found, expected, tolerance=1e-3)  # sums over the fleet are added up in another order


# -- another model


def recurrent(settings, *, seed: int = 0, units: int = 6, version: str = "gru-a"):
    import keras

    from models.rnn import RecurrentNet, RNNForecaster

    keras.utils.set_random_seed(seed)
    net = RecurrentNet(settings.spec, "gru", units, dense=6)
    random = np.random.default_rng(seed)
    net.model.set_weights([w + 0.05 * random.standard_normal(w.shape) for w in net.model.get_weights()])
    return Cascade(settings.spec, RNNForecaster(net, version=version, warmup_steps=6))


SETTINGS = lean_settings(5, (8,))


@pytest.mark.keras
def test_a_network_that_takes_over_leaves_all_that_was_learned_bit_for_bit():
    values = eventful()
    task = ForecastTask(SETTINGS)
    run(task, values[:SPLIT])
    assert task.version == ""
    before = task.table.snapshot()
    task.swap(recurrent(SETTINGS))
    assert task.version == "gru-a"
    for name, value in before.partition.items():
        np.testing.assert_array_equal(task.table.partition[name], value, err_msg=name)
    online = [column.name for column in task.forecasting.cascade.online_columns()]
    for name in (*online, *task.lasting_columns(), MEMORY_RING):
        np.testing.assert_array_equal(task.table[name], before.rows[name], err_msg=name)
    fresh = set(task.table.columns) - set(before.rows)
    assert fresh == {column.name for column in task.forecasting.cascade.network_columns()}
    assert np.abs(task.table["rnn.hidden"]).max() > 0
    found = task.take("t", 0, readings(values[SPLIT:], first=SENSORS * SPLIT, start=SPLIT))
    assert (found.forecasts.status != BASELINE).all()
    assert np.isfinite(found.forecasts.mean).all()


@pytest.mark.keras
def test_the_network_leaves_again_and_the_stages_go_on():
    values = eventful()
    task = ForecastTask(SETTINGS, recurrent(SETTINGS))
    run(task, values[:SPLIT])
    before = task.table.snapshot()
    task.swap(None)
    online = [column.name for column in task.forecasting.cascade.online_columns()]
    for name in online:
        np.testing.assert_array_equal(task.table[name], before.rows[name], err_msg=name)
    assert "rnn.hidden" not in task.table.columns
    found = task.take("t", 0, readings(values[SPLIT:], first=SENSORS * SPLIT, start=SPLIT))
    assert (found.forecasts.status == OK).any()


@pytest.mark.keras
def test_the_network_begins_with_what_it_would_have_made_of_the_steps_remembered():
    values = daily_fleet(SPLIT + 2 * DAY, SENSORS, seed=3)
    model = recurrent(SETTINGS)
    reference, swapped = ForecastTask(SETTINGS, model), ForecastTask(SETTINGS)
    for task in (reference, swapped):
        run(task, values)
    swapped.swap(model)
    difference = np.abs(swapped.table["rnn.hidden"] - reference.table["rnn.hidden"]).max()
    assert difference < 0.15 * np.abs(reference.table["rnn.hidden"]).max()


@pytest.mark.keras
def test_however_the_log_was_cut_a_cascade_with_a_network_says_the_same():
    values = eventful()
    model = recurrent(SETTINGS)
    whole, parts = ForecastTask(SETTINGS, model), ForecastTask(SETTINGS, model)
    expected = run(whole, values)
    per_step = np.cumsum((~np.isnan(values)).sum(axis=1))
    found = run(parts, values, np.random.default_rng(4).integers(1, per_step[-1], 25))
    same(found, expected)


@pytest.mark.parametrize("horizon", [3, 9])
def test_a_model_of_another_horizon_begins_the_stages_anew_and_keeps_what_is_remembered(horizon):
    values = eventful()
    task = ForecastTask(SETTINGS)
    run(task, values[:SPLIT])
    ring = task.table[MEMORY_RING].copy()
    lasting = {name: task.table[name].copy() for name in task.lasting_columns()}
    other = replace(SETTINGS, spec=replace(SETTINGS.spec, horizon=horizon))
    model = Cascade(other.spec)
    task.swap(model)
    cascade = task.forecasting.cascade
    assert task.spec.horizon == horizon
    for column in cascade.online_columns():
        expected = np.full((SENSORS, *column.shape), column.fill, column.dtype)
        np.testing.assert_array_equal(task.table[column.name], expected, err_msg=column.name)
    for column in cascade.partition_columns():
        np.testing.assert_array_equal(task.table.partition[column.name], np.full(column.shape, column.fill))
    for name, value in lasting.items():
        np.testing.assert_array_equal(task.table[name], value, err_msg=name)
    newest = min(ring.shape[1], task.table[MEMORY_RING].shape[1])
    np.testing.assert_array_equal(task.table[MEMORY_RING][:, -newest:], ring[:, -newest:])
    found = task.take("t", 0, readings(values[SPLIT:], first=SENSORS * SPLIT, start=SPLIT))
    assert found.forecasts.mean.shape[1] == horizon
    assert np.isfinite(found.forecasts.mean).all()
    assert set(task.table.partition) == set(ForecastTask(other, model).table.partition)


@pytest.mark.keras
def test_a_model_brings_its_horizon_and_the_seasons_that_training_found_and_takes_up_the_memory():
    """`forecast.estimate_season`: until there is a model, those of the settings hold."""
    spec = replace(SETTINGS.spec, seasons=(12,), seasons_open=True)
    task, values = ForecastTask(replace(SETTINGS, spec=spec)), daily_fleet(7 * DAY, SENSORS, seed=3)
    run(task, values[:SPLIT])
    newest = task.table[MEMORY_RING][:, -20:].copy()
    brought = recurrent(lean_settings(9, (8, DAY)), version="gru-b")
    task.swap(brought)
    assert (task.spec.horizon, task.spec.seasons) == (9, (8, DAY))
    assert task.forecasting.baseline.spec.seasons == (8, DAY)
    np.testing.assert_array_equal(task.table[MEMORY_RING][:, -20:], newest)
    assert set(task.table.columns) == set(ForecastTask(replace(SETTINGS, spec=spec), brought).table.columns)
    found = task.take("t", 0, readings(values[SPLIT:], first=SENSORS * SPLIT, start=SPLIT)).forecasts
    assert found.model == "gru-b"
    assert np.isfinite(found.mean).all()
    assert (found.status == OK).all()
    closed = replace(SETTINGS, spec=replace(spec, seasons_open=False))
    with pytest.raises(ValueError, match=r"made for seasons = \(8, 24\), the stream delivers \(12,\)"):
        ForecastTask(closed).swap(brought)


# -- what training knew


def learned_partition() -> dict[str, np.ndarray]:
    task = ForecastTask(SETTINGS)
    run(task, eventful())
    return {name: task.table.partition[name].copy() for name in prior_names(task)}


def prior_names(task: ForecastTask) -> list[str]:
    return [column.name for column in task.forecasting.cascade.partition_columns() if column.name != EPOCH]


def test_a_partition_that_has_learned_nothing_begins_with_the_prior_and_answers_at_once():
    prior = learned_partition()
    known = ForecastTask(SETTINGS, Cascade(SETTINGS.spec, prior=prior))
    for name, value in prior.items():
        np.testing.assert_array_equal(known.table.partition[name], value, err_msg=name)
        assert not np.shares_memory(known.table.partition[name], value)
    assert int(known.table.partition[EPOCH]) == NEVER
    values = daily_fleet(3 * DAY, SENSORS, seed=11)
    assert (run(known, values).status[:-1] == OK).all()
    swapped = ForecastTask(SETTINGS)
    swapped.swap(Cascade(SETTINGS.spec, prior=prior))
    np.testing.assert_array_equal(swapped.table.partition["pooled.weights"], prior["pooled.weights"])


def test_a_partition_that_has_learned_keeps_what_it_has_learned():
    task = ForecastTask(SETTINGS)
    run(task, daily_fleet(4 * DAY, SENSORS, seed=11))
    assert task.table.partition[LABELS].any()
    before = task.table.snapshot().partition
    task.swap(Cascade(SETTINGS.spec, prior=learned_partition()))
    for name, value in before.items():
        np.testing.assert_array_equal(task.table.partition[name], value, err_msg=name)


@pytest.mark.keras
def test_the_prior_travels_with_the_model(tmp_path):
    values = daily_fleet(SPLIT, SENSORS, seed=3)
    end_ms = np.repeat((np.arange(len(values)) + 1) * HOUR, SENSORS)
    sensor = np.tile(np.arange(SENSORS, dtype=np.int32), len(values))
    spec = replace(SETTINGS.spec, channels=("value.mean",))
    history = Sequences(sensor, end_ms, values.reshape(-1, 1), np.zeros(len(sensor), np.bool_))
    trained = train(history, spec, units=6, epochs=0)
    save(tmp_path, trained)
    loaded = load(tmp_path, expect=spec)
    assert isinstance(loaded, Cascade)
    assert loaded.prior is not None
    expected = trained.in_service.prior
    assert set(loaded.prior) == {c.name for c in loaded.partition_columns()} - {EPOCH} == set(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(loaded.prior[name], value, err_msg=name)
    assert loaded.prior[LABELS].any()
    shared = {c.name: np.full(c.shape, c.fill, c.dtype) for c in loaded.partition_columns()}
    loaded.begin(shared)
    np.testing.assert_array_equal(shared["pooled.weights"], expected["pooled.weights"])
