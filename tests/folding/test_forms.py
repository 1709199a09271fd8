"""Each form of a folded normalization, against NumPy in float64, at offsets and on images that cost digits."""

import contextlib
from unittest import mock

import keras
import numpy as np
import pytest
from backends import BACKEND, numpy, tensorflow_only
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

from keras_proxynorm.folding import forms
from keras_proxynorm.folding.forms import Constants, normalize_and_activate

# "large": as TensorFlow computes large images.
FORMS = ["keras", "tensorflow", "large", "onnx"] if BACKEND == "tensorflow" else ["keras"]
ACTIVATIONS = {
    "relu": lambda x: np.maximum(x, 0),
    "tanh": np.tanh,
    "silu": lambda x: x / (1 + np.exp(-x)),
    "linear": lambda x: x,
}


def reference(x, vectors, activation, groups, axis, epsilon):
    x = np.moveaxis(np.asarray(x, "float64"), axis, -1)
    y = x
    if groups is not None:
        y = x.reshape(*x.shape[:-1], groups, -1)
        axes = (*range(1, x.ndim - 1), x.ndim)
        y = (y - y.mean(axes, keepdims=True)) / np.sqrt(y.var(axes, keepdims=True) + epsilon)
        y = y.reshape(x.shape)
    scale, offset, output_scale, output_offset = (
        default if vector is None else np.asarray(vector, "float64")
        for vector, default in zip(vectors, (1, 0, 1, 0), strict=True)
    )
    y = output_scale * ACTIVATIONS[activation](scale * y + offset) + output_offset
    return np.moveaxis(y, -1, axis)


@contextlib.contextmanager
def limits_of(form):
    """For the form "large", small inputs take the way of large ones."""
    limits = ["_SMALLEST_CONVOLVED", "_SMALLEST_POOLED"] if form == "large" else []
    with contextlib.ExitStack() as stack:
        for limit in limits:
            stack.enter_context(mock.patch.object(forms, limit, 0))
        yield


def compute(form, x, vectors, activation, groups, axis, epsilon, batch_size="static"):
    """What a form gives, traced as for an export: with the batch size of `x` or with an open one."""

    def step(x):
        # Here, so that they are constants of the graph.
        tensors = Constants(*(None if vector is None else ops.convert_to_tensor(vector) for vector in vectors))
        function = keras.activations.get(activation)
        return normalize_and_activate(
            x, tensors, function, groups, axis, epsilon, form="tensorflow" if form == "large" else form
        )

    if BACKEND != "tensorflow":
        return numpy(step(ops.convert_to_tensor(x)))
    import tensorflow as tf

    size = None if batch_size is None else len(x)
    signature = [tf.TensorSpec((size, *x.shape[1:]), x.dtype, "x")]
    if form == "onnx":
        return _compute_onnx(step, signature, x)
    function = tf.function(step, input_signature=signature, autograph=False)
    with limits_of(form):
        concrete = function.get_concrete_function()
    return concrete(tf.constant(x)).numpy()


def _compute_onnx(step, signature, x):
    ort = pytest.importorskip("onnxruntime")
    pytest.importorskip("tf2onnx")
    from keras_proxynorm.export.onnx_conversion import convert

    def serve(x):
        return {"y": step(x)}

    proto = convert(serve, signature, 17)[0]
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def random_vectors(channels, seed=0, kept=(True,) * 4):
    rng = np.random.default_rng(seed)
    vectors = rng.uniform(0.5, 1.5, (4, channels)) * rng.choice([-1, 1], (4, channels))
    return [vector.astype("float32") if keep else None for vector, keep in zip(vectors, kept, strict=True)]


def check(form, x, groups, axis, activation="tanh", kept=(True,) * 4, batch_size="static", epsilon=1e-3, atol=2e-5):
    vectors = random_vectors(x.shape[axis], kept=kept)
    arguments = x, vectors, activation, groups, axis, epsilon
    received, expected = compute(form, *arguments, batch_size), reference(*arguments)
    assert received.shape == x.shape and received.dtype == x.dtype
    np.testing.assert_allclose(received, expected, rtol=0, atol=atol)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype("float32")


every_form = pytest.mark.parametrize("form", FORMS)


