"""The demo's account: what it says must come out is what the core brings out, and its figures are what they claim to be."""

import numpy as np
import pytest

from pipeline.service.assembly import task_settings
from pipeline.service.ledger import Account
from pipeline.service.simulator import DAY_MS, HOUR_MS, Fleet, Habits
from pipeline.service.tally import Served, Tally, compare
from pipeline.settings import parse
from tests.helpers.demo_stream import answers_of, ledger_of, records_of

START = 1_769_700_000_000 // DAY_MS * DAY_MS
SETTINGS = task_settings(
    parse(
        '[readings]\nfields = ["temperature", "pressure"]\ntargets = ["temperature"]\n'
        '[windows]\ngrace = "10m"\nmax_gap = 3\n[forecast]\nhorizon = 6\n'
    )
)


@pytest.mark.parametrize("seed", range(4))
def test_the_account_agrees_with_the_core_over_partitions_gaps_resets_and_late_readings(seed):
    fleet = Fleet(9, seed, interval_ms=HOUR_MS // 2, habits=Habits(dropouts=0.6, late=0.02, delayed=0.05, broken=0.01))
    batch = fleet.generate(START, START + 6 * DAY_MS)
    partition = batch.sensor % 2
    account = ledger_of(SETTINGS, fleet, batch, partition).settle()
    tally = Tally(SETTINGS.spec, "temperature", fleet.names)
    steps = resets = readings = 0
    for p in (0, 1):
        output, forecasts, letters = answers_of(SETTINGS, records_of(batch, np.flatnonzero(partition == p), p))
        tally.take_forecasts(forecasts)
        tally.take_dead_letters(letters)
        steps, resets = steps + output.counts.steps, resets + output.counts.resets
        readings += output.counts.readings
    assert account.forecasts == steps == tally.forecasts
    assert account.resets.sum() == resets > 0
    assert account.readings == readings
    assert account.dead_letters == tally.reasons()
    assert account.dead_letters["late"] > 0
    assert tally.broken_counts(account) == 0


def test_forecasts_that_come_twice_count_once_and_strangers_are_told():
    fleet = Fleet(3, habits=Habits(broken=0.05))
    batch = fleet.generate(START, START + DAY_MS)
    _, forecasts, letters = answers_of(SETTINGS, records_of(batch, np.arange(len(batch))))
    tally = Tally(SETTINGS.spec, "temperature", fleet.names[:2])
    for _ in range(2):
        tally.take_forecasts(forecasts)
        tally.take_dead_letters(letters)
    keys = forecasts.keys()
    own = sum(key != fleet.names[2].encode() for key in keys)
    assert tally.forecasts == own
    assert tally.forecasts_read == 2 * len(forecasts)
    assert tally.strangers == 2 * (len(forecasts) - own)
    assert len(tally.dead_letters) == len(letters)
    assert tally.dead_letters_read == 2 * len(letters)


def test_a_state_that_began_anew_is_noticed():
    fleet = Fleet(2, habits=Habits(dropouts=0.0))
    batch = fleet.generate(START, START + DAY_MS)
    account = ledger_of(SETTINGS, fleet, batch, np.zeros(len(batch))).settle()
    half = int(np.searchsorted(batch.timestamps_ms, START + DAY_MS // 2))
    tally = Tally(SETTINGS.spec, "temperature", fleet.names)
    for rows in (np.arange(half), np.arange(half, len(batch))):  # the second task knows nothing of the first
        tally.take_forecasts(answers_of(SETTINGS, records_of(batch, rows))[1])
    assert tally.broken_counts(account) >= len(fleet)


def account_of(truth: np.ndarray) -> Account:
    known = np.ones(truth.shape, bool)
    return Account(0, 0, {}, 0, HOUR_MS, HOUR_MS, truth, known, np.zeros(truth.shape, bool))


def test_a_perfect_forecaster_scores_zero():
    horizon, levels = SETTINGS.spec.horizon, len(SETTINGS.spec.quantiles)
    truth = np.random.default_rng(0).normal(size=(2, 60)).cumsum(axis=1)
    sensor, window = (grid.ravel() for grid in np.meshgrid([0, 1], np.arange(30, 50), indexing="ij"))
    future = truth[sensor[:, None], window[:, None] + np.arange(1, horizon + 1)]
    served = Served(
        sensor, (window + 1) * HOUR_MS, sensor * 0, window, future, np.repeat(future[:, :, None], levels, axis=2)
    )
    perfect, last, seasonal = compare(served, account_of(truth), SETTINGS.spec, "perfect")
    assert (perfect.mae, perfect.pinball, perfect.coverage) == (0.0, 0.0, 1.0)
    assert perfect.labels == last.labels == seasonal.labels == 40 * horizon
    now = truth[sensor, window][:, None]
    yesterday = truth[sensor[:, None], window[:, None] + np.arange(1, horizon + 1) - 24]
    assert last.mae == pytest.approx(np.abs(future - now).mean(), rel=1e-5)
    assert last.mae_by_lead == pytest.approx(np.abs(future - now).mean(axis=0), rel=1e-5)
    assert seasonal.mae == pytest.approx(np.abs(future - yesterday).mean(), rel=1e-5)
