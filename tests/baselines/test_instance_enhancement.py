"""Instance enhancement batch normalization against NumPy."""

import numpy as np
import pytest
from backends import numpy, tensors
from baselines.samples import built, normal

from keras_proxynorm.baselines import InstanceEnhancementBatchNormalization


def test_values_and_moving_averages():
    layer = built(lambda: InstanceEnhancementBatchNormalization(momentum=0.8), (None, 3, 5, 8))
    gamma, beta, gate_gamma, gate_beta, mean, variance = (
        numpy(getattr(layer, name).value).astype("float64")
        for name in ("gamma", "beta", "gate_gamma", "gate_beta", "moving_mean", "moving_variance")
    )

    def reference(x, mean, variance):
        means = x.mean((1, 2), keepdims=True)
        delta = 1 / (1 + np.exp(-(gate_gamma * means + gate_beta)))
        return (x - mean) / np.sqrt(variance + 1e-5) * (gamma * delta) + beta

    for seed in range(2):
        x = (normal(4, 3, 5, 8, seed=seed) * 2 + 1).astype("float64")
        y = numpy(layer(*tensors(x.astype("float32")), training=True))
        np.testing.assert_allclose(y, reference(x, x.mean((0, 1, 2)), x.var((0, 1, 2))), rtol=1e-4, atol=1e-5)
        mean = 0.8 * mean + 0.2 * x.mean((0, 1, 2))
        variance = 0.8 * variance + 0.2 * x.var((0, 1, 2), ddof=1)
    np.testing.assert_allclose(numpy(layer.moving_mean.value), mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(numpy(layer.moving_variance.value), variance, rtol=1e-5)
    np.testing.assert_allclose(
        numpy(layer(*tensors(x.astype("float32")))), reference(x, mean, variance), rtol=1e-4, atol=1e-5
    )


def test_every_gate_starts_at_sigmoid_of_minus_one():
    layer, x = InstanceEnhancementBatchNormalization(), normal(16, 8, 8, 4) * 5 + 3
    y = numpy(layer(*tensors(x), training=True))
    np.testing.assert_allclose(y.std((0, 1, 2)), 0.26894, rtol=1e-4)
    np.testing.assert_allclose(y.mean((0, 1, 2)), 0, atol=1e-5)
    assert len(layer.trainable_weights) == 4


def test_a_neutral_gate_is_half_a_batch_normalization():
    layer = InstanceEnhancementBatchNormalization(gate_beta_initializer="zeros")
    y = numpy(layer(*tensors(normal(16, 8, 8, 4)), training=True))
    np.testing.assert_allclose(y.std((0, 1, 2)), 0.5, rtol=1e-4)


@pytest.mark.parametrize("momentum", [-0.1, "0.9", True])
def test_bad_momentum(momentum):
    with pytest.raises(ValueError, match="`momentum` must be a number from 0 to 1"):
        InstanceEnhancementBatchNormalization(momentum=momentum)
