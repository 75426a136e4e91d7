"""What a chaos run is to do, and what came of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from tests.chaos.models import VARIANTS
from tests.chaos.oracle import Verdict
from tests.chaos.swaps import Pauses
from tests.chaos.worker import FAULTS, POINTS, SWAP_POINTS

VERSIONS = 1 + len(VARIANTS)


@dataclass(frozen=True, slots=True)
class ChaosPlan:
    """What is to be done, and how much of it."""

    readings: int = 200_000
    kills: int = 50
    """Of workers; half of them aimed at a point of a transaction."""
    rebalances: int = 10
    """A dynamic worker stops or another one starts."""
    pauses: int = 3
    """A worker is stopped (SIGSTOP) for longer than its session lasts, and goes on as if nothing had happened: a zombie."""
    broker_restarts: int = 2
    """Of a single broker: in turn SIGTERM and SIGKILL."""
    swaps: int = 0
    """Another model is promoted; while workers are killed, half of the times one dies right after that."""
    brokers: int = 1
    broker_kills: int = 0
    """SIGKILL of one of several brokers."""
    workers: int = 3
    sensors: int = 80
    fault: str = ""
    checkpoint_every: str = "1s"
    seed: int = 0
    deadline_seconds: float = 1800.0
    out: Path | None = None
    """Where brokers, logs and model are kept; None: a temporary folder, thrown away unless something was wrong."""
    model: Path | None = None
    """A model made before by `make_model`; None: one is trained first."""
    variants: tuple[Path, ...] = ()
    """Models made before by `make_variants`; empty: they are trained first, if there are swaps."""

    @property
    def storm_seconds(self) -> float:
        """About how long the events take, so that the readings last as long."""
        events = 10.0 * self.kills + 8.0 * self.rebalances + 14.0 * (self.broker_restarts + self.broker_kills)
        events += 14.0 * self.pauses + 8.0 * self.swaps
        return 15.0 + events


@dataclass(slots=True)
class ChaosReport:
    """What was done, and what came of it."""

    plan: ChaosPlan
    kills: Counter[str] = field(default_factory=Counter)
    """Point, or "anywhere", -> deaths."""
    rebalances: int = 0
    pauses: int = 0
    broker_restarts: int = 0
    broker_kills: int = 0
    swaps: int = 0
    """Promotions."""
    takeover_seconds: list[float] = field(default_factory=list)
    """From a promotion until the last partition's swap record was seen, where that was waited for."""
    memory: dict[str, list[int]] = field(default_factory=dict)
    """Bytes resident before the storm and after each swap, of workers that lived through all of it."""
    pauses_in_output: Pauses | None = None
    starts_in_vain: int = 0
    """Workers that ended because no broker answered when they started."""
    failures: list[str] = field(default_factory=list)
    """What went wrong by itself: a worker that ended, something that did not come in time."""
    verdict: Verdict | None = None
    seconds: float = 0.0
    kept: Path | None = None

    @property
    def done(self) -> bool:
        """All that was planned has happened."""
        plan, verdict = self.plan, self.verdict
        return (
            verdict is not None
            and verdict.readings >= plan.readings
            and self.kills.total() >= plan.kills
            and self.rebalances >= plan.rebalances
            and self.pauses >= plan.pauses
            and self.broker_restarts >= plan.broker_restarts
            and self.broker_kills >= plan.broker_kills
            and self.swaps >= plan.swaps
        )

    @property
    def ok(self) -> bool:
        return self.done and not self.failures and self.verdict is not None and self.verdict.ok

    @property
    def found(self) -> bool:
        """Whether the planted fault shows, in the way in which it must."""
        return self.verdict is not None and FAULTS[self.plan.fault].symptom in self.verdict.symptoms

    def rows(self) -> Iterator[tuple[str, str]]:
        plan, verdict = self.plan, self.verdict
        yield "brokers, workers", f"{plan.brokers}, {plan.workers}" + (f", fault {plan.fault}" if plan.fault else "")
        yield "kills of workers", f"{self.kills.total()} of {plan.kills}"
        for point in ("anywhere", *POINTS, *SWAP_POINTS):
            if self.kills[point]:
                yield f"  {point}", str(self.kills[point])
        yield "rebalances", f"{self.rebalances} of {plan.rebalances}"
        yield "workers stopped beyond their session", f"{self.pauses} of {plan.pauses}"
        yield "broker restarts, kills", f"{self.broker_restarts}, {self.broker_kills}"
        yield "starts while no broker answered", str(self.starts_in_vain)
        yield from self._swap_rows()
        if verdict is not None:
            forecasts, letters, scores, state = verdict.forecasts, verdict.letters, verdict.scores, verdict.state
            yield "readings", f"{verdict.readings:,} of {plan.readings:,}"
            yield "forecasts", f"{forecasts.seen:,} of {forecasts.expected:,}"
            yield "dead letters", f"{letters.seen:,} of {letters.expected:,}"
            yield "scores", f"{scores.seen:,} of {scores.expected:,}"
            yield "sensors in checkpoints", f"{state.sensors} in {state.partitions} partitions"
            yield "lost", str(verdict.lost)
            yield "repeated", str(verdict.repeated)
            yield "forecasts of a backtest", f"{verdict.backtest.expected:,} for {verdict.backtest.seen:,} committed"
            yield "largest difference, backtest", f"{verdict.backtest.largest_difference:.1e}"
            yield "largest difference, forecasts", f"{forecasts.largest_difference:.1e}"
            yield "largest difference, scores", f"{scores.largest_difference:.1e}"
            yield "largest difference, hidden state", f"{state.largest_hidden_difference:.1e}"
            yield "largest difference, all state", f"{state.largest_difference:.1e}"
            yield "provisional forecasts, not compared", str(verdict.provisional)
        yield "seconds", f"{self.seconds:.0f}"

    def _swap_rows(self) -> Iterator[tuple[str, str]]:
        yield "promotions", f"{self.swaps} of {self.plan.swaps}"
        if self.verdict is not None:
            found = self.verdict.swaps
            yield (
                "swap records",
                f"{found.seen}: " + ", ".join(str(found.by_partition[p]) for p in sorted(found.by_partition)),
            )
        if self.takeover_seconds:
            longest, usual = max(self.takeover_seconds), median(self.takeover_seconds)
            yield "promotion to last partition", f"median {usual:.1f} s, longest {longest:.1f} s"
        if self.pauses_in_output is not None:
            yield "longest pause in output", str(self.pauses_in_output)
        for name, sizes in self.memory.items():
            before, once, after = (f"{size / 2**20:.0f} MiB" for size in (sizes[0], sizes[:VERSIONS][-1], sizes[-1]))
            yield f"memory of {name}", f"{before} before, {once} when every model had answered, {after} at the end"

    def __str__(self) -> str:
        lines = [f"  {name:<36} {value}" for name, value in self.rows()]
        lines += [f"  failure: {failure}" for failure in self.failures]
        if self.verdict is not None:
            lines += [f"  {detail}" for detail in self.verdict.details]
            lines.append(str(self.verdict))
        if self.kept is not None:
            lines.append(f"logs and broker: {self.kept}")
        return "\n".join(lines)
