"""A backtest's forecasts per second beside Darts' `historical_forecasts`, an RNN of the same size on the same data.

    python3.11 -m venv DARTS && DARTS/bin/pip install "darts[torch]" "pandas<3" pyarrow
    python -m benchmarks.historical --data ETTh1.csv --darts-python DARTS/bin/python [--cutoffs 1000] [--rounds 2]

Every value column is a series of its own; the last hours, one cutoff each, are forecast 24 hours ahead by a network that has learnt
from the oldest 60 %. Both have a GRU of 64 units, the quantiles .1, .5 and .9, float32 and two threads. Darts is given the series
already scaled, no covariates, the batch that suits it best, and its batched path (`enable_optimization`). Three of its models are
measured, because none does quite the same work:

- block: BlockRNNModel. The GRU reads the last `--input-chunks` steps, a head gives all leads and quantiles at once: the fair one.
- rnn: RNNModel without a likelihood. It goes on from its own forecasts, lead by lead: as many numbers as leads, no quantiles.
- sampled: RNNModel with a quantile likelihood. Beyond one lead its quantiles come from sampled paths only (`--samples` of each).

Darts hands out a TimeSeries for each forecast, and making it is a good part of its time (under pandas 3 "block" takes a third longer
for the names of the quantiles alone: hence pandas 2). A row's last figure is without: `last_points_only`, where all leads are
computed and no TimeSeries is made. None of Darts' models carries a hidden state from one cutoff to the next: each forecast runs
through its input chunk again.

Each figure is a process of its own; imports, reading the file, training (one epoch: how good the forecasts are is not measured) and
a first small call come before the clock starts. A process does its backtest up to five times, all are run in turn `--rounds` times,
and the best of each is kept, because machines are noisy; "others" is the share of the cores that other processes took meanwhile.
Where it is not near nothing a row of Darts' is worth nothing: its two threads wait for each other by spinning, and one busy neighbour
makes them twenty times slower. (`--threads 1` loses a seventh and stands it; so does OMP_WAIT_POLICY=PASSIVE, and loses a third.)
The file imports neither side until it is asked for it, so that both interpreters can run it.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

HORIZON = 24
QUANTILES = (0.1, 0.5, 0.9)
UNITS = 64
TRAINED = 0.6
"""The share of each series, from its start, that the networks learn from."""
THREADS = 2
LEAD_IN = 500
"""Steps before the first cutoff that Millrace reads to warm its state up."""
REPEATS, REPEAT_SECONDS = 5, 20.0
"""Each process does its backtest so many times, unless it takes too long, and keeps the quickest."""
DARTS_MODELS = ("block", "rnn", "sampled")


@dataclass(frozen=True)
class Result:
    name: str
    series: int
    cutoffs: int
    """Of each series."""
    seconds: float
    peak_mb: float
    before_mb: float
    """What of the peak was there before the clock started."""
    parameters: int
    others: float
    """The share of the cores that other processes took while the clock ran."""
    threads: int = THREADS
    bare_seconds: float | None = None
    """The same computation, but with no object made of each forecast."""
    path: str = ""
    """Which of its ways of computing a backtest was taken."""
    mae: float = float("nan")
    """Of the points (the median), in standard deviations: only to see that forecasts came out."""
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def forecasts(self) -> int:
        return self.series * self.cutoffs

    @property
    def per_second(self) -> float:
        return self.forecasts / self.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="CSV; a time column, then value columns")
    parser.add_argument("--darts-python", type=Path, help="the interpreter that has Darts")
    parser.add_argument("--cutoffs", type=int, default=1000, help="the newest so many hours of each series")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--models", default=",".join(DARTS_MODELS), help="which of Darts'")
    parser.add_argument("--input-chunks", default="48,96", help="steps that Darts reads for each forecast")
    parser.add_argument("--batch", type=int, default=1024, help="forecasts that Darts computes at once")
    parser.add_argument("--samples", type=int, default=100, help="paths that Darts samples for each forecast")
    parser.add_argument("--threads", type=int, default=THREADS, help="of Darts")
    parser.add_argument("--one-by-one", action="store_true", help="without Darts' batched path")
    parser.add_argument("--side", choices=("darts", "millrace"), help="in this process; prints one line of JSON")
    arguments = parser.parse_args()
    if arguments.side:
        result = darts(arguments) if arguments.side == "darts" else millrace(arguments.data, arguments.cutoffs)
        print(json.dumps(asdict(result) | {"forecasts": result.forecasts, "per_second": result.per_second}))
        return
    if arguments.darts_python is None:
        parser.error("--darts-python is needed")
    runs: dict[str, list[Result]] = {}
    for _ in range(arguments.rounds):
        for command in commands(arguments):
            result = child(command)
            print(f"{result.name}: {result.per_second:,.0f} forecasts/s", file=sys.stderr)
            runs.setdefault(result.name, []).append(result)
    print_table([min(found, key=lambda result: result.seconds) for found in runs.values()])


def commands(arguments: argparse.Namespace) -> Iterator[list[str]]:
    """Of one round. The first is the reference."""
    common = ["--data", str(arguments.data.resolve()), "--cutoffs", str(arguments.cutoffs)]
    yield [sys.executable, "-m", "benchmarks.historical", "--side", "millrace", *common]
    for model in arguments.models.split(","):
        for chunk in arguments.input_chunks.split(","):
            own = ["--models", model, "--input-chunks", chunk, "--batch", str(arguments.batch)]
            own += ["--samples", str(arguments.samples), "--threads", str(arguments.threads)]
            own += ["--one-by-one"] * arguments.one_by_one
            # absolute, not resolved: an environment's interpreter is a link
            yield [str(arguments.darts_python.absolute()), str(Path(__file__)), "--side", "darts", *common, *own]


def child(command: Sequence[str]) -> Result:
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    found = json.loads(done.stdout.splitlines()[-1])
    return Result(**{name: value for name, value in found.items() if name in Result.__dataclass_fields__})


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Clock:
    """Seconds spent in the block, and the share of the cores that other processes took meanwhile."""

    seconds = others = float("nan")

    def __enter__(self) -> Clock:
        self._started = time.perf_counter(), self._elsewhere()
        return self

    def __exit__(self, *_: object) -> None:
        started, elsewhere = self._started
        self.seconds = time.perf_counter() - started
        self.others = max(0.0, (self._elsewhere() - elsewhere) / (self.seconds * (os.cpu_count() or 1)))

    @staticmethod
    def _elsewhere() -> float:
        """CPU seconds since the machine's start that were not this process's; not a number where nothing tells."""
        try:
            fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
        except OSError:
            return float("nan")
        user, nice, system, _idle, _waiting, *interrupts_and_stolen = map(int, fields)
        return (user + nice + system + sum(interrupts_and_stolen)) / os.sysconf("SC_CLK_TCK") - time.process_time()


def quickest(run: Callable[[], object], clocks: list[Clock]) -> Clock:
    """Of these and of more runs: up to REPEATS in all, as long as they took less than REPEAT_SECONDS."""
    while not clocks or (len(clocks) < REPEATS and sum(clock.seconds for clock in clocks) < REPEAT_SECONDS):
        gc.collect()
        with Clock() as clock:
            run()
        clocks.append(clock)
    return min(clocks, key=lambda clock: clock.seconds)


# ---- Millrace


def millrace(data: Path, cutoffs: int) -> Result:
    """The newest so many cutoffs of each series of the file; `bounds` says which. The clock runs over looking at the data, loading
    the model, LEAD_IN steps that warm the state up, the forecasts, matching them with their truth, and the DataFrame."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import pandas as pd

    from pipeline.service.backtest import of_file
    from pipeline.service.files import FileLayout
    from pipeline.service.question import Question
    from pipeline.settings import load

    frame = pd.read_csv(data, parse_dates=[0])
    layout = FileLayout(str(frame.columns[0]), ("*",))
    trained, first, last = bounds(len(frame), cutoffs)
    times = frame.iloc[:, 0].astype("datetime64[ms]").astype("int64").tolist()
    settings = load(None, {}, {"forecast.horizon": HORIZON, "model.units": UNITS, "training.epochs": 1})
    with tempfile.TemporaryDirectory() as name:
        question = Question(train_until_ms=times[trained], out=Path(name) / "fit")
        answer = of_file(settings, [frame.iloc[: trained + HORIZON]], layout, question)
        (change,) = answer.outcome.changes
        folder = Path(name) / "fit" / "models" / change.version

        def backtest(start: int) -> pd.DataFrame:
            asked = Question(model=str(folder), start=times[start], lead_in_ms=LEAD_IN * settings.windows.size_ms)
            return of_file(settings, [frame], layout, asked).frame()

        backtest(last - 4)
        before_mb = peak_mb()
        with Clock() as clock:
            found = backtest(first)
        parameters = sum(int(weights.size) for weights in load_weights(folder))
    found = found[found["cutoff"] < frame.iloc[last, 0]]
    series, made = found["unique_id"].nunique(), len(found) // HORIZON
    assert made == series * (last - first + 1), (made, series, last - first + 1)
    deviation = frame.iloc[:trained, 1:].std()
    error = (found["Millrace-q0.5"] - found["y"]).abs() / found["unique_id"].map(deviation)
    return Result(
        name="Millrace",
        series=series,
        cutoffs=last - first + 1,
        seconds=clock.seconds,
        others=clock.others,
        peak_mb=peak_mb(),
        before_mb=before_mb,
        parameters=parameters,
        path=f"hidden state carried, {LEAD_IN} steps of lead-in",
        mae=float(error.mean()),
        versions={name: version(name) for name in ("tensorflow", "keras", "numpy", "pandas")},
    )


