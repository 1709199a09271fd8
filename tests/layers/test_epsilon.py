"""Where a variance is 0: epsilons of 0, dead channels and constant inputs give finite values and gradients."""

import numpy as np
import pytest
from backends import gradients, numpy, tensors
from baselines.samples import ALONE, BATCH
from keras import ops

import keras_proxynorm as kp

LAYERS = {
    "group": lambda **kw: kp.GroupNormProxy(2, epsilon=0, proxy_epsilon=0, **kw),
    "layer": lambda **kw: kp.LayerNormProxy(epsilon=0, proxy_epsilon=0, activation="silu", **kw),
    "plain": lambda **kw: kp.GroupNormProxy(2, epsilon=0, activation=None, **kw),
    "activation": lambda **kw: kp.ProxyActivation(proxy_epsilon=0, **kw),
    **{name: lambda make=make, **kw: make(epsilon=0, **kw) for name, make in ALONE.items() if name != "evonorm_b0"},
}


@pytest.mark.parametrize("constant", [0.0, 3.0])
@pytest.mark.parametrize("name", LAYERS)
def test_finite_values_and_gradients(name, constant):
    layer = LAYERS[name]()
    layer.build((None, 4, 4, 8))
    if layer.gamma is not None and hasattr(layer, "proxy"):
        # Channels whose activation has a variance of 0, in two ways. At a kink its second derivative would be infinite.
        layer.gamma.assign(np.array([0, 0, *[1] * 6]))
        layer.beta.assign(np.array([1, -1, -60, *[0] * 5]))
    kwargs = {"training": True} if name in BATCH else {}
    weights, others = ([v.value for v in vs] for vs in (layer.trainable_variables, layer.non_trainable_variables))

    def loss(x, *weights):
        outputs, _ = layer.stateless_call(list(weights), others, x, **kwargs)
        return ops.sum(outputs * ops.cos(ops.cast(ops.arange(8), outputs.dtype)))

    def penalty(x, *weights):
        return sum(ops.sum(ops.square(gradient)) for gradient in gradients(loss, x, *weights))

    (x,) = tensors(np.full((2, 4, 4, 8), constant, "float32"))
    for function in (loss, penalty):
        for gradient in (function(x, *weights), *gradients(function, x, *weights)):
            assert np.all(np.isfinite(numpy(gradient)))
