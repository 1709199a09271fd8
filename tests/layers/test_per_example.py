"""Work for each example: vectorized maps, gradients of single examples and jacobians equal a loop."""

import numpy as np
import pytest
from backends import BACKEND, check_gradients, float64_allowed, gradients, needs_float64, numpy, tensors
from baselines.samples import ALONE, built, randomize
from keras import ops

import keras_proxynorm as kp

SHAPE = (None, 4, 3, 8)
LAYERS = {
    "group": lambda **kw: kp.GroupNormProxy(2, activation="silu", **kw),
    "layer": lambda **kw: kp.LayerNormProxy(**kw),
    "activation": lambda **kw: kp.ProxyActivation(activation="silu", **kw),
    "plain": lambda **kw: kp.GroupNormProxy(4, activation=None, **kw),
    **ALONE,
}
X = np.random.default_rng(0).standard_normal((5, *SHAPE[1:])).astype("float32")


def vectorized(function):
    """`function` of an example, as a function of a batch."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        return lambda x: tf.vectorized_map(function, x, fallback_to_while_loop=False)
    if BACKEND == "jax":
        import jax

        return jax.vmap(function)
    import torch

    return torch.func.vmap(function)


def example_gradients(layer):
    """The gradients of a loss of one example, by the example and by the weights of a layer."""
    weights = [v.value for v in layer.trainable_variables]
    others = [v.value for v in layer.non_trainable_variables]

    def loss(x, *weights):
        outputs, _ = layer.stateless_call(list(weights), others, ops.expand_dims(x, 0))
        return ops.sum(ops.power(outputs, 3))

    if BACKEND == "torch":
        import torch

        return lambda x: torch.func.grad(loss, tuple(range(1 + len(weights))))(x, *weights)
    return lambda x: tuple(gradients(loss, x, *weights))


@pytest.mark.parametrize("name", LAYERS)
def test_outputs(name):
    layer = randomize(built(LAYERS[name], SHAPE))
    found = vectorized(lambda x: layer(ops.expand_dims(x, 0))[0])(*tensors(X))
    np.testing.assert_allclose(numpy(found), numpy(layer(*tensors(X))), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_of_each_example(name):
    function = example_gradients(randomize(built(LAYERS[name], SHAPE)))
    found = vectorized(function)(*tensors(X))
    loop = [function(*tensors(x)) for x in X]
    for i, gradient in enumerate(found):
        expected = np.stack([numpy(each[i]) for each in loop])
        np.testing.assert_allclose(numpy(gradient), expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("name", ["group", "layer", "activation", "plain"])
def test_jacobians_are_of_one_example(name):
    layer = randomize(built(LAYERS[name], SHAPE))
    (x,) = tensors(X[:2])
    if BACKEND == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape(persistent=True) as tape:
            tape.watch(x)
            y = layer(x)
        whole, of_examples = numpy(tape.jacobian(y, x)), numpy(tape.batch_jacobian(y, x))
        np.testing.assert_allclose(of_examples, whole[[0, 1], ..., [0, 1], :, :, :], rtol=1e-5, atol=1e-6)
    elif BACKEND == "jax":
        import jax

        whole = numpy(jax.jacrev(layer)(x))
        np.testing.assert_allclose(numpy(jax.jacfwd(layer)(x)), whole, rtol=1e-4, atol=1e-5)
    else:
        import torch

        whole = numpy(torch.func.jacrev(layer)(x))
        np.testing.assert_allclose(numpy(torch.func.jacfwd(layer)(x)), whole, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(whole[0, ..., 1, :, :, :], 0)
    np.testing.assert_array_equal(whole[1, ..., 0, :, :, :], 0)


@needs_float64
@pytest.mark.parametrize("gamma", [None, 0.0])
@pytest.mark.parametrize("name", ["group", "layer", "activation", "plain"])
def test_gradient_penalties_of_constant_images(name, gamma):
    """The squared norm of a gradient, and its gradient, where all pixels are equal, against finite differences."""
    with float64_allowed():
        layer = randomize(built(LAYERS[name], SHAPE, dtype="float64"))
        if gamma is not None:
            layer.gamma.assign(np.full(8, gamma))
        check_gradients(lambda x: ops.sum(ops.power(layer(x), 3)), np.full((2, 4, 3, 8), 0.5), order=2, rtol=1e-5)
