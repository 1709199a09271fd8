"""Configs, weights files, whole models: before and after build, in a fresh process, never a BatchNormalization."""

import json
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from backends import BACKEND, numpy
from layers.samples import LAYERS, normal, randomize

import keras_proxynorm as kp

every_layer = pytest.mark.parametrize("name", LAYERS)


@keras.saving.register_keras_serializable("keras_proxynorm_tests")
def bent(x):
    return keras.ops.maximum(x, 0.1 * x - 1.0)


kp.register_activation(bent, kinks=(-1 / 0.9,))


def make_model(name):
    inputs = keras.Input((6, 6, 3), name="image")
    x = keras.layers.Conv2D(8, 3, use_bias=False)(inputs)
    x = LAYERS[name](name="norm")(x)
    x = keras.layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, keras.layers.Dense(2)(x))


@every_layer
def test_config_round_trip_before_and_after_build(name):
    layer = LAYERS[name](
        beta_regularizer="l2", gamma_constraint="non_neg", axis=-1, name="norm", dtype="mixed_bfloat16"
    )
    config = layer.get_config()
    json.dumps(config)
    layer.build((None, 6, 6, 8))
    assert layer.get_config() == config  # build rewrites no argument
    layer(normal(2, 6, 6, 8))
    assert layer.get_config() == config
    for copy in (
        type(layer).from_config(config),
        keras.saving.deserialize_keras_object(json.loads(json.dumps(keras.saving.serialize_keras_object(layer)))),
    ):
        assert type(copy) is type(layer) and copy.get_config() == config
        if not copy.built:
            copy.build((None, 6, 6, 8))
        copy.set_weights(randomize(layer).get_weights())
        np.testing.assert_array_equal(numpy(copy(normal(2, 6, 6, 8))), numpy(layer(normal(2, 6, 6, 8))))


@pytest.mark.parametrize("activation", [bent, "swish", keras.activations.hard_silu, keras.layers.LeakyReLU(0.1), None])
def test_activations_survive(activation):
    layer = kp.LayerNormProxy(activation=activation)
    copy = kp.LayerNormProxy.from_config(json.loads(json.dumps(layer.get_config())))
    x = normal(2, 6, 8)
    np.testing.assert_array_equal(numpy(copy(x)), numpy(layer(x)))
    assert copy._elementwise.kinks == layer._elementwise.kinks


@every_layer
def test_model_file(name, tmp_path):
    model, x = randomize(make_model(name)), normal(2, 6, 6, 3)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.get_layer("norm").get_config() == model.get_layer("norm").get_config()
    for a, b in zip(loaded.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(numpy(loaded(x)), numpy(model(x)))


def test_unbuilt_model_file(tmp_path):
    model = keras.Sequential([keras.layers.Conv2D(8, 3), kp.GroupNormProxy(4)])
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded(normal(2, 6, 6, 3)).shape == (2, 4, 4, 8)


@every_layer
def test_weights_file(name, tmp_path):
    model, other, x = randomize(make_model(name)), make_model(name), normal(2, 6, 6, 3)
    model.save_weights(tmp_path / "model.weights.h5")
    other.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_array_equal(numpy(other(x)), numpy(model(x)))


@every_layer
def test_clone(name):
    model, x = randomize(make_model(name)), normal(2, 6, 6, 3)
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    np.testing.assert_array_equal(numpy(clone(x)), numpy(model(x)))
    assert clone.get_layer("norm").get_config() == model.get_layer("norm").get_config()


def test_fresh_process(tmp_path):
    """Only `import keras_proxynorm`: no custom objects, nothing from the process that saved."""
    x = normal(2, 6, 6, 3)
    for name in LAYERS:
        model = randomize(make_model(name))
        model.save(tmp_path / f"{name}.keras")
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


@every_layer
@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("scale", [False, True])
def test_batch_normalization_never_loads(name, center, scale, tmp_path):
    """Its weights are vectors of the same size, and with two or three of them the counts agree as well."""

    def model(layer):
        return keras.Sequential([keras.Input((5, 8)), layer])

    source = model(keras.layers.BatchNormalization(center=center, scale=scale))
    source.save_weights(tmp_path / "batch.weights.h5")
    target = model(LAYERS[name]())
    before = target.get_weights()
    with pytest.raises(ValueError):
        target.load_weights(tmp_path / "batch.weights.h5")
    for a, b in zip(target.get_weights(), before, strict=True):
        np.testing.assert_array_equal(a, b)
    plain = target.layers[0].proxy is None
    # Two bare vectors do not say what they are, so into a plain norm set_weights takes them, as Keras does everywhere.
    if not (plain and len(source.get_weights()) == len(before)):
        with pytest.raises(ValueError):
            target.set_weights(source.get_weights())


def test_legacy_h5_of_a_batch_normalization_never_loads(tmp_path):
    source = keras.Sequential([keras.Input((5, 8)), keras.layers.BatchNormalization(name="norm")])
    source.save(tmp_path / "batch.h5")
    for layer in (kp.GroupNormProxy(4, name="norm"), kp.GroupNormProxy(4, activation=None, name="norm")):
        target = keras.Sequential([keras.Input((5, 8)), layer])
        for by_name in (False, True):
            with pytest.raises(ValueError):
                target.load_weights(tmp_path / "batch.h5", by_name=by_name)


class Block(keras.layers.Layer):
    """Holds a layer under a name that says nothing of its class, so that weights files fit by place alone."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def build(self, input_shape):
        self.norm.build(input_shape)

    def call(self, inputs):
        return self.norm(inputs)


@every_layer
@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("scale", [False, True])
def test_batch_normalization_never_loads_by_place(name, center, scale, tmp_path):
    source = keras.Sequential([keras.Input((5, 8)), Block(keras.layers.BatchNormalization(center=center, scale=scale))])
    source.save_weights(tmp_path / "batch.weights.h5")
    target = keras.Sequential([keras.Input((5, 8)), Block(LAYERS[name]())])
    before = target.get_weights()
    with pytest.raises(ValueError, match=r"expected the variables \[.*\], but the file has \['0', '1'"):
        target.load_weights(tmp_path / "batch.weights.h5")
    for a, b in zip(target.get_weights(), before, strict=True):
        np.testing.assert_array_equal(a, b)


class WithCounter(kp.GroupNormProxy):
    def build(self, input_shape):
        super().build(input_shape)
        self.counter = self.add_weight(name="counter", shape=(3,), initializer="zeros", trainable=False)


def test_weights_of_a_subclass_are_saved(tmp_path):
    model, other = (keras.Sequential([keras.Input((5, 8)), WithCounter(4)]) for _ in range(2))
    model.layers[0].counter.assign([1, 2, 3])
    model.save_weights(tmp_path / "model.weights.h5")
    other.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_array_equal(numpy(other.layers[0].counter), [1, 2, 3])


def test_another_activation_can_be_assigned(tmp_path):
    model, x = randomize(make_model("group")), normal(2, 6, 6, 3)
    layer = model.get_layer("norm")
    layer.activation = "silu"
    other = kp.GroupNormProxy(4, activation="silu")
    other.build((None, 6, 6, 8))
    other.set_weights(layer.get_weights())
    np.testing.assert_array_equal(numpy(layer(normal(2, 6, 6, 8))), numpy(other(normal(2, 6, 6, 8))))
    model.save(tmp_path / "model.keras")
    np.testing.assert_array_equal(numpy(keras.models.load_model(tmp_path / "model.keras")(x)), numpy(model(x)))
    with pytest.raises(
        ValueError, match="None exactly if it was None when the layer was built.*Received: activation=None"
    ):
        layer.activation = None
