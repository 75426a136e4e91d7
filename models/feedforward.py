"""The comparison: a dense network over a fixed window. What it saw before the window, it has forgotten."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from models.features import Context, input_size, rnn_inputs, scaled_inputs
from models.forecaster import Column, Prediction, Rows, SeriesSpec, StepBlock
from models.rnn import Network, build_heads, in_original_units, load_tensorflow

DEFAULT_WINDOW = 24
"""Steps, where there is no season."""


def default_window(spec: SeriesSpec) -> int:
    """One season."""
    return spec.seasons[0] if spec.seasons else DEFAULT_WINDOW


def FeedForwardNet(
    spec: SeriesSpec, window: int, units: int = 64, layers: int = 1, *, dense: int = 64, dropout: float = 0.2
) -> Network:
    """Dense layers over the window's values and the inputs of the newest step, under the same heads as the recurrent
    network."""
    load_tensorflow()
    from models import nets

    features = input_size(spec) + window * len(spec.channels)
    body = nets.NoCells(units, layers, name="cells")
    return Network(nets.build(body, build_heads(spec, dense, dropout), features, state_size=1), spec)


class FeedForward:
    """The dense network as a stage of the stream. It keeps no state: the window comes out of `SeriesMemory`'s ring."""

    name = "FeedForward"

    def __init__(self, net: Network, *, version: str, warmup_steps: int) -> None:
        self.net = net
        self.spec = net.spec
        self.version = version
        self.warmup_steps = warmup_steps
        self.window = (net.input_size - input_size(net.spec)) // len(net.spec.channels)
        self.ring_steps = self.window

    def columns(self) -> tuple[Column, ...]:
        return ()

    def advance(self, rows: Rows, block: StepBlock, context: Context) -> Prediction:
        mean, quantiles, _ = self.net.unroll(self.inputs(context), block.live, self.net.empty_state(len(block.live)))
        return in_original_units(mean, quantiles, context)

    def rebuild(self, rows: Rows, block: StepBlock, context: Context) -> None:
        """Nothing: it has no state."""

    def inputs(self, context: Context) -> NDArray[np.float32]:
        """(B, T, F)"""
        window = context.window(self.window)
        return np.concatenate([rnn_inputs(context), window.reshape(*window.shape[:2], -1)], axis=2)

    def scaled_inputs(self) -> NDArray[np.bool_]:
        """(F,) which of the inputs are distances in scale."""
        window = np.ones(self.net.input_size - input_size(self.spec), np.bool_)
        return np.concatenate([scaled_inputs(self.spec), window])
