"""What was said against what came: by hand, however the log was cut, and never on a label that has not come."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest

from models.baselines import LastValue
from models.forecaster import Prediction
from pipeline.stream.scoring import (
    ABSOLUTE,
    BASELINE,
    COVERED,
    LABELS,
    MEASURES,
    PINBALL,
    SQUARED,
    decode_score,
    encode_scores,
)
from pipeline.stream.task import ForecastTask
from tests.helpers.streams import HOUR, START, cut, fleet, reading, records, task_settings

SETTINGS = replace(task_settings(horizon=5), scored_leads=(1, 2, 5))


def scores_of(log, first=0, task=None):
    return (task or ForecastTask(SETTINGS)).run(records(log, first)).scores


def gappy():
    """Silences within the limit of three windows, and one beyond it."""
    silent = {("pump-0", 5), ("pump-0", 6), ("pump-1", 8), *(("pump-2", hour) for hour in range(10, 16))}
    kept = []
    for sensor, value in fleet(sensors=3, hours=30):
        hour = (int(value.split(b":")[1].split(b",")[0]) - START) // HOUR
        if (sensor.decode(), hour) not in silent:
            kept.append((sensor, value))
    return kept


def test_every_sum_is_what_a_notebook_of_forecasts_and_values_gives():
    task = ForecastTask(SETTINGS)
    said, truth, reset_at, sigma = {}, {}, defaultdict(lambda: -1), {}
    expected = defaultdict(lambda: np.zeros((len(MEASURES), 3)))
    log = gappy()
    found = {}
    for offset, pair in enumerate(log):  # one record at a time, so that each answer can be looked at
        output = task.run(records([pair], offset))
        found |= dict(zip(output.scores.end_ms.tolist(), output.scores.sums[:, BASELINE]))
        for row in range(len(output.forecasts)):
            sensor, end = output.forecasts.sensors[row], int(output.forecasts.issued_at_ms[row])
            if output.forecasts.state_steps[row] == 1:
                reset_at[sensor] = end
            said[sensor, end] = (output.forecasts.mean[row], output.forecasts.quantiles[row])
            slot = task.table.sensors.index(sensor.encode())
            gap = output.scores.end_ms[-1] == end and np.isnan(task.table["memory.ring"][slot, -1, 0])
            truth[sensor, end] = np.nan if gap else task.table["memory.last"][slot, 0]
            sigma[sensor, end] = max(np.sqrt(task.table["memory.variance"][slot, 0]), 1e-30)
            for column, lead in enumerate((1, 2, 5)):
                before = end - lead * HOUR
                if (sensor, before) not in said or before < reset_at[sensor] or np.isnan(truth[sensor, end]):
                    continue
                mean, quantiles = (np.float64(part[lead - 1, 0]) for part in said[sensor, before])
                error = (truth[sensor, end] - mean) / sigma[sensor, end]
                below = (truth[sensor, end] - quantiles) / sigma[sensor, end]
                levels = np.array(SETTINGS.spec.quantiles)
                pinball = np.maximum(levels * below, (levels - 1) * below).mean()
                covered = quantiles[0] <= truth[sensor, end] <= quantiles[-1]
                expected[end][:, column] += [1, abs(error), error**2, pinball, covered]
    assert found.keys() >= expected.keys()
    assert sum(sums[LABELS].sum() for sums in expected.values()) > 150
    for end, sums in found.items():
        np.testing.assert_allclose(sums, expected[end], rtol=1e-6, atol=1e-9)


def test_however_the_log_is_cut_the_same_windows_show_the_same():
    log = gappy()
    whole = scores_of(log)
    task = ForecastTask(SETTINGS)
    parts = [scores_of(part, first, task) for first, part in cut(log, [3, 17, 18, 60, 61, 130])]
    np.testing.assert_array_equal(np.concatenate([part.end_ms for part in parts]), whole.end_ms)
    np.testing.assert_array_equal(np.concatenate([part.offset for part in parts]), whole.offset)
    np.testing.assert_array_equal(np.concatenate([part.steps for part in parts]), whole.steps)
    np.testing.assert_allclose(np.concatenate([part.sums for part in parts]), whole.sums, rtol=1e-6)


def test_a_perfect_forecaster_scores_zero_at_every_lead_and_is_always_covered():
    class Prophet(LastValue):
        """The value is the number of the hour."""

        def advance(self, rows, block, context):
            mean = (block.end_ms - START)[:, :, None] // HOUR - 1 + np.arange(1, self.spec.horizon + 1)
            mean = mean[..., None].astype(np.float32)
            return Prediction(mean, np.repeat(mean[..., None], len(self.spec.quantiles), axis=-1))

    task = ForecastTask(SETTINGS)
    task.forecasting.baseline = Prophet(SETTINGS.spec)
    hours = [reading(f"pump-{n}", START + hour * HOUR, value=float(hour)) for hour in range(20) for n in range(2)]
    total = scores_of(hours, task=task).sums.sum(axis=0)[BASELINE]
    assert total[LABELS].tolist() == [2 * 18, 2 * 17, 2 * 14]
    assert np.abs(total[[ABSOLUTE, SQUARED, PINBALL]]).max() == 0
    np.testing.assert_array_equal(total[COVERED], total[LABELS])


def test_what_was_read_again_in_silence_is_not_scored_again():
    log = gappy()
    whole = scores_of(log)
    later = ForecastTask(SETTINGS, emit_from=100).run(records(log)).scores
    assert 0 < len(later) < len(whole)
    np.testing.assert_array_equal(later.sums, whole.sums[-len(later) :])
    assert later.offset.min() >= 100


def test_a_record_says_all_that_the_columns_say():
    scores = replace(scores_of(gappy()), partition=3, model="gru8-a")
    batch = encode_scores(scores, "plant.scores.v1")
    assert (batch.topic, batch.partition, set(batch.keys), len(batch)) == ("plant.scores.v1", 3, {b"3"}, len(scores))
    last = decode_score(batch.values[-1])
    assert (last.partition, last.model, last.baseline, last.leads) == (3, "gru8-a", "SeasonalNaive", (1, 2, 5))
    assert (last.window_end, last.offset, last.steps) == (scores.end_ms[-1], scores.offset[-1], scores.steps[-1])
    np.testing.assert_allclose(last.sums, scores.sums[-1], rtol=1e-5)


@pytest.mark.parametrize(("horizon", "leads"), [(3, [1, 2]), (7, [1, 2, 5])])
def test_leads_beyond_the_horizon_are_left_out(horizon, leads):
    task = ForecastTask(replace(task_settings(horizon=horizon), scored_leads=(1, 2, 5)))
    assert task.forecasting.scorer.leads.tolist() == leads
