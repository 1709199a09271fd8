"""activation_moments: accuracy against a reference table and integrals, gradients, limits, the authors' numbers.

``python -m pytest tests/moments/test_moments.py -s -k accuracy`` prints the table of errors.
"""

import functools
import math

import keras
import numpy as np
import pytest
from backends import BACKEND, MODES, check_gradients, compiled, float64_allowed, gradients, numpy, tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from moments import reference

from keras_proxynorm import activation_moments, register_activation
from keras_proxynorm.moments import resolve_activation

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


class Holder:
    """A parameter of an activation that changes after the activation was made."""

    def __init__(self, value):
        self.value = value

    def __call__(self, x):
        return keras.ops.maximum(x, self.value * x)


def learned_slope(x, slope):
    return keras.ops.maximum(x, slope.value * x)


def registered(make):
    return lambda holder: register_activation(make(holder), kinks=(0,))


def heaviside(x):
    return keras.ops.where(x > 0, 1.0, 0.0)


def leaky(x, v):
    return np.maximum(x, v * x)


# Name: (activation that reads holder.value, NumPy formula, kinks, value when it is looked at, value now).
CHANGING = {
    "relu that is leaky": (lambda h: lambda x: keras.ops.maximum(x, h.value * x), leaky, lambda v: (0,), 0.0, 0.9),
    "linear that is bent": (lambda h: lambda x: keras.ops.maximum(x, h.value * x), leaky, lambda v: (0,), 1.0, 0.1),
    "registered": (
        registered(lambda h: lambda x: keras.ops.maximum(x, h.value * x)), leaky, lambda v: (0,), 0.2, 0.9
    ),
    "object": (lambda h: h, leaky, lambda v: (0,), 0.2, 0.6),
    "partial": (lambda h: functools.partial(learned_slope, slope=h), leaky, lambda v: (0,), 0.2, 0.6),
    "swish": (
        lambda h: lambda x: x * keras.ops.sigmoid(h.value * x),
        lambda x, v: x / (1 + np.exp(-v * x)),
        lambda v: (), 1.0, 3.0,
    ),
    "moving kink": (
        lambda h: lambda x: keras.ops.relu(x - h.value),
        lambda x, v: np.maximum(x - v, 0),
        lambda v: (v,), 0.0, 0.77,
    ),
}  # fmt: skip


ALSO_IN_QUANTILES = [("linear that is bent", "quantiles"), ("swish", "quantiles")]


