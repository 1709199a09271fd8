"""Sums over positions by both methods, and how one of them is chosen."""

import concurrent.futures
import math

import keras
import numpy as np
import pytest
from backends import BACKEND
from backends import MODES
from backends import compiled
from backends import numpy
from backends import tensorflow_only
from backends import tensors
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

import keras_proxynorm
from keras_proxynorm import reduction
from keras_proxynorm.kernels.reductions import position_sums
from keras_proxynorm.kernels.reductions import sums_are_products

methods = pytest.mark.parametrize("method", ["matmul", "sum"])


@methods
@settings(max_examples=30, deadline=None)
@given(shape=st.lists(st.integers(1, 5), min_size=2, max_size=5), data=st.data())
def test_values(method, shape, data):
    axis = data.draw(st.integers(1, len(shape) - 1))
    x = np.random.default_rng(0).integers(-9, 9, shape).astype("float32")
    with reduction(method):
        found = numpy(position_sums(*tensors(x), axis))
    axes = tuple(i for i in range(1, len(shape)) if i != axis)
    np.testing.assert_array_equal(found, x.sum(axes, keepdims=True))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("axis", [1, 2, 3])
def test_long_sums_keep_their_digits(axis, mode):
    x = np.random.default_rng(0).random((2, 224, 224, 3)).astype("float32")
    x = np.moveaxis(x, -1, axis)
    with reduction("matmul"):
        found = numpy(compiled(lambda x: position_sums(x, axis), mode)(*tensors(x)))
    axes = tuple(i for i in range(1, 4) if i != axis)
    np.testing.assert_allclose(found, x.sum(axes, dtype="float64", keepdims=True), rtol=2e-6)


def test_setting():
    (x,) = tensors(np.zeros((1, 2, 3), "float32"))
    automatic = sums_are_products(x)
    try:
        reduction("matmul")
        assert sums_are_products(x)
        with reduction("sum"):
            assert not sums_are_products(x)
            with concurrent.futures.ThreadPoolExecutor(1) as pool:  # where tf.distribute traces
                assert not pool.submit(sums_are_products, x).result()
            with pytest.raises(ZeroDivisionError), reduction("matmul"):
                _ = 1 / 0
            assert not sums_are_products(x)
        assert sums_are_products(x)
    finally:
        reduction("auto")
    assert sums_are_products(x) == automatic


def test_unknown_method():
    with pytest.raises(ValueError, match="`method`.*'fast'"):
        reduction("fast")


@pytest.mark.skipif(BACKEND == "torch", reason="sums everywhere")
def test_products_on_cpu():
    assert sums_are_products(*tensors(np.zeros((1, 2, 3), "float32")))


@tensorflow_only
@pytest.mark.parametrize("device, product", [("CPU", True), ("GPU", False), ("TPU", False)])
def test_the_device_decides_where_it_is_traced(device, product):
    import tensorflow as tf

    layer = keras_proxynorm.GroupNormProxy(groups=2)
    layer.build((None, 5, 5, 4))

    @tf.function
    def call(x):
        with tf.device(device):
            return layer(x)

    graph = call.get_concrete_function(tf.TensorSpec((None, 5, 5, 4))).graph
    assert any(operation.type.startswith("BatchMatMul") for operation in graph.get_operations()) == product


@tensorflow_only
def test_exports_sum(tmp_path):
    from tensorflow.core.protobuf import saved_model_pb2

    from keras_proxynorm.export import export_saved_model

    model = keras.Sequential([keras.Input((5, 5, 4)), keras_proxynorm.GroupNormProxy(groups=2)])
    path = export_saved_model(model, tmp_path / "model")
    graph = saved_model_pb2.SavedModel.FromString((path / "saved_model.pb").read_bytes()).meta_graphs[0].graph_def
    (serve,) = (f for f in graph.library.function if f.signature.name.startswith("__inference_serve"))
    types = {node.op for node in serve.node_def}
    assert "Sum" in types and not any("MatMul" in name for name in types)


@methods
def test_layers_agree(method):
    x = np.random.default_rng(0).standard_normal((2, 6, 7, 8)).astype("float32")
    layer = keras_proxynorm.GroupNormProxy(groups=4)
    expected = numpy(layer(*tensors(x)))
    with reduction(method):
        np.testing.assert_allclose(numpy(layer(*tensors(x))), expected, atol=2e-6)
    assert math.isfinite(expected.sum())
