"""The Keras layers. Imports Keras at the top, so it is itself only imported inside functions (see
`models.rnn.load_tensorflow`)."""

from __future__ import annotations

from statistics import NormalDist
from typing import Any

import keras
import numpy as np
import tensorflow as tf

Tensor = Any
CELLS = {
    "simple_rnn": keras.layers.SimpleRNNCell,
    "lstm": keras.layers.LSTMCell,
    "gru": keras.layers.GRUCell,
}
UNROLLED = 8
"""Steps written out in one round of the loop in training, where a round costs as much as several steps of a small cell.
XLA gains nothing from it and takes four times as long to compile."""


@keras.saving.register_keras_serializable("millrace")
class StackedCells(keras.layers.Layer):  # type: ignore[misc]
    """Keras cells stacked, their state a value: in with the steps, out with the answer.

    The cells own the weights and say what they mean (`tests/helpers/textbook.py` computes the same from them); the loop
    over steps is this layer's own: the product of all inputs with the kernel is one matrix product ahead of it, and a
    masked step hands the state on untouched, whatever its input.
    """

    def __init__(self, cell: str, units: int, layers: int, **options: Any) -> None:
        super().__init__(**options)
        self.cell, self.units, self.depth = cell, units, layers
        self.cells = [CELLS[cell](units, name=f"{cell}_{level}") for level in range(layers)]
        self.state_size = 2 * units if cell == "lstm" else units

    def build(self, shapes: Any) -> None:
        size = shapes[0][-1]
        for cell in self.cells:
            cell.build((None, size))
            size = self.units
        self.built = True

    def call(self, inputs: tuple[Tensor, Tensor, Tensor], training: bool = False) -> tuple[Tensor, Tensor]:
        """(x (B, T, F), mask (B, T), state (L, B, S)) -> (hidden (B, T, units) of the top level, state (L, B, S))."""
        x, mask, state = inputs
        live = tf.transpose(tf.cast(mask, tf.bool))[..., None]
        sequence = tf.transpose(x, [1, 0, 2])
        states = []
        for level, cell in enumerate(self.cells):
            sequence, final = self._run(cell, sequence, live, state[level], UNROLLED if training else 1)
            states.append(final)
        return tf.transpose(sequence, [1, 0, 2]), tf.stack(states)

    def _run(self, cell: Any, sequence: Tensor, live: Tensor, state: Tensor, unrolled: int) -> tuple[Tensor, Tensor]:
        """sequence: (T, B, F); live: (T, B, 1); state: (B, S) -> hidden (T, B, units), state (B, S)."""
        ahead = tf.einsum("tbf,fg->tbg", sequence, cell.kernel) + (cell.bias[0] if self.cell == "gru" else cell.bias)
        steps = sequence.shape[0]
        stride = next(size for size in range(unrolled, 0, -1) if (steps or 1) % size == 0)
        ahead, live = (tf.reshape(part, [-1, stride, *tf.unstack(tf.shape(part)[1:])]) for part in (ahead, live))

        def stretch(x_part: Tensor, live_part: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
            hidden = []
            for x, on in zip(tf.unstack(x_part, stride), tf.unstack(live_part, stride)):
                state = tf.where(on, _STEPS[self.cell](cell, x, state, self.units), state)
                hidden.append(state[:, : self.units])
            return tf.stack(hidden), state

        if steps == stride:
            return stretch(ahead[0], live[0], state)
        rounds = steps // stride if steps else tf.shape(ahead)[0]
        # Read from an array, not by slicing: the gradient of a slice is as large as the whole, in every round.
        parts = tf.TensorArray(tf.float32, rounds).unstack(ahead)

        def body(at: Tensor, state: Tensor, hidden: Any) -> tuple[Tensor, Tensor, Any]:
            found, state = stretch(parts.read(at), live[at], state)
            return at + 1, state, hidden.write(at, found)

        hidden = tf.TensorArray(tf.float32, rounds, element_shape=(stride, sequence.shape[1], self.units))
        _, final, hidden = tf.while_loop(
            lambda at, *_: at < rounds, body, (0, state, hidden), maximum_iterations=rounds, parallel_iterations=1
        )
        return tf.reshape(hidden.stack(), [-1, tf.shape(sequence)[1], self.units]), final

    def compute_output_shape(self, shapes: Any) -> Any:
        x, _, state = shapes
        return (x[0], x[1], self.units), state

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "cell": self.cell, "units": self.units, "layers": self.depth}


def _simple_rnn(cell: Any, ahead: Tensor, h: Tensor, _units: int) -> Tensor:
    """h' = tanh(x W + h U + b): Elman, J. L. (1990), Finding structure in time, Cognitive Science 14(2)."""
    return tf.tanh(ahead + h @ cell.recurrent_kernel)


def _lstm(cell: Any, ahead: Tensor, state: Tensor, units: int) -> Tensor:
    """Gates i, f, c, o in Keras' order: Gers, Schmidhuber and Cummins (2000), Neural Computation 12(10). state = [h,
    c]."""
    h, c = state[:, :units], state[:, units:]
    i, f, candidate, o = tf.split(ahead + h @ cell.recurrent_kernel, 4, axis=1)
    c = tf.sigmoid(f) * c + tf.sigmoid(i) * tf.tanh(candidate)
    return tf.concat([tf.sigmoid(o) * tf.tanh(c), c], axis=1)


def _gru(cell: Any, ahead: Tensor, h: Tensor, _units: int) -> Tensor:
    """Gates z, r, h in Keras' order; the reset gate after the product (cuDNN's variant of Cho et al. 2014)."""
    recurrent = h @ cell.recurrent_kernel + cell.bias[1]
    xz, xr, xh = tf.split(ahead, 3, axis=1)
    hz, hr, hh = tf.split(recurrent, 3, axis=1)
    z, r = tf.sigmoid(xz + hz), tf.sigmoid(xr + hr)
    return z * h + (1.0 - z) * tf.tanh(xh + r * hh)


