"""A folder that can be gone on with, whenever the plug is pulled: every row once, in order, and no word of what was never counted in."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import DeploymentError
from pipeline.service import keeping
from pipeline.service.keeping import FORECASTS_FILE, UNFINISHED, Folder, Memory, planned, require_free
from pipeline.service.matching import FrameShape

SHAPE = FrameShape(("y",), 2, (0.1, 0.9), ("LastValue",))
SCHEMA = SHAPE.schema
PLAN = {"data": ["file 1 2"], "question": {"stride": 1, "start": None}}
TABLES = 7
ROWS = 5


def table(number: int, rows: int = ROWS) -> pa.Table:
    """Told apart by `lead`; sensors and versions that other tables do not know."""
    random = np.random.default_rng(number)
    names = pa.array([f"pump-{n}" for n in range(number + 1)])
    codes = pa.array(np.arange(rows, dtype=np.int32) % (number + 1))
    texts = pa.DictionaryArray.from_arrays(codes, names)
    times = pa.array(np.arange(rows) * 3_600_000 - 7_200_000, pa.timestamp("ms"))
    columns: list[Any] = [texts, times, times, pa.array(np.full(rows, number, np.int32))]
    columns += [pa.array(np.where(np.arange(rows) % 2, np.nan, number), from_pandas=True), texts, texts]
    columns += [pa.array(random.normal(0, 1, rows), pa.float32()) for _ in range(4)]
    return pa.table(columns, SCHEMA.names)


def written(out: Path) -> list[int]:
    return pq.read_table(out / FORECASTS_FILE)["lead"].to_pylist()


WHOLE = [number for number in range(TABLES) for _ in range(ROWS)]


def work(out: Path, save_every: int = 2, plan: Any = PLAN) -> list[bytes]:
    """One sitting of a backtest that writes a table and a line at a time. Returns the lines that it was told at its beginning."""
    folder = Folder(out, SCHEMA, plan)
    first, told = 0, []
    if folder.saved is not None:
        first, told = int(folder.saved.facts["next"]), list(folder.journal())
        np.testing.assert_array_equal(folder.saved.arrays["counted"], np.arange(first))
    lines = []
    for number in range(first, TABLES):
        folder.write(table(number))
        lines.append(b'{"line": %d}' % number)
        if (number + 1) % save_every == 0:
            folder.save({"counted": np.arange(number + 1)}, {"next": number + 1}, lines)
            lines = []
    folder.finish()
    return told


# -- without a stop


def test_what_was_written_is_one_file_and_nothing_else_is_left(tmp_path: Path) -> None:
    work(tmp_path / "deep" / "out")
    assert [path.name for path in (tmp_path / "deep" / "out").iterdir()] == [FORECASTS_FILE]
    assert written(tmp_path / "deep" / "out") == WHOLE


@pytest.mark.parametrize("save_every", [1, 3, 100])
def test_pandas_reads_texts_as_texts_however_many_parts_there_were(tmp_path: Path, save_every: int) -> None:
    work(tmp_path, save_every)
    frame = pd.read_parquet(tmp_path / FORECASTS_FILE)
    for name in ("unique_id", "status", "model_version"):
        assert not isinstance(frame[name].dtype, pd.CategoricalDtype)
        assert pd.api.types.is_string_dtype(frame[name].dtype)
        assert frame[name].tolist() == [f"pump-{at % (number + 1)}" for number in range(TABLES) for at in range(ROWS)]
    assert frame["ds"].dtype == "datetime64[ms]"
    assert frame["ds"].iloc[0] == pd.Timestamp("1969-12-31 22:00")
    assert frame["Millrace"].dtype == np.float32
    assert frame["y"].isna().sum() == TABLES * (ROWS // 2)


def test_few_different_texts_are_coded_in_the_file(tmp_path: Path) -> None:
    work(tmp_path, 1)
    meta = pq.ParquetFile(tmp_path / FORECASTS_FILE).metadata
    for name, is_coded in (("unique_id", True), ("model_version", True), ("Millrace", False)):
        column = meta.row_group(0).column(SCHEMA.get_field_index(name))
        assert ("RLE_DICTIONARY" in column.encodings) == is_coded, name


def test_a_backtest_without_a_forecast_is_an_empty_table_of_the_same_columns(tmp_path: Path) -> None:
    Folder(tmp_path, SCHEMA, PLAN).finish()
    frame = pd.read_parquet(tmp_path / FORECASTS_FILE)
    assert frame.empty
    assert frame.columns.tolist() == SCHEMA.names


def test_memory_keeps_the_tables_as_they_come() -> None:
    memory = Memory()
    for number in range(3):
        memory.write(table(number))
    assert [one["lead"][0].as_py() for one in memory.tables] == [0, 1, 2]


# -- the plug is pulled


class PlugPulled(BaseException):
    """Nobody catches it."""


class Plug:
    """Pulls itself before, or in the middle of, the so-manyth deed on the disk. Whatever runs through `finally` afterwards finds a dead
    disk, as nothing runs after a kill."""

    def __init__(self, patch: pytest.MonkeyPatch, after: int) -> None:
        self.deeds: list[str] = []
        self._after = after
        for owner, name in (
            (keeping.os, "replace"),
            (keeping.os, "fsync"),
            (keeping.shutil, "rmtree"),
            (keeping.np, "savez"),
            (keeping.pq, "ParquetWriter"),
            (keeping.pq.ParquetWriter, "write_table"),
            (keeping.pq.ParquetWriter, "write_batch"),
            (keeping.pq.ParquetWriter, "close"),
            (Path, "write_text"),
            (Path, "unlink"),
        ):
            patch.setattr(owner, name, self._guarded(name, getattr(owner, name)))

    def _guarded(self, name: str, deed: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(*args: Any, **options: Any) -> Any:
            if len(self.deeds) > self._after:
                raise PlugPulled
            self.deeds.append(name)
            if len(self.deeds) > self._after:
                self._half(name, args)
                raise PlugPulled
            return deed(*args, **options)

        return guarded

    def _half(self, name: str, args: Any) -> None:
        """Some deeds leave something behind when they are cut short."""
        if name == "savez":
            args[0].write(b"PK\x03\x04 and so on")
            args[0].flush()
        elif name == "write_text":
            with args[0].open("w") as file:
                file.write(args[1][: len(args[1]) // 2])
        elif name == "rmtree":
            for path in sorted(Path(args[0]).iterdir())[:2]:
                os.remove(path)


def pulled(out: Path, after: int, save_every: int = 2) -> list[str]:
    """The deeds that were done until the plug was pulled; all of them where it was not."""
    with pytest.MonkeyPatch.context() as patch:
        plug = Plug(patch, after)
        try:
            work(out, save_every)
        except PlugPulled:
            return plug.deeds
    return plug.deeds


DEEDS = 60
"""More than there are."""


@pytest.mark.parametrize("save_every", [2, 7, 100])
def test_wherever_the_plug_is_pulled_it_goes_on_and_every_row_is_there_once(tmp_path: Path, save_every: int) -> None:
    everything = pulled(tmp_path / "whole", DEEDS, save_every)
    assert len(everything) < DEEDS
    assert everything.count("replace") == 2 + TABLES // save_every  # plan, states, whole: each takes its place at once
    assert set(everything) >= {"replace", "fsync", "rmtree", "ParquetWriter", "write_table", "close", "write_text"}
    for after in range(len(everything)):
        out = tmp_path / str(after)
        assert len(pulled(out, after, save_every)) == after + 1
        if (out / FORECASTS_FILE).exists():  # the last deed is to clear up
            with pytest.raises(DeploymentError, match="finished backtest"):
                work(out, save_every)
        else:
            told = work(out, save_every)
            assert told == [b'{"line": %d}' % number for number in range(len(told))]
            assert not (out / UNFINISHED).exists()
        assert written(out) == WHOLE, everything[after]


def test_pulled_again_and_again_it_comes_to_its_end(tmp_path: Path) -> None:
    everything = pulled(tmp_path / "whole", DEEDS)
    for after in range(3, len(everything), 4):
        sittings = 0
        while not (tmp_path / str(after) / FORECASTS_FILE).exists():
            pulled(tmp_path / str(after), after)
            sittings += 1
            assert sittings < 30, "it gets nowhere"
            if sittings == 8:  # too short a sitting for a single checkpoint: let it go
                work(tmp_path / str(after))
        assert written(tmp_path / str(after)) == WHOLE


def unfinished(out: Path, tables: int = 5, saved: int = 3) -> Folder:
    """`saved` tables are counted in, the others belong to nobody."""
    folder = Folder(out, SCHEMA, PLAN)
    for number in range(tables):
        folder.write(table(number))
        if number + 1 == saved:
            folder.save({"counted": np.arange(saved)}, {"next": saved}, [b"one", b"two"])
    return folder


def test_parts_and_lines_younger_than_the_state_are_dropped(tmp_path: Path) -> None:
    folder = unfinished(tmp_path)
    with (tmp_path / UNFINISHED / "journal").open("ab") as journal:
        journal.write(b"three\nand half a li")
    parts = sorted(path.name for path in (tmp_path / UNFINISHED).glob("part-*"))
    assert parts == ["part-00001.parquet", "part-00002.parquet"]
    again = Folder(tmp_path, SCHEMA, PLAN)
    assert [path.name for path in (tmp_path / UNFINISHED).glob("part-*")] == ["part-00001.parquet"]
    assert list(again.journal()) == [b"one", b"two"]
    assert again.saved is not None
    assert again.saved.facts["next"] == 3
    again.save({}, {"next": 3}, [b"four"])
    assert list(Folder(tmp_path, SCHEMA, PLAN).journal()) == [b"one", b"two", b"four"]
    del folder


def test_what_was_saved_comes_back_bit_for_bit(tmp_path: Path) -> None:
    arrays = {
        "a.b": np.array([[1.5, np.nan], [-0.0, np.inf]]),
        "empty": np.empty((0, 3), np.float32),
        "flags": np.array([True, False]),
        "number": np.array(2**62),
        "long": np.arange(3, dtype=np.int32),
    }
    facts = {"texts": ["ä", '"', "\n"], "none": None, "shapes": [[3, [0.1, 0.5]]]}
    Folder(tmp_path, SCHEMA, PLAN).save(arrays, facts, [])
    saved = Folder(tmp_path, SCHEMA, PLAN).saved
    assert saved is not None
    assert saved.arrays.keys() == arrays.keys()
    for name, column in arrays.items():
        assert saved.arrays[name].dtype == column.dtype
        np.testing.assert_array_equal(saved.arrays[name], column)
    assert {name: saved.facts[name] for name in facts} == facts


def test_a_fresh_folder_has_nothing_to_go_on_with(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "new", SCHEMA, PLAN)
    assert folder.saved is None
    assert list(folder.journal()) == []
    assert folder.models == tmp_path / "new" / "models"


# -- what is refused


def test_a_finished_backtest_is_left_alone(tmp_path: Path) -> None:
    require_free(tmp_path)
    work(tmp_path)
    for ask in (lambda: Folder(tmp_path, SCHEMA, PLAN), lambda: require_free(tmp_path)):
        with pytest.raises(DeploymentError, match=rf"{tmp_path} holds a finished backtest.*--out.*--overwrite"):
            ask()
    assert written(tmp_path) == WHOLE


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (PLAN | {"data": ["file 9 9"]}, ["data = ['file 1 2']", "now data = ['file 9 9']"]),
        (PLAN | {"question": {"stride": 2, "start": None}}, ["question = {'stride': 1", "now question = {'stride': 2"]),
        ({"data": ["file 1 2"]}, ["question = {'stride': 1", "now question = None"]),
        (PLAN | {"model": "abc"}, ["model = None", "now model = 'abc'"]),
    ],
)
def test_another_plan_is_refused_and_what_differs_is_named(tmp_path: Path, other: Any, words: Sequence[str]) -> None:
    unfinished(tmp_path)
    with pytest.raises(DeploymentError) as caught:
        Folder(tmp_path, SCHEMA, other)
    for word in [*words, str(tmp_path), "--overwrite"]:
        assert word in str(caught.value)
    assert list(Folder(tmp_path, SCHEMA, PLAN).journal()) == [b"one", b"two"]  # and nothing was touched


def test_a_plan_is_the_same_after_it_has_been_through_json(tmp_path: Path) -> None:
    plan = {"levels": (0.1, 0.9), "ends": {3: 7}, "none": None}
    Folder(tmp_path, SCHEMA, plan)
    Folder(tmp_path, SCHEMA, plan)
    assert planned(tmp_path) == {"levels": [0.1, 0.9], "ends": {"3": 7}, "none": None}
    assert planned(tmp_path / "elsewhere") is None


@pytest.mark.parametrize("make", [work, unfinished])
def test_with_overwrite_what_was_there_goes(tmp_path: Path, make: Any) -> None:
    make(tmp_path)
    (tmp_path / "models").mkdir()
    folder = Folder(tmp_path, SCHEMA, PLAN | {"model": "another"}, overwrite=True)
    assert folder.saved is None
    assert list(folder.journal()) == []
    assert not list((tmp_path / UNFINISHED).glob("part-*"))
    folder.write(table(3))
    folder.finish()
    assert written(tmp_path) == [3] * ROWS


def damaged(path: Path) -> Iterator[bytes]:
    """Ways in which a disk loses a file."""
    whole = path.read_bytes()
    yield b""
    yield b"no archive at all"
    for length in (3, 40, len(whole) // 2, len(whole) - 1):
        yield whole[:length]
    yield bytes(len(whole))
    flipped = bytearray(whole)
    flipped[len(whole) // 3] ^= 0xFF
    yield bytes(flipped)


def test_a_damaged_state_says_so_and_how_to_begin_anew(tmp_path: Path) -> None:
    Folder(tmp_path, SCHEMA, PLAN).save({"numbers": np.arange(500)}, {"next": 3}, [])
    state = tmp_path / UNFINISHED / "state.npz"
    for content in list(damaged(state)):
        state.write_bytes(content)
        with pytest.raises(DeploymentError, match=r"state\.npz is damaged.*--overwrite"):
            Folder(tmp_path, SCHEMA, PLAN)
    state.unlink()
    np.savez(state, numbers=np.arange(3))
    with pytest.raises(DeploymentError, match=r"state\.npz is damaged"):
        Folder(tmp_path, SCHEMA, PLAN)
    assert Folder(tmp_path, SCHEMA, PLAN, overwrite=True).saved is None


def test_a_state_with_objects_in_it_is_not_unpickled(tmp_path: Path) -> None:
    Folder(tmp_path, SCHEMA, PLAN)
    facts = np.frombuffer(json.dumps({"parts": 0, "journal": 0}).encode(), np.uint8)
    np.savez(tmp_path / UNFINISHED / "state.npz", facts=facts, thing=np.array([{}], object))
    with pytest.raises(DeploymentError, match="damaged"):
        Folder(tmp_path, SCHEMA, PLAN)


def test_a_state_without_a_plan_is_nobodys(tmp_path: Path) -> None:
    # Somebody was clearing up when the plug was pulled.
    unfinished(tmp_path)
    (tmp_path / UNFINISHED / "plan.json").unlink()
    folder = Folder(tmp_path, SCHEMA, PLAN | {"model": "another"})
    assert folder.saved is None
    assert list(folder.journal()) == []
    assert not list((tmp_path / UNFINISHED).glob("part-*"))


@pytest.mark.parametrize("content", ["", '{"data": ["fil', "[]"])
def test_a_damaged_plan_says_so_and_how_to_begin_anew(tmp_path: Path, content: str) -> None:
    unfinished(tmp_path)
    (tmp_path / UNFINISHED / "plan.json").write_text(content)
    for ask in (lambda: planned(tmp_path), lambda: Folder(tmp_path, SCHEMA, PLAN)):
        with pytest.raises(DeploymentError, match=r"plan\.json is damaged.*--overwrite"):
            ask()
    assert Folder(tmp_path, SCHEMA, PLAN, overwrite=True).saved is None


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_cannot_be_written_to_is_named_with_the_reason(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(DeploymentError, match=r"cannot write to .*file: (File exists|Not a directory).*--out"):
        Folder(tmp_path / "file", SCHEMA, PLAN, overwrite)
    with pytest.raises(DeploymentError, match=r"cannot write to .*out: Not a directory.*--out"):
        Folder(tmp_path / "file" / "out", SCHEMA, PLAN, overwrite)
    assert (tmp_path / "file").read_text() == "no folder"


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only to root")
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_read_only_folder_is_named_with_the_reason(tmp_path: Path, overwrite: bool) -> None:
    if overwrite:
        work(tmp_path)
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(
            DeploymentError, match=r"cannot write to .*: Permission denied; name another folder with --out"
        ):
            Folder(tmp_path, SCHEMA, PLAN, overwrite)
    finally:
        tmp_path.chmod(0o755)


def test_a_part_that_is_gone_is_missed_at_the_beginning_and_not_at_the_end(tmp_path: Path) -> None:
    folder = unfinished(tmp_path)
    folder.save({}, {}, [])
    (tmp_path / UNFINISHED / "part-00001.parquet").unlink()
    with pytest.raises(DeploymentError, match=r"part-00001\.parquet is missing.*--overwrite"):
        Folder(tmp_path, SCHEMA, PLAN)
