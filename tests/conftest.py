"""One real broker for all tests that need one, and the order in which tests run."""

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.broker import RunningBroker, broker_in_container, existing_cluster, local_broker

BROKER_KIND = "MILLRACE_TEST_BROKER"


@pytest.fixture(scope="session")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningBroker]:
    """A real Kafka broker; `.bootstrap_servers` is its address.

    MILLRACE_TEST_BROKER decides which: unset or `local`: the one of `millrace broker`, on a free port, in a temporary
    folder; `docker`: a container; `host:port`: a cluster that runs already, and goes on running.
    """
    kind = os.environ.get(BROKER_KIND, "") or "local"
    if kind == "local":
        yield from local_broker(Path(tmp_path_factory.mktemp("broker")))
    elif kind == "docker":
        yield from broker_in_container()
    elif ":" in kind:
        yield from existing_cluster(kind)
    else:
        raise pytest.UsageError(f"{BROKER_KIND}={kind}: expected local, docker or host:port")


@pytest.fixture
def domain() -> str:
    """A domain of topics that no other test uses: tests share the broker, never a topic."""
    return f"t{uuid.uuid4().hex[:12]}"


@pytest.hookimpl(tryfirst=True)  # before -m selects by marker
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what needs the broker, and lets it run last: what fails fast should fail first."""
    for item in items:
        if "broker" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.broker)
    items.sort(key=lambda item: item.get_closest_marker("broker") is not None)
