"""The models topic on a real broker: bytes whole or not at all, writers that take turns, and the commands of a person."""

from __future__ import annotations

import hashlib
import json
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner, Result

from pipeline.cli import main
from pipeline.errors import DeploymentError
from pipeline.kafka import topics
from pipeline.kafka.lineage import (
    CHUNK_BYTES,
    Decision,
    Record,
    RegistryView,
    Swap,
    batches,
    chunk_key,
    decision_record,
    new_version,
    promote_records,
    publish_records,
    swap_record,
    trim_records,
    utc_now,
)
from pipeline.kafka.membership import memberless
from pipeline.kafka.registry import ATTEMPTS, RegistryReader, read, write
from pipeline.kafka.source import RecordSource
from pipeline.kafka.transactions import TransactionalSink, TransactionFailed
from pipeline.service import versions
from pipeline.service.assembly import task_settings
from pipeline.settings import Settings, load
from tests.helpers.broker import RunningBroker, produce_records
from tests.helpers.settings import again

LARGE = 2_500_000
"""Bytes of a model of three chunks."""
HOUR_MS = 3_600_000


@pytest.fixture
def settings(broker: RunningBroker, domain: str, tmp_path: Path) -> Settings:
    wanted = {
        "kafka.bootstrap_servers": broker.bootstrap_servers,
        "topics.domain": domain,
        "topics.partitions": 1,
        "forecast.horizon": 3,
        "retraining.keep_versions": 3,
        "model.path": str(tmp_path / "model"),
    }
    made = load(None, {}, wanted)
    topics.create(made)
    return made


def body_of(name: str, size: int = 1_000) -> bytes:
    return random.Random(name).randbytes(size)


def manifest_of(settings: Settings, name: str, body: bytes) -> dict[str, Any]:
    """As `models.artifact` writes it, of a network that nobody will load."""
    manifest = {
        "format": 2,
        "version": name,
        "sha256": hashlib.sha256(body).hexdigest(),
        "spec": asdict(task_settings(settings).spec),
        "architecture": {"kind": "rnn", "cell": "gru", "units": 8, "layers": 1},
        "warmup_steps": 12,
        "data": {"sensors": 2, "steps": 100, "from_ms": 0, "to_ms": 1_769_700_000_000},
        "figures": [
            {"name": "Millrace", "pinball": 0.123456, "coverage": 0.8, "labels": 10},
            {"name": "LastValue", "pinball": 0.5, "coverage": 0.7, "labels": 10},
        ],
    }
    return json.loads(json.dumps(manifest))  # type: ignore[no-any-return]


def model_folder(settings: Settings, folder: Path, name: str, size: int = 1_000) -> Path:
    body = body_of(name, size)
    versions.write_folder(folder, manifest_of(settings, name, body), body)
    return folder


def publication(settings: Settings, name: str, size: int = 1_000) -> Callable[[RegistryView], list[Record]]:
    body = body_of(name, size)

    def decide(view: RegistryView) -> list[Record]:
        manifest = manifest_of(settings, name, body)
        version = new_version(view, manifest, body, origin="trained", created_at=utc_now())
        return [] if name in view.versions else publish_records(version, body)

    return decide


def promotion(settings: Settings, name: str) -> Callable[[RegistryView], list[Record]]:
    """Publishes and promotes, as a trainer does."""
    publish = publication(settings, name)

    def decide(view: RegistryView) -> list[Record]:
        if view.decided(name):
            return []
        published = publish(view)
        body = body_of(name)
        manifest = manifest_of(settings, name, body)
        version = new_version(view, manifest, body, origin="trained", created_at=utc_now())
        champion = view.champion.version if view.champion else ""
        decision = Decision(
            id=view.next_decision_id(name),
            kind="promoted",
            version=name,
            champion=champion,
            trigger="schedule",
            reason="better",
            decided_at=utc_now(),
        )
        return [*published, *promote_records(view, version, decision)]

    return decide


def require_a_chain(view: RegistryView) -> None:
    """Each decision was taken from a view of the one before it, and the champion is the last one's."""
    names = [decision.version for decision in view.decisions]
    assert [decision.champion for decision in view.decisions] == ["", *names[:-1]]
    assert view.champion is not None
    assert (view.champion.version, view.champion.previous) == (names[-1], names[-2] if len(names) > 1 else "")
    assert [version.number for version in view.by_number] == list(range(1, len(names) + 1))
    assert {version.version for version in view.by_number} == set(names)


