"""`millrace …` with something done to it from outside: a death at a chosen instant, or a planted fault.

    python -m tests.chaos.worker [--die-at POINT:N] [--fault NAME] -- run --config FILE

The product has no hooks for this. The steps of `TransactionalSink` are wrapped on the class before the command starts:

    begin ─── send ─── flush ─── offsets ─── commit
          │    │  │         │           │     │    │
          │    │  │    after-flush      │     │  after-commit      the answer has come
          │    │  mid-checkpoint        │   mid-commit             the request is on its way
          │   mid-send             after-offsets
       after-begin

Two more are points of a transaction in which a model takes over: mid-swap (forecasts and the swap record are sent, its checkpoint is
not) and after-swap-commit.
"""

from __future__ import annotations

import argparse
import atexit
import itertools
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final, NoReturn

from pipeline.stream.columns import OutgoingRecords

FORECASTS, STATE, MODELS = ".forecasts.v1", ".state.v1", ".models.v1"
"""How the names of these topics end."""
STEPS: Final = ("_begin", "_send", "_flush", "_send_offsets", "_commit")
AFTER: Final = {
    "after-begin": "_begin",
    "after-flush": "_flush",
    "after-offsets": "_send_offsets",
    "after-commit": "_commit",
    "after-swap-commit": "_commit",
}
POINTS: Final = (
    "after-begin",
    "mid-send",
    "mid-checkpoint",
    "after-flush",
    "after-offsets",
    "mid-commit",
    "after-commit",
)
SWAP_POINTS: Final = ("mid-swap", "after-swap-commit")
COMMIT_UNDER_WAY_SECONDS: Final = 0.010
"""A commit takes about as long, so that a death within is before, during or just after it."""
DEATH: Final = "chaos: dies at "
"""What a worker writes before its chosen death; the point follows."""

Batches = Sequence[OutgoingRecords]


# -- deaths


def die(point: str) -> NoReturn:
    """As a power cut: no handler runs, nothing is flushed or told to anybody."""
    os.write(2, f"\n{DEATH}{point}\n".encode())
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("SIGKILL came back")


def die_at(sink: type, point: str, nth: int, die: Callable[[str], Any] = die) -> None:
    """Wraps the steps of `sink` so that the process dies when it comes to `point` for the nth time (from 1).

    Only transactions with forecasts in them count, except in mid-checkpoint: most have none, and a death in those proves
    little. In SWAP_POINTS only those count in which a model takes over."""
    visits = itertools.count(1)
    counts = _note(sink, MODELS if point in SWAP_POINTS else FORECASTS)

    def is_time() -> bool:
        return (counts() or point == "mid-checkpoint") and next(visits) == nth

    def last_words() -> None:
        die(point)

    if point in AFTER:
        _die_after(sink, AFTER[point], is_time, last_words)
    elif point == "mid-commit":
        _die_in_commit(sink, is_time, last_words)
    elif point == "mid-send":
        _die_in_send(sink, _have_records, first_half, is_time, last_words)
    elif point == "mid-checkpoint":
        _die_in_send(sink, _have_checkpoint, up_to_half_a_checkpoint, is_time, last_words)
    elif point == "mid-swap":
        _die_in_send(sink, _have_records, all_but_checkpoints, is_time, last_words)
    else:
        raise ValueError(f"{point!r}: expected one of {', '.join((*POINTS, *SWAP_POINTS))}")


def _note(sink: Any, topic: str) -> Callable[[], bool]:
    """Whether the transaction under way has records of a topic whose name ends so."""
    commit, found = sink.commit, [False]

    def commit_and_note(self: Any, batches: Batches, *arguments: Any) -> Any:
        found[0] = any(batch.topic.endswith(topic) and len(batch) for batch in batches)
        return commit(self, batches, *arguments)

    sink.commit = commit_and_note
    return lambda: found[0]


def _die_after(sink: Any, step: str, is_time: Callable[[], bool], die: Callable[[], None]) -> None:
    original = getattr(sink, step)

    def step_then_die(self: Any, *arguments: Any) -> Any:
        result = original(self, *arguments)
        if is_time():
            die()
        return result

    setattr(sink, step, step_then_die)


