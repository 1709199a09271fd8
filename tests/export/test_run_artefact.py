"""The script that runs artefacts stands alone, and what goes wrong in it can be read."""

import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest
from backends import tensorflow_only

import keras_proxynorm as kp
from keras_proxynorm.export import export_onnx, export_saved_model, run_artefact

pytestmark = tensorflow_only

SCRIPT = pathlib.Path(run_artefact.__file__)


@pytest.fixture(scope="module")
def model():
    inputs = [keras.Input((4, 8), name="x"), keras.Input((8,), name="y")]
    x = kp.LayerNormProxy(name="features")(inputs[0])
    return keras.Model(inputs, [x, keras.layers.Dense(3, name="logits")(inputs[1])])


@pytest.fixture(scope="module")
def onnx_file(model, tmp_path_factory):
    return export_onnx(model, tmp_path_factory.mktemp("onnx") / "model.onnx")


@pytest.fixture
def run(tmp_path):
    """Runs the script for two calls, and gives their inputs, the finished process and what it wrote."""

    def run(path, runtime, *arguments):
        rng = np.random.default_rng(0)
        shapes = {"x": (1, 4, 8), "y": (1, 8)}
        inputs = {
            f"{i}/{name}": rng.standard_normal(shape).astype("float32") for i in "01" for name, shape in shapes.items()
        }
        np.savez(tmp_path / "inputs.npz", **inputs)
        # Isolated, and from another place.
        command = [sys.executable, "-I", SCRIPT, path, runtime, tmp_path / "inputs.npz", tmp_path / "outputs.npz"]
        done = subprocess.run([*map(str, command), *arguments], cwd=tmp_path, capture_output=True, text=True)
        outputs = {}
        if done.returncode == 0:
            with np.load(tmp_path / "outputs.npz") as file:
                outputs = dict(file)
        return inputs, done, outputs

    return run


def check(model, inputs, outputs):
    assert set(outputs) - {"seconds"} == {f"{i}/{name}" for i in "01" for name in ("features", "logits")}
    for i in "01":
        features, logits = model([inputs[f"{i}/x"], inputs[f"{i}/y"]])
        np.testing.assert_allclose(outputs[f"{i}/features"], features, atol=1e-5)
        np.testing.assert_allclose(outputs[f"{i}/logits"], logits, atol=1e-5)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_onnx(runtime, model, onnx_file, run):
    pytest.importorskip(runtime)
    inputs, done, outputs = run(onnx_file, runtime, "--threads=2", "--runs=5")
    assert done.returncode == 0, done.stderr
    check(model, inputs, outputs)
    assert 0 < outputs["seconds"] < 1
    # The name of the file says nothing.
    inputs, done, outputs = run(onnx_file.rename(onnx_file.with_suffix("")), runtime)
    onnx_file.with_suffix("").rename(onnx_file)
    assert done.returncode == 0, done.stderr
    check(model, inputs, outputs)
    assert "seconds" not in outputs


def test_saved_model(model, run, tmp_path):
    inputs, done, outputs = run(export_saved_model(model, tmp_path / "model"), "tensorflow", "--runs=1")
    assert done.returncode == 0, done.stderr
    check(model, inputs, outputs)
    assert 0 < outputs["seconds"] < 1


def test_errors_can_be_read(onnx_file, run, tmp_path):
    pytest.importorskip("onnxruntime")
    _, done, _ = run(onnx_file, "onnx")
    assert done.returncode == 2 and "invalid choice: 'onnx'" in done.stderr
    _, done, _ = run(tmp_path / "none.onnx", "onnxruntime")
    assert done.returncode == run_artefact.CANNOT_LOAD and "none.onnx" in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_saved_model_without_the_signature(run, tmp_path):
    import tensorflow as tf

    tf.saved_model.save(tf.Module(), tmp_path / "module")
    _, done, _ = run(tmp_path / "module", "tensorflow")
    assert done.returncode == 1 and done.stderr.splitlines()[-1].endswith("'serving_default'. Received: []")


def test_loads_nothing_of_ours(onnx_file, tmp_path):
    pytest.importorskip("onnxruntime")
    np.savez(tmp_path / "inputs.npz", **{"0/x": np.zeros((1, 4, 8), "f"), "0/y": np.zeros((1, 8), "f")})
    script = (
        "import runpy, sys\n"
        f"main = runpy.run_path({str(SCRIPT)!r})['main']\n"
        "main(sys.argv[1:])\n"
        "print([name for name, module in sys.modules.items() if module and name.startswith(('keras', 'tensorflow'))])\n"
    )
    command = [sys.executable, "-I", "-c", script, onnx_file, "onnxruntime", "inputs.npz", "outputs.npz"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_median_is_of_the_calls_after_the_first():
    calls = []
    assert run_artefact.median_seconds(calls.append, "inputs", 30) < 1
    assert calls == ["inputs"] * 40
