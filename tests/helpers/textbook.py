"""Recurrent cells as the textbooks print them, in plain NumPy: the slow oracle beside the fast path.

Goodfellow, Bengio and Courville (2016), Deep Learning, chapter 10; Hochreiter and Schmidhuber (1997), Neural Computation 9(8);
Cho et al. (2014), arXiv:1406.1078. Shapes: x (B, T, F), h and c (B, U). Gates in the order in which Keras stores them.
"""

from __future__ import annotations

import numpy as np


def sigmoid(x):
    return 1.0 / (1.0 + np.exp(-x))


def rnn_forward(x, h, W, b, W_y, b_y):
    """h' = tanh([x, h] W + b), y = h' W_y + b_y. W: (F + U, U). -> hidden (B, T, U), y (B, T, Y)."""
    hidden = []
    for t in range(x.shape[1]):
        h = np.tanh(np.concatenate([x[:, t], h], axis=1) @ W + b)
        hidden.append(h)
    hidden = np.stack(hidden, axis=1)
    return hidden, hidden @ W_y + b_y


def rnn_backward(x, h, W, b, W_y, b_y, truth):
    """Back-propagation through time of the loss sum((y - truth)^2) / 2 -> gradients of W, b, W_y, b_y and of the first h."""
    hidden, y = rnn_forward(x, h, W, b, W_y, b_y)
    before = np.concatenate([h[:, None], hidden[:, :-1]], axis=1)
    dW, db = np.zeros_like(W), np.zeros_like(b)
    dy = y - truth
    dW_y = np.einsum("btu,bty->uy", hidden, dy)
    db_y = dy.sum(axis=(0, 1))
    dh = np.zeros_like(h)
    for t in reversed(range(x.shape[1])):
        dh = dh + dy[:, t] @ W_y.T
        da = dh * (1.0 - hidden[:, t] ** 2)
        dW += np.concatenate([x[:, t], before[:, t]], axis=1).T @ da
        db += da.sum(axis=0)
        dh = da @ W[x.shape[2] :].T
    return dW, db, dW_y, db_y, dh


def lstm_forward(x, h, c, kernel, recurrent, bias):
    """Gates i, f, candidate, o. -> hidden (B, T, U), h, c."""
    hidden = []
    for t in range(x.shape[1]):
        i, f, g, o = np.split(x[:, t] @ kernel + h @ recurrent + bias, 4, axis=1)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        hidden.append(h)
    return np.stack(hidden, axis=1), h, c


def gru_forward(x, h, kernel, recurrent, bias):
    """Gates z, r, candidate; the reset gate after the product, biases of both products apart. -> hidden (B, T, U)."""
    hidden = []
    for t in range(x.shape[1]):
        xz, xr, xh = np.split(x[:, t] @ kernel + bias[0], 3, axis=1)
        hz, hr, hh = np.split(h @ recurrent + bias[1], 3, axis=1)
        z, r = sigmoid(xz + hz), sigmoid(xr + hr)
        h = z * h + (1.0 - z) * np.tanh(xh + r * hh)
        hidden.append(h)
    return np.stack(hidden, axis=1)