def at_once(count: int, do: Callable[[int], Any]) -> list[Any]:
    """`do` from so many threads that begin together."""
    ready = threading.Barrier(count)

    def run(number: int) -> Any:
        ready.wait()
        return do(number)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


# -- bytes


def test_a_model_of_several_chunks_comes_back_byte_for_byte(settings: Settings) -> None:
    written = write(settings, publication(settings, "gru8-a", LARGE))
    assert [key for key, _ in written] == [*(chunk_key("gru8-a", n) for n in range(3)), b"version/gru8-a"]
    with RegistryReader(settings) as reader:
        reader.catch_up()
        assert reader.view.versions["gru8-a"].chunks == 3 == -(-LARGE // CHUNK_BYTES)
        assert reader.fetch("gru8-a") == body_of("gru8-a", LARGE) == reader.fetch("1")
        write(settings, publication(settings, "gru8-b"))
        reader.catch_up()
        assert reader.fetch("gru8-b") == body_of("gru8-b"), "the tail went on while bytes were read"


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (None, r"1 of its 3 chunks are missing \(0001\)"),
        (b"short", f"its chunks hold {LARGE - CHUNK_BYTES + 5} bytes, expected {LARGE}"),
        (bytes(CHUNK_BYTES), "sha256 [0-9a-f]{64}, expected "),
    ],
    ids=["missing", "shorter", "altered"],
)
def test_a_chunk_that_is_not_what_was_published_is_told_and_an_import_mends_it(
    broker: RunningBroker, settings: Settings, tmp_path: Path, value: bytes | None, says: str
) -> None:
    folder = model_folder(settings, tmp_path / "copy", "gru8-a", LARGE)
    versions.import_folder(settings, folder)
    produce_records(broker, settings.topics.models_topic, [(chunk_key("gru8-a", 1), value)])
    with RegistryReader(settings) as reader:
        reader.catch_up()
        with pytest.raises(DeploymentError, match=rf"version 1 \(gru8-a\): {says}.*millrace models import DIR"):
            reader.fetch("gru8-a")
        (decision,) = versions.import_folder(settings, folder).decisions
        assert "was damaged" in decision.reason
        reader.catch_up()
        assert reader.fetch("gru8-a") == body_of("gru8-a", LARGE)
        assert len(reader.view.versions) == 1


def test_a_reader_never_sees_a_version_without_all_its_chunks(settings: Settings) -> None:
    """It polls as fast as it can while versions come and go."""
    done = threading.Event()

    def watch(_: int) -> list[int]:
        seen = []
        with RegistryReader(settings) as reader:
            while not done.is_set():
                if reader.poll(20):
                    whole = [
                        len(reader.view.chunk_offsets(name)) == v.chunks for name, v in reader.view.versions.items()
                    ]
                    assert all(whole)
                    champion = reader.view.champion
                    assert champion is None or champion.version in reader.view.versions
                    seen.append(len(whole))
        return seen

    with ThreadPoolExecutor(1) as pool:
        watched = pool.submit(watch, 0)
        try:
            for name in "abcd":
                write(settings, publication(settings, name, LARGE))
                write(settings, lambda view: trim_records(view, keep=2))
        finally:
            done.set()
        assert max(watched.result()) >= 2


def test_a_version_whose_transaction_was_given_up_is_never_seen(settings: Settings) -> None:
    records = publication(settings, "gru8-lost")(RegistryView())
    with closing(TransactionalSink(settings, f"{settings.kafka.group_id}/models")) as dead:
        dead._begin()
        dead._send(batches(records, settings.topics.models_topic))
        dead._flush()  # killed before it could commit
        write(settings, publication(settings, "gru8-a"))
        assert list(read(settings).versions) == ["gru8-a"]


def test_a_topic_that_does_not_exist_names_the_command_that_makes_it(settings: Settings) -> None:
    elsewhere = again(settings, topics__models="nowhere.models.v1")
    for attempt in (lambda: read(elsewhere), lambda: write(elsewhere, lambda _: [])):
        with pytest.raises(
            DeploymentError, match=r'topic "nowhere\.models\.v1" does not exist.*millrace topics create'
        ):
            attempt()


