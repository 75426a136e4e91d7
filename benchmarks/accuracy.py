"""How good the forecasts are: the product's own backtest over public series, by the leak-free protocol of DSOF and PROCEED.

    python -m benchmarks.accuracy --data DIR [--rows ETTm1,ETTh2:24] [--profiles base] [--seeds 0,1,2] [--out accuracy.json] [--table]
    python -m benchmarks.accuracy --data DIR --leak-test ETTh2:24
    python -m benchmarks.accuracy --table

DIR holds ETTm1.csv, ETTh2.csv, weather_jena.csv and exchange_rate.csv (`benchmarks.accuracy_rows` has their rows, settings and
published figures). Each run is what `millrace backtest --data FILE --retrain-every D` does: windows, tasks, schedule, training, gate.

Protocol: errors in standard deviations of the training rows, series by series. Origin i says rows i .. i + H - 1 of every series from rows
before i; i goes from the first row of the test to the last origin whose targets all lie before the end; mean over origins, leads and
series. Learning goes on through the test, from what has been seen. Beside: LastValue, SeasonalNaive, and plain recursive least squares.

Every (row, horizon, profile, seed) is a process of its own with one thread. Results go to --out as they come; what is there is not run
again, so name another file after the code has changed. `--set section.key=value` (repeatable) overrides a row's settings and stands
in the label of what it gave. `--leak-test` runs the first steps of a row's test twice, the second time with noise after a cutoff.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks.accuracy_leak import leak_of_row
from benchmarks.accuracy_rows import ROWS, Errors, Known
from benchmarks.accuracy_run import PLAIN_RLS, Job, changes_of, measured
from pipeline.service.matching import SERVICE

ONE_THREAD: Final = ("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")
BESIDE: Final = ("LastValue", "SeasonalNaive", PLAIN_RLS)

Results = list[dict[str, Any]]


def main() -> None:
    given = arguments()
    results: Results = json.loads(given.out.read_text(encoding="utf-8")) if given.out.exists() else []
    failed = 0
    if given.leak_test:
        test_for_leaks(given)
    elif given.data:
        failed = run(given, results)
    if given.table:
        print(table(results))
    sys.exit(1 if failed else 0)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of the CSV files")
    parser.add_argument("--rows", default=",".join(ROWS), help="NAME or NAME:HORIZON, by commas")
    parser.add_argument("--profiles", default="base")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--jobs", type=int, default=2, help="processes side by side")
    parser.add_argument("--out", type=Path, default=Path("accuracy.json"))
    parser.add_argument("--table", action="store_true", help="print what is in --out as Markdown")
    parser.add_argument("--leak-test", default="", metavar="NAME[:HORIZON]")
    given = parser.parse_args()
    if given.data is None and (given.leak_test or not given.table):
        parser.error("--data DIR is missing: the folder of the CSV files")
    try:
        changes_of(given.set)
        list(asked(given.leak_test or given.rows))
    except ValueError as error:
        parser.error(str(error))
    return given


def asked(rows: str) -> Iterator[tuple[str, int]]:
    """NAME[:HORIZON],... -> rows and horizons. Raises ValueError for one that there is not."""
    for part in rows.split(","):
        name, _, horizon = part.strip().partition(":")
        if name not in ROWS or (horizon and horizon not in map(str, ROWS[name].horizons)):
            known = ", ".join(f"{row.name}:{'|'.join(map(str, row.horizons))}" for row in ROWS.values())
            raise ValueError(f"{part}: expected a row, or one of its horizons: {known}")
        yield from [(name, int(horizon))] if horizon else [(name, each) for each in ROWS[name].horizons]


def jobs_of(given: argparse.Namespace) -> list[Job]:
    """Seed by seed, so that a first table is there early."""
    places, changes = list(asked(given.rows)), tuple(sorted(given.set))
    return [Job(name, horizon, PLAIN_RLS) for name, horizon in places] + [
        Job(name, horizon, profile, int(seed), changes)
        for seed in given.seeds.split(",")
        for name, horizon in places
        for profile in given.profiles.split(",")
    ]


def run(given: argparse.Namespace, results: Results) -> int:
    """What is not there yet; how many of them failed."""
    done = {job_of(result) for result in results}
    jobs = [job for job in jobs_of(given) if job not in done]
    failed = 0
    with processes(given.jobs) as pool:
        running: dict[Future[dict[str, Any]], Job] = {pool.submit(measured, job, given.data): job for job in jobs}
        for future in as_completed(running):
            error = future.exception()
            if error is not None:
                failed += 1
                tell(f"{running[future]} failed: {type(error).__name__}: {error}")
                continue
            results.append(future.result())
            store(given.out, results)
            tell(f"{running[future]}: {summary(results[-1])}")
    return failed


def test_for_leaks(given: argparse.Namespace) -> None:
    """Raises AssertionError where there is one."""
    seed, profile, changes = int(given.seeds.split(",")[0]), given.profiles.split(",")[0], tuple(sorted(given.set))
    name, horizon = next(asked(given.leak_test))
    job = Job(name, horizon, profile, seed, changes)
    with processes(1) as pool:
        found = pool.submit(leak_of_row, job, given.data, tell).result()
    print(f"{job}: {found}")
    found.require_none()


def processes(at_once: int) -> ProcessPoolExecutor:
    """Each call in a process of its own: TensorFlow gives nothing back. One thread each, known before NumPy is loaded."""
    os.environ.update(dict.fromkeys(ONE_THREAD, "1"))
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(at_once, mp_context=context, max_tasks_per_child=1)


def job_of(result: Mapping[str, Any]) -> Job:
    return Job(result["row"], result["horizon"], result["profile"], result["seed"], tuple(result["changes"]))


def store(path: Path, results: Results) -> None:
    """Whole, or as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(path.name + ".writing")
    scratch.write_text(json.dumps(results, indent=1), encoding="utf-8")
    os.replace(scratch, path)


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def summary(result: Mapping[str, Any]) -> str:
    figures = result["figures"].get(SERVICE) or result["figures"][PLAIN_RLS]
    named = [f"{name} {figures[name]:.4f}" for name in ("mse", "mae", "pinball", "coverage") if name in figures]
    return ", ".join([*named, f"{result['seconds']:.0f} s"])


