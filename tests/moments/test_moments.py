"""activation_moments: accuracy against a reference table and integrals, gradients, limits, the authors' numbers.

``python -m pytest tests/moments/test_moments.py -s -k accuracy`` prints the table of errors.
"""

import keras
import numpy as np
import pytest
from backends import BACKEND, MODES, check_gradients, compiled, float64_allowed, gradients, numpy, tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from moments import reference

from keras_proxynorm import activation_moments

TABLE = reference.table()


def moments(activation, mean, stddev, mode="eager", **kwargs):
    def function(m, s):
        return activation_moments(activation, m, s, **kwargs)

    return [numpy(x) for x in compiled(function, mode)(*tensors(mean, stddev))]


@pytest.mark.parametrize("name", reference.ACTIVATIONS)
def test_accuracy(name):
    activation = reference.ACTIVATIONS[name][0]
    rng = np.random.default_rng(0)
    mean = rng.uniform(-8, 8, 3000).astype("float32")
    stddev = np.where(rng.random(3000) < 0.2, 10 ** rng.uniform(-3, 0.7, 3000), rng.uniform(0, 5, 3000))
    stddev = np.maximum(stddev, 1e-6).astype("float32")
    sweep = reference.integrate(name, mean.astype("float64"), stddev.astype("float64"))
    for mode in MODES:
        row = f"\n{name:16s} {mode:5s}"
        m, s, *expected = TABLE[name].T if name in TABLE else np.empty((4, 0))
        # Together, so that they are compiled once.
        both = moments(activation, *(np.float32(np.concatenate(x)) for x in ((m, mean), (s, stddev))), mode)
        if name in TABLE:
            on_table = reference.errors([x[: len(m)] for x in both], expected)
            row += f"  table: mean {on_table[0]:.1e} stddev {on_table[1]:.1e}"
            assert max(on_table) <= 2e-6
        on_sweep = reference.errors([x[len(m) :] for x in both], sweep)
        print(row + f"  sweep: mean {on_sweep[0]:.1e} stddev {on_sweep[1]:.1e}", end="")
        assert max(on_sweep) <= 6e-6


# Keras's tanh on JAX computes in float32 whatever it is given.
FLOAT32_ONLY = {"jax": ["tanh"]}.get(BACKEND, [])


@pytest.mark.parametrize("name", [name for name in TABLE if name not in FLOAT32_ONLY])
def test_float64_is_float64(name):
    m, s, *expected = TABLE[name].T
    with float64_allowed():
        mean, variance = [numpy(x) for x in activation_moments(reference.ACTIVATIONS[name][0], m, s)]
    assert mean.dtype == variance.dtype == "float64"
    assert max(reference.errors((mean, variance), expected)) <= 5e-8


@pytest.mark.parametrize(
    "activation, num_quantiles, mean, variance",
    [
        ("relu", 256, 0.398565, 0.338637),
        ("silu", 256, 0.206184, 0.310665),
        ("gelu", 256, 0.281712, 0.343339),
        ("relu", 200, 0.398451, 0.338035),
    ],
)
def test_quantiles_reproduce_the_authors(activation, num_quantiles, mean, variance):
    found = moments(activation, 0.0, 1.0, method="quantiles", num_quantiles=num_quantiles)
    print(f"\n{activation} with {num_quantiles} quantiles: mean {found[0]:.6f}, variance {found[1]:.6f}")
    np.testing.assert_allclose(found, [mean, variance], atol=6e-7)


def test_bias_of_the_quantiles():
    """How far the authors' 200 quantiles are off over the table, as the README says."""
    bias = [0.0, 0.0]
    for name, rows in TABLE.items():
        m, s, *expected = rows.astype("float32").T
        found = moments(reference.ACTIVATIONS[name][0], m, s, method="quantiles", num_quantiles=200)
        bias = np.maximum(bias, reference.errors(found, expected))
    print(f"\n200 quantiles: mean {bias[0]:.1e} stddev {bias[1]:.1e}")
    np.testing.assert_allclose(bias, [4e-3, 4.6e-2], rtol=0.1)


def test_quantiles_converge_to_exact():
    exact = moments("silu", 0.5, 1.5)
    biases = [
        np.abs(np.subtract(moments("silu", 0.5, 1.5, method="quantiles", num_quantiles=n), exact)).max()
        for n in (50, 200, 800)
    ]
    assert biases[0] > 3 * biases[1] > 9 * biases[2] > 0


