"""The demo: everything at once, and all of it real.

    broker      a Kafka of its own (or one that is there), seven topics
    history     some weeks of a simulated fleet; a worker without a model answers with the baseline
    training    `millrace train` on the topic
    serving     `millrace models import --promote`: the model takes over while the worker runs
    live        a week's end in half a minute; the worker is killed with -9 in the middle and started again
    account     every forecast and dead letter counted against what was sent; figures, picture, page

Each program is a process of its own and its output goes to OUT/logs. Whatever happens, what was started is stopped.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from pipeline.errors import DeploymentError
from pipeline.kafka.broker import LocalBroker
from pipeline.kafka.registry import read
from pipeline.kafka.sink import Partitioner, RecordSink
from pipeline.kafka.topics import create
from pipeline.service.assembly import task_settings
from pipeline.service.children import Child
from pipeline.service.ledger import Account, Ledger
from pipeline.service.narrator import Narrator
from pipeline.service.picture import Fan, LeadErrors, Panel, draw, write_page
from pipeline.service.simulator import DAY_MS, HOUR_MS, UNITS, Fleet, Habits
from pipeline.service.tally import Score, Served, Tally, compare
from pipeline.service.watch import READINGS_BACK, StreamView, Tail, clock
from pipeline.settings import Settings, load
from pipeline.stream.columns import OK, STALE, OutgoingRecords, RecordColumns
from pipeline.stream.task import TaskSettings

TARGET: Final = "temperature"
HEAD_START_MS: Final = 2 * HOUR_MS
"""Sent at once when the live stretch begins, so that windows close and the worker shows that it answers."""
KILL_AT: Final = 0.4
"""Where in the live stretch the worker is killed."""
ANSWER_SECONDS: Final = 120.0
"""How long a program may take before it answers: on a slow machine TensorFlow alone takes half a minute."""
SILENCE_SECONDS: Final = 1.0
PICTURED_DAYS: Final = 3


@dataclass(frozen=True, slots=True)
class DemoPlan:
    """How large a demo. `ends_at_ms`: the event time at which it ends, epoch ms, a full hour."""

    ends_at_ms: int
    out: Path = Path("demo-out")
    sensors: int = 200
    history_days: int = 21
    live_hours: int = 96
    live_seconds: float = 40.0
    interval_ms: int = 15 * 60_000
    seed: int = 0
    units: int = 32
    epochs: int = 16
    broken_share: float = 0.0005
    late_share: float = 0.001
    keep: bool = False
    bootstrap_servers: str = ""
    """A cluster that is there already; empty: a broker of the demo's own."""
    domain: str = "demo"

    @property
    def live_from_ms(self) -> int:
        return self.ends_at_ms - self.live_hours * HOUR_MS

    @property
    def begins_at_ms(self) -> int:
        return self.live_from_ms - self.history_days * DAY_MS


@dataclass(slots=True)
class DemoReport:
    """What the demo found."""

    complete: bool = False
    """False: it was interrupted before everything sent had been answered."""
    counts: list[dict[str, Any]] = field(default_factory=list)
    """`what`, `expected`, `seen`"""
    repeats: int = 0
    """Forecasts and dead letters that were committed twice."""
    statuses: list[dict[str, Any]] = field(default_factory=list)
    scores: list[dict[str, Any]] = field(default_factory=list)
    memory: list[dict[str, Any]] = field(default_factory=list)
    """state_steps of some sensors before and after kill -9."""
    out_of_sequence: int = 0
    """Forecasts whose state_steps did not follow from the one before."""
    stages: list[dict[str, Any]] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    kept_broker: Path | None = None
    """Where a broker that was to be kept has its data."""
    summary: str = ""

    @property
    def mistakes(self) -> list[str]:
        """Whatever should not be, if the demo ran to its end."""
        if not self.complete:
            return []
        wrong = [
            f"{row['what']}: expected {row['expected']}, seen {row['seen']}"
            for row in self.counts
            if row["expected"] != row["seen"]
        ]
        if self.repeats:
            wrong.append(f"{self.repeats} messages were committed twice")
        if self.out_of_sequence:
            wrong.append(f"{self.out_of_sequence} forecasts whose state_steps does not follow from the one before")
        return wrong


