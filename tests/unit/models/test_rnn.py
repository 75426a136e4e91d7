import keras
import numpy as np
import pytest
import tensorflow as tf

from models.features import input_size
from models.forecaster import SeriesSpec
from models.nets import QuantileHeads
from models.rnn import MAX_CELLS, ROW_BUCKETS, STEP_BUCKETS, RecurrentNet, row_plan
from tests.helpers import textbook
from tests.helpers.series import SINGLE

pytestmark = pytest.mark.keras
CELLS = ("simple_rnn", "lstm", "gru")
B, T, F, U = 3, 7, 4, 5


@pytest.fixture(scope="module")
def nets():
    """One small network with weights of all sizes for each cell."""
    out = {}
    for cell in CELLS:
        keras.utils.set_random_seed(1)
        out[cell] = RecurrentNet(SINGLE, cell, units=6, layers=2, dense=8)
        shaken(out[cell])
    return out


def shaken(net, seed=0):
    random = np.random.default_rng(seed)
    net.model.set_weights([w + 0.3 * random.standard_normal(w.shape).astype("f4") for w in net.model.get_weights()])


def steps_and_state(net, batch, steps, seed=0):
    random = np.random.default_rng(seed)
    x = random.standard_normal((batch, steps, net.input_size)).astype(np.float32)
    state = random.uniform(-1, 1, (net.layers, batch, net.state_size)).astype(np.float32)
    return x, np.ones((batch, steps), bool), state


def stacked(cell, *, layers=1):
    """The product's own layer and random inputs for it; bias away from 0."""
    from models.nets import StackedCells

    keras.utils.set_random_seed(0)
    body = StackedCells(cell, U, layers)
    random = np.random.default_rng(0)
    x = random.standard_normal((B, T, F)).astype(np.float32)
    state = random.uniform(-1, 1, (layers, B, body.state_size)).astype(np.float32)
    mask = np.ones((B, T), bool)
    body((x, mask, state))
    for variable in body.trainable_variables:
        variable.assign(variable + 0.2 * random.standard_normal(variable.shape).astype("f4"))
    return body, x, mask, state


def close(found, expected):
    assert np.asarray(found) == pytest.approx(np.asarray(expected), abs=2e-5)


def test_simple_rnn_equals_the_textbook():
    body, x, mask, state = stacked("simple_rnn")
    kernel, recurrent, bias = (v.numpy() for v in body.cells[0].trainable_variables)
    W = np.concatenate([kernel, recurrent])
    expected, _ = textbook.rnn_forward(x, state[0], W, bias, np.eye(U), np.zeros(U))
    hidden, after = body((x, mask, state))
    close(hidden, expected)
    close(after[0], expected[:, -1])


def test_gradients_through_time_equal_the_textbook():
    body, x, mask, state = stacked("simple_rnn")
    kernel, recurrent, bias = body.cells[0].trainable_variables
    random = np.random.default_rng(3)
    W_y, b_y = (
        tf.Variable(random.standard_normal((U, 2)), dtype=tf.float32),
        tf.Variable(random.standard_normal(2), dtype=tf.float32),
    )
    truth = random.standard_normal((B, T, 2)).astype(np.float32)
    first = tf.Variable(state)
    with tf.GradientTape() as tape:
        hidden, _ = body((x, mask, first))
        loss = tf.reduce_sum((hidden @ W_y + b_y - truth) ** 2) / 2
    found = tape.gradient(loss, [kernel.value, recurrent.value, bias.value, W_y, b_y, first])
    W = np.concatenate([kernel.numpy(), recurrent.numpy()]).astype(float)
    dW, db, dW_y, db_y, dh = textbook.rnn_backward(
        x.astype(float), state[0].astype(float), W, bias.numpy(), W_y.numpy(), b_y.numpy(), truth
    )
    for ours, expected in zip(found, (dW[:F], dW[F:], db, dW_y, db_y, dh[None]), strict=True):
        assert ours.numpy() == pytest.approx(expected, rel=1e-3, abs=1e-3)


def test_lstm_equals_the_textbook():
    body, x, mask, state = stacked("lstm")
    weights = [v.numpy() for v in body.cells[0].trainable_variables]
    expected, h, c = textbook.lstm_forward(x, state[0, :, :U], state[0, :, U:], *weights)
    hidden, after = body((x, mask, state))
    close(hidden, expected)
    close(after[0], np.concatenate([h, c], axis=1))


def test_gru_equals_the_textbook():
    body, x, mask, state = stacked("gru")
    weights = [v.numpy() for v in body.cells[0].trainable_variables]
    expected = textbook.gru_forward(x, state[0], *weights)
    hidden, after = body((x, mask, state))
    close(hidden, expected)
    close(after[0], expected[:, -1])


@pytest.mark.parametrize("cell", CELLS)
def test_stacked_cells_equal_keras_own_layers(cell):
    body, x, mask, state = stacked(cell, layers=2)
    sequence = x
    for level, own in enumerate(body.cells):
        layer = keras.layers.RNN(own, return_sequences=True, return_state=True)
        first = [state[level, :, :U], state[level, :, U:]] if cell == "lstm" else state[level]
        sequence, *after = layer(tf.constant(sequence), initial_state=first)
        close(body((x, mask, state))[1][level], np.concatenate(after, axis=1))
    close(body((x, mask, state))[0], sequence)


