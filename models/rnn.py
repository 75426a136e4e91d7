"""The recurrent network: hidden states in, hidden states out, compiled for a bounded number of shapes.

TensorFlow is imported by `load_tensorflow` and inside functions only: importing this module costs nothing.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.features import Context, input_size, rnn_inputs
from models.forecaster import Column, Prediction, Rows, SeriesSpec, StepBlock

Float32 = NDArray[np.float32]
Bool = NDArray[np.bool_]

STEP_BUCKETS = (1, 8, 64)
ROW_BUCKETS = (1, 16, 64, 256, 1024, 4096)
MAX_CELLS = 16384
"""Rows times steps of one call: beyond it the outputs leave the cache and nothing is gained."""
CALL_COST_ROWS = 64
"""A call costs about as much as so many rows: what decides between one large padded call and two small ones."""
OUTPUT_CLIP = 20.0
"""A forecast is held within so many standard deviations of the last value."""


def load_tensorflow(threads: int = 0) -> Any:
    """Import TensorFlow without its start-up log; threads: intra-op, 0 = as many as cores. Later calls only import.

    Settings that the environment already names are left as they are.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # its kernels round differently from one batch size to the next
    os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    if threads:
        os.environ.setdefault("TF_NUM_INTRAOP_THREADS", str(threads))
    if "tensorflow" not in sys.modules:
        with _quiet_start():
            import tensorflow

            tensorflow.config.list_logical_devices()
    import tensorflow

    return tensorflow


@contextmanager
def _quiet_start() -> Iterator[None]:
    """Hold back what TensorFlow's C++ side writes to standard error before its log level counts; shown if the start
    fails."""
    sys.stderr.flush()
    terminal = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException:
            held.seek(0)
            os.write(terminal, held.read())
            raise
        finally:
            os.dup2(terminal, 2)
            os.close(terminal)


class Network:
    """A Keras model [x, mask, state] -> [mean, quantiles, state] and its compiled forms.

    Everything is in scaled units: quantiles and mean are offsets from the last value, in running standard deviations.
    """

    def __init__(self, model: Any, spec: SeriesSpec) -> None:
        self.model = model
        self.spec = spec
        shape = model.inputs[2].shape
        self.layers, self.state_size = int(shape[0]), int(shape[2])
        self.input_size = int(model.inputs[0].shape[-1])
        self._compiled: dict[tuple[int, int], Any] = {}

    @property
    def compilations(self) -> int:
        """How many shapes were compiled so far; at most 15 (`ROW_BUCKETS` x `STEP_BUCKETS` within `MAX_CELLS`)."""
        return len(self._compiled)

    def empty_state(self, batch: int) -> Float32:
        return np.zeros((self.layers, batch, self.state_size), np.float32)

    def unroll(self, x: Float32, mask: Bool, state: Float32) -> tuple[Float32, Float32, Float32]:
        """x (B, T, F), mask (B, T), state (L, B, S) -> mean (B, T, H, K), quantiles (B, T, H, K, Q), state (L, B, S).

        Masked steps leave the state as it is; what is returned for them means nothing. B and T may be anything: they
        are cut and padded to the compiled shapes. The state handed in is not changed.
        """
        batch, steps = mask.shape
        outputs = (self.spec.horizon, len(self.spec.targets))
        mean = np.empty((batch, steps, *outputs), np.float32)
        quantiles = np.empty((*mean.shape, len(self.spec.quantiles)), np.float32)
        state = state.copy()
        for first in range(0, steps, STEP_BUCKETS[-1]):
            span = slice(first, min(first + STEP_BUCKETS[-1], steps))
            length = next(size for size in STEP_BUCKETS if size >= span.stop - span.start)
            start = 0
            for size in row_plan(batch, length):
                rows = slice(start, min(start + size, batch))
                out = self._call(size, length, x[rows, span], mask[rows, span], state[:, rows])
                mean[rows, span], quantiles[rows, span], state[:, rows] = out
                start += size
        return mean, quantiles, state

    def warm_up(self, batch: int, steps: int = 1) -> None:
        """Compile what `unroll` of such a shape needs, ahead of the first call that counts."""
        self.unroll(
            np.zeros((batch, steps, self.input_size), np.float32),
            np.zeros((batch, steps), np.bool_),
            self.empty_state(batch),
        )

    def _call(self, size: int, length: int, x: Float32, mask: Bool, state: Float32) -> tuple[Float32, ...]:
        rows, steps = mask.shape
        if (rows, steps) != (size, length):
            x = np.pad(x, ((0, size - rows), (0, length - steps), (0, 0)))
            mask = np.pad(mask, ((0, size - rows), (0, length - steps)))
            state = np.pad(state, ((0, 0), (0, size - rows), (0, 0)))
        mean, quantiles, after = self._function(size, length)(x, mask, state)
        return mean.numpy()[:rows, :steps], quantiles.numpy()[:rows, :steps], after.numpy()[:, :rows]

    def _function(self, size: int, length: int) -> Any:
        if (size, length) not in self._compiled:
            self._compiled[size, length] = self._compile(size, length)
        return self._compiled[size, length]

    def _compile(self, size: int, length: int) -> Any:
        tf = load_tensorflow()

        def run(x: Any, mask: Any, state: Any) -> tuple[Any, Any, Any]:
            mean, quantiles, after = self.model([x, mask, state], training=False)
            limit = OUTPUT_CLIP
            return tf.clip_by_value(mean, -limit, limit), tf.clip_by_value(quantiles, -limit, limit), after

        function = tf.function(run, jit_compile=True, autograph=False).get_concrete_function(
            tf.TensorSpec((size, length, self.input_size), tf.float32),
            tf.TensorSpec((size, length), tf.bool),
            tf.TensorSpec((self.layers, size, self.state_size), tf.float32),
        )

        def call(x: Float32, mask: Bool, state: Float32) -> Any:
            return function(tf.constant(x), tf.constant(mask), tf.constant(state))

        return call


