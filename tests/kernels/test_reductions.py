"""Sums over positions by each method, and how one of them is chosen."""

import concurrent.futures
import threading

import keras
import numpy as np
import pytest
from backends import BACKEND, MODES, compiled, numpy, tensorflow_only, tensors
from hypothesis import given, settings
from hypothesis import strategies as st

import keras_proxynorm
from keras_proxynorm import reduction, set_reduction
from keras_proxynorm.kernels.reductions import position_sums, reduction_method

methods = pytest.mark.parametrize("method", ["matmul", "pool", "sum"])


@methods
@settings(max_examples=30, deadline=None)
@given(shape=st.lists(st.integers(1, 5), min_size=2, max_size=5), data=st.data())
def test_values(method, shape, data):
    axis = data.draw(st.integers(1, len(shape) - 1))
    x = np.random.default_rng(0).integers(-9, 9, shape).astype("float32")
    with reduction(method):
        found = numpy(position_sums(*tensors(x), axis))
    axes = tuple(i for i in range(1, len(shape)) if i != axis)
    np.testing.assert_allclose(found, x.sum(axes, keepdims=True), rtol=1e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("method", ["matmul", "pool"])
@pytest.mark.parametrize("axis", [1, 2, 3])
def test_long_sums_keep_their_digits(axis, method, mode):
    x = np.random.default_rng(0).random((2, 224, 224, 3)).astype("float32")
    x = np.moveaxis(x, -1, axis)
    with reduction(method):
        found = numpy(compiled(lambda x: position_sums(x, axis), mode)(*tensors(x)))
    axes = tuple(i for i in range(1, 4) if i != axis)
    np.testing.assert_allclose(found, x.sum(axes, dtype="float64", keepdims=True), rtol=2e-6)


def test_contexts_nest_and_the_setting_is_below_them():
    (x,) = tensors(np.zeros((1, 2, 3), "float32"))
    automatic = reduction_method(x)
    try:
        set_reduction("matmul")
        assert reduction_method(x) == "matmul"
        with reduction("sum"):
            assert reduction_method(x) == "sum"
            with pytest.raises(ZeroDivisionError), reduction("pool"):
                assert reduction_method(x) == "pool"
                _ = 1 / 0
            assert reduction_method(x) == "sum"
            with reduction("auto"):
                assert reduction_method(x) == automatic
            set_reduction("pool")
            assert reduction_method(x) == "sum"
        assert reduction_method(x) == "pool"
    finally:
        set_reduction("auto")
    assert reduction_method(x) == automatic


def test_a_context_can_be_entered_again_and_does_nothing_before():
    (x,) = tensors(np.zeros((1, 2, 3), "float32"))
    automatic = reduction_method(x)
    again = reduction("pool")
    assert reduction_method(x) == automatic
    with again, reduction("sum"), again:
        assert reduction_method(x) == "pool"
    with again:
        assert reduction_method(x) == "pool"
    assert reduction_method(x) == automatic


def test_threads_do_not_see_the_contexts_of_others():
    """Two threads are in a context of one object and in another at the same time, and leave them in any order."""
    (x,) = tensors(np.zeros((1, 2, 3), "float32"))
    automatic = reduction_method(x)
    shared, both = reduction("matmul"), threading.Barrier(2, timeout=60)

    def run(method):
        found = []
        with shared:
            both.wait()
            with reduction(method):
                both.wait()
                found.append(reduction_method(x))
                both.wait()
            found.append(reduction_method(x))
            if method == "sum":
                both.wait()
        if method == "pool":
            both.wait()
        found.append(reduction_method(x))
        return found

    with concurrent.futures.ThreadPoolExecutor(2) as threads, reduction("sum"):
        first, second = threads.map(run, ("sum", "pool"))
        assert reduction_method(x) == "sum"
    assert first == ["sum", "matmul", automatic]
    assert second == ["pool", "matmul", automatic]


def test_the_setting_reaches_all_threads():
    (x,) = tensors(np.zeros((1, 2, 3), "float32"))
    try:
        set_reduction("pool")
        with concurrent.futures.ThreadPoolExecutor(1) as threads, reduction("sum"):
            # As tf.distribute traces.
            assert threads.submit(reduction_method, x).result() == "pool"
    finally:
        set_reduction("auto")


@pytest.mark.parametrize("set_method", [reduction, set_reduction])
@pytest.mark.parametrize("method", ["fast", None, ["sum"]])
def test_unknown_method(set_method, method):
    with pytest.raises(ValueError, match="`method` must be one of 'auto', 'matmul', 'pool', 'sum'. Received: method="):
        set_method(method)


@pytest.mark.parametrize("size", ["small", "large"])
def test_on_cpu(size):
    expected = {"jax": "matmul", "torch": "sum"}.get(BACKEND, {"small": "sum", "large": "pool"}[size])
    x = np.zeros((2, 512 if size == "large" else 1, 1024), "float32")
    assert reduction_method(*tensors(x)) == expected


@tensorflow_only
@pytest.mark.parametrize(
    "device, jit_compile, expected",
    [("CPU", False, "AvgPool"), ("CPU", True, "BatchMatMulV2"), ("GPU", False, "Sum"), ("TPU", True, "Sum")],
)
def test_device_and_compiler_decide_where_it_is_traced(device, jit_compile, expected):
    import tensorflow as tf

    @tf.function(jit_compile=jit_compile)
    def call(x):
        with tf.device(device):
            return position_sums(x, 3)

    graph = call.get_concrete_function(tf.TensorSpec((None, 256, 256, 4))).graph
    assert {"AvgPool", "BatchMatMulV2", "Sum"} & {op.type for op in graph.get_operations()} == {expected}


@tensorflow_only
def test_exports_sum(tmp_path):
    from tensorflow.core.protobuf import saved_model_pb2

    from keras_proxynorm.export import export_saved_model

    model = keras.Sequential([keras.Input((5, 5, 4)), keras_proxynorm.GroupNormProxy(groups=2)])
    path = export_saved_model(model, tmp_path / "model", fold=False, verify=False)
    graph = saved_model_pb2.SavedModel.FromString((path / "saved_model.pb").read_bytes()).meta_graphs[0].graph_def
    serve = [f for f in graph.library.function if f.signature.name.startswith("__inference_serve")]
    types = {node.op for function in serve for node in function.node_def}
    assert "Sum" in types and not any("MatMul" in name or "Pool" in name for name in types)


@methods
def test_layers_agree(method):
    x = np.random.default_rng(0).standard_normal((2, 6, 7, 8)).astype("float32")
    layer = keras_proxynorm.GroupNormProxy(groups=4)
    expected = numpy(layer(*tensors(x)))
    with reduction(method):
        np.testing.assert_allclose(numpy(layer(*tensors(x))), expected, atol=2e-6)
