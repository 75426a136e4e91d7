"""The models topic without a broker: what records say, and what is written for a decision."""

from __future__ import annotations

import hashlib
import random
from typing import Any

import msgspec
import pytest

from pipeline.errors import DeploymentError
from pipeline.kafka.lineage import (
    CHUNK_BYTES,
    Champion,
    Decision,
    Record,
    RegistryView,
    Swap,
    Version,
    batches,
    champion_record,
    chunks,
    decision_record,
    new_version,
    promote_records,
    publish_records,
    rollback_records,
    swap_record,
    trim_records,
    version_record,
)

NOW = "2026-01-31T12:00:00+00:00"


def manifest_of(name: str, body: bytes) -> dict[str, Any]:
    return {"version": name, "sha256": hashlib.sha256(body).hexdigest(), "spec": {"horizon": 3}}


def applied(records: list[Record], view: RegistryView | None = None) -> RegistryView:
    """A view that has read these records, at offsets 100, 101, ..."""
    view = view or RegistryView("plant.models.v1")
    for offset, (key, value) in enumerate(records, 100):
        assert view.apply(key, value, offset)
    return view


def published(view: RegistryView, *names: str) -> RegistryView:
    for name in names:
        body = random.Random(name).randbytes(100)
        version = new_version(view, manifest_of(name, body), body, origin="trained", created_at=NOW)
        applied(publish_records(version, body), view)
    return view


def decision(view: RegistryView, version: str = "", **changes: Any) -> Decision:
    champion = view.champion.version if view.champion else ""
    made = Decision(
        id=view.next_decision_id("token"),
        kind="promoted",
        version=version,
        champion=champion,
        trigger="schedule",
        reason="better",
        decided_at=NOW,
    )
    return msgspec.structs.replace(made, **changes)


def promoted(view: RegistryView, name: str) -> RegistryView:
    version = view.versions[name]
    return applied(promote_records(view, version, decision(view, name)), view)


@pytest.mark.parametrize(
    ("size", "count"), [(0, 0), (1, 1), (CHUNK_BYTES, 1), (CHUNK_BYTES + 1, 2), (3 * CHUNK_BYTES, 3)]
)
def test_chunks_put_together_are_the_body_and_as_many_as_the_version_says(size: int, count: int) -> None:
    body = random.Random(1).randbytes(size)
    cut = chunks("gru8-a", body)
    assert b"".join(value for _, value in cut if value) == body
    assert [key for key, _ in cut] == [f"chunk/gru8-a/{n:04d}".encode() for n in range(count)]
    version = new_version(RegistryView(), manifest_of("gru8-a", body), body, origin="trained", created_at=NOW)
    assert (version.chunks, version.size) == (count, size)


def test_a_version_is_written_after_its_chunks_and_deleted_before_them() -> None:
    body = random.Random(1).randbytes(CHUNK_BYTES + 1)
    version = new_version(RegistryView(), manifest_of("gru8-a", body), body, origin="trained", created_at=NOW)
    written = publish_records(version, body)
    order = [b"chunk/gru8-a/0000", b"chunk/gru8-a/0001", b"version/gru8-a"]
    assert [key for key, _ in written] == order
    assert trim_records(applied(written), keep=0) == [(order[2], None), (order[0], None), (order[1], None)]


def test_everything_written_is_read_back_as_it_was() -> None:
    view = published(RegistryView("plant.models.v1"), "gru8-a")
    made = decision(view, "gru8-a", figures=[{"name": "Millrace", "pinball": 0.1, "by_lead": {"mse": [1.0, None]}}])
    applied(promote_records(view, view.versions["gru8-a"], made, since_ms=7), view)
    swap = Swap(partition=2, offset=99_182, version="gru8-a", state="ring")
    applied([swap_record(swap)], view)
    again = applied(
        [
            version_record(view.versions["gru8-a"]),
            champion_record(view.champion),  # type: ignore[arg-type]
            decision_record(view.decisions[0]),
            swap_record(view.swaps[2][0]),
        ]
    )
    assert again.versions == view.versions
    assert again.champion == view.champion == Champion(version="gru8-a", decision="00000001-token", since_ms=7)
    assert again.decisions == [made]
    assert again.swaps == {2: [swap]}


