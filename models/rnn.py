"""The recurrent network: hidden states in, hidden states out, compiled for a bounded number of shapes.

TensorFlow is imported by `load_tensorflow` and inside functions only: importing this module costs nothing.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.blocks import STEP_BUCKETS
from models.features import Context, input_size, rnn_inputs, scaled_inputs
from models.forecaster import Column, Prediction, Rows, SeriesSpec, StepBlock
from models.lags import ground_size

Float32 = NDArray[np.float32]
Bool = NDArray[np.bool_]

ROW_BUCKETS = (1, 16, 64, 256, 1024, 4096)
MAX_CELLS = 16384
"""Rows times steps of one call: beyond it the outputs leave the cache and nothing is gained."""
CALL_COST_ROWS = 64
"""A call costs about as much as so many rows: what decides between one large padded call and two small ones."""
OUTPUT_CLIP = 20.0
"""A forecast is held within so many standard deviations of the last value."""


def load_tensorflow(threads: int = 0) -> Any:
    """Import TensorFlow without its start-up log; threads: 0 = as many as cores. Later calls only import.

    Settings that the environment already names are left as they are.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # its kernels round differently from one batch size to the next
    os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    if threads:
        for kind in ("INTRAOP", "INTEROP"):
            os.environ.setdefault(f"TF_NUM_{kind}_THREADS", str(threads))
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


