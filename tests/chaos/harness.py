"""Workers that are killed, moved and cut off from their brokers while readings flow; afterwards the oracle judges.

    models ─> brokers ─> topics ─> workers ─> load ─> first commits
                                                        │
                             storm: kills, swaps, rebalances, broker restarts and broker kills, in random order
                                                        │
    the rest of the readings ─> all of it committed ─> workers stop ─> oracle

Swaps are promotions of other models, made before (`tests.chaos.models`); workers find them by themselves.

Kills come in pairs: one worker dies at a random moment and comes back with an appointment (`--die-at`), which it keeps a little later;
then it comes back for good. Static members take their partitions back at once, dynamic ones leave theirs to the others until their
session has timed out. Every wait is bounded, and whatever was started is stopped.
"""

from __future__ import annotations

import os
import random
import signal
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final, Protocol

from pipeline.kafka import topics
from pipeline.kafka.broker import LocalBroker
from pipeline.settings import Settings, load
from tests.chaos.load import Load
from tests.chaos.models import load_models, make_model, make_variants, shape
from tests.chaos.oracle import judge
from tests.chaos.plan import ChaosPlan, ChaosReport
from tests.chaos.processes import Group, WorkerProcess
from tests.chaos.swaps import PROMOTE_SECONDS, Succession, pauses
from tests.chaos.worker import FAULTS, POINTS, SWAP_POINTS
from tests.helpers.cluster import JVM_OPTIONS, LocalCluster

PARTITIONS: Final = 6
STATIC_WORKERS: Final = 2
KEEP_VERSIONS: Final = 10
FIRST_COMMIT_SECONDS: Final = 120.0
SETTLED_SECONDS: Final = 10.0
"""Where nobody dies, pauses in output are measured: what workers catch up with and compile at their start is none of those."""
APPOINTMENT_SECONDS: Final = 60.0
"""How long a worker may take to come to the point where it is to die: start, assignment, some transactions."""
BROKER_AWAY_SECONDS: Final = (1.0, 8.0)
SESSION: Final = "6s"
PAUSE_SECONDS: Final = (7.0, 11.0)
NODE_AWAY_SECONDS: Final = (4.0, 9.0)
"""Beyond the six seconds of a broker's session, or within."""
CALM_SECONDS: Final = (0.5, 8.0)
"""Between two events: less than a worker takes to start, so that some meet it starting, and more, so that some meet it at work."""
DRAIN_SECONDS: Final = 180.0
STOP_SECONDS: Final = 40.0
GROWN_UP_SECONDS: Final = 20.0
"""Age at which a worker has long been started and has its partitions; a younger one may not even know SIGTERM yet."""
STARTS_IN_VAIN_SECONDS: Final = 60.0
MOST_FAILURES: Final = 3
TAKEOVER_SECONDS: Final = 60.0
"""From a promotion to the last partition; a worker that was just started, and partitions that are on their way, included."""
PROMOTE_AGAIN_SECONDS: Final = 15.0
"""Who is to die in a swap may have had none to make yet: it had no partition, or the champion already."""
SWAP_UNDER_WAY_SECONDS: Final = 5.0
"""Within this time after a promotion models are loaded, compiled, and have taken over."""
REPORT_EVERY_SECONDS: Final = 10.0


