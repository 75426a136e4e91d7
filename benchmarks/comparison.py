"""RNN, feed-forward network and naive forecasts on the same history; and what carrying the hidden state buys.

    python -m benchmarks.comparison FILE --time-column C --value-columns '*' [--season 24] [--horizon 24] [--out docs/img]

All learn from (or look at) the oldest 80 %, all are scored at every step of the newest 20 %, in standard deviations of each sensor.
The second panel forgets on purpose: the same trained RNN is asked with only the last w steps run through it, from an empty hidden
state. Everything else it is told (running scale, last season) stays the same.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.baselines import LastValue, SeasonalNaive
from models.evaluation import Figures, evaluate, training_deviation
from models.sequences import Sequences
from models.training import Examples, TrainedModel, train

MEMORY_STEPS = (1, 2, 4, 8, 16, 32, 64, 128)
EVERY = 12
"""Of the steps held back, every so many serve for the second panel: each needs its own run."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--time-column", required=True)
    parser.add_argument("--value-columns", default="*")
    parser.add_argument("--season", default="24h")
    parser.add_argument("--size", default="1h")
    parser.add_argument("--horizon", type=int, default=24)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("docs/img"))
    arguments = parser.parse_args()
    sequences, settings, spec = read(arguments)
    runs: dict[str, list[Figures]] = {}
    memory: list[dict[str, float]] = []
    for seed in range(arguments.seeds):
        options: dict[str, Any] = {"seed": seed, "warmup_steps": settings.forecast.warmup_steps}
        rnn = train(sequences, spec, architecture="rnn", **options)
        dense = train(sequences, spec, architecture="feedforward", **options)
        forecasters = [rnn.forecaster, dense.forecaster, LastValue(spec), SeasonalNaive(spec)]
        for figures in evaluate(sequences, forecasters, rnn.holdout_from_ms):
            runs.setdefault(figures.name, []).append(figures)
        memory.append(forgetful(rnn, sequences))
        print(
            f"seed {seed}: " + ", ".join(f"{name} {found[-1].pinball:.4f}" for name, found in runs.items()), flush=True
        )
    print_tables(runs, memory)
    arguments.out.mkdir(parents=True, exist_ok=True)
    plot(runs, memory, arguments.out / "comparison.png", arguments.file.stem)


def read(arguments: argparse.Namespace) -> tuple[Sequences, Any, Any]:
    from pipeline.service.assembly import task_settings
    from pipeline.service.files import FileLayout, read_file
    from pipeline.service.history import from_batches
    from pipeline.settings import load

    overrides = {
        "windows.size": arguments.size,
        "forecast.season": [arguments.season],
        "forecast.horizon": arguments.horizon,
    }
    settings = load(None, {}, overrides)
    core = task_settings(settings)
    layout = FileLayout(arguments.time_column, tuple(arguments.value_columns.split(",")))
    return from_batches(core, read_file(arguments.file, layout)).sequences(), settings, core.spec


def forgetful(model: TrainedModel, sequences: Sequences) -> dict[str, float]:
    """Pinball loss of the RNN by how many steps it remembers; "all" carries the state through the whole history."""
    sequences = sequences.by_sensor()
    examples = Examples(sequences, model.forecaster.spec, model.forecaster)
    runs = examples.futures
    started = np.repeat(runs.run_start, runs.run_end - runs.run_start)
    position = np.arange(len(sequences))
    held_back = (sequences.end_ms > model.holdout_from_ms) & (position - started >= MEMORY_STEPS[-1])
    origins = position[held_back][::EVERY]
    found = {}
    for steps in MEMORY_STEPS:
        window = origins[:, None] - np.arange(steps)[::-1]
        found[str(steps)] = pinball(model, examples, origins, last_outputs(model, examples.inputs[window]))
    carried = np.empty((len(sequences), *quantile_shape(model)), np.float32)
    for start, end in zip(runs.run_start, runs.run_end):
        x = examples.inputs[None, start:end]
        carried[start:end] = model.net.unroll(x, np.ones(x.shape[:2], np.bool_), model.net.empty_state(1))[1][0]
    found["all"] = pinball(model, examples, origins, carried[origins])
    return found


