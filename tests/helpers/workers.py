"""A worker inside the test's own process, with its real source, transactions and committer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pipeline.kafka.source import RecordSource
from pipeline.service.commit import make_committer, open_transactions
from pipeline.service.worker import Worker
from pipeline.settings import Settings


@contextmanager
def running_worker(settings: Settings, model: Any = None, **options: Any) -> Iterator[Worker]:
    """As `millrace run` puts one together; closed in the end, as a worker that stops in good order."""
    transactions = open_transactions(settings)
    try:
        with RecordSource(settings, settings.topics.readings_topic) as source:
            committer = make_committer(settings, transactions, source)
            try:
                yield Worker(settings, source, committer, model, **options)
            finally:
                committer.close()
    finally:
        transactions.close()