_STEPS = {"simple_rnn": _simple_rnn, "lstm": _lstm, "gru": _gru}


@keras.saving.register_keras_serializable("millrace")
class QuantileHeads(keras.layers.Layer):  # type: ignore[misc]
    """[hidden, input] -> mean and quantiles of all leads and targets, in scaled units.

    A wide-and-deep head: a linear path from the input, which carries seasons and last changes straight to the leads,
    beside a hidden layer. The outputs start at 0: an untrained network says "as now". Quantiles never cross: the middle
    one is an offset from the mean, its neighbours go outwards by softplus steps.
    """

    def __init__(
        self, horizon: int, targets: int, quantiles: list[float], dense: int, dropout: float, **options: Any
    ) -> None:
        super().__init__(**options)
        self.horizon, self.targets, self.levels = horizon, targets, [float(level) for level in quantiles]
        self.dense, self.dropout = dense, dropout
        outputs = horizon * targets
        self.hidden = keras.layers.Dense(dense, activation="relu", name="hidden")
        self.drops = [keras.layers.Dropout(dropout, seed=seed, name=f"dropout_{seed}") for seed in (1, 2)]
        self.mean = keras.layers.Dense(outputs, kernel_initializer="zeros", name="mean")
        self.linear = keras.layers.Dense(outputs, kernel_initializer="zeros", use_bias=False, name="linear")
        self.offsets = keras.layers.Dense(outputs * len(quantiles), kernel_initializer="zeros", name="offsets")
        self.middle = int(np.argmin(np.abs(np.array(self.levels) - 0.5)))

    def build(self, shapes: Any) -> None:
        hidden, x = shapes
        width = hidden[-1] + x[-1]
        self.hidden.build((None, None, width))
        self.linear.build((None, None, x[-1]))
        for layer in (self.mean, self.offsets):
            layer.build((None, None, self.dense))
        self.built = True

    def call(self, inputs: tuple[Tensor, Tensor], training: bool = False) -> tuple[Tensor, Tensor]:
        """(hidden (B, T, U), x (B, T, F)) -> mean (B, T, H, K), quantiles (B, T, H, K, Q)."""
        hidden, x = inputs
        both = self.drops[0](tf.concat([hidden, x], axis=-1), training=training)
        deep = self.drops[1](self.hidden(both), training=training)
        shape = tf.concat([tf.shape(x)[:2], [self.horizon, self.targets]], axis=0)
        mean = tf.reshape(
            self.mean(deep) + (self.linear(x) if __import__("os").environ.get("LIN", "1") == "1" else 0.0), shape
        )
        offsets = tf.reshape(self.offsets(deep), tf.concat([shape, [len(self.levels)]], axis=0))
        return mean, tf.stop_gradient(mean)[..., None] + self._ordered(offsets)

    def _ordered(self, raw: Tensor) -> Tensor:
        """(..., Q) anything -> (..., Q) never decreasing, by cumulative softplus steps out of the middle."""
        steps = np.diff([NormalDist().inv_cdf(level) for level in self.levels])
        start = np.log(np.expm1(0.7 * steps)).astype(np.float32)
        out = {self.middle: raw[..., self.middle]}
        for q in range(self.middle + 1, len(self.levels)):
            out[q] = out[q - 1] + tf.nn.softplus(raw[..., q] + start[q - 1])
        for q in range(self.middle - 1, -1, -1):
            out[q] = out[q + 1] - tf.nn.softplus(raw[..., q] + start[q])
        return tf.stack([out[q] for q in range(len(self.levels))], axis=-1)

    def compute_output_shape(self, shapes: Any) -> Any:
        batch, steps = shapes[1][:2]
        mean = (batch, steps, self.horizon, self.targets)
        return mean, (*mean, len(self.levels))

    def get_config(self) -> dict[str, Any]:
        own = {
            "horizon": self.horizon,
            "targets": self.targets,
            "quantiles": self.levels,
            "dense": self.dense,
            "dropout": self.dropout,
        }
        return {**super().get_config(), **own}


@keras.saving.register_keras_serializable("millrace")
class NoCells(keras.layers.Layer):  # type: ignore[misc]
    """In the place of the cells of a network without memory: the answer hangs on the input alone, the state stays what
    it is."""

    def __init__(self, units: int, layers: int, **options: Any) -> None:
        super().__init__(**options)
        self.units, self.depth = units, layers
        self.levels = [keras.layers.Dense(units, activation="relu", name=f"dense_{level}") for level in range(layers)]

    def build(self, shapes: Any) -> None:
        size = shapes[0][-1]
        for level in self.levels:
            level.build((None, None, size))
            size = self.units
        self.built = True

    def call(self, inputs: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, _, state = inputs
        for level in self.levels:
            x = level(x)
        return x, state

    def compute_output_shape(self, shapes: Any) -> Any:
        x, _, state = shapes
        return (x[0], x[1], self.units), state

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "units": self.units, "layers": self.depth}


def build(body: Any, heads: QuantileHeads, input_size: int, state_size: int) -> Any:
    """The Keras model: [x (B, T, F), mask (B, T), state (L, B, S)] -> [mean, quantiles, state]."""
    x = keras.Input((None, input_size), name="x")
    mask = keras.Input((None,), dtype="bool", name="mask")
    state = keras.Input(batch_shape=(body.depth, None, state_size), name="state")
    hidden, after = body((x, mask, state))
    mean, quantiles = heads((hidden, x))
    return keras.Model([x, mask, state], [mean, quantiles, after])
