"""ONNX files as tests read them: run by each runtime, compared, counted."""

import collections

import keras
import numpy as np
import pytest

__all__ = ["RUNTIMES", "assert_equal", "chain", "count", "run_onnx", "run_openvino"]


def run_onnx(path, *inputs, optimized=True):
    ort = pytest.importorskip("onnxruntime")
    options = ort.SessionOptions()
    if not optimized:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return session.run(None, {value.name: x for value, x in zip(session.get_inputs(), inputs, strict=True)})


def run_openvino(path, *inputs):
    openvino = pytest.importorskip("openvino")
    compiled = openvino.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    results = compiled(list(inputs))
    return [results[output] for output in compiled.outputs]


RUNTIMES = {
    "onnxruntime": run_onnx,
    "without optimizations": lambda *arguments: run_onnx(*arguments, optimized=False),
    "openvino": run_openvino,
}


def assert_equal(received, expected, tolerance=1e-5):
    for ours, theirs in zip(received, keras.tree.flatten(expected), strict=True):
        theirs = np.asarray(theirs)
        assert theirs.std() > 1e-3
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * np.abs(theirs).max())


def count(proto):
    return collections.Counter(node.op_type for node in proto.graph.node)


def chain(*steps, shape=(6, 6, 4)):
    inputs = x = keras.Input(shape, name="x")
    for step in steps:
        x = step(x)
    return keras.Model(inputs, x)
