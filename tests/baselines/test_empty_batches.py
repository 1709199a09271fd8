"""Batches without samples, as a replica gets them that the last batch has none for: for every layer of the package."""

import keras
import numpy as np
import pytest
from backends import BACKEND, MODES, compiled, gradients, numpy, tensors
from baselines.samples import BASELINES, BATCH, built
from keras import ops

import keras_proxynorm as kp

LAYERS = {
    "group_norm_proxy": lambda **kw: kp.GroupNormProxy(4, **kw),
    "layer_norm_proxy": lambda **kw: kp.LayerNormProxy(activation="silu", **kw),
    "proxy_activation": lambda **kw: kp.ProxyActivation(activation="tanh", **kw),
    **BASELINES,
}


# The larger one is summed by pooling.
@pytest.mark.parametrize("size", [4, 256])
@pytest.mark.parametrize("mode", [pytest.param(m, marks=pytest.mark.slow) if m == "xla" else m for m in MODES])
@pytest.mark.parametrize("name", LAYERS)
def test_an_empty_batch_changes_nothing(name, mode, size):
    if size == 256 and (mode != "eager" or name == "batch_group_parts"):
        pytest.skip("the sizes of parts are fixed, and once is enough")
    layer = built(LAYERS[name], (None, 4, 4, 8))
    kwargs = {"training": True} if name in BATCH else {}
    layer(*tensors(np.random.default_rng(0).standard_normal((4, 4, 4, 8)).astype("float32")), **kwargs)
    before = [numpy(v.value).copy() for v in layer.non_trainable_variables]
    (x,) = tensors(np.zeros((0, size, size, 8), "float32"))
    weights = [v.value for v in layer.trainable_variables]

    def step(x, *weights):
        def loss(x, *weights):
            others = [v.value for v in layer.non_trainable_variables]
            return ops.sum(layer.stateless_call(list(weights), others, x, **kwargs)[0])

        others = [v.value for v in layer.non_trainable_variables]
        outputs, state = layer.stateless_call(list(weights), others, x, **kwargs)
        return outputs, state, gradients(loss, x, *weights)

    if BACKEND == "tensorflow" and mode != "eager":
        import tensorflow as tf

        # As `fit` traces it: the size of the batch is not known.
        signature = [tf.TensorSpec((None, size, size, 8)), *(tf.TensorSpec(w.shape, w.dtype) for w in weights)]
        step = tf.function(step, input_signature=signature, jit_compile=mode == "xla")
    else:
        step = compiled(step, mode)
    outputs, state, found = step(x, *weights)
    assert tuple(outputs.shape) == (0, size, size, 8)
    for a, b in zip(state, before, strict=True):
        np.testing.assert_array_equal(numpy(a), b)
    for gradient in found:
        np.testing.assert_array_equal(numpy(gradient), np.zeros(gradient.shape))


def test_a_training_step_of_an_empty_batch():
    model = keras.Sequential([keras.Input((4, 4, 8)), *(built(make, (None, 4, 4, 8)) for make in LAYERS.values())])
    model.compile("sgd", "mse")
    x = np.random.default_rng(0).standard_normal((0, 4, 4, 8)).astype("float32")
    before = [numpy(w.value).copy() for w in model.weights]
    model.train_on_batch(x, x)
    for a, b in zip(model.weights, before, strict=True):
        np.testing.assert_array_equal(numpy(a.value), b)
