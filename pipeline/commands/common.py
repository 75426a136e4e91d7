"""What all commands share: four flags, the settings they lead to, and three ways to speak.

Tables go to standard output, progress and notes to standard error, so that `millrace … --format json | jq` just works.

    @click.command()
    @click.argument("sensor")
    @with_context
    def watch(context: CommandContext, sensor: str) -> None:
"""

from __future__ import annotations

import functools
import json
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn

    from pipeline.settings import Settings

R = TypeVar("R")


class CommandError(click.ClickException):
    """The command failed, and the message says how to mend it. Exit status 1."""

    exit_code = 1


class CommandContext:
    """What a command is given: settings on demand, and where to speak."""

    def __init__(
        self,
        config: Path | None = None,
        overrides: Mapping[str, Any] | None = None,
        format: str = "text",
        verbose: bool = False,
    ) -> None:
        self.config = config
        self.overrides = dict(overrides or {})
        """Settings that flags say: TOML key -> value. A command may add its own before it first asks for `settings`."""
        self.format = format
        self.verbose = verbose

    @functools.cached_property
    def settings(self) -> Settings:
        """Loaded on first use. SettingsError ends the command with exit status 2."""
        from pipeline.settings import load

        return load(self.config, overrides=self.overrides)

    def note(self, message: str) -> None:
        """One line for a person, on standard error."""
        click.echo(message, err=True)

    def emit(self, rows: Sequence[Mapping[str, Any]], title: str = "") -> None:
        """Rows of one shape on standard output: a table, or with --format json one document, a list of objects."""
        if self.format == "json":
            import orjson

            options = orjson.OPT_INDENT_2 | orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS
            click.echo(orjson.dumps(list(rows), option=options).decode())
        else:
            _print_table(rows, title)

    def progress(self, *columns: ProgressColumn) -> Progress:
        """A progress bar on standard error; a context manager. Without columns: what, bar, m of n, time left."""
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        usual = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        return Progress(*(columns or usual), console=Console(stderr=True))


def _print_table(rows: Sequence[Mapping[str, Any]], title: str) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    # A pipe has no width: wide enough that nothing is cut.
    console = Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else 400)
    table = Table(title=title or None, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    for name in columns:
        numeric = bool(rows) and all(isinstance(row.get(name), int | float) for row in rows)
        table.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(_cell(row.get(name)) for name in columns))
    console.print(table)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool | list | tuple | dict):
        return json.dumps(value)
    return f"{value:.6g}" if isinstance(value, float) else str(value)


_SHARED: Final = (
    click.Option(
        ["--config"],
        type=click.Path(path_type=Path, dir_okay=False),
        metavar="FILE",
        help="Settings; else MILLRACE_CONFIG, else ./millrace.toml.",
    ),
    click.Option(["--bootstrap-servers"], metavar="HOST:PORT", help="Brokers, instead of the settings'."),
    click.Option(
        ["--format"], type=click.Choice(["text", "json"]), default="text", show_default=True, help="What is printed."
    ),
    click.Option(["-v", "--verbose"], is_flag=True, help="More in the log; tracebacks of errors."),
)


def with_context(command: Callable[..., R]) -> Callable[..., R]:
    """Add the shared flags to a command; its function gets a CommandContext first, and a log on standard error.

    Stands right below `@click.command()`, or anywhere among its options."""

    @functools.wraps(command)
    def call(*args: Any, **kwargs: Any) -> R:
        config, servers = kwargs.pop("config"), kwargs.pop("bootstrap_servers")
        overrides = {"kafka.bootstrap_servers": servers} if servers is not None else {}
        context = CommandContext(config, overrides, kwargs.pop("format"), kwargs.pop("verbose"))
        set_up_logging(context.verbose)
        try:
            return command(context, *args, **kwargs)
        except (click.exceptions.Exit, click.Abort):
            raise
        except Exception:
            if context.verbose:
                traceback.print_exc()
            raise

    # click reads this list from its end: the shared flags come last in the help.
    own = list(getattr(call, "__click_params__", ()))
    call.__click_params__ = [*reversed(_SHARED), *own]  # type: ignore[attr-defined]
    return call


class StopSignals:
    """SIGTERM and Ctrl-C ask a service to stop, from the moment this is made."""

    def __init__(self) -> None:
        self.asked = threading.Event()
        self._interrupted = False
        signal.signal(signal.SIGTERM, lambda *_: self.asked.set())
        signal.signal(signal.SIGINT, self._interrupt)

    def leave(self) -> None:
        """Call when everything is closed: after Ctrl-C the exit status is 130."""
        if self._interrupted:
            raise SystemExit(130)

    def _interrupt(self, *_: object) -> None:
        self._interrupted = True
        self.asked.set()


def set_up_logging(verbose: bool) -> None:
    """Logs on standard error: our own from INFO on, the libraries' warnings; with `verbose` ours from DEBUG on."""
    logging.basicConfig(
        level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s", handlers=[_StandardError()]
    )
    logging.getLogger("pipeline").setLevel(logging.DEBUG if verbose else logging.INFO)
    logging.getLogger("models").setLevel(logging.DEBUG if verbose else logging.INFO)
    # The Kafka client logs each retry, ten a second, as an error; what matters reaches people as an error of ours.
    logging.getLogger("kafka").setLevel(logging.INFO if verbose else logging.CRITICAL)
    if not verbose:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


class _StandardError(logging.Handler):
    """Writes to whatever standard error is at that moment: a progress bar puts itself there, and lets lines pass above it."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr, flush=True)


class Instant(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """A point in time, to epoch ms: ISO 8601 (UTC unless it says otherwise), epoch seconds or milliseconds."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        try:
            return parse_instant(value)
        except ValueError:
            self.fail(
                f"{value!r}: expected a time such as 2026-01-31, 2026-01-31T12:00:00+01:00 or epoch seconds", param, ctx
            )


def parse_instant(text: str) -> int:
    """Text to epoch ms; ValueError for anything else.

    >>> parse_instant("2016-07-01"), parse_instant("2016-07-01 02:00+02:00"), parse_instant("1467331200")
    (1467331200000, 1467331200000, 1467331200000)
    """
    try:
        number = float(text)
    except ValueError:
        moment = datetime.fromisoformat(text.strip())
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=UTC)
        return round(moment.timestamp() * 1000)
    # As readings do: below 1e11 it is epoch seconds (until the year 5138), above it is milliseconds.
    return round(number * 1000 if abs(number) < 1e11 else number)


INSTANT: Final = Instant()