def run(plan: ChaosPlan, say: Callable[[str], None] = lambda line: None) -> ChaosReport:
    """Carries out the plan. Never raises for what goes wrong under way: the report has it."""
    started = time.monotonic()
    report = ChaosReport(plan)
    folder = plan.out or Path(tempfile.mkdtemp(prefix="millrace-chaos-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with ExitStack() as stack:
            _Chaos(plan, report, folder, say, stack).carry_out()
    except Exception as error:
        report.failures.append(f"{type(error).__name__}: {error}")
    report.seconds = time.monotonic() - started
    if plan.out is not None or not (report.found if plan.fault else report.ok):
        report.kept = folder
    else:
        _remove(folder)
    return report


class Brokers(Protocol):
    """One broker or several."""

    @property
    def bootstrap_servers(self) -> str: ...
    def start(self) -> Any: ...
    def stop(self) -> Any: ...


class _Chaos:
    """One run. `stack` ends whatever it starts."""

    def __init__(
        self, plan: ChaosPlan, report: ChaosReport, folder: Path, say: Callable[[str], None], stack: ExitStack
    ) -> None:
        self.plan, self.report, self.folder = plan, report, folder
        self._say, self._stack = say, stack
        self._random = random.Random(plan.seed)
        self._started = time.monotonic()
        self._reported = self._started
        self._workers: dict[str, WorkerProcess] = {}
        self._born = 0
        self._load: Load | None = None
        self._succession: Succession | None = None
        self._memory: list[dict[tuple[str, int], int]] = []
        """Bytes resident of each worker (name, pid), again and again."""
        self._broker_back_at: float | None = float("-inf")
        """When the last broker that was away came back; None: one is away."""

    def carry_out(self) -> None:
        model = self.plan.model or make_model(self.folder / "model")
        variants = (self.plan.variants or make_variants(self.folder / "variants")) if self.plan.swaps else ()
        self._brokers = self._start_brokers()
        self.settings = self._write_settings("oracle", model)
        topics.create(self.settings)
        self._group = self._stack.enter_context(Group(self.settings))
        if variants:
            self._succession = Succession(self._config("oracle"), [model, *variants])
            self._stack.callback(self._succession.close)
        self._stack.callback(self._kill_all)
        for number in range(self.plan.workers):
            self._add_worker(static=number < STATIC_WORKERS)
        self._start_load()
        self._until(self._group.has_committed_everywhere, FIRST_COMMIT_SECONDS, "a first commit of every partition")
        self._tell("the workers answer")
        if not self.plan.kills:
            self._calm(SETTLED_SECONDS)
        begun_ms = 1000 * time.time()
        self._storm()
        ended_ms = 1000 * time.time()
        self._send_the_rest()
        self._until(lambda: self._group.lag() == 0, DRAIN_SECONDS, "the group's offsets at the ends of the log")
        # A partition may be committed to its end, and its newest owner still be restoring it.
        self._until(self._all_grown_up, GROWN_UP_SECONDS + STOP_SECONDS, "workers that go on running")
        self._stop_workers()
        self._tell("the workers have stopped; the oracle reads")
        verdict = self.report.verdict = judge(self.settings, load_models([model, *variants]))
        self.report.pauses_in_output = pauses(verdict.committed, begun_ms, ended_ms)

    # -- what it needs

    def _start_brokers(self) -> Brokers:
        brokers: Brokers
        if self.plan.brokers == 1:
            # What makes a transaction of a dead worker end ten seconds later, not twenty.
            often = {"transaction.abort.timed.out.transaction.cleanup.interval.ms": "1000"}
            brokers = LocalBroker(self.folder / "broker", port=0, properties=often, jvm_options=JVM_OPTIONS)
        else:
            brokers = LocalCluster(self.folder / "brokers", self.plan.brokers)
        self._stack.callback(brokers.stop)
        brokers.start()
        self._tell(f"{self.plan.brokers} broker(s) at {brokers.bootstrap_servers}")
        return brokers

    def _write_settings(self, name: str, model: Path, instance: str = "") -> Settings:
        overrides = shape(model) | {
            "kafka.bootstrap_servers": self._brokers.bootstrap_servers,
            "kafka.session_timeout": SESSION,
            "kafka.transaction_timeout": "10s",
            "kafka.group_instance_id": instance,
            "topics.domain": "chaos",
            "topics.partitions": PARTITIONS,
            "topics.replication_factor": self.plan.brokers,
            "state.checkpoint_every": self.plan.checkpoint_every,
            "retraining.keep_versions": KEEP_VERSIONS,
        }
        path = self._config(name)
        path.write_text(_toml(overrides), encoding="utf-8")
        return load(path, {})

    def _config(self, name: str) -> Path:
        return self.folder / f"{name}.toml"

    def _start_load(self) -> None:
        per_second = self.plan.readings / self.plan.storm_seconds
        self._load = Load(self.settings, self.plan.sensors, self.plan.seed, per_second)
        self._stack.callback(self._load.stop)
        self._load.start()

    # -- workers

    def _add_worker(self, static: bool = False) -> None:
        self._born += 1
        name = f"{'static' if static else 'dynamic'}-{self._born}"
        self._write_settings(name, Path(self.settings.model.path), instance=name if static else "")
        self._start_worker(name)

    def _start_worker(self, name: str, death: str = "") -> None:
        log = self.folder / f"{name}.log"
        self._workers[name] = WorkerProcess(self._config(name), log, death, self.plan.fault)

    def _look_after_workers(self) -> None:
        """Starts again who died as appointed, and who died of itself: the latter is a failure."""
        for name, worker in list(self._workers.items()):
            if worker.status is None:
                continue
            if worker.kept_its_appointment:
                self.report.kills[worker.appointment] += 1
            elif worker.status == 1 and self._born_without_a_broker(worker):
                self.report.starts_in_vain += 1
            else:
                self._fail(f"{name} ended by itself with status {worker.status}", worker)
                if len(self.report.failures) > MOST_FAILURES:
                    raise RuntimeError("too many workers ended by themselves")
            self._start_worker(name)

    def _born_without_a_broker(self, worker: WorkerProcess) -> bool:
        """It was started while brokers were away, and said so and ended: whoever looks after it starts it again."""
        away = self._broker_back_at is None or time.monotonic() - worker.age_seconds < self._broker_back_at
        return away and "Error: " in worker.said() and worker.age_seconds < STARTS_IN_VAIN_SECONDS

    def _stop_workers(self) -> None:
        """All at once, politely: each makes its last checkpoint."""
        for worker in self._workers.values():
            worker.ask_to_stop()
        deadline = time.monotonic() + STOP_SECONDS
        for name, worker in self._workers.items():
            self._require_good_end(name, worker, deadline)
        self._workers.clear()

    def _require_good_end(self, name: str, worker: WorkerProcess, deadline: float) -> None:
        status = worker.wait(deadline - time.monotonic())
        unborn = status == -signal.SIGTERM and worker.age_seconds < GROWN_UP_SECONDS
        if status == 1 and self._born_without_a_broker(worker):
            self.report.starts_in_vain += 1
        elif status != 0 and not unborn:
            end = f"did not stop within {STOP_SECONDS:.0f} s" if status is None else f"stopped with status {status}"
            self._fail(f"{name} {end}", worker)
        worker.kill()

    def _fail(self, what: str, worker: WorkerProcess) -> None:
        self.report.failures.append(f"{what}; its last lines:\n    {worker.last_lines()}")

    def _all_grown_up(self) -> bool:
        return all(worker.age_seconds > GROWN_UP_SECONDS for worker in self._workers.values())

    def _some_grown_up(self) -> bool:
        return any(worker.age_seconds > GROWN_UP_SECONDS for worker in self._workers.values())

    def _kill_all(self) -> None:
        for worker in self._workers.values():
            worker.kill()

    # -- the storm

    def _storm(self) -> None:
        self._note_memory()
        for event in self._schedule():
            self._calm(self._random.uniform(*CALM_SECONDS))
            event()
        self._calm(CALM_SECONDS[1])
        self._note_memory()
        self.report.memory = self._memory_of_survivors() if self.plan.swaps else {}

    def _schedule(self) -> list[Callable[[], Any]]:
        plan = self.plan
        hasty = min(plan.swaps // 2, plan.kills // 2)
        events: list[Callable[[], Any]] = [self._kill_twice] * (plan.kills // 2 - hasty)
        events += [self._swap_and_kill] * hasty + [self._swap] * (plan.swaps - hasty)
        events += [self._kill_once] * (plan.kills % 2)
        events += [self._rebalance] * plan.rebalances + [self._restart_broker] * plan.broker_restarts
        events += [self._kill_broker] * plan.broker_kills + [self._pause] * plan.pauses
        self._random.shuffle(events)
        return events

    def _kill_once(self, death: str = "") -> str:
        """SIGKILL at a random moment; the worker is started again at once. Returns its name."""
        self._calm(self._random.random())
        name = self._random.choice(sorted(self._workers))
        self._workers[name].kill()
        self.report.kills["anywhere"] += 1
        self._start_worker(name, death)
        return name

    def _kill_twice(self) -> None:
        """At a random moment, and once more where the worker is told to die."""
        name = self._kill_once(self._appointment())
        second = self._workers[name]
        deadline = time.monotonic() + APPOINTMENT_SECONDS
        again = time.monotonic()
        while self._workers.get(name) is second and time.monotonic() < deadline:
            self._calm(0.2)
            if second.appointment in SWAP_POINTS and time.monotonic() >= again:
                self._promote()
                again = time.monotonic() + PROMOTE_AGAIN_SECONDS
        if self._workers.get(name) is second:
            # It lives, has partitions and readings, and commits nothing: a worker that hangs is as bad as one that ends.
            self._fail(f"{name} did not come to {second.appointment} within {APPOINTMENT_SECONDS:.0f} s", second)
            second.kill()
            self.report.kills["anywhere"] += 1
            self._start_worker(name)

    def _appointment(self) -> str:
        points = FAULTS[self.plan.fault].points if self.plan.fault else POINTS
        if self.plan.swaps and not self.plan.fault:
            points = (*SWAP_POINTS, *points)
        # In turn, so that a few dozen kills visit every point several times.
        point = points[self.report.kills.total() // 2 % len(points)]
        most = 1 if point in SWAP_POINTS else 4 if point == "mid-checkpoint" else 8
        return f"{point}:{self._random.randint(1, most)}"

    def _promote(self) -> str:
        """The next version becomes champion. Returns it."""
        assert self._succession is not None
        promotion = self._succession.promote_next()
        self._until(promotion.done, PROMOTE_SECONDS + 10.0, "a promotion")
        self.report.swaps += 1
        return promotion.result()

    def _swap(self) -> None:
        """Another model takes over everywhere."""
        assert self._succession is not None
        version, started = self._promote(), time.monotonic()
        while not self._succession.taken_over(version):
            if time.monotonic() > started + TAKEOVER_SECONDS:
                what = f"{version} did not take over in every partition within {TAKEOVER_SECONDS:.0f} s"
                self.report.failures.append(what)
                return
            self._watch()
        self.report.takeover_seconds.append(time.monotonic() - started)
        self._note_memory()

    def _swap_and_kill(self) -> None:
        """Nobody waits for the model: somebody dies while it is loaded, compiled, or takes over."""
        self._promote()
        self._calm(self._random.uniform(0.0, SWAP_UNDER_WAY_SECONDS))
        self._kill_twice()

    def _rebalance(self) -> None:
        """Two dynamic workers become one, or one two."""
        dynamic = sorted(name for name in self._workers if name.startswith("dynamic"))
        if len(dynamic) > max(1, self.plan.workers - STATIC_WORKERS):
            name = self._random.choice(dynamic)
            worker = self._workers.pop(name)
            worker.ask_to_stop()
            self._require_good_end(name, worker, time.monotonic() + STOP_SECONDS)
        else:
            self._add_worker()
        self.report.rebalances += 1

    def _pause(self) -> None:
        """One that works is stopped until the others have its partitions, and then wakes up in mid-sentence."""
        old = [name for name, worker in self._workers.items() if worker.age_seconds > GROWN_UP_SECONDS]
        if not old:
            self._until(self._some_grown_up, GROWN_UP_SECONDS + 10.0, "a worker that is at work")
            old = [name for name, worker in self._workers.items() if worker.age_seconds > GROWN_UP_SECONDS]
        worker = self._workers[self._random.choice(sorted(old))]
        worker.pause()
        try:
            self._calm(self._random.uniform(*PAUSE_SECONDS))
        finally:
            worker.go_on()
        self.report.pauses += 1

    def _restart_broker(self) -> None:
        broker = self._brokers
        assert isinstance(broker, LocalBroker)
        self._broker_back_at = None
        if self.report.broker_restarts % 2:
            _kill(broker)
        else:
            broker.stop()
        self._calm(self._random.uniform(*BROKER_AWAY_SECONDS))
        broker.start()
        self._broker_back_at = time.monotonic()
        self.report.broker_restarts += 1

    def _kill_broker(self) -> None:
        cluster = self._brokers
        assert isinstance(cluster, LocalCluster)
        node = self._random.choice(cluster.nodes)
        self._broker_back_at = None
        cluster.kill(node)
        self._calm(self._random.uniform(*NODE_AWAY_SECONDS))
        cluster.restart(node)
        self._broker_back_at = time.monotonic()
        self.report.broker_kills += 1

    # -- afterwards

    def _note_memory(self) -> None:
        self._memory.append({(name, one.pid): one.resident_bytes for name, one in self._workers.items()})

    def _memory_of_survivors(self) -> dict[str, list[int]]:
        survivors = set.intersection(*map(set, self._memory))
        return {name: [sizes[name, pid] for sizes in self._memory] for name, pid in sorted(survivors)}

    def _send_the_rest(self) -> None:
        assert self._load is not None
        self._load.hurry()
        load_, plan = self._load, self.plan
        seconds = 60.0 + plan.readings / 1000
        self._until(lambda: load_.sent >= plan.readings, seconds, f"{plan.readings:,} readings sent")
        load_.stop()
        if load_.failure is not None:
            raise load_.failure

    # -- time

    def _calm(self, seconds: float) -> None:
        """Lets time pass, and sees to it that everybody lives."""
        until = time.monotonic() + seconds
        while True:
            self._watch()
            if time.monotonic() >= until:
                return
            time.sleep(min(0.1, max(0.0, until - time.monotonic())))

    def _until(self, true: Callable[[], bool], seconds: float, what: str) -> None:
        deadline = time.monotonic() + seconds
        while not true():
            if time.monotonic() > deadline:
                lines = [f"{name}:\n    {worker.last_lines()}" for name, worker in self._workers.items()]
                raise TimeoutError(f"not within {seconds:.0f} s: {what} (lag {self._group.lag()})\n" + "\n".join(lines))
            self._calm(0.3)

    def _watch(self) -> None:
        self._look_after_workers()
        if self._load is not None and self._load.failure is not None:
            raise self._load.failure
        now = time.monotonic()
        if now - self._started > self.plan.deadline_seconds:
            raise TimeoutError(f"the whole did not end within {self.plan.deadline_seconds:.0f} s")
        if now - self._reported >= REPORT_EVERY_SECONDS:
            self._reported = now
            self._tell(self._progress())

    def _progress(self) -> str:
        plan, report = self.plan, self.report
        sent = self._load.sent if self._load else 0
        lag = self._group.lag()
        brokers = f"broker kills {report.broker_kills}/{plan.broker_kills}  " if plan.broker_kills else ""
        brokers += f"restarts {report.broker_restarts}/{plan.broker_restarts}  " if plan.broker_restarts else ""
        brokers += f"promotions {report.swaps}/{plan.swaps}  " if plan.swaps else ""
        return (
            f"kills {report.kills.total()}/{plan.kills}  rebalances {report.rebalances}/{plan.rebalances}  {brokers}"
            f"readings {sent:,}/{plan.readings:,}  lag {'unknown' if lag is None else f'{lag:,}'}  workers {len(self._workers)}"
        )

    def _tell(self, what: str) -> None:
        self._say(f"[{time.monotonic() - self._started:5.0f} s] {what}")


def _toml(values: dict[str, Any]) -> str:
    """{"kafka.group_id": "g"} as a file."""
    sections: dict[str, list[str]] = {}
    for key, value in values.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, []).append(f"{name} = {_toml_value(value)}")
    return "\n".join("\n".join([f"[{section}]", *lines]) for section, lines in sections.items()) + "\n"


def _toml_value(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml_value, value)) + "]"
    return f'"{value}"' if isinstance(value, str) else str(value)


def _kill(broker: LocalBroker) -> None:
    pid = broker.status().pid
    if pid is not None:
        os.kill(pid, signal.SIGKILL)
    if broker._process is not None:
        broker._process.wait(timeout=10.0)


def _remove(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder, ignore_errors=True)