def test_what_is_not_a_number_is_written_as_null() -> None:
    made = decision(RegistryView(), figures=[{"pinball": float("nan")}])
    _, value = decision_record(made)
    assert value is not None
    assert msgspec.json.decode(value)["figures"] == [{"pinball": None}]


def test_a_tombstone_takes_its_entry_away() -> None:
    view = promoted(published(RegistryView(), "gru8-a"), "gru8-a")
    applied([swap_record(Swap(partition=0, offset=5, version="gru8-a", state="ring"))], view)
    keys = [b"version/gru8-a", b"chunk/gru8-a/0000", b"champion", b"decision/00000001-token"]
    applied([(key, None) for key in [*keys, b"swap/00000/00000000000000000005"]], view)
    assert (view.versions, view.champion, view.decisions, view.swaps) == ({}, None, [], {})
    assert view.chunk_offsets("gru8-a") == {}


def test_swaps_are_ordered_by_offset_whatever_order_they_came_in() -> None:
    offsets = [1_000, 5, 99]
    records = [swap_record(Swap(partition=1, offset=n, version=f"v{n}", state="ring")) for n in offsets]
    view = applied(records)  # type: ignore[arg-type]
    assert [swap.offset for swap in view.swaps[1]] == [5, 99, 1_000]


def test_a_version_is_found_by_name_and_by_number_and_others_are_named() -> None:
    view = published(RegistryView("plant.models.v1"), "gru8-a", "lstm8-b")
    assert view.resolve("lstm8-b").number == 2
    assert view.resolve("1").version == "gru8-a"
    with pytest.raises(DeploymentError, match=r"no version '3'; expected one of 1 \(gru8-a\), 2 \(lstm8-b\)"):
        view.resolve("3")
    with pytest.raises(DeploymentError, match=r"holds no model, so none is called 'gru8-a'.*millrace train"):
        RegistryView("plant.models.v1").resolve("gru8-a")


def test_numbers_go_on_after_the_oldest_versions_are_gone() -> None:
    view = published(RegistryView(), "a", "b", "c")
    applied(trim_records(view, keep=1), view)
    published(view, "d")
    assert [(version.number, version.version) for version in view.by_number] == [(3, "c"), (4, "d")]


def test_each_promotion_names_the_champion_before_it_as_the_previous_one() -> None:
    view = published(RegistryView(), "a", "b", "c")
    for name in "abc":
        promoted(view, name)
    assert view.champion == Champion(version="c", previous="b", decision="00000003-token")
    assert [(entry.version, entry.champion) for entry in view.decisions] == [("a", ""), ("b", "a"), ("c", "b")]


def test_a_rollback_returns_the_previous_one_and_marks_the_one_that_leaves() -> None:
    view = promoted(promoted(published(RegistryView(), "a", "b"), "a"), "b")
    back = decision(view, "a", kind="rolled-back", trigger="disappointed")
    applied(rollback_records(view, back, withdrawn="its error rose", since_ms=9), view)
    assert view.champion == Champion(version="a", decision=back.id, since_ms=9)
    assert view.versions["b"].withdrawn == "its error rose"
    with pytest.raises(DeploymentError, match="champion a has no previous version to return to; promote another"):
        rollback_records(view, back, withdrawn="again")
    with pytest.raises(DeploymentError, match="names no champion"):
        rollback_records(RegistryView(), back, withdrawn="again")


def test_a_withdrawn_version_that_is_promoted_is_withdrawn_no_longer() -> None:
    view = promoted(promoted(published(RegistryView(), "a", "b"), "a"), "b")
    applied(rollback_records(view, decision(view, "a", kind="rolled-back"), withdrawn="bad"), view)
    promoted(view, "b")
    assert view.versions["b"].withdrawn == ""


