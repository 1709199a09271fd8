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
    "group": lambda: kp.GroupNormProxy(4, activation="gelu"),
    "layer": lambda: kp.LayerNormProxy(activation=keras.layers.LeakyReLU(0.1)),
    "activation": lambda: kp.ProxyActivation(activation="silu"),
    "ghost": lambda: baselines.GhostBatchNormalization(2),
}


def trained(make, scope):
    keras.utils.set_random_seed(0)
    with scope:
        layer = make()
    # Not within the scope, where Keras would rematerialize the model as a whole.
    layers = [keras.layers.Dense(8, use_bias=False), layer, keras.layers.Dense(3)]
    model = keras.Sequential([keras.Input((5, 3)), *layers])
    compilation = {} if BACKEND == "torch" else {"jit_compile": BACKEND == "jax"}
    model.compile(keras.optimizers.SGD(0.1), "mse", **compilation)
    model.fit(normal(8, 5, 3), normal(8, 5, 3, seed=1), batch_size=4, epochs=2, shuffle=False, verbose=0)
    return model.get_weights()


@pytest.mark.parametrize("name", LAYERS)
def test_weights_after_training(name):
    expected = trained(LAYERS[name], contextlib.nullcontext())
    for mode in ("full", "activations"):
        for found, weight in zip(trained(LAYERS[name], keras.RematScope(mode=mode)), expected, strict=True):
            np.testing.assert_allclose(found, weight, rtol=1e-4, atol=1e-5)