@every_form
@pytest.mark.parametrize("batch_size", [1, 3, None])
@pytest.mark.parametrize("groups", [None, 1, 2, 8])
def test_images(form, groups, batch_size):
    check(form, normal(batch_size or 2, 5, 6, 8), groups, 3, batch_size=batch_size)


@every_form
@pytest.mark.parametrize("shape", [(8,), (7, 8), (5, 6, 8), (3, 4, 5, 8)], ids=len)
@pytest.mark.parametrize("groups", [None, 1, 4])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_ranks(form, shape, groups, batch_size):
    check(form, normal(batch_size, *shape), groups, len(shape))


@every_form
@pytest.mark.parametrize("shape", [(8, 7), (8, 5, 6), (8, 3, 4, 5)], ids=len)
@pytest.mark.parametrize("groups", [None, 2, 8])
@pytest.mark.parametrize("batch_size", [1, None])
def test_channels_first(form, shape, groups, batch_size):
    check(form, normal(batch_size or 3, *shape), groups, 1, batch_size=batch_size)


@every_form
def test_axis_in_the_middle(form):
    check(form, normal(2, 5, 8, 6), 4, 2)


@every_form
@pytest.mark.parametrize("groups", [None, 2])
@pytest.mark.parametrize("kept", [[bool(bits >> i & 1) for i in range(4)] for bits in range(16)])
def test_vectors_that_are_not_there(form, groups, kept):
    check(form, normal(1, 3, 4, 8), groups, 3, kept=kept)


@every_form
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(form, activation):
    check(form, normal(1, 5, 6, 8), 4, 3, activation)


@every_form
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (2, 3)])
@pytest.mark.parametrize("groups", [1, 4])
def test_small_images(form, size, groups):
    check(form, normal(1, *size, 8), groups, 3)


@every_form
def test_one_value_for_each_group(form):
    # It is its own mean.
    x, vectors = 3 + normal(1, 1, 1, 8), random_vectors(8)
    expected = vectors[2] * np.tanh(vectors[1]) + vectors[3]
    received = compute(form, x, vectors, "tanh", 8, 3, 1e-3)
    np.testing.assert_allclose(received, np.broadcast_to(expected, x.shape), rtol=0, atol=1e-4)


@every_form
@pytest.mark.parametrize("offset", [1e2, 1e4])
@pytest.mark.parametrize("groups", [1, 4, 8])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_offsets(form, offset, groups, batch_size):
    # Against what the rounded input says. Unit variance and a mean that is rounded to an ulp of the offset.
    x = (offset + normal(batch_size, 12, 14, 8)).astype("float32")
    check(form, x, groups, 3, "linear", atol=2e-5 + 4 * np.spacing(np.float32(offset)))


@every_form
@pytest.mark.parametrize("groups", [1, 4, 8])
def test_offsets_of_channels(form, groups):
    # The variance of a group is that of the offsets.
    x = (1e3 * np.arange(8) + normal(1, 12, 14, 8)).astype("float32")
    check(form, x, groups, 3, "linear", atol=2e-3)


@every_form
@pytest.mark.parametrize(
    "groups, half",
    [
        *((4, half) for half in ("top", "bottom", "left", "right", "middle")),
        *((groups, "top") for groups in (1, 8)),
        *(
            pytest.param(groups, half, marks=pytest.mark.slow)
            for groups in (1, 8)
            for half in ("bottom", "left", "right", "middle")
        ),
    ],
)
def test_images_that_are_half_constant(form, groups, half):
    x = 1e4 + normal(1, 16, 16, 8)
    part = {
        "top": np.s_[:, :8],
        "bottom": np.s_[:, 8:],
        "left": np.s_[:, :, :8],
        "right": np.s_[:, :, 8:],
        "middle": np.s_[:, 8],
    }[half]
    for value in (0, 1e4, 255):
        x[part] = value
        check(form, x.astype("float32"), groups, 3, "linear", atol=6e-3)


