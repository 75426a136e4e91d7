"""Where a backtest's forecasts go, and how it goes on after it was stopped.

    OUT/forecasts.parquet    once it has ended
    OUT/.unfinished/         until then
        plan.json            what is computed from what: another plan is another backtest
        part-00001.parquet   closed at a checkpoint, never touched again
        state.npz            all that is needed to go on behind the last of them
        journal              what the timeline has heard, line by line

A checkpoint is the new part, the journal's new lines, and then, by one rename, the state that counts them in: whatever is younger than the
state belongs to nobody and is written anew.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.errors import DeploymentError

FORECASTS_FILE: Final = "forecasts.parquet"
UNFINISHED: Final = ".unfinished"
PLAN_FILE: Final = "plan.json"
CODED: Final = ("unique_id", "status", "model_version")
"""Columns of few different texts: dictionary-encoded in the file."""
ROWS_AT_ONCE: Final = 250_000

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Saved:
    """What a checkpoint holds."""

    arrays: Arrays
    facts: Mapping[str, Any]
    """What JSON can hold."""


class Keeper(Protocol):
    """Takes the tables as they come."""

    def write(self, table: pa.Table) -> None: ...


@dataclass(slots=True)
class Memory:
    """For a caller that wants a DataFrame."""

    tables: list[pa.Table] = field(default_factory=list)

    def write(self, table: pa.Table) -> None:
        self.tables.append(table)


def require_free(out: Path) -> None:
    """Raises DeploymentError where the folder holds a finished backtest."""
    if (out / FORECASTS_FILE).exists():
        raise DeploymentError(f"{out} holds a finished backtest; name another folder (--out), or add --overwrite")


def planned(out: Path) -> Mapping[str, Any] | None:
    """The plan of the unfinished backtest in a folder, if there is one."""
    path = out / UNFINISHED / PLAN_FILE
    if not path.exists():
        return None
    try:
        plan = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from None
    if not isinstance(plan, dict):
        raise _damaged(path, "it holds no plan")
    return plan


class Folder:
    """The folder of one backtest. Making one raises DeploymentError where the folder holds another, or a finished one, unless
    `overwrite` says that it may go."""

    def __init__(self, out: Path, schema: pa.Schema, plan: Mapping[str, Any], overwrite: bool = False) -> None:
        self.out = out
        self._schema = schema
        self._own = out / UNFINISHED
        self._writer: pq.ParquetWriter | None = None
        self._journal = self._own / "journal"
        if overwrite:
            with _writing_to(out):
                if self._own.exists():
                    shutil.rmtree(self._own)
                (out / FORECASTS_FILE).unlink(missing_ok=True)
        require_free(out)
        self._require(plan)
        self.saved = self._load()
        self._parts = int(self.saved.facts["parts"]) if self.saved else 0
        self._journalled = int(self.saved.facts["journal"]) if self.saved else 0
        with _writing_to(out):
            self._drop_younger()

    @property
    def models(self) -> Path:
        return self.out / "models"

    def journal(self) -> Iterator[bytes]:
        """The lines that the saved state counts in."""
        with self._journal.open("rb") as journal:
            for line in journal:
                yield line.rstrip(b"\n")

    def write(self, table: pa.Table) -> None:
        if self._writer is None:
            self._writer = self._open(self._part(self._parts + 1))
        self._writer.write_table(table, row_group_size=ROWS_AT_ONCE)

    def save(self, arrays: Arrays, facts: Mapping[str, Any], lines: Sequence[bytes]) -> None:
        """From here on it can be gone on with. lines: of the journal, since the last time."""
        self._close_part()
        with self._journal.open("ab") as journal:
            journal.write(b"".join(line + b"\n" for line in lines))
            _sync(journal)
            self._journalled = journal.tell()
        counted = {**facts, "parts": self._parts, "journal": self._journalled}
        scratch = self._own / "state.writing"
        with scratch.open("wb") as file:
            text = np.frombuffer(json.dumps(counted).encode(), np.uint8)
            np.savez(file, allow_pickle=False, **{_FACTS: text}, **arrays)
            _sync(file)
        os.replace(scratch, self._own / _STATE)

    def finish(self) -> Path:
        """All parts as one file; what was unfinished goes."""
        self._close_part()
        whole, parts = self.out / FORECASTS_FILE, [self._part(number) for number in range(1, self._parts + 1)]
        if len(parts) == 1:
            os.replace(parts[0], whole)
        else:
            scratch = self._own / "whole.parquet"
            with self._open(scratch) as writer:
                for part in parts:
                    for batch in pq.ParquetFile(part, read_dictionary=list(CODED)).iter_batches(ROWS_AT_ONCE):
                        writer.write_batch(batch)
            os.replace(scratch, whole)
        shutil.rmtree(self._own)
        return whole

    def _close_part(self) -> None:
        if self._writer is None:
            return
        self._writer.close()
        self._writer = None
        self._parts += 1
        with self._part(self._parts).open("ab") as part:
            _sync(part)

    def _drop_younger(self) -> None:
        """What no state counts in. Raises DeploymentError where one that it counts in is gone."""
        for number in range(1, self._parts + 1):
            if not self._part(number).exists():
                raise DeploymentError(f"{self._part(number)} is missing; begin anew with --overwrite")
        for path in self._own.glob("part-*.parquet"):
            if int(path.stem.removeprefix("part-")) > self._parts:
                path.unlink()
        with self._journal.open("ab") as journal:
            journal.truncate(self._journalled)

    def _open(self, path: Path) -> pq.ParquetWriter:
        # Without Arrow's own schema a text is a text to whoever reads it, and no category.
        return pq.ParquetWriter(path, self._schema, compression="zstd", use_dictionary=list(CODED), store_schema=False)

    def _part(self, number: int) -> Path:
        return self._own / f"part-{number:05d}.parquet"

    def _require(self, plan: Mapping[str, Any]) -> None:
        """The plan in the folder is this one; it is put there where there is none."""
        before = planned(self.out)
        if before is not None:
            now = json.loads(json.dumps(plan))
            different = [name for name in {**before, **now} if before.get(name) != now.get(name)]
            if different:
                name = different[0]
                raise DeploymentError(
                    f"{self.out} holds an unfinished backtest with {name} = {before.get(name)!r}, now {name} = {now.get(name)!r}; "
                    "name another folder (--out), set it back to go on, or add --overwrite"
                )
            return
        with _writing_to(self.out):
            if self._own.exists():  # without a plan nobody knows what it was
                shutil.rmtree(self._own)
            self._own.mkdir(parents=True)
            scratch = self._own / "plan.writing"
            scratch.write_text(json.dumps(plan, indent=2), encoding="utf-8")
            os.replace(scratch, self._own / PLAN_FILE)

    def _load(self) -> Saved | None:
        path = self._own / _STATE
        if not path.exists():
            return None
        try:
            with np.load(path, allow_pickle=False) as stored:
                arrays = {name: stored[name] for name in stored.files}
            facts = json.loads(arrays.pop(_FACTS).tobytes())
        except Exception as error:  # what unpacking half an archive may raise is nowhere written down
            raise _damaged(path, error) from None
        return Saved(arrays, facts)


_STATE: Final = "state.npz"
_FACTS: Final = "facts"


@contextmanager
def _writing_to(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DeploymentError(
            f"cannot write to {out}: {error.strerror or error}; name another folder with --out"
        ) from None


def _damaged(path: Path, why: object) -> DeploymentError:
    return DeploymentError(f"{path} is damaged ({why}); begin anew with --overwrite")


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