@pytest.mark.parametrize("cell", CELLS)
def test_a_masked_step_hands_the_state_on_untouched(cell):
    body, x, _, state = stacked(cell, layers=2)
    mask = np.random.default_rng(5).random((B, T)) < 0.5
    _, after = body((x, mask, state))
    for sensor in range(B):
        _, alone = body((x[[sensor]][:, mask[sensor]], mask[[sensor]][:, mask[sensor]], state[:, [sensor]]))
        close(after[:, sensor], alone[:, 0])


@pytest.mark.parametrize("cell", CELLS)
def test_batched_steps_equal_sensors_run_one_at_a_time(nets, cell):
    net = nets[cell]
    x, mask, state = steps_and_state(net, 5, 3)
    together = net.unroll(x, mask, state)
    for sensor in range(5):
        alone = net.unroll(x[[sensor]], mask[[sensor]], state[:, [sensor]])
        close(together[0][sensor], alone[0][0])
        close(together[1][sensor], alone[1][0])
        close(together[2][:, sensor], alone[2][:, 0])


@pytest.mark.parametrize(
    ("cell", "steps", "cuts"), [("simple_rnn", 8, [1, 5]), ("lstm", 8, [2, 7]), ("gru", 70, [8, 9, 60])]
)
def test_a_run_with_carried_state_equals_the_one_long_sequence(nets, cell, steps, cuts):
    net = nets[cell]
    x, mask, state = steps_and_state(net, 2, steps)
    whole = net.unroll(x, mask, state)
    carried, parts = state, []
    for part, live in zip(np.split(x, cuts, axis=1), np.split(mask, cuts, axis=1)):
        mean, _, carried = net.unroll(part, live, carried)
        parts.append(mean)
    close(np.concatenate(parts, axis=1), whole[0])
    close(carried, whole[2])


def test_padding_of_rows_and_steps_changes_nothing(nets):
    net = nets["gru"]
    x, mask, state = steps_and_state(net, 3, 5)
    plain = net.unroll(x, mask, state)
    padded = net.unroll(
        np.pad(x, ((0, 4), (0, 3), (0, 0)), constant_values=9.0),
        np.pad(mask, ((0, 4), (0, 3))),
        np.pad(state, ((0, 0), (0, 4), (0, 0))),
    )
    close(padded[0][:3, :5], plain[0])
    close(padded[2][:, :3], plain[2])


def test_the_state_handed_in_is_not_changed(nets):
    x, mask, state = steps_and_state(nets["gru"], 3, 5)
    before = state.copy()
    nets["gru"].unroll(x, mask, state)
    assert np.array_equal(before, state)


def test_the_number_of_compilations_is_bounded(nets):
    net = nets["simple_rnn"]
    before = net.compilations
    for batch in (1, 2, 3, 5, 9, 15, 16):
        net.unroll(*steps_and_state(net, batch, 1))
    assert 1 <= net.compilations <= before + 2  # one row, and sixteen for all the others
    assert sum(size * steps <= MAX_CELLS for size in ROW_BUCKETS for steps in STEP_BUCKETS) == 19


@pytest.mark.parametrize("steps", STEP_BUCKETS)
def test_row_plans_cover_every_batch_without_much_padding(steps):
    for batch in [*range(1, 300), 1000, 4095, 4096, 4097, 200_000]:
        plan = row_plan(batch, steps)
        assert batch <= sum(plan) <= max(16, 2 * batch + 64)
        assert sum(plan[:-1]) < batch
        assert set(plan) <= set(ROW_BUCKETS)


@pytest.mark.parametrize(
    "levels", [[0.5], [0.9], [0.1, 0.5, 0.9], [0.2, 0.8], [0.01, 0.05, 0.1], [0.1, 0.4, 0.6, 0.99]]
)
def test_quantiles_never_cross_whatever_the_weights(levels):
    heads = QuantileHeads(3, 2, levels, 4, 0.0)
    random = np.random.default_rng(0)
    hidden, x = random.standard_normal((2, 6, 5)), random.standard_normal((2, 6, 3))
    heads((tf.constant(hidden, tf.float32), tf.constant(x, tf.float32)))
    for variable in heads.trainable_variables:
        variable.assign(3 * random.standard_normal(variable.shape))
    mean, quantiles = heads((tf.constant(hidden, tf.float32), tf.constant(x, tf.float32)))
    assert quantiles.shape == (2, 6, 3, 2, len(levels))
    assert mean.shape == (2, 6, 3, 2)
    assert (np.diff(quantiles.numpy(), axis=-1) >= 0).all()


def test_an_untrained_network_says_as_now():
    net = RecurrentNet(SINGLE, "gru", units=4)
    mean, quantiles, _ = net.unroll(*steps_and_state(net, 1, 1))
    assert (mean == 0).all()
    assert (quantiles[..., 0] < 0).all()
    assert (quantiles[..., 2] > 0).all()


def test_the_same_seed_gives_the_same_network():
    weights = []
    for _ in range(2):
        keras.utils.set_random_seed(7)
        weights.append(RecurrentNet(SINGLE, "lstm", units=4).model.get_weights())
    assert all(np.array_equal(a, b) for a, b in zip(*weights, strict=True))


def test_an_unknown_cell_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="simple_rnn, lstm, gru"):
        RecurrentNet(SINGLE, "transformer")


def test_the_network_takes_the_inputs_of_its_series():
    spec = SeriesSpec(("a.mean", "a.max"), (0,), 1000, 30, (0.5,), (10, 70))
    net = RecurrentNet(spec, "gru", units=4)
    assert net.input_size == input_size(spec)
    assert net.unroll(*steps_and_state(net, 1, 1))[1].shape == (1, 1, 30, 1, 1)
