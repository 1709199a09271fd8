"""GroupNormProxy: limit cases, groups, and its parent's signature."""

import inspect
import warnings

import keras
import numpy as np
import pytest
from backends import compiled, numpy, tensorflow_only
from layers.samples import built, normal, reference

import keras_proxynorm as kp


def test_signature_begins_as_that_of_keras():
    ours = list(inspect.signature(kp.GroupNormProxy.__init__).parameters.values())
    keras_own = list(inspect.signature(keras.layers.GroupNormalization.__init__).parameters.values())
    keras_own = [p for p in keras_own if p.kind is not inspect.Parameter.VAR_KEYWORD]
    assert [(p.name, p.default) for p in ours[: len(keras_own)]] == [(p.name, p.default) for p in keras_own]
    rest = [p for p in ours[len(keras_own) :] if p.kind is not inspect.Parameter.VAR_KEYWORD]
    assert rest and all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in rest)


@pytest.mark.parametrize("groups", [1, 2, 8, -1])
def test_without_activation_it_is_group_normalization(groups):
    x = normal(3, 5, 4, 8)
    ours = built(lambda: kp.GroupNormProxy(groups, activation=None), x.shape)
    theirs = keras.layers.GroupNormalization(groups)
    theirs.build(x.shape)
    theirs.set_weights(ours.get_weights())
    assert [w.name for w in ours.weights] == ["gamma", "beta"]
    np.testing.assert_allclose(numpy(ours(x)), numpy(theirs(x)), atol=1e-5)


def test_one_group_for_each_channel_is_instance_normalization():
    x = normal(3, 5, 4, 8)
    y = numpy(kp.GroupNormProxy(-1, activation=None)(x))
    expected = (x - x.mean((1, 2), keepdims=True)) / np.sqrt(x.var((1, 2), keepdims=True) + 1e-3)
    np.testing.assert_allclose(y, expected, atol=1e-5)


def test_with_activation_it_is_group_normalization_then_proxy_activation():
    x = normal(3, 5, 4, 8)
    whole = built(lambda: kp.GroupNormProxy(4, activation="silu"), x.shape)
    normalization = keras.layers.GroupNormalization(4, center=False, scale=False)
    activation = kp.ProxyActivation(activation="silu")
    activation.build(x.shape)
    activation.set_weights(whole.get_weights())
    np.testing.assert_allclose(numpy(whole(x)), numpy(activation(normalization(x))), atol=1e-5)


def test_the_proxy_normalizes_what_is_gaussian():
    """On a Gaussian input with random affine, the output of each channel has mean 0 and nearly unit variance."""
    layer = kp.GroupNormProxy(1)
    layer.build((None, 128, 128, 6))
    layer.gamma.assign([1, 0.5, 2, -1, 1, 1])
    layer.beta.assign([0, 0.2, -0.5, 0.3, 1, -1])
    y = numpy(layer(normal(16, 128, 128, 6)))
    variance = numpy(kp.activation_moments("relu", numpy(layer.beta), np.abs(numpy(layer.gamma)))[1])
    np.testing.assert_allclose(y.mean((0, 1, 2)), 0, atol=0.01)
    np.testing.assert_allclose(y.var((0, 1, 2)), variance / (variance + 0.03), atol=0.03)


@tensorflow_only
@pytest.mark.parametrize("mode", ["graph", "xla"])
def test_error_at_a_large_offset_beside_that_of_keras(mode):
    x = normal(2, 224, 224, 32) + np.float32(1e4)
    ours = kp.GroupNormProxy(8, activation=None)
    ours.build(x.shape)
    expected = reference(ours, x)
    errors = [
        np.abs(numpy(compiled(layer, mode)(x)) - expected).max() for layer in (ours, keras.layers.GroupNormalization(8))
    ]
    print(f"\n{mode}: GroupNormProxy {errors[0]:.1e}, GroupNormalization {errors[1]:.1e}")
    assert errors[0] < 1e-5 and errors[1] > 100 * errors[0]


@pytest.mark.parametrize("groups", [0, -2, 2.0, None, True])
def test_bad_groups(groups):
    with pytest.raises(ValueError, match=f"`groups`.*Received: groups={groups}"):
        kp.GroupNormProxy(groups)


@pytest.mark.parametrize("epsilon", [-1e-5, np.inf])
def test_bad_epsilon(epsilon):
    with pytest.raises(ValueError, match=f"`epsilon`.*Received: epsilon={epsilon}"):
        kp.GroupNormProxy(4, epsilon=epsilon)


def test_groups_must_divide_the_channels():
    with pytest.raises(ValueError, match=r"`groups`.*channels, 48: one of \[1, 2, 3.*48\]. Received: groups=32"):
        kp.GroupNormProxy().build((None, 7, 7, 48))


@pytest.mark.parametrize(
    "groups, axis, shape, expected",
    [
        (4, -1, (None, 5, 3, 8), 30),
        (-1, 1, (2, 8, 5, 3), 15),
        (2, -1, (None, 8), 4),
        (4, -1, (None, None, 3, 8), None),
        (8, -1, (None, 8), 1),
        (-1, -1, (None, 8), 1),
        (-1, -1, (None, 1, 1, 8), 1),
        (8, 1, (None, 8, 1), 1),
        (1, -1, (None, 1), 1),
    ],
)
def test_groups_of_single_values_are_warned_about(groups, axis, shape, expected):
    layer = kp.GroupNormProxy(groups, axis=axis, name="norm")
    assert layer.values_per_statistic(shape) == expected
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        layer.build(shape)
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == (expected == 1)
    assert all("'norm' has inputs of shape" in text and "each value is its own mean" in text for text in messages)