def RecurrentNet(
    spec: SeriesSpec,
    cell: str = "gru",
    units: int = 64,
    layers: int = 1,
    features: int | None = None,
    *,
    dense: int = 64,
    dropout: float = 0.2,
) -> Network:
    """Stacked cells ("simple_rnn", "lstm" or "gru") under quantile heads. features: F, default `input_size(spec)`."""
    load_tensorflow()
    from models import nets

    if cell not in nets.CELLS:
        raise ValueError(f"cell={cell!r}: expected one of {', '.join(nets.CELLS)}")
    body = nets.StackedCells(cell, units, layers, name="cells")
    heads = build_heads(spec, dense, dropout)
    return Network(nets.build(body, heads, features or input_size(spec), body.state_size), spec)


def build_heads(spec: SeriesSpec, dense: int, dropout: float) -> Any:
    from models import nets

    return nets.QuantileHeads(spec.horizon, len(spec.targets), list(spec.quantiles), dense, dropout, name="heads")


class RNNForecaster:
    """The recurrent network as a stage of the stream: one hidden state per sensor, and nothing else of its own."""

    name = "Millrace"
    ring_steps = 1
    """What it asks `SeriesMemory` to remember beyond the season."""

    def __init__(self, net: Network, *, version: str, warmup_steps: int) -> None:
        self.net = net
        self.spec = net.spec
        self.version = version
        self.warmup_steps = warmup_steps

    def columns(self) -> tuple[Column, ...]:
        return (Column("rnn.hidden", (self.net.layers, self.net.state_size), np.dtype(np.float32)),)

    def advance(self, rows: Rows, block: StepBlock, context: Context) -> Prediction:
        state = rows["rnn.hidden"].transpose(1, 0, 2)
        mean, quantiles, after = self.net.unroll(self.inputs(context), block.live, state)
        rows["rnn.hidden"][:] = after.transpose(1, 0, 2)
        return in_original_units(mean, quantiles, context)

    def inputs(self, context: Context) -> Float32:
        """(B, T, F)"""
        return rnn_inputs(context)


def in_original_units(mean: Float32, quantiles: Float32, context: Context) -> Prediction:
    """last + scale * output, in place. NaN where the last value is."""
    last = context.last.astype(np.float32)[:, :, None, :]
    scale = context.scale.astype(np.float32)[:, :, None, :]
    for output in (mean, *(quantiles[..., q] for q in range(quantiles.shape[-1]))):
        output *= scale
        output += last
    return Prediction(mean, quantiles)


def row_plan(batch: int, steps: int) -> tuple[int, ...]:
    """The compiled row counts that `batch` rows are cut into, padding the last.

    >>> row_plan(4096, 1), row_plan(300, 1), row_plan(5000, 1), row_plan(300, 64)
    ((4096,), (256, 64), (4096, 1024), (256, 64))
    """
    sizes = tuple(size for size in ROW_BUCKETS if size * steps <= MAX_CELLS)
    whole = (sizes[-1],) * max(0, batch // sizes[-1])
    rest = batch % sizes[-1]
    return whole + (_rest_plan(rest, sizes) if rest else ())


@lru_cache(maxsize=65536)
def _rest_plan(batch: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
    enough = next(size for size in sizes if size >= batch)
    if enough == batch:
        return (enough,)
    below = max((size for size in sizes if size < batch), default=enough)
    cut = (below, *_rest_plan(batch - below, sizes)) if below < batch else (enough,)
    padded_cost = CALL_COST_ROWS + enough
    return (enough,) if padded_cost <= sum(CALL_COST_ROWS + size for size in cut) else cut
