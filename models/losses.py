"""Pinball and Huber, masked: a missing label costs nothing and teaches nothing. All tensors float32."""

from __future__ import annotations

from typing import Any

Tensor = Any


def huber(truth: Tensor, forecast: Tensor, weight: Tensor, delta: float) -> Tensor:
    """Mean over the weighted labels; squared within `delta`, linear beyond. truth, forecast, weight: (B, T, H, K) ->
    ().

    Huber, P. J. (1964), Robust estimation of a location parameter, Ann. Math. Statist. 35(1).
    """
    import tensorflow as tf

    error = tf.abs(truth - forecast)
    small = tf.minimum(error, delta)
    return _weighted(small * (error - 0.5 * small), weight)


def pinball(truth: Tensor, quantiles: Tensor, levels: Tensor, weight: Tensor) -> Tensor:
    """Mean over weighted labels and levels. truth, weight: (B, T, H, K); quantiles: (B, T, H, K, Q); levels: (Q,) ->
    ().

    Koenker, R. and Bassett, G. (1978), Regression quantiles, Econometrica 46(1).
    """
    import tensorflow as tf

    error = truth[..., None] - quantiles
    return _weighted(tf.reduce_mean(tf.maximum(levels * error, (levels - 1.0) * error), axis=-1), weight)


def _weighted(loss: Tensor, weight: Tensor) -> Tensor:
    import tensorflow as tf

    return tf.reduce_sum(loss * weight) / tf.maximum(tf.reduce_sum(weight), 1.0)
