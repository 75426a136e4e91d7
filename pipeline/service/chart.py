"""A line chart of terminal characters: eight dots to a character (Unicode's braille patterns), bands as shaded ground.

>>> chart = Chart(width=24, height=4, x_range=(0.0, 10.0), y_range=(0.0, 1.0))
>>> chart.line([0, 5, 10], [0.0, 1.0, 0.0], "white")
>>> print(chart.render(x_ticks={0.0: "start", 9.9: "end"}).plain)
  1.0 ┤      ⣀⠔⠓⠢⣀
      │   ⡠⠔⠊     ⠑⠢⢄
  0.0 ┤⡠⠔⠉           ⠉⠢⢄
       start         end
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray
from rich.text import Text

# Bits of a braille pattern: four rows of two dots each, from the top.
_DOTS: Final = np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]], np.int64)
_BLANK: Final = 0x2800
_MARGIN: Final = 7
"""Columns left of the plot: the scale and its rule."""


class Chart:
    """`width` x `height` characters in all, scale included. What is drawn later lies on top."""

    def __init__(self, width: int, height: int, x_range: tuple[float, float], y_range: tuple[float, float]) -> None:
        self.columns, self.rows = max(width - _MARGIN, 8), max(height - 1, 3)
        self._x, self._y = _widened(x_range), _widened(y_range)
        self._pattern = np.zeros((self.rows, self.columns), np.int64)
        self._colour = np.full((self.rows, self.columns), "", dtype=object)
        self._ground = np.full((self.rows, self.columns), "", dtype=object)

    def line(self, x: Sequence[float], y: Sequence[float], colour: str) -> None:
        """Through the points, broken where y is not finite; a lone point is a dot."""
        across, up = self._dots(x, y)
        for i in range(len(across)):
            if np.isnan(up[i]):
                continue
            j = i + 1 if i + 1 < len(across) and not np.isnan(up[i + 1]) else i
            steps = int(max(abs(across[j] - across[i]), abs(up[j] - up[i]), 0)) + 1
            self._put(np.linspace(across[i], across[j], steps + 1), np.linspace(up[i], up[j], steps + 1), colour)

    def band(self, x: Sequence[float], low: Sequence[float], high: Sequence[float], colour: str) -> None:
        """The ground between two lines."""
        across, bottom = self._dots(x, low)
        _, top = self._dots(x, high)
        known = ~(np.isnan(bottom) | np.isnan(top))
        if known.sum() < 2:
            return
        first, last = int(across[known].min()) // 2, int(across[known].max()) // 2
        for column in range(max(first, 0), min(last, self.columns - 1) + 1):
            down = np.interp(2 * column + 0.5, across[known], bottom[known])
            up = np.interp(2 * column + 0.5, across[known], top[known])
            lower, upper = int(down) // 4, int(up) // 4
            for row in range(max(lower, 0), min(upper, self.rows - 1) + 1):
                self._ground[self.rows - 1 - row, column] = colour

    def vertical(self, x: float, colour: str) -> None:
        """A dotted rule over the whole height."""
        across, _ = self._dots([x], [self._y[0]])
        heights = np.arange(0, 4 * self.rows, 2, dtype=float)
        self._put(np.full(len(heights), across[0]), heights, colour)

    def render(self, x_ticks: Mapping[float, str], shaded: bool = True) -> Text:
        """The chart as text. shaded: False where the terminal shows no colour: bands become light shade characters."""
        lines = [self._scale(row) + self._row(row, shaded) for row in range(self.rows)]
        return Text("\n").join([*lines, Text(self._ticks(x_ticks).rstrip(), style="bright_black")])

    def _dots(self, x: Sequence[float], y: Sequence[float]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Positions in dots, from the lower left; NaN where there is no value."""
        across = (np.asarray(x, float) - self._x[0]) / (self._x[1] - self._x[0]) * (2 * self.columns - 1)
        up = (np.asarray(y, float) - self._y[0]) / (self._y[1] - self._y[0]) * (4 * self.rows - 1)
        return across, np.where(np.isfinite(up), up, np.nan)

    def _put(self, across: NDArray[np.float64], up: NDArray[np.float64], colour: str) -> None:
        column, height = np.rint(across).astype(int), np.rint(up).astype(int)
        inside = (column >= 0) & (column < 2 * self.columns) & (height >= 0) & (height < 4 * self.rows)
        for dot, level in zip(column[inside].tolist(), height[inside].tolist()):
            row, of_row = divmod(4 * self.rows - 1 - level, 4)
            cell, of_column = divmod(dot, 2)
            self._pattern[row, cell] |= _DOTS[of_row, of_column]
            self._colour[row, cell] = colour

    def _scale(self, row: int) -> Text:
        spacing = max(2, round(self.rows / 5))
        if row % spacing and row != self.rows - 1:
            return Text(" " * (_MARGIN - 1) + "│", style="bright_black")
        if row != self.rows - 1 and self.rows - 1 - row < spacing:
            return Text(" " * (_MARGIN - 1) + "│", style="bright_black")
        value = self._y[1] - (self._y[1] - self._y[0]) * row / (self.rows - 1)
        return Text(f"{_short(value):>{_MARGIN - 2}} ┤", style="bright_black")

    def _row(self, row: int, shaded: bool) -> Text:
        text = Text()
        for column in range(self.columns):
            dots, ground = int(self._pattern[row, column]), str(self._ground[row, column])
            character = chr(_BLANK + dots) if dots else "░" if ground and not shaded else " "
            colour = str(self._colour[row, column]) or "default"
            text.append(character, style=f"{colour} on {ground}" if ground and shaded else colour)
        text.rstrip()
        return text

    def _ticks(self, x_ticks: Mapping[float, str]) -> str:
        line = [" "] * (_MARGIN + self.columns)
        free_from = 0
        for x, label in sorted(x_ticks.items()):
            at = _MARGIN + round((x - self._x[0]) / (self._x[1] - self._x[0]) * (self.columns - 1)) - len(label) // 2
            at = min(max(at, _MARGIN), len(line) - len(label))
            if at >= free_from:
                line[at : at + len(label)] = label
                free_from = at + len(label) + 1
        return "".join(line)


def _widened(limits: tuple[float, float]) -> tuple[float, float]:
    """A range that is not empty, so that a constant series lies in the middle."""
    low, high = limits
    if not (np.isfinite(low) and np.isfinite(high)):
        return 0.0, 1.0
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _short(value: float) -> str:
    return f"{value:.1f}" if abs(value) < 1000 else f"{value:.3g}"