@pytest.mark.parametrize("name, method", [*((name, "exact") for name in CHANGING), *ALSO_IN_QUANTILES])
def test_activations_that_change(name, method):
    """Values and gradients are those of the function as it is now, not of what it was when it was looked at."""
    make, formula, kinks, before, now = CHANGING[name]
    holder = Holder(before)
    activation = resolve_activation(make(holder))
    rng = np.random.default_rng(0)
    arguments = rng.uniform(-2, 2, 40), rng.uniform(0.1, 2, 40), np.float64(now)
    up, down = rng.uniform(0.5, 1.5, (2, 40)) / 40

    def moments_now(m, s, value):
        holder.value = value
        return activation.moments(m, s, method)

    def scalar(*xs):
        (mean, variance), (u, d) = moments_now(*xs), tensors(np.float32(up), np.float32(down))
        return keras.ops.sum(u * mean + d * variance)

    def expected(m, s, value):
        return reference.integrate_function(lambda x: formula(x, value), kinks(value), m, s)

    exact = method == "exact"
    atol = 3e-2 if not exact else 2e-5 if set(kinks(now)) <= set(activation.kinks) else 3e-3
    directions = [rng.standard_normal(np.shape(x)) for x in arguments]
    slopes = []
    for i, direction in enumerate(directions):
        moved = ([x + h * direction if i == j else x for j, x in enumerate(arguments)] for h in (-1e-4, 1e-4))
        low, high = (np.sum(up * mean + down * variance) for mean, variance in (expected(*xs) for xs in moved))
        slopes.append((high - low) / 2e-4)
    for mode in MODES if name in ("linear that is bent", "registered", "moving kink") else MODES[:1]:
        both = compiled(lambda *xs: (moments_now(*xs), gradients(scalar, *xs)), mode)
        found, by_arguments = both(*tensors(*map(np.float32, arguments)))
        assert max(reference.errors([numpy(x) for x in found], expected(*arguments))) <= (1.5e-5 if exact else 5e-2)
        for gradient, direction, slope in zip(by_arguments, directions, slopes, strict=True):
            np.testing.assert_allclose(np.sum(numpy(gradient) * direction), slope, atol=atol)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_that_an_activation_brings_are_kept(mode):
    """A step that passes the gradient of tanh: its moments are those of the step, their gradients those it brings."""

    def step(x):
        soft = keras.ops.tanh(x)
        return soft + keras.ops.stop_gradient(heaviside(x) - soft)

    activation = resolve_activation(step)
    m, s = np.float32([-0.4, 0.0, 0.9]), np.float32([1.0, 0.5, 2.0])
    probability = 0.5 * (1 + np.vectorize(math.erf)(m / s / math.sqrt(2)))
    found = [numpy(x) for x in compiled(activation.moments, mode)(*tensors(m, s))]
    np.testing.assert_allclose(found, [probability, probability * (1 - probability)], atol=1e-5)
    (by_mean, _) = gradients(lambda m, s: keras.ops.sum(activation.moments(m, s)[0]), *tensors(m, s))
    slope, _ = reference.integrate_function(lambda x: 1 - np.tanh(x) ** 2, (), m.astype("float64"), s)
    np.testing.assert_allclose(numpy(by_mean), slope, atol=1e-5)


SIGNED = np.float32([-2.0, -0.5, -1e-3, -0.0, 0.0, 0.5])


@pytest.mark.parametrize(
    "name, method",
    [*((name, "exact") for name in ("relu", "relu6", "exponential", "silu", "linear")), ("silu", "quantiles")],
)
def test_the_sign_of_standard_deviations_has_no_effect(name, method):
    mean = np.linspace(-1, 1, 6, dtype="float32")
    expected = moments(name, mean, np.abs(SIGNED), method=method)
    for mode in MODES:
        np.testing.assert_allclose(moments(name, mean, SIGNED, mode, method=method), expected, rtol=1e-6, atol=1e-7)
    for stddev in (SIGNED, SIGNED.tolist(), SIGNED.astype("float64")):
        with float64_allowed():
            found = [numpy(x) for x in activation_moments(name, mean, stddev, method=method)]
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    found = [float(numpy(x)) for x in activation_moments(name, 0.25, -2, method=method)]
    np.testing.assert_allclose(found, [x[()] for x in moments(name, 0.25, 2.0, method=method)], rtol=1e-6)
    symbolic = activation_moments(name, keras.KerasTensor((None, 3)), keras.KerasTensor((3,)), method=method)
    assert [x.shape for x in symbolic] == [(None, 3), (None, 3)]


@pytest.mark.parametrize("name", ["relu", "relu6", "silu"])
def test_gradients_of_negative_standard_deviations(name):
    mean = np.array([0.2, 0.7, -0.3, -1.0, 0.9])
    for order in (1, 2):

        def scalar(m, s):
            output_mean, variance = activation_moments(name, m, s)
            return keras.ops.sum(output_mean + 0.5 * variance)

        check_gradients(scalar, mean, np.array([-1.0, -0.3, -2.0, 0.4, -0.7]), order=order, step=1e-6, rtol=3e-5)
    (_, down), (_, up) = (
        gradients(scalar, *tensors(np.float32(mean), np.float32(s * np.ones(5)))) for s in (-0.8, 0.8)
    )
    np.testing.assert_array_equal(numpy(down), -numpy(up))
    # At 0, the derivative from above: phi'' stddev for smooth functions, the density at the kink of relu.
    if name in ("relu", "silu"):
        (_, found) = gradients(lambda m, s: keras.ops.sum(activation_moments(name, m, s)[0]), *tensors(0.0, 0.0))
        np.testing.assert_allclose(numpy(found), 0.398942 if name == "relu" else 0, atol=1e-6)