def run_demo(
    plan: DemoPlan, narrator: Narrator, check_interrupt: Callable[[], None] = lambda: None
) -> tuple[DemoReport, bool]:
    """Run it. Returns what was found, and whether it was interrupted (Ctrl-C): then the report holds what there was.

    check_interrupt: called many times a second; raises KeyboardInterrupt once that has come.

    Raises DeploymentError if a program failed, with its last lines."""
    interrupted = False
    with ExitStack() as stack:
        demo = Demo(plan, narrator, stack, check_interrupt)
        try:
            demo.stream()
        except KeyboardInterrupt:
            interrupted = True
            narrator.end_picture()
            narrator.tell("interrupted: stopping what was started")
        report = demo.report(interrupted)
    return report, interrupted


class Demo:
    """One run. `stack` ends whatever it starts."""

    def __init__(
        self, plan: DemoPlan, narrator: Narrator, stack: ExitStack, check_interrupt: Callable[[], None] = lambda: None
    ) -> None:
        self.plan = plan
        self.narrator = narrator
        self._stack = stack
        self._check_interrupt = check_interrupt
        self._fleet = Fleet(
            plan.sensors, plan.seed, plan.interval_ms, Habits(broken=plan.broken_share, late=plan.late_share)
        )
        self._worker: Child | None = None
        self._workers = 0
        self._sent_until_ms = plan.begins_at_ms
        self._killed_at: int | None = None
        self._kept_broker: Path | None = None
        self._before: dict[int, int] = {}
        self._logs = plan.out / "logs"
        self._settings_path = plan.out / "millrace.toml"

    def stream(self) -> None:
        """All stages up to the last forecast."""
        self._prepare()
        with self.narrator.stage("history: baseline answers while there is no model"):
            self._start_worker()
            self._send_until(self.plan.live_from_ms, step_ms=DAY_MS)
        with self.narrator.stage("training: millrace train") as say:
            self._train(say)
        with self.narrator.stage("serving: millrace models import --promote") as say:
            self._promote(say)
        with self.narrator.stage(f"live: {self.plan.live_hours} hours in {self.plan.live_seconds:.0f} seconds"):
            self._live()
        with self.narrator.stage("the last answers") as say:
            self._drain(self._ledger.settle(), say)
        self._stop_worker()

    # -- stages

    def _prepare(self) -> None:
        out = self.plan.out
        self._logs.mkdir(parents=True, exist_ok=True)
        for old in self._logs.glob("*.log"):
            old.unlink()
        if (out / "model" / "manifest.json").is_file():  # a model of the demo before
            shutil.rmtree(out / "model")
        servers = self.plan.bootstrap_servers or self._start_broker()
        self._settings_path.write_text(settings_toml(self.plan, servers), encoding="utf-8")
        self.settings: Settings = load(self._settings_path, environ={})
        self._task: TaskSettings = task_settings(self.settings)
        with self.narrator.stage("topics"):
            create(self.settings)
        self._partition = Partitioner(self.settings.topics.partitions)
        self._ledger = Ledger(self._task.rule, self.plan.sensors)
        self.view = StreamView(self._task, self._fleet.names[0])
        self.tally = Tally(self._task.spec, TARGET, self._fleet.names)
        self._sink = self._stack.enter_context(RecordSink(self.settings))
        topics = self.settings.topics
        self._tails: list[tuple[Tail, list[Callable[[RecordColumns], None]]]] = []
        self._listen(topics.forecasts_topic, None, self.tally.take_forecasts, self.view.take_forecasts)
        self._listen(topics.dead_letters_topic, None, self.tally.take_dead_letters)

    def _start_broker(self) -> str:
        home = Path(".millrace")
        home.mkdir(exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix="demo-", dir=home))
        broker = LocalBroker(folder, port=0)
        with self.narrator.stage("broker"):
            if not self.plan.keep:
                self._stack.callback(_remove, folder)
                self._stack.callback(broker.stop)
            status = broker.start()
        self.narrator.tell(f"Apache Kafka {status.version} at {status.address}, pid {status.pid}")
        self._kept_broker = folder if self.plan.keep else None
        return broker.bootstrap_servers

    def _start_worker(self) -> None:
        self._workers += 1
        self._worker = self._child(f"worker-{self._workers}", "run")
        self.narrator.tell(f"millrace run, pid {self._worker.pid}")

    def _train(self, say: Callable[[str], None]) -> None:
        until = str(self.plan.live_from_ms)
        trainer = self._child("train", "train", "--to", until)
        while not trainer.finished():
            self._poll()
            self._check_worker()
            say(f"meanwhile the baseline has answered {self.tally.forecasts:,} times")
        if not Path(self.settings.model.path).exists():
            raise DeploymentError(f"`millrace train` ended well, but there is no model at {self.settings.model.path}")

    def _promote(self, say: Callable[[str], None]) -> None:
        """Puts the model onto the models topic as champion, and waits until it answers: the worker takes it up while it runs."""
        self._listen(self.settings.topics.readings_topic, READINGS_BACK, self.view.take_readings)
        importer = self._child("import", "models", "import", self.settings.model.path, "--promote")
        self._wait_for(importer.finished, "the model on its topic")
        say("the model is champion; the worker loads it in the background")
        self._wait_for(lambda: len(read(self.settings).swaps) == self.settings.topics.partitions, "the model's turn")
        self._send_until(self.plan.live_from_ms + HEAD_START_MS)
        self._wait_for(lambda: bool(self.tally.statuses().get("ok")), "a forecast of the model")

    def _wait_for(self, true: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + ANSWER_SECONDS
        while not true():
            self._poll()
            self._check_worker()
            if time.monotonic() > deadline:
                raise DeploymentError(f"not within {ANSWER_SECONDS:.0f} s: {what}; see {self._logs}")

    def _live(self) -> None:
        began, from_ms = time.monotonic(), self._sent_until_ms
        while self._sent_until_ms < self.plan.ends_at_ms:
            share = min((time.monotonic() - began) / self.plan.live_seconds, 1.0)
            # Whole seconds: the last one is exact whatever the clock said.
            until = self.plan.ends_at_ms if share == 1.0 else from_ms + int(share * (self.plan.ends_at_ms - from_ms))
            self._send_until(until)
            self._poll()
            self._check_worker()
            if share >= KILL_AT and self._killed_at is None:
                self._kill_and_restart()
            self.narrator.picture(self.view, self._headline(share))

    def _kill_and_restart(self) -> None:
        """SIGKILL in the middle of the stream; then a new process, which has only the log to remember by."""
        assert self._worker is not None
        pid = self._worker.pid
        self._worker.kill()
        quiet_since, count = time.monotonic(), self.tally.forecasts_read
        while time.monotonic() - quiet_since < SILENCE_SECONDS:  # its last words
            self._poll()
            if self.tally.forecasts_read > count:
                quiet_since, count = time.monotonic(), self.tally.forecasts_read
        self._killed_at, self._before = self.tally.forecasts, self.tally.newest_steps
        self.narrator.tell(f"kill -9 {pid}: {self._fleet.names[0]} stood at state_steps {self._before.get(0, 0):,}")
        self._start_worker()

    def _drain(self, account: Account, say: Callable[[str], None]) -> None:
        """Until everything that is due has come, and nothing more comes."""
        due, letters = account.forecasts, sum(account.dead_letters.values())
        deadline = time.monotonic() + ANSWER_SECONDS
        while (self.tally.forecasts < due or len(self.tally.dead_letters) < letters) and time.monotonic() < deadline:
            self._poll()
            self._check_worker()
            say(f"{due - self.tally.forecasts:,} forecasts are still to come")
        quiet_until = time.monotonic() + SILENCE_SECONDS
        while time.monotonic() < quiet_until:
            self._poll()

    # -- the pieces

    def _child(self, name: str, command: str, *arguments: str) -> Child:
        child = Child([command, *arguments, "--config", str(self._settings_path)], self._logs / f"{name}.log")
        return self._stack.enter_context(child)

    def _check_worker(self) -> None:
        if self._worker:
            self._worker.check()

    def _stop_worker(self) -> None:
        if self._worker and self._worker.stop() != 0:
            raise self._worker.failure()
        self._worker = None

    def _send_until(self, to_ms: int, step_ms: int = DAY_MS) -> None:
        while self._sent_until_ms < to_ms:
            until = min(self._sent_until_ms + step_ms, to_ms)
            batch = self._fleet.generate(self._sent_until_ms, until)
            partition = self._partition(batch.keys)
            for p in np.unique(partition).tolist():
                rows = np.flatnonzero(partition == p)
                keys, values = ([column[row] for row in rows.tolist()] for column in (batch.keys, batch.values))
                topic = self.settings.topics.readings_topic
                self._sink.async_send(OutgoingRecords(topic, p, keys, values, None, batch.timestamps_ms[rows]))
            self._sink.flush()
            self._ledger.add(batch, partition)
            self._sent_until_ms = until
            self._poll(0)

    def _listen(self, topic: str, back: int | None, *take: Callable[[RecordColumns], None]) -> None:
        self._tails.append((self._stack.enter_context(Tail(self.settings, topic, back)), list(take)))

    def _poll(self, timeout_ms: int = 20) -> None:
        self._check_interrupt()
        for tail, takers in self._tails:
            for records in tail.poll(timeout_ms):
                for take in takers:
                    take(records)

    def _headline(self, share: float) -> str:
        after = self._first_after(0)
        text = f"live {100 * share:3.0f} %, event time {clock(self._sent_until_ms)}"
        if self._killed_at is None:
            return text
        before = self._before.get(0, 0)
        return f"{text}; killed -9 at state_steps {before:,}, " + (
            f"went on at {after:,}" if after else "started again: its state comes back from the changelog"
        )

    def _first_after(self, sensor: int) -> int | None:
        """state_steps of the sensor's first forecast after the worker was killed."""
        return None if self._killed_at is None else self.tally.first_steps_since(self._killed_at).get(sensor)

    # -- the end

    def report(self, interrupted: bool) -> DemoReport:
        """Account, figures, picture and page of whatever was streamed."""
        report = DemoReport(complete=not interrupted, stages=self.narrator.stages, kept_broker=self._kept_broker)
        if not hasattr(self, "tally") or not self._ledger.sent:
            return report
        account = self._ledger.settle()
        report.summary = (
            f"{account.sent:,} messages of {self.plan.sensors} simulated sensors, {self.plan.history_days} days of history and"
            f" {self.plan.live_hours} hours live, through a real Kafka broker: {self.tally.forecasts:,} forecasts,"
            f" {len(self.tally.dead_letters):,} dead letters."
        )
        report.counts = self._counts(account)
        report.repeats = (
            self.tally.forecasts_read
            - self.tally.forecasts
            + self.tally.dead_letters_read
            - len(self.tally.dead_letters)
        )
        report.statuses = [{"status": name, "forecasts": count} for name, count in self.tally.statuses().items()]
        report.memory = self._memory()
        if not interrupted:
            report.out_of_sequence = self.tally.broken_counts(account)
        with self.narrator.stage("figures and picture"):
            self._write_files(report, account)
        return report

    def _counts(self, account: Account) -> list[dict[str, Any]]:
        seen = self.tally.reasons()
        reasons = sorted(account.dead_letters | seen)
        return [
            {
                "what": "forecasts, one for each closed window",
                "expected": account.forecasts,
                "seen": self.tally.forecasts,
            },
            *(
                {
                    "what": f"dead letters: {reason}",
                    "expected": account.dead_letters.get(reason, 0),
                    "seen": seen.get(reason, 0),
                }
                for reason in reasons
            ),
        ]

    def _memory(self) -> list[dict[str, Any]]:
        if self._killed_at is None:
            return []
        after = self.tally.first_steps_since(self._killed_at)
        return [
            {
                "sensor": self._fleet.names[s],
                "state_steps before kill -9": self._before.get(s),
                "first one after": after.get(s),
            }
            for s in range(min(3, self.plan.sensors))
        ]

    def _write_files(self, report: DemoReport, account: Account) -> None:
        served = answered(self.tally.served(self.plan.live_from_ms))
        scores = compare(served, account, self._task.spec, "Millrace") if len(served.sensor) else []
        unit = UNITS[TARGET]
        report.scores = [score_row(score, unit, self._task.spec.quantiles) for score in scores]
        panels = list(self._panels(served, account))
        if not panels:
            return
        errors = LeadErrors(unit, self._task.spec.step_ms, {score.name: score.mae_by_lead for score in scores})
        out = self.plan.out
        picture = draw(out / "forecasts.png", "Forecasts against what came", panels, errors)
        page = write_page(
            out / "index.html",
            "Millrace demo",
            picture,
            report.summary,
            {
                "How far off, on the streamed part": report.scores,
                "Sent and seen": report.counts,
                "State across kill -9": report.memory,
                "Who answered": report.statuses,
                "Time": report.stages,
            },
        )
        report.files = [str(path) for path in (picture, page, self._settings_path)]

    def _panels(self, served: Served, account: Account) -> Iterator[Panel]:
        """Up to three sensors without a silence, at the latest moment whose forecast has come true entirely."""
        spec = self._task.spec
        if not len(served.sensor):
            return
        cutoff = int(served.issued_at_ms.max()) - spec.horizon * spec.step_ms
        at = int(account.window_of(np.array([cutoff]))[0])
        first, last = max(at - PICTURED_DAYS * 24, 0), at + spec.horizon
        ends = (np.arange(first, last + 1) + account.first_window) * account.hop_ms + account.size_ms
        found = 0
        made_there = np.flatnonzero(served.issued_at_ms == cutoff)
        for row in made_there[np.argsort(served.sensor[made_there])].tolist():
            sensor = int(served.sensor[row])
            truth = account.truth[sensor, first : last + 1]
            if np.isnan(truth).any() or found == 3:
                continue
            found += 1
            ahead = cutoff + np.arange(1, spec.horizon + 1) * spec.step_ms
            middle = served.quantiles[row][:, len(spec.quantiles) // 2]
            fan = Fan(cutoff, ahead, middle, served.quantiles[row], spec.quantiles)
            yield Panel(self._fleet.names[sensor], f"{TARGET} ({UNITS[TARGET]})", ends, truth, fan)


def _remove(folder: Path) -> None:
    """The broker's data, and the folder above if nothing else is in it."""
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):
        folder.parent.rmdir()


def answered(served: Served) -> Served:
    """Those that the model answered."""
    rows = np.isin(served.status, (OK, STALE))
    return Served(*(getattr(served, name)[rows] for name in Served.__slots__))


def score_row(score: Score, unit: str, levels: tuple[float, ...]) -> dict[str, Any]:
    return {
        "forecaster": score.name,
        f"mean absolute error ({unit})": round(score.mae, 3),
        f"pinball loss ({unit})": round(score.pinball, 3),
        f"inside the {100 * (levels[-1] - levels[0]):.0f} % band": f"{100 * score.coverage:.0f} %",
        "windows scored": score.labels,
    }


def settings_toml(plan: DemoPlan, servers: str) -> str:
    """The settings of the demo: what one would write for a stream like this."""
    return f"""# What `millrace demo` ran with. Try: millrace config show --config {plan.out / "millrace.toml"}
[kafka]
bootstrap_servers = "{servers}"
group_instance_id = "demo-worker"   # static membership: a worker that died is replaced at once

[topics]
domain = "{plan.domain}"

[readings]
event_time = "ts"
fields = ["temperature", "pressure"]
targets = ["{TARGET}"]

[windows]
size = "1h"
grace = "10m"

[forecast]
horizon = 24
quantiles = [0.1, 0.5, 0.9]
season = ["24h"]

[model]
cell = "gru"
units = {plan.units}
path = "{(plan.out / "model").as_posix()}"

[training]
epochs = {plan.epochs}
seed = {plan.seed}
"""
