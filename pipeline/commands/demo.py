"""`millrace demo`: everything at once, on simulated sensors."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.commands.common import CommandContext, CommandError, with_context

if TYPE_CHECKING:
    from pipeline.service.demo import DemoReport

HOUR_MS = 3_600_000


@click.command()
@click.option("--sensors", type=click.IntRange(1, 100_000), default=200, show_default=True, help="Simulated sensors.")
@click.option("--weeks", type=click.IntRange(1, 52), default=3, show_default=True, help="History to learn from.")
@click.option(
    "--hours", type=click.IntRange(30, 1_000), default=96, show_default=True, help="Event time streamed live."
)
@click.option(
    "--seconds", type=click.FloatRange(5, 3_600), default=40, show_default=True, help="Wall time for the live stretch."
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="The same seed, the same fleet.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("demo-out"),
    show_default=True,
    metavar="DIR",
    help="Picture, page, settings, model and logs.",
)
@click.option("--keep", is_flag=True, help="Leave the broker running, with everything in it.")
@with_context
def demo(
    context: CommandContext, sensors: int, weeks: int, hours: int, seconds: float, seed: int, out: Path, keep: bool
) -> None:
    """Stream a simulated fleet through a real broker, train, serve, kill the worker, go on, and account for everything.

    Takes about two minutes, ends by itself or on Ctrl-C, and stops what it started. With --bootstrap-servers it uses
    that cluster, in topics of its own, instead of starting a broker. Other settings are the demo's own."""
    from pipeline.service.demo import DemoPlan, run_demo
    from pipeline.service.narrator import Narrator

    servers = context.overrides.get("kafka.bootstrap_servers", "")
    now_ms = time.time_ns() // 1_000_000
    plan = DemoPlan(
        ends_at_ms=now_ms // HOUR_MS * HOUR_MS,
        out=out,
        sensors=sensors,
        history_days=7 * weeks,
        live_hours=hours,
        live_seconds=seconds,
        seed=seed,
        keep=keep,
        bootstrap_servers=servers,
        domain=f"demo-{now_ms // 1000}" if servers else "demo",
    )
    interrupt = _Interrupt()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    report, interrupted = run_demo(plan, Narrator(), interrupt.check)
    _show(context, report)
    if keep:
        _how_to_go_on(context, out, report)
    if interrupted:
        sys.exit(130)
    if report.mistakes:
        raise CommandError("what came out is not what was sent:\n  " + "\n  ".join(report.mistakes))


class _Interrupt:
    """Ctrl-C and SIGTERM: raised at once, and again at the next `check`, because what is raised in the middle of a library's own
    clean-up may be swallowed there."""

    def __init__(self) -> None:
        self._came = False

    def __call__(self, *_: object) -> None:
        self._came = True
        raise KeyboardInterrupt

    def check(self) -> None:
        if self._came:
            raise KeyboardInterrupt


def _show(context: CommandContext, report: DemoReport) -> None:
    if context.format == "json":
        names = (
            "complete",
            "summary",
            "counts",
            "repeats",
            "statuses",
            "scores",
            "memory",
            "out_of_sequence",
            "stages",
            "files",
        )
        context.emit([{name: getattr(report, name) for name in names}])
        return
    tables: list[tuple[str, list[dict[str, Any]]]] = [
        ("Sent and seen", report.counts),
        ("Who answered", report.statuses),
        ("State across kill -9", report.memory),
        ("How far off, on the streamed part", report.scores),
        ("Time", report.stages),
    ]
    for title, rows in tables:
        if rows:
            context.emit(rows, title=title)
    if report.summary:
        context.note(report.summary)
    if report.complete:
        context.note(
            f"{report.repeats:,} messages committed twice, {report.out_of_sequence} forecasts out of sequence."
        )
    for file in report.files:
        context.note(f"  {file}")


def _how_to_go_on(context: CommandContext, out: Path, report: DemoReport) -> None:
    config = out / "millrace.toml"
    context.note(
        f"The broker is still running. Go on with:\n"
        f"  millrace run --config {config}\n"
        f"  millrace watch --config {config}\n"
        f"and in the end:\n  millrace broker stop --data-dir {report.kept_broker}"
        if report.kept_broker
        else f"The topics stay. Go on with:\n  millrace run --config {config}\n  millrace watch --config {config}"
    )
