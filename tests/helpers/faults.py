"""Faults between one real producer and the real broker: chosen requests fail, or are never answered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kafka.future import Future


class FaultyNetwork:
    """Stands before a producer's network client for as long as that producer lives.

    network.fail("ProduceRequest", NotLeaderForPartitionError, times=3)
    network.silence("EndTxnRequest")        # sent, but the answer never comes
    """

    def __init__(self, producer: Any) -> None:
        self.seen: list[str] = []
        self._faults: dict[str, tuple[Callable[[], Exception] | None, float]] = {}
        self._client = producer._sender._client
        self._send = self._client.send
        self._client.send = self._intercept

    def fail(self, request: str, error: Callable[[], Exception], times: float = 1) -> None:
        """These requests never reach the broker; the client is told `error()`."""
        self._faults[request] = (error, times)

    def silence(self, request: str) -> None:
        """These requests reach the broker; the client is never told what came of them."""
        self._faults[request] = (None, float("inf"))

    def heal(self) -> None:
        self._faults.clear()

    def _intercept(self, node_id: Any, request: Any, **options: Any) -> Any:
        name = type(request).__name__
        self.seen.append(name)
        error, times = self._faults.get(name, (None, 0))
        if times <= 0:
            return self._send(node_id, request, **options)
        self._faults[name] = (error, times - 1)
        future = Future()
        if error is None:
            self._send(node_id, request, **options)
        else:
            future.failure(error())
        return future
