"""Time that tests move."""

from __future__ import annotations


class Wall:
    """A clock that moves only when somebody sleeps."""

    def __init__(self, stop_after: float = 1e9) -> None:
        self.seconds = 100.0
        self.stop_after = self.seconds + stop_after

    def sleep(self, seconds: float) -> bool:
        self.seconds += seconds
        return self.seconds >= self.stop_after
