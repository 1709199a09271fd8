"""Gradients, compilation and precision on the three backends of Keras, for tests that run on each of them."""

import contextlib

import keras
import numpy as np
import pytest

BACKEND = keras.backend.backend()
MODES = {"tensorflow": ("eager", "graph", "xla"), "jax": ("eager", "xla"), "torch": ("eager",)}[BACKEND]

tensorflow_only = pytest.mark.skipif(BACKEND != "tensorflow", reason="about TensorFlow")

# There `keras.ops.maximum` and `keras.ops.matmul`, among others, compute float64 in float32.
needs_float64 = pytest.mark.skipif(BACKEND == "torch", reason="Keras loses float64 on PyTorch")


def compiled(function, mode):
    """`function` as it is ("eager"), as a TensorFlow graph ("graph"), or compiled by XLA ("xla")."""
    if mode == "eager":
        return function
    if BACKEND == "jax":
        import jax

        return jax.jit(function)
    import tensorflow as tf

    return tf.function(function, jit_compile=mode == "xla")


def gradients(function, *tensors):
    """Gradients of a scalar function with respect to each tensor, differentiable again."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch(tensors)
            value = function(*tensors)
        return tape.gradient(value, tensors, unconnected_gradients=tf.UnconnectedGradients.ZERO)
    if BACKEND == "jax":
        import jax

        return jax.grad(function, argnums=tuple(range(len(tensors))))(*tensors)
    import torch

    tensors = [x if x.requires_grad else x.requires_grad_(True) for x in tensors]
    return torch.autograd.grad(function(*tensors), tensors, create_graph=True, materialize_grads=True)


@contextlib.contextmanager
def float64_allowed():
    """JAX knows float64 only on request."""
    if BACKEND == "jax":
        import jax

        with jax.enable_x64(True):
            yield
    else:
        yield


def numpy(x):
    return keras.ops.convert_to_numpy(x.detach() if hasattr(x, "detach") else x)


def tensors(*arrays, dtype=None):
    return [keras.ops.convert_to_tensor(x, dtype=dtype) for x in arrays]


def check_gradients(function, *arrays, order=1, step=1e-5, rtol=1e-6, seed=0):
    """Compares gradients of a scalar function with central differences along random directions, in float64.

    With ``order=2`` the function that is compared is the squared norm of the gradient, as in a gradient penalty.
    """
    rng = np.random.default_rng(seed)
    with float64_allowed():

        def scalar(*xs):
            if order == 1:
                return function(*xs)
            return sum(keras.ops.sum(keras.ops.square(g)) for g in gradients(function, *xs))

        found = [numpy(g) for g in gradients(scalar, *tensors(*arrays, dtype="float64"))]
        for i, array in enumerate(arrays):
            direction = rng.standard_normal(np.shape(array))
            direction /= max(np.linalg.norm(direction), 1e-300)

            def along(t, i=i, direction=direction):
                moved = [a + t * direction if j == i else a for j, a in enumerate(arrays)]
                return float(numpy(scalar(*tensors(*moved, dtype="float64"))))

            numeric = (along(step) - along(-step)) / (2 * step)
            np.testing.assert_allclose(
                np.sum(found[i] * direction), numeric, rtol=rtol, atol=rtol * max(1.0, np.abs(found[i]).max())
            )
