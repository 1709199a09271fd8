"""The normalized values against float64 and against Keras: long axes, any offset, scale and mask, hard inputs."""

import keras
import numpy as np
import pytest
from backends import MODES, compiled, numpy, tensorflow_only, tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

import keras_proxynorm
from keras_proxynorm import kernels

METHODS = ("auto", "matmul", "pool", "sum")


def expected(x, groups, axis, epsilon, mask=None):
    """Group normalization in float64; what is masked is the mean."""
    x = np.moveaxis(np.asarray(x, "float64"), axis, -1)
    shape = (len(x), -1, groups, x.shape[-1] // groups)
    weights = np.ones(x.shape) if mask is None else np.moveaxis(mask, axis, -1).astype("float64")
    values, weights = np.reshape(x, shape), np.reshape(weights, shape)
    counts = np.maximum(weights.sum((1, 3), keepdims=True), 1)
    centered = weights * (values - (weights * values).sum((1, 3), keepdims=True) / counts)
    y = centered / np.sqrt(np.square(centered).sum((1, 3), keepdims=True) / counts + epsilon)
    return np.moveaxis(y.reshape(x.shape), -1, axis)


def error(found, truth):
    """The largest error, in units of the value where it is above 1."""
    return np.max(np.abs(found - truth) / np.maximum(np.abs(truth), 1), initial=0)


def middle(x, axis):
    """Where the pivot is looked up: a block in the middle of the first axis that has positions."""
    index = [slice(None)] * x.ndim
    i = 2 if axis == 1 and x.ndim > 2 else 1
    index[i] = slice(x.shape[i] // 2, x.shape[i] // 2 + x.shape[i] // 16 + 1)
    return tuple(index)


def hard(kind, x, axis, rng):
    """Unit normal values `x`, made hard in one way."""
    x = np.moveaxis(x.copy(), axis, -1)
    if kind == "outliers in the middle":
        x[middle(x, x.ndim - 1)] *= 1e4
        x[middle(x, x.ndim - 1)] += 1e3
    elif kind == "one outlier" and x.size:
        x[(0,) * x.ndim] = 1e4
    elif kind == "three outliers":
        for part, value in ((4, 1e3), (2, 1e4), (4 / 3, -1e4)):
            x[(slice(None), *(int(size / part) for size in x.shape[1:]))] = value
    elif kind == "constant channels":
        x[..., ::2] = 1
    elif kind == "constant":
        x[:] = 1
    elif kind == "ramp" and x.ndim > 2:
        x += np.linspace(-50, 50, x.shape[1], dtype=x.dtype).reshape(-1, *(1,) * (x.ndim - 2))
    elif kind == "heavy tails":
        x = rng.standard_cauchy(x.shape).clip(-1e5, 1e5)
    elif kind == "denormal":
        x *= 1e-40
    return np.moveaxis(x, -1, axis)


KINDS = ("normal", "outliers in the middle", "one outlier", "three outliers", "constant channels", "constant", "ramp")
KINDS += ("heavy tails", "denormal")


@settings(deadline=None)
@given(
    data=st.data(),
    rank=st.integers(2, 5),
    groups=st.integers(1, 3),
    per_group=st.integers(1, 4),
    kind=st.sampled_from(KINDS),
    offset=st.sampled_from([0.0, 3.0, -1e4, 1e6]),
    scale=st.sampled_from([1.0, 1e-4, 1e9]),
    dtype=st.sampled_from(["float32", "float16", "bfloat16"]),
    masked=st.sampled_from(["no", "no", "steps", "elements"]),
    epsilon=st.sampled_from([1e-3, 1e-5]),
    method=st.sampled_from(METHODS),
    # TensorFlow keeps what it compiles.
    mode=st.sampled_from((*MODES, *["eager"] * 17)),
)
def test_any_input(data, rank, groups, per_group, kind, offset, scale, dtype, masked, epsilon, method, mode):
    axis = data.draw(st.integers(1, rank - 1))
    shape = [data.draw(st.integers(1, 5)) for _ in range(rank)]
    shape[axis] = groups * per_group
    positions = [i for i in range(1, rank) if i != axis]
    if positions:
        shape[data.draw(st.sampled_from(positions))] = data.draw(st.sampled_from([1, 2, 17, 300, 4097, 6000]))
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    x = hard(kind, rng.standard_normal(shape), axis, rng) + offset
    x = x * scale if dtype == "float32" else x.clip(-6e4, 6e4)
    x = numpy(ops.cast(ops.convert_to_tensor(x.astype("float32")), dtype)).astype("float32")
    mask = full_mask = None
    if masked != "no":
        axes = range(rank) if masked == "elements" else [0, *positions][:2]
        mask = rng.random([shape[i] for i in axes]) < 0.6
        full_mask = np.broadcast_to(mask.reshape([shape[i] if i in axes else 1 for i in range(rank)]), shape)
    layer = keras_proxynorm.GroupNormProxy(groups, axis, epsilon, activation=None, dtype="float32")
    layer.build(shape)
    arguments = tensors(x) if mask is None else [*tensors(x), *tensors(mask)]
    with keras_proxynorm.reduction(method):
        found = numpy(compiled(lambda *arguments: layer.normalize_inputs(*arguments), mode)(*arguments))
        # Where all values are equal, epsilon makes of a small part of their last digit something.
        last_digit = np.spacing(np.max(np.abs(x), initial=0)) / epsilon**0.5
        assert error(found, expected(x, groups, axis, epsilon, full_mask)) < 1e-5 * (1 + last_digit)


@pytest.mark.parametrize("method", ["auto", *(pytest.param(m, marks=pytest.mark.slow) for m in METHODS[1:])])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["normal", "outliers in the middle", "three outliers"])
@pytest.mark.parametrize(
    "shape, axis, groups",
    [
        ((1, 1_000_000, 2), 2, 1),
        ((1, 2, 999_983), 1, 2),
        ((1, 8_000_000), 1, 1),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [((1, 8_000_000, 1), 2, 1), ((1, 1, 8_000_000), 1, 1)]
        ),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [((1, 7_990_271, 1), 2, 1), ((1, 2048, 2048, 2), 3, 1)]
        ),
    ],
)
def test_long_axes(shape, axis, groups, kind, mode, method):
    """As exact as stock Keras, up to 8 million positions along one axis."""
    rng = np.random.default_rng(0)
    x = (hard(kind, rng.standard_normal(shape, "float32"), axis, rng) + 3).astype("float32")
    truth = expected(x, groups, axis, 1e-3)
    keras_layer = keras.layers.GroupNormalization(groups, axis)
    with keras_proxynorm.reduction(method):
        found = compiled(lambda x: kernels.group_normalize(x, groups, axis, 1e-3), mode)(*tensors(x))
    assert error(numpy(found), truth) < max(2e-6, error(numpy(keras_layer(*tensors(x))), truth)) < 2e-5


@tensorflow_only
@pytest.mark.parametrize("jit_compile", [False, True])
def test_long_axes_of_unknown_size(jit_compile):
    import tensorflow as tf

    @tf.function(jit_compile=jit_compile, input_signature=[tf.TensorSpec((None, None, 2))])
    def normalize(x):
        return kernels.group_normalize(x, 1, 2, 1e-3)

    for size in (1, 5, 1024, 1_000_003):
        x = hard("outliers in the middle", np.random.default_rng(0).standard_normal((1, size, 2)), 2, None) + 3
        assert error(numpy(normalize(*tensors(x.astype("float32")))), expected(x.astype("float32"), 1, 2, 1e-3)) < 5e-6
