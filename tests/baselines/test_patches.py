"""Derivatives of the moments of a linear layer by its kernel, against finite differences of the layer itself."""

import keras
import numpy as np
import pytest
from backends import float64_allowed, numpy, tensors
from keras import layers

from keras_proxynorm.baselines.patches import moment_derivatives

CASES = {
    "dense": (lambda **kw: layers.Dense(4, **kw), (6, 5)),
    "dense_of_sequences": (lambda **kw: layers.Dense(4, **kw), (3, 7, 5)),
    "causal": (lambda **kw: layers.Conv1D(4, 3, padding="causal", dilation_rate=2, **kw), (3, 9, 2)),
    "valid": (lambda **kw: layers.Conv2D(4, (3, 2), strides=(2, 3), **kw), (3, 8, 7, 3)),
    "same": (lambda **kw: layers.Conv2D(4, (3, 4), strides=2, padding="same", **kw), (3, 7, 6, 3)),
    "same_dilated": (lambda **kw: layers.Conv2D(4, 3, padding="same", dilation_rate=(1, 3), **kw), (3, 5, 6, 3)),
    "strides_larger_than_kernel": (lambda **kw: layers.Conv2D(4, 1, strides=3, padding="same", **kw), (3, 5, 7, 3)),
    "grouped": (lambda **kw: layers.Conv2D(6, 3, groups=2, **kw), (3, 6, 5, 4)),
    "volumes": (lambda **kw: layers.Conv3D(2, 2, strides=(1, 2, 1), padding="same", **kw), (2, 3, 4, 3, 2)),
    "depthwise": (lambda **kw: layers.DepthwiseConv2D(3, depth_multiplier=2, padding="same", **kw), (3, 6, 7, 3)),
}


@pytest.mark.parametrize("offset", [0.0, 1e3])
@pytest.mark.parametrize("case", CASES)
def test_finite_differences(case, offset):
    make, shape = CASES[case]
    x = np.random.default_rng(0).standard_normal(shape) + offset
    with float64_allowed():
        layer = make(use_bias=False, dtype="float64")
        layer.build(shape)
        kernel = numpy(layer.kernel).astype("float64")

        def moments(kernel):
            y = outputs(kernel).reshape(-1, kernel.size // fan_in)
            return y.mean(0), y.var(0)

        def outputs(kernel):
            if "dense" in case:  # on PyTorch Keras computes it in float32
                return x @ kernel
            layer.kernel.assign(kernel)
            return numpy(layer(*tensors(x, dtype="float64")))

        y = outputs(kernel)
        fan_in = kernel.size // y.shape[-1]
        centered = y - moments(kernel)[0]
        names = ("kernel_size", "strides", "dilation_rate", "padding")
        geometry = {name: getattr(layer, name) for name in names if hasattr(layer, name)}
        groups = shape[-1] if case == "depthwise" else getattr(layer, "groups", 1)
        found = [numpy(d) for d in moment_derivatives(*tensors(x, centered, dtype="float64"), groups, **geometry)]
        assert found[0].shape == (fan_in, groups, 1)
        assert found[1].shape == (fan_in, groups, y.shape[-1] // groups)
        direction = np.random.default_rng(1).standard_normal(kernel.shape)
        before, after = moments(kernel - 1e-4 * direction), moments(kernel + 1e-4 * direction)
    direction = direction.reshape(found[1].shape)
    for derivative, low, high in zip(found, before, after, strict=True):
        # Quadratic functions, of which central differences are exact.
        product = np.sum(derivative * direction, axis=0).ravel()
        np.testing.assert_allclose(product, (high - low) / 2e-4, rtol=1e-7, atol=1e-7)


def test_large_offsets_do_not_lose_the_covariance():
    x = np.random.default_rng(0).standard_normal((4, 16, 16, 3))
    x = (x + 1e4).astype("float32")
    y = np.random.default_rng(1).standard_normal((4, 16, 16, 2))
    y = (y - y.mean((0, 1, 2))).astype("float32")
    _, found = moment_derivatives(*tensors(x, y), 1, (1, 1), (1, 1), (1, 1))
    exact = x.astype("float64").reshape(-1, 3) - x.astype("float64").mean((0, 1, 2))
    expected = 2 * exact.T @ y.astype("float64").reshape(-1, 2) / len(exact)
    np.testing.assert_allclose(numpy(found)[:, 0], expected, atol=2e-5)
    # Of products with what is not centered this would be left.
    raw = keras.ops.matmul(*tensors(x.reshape(-1, 3).T, y.reshape(-1, 2)))
    assert np.abs(2 * numpy(raw) / len(exact) - expected).max() > 1e-4
