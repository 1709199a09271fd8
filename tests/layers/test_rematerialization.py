"""Layers made within a `keras.RematScope` train as without it."""

import contextlib

import keras
import numpy as np
import pytest
from backends import BACKEND
from layers.samples import normal

import keras_proxynorm as kp
from keras_proxynorm import baselines

LAYERS = {
    "group": lambda: kp.GroupNormProxy(4, activation="gelu", name="norm"),
    "layer": lambda: kp.LayerNormProxy(activation=keras.layers.LeakyReLU(0.1)),
    "activation": lambda: kp.ProxyActivation(activation="silu"),
    "ghost": lambda: baselines.GhostBatchNormalization(2),
}


XLA = [pytest.param(True, marks=pytest.mark.slow)] if BACKEND == "tensorflow" else []
SCOPES = {
    "full": {},
    "activations": {},
    "larger_than": {"output_size_threshold": 8},
    "list_of_layers": {"layer_names": ["norm"]},
}


def trained(make, scope, jit_compile):
    keras.utils.set_random_seed(0)
    with scope:
        layer = make()
    # Not within the scope, where Keras would rematerialize the model as a whole.
    layers = [keras.layers.Dense(8, use_bias=False), layer, keras.layers.Dense(3)]
    model = keras.Sequential([keras.Input((5, 3)), *layers])
    model.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=jit_compile)
    model.fit(normal(8, 5, 3), normal(8, 5, 3, seed=1), batch_size=4, epochs=2, shuffle=False, verbose=0)
    return model.get_weights()


@pytest.mark.parametrize("jit_compile", [BACKEND == "jax", *XLA])
@pytest.mark.parametrize("name", LAYERS)
def test_weights_after_training(name, jit_compile):
    expected = trained(LAYERS[name], contextlib.nullcontext(), jit_compile)
    for mode in SCOPES if name == "group" else ("full", "activations"):
        found = trained(LAYERS[name], keras.RematScope(mode=mode, **SCOPES[mode]), jit_compile)
        for weight, value in zip(found, expected, strict=True):
            np.testing.assert_allclose(weight, value, rtol=1e-4, atol=1e-5)


def test_a_mask_by_keyword():
    def outputs(scope):
        with scope:
            layer = kp.GroupNormProxy(4)
        inputs = keras.Input((5, 8))
        model = keras.Model(inputs, layer(keras.layers.Masking()(inputs)))
        model.compile("sgd", "mse")
        x = normal(4, 5, 8)
        x[:, 3:] = 0
        return model.predict(x.astype("float32"), verbose=0)

    np.testing.assert_allclose(outputs(keras.RematScope("full")), outputs(contextlib.nullcontext()), atol=1e-6)