def load_weights(folder: Path) -> list[Any]:
    from models.artifact import load

    weights: list[Any] = load(folder).net.model.get_weights()
    return weights


def bounds(steps: int, cutoffs: int) -> tuple[int, int, int]:
    """Positions in a series of so many steps: where training ends, the first step of the first forecast, and of the last.

    The last forecast ends where the series does; none begins before training has ended.
    """
    trained = int(steps * TRAINED)
    last = steps - HORIZON
    return trained, max(trained, last - cutoffs + 1), last


# ---- Darts


def darts(arguments: argparse.Namespace) -> Result:
    warnings.simplefilter("ignore")
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
    import torch

    kind, chunk = arguments.models, int(arguments.input_chunks)
    series = scaled_series(arguments.data)
    trained, first, last = bounds(len(series[0]), arguments.cutoffs)
    model = darts_model(kind, chunk)
    for name in ("pytorch_lightning", "pytorch_lightning.utilities.rank_zero", "darts"):
        logging.getLogger(name).setLevel(logging.ERROR)  # importing them sets it back
    torch.set_num_threads(1)  # as fast there
    model.fit([one[:trained] for one in series], verbose=False)
    torch.set_num_threads(arguments.threads)
    options: dict[str, Any] = {"num_samples": arguments.samples} if kind == "sampled" else {}
    options |= {"predict_likelihood_parameters": True} if kind == "block" else {}
    options |= {"enable_optimization": not arguments.one_by_one}
    batched = count_calls(model, "_optimized_historical_forecasts")

    def backtest(start: int, last_points_only: bool = False) -> Any:
        return model.historical_forecasts(
            series,
            start=start,
            start_format="position",
            forecast_horizon=HORIZON,
            stride=1,
            retrain=False,
            last_points_only=last_points_only,
            overlap_end=False,
            verbose=False,
            show_warnings=False,
            predict_kwargs={"batch_size": arguments.batch},
            **options,
        )

    backtest(last - 4)
    batched.clear()
    before_mb = peak_mb()
    with Clock() as once:
        forecasts = backtest(first)
    after_mb = peak_mb()
    error = check(series, forecasts, first, last, kind)
    del forecasts
    clock = quickest(lambda: backtest(first), [once])
    bare = quickest(lambda: backtest(first, last_points_only=True), [])
    return Result(
        name=f"Darts {kind}, {chunk} steps" + f", {arguments.samples} samples" * (kind == "sampled"),
        series=len(series),
        cutoffs=last - first + 1,
        seconds=clock.seconds,
        others=clock.others,
        peak_mb=after_mb,
        before_mb=before_mb,
        parameters=sum(weights.numel() for weights in model.model.parameters()),
        threads=torch.get_num_threads(),
        bare_seconds=bare.seconds,
        path=f"batched, {arguments.batch}" if batched else "one by one",
        mae=error,
        versions={name: version(name) for name in ("darts", "torch", "pytorch-lightning", "numpy", "pandas")},
    )


