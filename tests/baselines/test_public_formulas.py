"""Baselines against the formulas of public implementations, in NumPy; each test names the implementation."""

import numpy as np
import pytest
from backends import numpy, tensors
from baselines.samples import built, normal

from keras_proxynorm import baselines as bl

SHAPE = (4, 6, 6, 16)
X = normal(*SHAPE).astype("float32").astype("float64") * 2 + 0.5


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def weights_of(layer):
    return {weight.name: numpy(weight.value).astype("float64") for weight in layer.weights}


def check(layer, expected, **kwargs):
    np.testing.assert_allclose(numpy(layer(*tensors(X.astype("float32")), **kwargs)), expected, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("groups", [2, 4, 16])
def test_evonorm_s0(groups):
    """EvoNorm2dS0 of timm, layers/evo_norm.py: biased variance of a group, epsilon within the root."""
    layer = built(lambda: bl.EvoNormS0(groups), (None, *SHAPE[1:]))
    w = weights_of(layer)
    grouped = X.reshape(4, 36, groups, -1)
    stddev = np.sqrt(grouped.var((1, 3), keepdims=True) + 1e-5)
    stddev = np.broadcast_to(stddev, (4, 1, groups, 16 // groups)).reshape(4, 1, 1, 16)
    check(layer, X * sigmoid(w["v"] * X) / stddev * w["gamma"] + w["beta"])


def test_evonorm_b0():
    """EvoNorm2dB0 of timm: biased variances of the batch and of each sample; only its moving variance is unbiased."""
    layer = built(lambda: bl.EvoNormB0(epsilon=1e-3), (None, *SHAPE[1:]))
    w = weights_of(layer)

    def formula(variance):
        of_sample = w["v"] * X + np.sqrt(X.var((1, 2), keepdims=True) + 1e-3)
        return X / np.maximum(np.sqrt(variance + 1e-3), of_sample) * w["gamma"] + w["beta"]

    check(layer, formula(w["moving_variance"]))
    check(layer, formula(X.var((0, 1, 2))), training=True)
    moved = 0.9 * w["moving_variance"] + 0.1 * X.var((0, 1, 2))
    np.testing.assert_allclose(weights_of(layer)["moving_variance"], moved, rtol=1e-6)


def test_filter_response_norm():
    """FilterResponseNormTlu2d of timm, layers/filter_response_norm.py, and the appendix of its paper."""
    layer = built(bl.FilterResponseNormalization, (None, *SHAPE[1:]))
    w = weights_of(layer)
    normalized = X / np.sqrt(np.square(X).mean((1, 2), keepdims=True) + np.abs(w["learned_epsilon"]))
    check(layer, np.maximum(normalized * w["gamma"] + w["beta"], w["tau"]))
