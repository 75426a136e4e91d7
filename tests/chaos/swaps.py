"""Models promoted in turn while readings flow: where they have taken over, and what that cost.

promote ──> models topic ──> each worker loads, compiles ──> a partition a round: swap record, checkpoint, answers
   │                                                                                 │
   └──────────────────── seconds until the last partition ──────────────────────────┘
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from pipeline.errors import BrokerUnavailable, DeploymentError
from pipeline.kafka.registry import RegistryReader
from pipeline.service.versions import import_folder, promote
from pipeline.settings import load
from tests.chaos.models import version_of
from tests.chaos.oracle import Appended

PROMOTE_SECONDS: Final = 90.0
"""A transaction that a dead worker left open holds a writer up for kafka.transaction_timeout and a little more."""
RETRY_SECONDS: Final = 1.0


class Succession:
    """The versions, champion after champion. The first folder is the first champion, which the workers find by themselves.

    promote_next: from a thread of its own, so that its caller can look after the workers meanwhile. taken_over: not from it."""

    def __init__(self, config: Path, folders: Sequence[Path]) -> None:
        settings = load(config, {})
        self._settings = settings
        self._turns = itertools.cycle([*folders[1:], folders[0]])
        self._partitions = range(settings.topics.partitions)
        self._promoter = ThreadPoolExecutor(1, "promoter")
        self._reader = RegistryReader(settings)
        for folder in folders[1:]:
            import_folder(settings, folder)

    def promote_next(self) -> Future[str]:
        """Its result is the version."""
        return self._promoter.submit(self._promote, next(self._turns))

    def taken_over(self, version: str) -> bool:
        """In every partition, as committed swap records say."""
        try:
            self._reader.poll()
        except BrokerUnavailable:
            return False
        swaps = self._reader.view.swaps
        return all(swaps.get(p, []) and swaps[p][-1].version == version for p in self._partitions)

    def close(self) -> None:
        self._promoter.shutdown(cancel_futures=True)
        self._reader.close()

    def _promote(self, folder: Path) -> str:
        version, deadline = version_of(folder), time.monotonic() + PROMOTE_SECONDS
        while True:
            try:
                promote(self._settings, version)
                return version
            except DeploymentError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(RETRY_SECONDS)


@dataclass(frozen=True, slots=True)
class Pauses:
    """Seconds between two forecasts' append times in a partition, those of one append apart; all partitions together."""

    median: float
    p99: float
    longest: float
    longest_anywhere: float
    """In which no partition at all had a forecast appended."""

    def __str__(self) -> str:
        usual = f"median {self.median:.2f} s, 99 % below {self.p99:.2f} s"
        return f"{self.longest:.2f} s ({usual}; in no partition at all {self.longest_anywhere:.2f} s)"


def pauses(committed: Iterable[Appended], from_ms: float, to_ms: float) -> Pauses | None:
    """Of what was appended in [from, to). None where there is too little."""
    times: dict[int, list[int]] = {}
    for partition, time_ms in committed:
        if from_ms <= time_ms < to_ms:
            times.setdefault(partition, []).append(time_ms)
    gaps = np.concatenate([np.empty(0), *(np.diff(np.unique(own)) for own in times.values())]) / 1000
    if not len(gaps):
        return None
    anywhere = np.diff(np.unique(np.concatenate(list(times.values())))) / 1000
    median, p99 = np.quantile(gaps, [0.5, 0.99])
    return Pauses(float(median), float(p99), float(gaps.max()), float(anywhere.max()))
