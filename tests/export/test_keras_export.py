"""Folded models in Keras's own exports, and what exports say on the other backends of Keras."""

import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from backends import tensorflow_only
from keras import layers
from layers.samples import normal, randomize

import keras_proxynorm as kp
from keras_proxynorm.export import export_saved_model, fold


def network():
    image = keras.Input((8, 8, 3), name="image")
    x = layers.BatchNormalization()(layers.Conv2D(8, 3, padding="same", use_bias=False)(image))
    x = kp.GroupNormProxy(groups=4, activation="silu")(x)
    x = layers.Conv2D(8, 3, padding="same")(x)
    x = kp.LayerNormProxy()(x)
    x = layers.GroupNormalization(4)(layers.MaxPooling2D(2)(layers.Conv2D(8, 2)(x)))
    return randomize(keras.Model(image, layers.Dense(5, name="logits")(layers.GlobalAveragePooling2D()(x))))


def assert_equal(received, expected):
    expected = np.asarray(expected)
    assert expected.std() > 0.01
    np.testing.assert_allclose(received, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def exported(model, x, path, **options):
    folded = fold(model)
    folded(x)  # Keras exports models that were called
    folded.export(str(path), verbose=False, **options)


@tensorflow_only
def test_openvino(tmp_path):
    openvino = pytest.importorskip("openvino")
    model, x = network(), normal(2, 8, 8, 3)
    exported(model, x, tmp_path / "model.xml", format="openvino")
    compiled = openvino.compile_model(tmp_path / "model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    assert_equal(compiled([x])[compiled.output(0)], model(x))


@tensorflow_only
def test_litert(tmp_path):
    litert = pytest.importorskip("ai_edge_litert.interpreter")
    model, x = network(), normal(1, 8, 8, 3)
    exported(model, x, tmp_path / "model.tflite", format="litert")
    interpreter = litert.Interpreter(model_path=str(tmp_path / "model.tflite"))
    interpreter.allocate_tensors()
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], x)
    interpreter.invoke()
    assert_equal(interpreter.get_tensor(interpreter.get_output_details()[0]["index"]), model(x))


@tensorflow_only
def test_tf_saved_model(tmp_path):
    import tensorflow as tf

    model, x = network(), normal(2, 8, 8, 3)
    exported(model, x, tmp_path / "model", format="tf_saved_model")
    loaded = tf.saved_model.load(tmp_path / "model")
    assert_equal(loaded.serve(x), model(x))


@tensorflow_only
def test_onnx(tmp_path):
    ort = pytest.importorskip("onnxruntime")
    pytest.importorskip("tf2onnx")
    model, x = network(), normal(2, 8, 8, 3)
    exported(model, x, tmp_path / "model.onnx", format="onnx")
    session = ort.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    assert_equal(session.run(None, {session.get_inputs()[0].name: x})[0], model(x))


SCRIPT = """
import sys
import keras, numpy as np
import keras_proxynorm as kp
from keras_proxynorm.export import export_onnx, export_saved_model, fold, verify

model = keras.Sequential([keras.Input((6, 6, 3)), keras.layers.Conv2D(4, 3), kp.LayerNormProxy(activation="silu")])
model.add(keras.layers.Dense(3))
for function, path in ((export_onnx, sys.argv[1]), (export_saved_model, sys.argv[1]), (verify, sys.argv[4])):
    try:
        function(model, path)
    except RuntimeError as error:
        print(function.__name__, error)
x = np.random.default_rng(0).standard_normal((2, 6, 6, 3)).astype("float32")
folded = fold(model)
ours, theirs = (keras.ops.convert_to_numpy(m(x, training=False)) for m in (folded, model))
np.testing.assert_allclose(ours, theirs, atol=1e-5)
folded.save(sys.argv[2])
np.save(sys.argv[3], theirs)
"""


@tensorflow_only
@pytest.mark.parametrize("backend", ["jax", pytest.param("torch", marks=pytest.mark.slow)])
def test_other_backends(backend, tmp_path):
    """The errors, and the way that they name: what is folded and saved there is exported from TensorFlow."""
    pytest.importorskip(backend)
    artefact = export_saved_model(network(), tmp_path / "artefact")
    paths = [tmp_path / "target", tmp_path / "model.keras", tmp_path / "outputs.npy", artefact]
    env = {**os.environ, "KERAS_BACKEND": backend}
    done = subprocess.run([sys.executable, "-c", SCRIPT, *paths], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line for line in done.stdout.splitlines() if "KERAS_BACKEND=tensorflow" in line]
    assert [line.split()[0] for line in lines] == ["export_onnx", "export_saved_model", "verify"]
    assert all("model.save('model.keras')" in line and f"'{backend}'" in line for line in lines)
    assert not paths[0].exists()
    x = np.random.default_rng(0).standard_normal((2, 6, 6, 3)).astype("float32")
    assert_equal(keras.saving.load_model(paths[1])(x), np.load(paths[2]))
