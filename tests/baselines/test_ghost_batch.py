"""Ghost batches, the batch and group hybrid, example weighing, and the decay of scales: NumPy and limit cases."""

import keras
import numpy as np
import pytest
from backends import numpy, tensors
from baselines.samples import built, normal

from keras_proxynorm.baselines import GhostBatchNormalization, L2TowardOne


def in_blocks(x, examples, groups, epsilon):
    """Normalization by blocks of samples and channels, block by block, from raw moments."""
    x = x.astype("float64")
    y = np.empty_like(x)
    per_group = x.shape[-1] // groups
    for start in range(0, len(x), examples):
        for group in range(groups):
            block = np.s_[start : start + examples, ..., group * per_group : (group + 1) * per_group]
            variance = np.mean(x[block] ** 2) - np.mean(x[block]) ** 2
            y[block] = (x[block] - np.mean(x[block])) / np.sqrt(variance + epsilon)
    return y


def affine(layer, y):
    return numpy(layer.gamma.value) * y + numpy(layer.beta.value)


@pytest.mark.parametrize("size", [8, 7, 2, 1])
@pytest.mark.parametrize(
    "examples, groups", [(1, None), (2, None), (3, None), (16, None), (None, None), (2, 4), (3, 1)]
)
def test_values_in_training(examples, groups, size):
    x = normal(size, 3, 5, 8) + 2
    layer = built(lambda: GhostBatchNormalization(examples, groups), x.shape)
    expected = affine(layer, in_blocks(x, examples or size, groups or 8, 1e-5))
    np.testing.assert_allclose(numpy(layer(*tensors(x), training=True)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("groups", [None, 2])
@pytest.mark.parametrize("weight", [0.0, 0.1, 0.5, 1.0])
def test_values_at_inference(weight, groups):
    """Moving averages of raw moments, and a weighted average of these with those of the example."""
    layer = GhostBatchNormalization(2, groups, momentum=0.8, inference_example_weight=weight)
    layer.build((None, 3, 5, 8))
    first, second = np.zeros(8), np.ones(8)
    for seed in range(3):
        x = (normal(6, 3, 5, 8, seed=seed) * (1 + seed) + seed).astype("float64")
        layer(*tensors(x.astype("float32")), training=True)
        first = 0.8 * first + 0.2 * x.mean((0, 1, 2))
        second = 0.8 * second + 0.2 * np.square(x).mean((0, 1, 2))
    x = (normal(4, 3, 5, 8, seed=9) + 1).astype("float64")
    groups = groups or 8

    def grouped(values):
        return np.repeat(values.reshape(-1, groups, 8 // groups).mean(-1), 8 // groups, axis=-1)

    mixed, mixed_square = (
        (1 - weight) * grouped(moving) + weight * grouped(own.mean((1, 2)))
        for moving, own in ((first, x), (second, np.square(x)))
    )
    variance = mixed_square - np.square(mixed)
    expected = (x - mixed[:, None, None]) / np.sqrt(variance + 1e-5)[:, None, None]
    np.testing.assert_allclose(numpy(layer(*tensors(x.astype("float32")))), expected, rtol=1e-4, atol=1e-5)


def test_one_example_and_groups_are_group_normalization():
    x = normal(6, 4, 5, 8)
    layer = built(lambda: GhostBatchNormalization(1, 4, epsilon=1e-3, inference_example_weight=1.0), x.shape)
    other = keras.layers.GroupNormalization(4)
    other.build(x.shape)
    other.set_weights(layer.get_weights()[:2])
    for training in (True, False):  # at inference by the weight of the example
        y = numpy(layer(*tensors(x), training=training))
        np.testing.assert_allclose(y, numpy(other(*tensors(x))), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_the_whole_batch_is_batch_normalization(training):
    """With its moving averages: one ghost batch has nothing in between."""
    layer, other = (
        GhostBatchNormalization(None, momentum=0.9, epsilon=1e-3),
        keras.layers.BatchNormalization(momentum=0.9),
    )
    for seed in range(3):
        x = normal(6, 4, 5, 8, seed=seed)
        y, expected = (numpy(norm(*tensors(x), training=training)) for norm in (layer, other))
        np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(numpy(layer.moving_mean.value), numpy(other.moving_mean.value), atol=1e-6)


def test_an_example_of_weight_one_is_instance_normalization():
    x = normal(6, 4, 5, 8) * 3 + 1
    layer = GhostBatchNormalization(inference_example_weight=1.0, epsilon=1e-3)
    other = keras.layers.GroupNormalization(-1)
    np.testing.assert_allclose(numpy(layer(*tensors(x))), numpy(other(*tensors(x))), rtol=1e-4, atol=1e-5)


def test_moving_averages_of_a_batch_normalization_mean_the_same():
    other = keras.layers.BatchNormalization(epsilon=1e-5)
    layer = built(GhostBatchNormalization, (None, 4, 4, 8))
    other.build((None, 4, 4, 8))
    other.set_weights(layer.get_weights())
    x = normal(3, 4, 4, 8)
    np.testing.assert_allclose(numpy(layer(*tensors(x))), numpy(other(*tensors(x))), rtol=1e-5, atol=1e-5)


def test_the_weight_can_be_set():
    x = normal(6, 4, 5, 8) * 3 + 1
    layer = GhostBatchNormalization()
    before = numpy(layer(*tensors(x)))
    layer.inference_example_weight = 0.25
    assert np.abs(numpy(layer(*tensors(x))) - before).max() > 0.1
    assert layer.get_config()["inference_example_weight"] == 0.25
    copy = GhostBatchNormalization.from_config(layer.get_config())
    copy.build(x.shape)
    np.testing.assert_array_equal(numpy(copy(*tensors(x))), numpy(layer(*tensors(x))))
    with pytest.raises(ValueError, match="`inference_example_weight`.*Received: inference_example_weight=2"):
        layer.inference_example_weight = 2


def test_scales_decay_toward_one_and_offsets_toward_zero():
    layer = GhostBatchNormalization(gamma_regularizer=L2TowardOne(0.05), beta_regularizer=keras.regularizers.L2(0.05))
    layer.build((None, 3))
    assert sum(float(numpy(loss)) for loss in layer.losses) == 0
    layer.gamma.assign([1.0, 3.0, 0.0])
    layer.beta.assign([2.0, 0.0, 0.0])
    np.testing.assert_allclose(sum(float(numpy(loss)) for loss in layer.losses), 0.05 * (4 + 1) + 0.05 * 4, rtol=1e-6)
    copy = GhostBatchNormalization.from_config(layer.get_config())
    assert copy.gamma_regularizer.l2 == 0.05


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"examples_per_group": 0}, "`examples_per_group` must be a positive integer or None. Received: .*=0"),
        ({"examples_per_group": 2.0}, "`examples_per_group`.*Received: examples_per_group=2.0"),
        ({"channel_groups": -1}, "`channel_groups`.*Received: channel_groups=-1"),
        ({"momentum": 1.5}, "`momentum` must be a number from 0 to 1. Received: momentum=1.5"),
        ({"epsilon": -1}, "`epsilon`.*Received: epsilon=-1"),
        ({"inference_example_weight": -0.1}, "`inference_example_weight`.*Received"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        GhostBatchNormalization(**arguments)


def test_groups_must_divide_the_channels():
    with pytest.raises(ValueError, match="`channel_groups` must be a divisor of.*channels, 8: .*Received: .*=3"):
        GhostBatchNormalization(2, 3).build((None, 4, 4, 8))
    with pytest.raises(ValueError, match="`l2`.*Received: l2=-1"):
        L2TowardOne(-1)
