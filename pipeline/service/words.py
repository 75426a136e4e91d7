"""Times as people read them."""

from __future__ import annotations

from datetime import UTC, datetime


def moment(epoch_ms: int) -> str:
    """UTC, to the minute.

    >>> moment(1_700_000_000_000)
    '2023-11-14 22:13'
    """
    return f"{datetime.fromtimestamp(epoch_ms / 1000, UTC):%Y-%m-%d %H:%M}"
