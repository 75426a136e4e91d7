"""Epochs: stretches of the grid of steps between which the online stages learn."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Int64 = NDArray[np.int64]


def epochs(end_ms: Int64, step_ms: int, epoch_steps: int) -> Iterator[tuple[int, slice]]:
    """The number of each epoch, and which of the steps, which stand in the order of time, belong to it.

    >>> list(epochs(np.array([10, 20, 20, 30, 40]), 10, 2))
    [(0, slice(0, 1, None)), (1, slice(1, 4, None)), (2, slice(4, 5, None))]
    """
    number = end_ms // (step_ms * epoch_steps)
    edges = np.flatnonzero(np.diff(number, prepend=number[:1] - 1, append=number[-1:] + 1))
    for first, end in zip(edges[:-1].tolist(), edges[1:].tolist()):
        yield int(number[first]), slice(first, end)
