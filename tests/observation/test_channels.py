"""The channel axis of a layer, and the moments of channels."""

import keras
import numpy as np
import pytest
from diagnostics.samples import L, normal

import keras_proxynorm as kp
from keras_proxynorm.observation.channels import channel_axis, channel_moments


@pytest.mark.parametrize(
    "layer, rank, axis",
    [
        (lambda: L.BatchNormalization(axis=1), 4, 1),
        (lambda: L.BatchNormalization(), 4, 3),
        (lambda: L.LayerNormalization(axis=(1, 2, 3)), 4, 3),
        (lambda: L.LayerNormalization(axis=[-1]), 3, 2),
        (lambda: L.GroupNormalization(1, axis=1), 5, 1),
        (lambda: L.Conv2D(3, 3, data_format="channels_first"), 4, 1),
        (lambda: L.Conv1D(3, 3, data_format="channels_first"), 3, 1),
        (lambda: L.GlobalAveragePooling2D(data_format="channels_first"), 2, 1),
        (lambda: L.ReLU(), 4, 3),
        (lambda: L.Dense(3), 2, 1),
        (lambda: kp.LayerNormProxy(axis=1), 4, 1),
        # Not the channel axis.
        (lambda: L.Softmax(axis=1), 4, 3),
    ],
)
def test_channel_axis(layer, rank, axis):
    assert channel_axis(layer(), rank) == axis


def test_layers_without_a_data_format_follow_the_configuration(monkeypatch):
    monkeypatch.setattr(keras.config, "image_data_format", lambda: "channels_first")
    assert channel_axis(L.ReLU(), 4) == 1 and channel_axis(L.ReLU(), 3) == 2
    assert channel_axis(L.Conv2D(3, 3, data_format="channels_last"), 4) == 3
    assert channel_axis(L.BatchNormalization(), 4) == 3


@pytest.mark.parametrize("shape, axis", [((4, 5, 6, 3), -1), ((4, 3, 5, 6), 1), ((4, 5, 3), 2), ((4, 3), -1)])
@pytest.mark.parametrize("by_sample", [True, False])
def test_moments_are_those_of_numpy(shape, axis, by_sample):
    x = normal(*shape, scale=3.0, offset=1.0)
    channels_last = np.moveaxis(x.astype("float64"), axis, -1).reshape(4, -1, 3)
    axes = 1 if by_sample else (0, 1)
    mean, stddev = channel_moments(keras.ops.convert_to_tensor(x), axis, by_sample)
    np.testing.assert_allclose(mean, channels_last.mean(axes), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(stddev, channels_last.std(axes), rtol=1e-5, atol=1e-6)
    assert mean.dtype == stddev.dtype == "float64"


def test_moments_of_half_precision_are_computed_in_float32():
    x = keras.ops.cast(normal(64, 32, 32, 2, offset=100.0), "float16")
    mean, stddev = channel_moments(x, -1)
    values = keras.ops.convert_to_numpy(x).astype("float64").reshape(-1, 2)
    np.testing.assert_allclose(mean, values.mean(0), rtol=1e-5)
    np.testing.assert_allclose(stddev, values.std(0), rtol=1e-5)