# -- the table


def table(results: Results) -> str:
    """Two tables of Markdown: MSE/MAE beside what is known, then the quantiles. Of several seeds the mean, and half the spread. Bold:
    the target is reached."""
    labels = list(dict.fromkeys(job_of(result).label for result in results if result["profile"] != PLAIN_RLS))
    places = [place for place in asked(",".join(ROWS)) if any((r["row"], r["horizon"]) == place for r in results)]
    heads = ["MSE/MAE", *BESIDE, "best published", "target", *labels]
    lines = [_line(heads), _line(["---"] * len(heads))]
    quantiles = ["pinball / coverage of 80 % / worst series / seconds", *labels]
    below = [_line(quantiles), _line(["---"] * len(quantiles))]
    for place in places:
        own = [result for result in results if (result["row"], result["horizon"]) == place]
        lines.append(
            _line([f"{place[0]} H{place[1]}", *_known(own, place), *(_errors(own, label, place) for label in labels)])
        )
        below.append(_line([f"{place[0]} H{place[1]}", *(_quantiles(own, label) for label in labels)]))
    return "\n".join([*lines, "", *below])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _known(results: Results, place: tuple[str, int]) -> list[str]:
    """What stands beside: forecasters that were run, then figures that were published or set."""
    known = ROWS[place[0]].horizons[place[1]]
    cells = []
    for name in BESIDE:
        found = next((result["figures"][name] for result in results if name in result["figures"]), None)
        cells.append("" if found is None else f"{found['mse']:.3f}/{found['mae']:.3f}")
    target = _pair(known.target)
    if known.of_last_value is not None:
        target = f"MSE {known.of_last_value:g} of LastValue's"
    if known.pinball is not None:
        target += f", pinball {known.pinball:g}"
    return [*cells, _pair(known.published), target]


def _pair(errors: Errors | None) -> str:
    return "" if errors is None else f"{errors.mse:.3f}/{errors.mae:.3f}"


def _seeds(results: Results, label: str) -> list[dict[str, Any]]:
    """The product's figures, one a seed, with its seconds."""
    own = [result for result in results if job_of(result).label == label]
    return [result["figures"][SERVICE] | {"seconds": result["seconds"]} for result in own]


def _errors(results: Results, label: str, place: tuple[str, int]) -> str:
    found = _seeds(results, label)
    if not found:
        return ""
    cell = f"{_mean(found, 'mse')} / {_mean(found, 'mae')}"
    return f"**{cell}**" if _reached(results, found, ROWS[place[0]].horizons[place[1]]) else cell


def _reached(results: Results, found: list[dict[str, Any]], known: Known) -> bool:
    mse, mae, pinball = (float(np.mean([one[name] for one in found])) for name in ("mse", "mae", "pinball"))
    last = next(result["figures"]["LastValue"]["mse"] for result in results if "LastValue" in result["figures"])
    return (
        (known.target is None or (mse <= known.target.mse and mae <= known.target.mae))
        and (known.of_last_value is None or mse <= known.of_last_value * last)
        and (known.pinball is None or pinball <= known.pinball)
    )


def _quantiles(results: Results, label: str) -> str:
    found = _seeds(results, label)
    if not found:
        return ""
    worst = max((one["worst_coverage"] for one in found), key=lambda share: abs(share - 0.8))
    seconds = np.mean([one["seconds"] for one in found])
    coverage = np.mean([one["coverage"] for one in found])
    return f"{_mean(found, 'pinball', 4)} / {coverage:.1%} / {worst:.1%} / {seconds:.0f}"


def _mean(found: list[dict[str, Any]], name: str, digits: int = 3) -> str:
    values = [one[name] for one in found]
    half = (max(values) - min(values)) / 2
    return f"{np.mean(values):.{digits}f}" + (f" ± {half:.{digits}f}" if len(values) > 1 else "")


if __name__ == "__main__":
    main()