@every_form
@pytest.mark.parametrize("value", [0, 1, 0.1, 255, 1e4])
def test_constant_images(form, value):
    x, vectors = np.full((1, 7, 9, 8), value, "float32"), random_vectors(8)
    expected = vectors[2] * np.tanh(vectors[1]) + vectors[3]
    received = compute(form, x, vectors, "tanh", 4, 3, 1e-3)
    atol = 1e-5 + 64 * np.spacing(np.float32(value))
    np.testing.assert_allclose(received, np.broadcast_to(expected, x.shape), rtol=0, atol=atol)


@every_form
@pytest.mark.parametrize("scale", [1e-6, 1e-2, 1e3, 1e6])
def test_scales(form, scale):
    check(form, (scale * normal(1, 12, 14, 8)).astype("float32"), 4, 3, "linear")


@every_form
def test_one_pixel_far_out(form):
    for place in (0, 8, 15):
        x = normal(1, 16, 16, 8)
        x[:, place, place] = 1e4
        check(form, x, 4, 3, "linear", atol=2e-3)


@every_form
@pytest.mark.slow
@pytest.mark.parametrize("offset", [0, 1e4])
@pytest.mark.parametrize("groups", [1, 8, 32])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_large_images(form, offset, groups, batch_size):
    if form == "onnx":
        # ONNX Runtime adds up in float32 what a group has, 1.6 million elements, from 0 on.
        x = (min(offset, 10) + normal(batch_size, 224, 224, 32)).astype("float32")
        check(form, x, groups, 3, "linear", atol=5e-4)
        return
    x = (offset + normal(batch_size, 224, 224, 32)).astype("float32")
    check(form, x, groups, 3, "linear", atol=5e-5 + 4 * np.spacing(np.float32(offset)) * (offset > 0))


@pytest.mark.parametrize("form", [form for form in FORMS if form != "onnx"])
def test_masks(form):
    x = normal(2, 5, 8)
    mask = np.array([[1, 1, 1, 0, 0], [1, 0, 1, 1, 1]], bool)
    x[~mask] = 1e6
    vectors = random_vectors(8)
    with limits_of(form):
        tensors = Constants(*map(ops.convert_to_tensor, vectors))
        received = normalize_and_activate(
            ops.convert_to_tensor(x), tensors, ops.tanh, 2, 2, 1e-3, ops.convert_to_tensor(mask)
        )
    for sample, kept, output in zip(x, mask, numpy(received), strict=True):
        expected = reference(sample[None, kept], vectors, "tanh", 2, 2, 1e-3)
        np.testing.assert_allclose(output[kept], expected[0], rtol=0, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), rank=st.integers(2, 5), per_group=st.integers(1, 3), offset=st.sampled_from([0, 10, 1e4]))
def test_definition(data, rank, per_group, offset):
    groups = data.draw(st.sampled_from([None, 1, 2, 4]))
    form = data.draw(st.sampled_from([form for form in FORMS if form != "onnx"]))
    axis = data.draw(st.sampled_from(sorted({1, rank - 1})))
    shape = [data.draw(st.integers(1, 5)) for _ in range(rank)]
    shape[axis] = (groups or 1) * per_group
    kept = [data.draw(st.booleans()) for _ in range(4)]
    x = (offset + normal(*shape, seed=data.draw(st.integers(0, 1000)))).astype("float32")
    if groups is None:
        x = x - np.float32(offset)
    # Few values may lie close together, which divides by little more than epsilon.
    check(form, x, groups, axis, kept=kept, epsilon=1.0, atol=5e-5 + 4 * np.spacing(np.float32(offset)))


@tensorflow_only
@pytest.mark.parametrize(
    "form, batch_size, kernels", [("large", 1, True), ("large", 2, False), ("tensorflow", 1, False)]
)
def test_tensorflow_has_fast_kernels_for_one_large_image(form, batch_size, kernels):
    import tensorflow as tf

    @tf.function(input_signature=[tf.TensorSpec((batch_size, 5, 6, 8))], autograph=False)
    def function(x):
        vectors = Constants(*map(tf.constant, random_vectors(8)))
        with limits_of(form):
            return normalize_and_activate(x, vectors, ops.relu, 2, 3, 1e-3, form="tensorflow")

    nodes = {operation.type for operation in function.get_concrete_function().graph.get_operations()}
    assert ({"DepthwiseConv2dNative", "BiasAdd", "AvgPool"} <= nodes) == kernels
