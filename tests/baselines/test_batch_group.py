"""Batch group normalization against NumPy, and as batch and as group normalization."""

import keras
import numpy as np
import pytest
from backends import numpy, tensors
from baselines.samples import built, normal

from keras_proxynorm.baselines import BatchGroupNormalization


def reference(x, groups, mean=None, variance=None):
    """Flattened in the order channel, height, width, and cut into groups."""
    flat = np.moveaxis(x.astype("float64"), -1, 1).reshape(len(x), groups, -1)
    if mean is None:
        mean, variance = flat.mean((0, 2)), flat.var((0, 2))
    flat = (flat - mean[:, None]) / np.sqrt(variance[:, None] + 1e-5)
    return np.moveaxis(flat.reshape(len(x), x.shape[-1], *x.shape[1:-1]), 1, -1), mean, variance


@pytest.mark.parametrize("groups", [1, 2, 3, 4, 6, 12, 24, 40, 240])
def test_values_and_moving_averages(groups):
    """Fewer groups than channels, as many, more; groups that do and do not divide the channels."""
    shape = (4, 5, 8, 6)
    layer = built(lambda: BatchGroupNormalization(groups, momentum=0.75), shape)
    gamma, beta = numpy(layer.gamma.value), numpy(layer.beta.value)
    mean, variance = numpy(layer.moving_mean.value), numpy(layer.moving_variance.value)
    assert mean.shape == variance.shape == (groups,)
    x = normal(*shape) * 2 + 1
    y, batch_mean, batch_variance = reference(x, groups)
    np.testing.assert_allclose(numpy(layer(*tensors(x), training=True)), gamma * y + beta, rtol=1e-4, atol=2e-5)
    mean, variance = 0.75 * mean + 0.25 * batch_mean, 0.75 * variance + 0.25 * batch_variance
    np.testing.assert_allclose(numpy(layer.moving_mean.value), mean, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(numpy(layer.moving_variance.value), variance, rtol=1e-5)
    y, *_ = reference(x, groups, mean, variance)
    np.testing.assert_allclose(numpy(layer(*tensors(x))), gamma * y + beta, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("training", [True, False])
def test_a_group_for_each_channel_is_batch_normalization(training):
    layer = built(lambda: BatchGroupNormalization(8, momentum=0.9), (6, 4, 5, 8))
    other = keras.layers.BatchNormalization(momentum=0.9, epsilon=1e-5)
    other.build((6, 4, 5, 8))
    other.set_weights(layer.get_weights())
    for seed in range(2):
        x = normal(6, 4, 5, 8, seed=seed)
        y, expected = (numpy(norm(*tensors(x), training=training)) for norm in (layer, other))
        np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(numpy(layer.moving_variance.value), numpy(other.moving_variance.value), rtol=1e-5)


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_a_batch_of_one_is_group_normalization(groups):
    layer = built(lambda: BatchGroupNormalization(groups), (1, 4, 5, 8))
    other = keras.layers.GroupNormalization(groups, epsilon=1e-5)
    other.build((1, 4, 5, 8))
    other.set_weights(layer.get_weights()[:2])
    x = normal(1, 4, 5, 8)
    np.testing.assert_allclose(
        numpy(layer(*tensors(x), training=True)), numpy(other(*tensors(x))), rtol=1e-4, atol=1e-5
    )


def test_without_moving_statistics_inference_is_training():
    layer = built(lambda: BatchGroupNormalization(4, use_moving_statistics=False), (6, 4, 5, 8))
    x = normal(6, 4, 5, 8)
    np.testing.assert_array_equal(numpy(layer(*tensors(x), training=True)), numpy(layer(*tensors(x))))


def test_bad_groups():
    with pytest.raises(ValueError, match="`groups` must be a positive integer. Received: groups=0"):
        BatchGroupNormalization(0)
    with pytest.raises(ValueError, match="number of channels, 6, or of that of features, 240. Received: groups=7"):
        BatchGroupNormalization(7).build((None, 5, 8, 6))
    with pytest.raises(ValueError, match="number of channels, 6, where other sizes of the inputs are unknown"):
        BatchGroupNormalization(12).build((None, None, None, 6))


def test_parts_of_a_map_have_a_size():
    layer = built(lambda: BatchGroupNormalization(12), (None, 4, 4, 6))
    with pytest.raises(ValueError, match="incompatible"):
        layer(*tensors(normal(2, 6, 6, 6)))