def _die_in_commit(sink: Any, is_time: Callable[[], bool], die: Callable[[], None]) -> None:
    commit = sink._commit

    def die_meanwhile(self: Any, *arguments: Any) -> Any:
        if is_time():
            threading.Thread(target=commit, args=(self, *arguments), daemon=True).start()
            time.sleep(random.uniform(0.0, COMMIT_UNDER_WAY_SECONDS))
            die()
        return commit(self, *arguments)

    sink._commit = die_meanwhile


def _die_in_send(
    sink: Any,
    applies: Callable[[Batches], bool],
    part: Callable[[Batches], list[OutgoingRecords]],
    is_time: Callable[[], bool],
    die: Callable[[], None],
) -> None:
    """What was sent until then is on the broker, in a transaction that nobody will end."""
    send = sink._send

    def send_a_part(self: Any, batches: Batches) -> Any:
        if applies(batches) and is_time():
            send(self, part(batches))
            self._flush()
            die()
        return send(self, batches)

    sink._send = send_a_part


def _have_records(batches: Batches) -> bool:
    return any(len(batch) for batch in batches)


def _have_checkpoint(batches: Batches) -> bool:
    return any(batch.topic.endswith(STATE) for batch in batches)


def first_half(batches: Batches) -> list[OutgoingRecords]:
    """The first half of the batches; of a single one, the first half of its records."""
    if len(batches) == 1:
        return [_head(batches[0], (len(batches[0]) + 1) // 2)]
    return list(batches[: len(batches) // 2])


def up_to_half_a_checkpoint(batches: Batches) -> list[OutgoingRecords]:
    """Everything but the second half of the last checkpoint, the manifest at its end among it."""
    *whole, last = [batch for batch in batches if batch.topic.endswith(STATE)]
    others = [batch for batch in batches if not batch.topic.endswith(STATE)]
    return [*others, *whole, *first_half([last])]


def all_but_checkpoints(batches: Batches) -> list[OutgoingRecords]:
    """Forecasts, scores and swap records, and nothing of the states that they stand on."""
    return [batch for batch in batches if not batch.topic.endswith(STATE)]


def _head(batch: OutgoingRecords, rows: int) -> OutgoingRecords:
    return replace(
        batch,
        keys=batch.keys[:rows],
        values=batch.values[:rows],
        headers=None if batch.headers is None else batch.headers[:rows],
        timestamps_ms=None if batch.timestamps_ms is None else batch.timestamps_ms[:rows],
    )


# -- planted faults


class Target:
    """What a fault may put its hands on. Made before any death is installed."""

    def __init__(self, sink: Any, config: Path) -> None:
        self.sink = sink
        self.config = config
        self.original = {step: getattr(sink, step) for step in STEPS}
        """The steps as the product has them."""

    @cached_property
    def plain_sink(self) -> Any:
        """Sends outside of any transaction."""
        from pipeline.kafka.sink import RecordSink
        from pipeline.settings import load

        sink = RecordSink(load(self.config, {}))
        atexit.register(sink.close)
        return sink


@dataclass(frozen=True, slots=True)
class Fault:
    """A defect that somebody might make."""

    plant: Callable[[Target], None]
    symptom: str
    """What the oracle must find, one of `Verdict.symptoms`."""
    points: tuple[str, ...] = POINTS
    """Deaths that bring it to light."""
    swaps: int = 0
    """Models that must take over meanwhile, for it to show."""


def send_outside(target: Target) -> None:
    """Forecasts go out through a producer of their own: what an aborted transaction said stays said."""
    send = target.sink._send

    def send_forecasts_outside(self: Any, batches: Batches) -> Any:
        target.plain_sink.deliver([batch for batch in batches if batch.topic.endswith(FORECASTS)])
        return send(self, [batch for batch in batches if not batch.topic.endswith(FORECASTS)])

    target.sink._send = send_forecasts_outside


def forget_hidden(_: Target) -> None:
    """A restored sensor begins with an empty hidden state."""
    from pipeline.stream.state import SensorTable

    restore = SensorTable.restore

    def restore_all_but_hidden(self: Any, snapshot: Any) -> None:
        hidden = snapshot.rows.get("rnn.hidden")
        rows = snapshot.rows if hidden is None else snapshot.rows | {"rnn.hidden": hidden * 0}
        restore(self, replace(snapshot, rows=rows))

    SensorTable.restore = restore_all_but_hidden  # type: ignore[method-assign]


def commit_early(target: Target) -> None:
    """Offsets first, in a transaction of their own; forecasts and checkpoint in the next."""
    held: list[Batches] = []
    commit = target.sink._commit

    def hold_back(self: Any, batches: Batches) -> None:
        held[:] = [batches]

    def commit_then_send(self: Any, *arguments: Any) -> Any:
        result = commit(self, *arguments)
        batches, original = held.pop(), target.original
        original["_begin"](self)
        original["_send"](self, batches)
        original["_flush"](self)
        original["_commit"](self)
        return result

    target.sink._send, target.sink._commit = hold_back, commit_then_send


def emit_replay(_: Target) -> None:
    """The replay between checkpoint and committed offset is not silent."""
    from pipeline.stream.task import ForecastTask

    run = ForecastTask.run

    def run_aloud(self: Any, records: Any) -> Any:
        emit_from, self.emit_from = self.emit_from, 0
        try:
            return run(self, records)
        finally:
            self.emit_from = emit_from

    ForecastTask.run = run_aloud  # type: ignore[method-assign]


def forget_at_swap(_: Target) -> None:
    """A model that takes over begins with empty hidden states."""
    from pipeline.stream.forecasting import Forecasting

    swap = Forecasting.swap

    def swap_and_forget(self: Any, model: Any, table: Any, *arguments: Any) -> None:
        swap(self, model, table, *arguments)
        if "rnn.hidden" in table.columns:
            table["rnn.hidden"][:] = 0

    Forecasting.swap = swap_and_forget  # type: ignore[method-assign]


def swap_without_checkpoint(_: Target) -> None:
    """A swap demands no checkpoint: answers of the new model go out while the changelog still holds states of the old one."""
    from pipeline.stream.checkpoint import CheckpointPolicy

    CheckpointPolicy.demand = lambda self, now_ms: None  # type: ignore[method-assign]


def swap_unrecorded(_: Target) -> None:
    """Where a model takes over from another is written down nowhere."""
    from pipeline.service.serving import Serving

    swap = Serving.swap

    def swap_in_silence(self: Any, *arguments: Any) -> None:
        before = self.task.version
        swap(self, *arguments)
        if before:
            self._made.pop()

    Serving.swap = swap_in_silence  # type: ignore[method-assign]


FAULTS: Final = {
    "outside": Fault(send_outside, "repeated", ("after-flush", "after-offsets")),
    "forgets-hidden": Fault(forget_hidden, "different"),
    "commits-early": Fault(commit_early, "lost", ("after-commit",)),
    "emits-replay": Fault(emit_replay, "repeated"),
    "swap-forgets": Fault(forget_at_swap, "different", swaps=2),
    "swap-without-checkpoint": Fault(swap_without_checkpoint, "taken over twice", ("after-swap-commit",), swaps=2),
    "swap-unrecorded": Fault(swap_unrecorded, "different", ("after-commit",), swaps=2),
}
"""Name -> what is wrong, and how it must show."""


def intervene(sink: Any, config: Path, death: str, fault: str) -> None:
    """Installs what is asked for, the death innermost: a fault that does more in one step can be cut short within it."""
    target = Target(sink, config)
    if death:
        point, _, nth = death.partition(":")
        die_at(sink, point, int(nth))
    if fault:
        FAULTS[fault].plant(target)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--die-at", default="", metavar="POINT:N")
    parser.add_argument("--fault", default="", choices=["", *FAULTS])
    parser.add_argument("command", nargs=argparse.REMAINDER)
    given = parser.parse_args(arguments)
    command = given.command[given.command[:1] == ["--"] :]
    if given.die_at or given.fault:
        from pipeline.kafka.transactions import TransactionalSink

        intervene(TransactionalSink, Path(command[command.index("--config") + 1]), given.die_at, given.fault)
    from pipeline.cli import main as millrace

    sys.argv[0] = "millrace"
    millrace(command)


if __name__ == "__main__":
    main()
