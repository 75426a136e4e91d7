"""The chaos programme: `python -m tests.chaos`. Exit status 0 only if everything held.

Without arguments, in turn:
  one broker       50 kills, 10 rebalances, 3 zombies, 2 broker restarts, 200,000 readings
  three brokers    10 broker kills, 10 kills
  swaps            20 of them, two workers, nothing else: the longest pause in output, and memory
  swaps and kills  12 and 12, some of the deaths in the middle of a swap
  planted faults   each of them must be found

With arguments: one run of what they say, judged; with --fault, whether the fault is found.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from tests.chaos.harness import run
from tests.chaos.models import make_model, make_variants
from tests.chaos.plan import ChaosPlan, ChaosReport
from tests.chaos.worker import FAULTS

ONE_BROKER = ChaosPlan()
THREE_BROKERS = ChaosPlan(
    readings=40_000, kills=10, rebalances=2, pauses=0, broker_restarts=0, brokers=3, broker_kills=10
)
SWAPS = ChaosPlan(readings=300_000, kills=0, rebalances=0, pauses=0, broker_restarts=0, workers=2, swaps=20)
SWAPS_AND_KILLS = ChaosPlan(readings=50_000, kills=12, rebalances=2, pauses=0, broker_restarts=1, swaps=12)
PLANTED = ChaosPlan(
    readings=6_000, kills=4, rebalances=0, pauses=0, broker_restarts=0, sensors=60, deadline_seconds=300.0
)


def main(arguments: Sequence[str] | None = None) -> int:
    given = _parser().parse_args(arguments)
    asked = {name: value for name, value in vars(given).items() if value is not None}
    if asked.keys() <= {"seed"}:
        return _programme(given.seed or 0)
    return 0 if _passes(_plan(asked)) else 1


def _programme(seed: int) -> int:
    with tempfile.TemporaryDirectory(prefix="millrace-chaos-model-") as folder:
        model, variants = make_model(Path(folder) / "model"), make_variants(Path(folder) / "variants")
        plans = [("one broker", ONE_BROKER), ("three brokers", THREE_BROKERS)]
        plans += [("swaps", SWAPS), ("swaps and kills", SWAPS_AND_KILLS)]
        plans += [(f"planted fault: {fault}", planted(fault)) for fault in FAULTS]
        results = []
        for name, plan in plans:
            _say(f"== {name}")
            results.append((name, _passes(replace(plan, model=model, variants=variants, seed=seed))))
    print("\n".join(f"{'held  ' if held else 'FAILED'} {name}" for name, held in results))
    return 0 if all(held for _, held in results) else 1


def planted(fault: str) -> ChaosPlan:
    """A fault's short run."""
    return replace(PLANTED, fault=fault, swaps=FAULTS[fault].swaps)


def _passes(plan: ChaosPlan) -> bool:
    report = run(plan, _say)
    print(report, flush=True)
    if not plan.fault:
        return report.ok
    print(_fault_line(report), flush=True)
    return report.found


def _fault_line(report: ChaosReport) -> str:
    symptom = FAULTS[report.plan.fault].symptom
    return f"the planted fault {report.plan.fault!r} {'was found' if report.found else 'was NOT found'} ({symptom})"


def _plan(asked: dict[str, object]) -> ChaosPlan:
    """Unless told otherwise: a fault's short run, or the counts of the programme's run with as many brokers."""
    if "fault" in asked:
        base = planted(str(asked["fault"]))
    else:
        base = THREE_BROKERS if asked.get("brokers", 1) != 1 else ONE_BROKER
    return replace(base, **asked)  # type: ignore[arg-type]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    number: Callable[[str], int] = int
    parser.add_argument("--readings", type=number)
    parser.add_argument("--kills", type=number, help="of workers, half of them aimed")
    parser.add_argument("--rebalances", type=number)
    parser.add_argument("--pauses", type=number, help="SIGSTOP of a worker for longer than its session")
    parser.add_argument("--swaps", type=number, help="another model is promoted")
    parser.add_argument("--broker-restarts", type=number, help="of a single broker")
    parser.add_argument("--brokers", type=number, choices=(1, 3))
    parser.add_argument("--broker-kills", type=number, help="with --brokers 3")
    parser.add_argument("--workers", type=number)
    parser.add_argument("--sensors", type=number)
    parser.add_argument("--fault", choices=list(FAULTS))
    parser.add_argument("--deadline-seconds", type=float)
    parser.add_argument("--seed", type=number)
    parser.add_argument("--out", type=Path, help="keep broker, model and logs here")
    return parser


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