# -- writers


def test_decisions_of_writers_at_once_are_all_there_and_each_follows_from_the_one_before(settings: Settings) -> None:
    at_once(3, lambda number: [write(settings, promotion(settings, f"{number}-{turn}")) for turn in range(2)])
    view = read(settings)
    assert len(view.decisions) == 6
    require_a_chain(view)


def test_a_writer_that_was_overtaken_decides_again_on_what_the_other_wrote(settings: Settings) -> None:
    slow, seen = promotion(settings, "slow"), list[list[str]]()

    def decide(view: RegistryView) -> list[Record]:
        records = slow(view)
        seen.append(sorted(view.versions))
        if len(seen) == 1:
            write(settings, promotion(settings, "quick"))
        return records

    write(settings, decide)
    assert seen == [[], ["quick"]]
    require_a_chain(read(settings))


def test_a_commit_whose_answer_was_lost_is_not_written_twice(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit, calls = TransactionalSink._commit, []

    def losing(sink: TransactionalSink) -> None:
        commit(sink)
        calls.append(1)
        sink._records.abandon()
        raise TransactionFailed("no answer")

    monkeypatch.setattr(TransactionalSink, "_commit", losing)
    assert write(settings, promotion(settings, "gru8-a")) == []
    assert len(calls) == 1
    assert len(read(settings).decisions) == 1


def test_a_writer_that_never_gets_through_gives_up_and_says_so(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def failing(sink: TransactionalSink) -> None:
        calls.append(1)
        sink._records.abandon()
        raise TransactionFailed("no answer")

    monkeypatch.setattr(TransactionalSink, "_commit", failing)
    with pytest.raises(DeploymentError, match=f"{ATTEMPTS} transactions failed, the last with: no answer"):
        write(settings, promotion(settings, "gru8-a"))
    assert len(calls) == ATTEMPTS
    monkeypatch.undo()
    write(settings, promotion(settings, "gru8-b"))
    require_a_chain(read(settings))


def test_a_writer_waits_for_what_an_open_transaction_of_a_worker_hides(settings: Settings) -> None:
    """The worker's swap stands before a decision that is committed, and hides it from readers of committed records."""
    swap = Swap(partition=0, offset=7, version="gru8-a", state="ring")
    write(settings, publication(settings, "gru8-a"))
    with closing(TransactionalSink(settings, "a worker")) as worker:
        worker._begin()
        worker._send(batches([swap_record(swap)], settings.topics.models_topic))
        worker._flush()
        with closing(TransactionalSink(settings, "another writer")) as other:
            record = promotion(settings, "gru8-b")(read(settings))
            other.commit(batches(record, settings.topics.models_topic), {}, None)
        assert list(read(settings).versions) == ["gru8-a"]
        threading.Timer(1.0, worker._commit).start()
        write(settings, promotion(settings, "gru8-c"))
    view = read(settings)
    assert view.swaps == {0: [swap]}
    assert [(d.version, d.champion) for d in view.decisions] == [("gru8-b", ""), ("gru8-c", "gru8-b")]


def test_input_offsets_are_committed_with_the_decision_and_also_without_one(settings: Settings) -> None:
    topic = settings.topics.control_topic
    alone = memberless(topic, settings.kafka.group_id)
    write(settings, promotion(settings, "gru8-a"), {0: 4}, alone)
    with RecordSource(settings, topic) as source:
        assert source.committed(0) == 4
    assert write(settings, lambda _: [], {0: 5}, alone) == []
    with RecordSource(settings, topic) as source:
        assert source.committed(0) == 5
    require_a_chain(read(settings))


def test_a_commit_without_a_group_of_a_writer_whose_id_was_taken_fails(settings: Settings) -> None:
    topic = settings.topics.models_topic
    decision = promotion(settings, "gru8-a")(RegistryView())
    with (
        closing(TransactionalSink(settings, "the same")) as older,
        closing(TransactionalSink(settings, "the same")) as newer,
    ):
        with pytest.raises(TransactionFailed):
            older.commit(batches(decision, topic), {}, None)
        newer.commit(batches([decision_record(_refusal())], topic), {}, None)
    view = read(settings)
    assert ([d.kind for d in view.decisions], view.versions) == (["refused"], {})


def test_offsets_without_a_group_are_a_bug_and_told_as_one(settings: Settings) -> None:
    with closing(TransactionalSink(settings, "x")) as sink, pytest.raises(ValueError, match="whose are they"):
        sink.commit([], {0: 1}, None)


def _refusal() -> Decision:
    return Decision(id="00000001-x", kind="refused", trigger="drift", reason="worse", decided_at=utc_now())


# -- a worker that starts


def test_workers_that_start_at_once_agree_on_one_first_champion(settings: Settings) -> None:
    model_folder(settings, Path(settings.model.path), "gru8-first")
    found = at_once(3, lambda _: versions.ensure_champion(settings))
    assert {champion.version for champion in found} == {"gru8-first"}
    assert len({champion.decision for champion in found}) == 1
    view = read(settings)
    assert (list(view.versions), view.champion) == (["gru8-first"], found[0])
    (decision,) = view.decisions
    assert (decision.kind, decision.trigger) == ("imported", "first")
    assert "the topic named no champion" in decision.reason


def test_without_a_champion_and_a_folder_there_is_none(settings: Settings) -> None:
    assert versions.ensure_champion(settings) is None
    assert read(settings).versions == {}


def test_the_champion_on_the_topic_goes_before_the_folder(settings: Settings, tmp_path: Path) -> None:
    versions.import_folder(settings, model_folder(settings, tmp_path / "copy", "gru8-a"), promote=True)
    model_folder(settings, Path(settings.model.path), "gru8-b")
    champion = versions.ensure_champion(settings)
    assert champion is not None
    assert champion.version == "gru8-a"


def test_a_folder_made_for_other_settings_is_not_put_on_the_topic(settings: Settings) -> None:
    model_folder(again(settings, forecast__season_ms=(12 * HOUR_MS,)), Path(settings.model.path), "gru8-a")
    with pytest.raises(DeploymentError, match=r"manifest\.json: made for seasons=\[12\]; expected seasons=\[24\]"):
        versions.ensure_champion(settings)
    assert read(settings).versions == {}


# -- the commands


@pytest.fixture
def millrace(settings: Settings, tmp_path: Path) -> Callable[..., Result]:
    config = tmp_path / "millrace.toml"
    config.write_text(
        f'[kafka]\nbootstrap_servers = "{settings.kafka.bootstrap_servers}"\n[topics]\ndomain = "{settings.topics.domain}"\n'
        f"[forecast]\nhorizon = 3\n[retraining]\nkeep_versions = 3\n"
    )

    def run(*arguments: str) -> Result:
        return CliRunner().invoke(main, ["models", *arguments, "--config", str(config), "--format", "json"])

    return run


def rows_of(result: Result) -> list[dict[str, Any]]:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)  # type: ignore[no-any-return]


def said_by(result: Result) -> str:
    assert result.exit_code == 1, result.output
    return result.stderr


def test_from_an_import_to_a_promotion_to_a_rollback(
    settings: Settings, millrace: Callable[..., Result], tmp_path: Path
) -> None:
    assert rows_of(millrace("list")) == []
    for name in ("gru8-a", "gru8-b"):
        model_folder(settings, tmp_path / name, name)
    (imported,) = rows_of(millrace("import", str(tmp_path / "gru8-a")))
    assert (imported["kind"], imported["version"]) == ("imported", "gru8-a")
    assert [row["state"] for row in rows_of(millrace("list"))] == [""]
    (promoted,) = rows_of(millrace("promote", "1"))
    assert (promoted["kind"], promoted["champion before"]) == ("promoted", "")
    both = rows_of(millrace("import", str(tmp_path / "gru8-b"), "--promote"))
    assert [(row["kind"], row["champion before"]) for row in both] == [("imported", "gru8-a"), ("promoted", "gru8-a")]
    first, second = rows_of(millrace("list"))
    assert (first["state"], second["state"]) == ("previous", "champion")
    assert second == {
        "number": 2,
        "version": "gru8-b",
        "network": "gru 8",
        "learned to": "2026-01-29T15:20:00+00:00",
        "pinball": 0.1235,
        "state": "champion",
        "bytes": 1_000,
    }

    (back,) = rows_of(millrace("rollback", "--reason", "it was too slow"))

    assert (back["kind"], back["version"], back["champion before"]) == ("rolled-back", "gru8-a", "gru8-b")
    assert [row["state"] for row in rows_of(millrace("list"))] == ["champion", "withdrawn: it was too slow"]
    assert "gru8-a has no previous version to return to" in said_by(millrace("rollback"))
    assert "gru8-b) was withdrawn: it was too slow" in said_by(millrace("promote", "gru8-b"))
    assert rows_of(millrace("promote", "gru8-b", "--force"))[0]["kind"] == "promoted"
    kinds = ["imported", "promoted", "imported", "promoted", "rolled-back", "promoted"]
    assert [row["decision"] for row in rows_of(millrace("list", "--decisions"))] == kinds
    shown = rows_of(millrace("show", "2"))
    assert [row["value"].split(" ", 1)[1] for row in shown if row["about"] == "decision"] == [
        f"imported (by-hand): imported from {tmp_path / 'gru8-b'}",
        f"promoted (by-hand): promoted by hand, with its import from {tmp_path / 'gru8-b'}",
        "rolled-back gru8-a (by-hand): it was too slow",
        "promoted (by-hand): promoted by hand, although it was withdrawn: it was too slow",
    ]
    assert {row["name"]: row["value"]["pinball"] for row in shown if row["about"] == "figures"} == {
        "Millrace": 0.1235,
        "LastValue": 0.5,
    }
    assert {row["name"]: row["value"] for row in shown if row["about"] == "version"}["state"] == "champion"


def test_what_was_refused_and_is_on_no_list_of_versions_is_shown_with_its_figures(
    settings: Settings, millrace: Callable[..., Result]
) -> None:
    figures = [{"name": "challenger", "pinball": 0.26049}, {"name": "champion", "pinball": 0.19}]
    refused = msgspec.structs.replace(_refusal(), version="gru8-x", figures=figures, event_time_ms=1_769_700_000_000)
    write(settings, lambda view: [] if view.decisions else [decision_record(refused)])
    assert rows_of(millrace("list")) == []
    (row,) = rows_of(millrace("list", "--decisions"))
    assert (row["decision"], row["trigger"], row["version"], row["reason"]) == ("refused", "drift", "gru8-x", "worse")
    assert row["event time"] == "2026-01-29T15:20:00+00:00"
    assert row["pinball"] == {"challenger": 0.2605, "champion": 0.19}


def test_what_is_so_already_is_told_and_changes_nothing(
    settings: Settings, millrace: Callable[..., Result], tmp_path: Path
) -> None:
    folder = str(model_folder(settings, tmp_path / "gru8-a", "gru8-a"))
    rows_of(millrace("import", folder, "--promote"))
    for arguments, says in (
        (("import", folder, "--promote"), "version 1 (gru8-a) is there already"),
        (("promote", "gru8-a"), "gru8-a is the champion already"),
    ):
        repeated = millrace(*arguments)
        assert rows_of(repeated) == []
        assert says in repeated.stderr
    assert len(read(settings).decisions) == 2


def test_versions_that_are_not_there_or_do_not_fit_are_refused_with_the_mend(
    settings: Settings, millrace: Callable[..., Result], tmp_path: Path
) -> None:
    assert "holds no model" in said_by(millrace("promote", "gru8-a"))
    assert "names no champion" in said_by(millrace("rollback"))
    other = again(settings, forecast__season_ms=(12 * HOUR_MS,))
    rows_of(millrace("import", str(model_folder(other, tmp_path / "half", "gru8-half"))))
    for command in (("promote", "9"), ("show", "9"), ("export", "9", str(tmp_path / "out"))):
        assert "no version '9'; expected one of 1 (gru8-half)" in said_by(millrace(*command))
    said = said_by(millrace("promote", "1"))
    assert "version 1 (gru8-half): made for seasons=[12]; expected seasons=[24] as the settings say; train" in said
    assert read(settings).champion is None


def test_a_model_with_a_horizon_of_its_own_may_be_promoted(
    settings: Settings, millrace: Callable[..., Result], tmp_path: Path
) -> None:
    folder = model_folder(again(settings, forecast__horizon=9), tmp_path / "long", "gru8-long")
    assert [row["kind"] for row in rows_of(millrace("import", str(folder), "--promote"))] == ["imported", "promoted"]


def test_a_folder_that_is_not_whole_is_not_imported(
    settings: Settings, millrace: Callable[..., Result], tmp_path: Path
) -> None:
    folder = model_folder(settings, tmp_path / "gru8-a", "gru8-a")
    (folder / "model.keras").write_bytes(b"something else")
    assert "model.keras: sha256 " in said_by(millrace("import", str(folder)))
    (folder / "model.keras").unlink()
    assert "model.keras: no such file" in said_by(millrace("import", str(folder)))
    assert "manifest.json: no such file" in said_by(millrace("import", str(tmp_path)))
    assert read(settings).versions == {}


def test_an_export_is_the_folder_that_was_imported(
    settings: Settings, millrace: Callable[..., Result], tmp_path: Path
) -> None:
    source, out = model_folder(settings, tmp_path / "gru8-a", "gru8-a", LARGE), tmp_path / "out"
    rows_of(millrace("import", str(source)))
    for _ in range(2):  # a model folder may be written over
        rows_of(millrace("export", "gru8-a", str(out)))
        assert sorted(path.name for path in out.iterdir()) == ["manifest.json", "model.keras"]
    assert (out / "model.keras").read_bytes() == body_of("gru8-a", LARGE)
    assert versions.read_folder(out).manifest == versions.read_folder(source).manifest


def test_an_export_leaves_a_folder_alone_that_holds_something_else(
    settings: Settings, millrace: Callable[..., Result], tmp_path: Path
) -> None:
    rows_of(millrace("import", str(model_folder(settings, tmp_path / "gru8-a", "gru8-a"))))
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "letters.txt").write_text("dear")
    assert "is not empty and holds no model" in said_by(millrace("export", "1", str(taken)))
    assert [path.name for path in taken.iterdir()] == ["letters.txt"]
    assert "is a file; expected a folder" in said_by(millrace("export", "1", str(taken / "letters.txt")))


