"""Moments of activations in float64, by formulas and integrals that share nothing with the package."""

import json
import math
import pathlib

import keras
import numpy as np

_erf = np.vectorize(math.erf)


def _sigmoid(x):
    return 0.5 * (1 + np.tanh(0.5 * x))


def _softplus(x):
    return np.logaddexp(0, x)


# Name: (the activation as a user gives it, NumPy formula, kinks). The order is that of the printed table.
ACTIVATIONS = {
    "linear": ("linear", lambda x: x, ()),
    "relu": ("relu", lambda x: np.maximum(x, 0), (0,)),
    "leaky_relu": ("leaky_relu", lambda x: np.where(x > 0, x, 0.2 * x), (0,)),
    "relu6": ("relu6", lambda x: np.clip(x, 0, 6), (0, 6)),
    "hard_tanh": ("hard_tanh", lambda x: np.clip(x, -1, 1), (-1, 1)),
    "hard_sigmoid": ("hard_sigmoid", lambda x: np.clip(x + 3, 0, 6) / 6, (-3, 3)),
    "sparse_sigmoid": ("sparse_sigmoid", lambda x: np.clip(x + 1, 0, 2) / 2, (-1, 1)),
    "soft_shrink": ("soft_shrink", lambda x: np.maximum(x - 0.5, 0) - np.maximum(-x - 0.5, 0), (-0.5, 0.5)),
    "hard_shrink": ("hard_shrink", lambda x: np.where(np.abs(x) > 0.5, x, 0), (-0.5, 0.5)),
    "elu": ("elu", lambda x: np.where(x > 0, x, np.expm1(np.minimum(x, 0))), (0,)),
    "celu": ("celu", lambda x: np.where(x > 0, x, np.expm1(np.minimum(x, 0))), (0,)),
    "selu": (
        "selu",
        lambda x: 1.0507009873554804934 * np.where(x > 0, x, 1.6732632423543772848 * np.expm1(np.minimum(x, 0))),
        (0,),
    ),
    "softsign": ("softsign", lambda x: x / (1 + np.abs(x)), (0,)),
    "sparse_plus": ("sparse_plus", lambda x: np.where(x > 1, x, np.square(np.maximum(x + 1, 0)) / 4), (-1, 1)),
    "hard_silu": ("hard_silu", lambda x: x * np.clip(x + 3, 0, 6) / 6, (-3, 3)),
    "silu": ("silu", lambda x: x * _sigmoid(x), ()),
    "gelu_exact": ("gelu", lambda x: 0.5 * x * (1 + _erf(x / math.sqrt(2))), ()),
    "gelu": (
        lambda x: keras.activations.gelu(x, approximate=True),
        lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
        (),
    ),
    "mish": ("mish", lambda x: x * np.tanh(_softplus(x)), ()),
    "softplus": ("softplus", _softplus, ()),
    "squareplus": ("squareplus", lambda x: (x + np.sqrt(x * x + 4)) / 2, ()),
    "sigmoid": ("sigmoid", _sigmoid, ()),
    "log_sigmoid": ("log_sigmoid", lambda x: -_softplus(-x), ()),
    "tanh": ("tanh", np.tanh, ()),
    "tanh_shrink": ("tanh_shrink", lambda x: x - np.tanh(x), ()),
    # Up to a standard deviation of 5, its moments exceed float32 before those of others do.
    "exponential": ("exponential", None, ()),
    # Keras's layers, with arguments.
    "ReLU(6)": (keras.layers.ReLU(max_value=6), lambda x: np.clip(x, 0, 6), (0, 6)),
    "ReLU(6, .1, .5)": (
        keras.layers.ReLU(max_value=6, negative_slope=0.1, threshold=0.5),
        lambda x: np.clip(np.where(x > 0.5, x, 0), 0, 6) - 0.1 * np.maximum(0.5 - x, 0),
        (0.5, 6),
    ),
    "LeakyReLU(.1)": (keras.layers.LeakyReLU(0.1), lambda x: np.where(x > 0, x, 0.1 * x), (0,)),
    "ELU(2)": (keras.layers.ELU(2.0), lambda x: np.where(x > 0, x, 2 * np.expm1(np.minimum(x, 0))), (0,)),
}


def table():
    """The rows ``mean, stddev, output mean, output variance`` of the reference table, for each activation in it."""
    path = pathlib.Path(__file__).parents[1] / "data" / "activation_moments.json"
    return {name: np.array(rows) for name, rows in json.loads(path.read_text())["moments"].items()}


def integrate(name, mean, stddev):
    """Moments of an activation of the table."""
    if mean.size > 500:  # all at once take gigabytes
        parts = [integrate(name, mean[i : i + 500], stddev[i : i + 500]) for i in range(0, mean.size, 500)]
        return np.concatenate(parts, axis=1)
    _, function, kinks = ACTIVATIONS[name]
    if name == "exponential":
        output_mean = np.exp(mean + stddev**2 / 2)
        return output_mean, output_mean**2 * np.expm1(stddev**2)
    return integrate_function(function, kinks, mean, stddev)


def integrate_function(function, kinks, mean, stddev, panels=120, nodes=12):
    """Moments by Gauss-Legendre panels over 12 standard deviations to each side, cut at the kinks."""
    points, weights = np.polynomial.legendre.leggauss(nodes)
    edges = np.sort(
        np.concatenate(
            [np.broadcast_to(np.linspace(-12, 12, panels)[:, None], (panels, mean.size))]
            + [np.clip((kink - mean) / stddev, -12, 12)[None] for kink in kinks]
        ),
        axis=0,
    )
    half, middle = np.diff(edges, axis=0)[:, None] / 2, (edges[1:] + edges[:-1])[:, None] / 2
    t = middle + half * points[:, None]
    mass = half * weights[:, None] * np.exp(-(t**2) / 2) / math.sqrt(2 * math.pi)
    values = function(mean + stddev * t)
    output_mean = np.sum(mass * values, axis=(0, 1))
    return output_mean, np.sum(mass * np.square(values - output_mean), axis=(0, 1))


def errors(found, expected):
    """Errors of ``(mean, variance)`` in units of the layer's output, as the documentation states them."""
    (mean, variance), (true_mean, true_variance) = [
        [np.asarray(x, "float64") for x in pair] for pair in (found, expected)
    ]
    scale = np.sqrt(true_variance + 0.03)
    mean_error = np.abs(mean - true_mean) / (scale * np.maximum(1, np.abs(true_mean)))
    return mean_error.max(), np.abs(np.sqrt(variance + 0.03) / scale - 1).max()
