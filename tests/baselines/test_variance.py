"""Variance normalization against NumPy."""

import numpy as np
from backends import numpy, tensors
from baselines.samples import built, normal

from keras_proxynorm.baselines import VarianceNormalization


def test_values_and_moving_average():
    layer = built(lambda: VarianceNormalization(momentum=0.75), (None, 3, 5, 8))
    gamma, beta, variance = (numpy(getattr(layer, name).value) for name in ("gamma", "beta", "moving_variance"))
    x = normal(4, 3, 5, 8) * 2 + 7
    batch_variance = x.astype("float64").var((0, 1, 2))
    expected = gamma * x / np.sqrt(batch_variance + 1e-5) + beta
    np.testing.assert_allclose(numpy(layer(*tensors(x), training=True)), expected, rtol=1e-5, atol=1e-5)
    variance = 0.75 * variance + 0.25 * batch_variance
    np.testing.assert_allclose(numpy(layer.moving_variance.value), variance, rtol=1e-5)
    expected = gamma * x / np.sqrt(variance + 1e-5) + beta
    np.testing.assert_allclose(numpy(layer(*tensors(x))), expected, rtol=1e-5, atol=1e-5)
    assert layer.moving_mean is None and len(layer.weights) == 3


def test_the_mean_stays():
    layer, x = VarianceNormalization(), normal(16, 8, 8, 4) + 3
    y = numpy(layer(*tensors(x), training=True))
    np.testing.assert_allclose(y.std((0, 1, 2)), 1, rtol=1e-4)
    assert np.all(y.mean((0, 1, 2)) > 2.5)
