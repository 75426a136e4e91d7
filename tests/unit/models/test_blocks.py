import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from models.blocks import iter_blocks


def blocks(sensor, reset=None, **limits):
    sensor = np.asarray(sensor, np.int32)
    return list(iter_blocks(sensor, np.zeros(len(sensor), bool) if reset is None else np.asarray(reset), **limits))


steps = st.lists(st.tuples(st.integers(0, 6), st.booleans()), max_size=120)
limits = st.fixed_dictionaries(
    {
        "max_steps": st.integers(1, 9),
        "max_rows": st.integers(1, 5),
        "max_cells": st.integers(1, 30),
        "buckets": st.sampled_from([(1, 8, 64), (1,), (2, 3, 5)]),
    }
)


@given(steps, limits)
def test_every_step_is_in_exactly_one_block_and_each_sensors_steps_stay_in_order(steps, limits):
    sensor = np.array([s for s, _ in steps], np.int32)
    reset = np.array([r for _, r in steps], bool)
    seen = {s: [] for s in range(7)}
    for block in blocks(sensor, reset, **limits):
        for row, slot in enumerate(block.sensors):
            positions = block.index[row][block.live[row]]
            assert (sensor[positions] == slot).all()
            seen[int(slot)] += positions.tolist()
    for slot, positions in seen.items():
        assert positions == np.flatnonzero(sensor == slot).tolist()


@given(steps, limits)
def test_a_reset_is_only_ever_at_the_first_step_of_a_block(steps, limits):
    sensor = np.array([s for s, _ in steps], np.int32)
    reset = np.array([r for _, r in steps], bool)
    for block in blocks(sensor, reset, **limits):
        assert (block.reset == reset[block.index[:, 0]]).all()
        assert not (reset[block.index] & block.live)[:, 1:].any()


@given(steps, limits)
def test_blocks_keep_to_their_limits_and_hold_a_sensor_once(steps, limits):
    for block in blocks([s for s, _ in steps], [r for _, r in steps], **limits):
        rows, width = block.shape
        assert len(set(block.sensors.tolist())) == rows <= limits["max_rows"]
        assert width <= limits["max_steps"]
        assert rows == 1 or rows * width <= limits["max_cells"]


@given(steps)
def test_padding_stands_on_the_right_and_every_row_has_a_step(steps):
    for block in blocks([s for s, _ in steps]):
        assert block.live[:, 0].all()
        assert (np.diff(block.live.astype(int), axis=1) <= 0).all()
        assert block.live.any(axis=0).all()
        assert (block.index[~block.live] == 0).all()


def test_one_step_of_each_sensor_makes_one_block_in_the_order_given():
    (block,) = blocks([5, 3, 9])
    assert block.sensors.tolist() == [5, 3, 9]
    assert block.index.tolist() == [[0], [1], [2]]


def test_sensors_with_similar_numbers_of_steps_share_a_block_so_that_padding_stays_small():
    sensor = np.repeat(np.arange(100), np.where(np.arange(100) % 10 == 0, 60, 1))
    found = blocks(sensor)
    cells = sum(block.live.size for block in found)
    assert cells == len(sensor)
    assert len(found) == 2


def test_no_steps_make_no_blocks():
    assert blocks([]) == []


def test_a_block_picks_columns_by_position():
    (block,) = blocks([1, 2, 1], buckets=(8,))
    steps = block.step_block(np.array([[10.0], [20.0], [30.0]]), np.array([1, 2, 3]))
    by_sensor = {int(s): steps.values[i, steps.live[i], 0].tolist() for i, s in enumerate(block.sensors)}
    assert by_sensor == {1: [10.0, 30.0], 2: [20.0]}
    assert sorted(block.positions().tolist()) == [0, 1, 2]
