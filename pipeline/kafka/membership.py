"""Membership in a consumer group: what the client's network thread sees of rebalances, and what proves that a partition is ours.

kafka-python 3.0.12 rebalances in the background, between and during polls. Its network thread must not block, so it only takes
notes (`Rebalances`) and keeps new partitions from being read (`hold`); the polling thread acts on the notes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from kafka import ConsumerRebalanceListener
from kafka.coordinator.assignors.cooperative_sticky import CooperativeStickyAssignor
from kafka.structs import ConsumerGroupMetadata, MemberState

from pipeline.errors import DeploymentError

FENCED_AFTER_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Membership:
    """Proof that partitions are ours: handed on with a commit, it lets the broker refuse a worker that has lost them."""

    topic: str
    partitions: frozenset[int]
    metadata: Any
    """The client's ConsumerGroupMetadata: group, generation, member, instance."""

    @property
    def instance_id(self) -> str:
        return self.metadata.group_instance_id or ""


def memberless(topic: str, group_id: str) -> Membership:
    """For a program that sets offsets of a group that has no members: nobody proves anything, so the caller sees to that."""
    return Membership(topic, frozenset(), ConsumerGroupMetadata(group_id))


def fenced(instance_id: str | None) -> DeploymentError:
    return DeploymentError(
        f'another worker has joined the group with kafka.group_instance_id = "{instance_id}" and taken this one\'s place;'
        " give each worker a name of its own, or stop one of the two"
    )


class Assignor(CooperativeStickyAssignor):  # type: ignore[misc]
    """Incremental rebalances: whoever stays with its partitions keeps their state, and goes on while others move.

    `generation`: of the assignment that the client took over last; it is told right after that. Generations are numbered
    without gaps: `on_gap` is called with the partitions that were kept across one that this member was no part of.
    """

    def __init__(self, on_gap: Callable[[set[Any]], None]) -> None:
        super().__init__()
        self.generation = -1
        self.held: set[Any] = set()
        self._on_gap = on_gap

    def on_assignment(self, assignment: Any, generation: int) -> None:
        before = self.generation
        super().on_assignment(assignment, generation)  # sets self.generation
        assigned = set(assignment.partitions())
        kept, self.held = self.held & assigned, assigned
        if kept and generation not in (before, before + 1):
            self._on_gap(kept)

    def forget(self, partitions: Iterable[Any]) -> None:
        """These are not held any longer, and must not be claimed at the next rebalance."""
        self.held -= set(partitions)
        self.member_assignment = list(self.held)


class Rebalances:
    """What the client's network thread saw happen, for the polling thread to act on."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._events: list[tuple[str, list[int]]] = []

    def assigned(self, partitions: Iterable[int]) -> None:
        with self._lock:
            self._events.append(("assigned", list(partitions)))

    def revoked(self, partitions: Iterable[int]) -> None:
        with self._lock:
            self._events.append(("revoked", list(partitions)))

    def take(self) -> list[tuple[str, list[int]]]:
        with self._lock:
            events, self._events = self._events, []
        return events

    def waiting(self) -> bool:
        with self._lock:
            return bool(self._events)

    def revokes(self, partition: int) -> bool:
        with self._lock:
            return any(kind == "revoked" and partition in partitions for kind, partitions in self._events)


class Listener(ConsumerRebalanceListener):  # type: ignore[misc]
    """Runs on the client's network thread and must not block: it takes notes, and keeps new partitions from being
    read."""

    def __init__(self, rebalances: Rebalances, consumer: Any, assignor: Assignor) -> None:
        self._rebalances = rebalances
        self._consumer = consumer
        self._assignor = assignor

    def on_partitions_assigned(self, assigned: Iterable[Any]) -> None:
        new = list(assigned)
        hold(self._consumer, new)
        self._rebalances.assigned(tp.partition for tp in new)

    def on_partitions_revoked(self, revoked: Iterable[Any]) -> None:
        self._assignor.forget(revoked)
        self._rebalances.revoked(tp.partition for tp in revoked)


def hold(consumer: Any, partitions: Iterable[Any]) -> None:
    """Keeps partitions from being read until the caller has said where to start. Without any position the client
    would look one up by itself; offset 0 is never fetched, because they are paused."""
    for tp in partitions:
        consumer.pause(tp)
        consumer.seek(tp, 0)


class Joins:
    """Lets the client finish a join that outlasts one poll. 3.0.12 has two defects there, which short polls meet often:

    - a join that the leader began because the topic's metadata changed is forgotten in mid-way: its own assignment takes over
      the new metadata, and no reason to join is left, although nobody has taken over what came of it. The member then stands
      outside of the group for good, without heartbeats, and says that it is rebalancing;
    - what a join brought between two polls is thrown away, and the join sent again.
    """

    def __init__(self, consumer: Any) -> None:
        self._coordinator = consumer._coordinator
        self._join = self._coordinator._do_join_and_sync_async
        self._complete = self._coordinator._on_join_complete_async
        self._brought: tuple[Any, Any] | None = None
        """(generation, assignment) of a join that no poll has taken over yet."""
        self._coordinator._do_join_and_sync_async = self._join_or_take_over
        self._coordinator._on_join_complete_async = self._taken_over

    def before_poll(self) -> None:
        if self._coordinator.rejoining:
            self._coordinator.rejoin_needed = True

    async def _join_or_take_over(self) -> Any:
        if self._brought is not None and self._brought[0] is self._coordinator._generation:
            return self._brought[1]
        self._brought = None
        assignment = await self._join()
        self._brought = (self._coordinator._generation, assignment)
        return assignment

    async def _taken_over(self, *arguments: Any) -> Any:
        self._brought = None
        return await self._complete(*arguments)


class Place:
    """Whether a static member's place in the group is still its own.

    3.0.12 stops its heartbeats when another member has joined with the same group_instance_id, and tells nobody: it goes on
    reading as if nothing had happened. While it joins it is silent for a moment, too."""

    def __init__(self, consumer: Any) -> None:
        self._instance_id = consumer.config["group_instance_id"]
        self._coordinator = consumer._coordinator
        self._silent_since: float | None = None

    def require(self) -> None:
        """Raises DeploymentError when another member has taken it."""
        if not self._instance_id:
            return
        with self._coordinator._lock:
            silent = self._coordinator.state == MemberState.STABLE and not self._coordinator._heartbeat_enabled
        if not silent:
            self._silent_since = None
            return
        self._silent_since = self._silent_since or time.monotonic()
        if time.monotonic() - self._silent_since > FENCED_AFTER_SECONDS:
            raise fenced(self._instance_id)