def test_imports_trim_the_oldest_but_never_the_champion_and_its_previous_one(
    settings: Settings, millrace: Callable[..., Result], tmp_path: Path
) -> None:
    for name in "abcde":
        folder = str(model_folder(settings, tmp_path / name, name))
        rows_of(millrace("import", folder, *(["--promote"] if name in "ab" else [])))
    assert [(row["number"], row["version"]) for row in rows_of(millrace("list"))] == [(1, "a"), (2, "b"), (5, "e")]
    with RegistryReader(settings) as reader:
        reader.catch_up()
        assert [reader.fetch(name) for name in "abe"] == [body_of(name) for name in "abe"]
        assert reader.view.chunk_offsets("c") == {}


def test_without_the_topic_every_command_says_how_to_make_it(
    millrace: Callable[..., Result],
    broker: RunningBroker,
    monkeypatch: pytest.MonkeyPatch,
    settings: Settings,
    tmp_path: Path,
) -> None:
    folder = str(model_folder(settings, tmp_path / "gru8-a", "gru8-a"))
    monkeypatch.setenv("MILLRACE_TOPICS__MODELS", "nowhere.models.v1")
    for command in (("list",), ("import", folder), ("rollback",)):
        assert "millrace topics create" in said_by(millrace(*command))


@pytest.mark.keras
def test_a_trained_model_goes_over_the_topic_and_forecasts_as_before(settings: Settings, tmp_path: Path) -> None:
    import numpy as np

    from models import artifact
    from models.training import train
    from tests.helpers.series import SINGLE, Bench, noisy, seasonal_sequences

    trained = train(
        seasonal_sequences(8), SINGLE, epochs=1, cell="gru", units=4, chunk_steps=24, lanes=8, warmup_steps=6
    )
    version = artifact.save(tmp_path / "trained", trained)["version"]
    versions.import_folder(settings, tmp_path / "trained")
    versions.export(settings, version, tmp_path / "out")
    loaded = artifact.load(tmp_path / "out", SINGLE)
    values = noisy(SINGLE, 3, 20)
    ours, theirs = Bench(loaded, 3).advance(values), Bench(trained.forecaster, 3).advance(values)
    assert loaded.version == version
    assert np.array_equal(ours.quantiles, theirs.quantiles, equal_nan=True)