def scaled_series(data: Path) -> list[Any]:
    """Each value column by itself, by mean and deviation of its part that is learnt from."""
    import pandas as pd
    from darts import TimeSeries

    frame = pd.read_csv(data, parse_dates=[0], index_col=0)
    known = frame.iloc[: int(len(frame) * TRAINED)]
    frame = ((frame - known.mean()) / known.std()).astype("float32")
    return [TimeSeries.from_series(frame[name]) for name in frame]


def darts_model(kind: str, chunk: int) -> Any:
    from darts.models import BlockRNNModel, RNNModel
    from darts.utils.likelihood_models.torch import QuantileRegression

    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    options: dict[str, Any] = {
        "model": "GRU",
        "input_chunk_length": chunk,
        "hidden_dim": UNITS,
        "n_rnn_layers": 1,
        "n_epochs": 1,
        "batch_size": 256,
        "random_state": 0,
        "pl_trainer_kwargs": {"accelerator": "cpu", **dict.fromkeys(quiet, False)},
    }
    if kind != "rnn":
        options["likelihood"] = QuantileRegression(list(QUANTILES))
    if kind == "block":
        return BlockRNNModel(output_chunk_length=HORIZON, hidden_fc_sizes=[UNITS], activation="ReLU", **options)
    return RNNModel(training_length=chunk + HORIZON, **options)


