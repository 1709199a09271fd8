"""Masks pass through all baselines as through batch normalization; those that are it at inference are it with masks."""

import keras
import numpy as np
import pytest
from backends import numpy, tensors
from baselines.samples import ALONE, CONTAINING, built, normal

from keras_proxynorm import baselines as bl

STEPS, CHANNELS = 6, 8
LENGTHS = np.array([6, 3, 4])
MASK = np.arange(STEPS) < LENGTHS[:, None]
# The convolutional normalization takes no dense layer.
WITH_DENSE = {
    name: lambda make=make, **kw: make(keras.layers.Dense(CHANNELS, use_bias=False), **kw)
    for name, make in CONTAINING.items()
    if name != "convolutional"
}


@pytest.mark.parametrize("name", [*ALONE, *WITH_DENSE])
@pytest.mark.parametrize("training", [False, True])
def test_masks_pass_on(name, training):
    layer = built({**ALONE, **WITH_DENSE}[name], (None, STEPS, CHANNELS))
    kwargs = {"training": training} if "training" in layer._call_signature.parameters else {}
    x = normal(3, STEPS, CHANNELS) * MASK[..., None]
    masked = keras.layers.Masking()(*tensors(x.astype("float32")))
    with_mask = layer(masked, **kwargs)
    np.testing.assert_array_equal(numpy(with_mask._keras_mask), MASK)


@pytest.mark.parametrize("name", [*ALONE, *WITH_DENSE])
def test_recurrent_layers_after_them_do_not_read_padding(name):
    inputs = keras.Input((STEPS, CHANNELS))
    layer = {**ALONE, **WITH_DENSE}[name](name="norm")
    outputs = keras.layers.LSTM(4)(layer(keras.layers.Masking()(inputs)))
    model = keras.Model(inputs, [layer.output, outputs])
    x = (normal(3, STEPS, CHANNELS) * MASK[..., None]).astype("float32")
    sequences, found = (numpy(y) for y in model(*tensors(x), training=False))
    recurrent = model.layers[-1]
    for i, length in enumerate(LENGTHS):
        expected = recurrent(*tensors(sequences[i : i + 1, :length]))
        np.testing.assert_allclose(found[i : i + 1], numpy(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CONTAINING)
def test_convolutions_inside_drop_masks_as_they_do_alone(name):
    convolution = keras.layers.Conv1D(CHANNELS, 3, padding="same", use_bias=False)
    layer = CONTAINING[name](convolution)
    assert layer.supports_masking == convolution.supports_masking
    masked = keras.layers.Masking()(*tensors(normal(3, STEPS, CHANNELS)))
    with pytest.warns(UserWarning, match="does not support masking"):
        assert getattr(layer(masked), "_keras_mask", None) is None


@pytest.mark.parametrize("name", ["ghost", "cross_iteration"])
def test_at_inference_they_are_batch_normalization_with_masks(name):
    layer = built({**ALONE, **WITH_DENSE}[name], (None, STEPS, CHANNELS))
    batch_norm = keras.layers.BatchNormalization(epsilon=layer.epsilon)
    batch_norm.build((None, STEPS, CHANNELS))
    for weight in batch_norm.weights:
        weight.assign(getattr(layer, weight.name))
    before = [layer.layer] if isinstance(layer, bl.CrossIterationBatchNormalization) else []
    recurrent = keras.layers.LSTM(4)
    x = (normal(3, STEPS, CHANNELS) * MASK[..., None]).astype("float32")

    def run(*layers):
        y = keras.layers.Masking()(*tensors(x))
        for each in layers:
            y = each(y)
        return numpy(recurrent(y))

    np.testing.assert_allclose(run(layer), run(*before, batch_norm), rtol=1e-5, atol=1e-6)