class Program:
    """What a network of one architecture computes, compiled for a bounded number of shapes; the weights are arguments.

    XLA keeps what it has compiled for as long as the process lives. All networks of an architecture therefore share one
    program: a new version of the weights compiles nothing and leaks nothing.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._compiled: dict[tuple[int, int, bool], Any] = {}

    @property
    def shapes(self) -> list[tuple[int, int, bool]]:
        """Rows, steps, and whether the state alone was asked for, of everything compiled so far."""
        return list(self._compiled)

    def function(self, size: int, length: int, state_only: bool = False) -> Any:
        """(weights, x, mask, state) -> (mean, quantiles, state), or state alone; for x (size, length, F)."""
        key = (size, length, state_only)
        if key not in self._compiled:
            self._compiled[key] = self._compile(*key)
        return self._compiled[key]

    def _compile(self, size: int, length: int, state_only: bool) -> Any:
        tf = load_tensorflow()
        model = self._model
        untrained = [variable.value for variable in model.non_trainable_variables]

        def run(weights: Any, x: Any, mask: Any, state: Any) -> Any:
            (mean, quantiles, after), _ = model.stateless_call(weights, untrained, [x, mask, state], training=False)
            if state_only:  # what nobody asks for is not computed
                return after
            limit = OUTPUT_CLIP
            return tf.clip_by_value(mean, -limit, limit), tf.clip_by_value(quantiles, -limit, limit), after

        x, _, state = model.inputs
        function = tf.function(run, jit_compile=True, autograph=False).get_concrete_function(
            [tf.TensorSpec(variable.shape, tf.float32) for variable in model.trainable_variables],
            tf.TensorSpec((size, length, x.shape[-1]), tf.float32),
            tf.TensorSpec((size, length), tf.bool),
            tf.TensorSpec((state.shape[0], size, state.shape[2]), tf.float32),
        )

        def call(weights: list[Any], x: Float32, mask: Bool, state: Float32) -> Any:
            return function(weights, tf.constant(x), tf.constant(mask), tf.constant(state))

        return call


_PROGRAMS: dict[str, Program] = {}


def _program_of(model: Any) -> Program:
    layers = [
        (type(layer).__name__, layer.get_config()) for layer in (model.get_layer("cells"), model.get_layer("heads"))
    ]
    return _PROGRAMS.setdefault(json.dumps([layers, model.inputs[0].shape[-1]]), Program(model))


class Network:
    """A Keras model [x, mask, state] -> [mean, quantiles, state]: weights, and the program that they go through.

    Everything is in scaled units: quantiles and mean are offsets from the last value, in running standard deviations.
    """

    def __init__(self, model: Any, spec: SeriesSpec) -> None:
        self.model = model
        self.spec = spec
        shape = model.inputs[2].shape
        self.layers, self.state_size = int(shape[0]), int(shape[2])
        self.input_size = int(model.inputs[0].shape[-1])
        self.program = _program_of(model)
        self._weights = [variable.value for variable in model.trainable_variables]

    @property
    def compilations(self) -> int:
        """How many shapes were compiled so far; at most 20 (`ROW_BUCKETS` x `STEP_BUCKETS` within `MAX_CELLS`), and as
        many for `carry`."""
        return len(self.program.shapes)

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
        for rows, span, size, length in _cuts(batch, steps):
            found = self._call(size, length, x[rows, span], mask[rows, span], state[:, rows])
            mean[rows, span], quantiles[rows, span] = (
                out.numpy()[: rows.stop - rows.start, : span.stop - span.start] for out in found[:2]
            )
            state[:, rows] = found[2].numpy()[:, : rows.stop - rows.start]
        return mean, quantiles, state

    def carry(self, x: Float32, mask: Bool, state: Float32) -> Float32:
        """The state alone after these steps: as `unroll`, at half its price."""
        state = state.copy()
        for rows, span, size, length in _cuts(*mask.shape):
            after = self._call(size, length, x[rows, span], mask[rows, span], state[:, rows], state_only=True)
            state[:, rows] = after.numpy()[:, : rows.stop - rows.start]
        return state

    def warm_up(self, batch: int, steps: int = 1) -> None:
        """Compile what `unroll` of such a shape needs, ahead of the first call that counts."""
        self.unroll(
            np.zeros((batch, steps, self.input_size), np.float32),
            np.zeros((batch, steps), np.bool_),
            self.empty_state(batch),
        )

    def warm_up_like(self, other: Network) -> None:
        """Compile every shape that the other network has been called with so far."""
        for shape in other.program.shapes:  # a list: the other may compile meanwhile
            self._compile(*shape)

    def warm_up_carry(self, rows: Iterable[int], steps: int) -> None:
        """Compile what `carry` needs for so many steps of any number of rows."""
        spans = {min(STEP_BUCKETS[-1], steps - first) for first in range(0, steps, STEP_BUCKETS[-1])}
        for length in {next(size for size in STEP_BUCKETS if size >= span) for span in spans}:
            for size in rows:
                if size * length <= MAX_CELLS:
                    self._compile(size, length, True)

    def _compile(self, size: int, length: int, state_only: bool) -> None:
        """Calls it once, unless that was done: XLA compiles at the first call, not when the function is made."""
        if (size, length, state_only) not in self.program.shapes:
            x, mask = np.zeros((size, length, self.input_size), np.float32), np.zeros((size, length), np.bool_)
            self._call(size, length, x, mask, self.empty_state(size), state_only)

    def _call(self, size: int, length: int, x: Float32, mask: Bool, state: Float32, state_only: bool = False) -> Any:
        rows, steps = mask.shape
        if (rows, steps) != (size, length):
            x = np.pad(x, ((0, size - rows), (0, length - steps), (0, 0)))
            mask = np.pad(mask, ((0, size - rows), (0, length - steps)))
            state = np.pad(state, ((0, 0), (0, size - rows), (0, 0)))
        return self.program.function(size, length, state_only)(self._weights, x, mask, state)


def _cuts(batch: int, steps: int) -> Iterator[tuple[slice, slice, int, int]]:
    """Rows and span of each call, and the compiled rows and steps that they are padded to."""
    for first in range(0, steps, STEP_BUCKETS[-1]):
        span = slice(first, min(first + STEP_BUCKETS[-1], steps))
        length = next(size for size in STEP_BUCKETS if size >= span.stop - span.start)
        start = 0
        for size in row_plan(batch, length):
            yield slice(start, min(start + size, batch)), span, size, length
            start += size


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
    return Network(nets.build(body, heads, features or input_size(spec, ground_size(spec)), body.state_size), spec)


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
        return in_original_units(*self.offsets(rows, block, context), context)

    def offsets(self, rows: Rows, block: StepBlock, context: Context) -> tuple[Float32, Float32]:
        """Mean (B, T, H, K) and quantiles (B, T, H, K, Q) as the network says them: distances from the last value in scale, or from
        what stands before it in its unit."""
        state = rows["rnn.hidden"].transpose(1, 0, 2)
        mean, quantiles, after = self.net.unroll(self.inputs(context), block.live, state)
        rows["rnn.hidden"][:] = after.transpose(1, 0, 2)
        return mean, quantiles

    def rebuild(self, rows: Rows, block: StepBlock, context: Context) -> None:
        """Run these steps through the network from an empty state, for the hidden state alone."""
        state = self.net.carry(self.inputs(context), block.live, self.net.empty_state(len(block.live)))
        rows["rnn.hidden"][:] = state.transpose(1, 0, 2)

    def inputs(self, context: Context) -> Float32:
        """(B, T, F)"""
        return rnn_inputs(context)

    def scaled_inputs(self) -> Bool:
        """(F,) which of the inputs are distances in scale."""
        own = scaled_inputs(self.spec)
        return np.concatenate([own, np.zeros(self.net.input_size - len(own), np.bool_)])


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
