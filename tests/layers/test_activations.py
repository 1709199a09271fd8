"""Activations that layers keep: partials are saved, and what no file can hold is refused."""

import functools
import json
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from backends import BACKEND, numpy, tensors
from layers.samples import normal, randomize

import keras_proxynorm as kp
from keras_proxynorm import baselines


@keras.saving.register_keras_serializable("keras_proxynorm_tests")
def leaning(x, slope=0.5):
    return keras.ops.maximum(x, slope * x)


kp.register_activation(leaning, kinks=(0,))

# Each with an activation of Keras that is equal.
PARTIALS = {
    "gelu": (
        functools.partial(keras.activations.gelu, approximate=True),
        lambda x: keras.activations.gelu(x, approximate=True),
    ),
    "relu": (
        functools.partial(keras.activations.relu, max_value=np.float32(3), negative_slope=0.25),
        keras.layers.ReLU(max_value=3, negative_slope=0.25),
    ),
    "twice": (
        functools.partial(functools.partial(keras.activations.relu, max_value=2.0), threshold=0.5),
        keras.layers.ReLU(max_value=2.0, threshold=0.5),
    ),
}


def kernel_layer(layer_class):
    return lambda activation: layer_class(keras.layers.Dense(8, use_bias=False), activation=activation)


# All layers with an activation, for inputs of 8 channels.
LAYERS = {
    "group": lambda activation: kp.GroupNormProxy(4, activation=activation),
    "layer": lambda activation: kp.LayerNormProxy(activation=activation),
    "activation": lambda activation: kp.ProxyActivation(activation=activation),
    "weight_standardization": kernel_layer(baselines.WeightStandardization),
    "weight_normalization": kernel_layer(baselines.WeightNormalization),
}
every_layer = pytest.mark.parametrize("name", LAYERS)


@every_layer
@pytest.mark.parametrize("partial", PARTIALS)
def test_partials_are_kept(name, partial):
    activation, equal = PARTIALS[partial]
    layer, x = LAYERS[name](activation), normal(2, 5, 8)
    config = json.loads(json.dumps(keras.saving.serialize_keras_object(layer)))
    copy = keras.saving.deserialize_keras_object(config)
    assert json.loads(json.dumps(keras.saving.serialize_keras_object(copy))) == config
    layer.build(x.shape)
    randomize(layer)
    (values,) = tensors(np.linspace(-4, 4, 9, dtype="float32"))
    np.testing.assert_array_equal(numpy(copy.activation(values)), numpy(activation(values)))
    for other, tolerance in ((copy, 0), (LAYERS[name](equal), 1e-5)):
        other.build(x.shape)
        other.set_weights(layer.get_weights())
        np.testing.assert_allclose(numpy(other(x)), numpy(layer(x)), rtol=tolerance, atol=tolerance)


@pytest.mark.filterwarnings("ignore:The moments of the activation")
def test_partials_of_registered_functions_are_kept():
    layer = kp.LayerNormProxy(activation=functools.partial(leaning, slope=0.125))
    copy = kp.LayerNormProxy.from_config(json.loads(json.dumps(layer.get_config())))
    assert copy.activation.func is leaning and copy.activation.keywords == {"slope": 0.125}