def quantile_shape(model: TrainedModel) -> tuple[int, int, int]:
    spec = model.forecaster.spec
    return spec.horizon, len(spec.targets), len(spec.quantiles)


def last_outputs(model: TrainedModel, x: NDArray[np.float32], at_once: int = 256) -> NDArray[np.float32]:
    """x: (n, T, F) -> quantiles at the last step, (n, H, K, Q), each row from an empty state."""
    out = np.empty((len(x), *quantile_shape(model)), np.float32)
    for first in range(0, len(x), at_once):
        part = x[first : first + at_once]
        live = np.ones(part.shape[:2], np.bool_)
        out[first : first + at_once] = model.net.unroll(part, live, model.net.empty_state(len(part)))[1][:, -1]
    return out


def pinball(model: TrainedModel, examples: Examples, origins: Any, quantiles: NDArray[np.float32]) -> float:
    sequences = examples.sequences
    truth = examples.futures.after(origins, int(sequences.end_ms.max()))[..., None]
    last, scale = examples.last[origins][:, None, :, None], examples.scale[origins][:, None, :, None]
    unit = training_deviation(sequences, model.forecaster.spec, model.holdout_from_ms)[sequences.sensor[origins]]
    error = (truth - (last + scale * quantiles)) / unit[:, None, :, None]
    level = np.array(model.forecaster.spec.quantiles)
    return float(np.nanmean(np.maximum(level * error, (level - 1) * error)))


def print_tables(runs: dict[str, list[Figures]], memory: list[dict[str, float]]) -> None:
    print("\n| forecaster | pinball | MSE | MAE | coverage of 80 % |\n|---|---|---|---|---|")
    for name, found in runs.items():
        mean = {score: np.mean([getattr(f, score) for f in found]) for score in ("pinball", "mse", "mae", "coverage")}
        print(f"| {name} | {mean['pinball']:.4f} | {mean['mse']:.4f} | {mean['mae']:.4f} | {mean['coverage']:.1%} |")
    print("\n| steps remembered | pinball | against all |\n|---|---|---|")
    everything = np.mean([found["all"] for found in memory])
    for steps in memory[0]:
        value = np.mean([found[steps] for found in memory])
        print(f"| {steps} | {value:.4f} | {value / everything - 1:+.1%} |")


def plot(runs: dict[str, list[Figures]], memory: list[dict[str, float]], path: Path, title: str) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6), width_ratios=(3, 2), layout="constrained")
    styles = {
        "Millrace": ("#1f6f8b", "RNN (GRU), state carried"),
        "FeedForward": ("#d98324", "feed-forward, one season"),
    }
    styles |= {"LastValue": ("#9a9a9a", "last value"), "SeasonalNaive": ("#5b8c3e", "seasonal naive")}
    for name, found in runs.items():
        by_lead = np.mean([f.by_lead["pinball"] for f in found], axis=0)
        color, label = styles[name]
        left.plot(
            np.arange(1, len(by_lead) + 1), by_lead, color=color, label=label, lw=2 if name == "Millrace" else 1.5
        )
    left.set(
        xlabel="lead (steps)",
        ylabel="pinball loss (standard deviations)",
        title=f"{title}: loss by lead",
        ylim=(0, None),
    )
    left.legend(frameon=False)
    steps = list(memory[0])
    values = [np.mean([found[name] for found in memory]) for name in steps]
    right.plot(range(len(steps)), values, "o-", color="#1f6f8b")
    right.set_xticks(range(len(steps)), steps)
    right.set(xlabel="steps that the RNN remembers", ylabel="pinball loss", title="what carrying state buys")
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
