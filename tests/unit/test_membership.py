"""A member that the group went on without must not trust what it still holds, whatever the client believes."""

from dataclasses import dataclass

from kafka import TopicPartition

from pipeline.kafka.membership import Assignor


@dataclass
class Assignment:
    numbers: tuple[int, ...]

    def partitions(self):
        return [TopicPartition("readings", number) for number in self.numbers]


def told(*generations):
    """What the assignor reports as kept across a gap, when it is told of these (generation, partitions) in turn."""
    gaps = []
    assignor = Assignor(lambda kept: gaps.append(sorted(tp.partition for tp in kept)))
    for generation, numbers in generations:
        assignor.on_assignment(Assignment(numbers), generation)
    return gaps


def test_generations_without_gaps_keep_what_is_kept():
    assert told((1, (0, 1, 2)), (2, (0, 1)), (2, (0, 1)), (3, (0, 1, 5))) == []


def test_what_was_kept_across_a_missed_generation_begins_anew():
    assert told((1, (0, 1, 2)), (3, (0, 1, 7))) == [[0, 1]]


def test_a_group_that_began_to_count_again_is_a_gap_as_well():
    assert told((7, (0, 1)), (1, (1,))) == [[1]]


def test_what_came_anew_is_told_by_the_client_itself():
    assert told((1, (0, 1)), (5, (2, 3))) == []


def test_a_partition_that_was_lost_is_not_claimed_any_more():
    gaps = []
    assignor = Assignor(gaps.append)
    assignor.on_assignment(Assignment((0, 1, 2)), 4)
    assignor.forget(TopicPartition("readings", number) for number in (0, 1))
    assert assignor.member_assignment == [TopicPartition("readings", 2)]
    assignor.on_assignment(Assignment((0, 1)), 9)
    assert gaps == []
