"""The closing rule once more, reading by reading and with dictionaries: slow, plain, and the judge of the columnar one."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from pipeline.stream.windows import WindowRule


@dataclass
class TextbookWindows:
    rule: WindowRule
    stream_time: int | None = None
    open: dict[tuple[int, int], list[tuple[int, list[float]]]] = field(default_factory=dict)
    newest: dict[int, int] = field(default_factory=dict)
    closed: int | None = None
    steps: list[tuple] = field(default_factory=list)
    late: list[int] = field(default_factory=list)

    def feed(self, readings: Iterable[tuple[int, int, int, list[float]]]) -> None:
        """(slot, offset, event_time_ms, values) in log order."""
        for slot, offset, time, values in readings:
            self.stream_time = time if self.stream_time is None else max(self.stream_time, time)
            closed = (self.stream_time - self.rule.size_ms - self.rule.grace_ms) // self.rule.hop_ms
            windows = [time // self.rule.hop_ms - j for j in range(self.rule.overlap)]
            still_open = [window for window in windows if window > closed]
            if not still_open:
                self.late.append(offset)
            for window in still_open:
                self.open.setdefault((slot, window), []).append((time, values))
            self._close(closed, offset)

    def _close(self, closed: int, offset: int) -> None:
        active_from = min([*(w for _, w in self.open), *(w + 1 for w in self.newest.values())], default=closed + 1)
        start = active_from if self.closed is None else max(active_from, self.closed + 1)
        for window in range(start, closed + 1):
            for slot in sorted({s for s, w in self.open if w == window} | set(self.newest)):
                content = self.open.pop((slot, window), None)
                newest = self.newest.get(slot)
                if content is not None:
                    reset = newest is not None and window - newest - 1 > self.rule.max_gap_steps
                    self.newest[slot] = window
                    self.steps.append((slot, window, self._row(content), len(content), reset, offset))
                elif newest is not None and window - newest <= self.rule.max_gap_steps:
                    self.steps.append((slot, window, self._row([]), 0, False, offset))
        self.closed = closed if self.closed is None else max(self.closed, closed)

    def _row(self, content: list[tuple[int, list[float]]]) -> tuple[float, ...]:
        row = []
        for f in range(len(self.rule.fields)):
            seen = [(time, values[f]) for time, values in content if not math.isnan(values[f])]
            row += [_aggregate(aggregate, seen) for aggregate in self.rule.aggregates]
        return tuple(row)


def _aggregate(aggregate: str, seen: list[tuple[int, float]]) -> float:
    if aggregate == "count":
        return float(len(seen))
    if not seen:
        return math.nan
    total = 0.0
    for _, value in seen:
        total += value
    newest = max(time for time, _ in seen)
    return {
        "sum": total,
        "mean": total / len(seen),
        "min": min(value for _, value in seen),
        "max": max(value for _, value in seen),
        "last": [value for time, value in seen if time == newest][-1],
    }[aggregate]
