"""Masks pass through all baselines as through batch normalization; those that are it at inference are it with masks."""

import keras
import numpy as np
import pytest
from backends import gradients, numpy, tensors
from baselines.samples import ALONE, BATCH, CONTAINING, built, normal
from keras import ops

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


def train(name, x, mask, axis=-1):
    """Outputs of a new layer in training, its state after it, and the gradients of a loss of the unmasked outputs."""
    layer = built(lambda **kw: ALONE[name](axis=axis, **kw), (None, *x.shape[1:]))
    kwargs = {"training": True} if name in BATCH else {}
    x, m = (*tensors(x.astype("float32")), None if mask is None else tensors(mask)[0])
    weights = [v.value for v in layer.trainable_variables]
    others = [v.value for v in layer.non_trainable_variables]
    if mask is not None:
        kwargs["mask"] = m
    outputs, state = layer.stateless_call(weights, others, x, **kwargs)

    def loss(x, *weights):
        y, _ = layer.stateless_call(weights, others, x, **kwargs)
        y = ops.moveaxis(y, axis, -1)
        y = y if m is None else ops.where(ops.expand_dims(m, -1), y, 0)
        return ops.sum(ops.square(y) * ops.cos(ops.cast(ops.arange(y.shape[-1]), y.dtype)))

    return numpy(outputs), [*map(numpy, state)], [*map(numpy, gradients(loss, x, *weights))]


def garbage(x, value):
    return np.where(MASK[..., None], x, value)


@pytest.mark.parametrize("value", [0.0, 1e30, np.nan])
@pytest.mark.parametrize("name", ALONE)
def test_what_is_masked_reaches_nothing(name, value):
    x = normal(3, STEPS, CHANNELS)
    expected = train(name, garbage(x, 1.0), MASK)
    outputs, state, (gradient, *others) = train(name, garbage(x, value), MASK)
    np.testing.assert_array_equal(outputs[MASK], expected[0][MASK])
    np.testing.assert_array_equal(gradient[~MASK], 0)
    for found, truth in zip([*state, gradient, *others], [*expected[1], *expected[2]], strict=True):
        np.testing.assert_array_equal(found, truth)


@pytest.mark.parametrize("name", [name for name in ALONE if name != "batch_group_parts"])
def test_padding_further_changes_nothing(name):
    """So statistics are sums over what is unmasked, divided by its number."""
    x = garbage(normal(3, STEPS, CHANNELS) + 1, 0.0)
    longer, longer_mask = np.pad(x, ((0, 0), (0, 7), (0, 0))), np.pad(MASK, ((0, 0), (0, 7)))
    expected, found = train(name, x, MASK), train(name, longer, longer_mask)
    np.testing.assert_allclose(found[0][:, :STEPS][MASK], expected[0][MASK], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found[2][0][:, :STEPS], expected[2][0], rtol=1e-4, atol=1e-5)
    for a, b in zip([*found[1], *found[2][1:]], [*expected[1], *expected[2][1:]], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ALONE)
def test_a_mask_of_nothing_changes_nothing(name):
    x = normal(3, STEPS, CHANNELS)
    found, expected = (train(name, x, mask) for mask in (np.ones((3, STEPS), bool), None))
    for a, b in zip([found[0], *found[1], *found[2]], [expected[0], *expected[1], *expected[2]], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in ALONE if name != "batch_group_parts"])
def test_with_channels_first_a_mask_is_one_of_steps(name):
    x = garbage(normal(3, STEPS, CHANNELS), 0.0)
    found, expected = train(name, np.moveaxis(x, 2, 1), MASK, axis=1), train(name, x, MASK)
    np.testing.assert_allclose(np.moveaxis(found[0], 1, 2), expected[0], rtol=1e-5, atol=1e-6)
    for a, b in zip(found[1], expected[1], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", BATCH[:-1])
def test_a_batch_that_is_masked_moves_nothing(name):
    x = normal(3, STEPS, CHANNELS)
    before = [numpy(v.value) for v in built(ALONE[name], x.shape).non_trainable_variables]
    outputs, state, found = train(name, x, np.zeros((3, STEPS), bool))
    assert all(np.all(np.isfinite(each)) for each in [outputs, *found])
    for a, b in zip(state, before, strict=True):
        np.testing.assert_array_equal(a, b)


def test_ghost_of_the_whole_batch_is_batch_normalization_with_masks():
    layer, batch_norm = bl.GhostBatchNormalization(None, momentum=0.9), keras.layers.BatchNormalization(-1, 0.9, 1e-5)
    x = tensors((normal(3, STEPS, CHANNELS) + 2).astype("float32"))
    (mask,) = tensors(MASK)
    found, expected = (numpy(each(*x, training=True, mask=mask)) for each in (layer, batch_norm))
    np.testing.assert_allclose(found[MASK], expected[MASK], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(numpy(layer.moving_mean), numpy(batch_norm.moving_mean), rtol=1e-5, atol=1e-6)
    # Keras averages variances about the mean of the batch, and this one about the moving mean: of raw moments.
    variances = [numpy(each.moving_variance) for each in (layer, batch_norm)]
    np.testing.assert_allclose(variances[0] - 0.9 * 0.1 * (10 * numpy(layer.moving_mean)) ** 2, variances[1], rtol=1e-4)