def test_trimming_keeps_the_champion_its_previous_one_and_those_spared() -> None:
    view = promoted(promoted(published(RegistryView(), *"abcdef"), "a"), "b")
    applied(trim_records(view, keep=4, spare={"c"}), view)
    assert sorted(view.versions) == ["a", "b", "c", "f"]
    assert trim_records(view, keep=4) == []
    assert len(view.decisions) == 2


def test_a_version_that_is_about_to_come_counts_when_trimming() -> None:
    view = published(RegistryView(), *"abc")
    assert [key for key, _ in trim_records(view, keep=3, spare={"d"})] == [b"version/a", b"chunk/a/0000"]


def test_decision_ids_sort_in_order_and_tell_their_writer_that_its_own_is_there() -> None:
    view = RegistryView()
    for n in range(12):
        applied([decision_record(decision(view, id=view.next_decision_id(f"writer{n}")))], view)
    assert [entry.id for entry in view.decisions] == [f"{n + 1:08d}-writer{n}" for n in range(12)]
    assert view.next_decision_id("x", ahead=1) == "00000014-x"
    assert view.decided("writer11")
    assert not view.decided("writer")


def test_bytes_that_are_not_those_of_the_manifest_are_refused() -> None:
    with pytest.raises(DeploymentError, match=r"model a: model\.keras has sha256 .*expected .*copy the folder again"):
        new_version(RegistryView(), manifest_of("a", b"right"), b"wrong", origin="imported", created_at=NOW)


def test_a_name_that_would_split_a_key_is_refused() -> None:
    with pytest.raises(DeploymentError, match="expected a name without a slash"):
        new_version(RegistryView(), manifest_of("a/b", b""), b"", origin="imported", created_at=NOW)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        (b"champion", b"{", "key 'champion': .*expected a Champion as JSON"),
        (b"version/a", b'{"version": "a"}', "key 'version/a': .*missing required field"),
        (b"decision/1", b'{"kind": "guessed"}', "key 'decision/1': "),
        (b"chunk/a/first", b"x", "its last parts are no numbers"),
        (b"swap/0/x", b"{}", "its last parts are no numbers"),
    ],
)
def test_a_record_that_cannot_be_read_is_named_with_the_mend(key: bytes, value: bytes, says: str) -> None:
    with pytest.raises(DeploymentError, match=f'topic "plant.models.v1", {says}' if "key" in says else says) as caught:
        RegistryView("plant.models.v1").apply(key, value, 0)
    assert "delete the key" in str(caught.value)


def test_keys_of_a_later_version_of_millrace_are_passed_over() -> None:
    view = RegistryView()
    assert not view.apply(b"note/1", b"hello", 0)
    assert not view.apply(b"\xff\xfe", b"hello", 0)


def test_fields_of_a_later_version_of_millrace_are_passed_over() -> None:
    value = b'{"version": "a", "decision": "1", "mood": "good"}'
    assert applied([(b"champion", value)]).champion == Champion(version="a", decision="1")


def test_no_records_make_no_batch() -> None:
    assert batches([], "t") == []
    (batch,) = batches([(b"champion", None)], "t")
    assert (batch.topic, batch.partition, list(batch.keys), list(batch.values)) == ("t", 0, [b"champion"], [None])


def test_a_version_holds_what_it_was_made_of() -> None:
    body = b"weights"
    version = new_version(
        RegistryView(), manifest_of("a", body), body, origin="trained", created_at=NOW, parent="p", learned_to_ms=5
    )
    assert version == Version(
        version="a",
        number=1,
        sha256=hashlib.sha256(body).hexdigest(),
        size=7,
        chunks=1,
        manifest=manifest_of("a", body),
        origin="trained",
        parent="p",
        learned_to_ms=5,
        created_at=NOW,
    )
