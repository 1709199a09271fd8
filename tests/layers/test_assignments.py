"""What is assigned to a layer after it was made takes effect, on every backend, before and after it is built."""

import functools

import keras
import numpy as np
import pytest
from backends import compiled, numpy
from layers.samples import normal, randomize

import keras_proxynorm as kp
from keras_proxynorm import baselines
from keras_proxynorm.folding import FoldedNormalization


def around_dense(layer_class, activation):
    return layer_class(keras.layers.Dense(8, use_bias=False), activation=activation)


# All layers with an activation, for inputs of 8 channels.
LAYERS = {
    "group": lambda activation: kp.GroupNormProxy(4, activation=activation),
    "layer": lambda activation: kp.LayerNormProxy(activation=activation),
    "activation": lambda activation: kp.ProxyActivation(activation=activation),
    "weight_standardization": functools.partial(around_dense, baselines.WeightStandardization),
    "weight_normalization": functools.partial(around_dense, baselines.WeightNormalization),
    "folded": lambda activation: FoldedNormalization(4, activation=activation),
}
every_layer = pytest.mark.parametrize("name", LAYERS)


@every_layer
@pytest.mark.parametrize("first", ["gelu", keras.layers.ReLU(max_value=2)], ids=["function", "layer"])
@pytest.mark.parametrize("is_built", [False, True], ids=["before build", "after build"])
def test_an_activation_takes_effect(name, first, is_built):
    x, second = normal(2, 5, 8), keras.layers.LeakyReLU(0.25)
    layer, expected = LAYERS[name](first), LAYERS[name](second)
    if is_built:
        layer(x)
    layer.activation = second
    expected.build(x.shape)
    randomize(expected)
    for made in (layer, type(layer).from_config(layer.get_config())):
        made.build(x.shape) if not made.built else None
        made.set_weights(expected.get_weights())
        np.testing.assert_allclose(numpy(compiled(made, "eager")(x)), numpy(expected(x)), rtol=1e-6, atol=1e-6)
        assert type(made.activation) is keras.layers.LeakyReLU and made.activation.negative_slope == 0.25
    layer.activation = "tanh"
    assert layer.activation is keras.activations.tanh and layer.get_config()["activation"] == "tanh"


@every_layer
def test_an_activation_is_checked(name):
    layer = LAYERS[name]("gelu")
    for wrong in (keras.layers.PReLU(), "softmax", 3):
        with pytest.raises(ValueError, match="`activation` must be .*Received: activation="):
            layer.activation = wrong
        assert layer.activation is keras.activations.gelu


def test_an_activation_is_no_part_of_the_layer():
    """Keras would keep it for ever, and find a layer that is never called."""
    layer = kp.GroupNormProxy(4, activation=keras.layers.LeakyReLU())
    model = keras.Sequential([keras.Input((5, 8)), layer])
    layer.activation = keras.layers.ReLU()
    assert [type(x).__name__ for x in model._flatten_layers()] == ["Sequential", "InputLayer", "GroupNormProxy"]


def test_activations_of_a_model_that_was_saved(tmp_path):
    model = keras.Sequential([keras.Input((5, 8)), kp.LayerNormProxy(activation=keras.layers.ReLU())])
    x = normal(2, 5, 8)
    before = numpy(model(x))
    model.layers[0].activation = keras.layers.LeakyReLU(0.5)
    after = numpy(model(x))
    model.save(tmp_path / "model.keras")
    assert np.abs(after - before).max() > 0.1
    np.testing.assert_allclose(numpy(keras.saving.load_model(tmp_path / "model.keras")(x)), after, atol=1e-6)


@every_layer
def test_trainable_and_policy_take_effect(name):
    layer, x = LAYERS[name]("gelu"), normal(2, 5, 8)
    layer.build(x.shape)
    count = len(layer.trainable_weights)
    layer.trainable = False
    assert layer.trainable_weights == [] and layer.get_config()["trainable"] is False
    layer.trainable = True
    assert len(layer.trainable_weights) == count
    layer.dtype_policy = "mixed_float16"
    assert keras.backend.standardize_dtype(layer(x).dtype) == "float16"
    assert layer.get_config()["dtype"]["config"]["name"] == "mixed_float16"
