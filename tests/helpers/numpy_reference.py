"""Independent NumPy versions of the mathematics, written from the formulas, not from the code under test."""

import math

import numpy as np


def soft_staircase(x, s, k, lo, hi, offset=0.0, g="tanh"):
    """Value and dQ/dx of the soft staircase, loop-free but literal."""
    functions = {
        "tanh": (np.tanh, lambda z: 1 - np.tanh(z) ** 2),
        "atan": (np.arctan, lambda z: 1 / (1 + z**2)),
        "linear": (lambda z: np.clip(z, -1, 1), lambda z: (np.abs(z) < 1).astype(float)),
    }
    rise, derivative = functions[g]
    k = max(k, 1e-3)
    t = x / s - offset
    u = np.clip(t, lo, hi)
    v = u - lo
    f = np.minimum(np.floor(v), hi - lo - 1)
    r = v - f - 0.5
    phi = lo + f + 0.5 + rise(k * r) / (2 * rise(k / 2))
    slope = np.where((t >= lo) & (t <= hi), k * derivative(k * r) / (2 * rise(k / 2)), 0.0)
    return s * (phi + offset), slope


def hard(x, s, lo, hi, offset=0.0):
    """Nearest level, by comparing with all of them."""
    levels = np.asarray(s)[..., None] * (np.arange(lo, hi + 1) + offset)
    distance = np.abs(np.asarray(x)[..., None] - levels)
    return np.take_along_axis(np.broadcast_to(levels, distance.shape), distance.argmin(-1)[..., None], axis=-1).squeeze(
        -1
    )


def regularizer(x, s, lo, hi, offset=0.0, kind="nearest"):
    """Value of the level regularizer."""
    u = np.clip(x / s - offset, lo, hi)
    d = np.abs(u - np.round(u))
    f = {"nearest": d**2, "l1": d, "sine": np.sin(math.pi * (u - lo)) ** 2 / math.pi**2}[kind]
    return 0.5 * np.sum(np.broadcast_to(s, x.shape) ** 2 * f)


def nearest(rows, points, signed):
    """Nearest of each row's points, or of them and their negatives, by comparing with all of them."""
    levels = np.broadcast_to(
        points if signed else np.concatenate([points, -points], axis=-1), (len(rows), points.shape[-1] * (2 - signed))
    )
    pick = np.abs(rows[:, :, None] - levels[:, None, :]).argmin(-1)
    return np.take_along_axis(levels, pick, axis=-1)


def point_staircase(u, k, levels, g="tanh"):
    """Value and derivative of the staircase between unequally spaced levels, literal."""
    functions = {"tanh": (np.tanh, lambda z: 1 - np.tanh(z) ** 2), "atan": (np.arctan, lambda z: 1 / (1 + z**2))}
    rise, derivative = functions[g]
    value, slope = np.empty_like(u), np.zeros_like(u)
    for i, x in enumerate(u):
        c = min(max(x, levels[0]), levels[-1])
        j = max(n for n in range(len(levels) - 1) if levels[n] <= c)
        gap = levels[j + 1] - levels[j]
        r = (c - levels[j]) / gap - 0.5
        value[i] = levels[j] + gap * (0.5 + rise(k * r) / (2 * rise(k / 2)))
        slope[i] = k * derivative(k * r) / (2 * rise(k / 2)) if c == x else 0.0
    return value, slope