def test_partials_load_in_a_fresh_process(tmp_path):
    x = normal(2, 6, 8)
    for name, make in LAYERS.items():
        model = keras.Sequential([keras.Input((6, 8)), make(PARTIALS["relu"][0])])
        randomize(model).save(tmp_path / f"{name}.keras")
        np.savez(tmp_path / f"{name}.npz", x=x, y=numpy(model(x)))
    code = (
        "import pathlib, sys, numpy, keras, keras_proxynorm\n"
        "paths = sorted(pathlib.Path(sys.argv[1]).glob('*.keras'))\n"
        "for path in paths:\n"
        "    data = numpy.load(path.with_suffix('.npz'))\n"
        "    outputs = keras.ops.convert_to_numpy(keras.models.load_model(path)(data['x']))\n"
        "    numpy.testing.assert_allclose(outputs, data['y'], atol=1e-6)\n"
        "print(len(paths), 'equal')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "KERAS_BACKEND": BACKEND},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{len(LAYERS)} equal"


class Nameless:
    def __call__(self, x):
        return keras.ops.tanh(x)

    def method(self, x):
        return keras.ops.tanh(x)

    def __mul__(self, x):
        return 0.5 * x


class WithoutConfig(keras.layers.Layer):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def call(self, x):
        return self.function(x)


REFUSED = {
    "lambda in a partial": functools.partial(lambda x, a: a * keras.ops.tanh(x), a=2),
    "positional argument": functools.partial(keras.ops.maximum, 0.0),
    "method": Nameless().method,
    "method in a partial": functools.partial(Nameless().method),
    "object": Nameless(),
    "layer without config": WithoutConfig(Nameless()),
    "argument without config": functools.partial(leaning, slope=Nameless()),
    "variable as an argument": functools.partial(leaning, slope=keras.Variable(0.5)),
}


@every_layer
@pytest.mark.parametrize("activation", REFUSED.values(), ids=REFUSED.keys())
@pytest.mark.filterwarnings("ignore:The moments of the activation")
def test_what_no_file_can_hold_is_refused(name, activation):
    message = "`activation` must be an activation that can be saved.*register_keras_serializable. Received: activation="
    with pytest.raises(ValueError, match=message):
        LAYERS[name](activation)
    layer = LAYERS[name]("gelu")
    if BACKEND == "torch" and isinstance(activation, keras.layers.Layer):
        return  # PyTorch assigns modules past properties.
    with pytest.raises(ValueError, match=message):
        layer.activation = activation
    assert layer.activation is keras.activations.gelu


@every_layer
@pytest.mark.filterwarnings("ignore:The object being serialized includes a `lambda`")
def test_what_keras_can_save_is_taken(name):
    for activation in (leaning, keras.layers.LeakyReLU(0.1), keras.ops.tanh, lambda x: keras.ops.relu(x), None):
        layer = LAYERS[name](activation)
        assert layer.activation is keras.activations.get(activation)
        assert layer.get_config()["activation"]


def with_slope(name, value=0.2):
    """A layer whose activation reads a variable that is its attribute."""
    slope = keras.Variable(value, name="slope")

    def leaky(x):
        return keras.ops.maximum(x, slope * x)

    layer = LAYERS[name](leaky)
    layer.slope = slope
    return layer


@every_layer
def test_a_variable_of_an_activation_takes_effect(name):
    x = normal(2, 5, 8)
    layer, expected = with_slope(name), LAYERS[name](keras.layers.LeakyReLU(0.9))
    before = numpy(layer(x))
    layer.slope.assign(0.9)
    expected.build(x.shape)
    expected.set_weights([numpy(w) for w in layer.weights if w is not layer.slope])
    np.testing.assert_allclose(numpy(layer(x)), numpy(expected(x)), atol=2e-5)
    assert np.abs(numpy(layer(x)) - before).max() > 0.1


@pytest.mark.parametrize(
    "name, jit_compile", [("group", False), ("group", True), ("layer", False), ("activation", False)]
)
def test_a_variable_of_an_activation_is_trained(name, jit_compile):
    """One step of gradient descent moves it by the derivative of the loss, of which the moments are a part."""
    if jit_compile and BACKEND == "torch":
        pytest.skip("torch.compile is not for one step")
    layer, x, y = with_slope(name), normal(8, 5, 8), normal(8, 5, 8)
    model = keras.Sequential([keras.Input((5, 8)), layer])
    assert any(v is layer.slope for v in model.trainable_variables)
    randomize(layer)
    layer.slope.assign(0.2)
    losses = []
    for slope in (0.19, 0.21):
        layer.slope.assign(slope)
        losses.append(np.mean(np.square(numpy(model(x)).astype("float64") - y)))
    layer.slope.assign(0.2)
    model.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=jit_compile)
    model.fit(x, y, batch_size=8, verbose=0)
    moved = float(numpy(layer.slope)) - 0.2
    np.testing.assert_allclose(moved, -0.1 * (losses[1] - losses[0]) / 0.02, rtol=1e-2)
    # And the next call uses it.
    expected = LAYERS[name](keras.layers.LeakyReLU(float(numpy(layer.slope))))
    expected.build(x.shape)
    expected.set_weights([numpy(w) for w in layer.weights if w is not layer.slope])
    np.testing.assert_allclose(model.predict(x, verbose=0), numpy(expected(x)), atol=2e-5)


class LearnedSlope(kp.GroupNormProxy):
    """As in the documentation of `register_activation`."""

    def __init__(self, groups=32, **kwargs):
        slope = keras.Variable(0.25, name="slope")

        def leaky(x):
            return keras.ops.maximum(x, slope * x)

        super().__init__(groups, activation=leaky, **kwargs)
        self.slope = slope

    def get_config(self):
        config = super().get_config()
        del config["activation"]
        return config


def test_a_variable_of_an_activation_is_saved(tmp_path):
    model, x = keras.Sequential([keras.Input((5, 8)), LearnedSlope(4)]), normal(2, 5, 8)
    randomize(model)
    model.layers[0].slope.assign(0.7)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras", custom_objects={"LearnedSlope": LearnedSlope})
    assert float(numpy(loaded.layers[0].slope)) == np.float32(0.7)
    np.testing.assert_array_equal(numpy(loaded(x)), numpy(model(x)))


@every_layer
def test_attributes_of_an_activation_layer_take_effect(name):
    x, activation = normal(2, 5, 8), keras.layers.LeakyReLU(0.1)
    layer, expected = LAYERS[name](activation), LAYERS[name](keras.layers.LeakyReLU(0.8))
    layer(x)
    activation.negative_slope = 0.8
    expected.build(x.shape)
    expected.set_weights(layer.get_weights())
    np.testing.assert_array_equal(numpy(layer(x)), numpy(expected(x)))
