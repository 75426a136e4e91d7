"""`millrace broker start|stop|status|logs`: a local Kafka on loopback. Needs no settings, only Java and, once, Maven."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.commands.common import CommandContext, with_context

if TYPE_CHECKING:
    from pipeline.kafka.broker import BrokerStatus, LocalBroker

_DATA_DIR = click.option(
    "--data-dir",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path(".millrace/broker"),
    show_default=True,
    metavar="DIR",
    help="Where the broker keeps its topics, ports and log.",
)
_PORT = click.option(
    "--port",
    type=click.IntRange(0, 65_535),
    metavar="P",
    help="Port for clients on 127.0.0.1; 0: a free one. [default: the one used last, else 9092]",
)


@click.group()
def broker() -> None:
    """A local Kafka on loopback, for trying things out."""


@broker.command()
@_PORT
@_DATA_DIR
@with_context
def start(context: CommandContext, port: int | None, data_dir: Path) -> None:
    """Start the broker, and return when it answers. The first start fetches Kafka's jars through Maven."""
    local = _local_broker(data_dir, port)
    if local.status().running:
        context.note("The broker runs already.")
    else:
        context.note(f"Starting Kafka {local.status().version} in {local.data_dir} …")
    context.emit([_row(local.start())])


@broker.command()
@_PORT
@_DATA_DIR
@with_context
def stop(context: CommandContext, port: int | None, data_dir: Path) -> None:
    """Stop the broker. Its topics stay in the data folder."""
    local = _local_broker(data_dir, port)
    context.note("The broker has stopped." if local.stop() else f"No broker runs in {local.data_dir}.")
    context.emit([_row(local.status())])


@broker.command()
@_PORT
@_DATA_DIR
@with_context
def status(context: CommandContext, port: int | None, data_dir: Path) -> None:
    """Whether the broker runs, its pid and address, its data folder and version."""
    context.emit([_row(_local_broker(data_dir, port).status())])


@broker.command()
@_PORT
@_DATA_DIR
@click.option("-n", "--lines", type=click.IntRange(min=0), default=50, show_default=True, help="How many lines.")
@click.option("-f", "--follow", is_flag=True, help="New lines as they come, until the broker stops.")
@with_context
def logs(context: CommandContext, port: int | None, data_dir: Path, lines: int, follow: bool) -> None:
    """The last lines of the broker's log."""
    local = _local_broker(data_dir, port)
    if not local.log_path.is_file():
        context.note(f"No broker was ever started in {local.data_dir}, so there is no log.")
    for line in local.follow(lines) if follow else local.logs(lines):
        click.echo(line)


def _local_broker(data_dir: Path, port: int | None) -> LocalBroker:
    from pipeline.kafka.broker import LocalBroker  # imports the Kafka client, which `--help` can do without

    return LocalBroker(data_dir, port)


def _row(status: BrokerStatus) -> dict[str, Any]:
    return {
        "state": "running" if status.running else "stopped",
        "pid": status.pid,
        "address": status.address,
        "data_dir": str(status.data_dir),
        "version": status.version,
    }
