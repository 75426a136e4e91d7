"""How good a hidden state is that was rebuilt from the last steps, beside the one that the model would have had anyway.

    python -m benchmarks.rewarm [--cells gru,lstm] [--steps 0,8,16,32,64,128]

For each cell: a model is trained on the first part of a simulated fleet's history. It runs over all of it from the start of the log
(the reference). The same model then takes over late in the log (a swap), its states rebuilt from the last W steps. Figures are mean
absolute differences of the point forecasts over all leads, in each sensor's running standard deviation, at the first step after the
swap and later ones; W = 0 is a swap without re-warm. The last column is the mean absolute error of the forecasts themselves
there, to compare with.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.forecaster import SeriesSpec
from models.sequences import Sequences
from models.training import train
from pipeline.stream.columns import Steps
from pipeline.stream.forecasting import Forecasting
from pipeline.stream.state import SensorTable

SENSORS, SEASON, HORIZON = 200, 24, 24
TRAINED, SWAP, AFTER = 900, 1200, 64
STEP_MS = 3_600_000
SHOWN = (1, 8, 24, 64)
"""Steps after the swap."""


def fleet(seed: int = 0) -> NDArray[np.float64]:
    """(steps, sensors): a daily rhythm of each sensor's own amplitude and phase, a slow random walk, autocorrelated noise."""
    random = np.random.default_rng(seed)
    steps = SWAP + AFTER + HORIZON
    phase, amplitude = random.uniform(0, 2 * np.pi, SENSORS), random.uniform(1, 5, SENSORS)
    rhythm = amplitude * np.sin(2 * np.pi * np.arange(steps)[:, None] / SEASON + phase)
    noise = np.zeros((steps, SENSORS))
    for step in range(1, steps):
        noise[step] = 0.8 * noise[step - 1] + random.normal(0, 0.6, SENSORS)
    walk = np.cumsum(random.normal(0, 0.05, (steps, SENSORS)), axis=0)
    return 20 + rhythm + walk + noise


def steps_of(values: NDArray[np.float64], first: int, end: int) -> Steps:
    """Rows first .. end - 1 of (steps, sensors) as closed windows, ordered by (window, slot)."""
    count = (end - first) * SENSORS
    window = np.repeat(np.arange(first, end), SENSORS)
    return Steps(
        slot=np.tile(np.arange(SENSORS, dtype=np.int32), end - first),
        window=window,
        end_ms=(window + 1) * STEP_MS,
        values=values[first:end].reshape(-1, 1),
        count=np.ones(count, np.int32),
        reset=np.zeros(count, np.bool_),
        offset=window,
    )


def answers(values: NDArray[np.float64], spec: SeriesSpec, model: Any, rewarm: int | None) -> NDArray[np.float32]:
    """(AFTER, sensors, H) point forecasts at the steps after the swap; None: the model has served from the start."""
    forecasting = Forecasting(spec, model if rewarm is None else None, rewarm or 0)
    table = SensorTable(forecasting.columns())
    table.slots([b"%d" % sensor for sensor in range(SENSORS)])
    forecasting.advance(steps_of(values, 0, SWAP), table)
    if rewarm is not None:
        forecasting.swap(model, table, np.full(SENSORS, SWAP * STEP_MS, np.int64))
    found = forecasting.advance(steps_of(values, SWAP, SWAP + AFTER), table)
    return found.mean.reshape(AFTER, SENSORS, HORIZON)


def rows(cells: Sequence[str], lengths: Sequence[int]) -> Iterator[dict[str, object]]:
    values = fleet()
    unit = values[:SWAP].std(axis=0)[:, None]
    truth = np.stack([values[SWAP + lead : SWAP + lead + AFTER] for lead in range(1, HORIZON + 1)], axis=-1)
    spec = SeriesSpec(("value.mean",), (0,), STEP_MS, HORIZON, (0.1, 0.5, 0.9), (SEASON,))
    known = steps_of(values, 0, TRAINED)
    history = Sequences(known.slot, known.end_ms, known.values, known.reset)
    for cell in cells:
        model = train(history, spec, cell=cell, epochs=8).forecaster
        reference = answers(values, spec, model, None)
        error = np.abs(reference - truth) / unit
        for length in lengths:
            difference = np.abs(answers(values, spec, model, length) - reference) / unit
            shown = {f"step {step}": float(difference[step - 1].mean()) for step in SHOWN}
            yield {"cell": cell, "W": length} | shown | {"error of the model": float(error[: SHOWN[-1]].mean())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", default="gru,lstm")
    parser.add_argument("--steps", default="0,8,16,32,64,128")
    given = parser.parse_args()
    for row in rows(given.cells.split(","), [int(length) for length in given.steps.split(",")]):
        print("  ".join(f"{k} {v:.5f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)


if __name__ == "__main__":
    main()
