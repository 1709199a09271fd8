"""The normalize and activate steps against NumPy."""

import numpy as np
from backends import numpy, tensors

from keras_proxynorm import kernels
from keras_proxynorm.moments import resolve_activation

RELU = resolve_activation("relu")


def test_normalize():
    x = np.random.default_rng(0).standard_normal((2, 3, 4)).astype("float32")
    pivot, distance, variance = (np.full((2, 1, 4), value, "float32") for value in (0.5, -0.2, 2.0))
    gamma, beta = np.arange(4, dtype="float32").reshape(1, 1, 4), np.float32([[[1, 2, 3, 4]]])
    y = (x - 0.3) / np.sqrt(variance + 0.1)
    np.testing.assert_allclose(
        numpy(kernels.normalize(*tensors(x, pivot, distance, variance), None, None, 0.1)), y, rtol=1e-5
    )
    found = kernels.normalize(*tensors(x, pivot, distance, variance, gamma, beta), 0.1)
    np.testing.assert_allclose(numpy(found), gamma * y + beta, rtol=1e-5, atol=1e-6)


def test_proxy_moments_are_those_of_the_affine_proxy():
    gamma, beta, proxy = np.float32([2, -1]), np.float32([0.5, 0]), np.float32([[1, -1], [0.5, -3]])
    found = kernels.proxy_moments(RELU, *tensors(gamma, beta, proxy), "exact", 256)
    expected = RELU.moments(*tensors(np.float32([2.5, 1.0]), np.float32([3.0, 2.0])))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(numpy(a), numpy(b), rtol=1e-6)
    without_affine = kernels.proxy_moments(RELU, None, None, *tensors(np.zeros((2, 2), "float32")), "exact", 256)
    np.testing.assert_allclose(numpy(without_affine[0]), 0.398942, rtol=1e-5)
    np.testing.assert_allclose(numpy(without_affine[1]), 0.340845, rtol=1e-5)


def activate(y, activation, *moments):
    return numpy(
        kernels.affine_and_activate(*tensors(y), None, None, moments, activation=activation, axis=1, proxy_epsilon=0.03)
    )


def test_the_activation_is_normalized_by_the_moments():
    y = np.float32([[-1, 2]])
    found = activate(y, RELU, *tensors(np.float32([0.4, 0.4]), np.float32([0.33, 0.33])))
    np.testing.assert_allclose(found, (np.maximum(y, 0) - 0.4) / 0.6, rtol=1e-6)


def test_a_gaussian_comes_out_normalized():
    """What the method is for: a unit Gaussian input leaves with mean 0 and variance var / (var + epsilon)."""
    y = np.random.default_rng(0).standard_normal((400_000, 1)).astype("float32")
    for name in ("relu", "silu", "hard_silu", "tanh"):
        activation = resolve_activation(name)
        mean, variance = activation.moments(*tensors(np.float32([0]), np.float32([1])))
        z = activate(y, activation, mean, variance)
        expected = float(numpy(variance)[0] / (numpy(variance)[0] + 0.03))
        assert abs(z.mean()) < 6e-3 and abs(z.var() - expected) < 0.01