INF, NAN = np.inf, np.nan
# Activation, mean, stddev, mean and variance of the output; None where float32 rounds the input.
EXTREMES = [
    ("relu", 3e38, 1, 3e38, 1),
    ("relu", -3e38, 1, 0, 0),
    ("relu", INF, 1, INF, None),
    ("relu", -INF, 1, 0, 0),
    ("relu", -INF, 0, 0, 0),
    ("relu", 0, INF, INF, INF),
    ("relu", 0, 1e30, 3.989423e29, INF),
    ("relu", 0, 1e-30, 3.989423e-31, 0),
    ("relu", 0, 1e-42, 0, 0),
    ("leaky_relu", -INF, 1, -INF, 0.04),
    ("exponential", 100, 0, INF, 0),
    ("exponential", -1000, 20, 0, 0),
    ("exponential", -INF, 1, 0, 0),
    ("exponential", 0, INF, INF, INF),
    ("relu6", INF, 1, 6, 0),
    ("relu6", -3e38, 0, 0, 0),
    ("relu6", 0, 1e30, 3, 9),
    ("tanh", INF, 1, 1, 0),
    ("tanh", -3e38, 3, -1, 0),
    ("silu", -3e38, 1, 0, 0),
    ("silu", 0, 1e-42, 0, 0),
    *((name, mean, stddev, NAN, NAN) for name in ("relu", "exponential", "relu6", "tanh", "silu")
      for mean, stddev in ((NAN, 1), (0, NAN), (NAN, 0))),
]  # fmt: skip


@pytest.mark.parametrize("name", dict.fromkeys(row[0] for row in EXTREMES))
def test_extremes(name):
    m, s, mean, variance = np.array([row[1:] for row in EXTREMES if row[0] == name], "float64").astype("float32").T
    unknown = np.array([row[4] is None for row in EXTREMES if row[0] == name])
    for mode in MODES:
        found = moments(name, m, s, mode)
        np.testing.assert_allclose(found[0], mean, rtol=2e-6, atol=1e-35)
        np.testing.assert_allclose(found[1][~unknown], variance[~unknown], rtol=2e-6, atol=1e-35)


@pytest.mark.parametrize("name", ["relu", "relu6", "tanh"])
def test_gradients_of_extremes_are_finite(name):
    m, s = np.float32([1e30, -1e30, 1e30, -1e30, 400, -400]), np.float32([1, 1, 0, 0, 0, 0])

    def scalar(m, s):
        return keras.ops.sum(activation_moments(name, m, s)[0])

    def penalty(m, s):
        return sum(keras.ops.sum(keras.ops.square(g)) for g in gradients(scalar, m, s))

    for function in (scalar, penalty):
        for gradient in gradients(function, *tensors(m, s)):
            assert np.all(np.isfinite(numpy(gradient)))


@pytest.mark.parametrize("name", ["relu", "relu6", "tanh"])
@pytest.mark.parametrize("method", ["exact", "quantiles"])
def test_empty(name, method):
    for mode in MODES:
        found = moments(name, np.zeros((0, 3), "float32"), np.ones((1, 3), "float32"), mode, method=method)
        assert [x.shape for x in found] == [(0, 3), (0, 3)]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int32"])
def test_other_dtypes_are_computed_in_float32(dtype):
    values = [
        keras.ops.convert_to_tensor([1.0, 2.0], dtype=dtype),
        keras.ops.convert_to_tensor([2.0, -1.0], dtype=dtype),
    ]
    found = activation_moments("silu", *values)
    assert {keras.backend.standardize_dtype(x.dtype) for x in found} == {"float32"}
    np.testing.assert_allclose([numpy(x) for x in found], moments("silu", [1.0, 2.0], [2.0, 1.0]), rtol=1e-6)


@pytest.mark.parametrize(
    "kwargs, named",
    [
        ({"stddev": "one"}, "stddev"),
        ({"stddev": None}, "stddev"),
        ({"mean": [1j]}, "mean"),
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