# One of each rule, and both with a mean exactly on a kink, where every model starts.
@pytest.mark.parametrize(
    "name", ["relu", "LeakyReLU(.1)", "relu6", "hard_shrink", "selu", "silu", "mish", "exponential"]
)
@pytest.mark.parametrize("order", [1, 2])
def test_gradients(name, order):
    mean = np.array([0.0, 0.4, -0.5, 0.5, -1.7, 2.2, 6.0, -7.5])
    stddev = np.array([1.0, 0.3, 0.7, 1.0, 0.05, 2.0, 1.1, 0.4])
    if name == "exponential":
        mean = np.minimum(mean, 1.0)

    def scalar(m, s):
        output_mean, variance = activation_moments(reference.ACTIVATIONS[name][0], m, s)
        up, down = tensors(np.linspace(0.5, 1.5, 8), np.linspace(1.5, 0.5, 8), dtype="float64")
        return keras.ops.sum(up * output_mean + down * variance)

    check_gradients(scalar, mean, stddev, order=order, step=1e-6, rtol=3e-6 if order == 1 else 3e-5)


@pytest.mark.parametrize("name", reference.ACTIVATIONS)
@pytest.mark.parametrize("method", ["exact", "quantiles"])
def test_zero_stddev(name, method):
    activation = reference.ACTIVATIONS[name][0]
    points = np.array([-2.5, -1.0, -0.3, 0.0, 0.5, 3.0, 6.0], "float32")
    mean, variance = moments(activation, points, np.zeros_like(points), method=method)
    np.testing.assert_allclose(mean, numpy(keras.activations.get(activation)(*tensors(points))), rtol=1e-6, atol=1e-7)
    # Not always exactly 0: a vectorized function may round the same number differently in another lane.
    np.testing.assert_allclose(variance, 0, atol=1e-12)

    def scalar(m, s):
        output_mean, output_variance = activation_moments(activation, m, s, method=method)
        return keras.ops.sum(output_mean) + keras.ops.sum(output_variance)

    def penalty(m, s):
        return sum(keras.ops.sum(keras.ops.square(g)) for g in gradients(scalar, m, s))

    once = (name, BACKEND) in (("softsign", "tensorflow"), ("hard_sigmoid", "torch"))  # no second derivative there
    for function in (scalar,) if once else (scalar, penalty):
        for gradient in gradients(function, *tensors(points, np.zeros_like(points))):
            assert np.all(np.isfinite(numpy(gradient)))


@settings(max_examples=50, deadline=None)
@given(
    mean=st.floats(-8, 8, width=32),
    stddev=st.floats(0, 5, width=32),
    scale=st.floats(0.125, 4, width=32),
    negative_slope=st.floats(0, 1, width=32),
)
def test_rectifiers_are_homogeneous(mean, stddev, scale, negative_slope):
    activation = keras.layers.LeakyReLU(negative_slope)
    m, v = moments(activation, mean, stddev)
    scaled_m, scaled_v = moments(activation, np.float32(mean * scale), np.float32(stddev * scale))
    np.testing.assert_allclose(scaled_m, scale * m, rtol=1e-5, atol=1e-5 * scale)
    np.testing.assert_allclose(scaled_v, scale**2 * v, rtol=1e-5, atol=2e-5 * scale**2)
    assert v >= 0


@settings(max_examples=50, deadline=None)
@given(mean=st.floats(-8, 8, width=32), stddev=st.floats(0, 5, width=32))
def test_symmetry(mean, stddev):
    for odd in ("tanh", "hard_tanh", "softsign", "soft_shrink"):
        m, v = moments(odd, mean, stddev)
        mirrored_m, mirrored_v = moments(odd, -mean, stddev)
        np.testing.assert_allclose(m, -mirrored_m, atol=1e-5)
        np.testing.assert_allclose(v, mirrored_v, atol=1e-4)


def test_exponential_of_a_large_mean_without_deviation():
    mean, variance = moments("exponential", 50.0, 0.0)
    np.testing.assert_allclose(mean, np.exp(50), rtol=1e-5)
    assert variance == 0


def test_shapes_and_dtypes():
    mean, variance = activation_moments("relu", np.zeros((3, 1), "float16"), np.ones(4, "float16"))
    assert tuple(mean.shape) == tuple(variance.shape) == (3, 4)
    assert keras.backend.standardize_dtype(mean.dtype) == "float32"


@pytest.mark.parametrize("mode", MODES)
def test_the_sign_of_a_tensor_of_standard_deviations_is_ignored(mode):
    np.testing.assert_array_equal(moments("relu", 0.3, [-1.0, 2.0], mode), moments("relu", 0.3, [1.0, 2.0], mode))


@pytest.mark.parametrize(
    "kwargs, named",
    [
        ({"stddev": -1.0}, "stddev"),
        ({"method": "monte_carlo"}, "method"),
        ({"num_quantiles": 0}, "num_quantiles"),
        ({"num_quantiles": 2.5}, "num_quantiles"),
        ({"activation": "softmax"}, "activation"),
        ({"activation": "no_such"}, "activation"),
    ],
)
def test_bad_arguments(kwargs, named):
    with pytest.raises(ValueError, match=rf"`{named}`.*Received: {named}="):
        activation_moments(**{"activation": "relu", "mean": 0.0, "stddev": 1.0, **kwargs})
