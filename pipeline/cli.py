"""The command line: a table of commands, each imported only when it is called, and one way for errors to end.

Exit status: 0 done, 1 failed, 2 wrong use or settings, 130 on Ctrl-C.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, Final, NoReturn

import click

from pipeline.errors import MillraceError, SettingsError

COMMANDS: Final = {
    "broker": ("pipeline.commands.broker:broker", "A local Kafka: start, stop, status, logs."),
    "topics": ("pipeline.commands.topics:topics", "The topics that the settings need: create, check."),
    "replay": ("pipeline.commands.replay:replay", "A file, or another topic, into the readings topic."),
    "train": ("pipeline.commands.train:train", "A model from history."),
    "run": ("pipeline.commands.run:run", "The service: readings in, forecasts out."),
    "backtest": (
        "pipeline.commands.backtest:backtest",
        "What the service would have said: from its topic or a file.",
    ),
    "forecast": ("pipeline.commands.forecast:forecast", "The next steps after a file's end."),
    "models": (
        "pipeline.commands.models:models",
        "Versions: list, show, promote, rollback, export, import.",
    ),
    "trainer": ("pipeline.commands.trainer:trainer", "Learning while it runs: retraining, gate, rollback."),
    "retrain": ("pipeline.commands.trainer:retrain", "Ask the trainer to learn again now."),
    "state": ("pipeline.commands.state:state", "Sensor states in the changelog: show, check, reset."),
    "watch": ("pipeline.commands.watch:watch", "Live in the terminal: recent values and forecast."),
    "config": ("pipeline.commands.config:config", "The settings in force: show, validate."),
    "demo": ("pipeline.commands.demo:demo", "Everything at once, on simulated sensors."),
}
"""Name -> where the command is, and its line in `millrace --help`, which must not import any of them."""

DONE, FAILED, WRONG_USE, INTERRUPTED = 0, 1, 2, 130


class LazyGroup(click.Group):
    """A group that knows its commands by name and imports one when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in COMMANDS and not args[0].startswith("-"):
            close = difflib.get_close_matches(args[0], COMMANDS, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"commands are {', '.join(COMMANDS)}"
            ctx.fail(f"no such command {args[0]!r}; {hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Run, and end with an exit status; `standalone_mode=False` lets errors through."""
        run: Callable[[], Any] = functools.partial(
            super().main, args, prog_name, complete_var, standalone_mode=False, **extra
        )
        if not standalone_mode:
            return run()
        try:
            status = run()
        except click.Abort:
            _end("stopped", INTERRUPTED)
        except click.ClickException as error:
            error.show()
            sys.exit(error.exit_code)
        except SettingsError as error:
            _end(f"Error: {error}", WRONG_USE)
        except MillraceError as error:
            _end(f"Error: {error}", FAILED)
        except Exception as error:
            if isinstance(error, OSError) and error.filename is not None:
                # The system refuses a path that the user named: no bug, and nothing that a traceback would explain.
                _end(
                    f"Error: cannot use {str(error.filename)!r}: {error.strerror}; check the path and its rights",
                    FAILED,
                )
            _end(f"Error: {type(error).__name__}: {error} (a bug in Millrace: -v shows where)", FAILED)
        sys.exit(status if isinstance(status, int) else DONE)


def _end(message: str, status: int) -> NoReturn:
    click.echo(message, err=True)
    sys.exit(status)


def _print_version(ctx: click.Context, _parameter: click.Parameter, wanted: bool) -> None:
    if not wanted or ctx.resilient_parsing:
        return
    from importlib.metadata import PackageNotFoundError, version

    try:
        click.echo(f"millrace {version('millrace')}")
    except PackageNotFoundError:
        click.echo("millrace (a checkout that is not installed)")
    ctx.exit()


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option(
    "--version", is_flag=True, expose_value=False, is_eager=True, callback=_print_version, help="Show the version."
)
def main() -> None:
    """Topics of sensor readings in, topics of probabilistic forecasts out."""


if __name__ == "__main__":
    main()