def count_calls(owner: Any, name: str) -> list[str]:
    """Grows by one with each call of that method."""
    calls: list[str] = []
    function: Callable[..., Any] = getattr(owner, name)

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(name)
        return function(*arguments, **options)

    setattr(owner, name, counted)
    return calls


def check(series: list[Any], forecasts: list[list[Any]], first: int, last: int, kind: str) -> float:
    """That every hour has its forecast of every lead; the mean absolute error of the points."""
    import numpy as np

    errors = []
    for truth, found in zip(series, forecasts, strict=True):
        starts = [one.start_time() for one in found]
        assert starts == list(truth.time_index[first : last + 1]), (len(found), starts[0], starts[-1])
        values = np.stack([one.all_values() for one in found])  # (cutoff, lead, component, sample)
        assert values.shape[:3] == (len(starts), HORIZON, len(QUANTILES) if kind == "block" else 1), values.shape
        assert np.isfinite(values).all()
        points = values[:, :, 1, 0] if kind == "block" else np.median(values[:, :, 0], axis=-1)
        leads = np.arange(first, last + 1)[:, None] + np.arange(HORIZON)
        errors.append(np.abs(points - truth.values()[leads, 0]).mean())
    return float(np.mean(errors))


# ---- what is printed


def print_table(rows: list[Result]) -> None:
    print(
        f"| | parameters | path | forecasts | seconds | forecasts/s | {rows[0].name} is faster by | others | peak MB "
        "| of it before | forecasts/s without objects |"
    )
    print("|---" * 11 + "|")
    for row in rows:
        bare = f"{row.forecasts / row.bare_seconds:,.0f}" if row.bare_seconds else ""
        print(
            f"| {row.name} | {row.parameters:,} | {row.path} | {row.forecasts:,} | {row.seconds:.2f} "
            f"| {row.per_second:,.0f} | {row.seconds / row.forecasts * rows[0].per_second:.1f} | {row.others:.0%} "
            f"| {row.peak_mb:.0f} | {row.before_mb:.0f} | {bare} |"
        )
    print("\nVersions: " + ", ".join(sorted({f"{name} {v}" for row in rows for name, v in row.versions.items()})))


if __name__ == "__main__":
    main()
