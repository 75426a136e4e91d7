"""The command line: what it loads, what it says, how it ends."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from pipeline import cli
from pipeline.commands.common import CommandContext, CommandError, parse_instant, with_context
from pipeline.errors import DeploymentError

REPOSITORY = Path(__file__).parents[2]
HEAVY = ["numpy", "pandas", "pyarrow", "tensorflow", "keras", "kafka", "rich", "msgspec", "matplotlib"]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No millrace.toml and no variable of whoever runs the tests."""
    monkeypatch.chdir(tmp_path)
    for name in os.environ:
        if name.startswith("MILLRACE_"):
            monkeypatch.delenv(name)


def millrace(*args: str) -> Result:
    return CliRunner().invoke(cli.main, args)


def modules_after(statement: str) -> set[str]:
    """The modules that a fresh interpreter holds after a statement."""
    script = f"import sys\ntry:\n    {statement}\nexcept SystemExit: pass\nprint('\\n' + ' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


def test_help_names_every_command_and_loads_none():
    loaded = modules_after("import pipeline.cli; pipeline.cli.main(['--help'])")
    assert not loaded & set(HEAVY)
    assert not [name for name in loaded if name.startswith("pipeline.commands")]
    result = millrace("--help")
    assert result.exit_code == 0
    for name, (_, line) in cli.COMMANDS.items():
        assert name in result.stdout
        assert line in result.stdout


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_the_help_of_a_command_needs_neither_tensorflow_nor_kafka(command):
    loaded = modules_after(f"import pipeline.cli; pipeline.cli.main(['{command}', '--help'])")
    assert cli.COMMANDS[command][0].partition(":")[0] in loaded
    assert not loaded & {"tensorflow", "keras", "kafka", "numpy", "pandas"}


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_and_its_subcommands_take_the_shared_flags(command):
    module, _, attribute = cli.COMMANDS[command][0].partition(":")
    found = getattr(importlib.import_module(module), attribute)
    for leaf in found.commands.values() if isinstance(found, click.Group) else [found]:
        flags = {flag for parameter in leaf.params for flag in parameter.opts}
        assert {"--config", "--bootstrap-servers", "--format", "-v"} <= flags


def test_the_version_is_that_of_the_package():
    from importlib.metadata import version

    assert millrace("--version").stdout == f"millrace {version('millrace')}\n"


def test_a_misspelt_command_is_offered_the_nearest():
    result = millrace("rpelay")
    assert result.exit_code == 2
    assert "did you mean 'replay'?" in result.stderr


def test_wrong_settings_end_with_status_2_one_line_and_no_traceback(tmp_path):
    Path("millrace.toml").write_text('[windows]\nsize = "1 fortnight"\n')
    result = millrace("config", "validate")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert 'windows.size = "1 fortnight" (millrace.toml)' in result.stderr
    assert "Traceback" in millrace("config", "validate", "-v").stderr


def test_right_settings_end_with_status_0():
    assert millrace("config", "validate").exit_code == 0


def test_config_show_says_where_each_value_came_from(monkeypatch):
    Path("mine.toml").write_text('[windows]\nsize = "5m"\n[kafka]\nssl_password = "s3cret"\n')
    monkeypatch.setenv("MILLRACE_FORECAST__HORIZON", "12")
    result = millrace("config", "show", "--config", "mine.toml", "--format", "json", "--bootstrap-servers", "b:9")
    assert result.exit_code == 0
    assert "s3cret" not in result.output
    rows = {row["key"]: (row["value"], row["source"]) for row in json.loads(result.stdout)}
    assert rows["windows.size"] == ("5m", "mine.toml")
    assert rows["forecast.horizon"] == (12, "MILLRACE_FORECAST__HORIZON")
    assert rows["kafka.bootstrap_servers"] == ("b:9", "--bootstrap-servers")
    assert rows["model.cell"] == ("gru", "default")


def test_config_show_ends_with_what_the_state_of_one_sensor_takes_in_each_profile():
    from pipeline.service.assembly import bytes_by_profile, bytes_per_sensor
    from pipeline.settings import Settings

    last = json.loads(millrace("config", "show", "--format", "json").stdout)[-3:]
    expected = bytes_by_profile(Settings())
    assert [row["key"] for row in last] == [f"(state, bytes per sensor: {profile})" for profile in expected]
    assert list(expected) == ["base", "lean", "accuracy"]
    assert [row["value"] for row in last] == list(expected.values())
    assert last[0]["value"] == sum(bytes_per_sensor(Settings()).values()) < last[1]["value"] < last[2]["value"]
    assert [row["source"] for row in last] == ["computed, in force", "computed", "computed"]


def test_a_table_in_a_pipe_is_not_cut():
    result = millrace("config", "show", "--bootstrap-servers", ",".join(f"broker-{n}.example:9092" for n in range(9)))
    line = next(line for line in result.stdout.splitlines() if "bootstrap_servers" in line)
    assert "broker-0.example" in line
    assert "broker-8.example:9092" in line


def ending(error: BaseException, *args: str) -> Result:
    """How the command line ends when a command ends with this error."""

    class OneCommand(cli.LazyGroup):
        def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command:
            return run

    @click.command()
    @with_context
    def run(context: CommandContext) -> None:
        raise error

    return CliRunner().invoke(OneCommand("millrace"), ["run", *args])


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (DeploymentError("no broker"), 1, "Error: no broker"),
        (CommandError("no file"), 1, "Error: no file"),
        (click.UsageError("no such thing"), 2, "Error: no such thing"),
        (KeyboardInterrupt(), 130, "stopped"),
        (SystemExit(130), 130, ""),
        (PermissionError(13, "Permission denied", "model"), 1, "cannot use 'model': Permission denied; check the path"),
        (OSError("no path"), 1, "OSError: no path (a bug in Millrace"),
        (ZeroDivisionError("division by zero"), 1, "ZeroDivisionError: division by zero (a bug in Millrace"),
    ],
)
def test_each_kind_of_error_has_its_exit_status_and_no_traceback(error, status, words):
    result = ending(error)
    assert result.exit_code == status
    assert words in result.stderr
    assert "Traceback" not in result.stderr


def test_verbose_shows_where_an_error_came_from():
    assert "Traceback" in ending(DeploymentError("no broker"), "-v").stderr


@pytest.mark.parametrize(
    "text", ["2016-07-01", "2016-07-01T02:00:00+02:00", "2016-07-01 00:00:00Z", "1467331200", "1467331200000"]
)
def test_a_point_in_time_is_iso_8601_or_an_epoch(text):
    assert parse_instant(text) == 1_467_331_200_000


def test_a_point_in_time_that_is_none_is_wrong_use():
    result = millrace("replay", __file__, "--from", "yesterday")
    assert result.exit_code == 2
    assert "'yesterday': expected a time such as 2026-01-31" in result.stderr
