"""The command line writes what it says, says what it measured, and fails with one line and no traceback."""

import importlib
import pathlib
import re
import runpy
import sys

import keras
import pytest
from backends import tensorflow_only

import keras_proxynorm as kp
from keras_proxynorm.export import command_line, verification
from keras_proxynorm.export.verification import VerificationError, artefact_inputs

pytestmark = tensorflow_only


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    image = keras.Input((8, 8, 3), name="image")
    x = kp.LayerNormProxy()(keras.layers.Conv2D(8, 3)(image))
    path = tmp_path_factory.mktemp("saved") / "model.keras"
    keras.Model(image, keras.layers.Dense(5, name="logits")(x)).save(path)
    return path


@pytest.fixture
def run(capfd, monkeypatch, tmp_path):
    """Runs the command line in the test's directory, and gives its exit status, its results and its messages."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        try:
            status = command_line.main([str(argument) for argument in arguments])
        except SystemExit as error:
            status = error.code
        return status, *capfd.readouterr()

    return run


def test_both_formats(saved, run, files):
    pytest.importorskip("onnxruntime")
    status, results, messages = run(saved, "served", "--runs", "3", "--threads", "2")
    assert status == 0, messages
    assert {"served/model.onnx", "served/saved_model/1/saved_model.pb"} <= set(files())
    assert re.findall(r"^\[\d/\d\] .*", messages, re.MULTILINE) == [
        f"[1/4] loading {saved}",
        "[2/4] exporting SavedModel and comparing it with the model",
        "[3/4] exporting ONNX and comparing it with the model",
        "[4/4] measuring the latency",
    ]
    header, first, second, *_ = map(str.split, results.splitlines())
    assert header == ["artefact", "size", "runtime", "difference", "latency"]
    for row, path, runtime in [
        (first, "served/saved_model/1", "tensorflow"),
        (second, "served/model.onnx", "onnxruntime"),
    ]:
        assert row[0] == path and row[3] == runtime
        assert float(row[1]) > 0 and float(row[4]) < 1e-4 and float(row[5]) > 0
    assert "median of 3 calls, batch size 1, 2 threads" in results


def test_one_file(saved, run, files):
    pytest.importorskip("onnxruntime")
    status, results, _ = run(saved, "small.onnx", "--batch-size", "dynamic", "--opset", "18", "--runs", "0")
    assert status == 0 and files() == ["small.onnx"]
    assert artefact_inputs(pathlib.Path("small.onnx")) == {"image": ((None, 8, 8, 3), "float32")}
    assert "onnxruntime" in results and "latency: " not in results

    status, results, messages = run(saved, "small.onnx", "--runs", "0")
    assert (status, results) == (1, "")
    assert messages.endswith("error: small.onnx exists already; pass --overwrite to replace it\n")
    status, results, _ = run(saved, "small.onnx", "--runs", "0", "--overwrite", "--no-verify")
    assert status == 0 and "difference: " not in results
    assert artefact_inputs(pathlib.Path("small.onnx")) == {"image": ((1, 8, 8, 3), "float32")}


def test_open_sizes(run, tmp_path):
    pytest.importorskip("onnxruntime")
    image = keras.Input((None, None, 3), name="image")
    features = kp.LayerNormProxy(name="features")(keras.layers.Conv2D(8, 3)(image))
    keras.Model(image, features).save(tmp_path / "model.keras")
    status, results, messages = run("model.keras", "open", "--input-shape", "none,none,3", "--runs", "2")
    assert status == 0, messages
    for path in ("open/model.onnx", "open/saved_model/1"):
        assert artefact_inputs(pathlib.Path(path)) == {"image": ((1, None, None, 3), "float32")}
    assert "median of 2 calls, batch size 1, open sizes 64x64, 1 thread" in results


def test_a_runtime_that_cannot_load_the_file(saved, run, monkeypatch):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("openvino")
    real = verification.run_in_fresh_process

    def run_or_fail(path, runtime, calls, **options):
        if runtime == "openvino":
            raise verification.CannotLoadError("openvino cannot load the artefact")
        return real(path, runtime, calls, **options)

    monkeypatch.setattr(verification, "run_in_fresh_process", run_or_fail)
    monkeypatch.setattr(command_line, "run_in_fresh_process", run_or_fail)
    with pytest.warns(UserWarning, match="openvino cannot load"):
        status, results, messages = run(saved, "model.onnx", "--runs", "2")
    assert status == 0, messages
    assert "onnxruntime" in results and "openvino" not in results


def test_existing_artefacts_are_found_before_the_work(saved, run, tmp_path):
    (tmp_path / "served" / "saved_model" / "3").mkdir(parents=True)
    status, _, messages = run(saved, "served", "--version", "3")
    assert status == 1 and "saved_model/3 exists already; pass --overwrite" in messages
    (tmp_path / "served" / "model.onnx").touch()
    status, _, messages = run(saved, "served")
    assert status == 1 and "model.onnx exists already; pass --overwrite" in messages
    assert "exporting" not in messages


def test_arguments_reach_the_exports(saved, run, monkeypatch):
    received = {}

    def export(kind):
        def export(model, path, **arguments):
            received[kind] = arguments
            raise ValueError("two\nlines")

        return export

    monkeypatch.setattr(command_line, "export_onnx", export("onnx"))
    monkeypatch.setattr(command_line, "export_saved_model", export("saved_model"))
    options = "--batch-size 4 --no-fold --no-verify --overwrite --input-shape a=2,3 --input-shape b=4 --opset 18"
    status, results, messages = run(saved, "x.onnx", *options.split(), "--float16-weights")
    assert (status, results) == (1, "") and messages.endswith("\nkeras-proxynorm-export: error: two lines\n")
    shared = {
        "batch_size": 4,
        "input_shape": {"a": (2, 3), "b": (4,)},
        "fold": False,
        "verify": False,
        "overwrite": True,
    }
    assert received == {"onnx": {**shared, "opset": 18, "float16_weights": True}}
    run(saved, "x", "--format", "saved_model", "--version", "7", "--batch-size", "dynamic", "--input-shape", "2,3")
    verify = received["saved_model"].pop("verify")
    assert received["saved_model"] == {
        "batch_size": None,
        "input_shape": (2, 3),
        "fold": True,
        "overwrite": False,
        "version": 7,
    }
    monkeypatch.setattr(
        command_line, "verify", lambda *arguments, **others: received.update(verify=(arguments, others))
    )
    verify("model", "path", input_shape=(2, 3))
    assert received["verify"] == (("model", "path"), {"input_shape": (2, 3), "tolerance": 1e-4})


def test_artefact_that_is_refused(saved, run, files, monkeypatch):
    def refuse(model, path, **arguments):
        assert arguments == {"input_shape": None, "tolerance": 0.25}
        raise VerificationError("The artefact is wrong")

    monkeypatch.setattr(command_line, "verify", refuse)
    status, results, messages = run(saved, "new/model.onnx", "--tolerance", ".25")
    assert (status, results) == (1, "") and messages.endswith("error: The artefact is wrong\n")
    assert files() == []


def test_latency_without_a_runtime(saved, run, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    status, results, _ = run(saved, "model.onnx", "--no-verify")
    assert status == 0 and re.search(r"^model\.onnx +[\d.]+ MB +- +- +-$", results, re.MULTILINE)
    status, _, messages = run(saved, "other.onnx")
    assert status == 1 and messages.endswith("pip install onnxruntime\n")


def test_files_that_are_no_models(run, tmp_path):
    (tmp_path / "text.keras").write_text("no")
    for name, message in {"none.keras": "none.keras, which does not exist", "text.keras": "as model.save"}.items():
        status, results, messages = run(name, "out")
        assert (status, results) == (1, "") and message in messages and "Traceback" not in messages


def test_custom_classes(run, tmp_path, files, monkeypatch):
    (tmp_path / "layers_of_a_user.py").write_text(
        "import keras\n"
        "@keras.saving.register_keras_serializable('user')\n"
        "class Twice(keras.layers.Layer):\n"
        "    def call(self, x):\n"
        "        return 2 * x\n"
    )
    monkeypatch.setattr(sys, "path", [*sys.path])
    with monkeypatch.context() as context:
        context.syspath_prepend(tmp_path)
        module = importlib.import_module("layers_of_a_user")
        keras.Sequential([keras.Input((4,)), module.Twice()]).save(tmp_path / "model.keras")
    # As in a process that has not seen it.
    monkeypatch.delitem(sys.modules, "layers_of_a_user")
    monkeypatch.delitem(keras.saving.get_custom_objects(), "user>Twice")
    arguments = ["model.keras", "model.onnx", "--no-verify", "--runs", "0"]
    status, _, messages = run(*arguments)
    assert status == 1 and "custom class or function 'Twice'" in messages and "--import MODULE" in messages
    status, _, messages = run(*arguments, "--import", "no_such_module")
    assert status == 1 and "no_such_module" in messages
    status, _, messages = run(*arguments, "--import", "layers_of_a_user")
    assert status == 0 and "model.onnx" in files()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model.keras"], "OUT"),
        (["model.keras", "out", "--input-shape", "8x8"], "argument --input-shape: must be positive sizes.*'8x8'"),
        (["model.keras", "out", "--input-shape", "8,0,3"], "argument --input-shape: must be positive sizes"),
        (["model.keras", "out", "--input-shape", "image="], "argument --input-shape: must be positive sizes"),
        (["model.keras", "out", "--input-shape", "8", "--input-shape", "9"], "each of several inputs needs its name"),
        (["model.keras", "out", "--input-shape", "8", "--input-shape", "a=9"], "each of several inputs needs its name"),
        (["model.keras", "out", "--batch-size", "0"], "argument --batch-size: must be a positive integer"),
        (["model.keras", "out", "--batch-size", "any"], "argument --batch-size: must be an integer, not 'any'"),
        (["model.keras", "out", "--runs", "-1"], "argument --runs"),
        (["model.keras", "out", "--tolerance", "nan"], "argument --tolerance: must be a positive number"),
        (["model.keras", "out.onnx", "--format", "saved_model"], "argument --format: OUT is an .onnx file"),
    ],
)
def test_wrong_usage(arguments, message, run):
    status, results, messages = run(*arguments)
    assert (status, results) == (2, "") and re.search(message, messages)


def test_as_a_module(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["__main__.py", "--help"])
    with pytest.raises(SystemExit) as done:
        runpy.run_module("keras_proxynorm.export", run_name="__main__")
    assert done.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: keras-proxynorm-export") and "examples:" in text


def test_size_counts_the_files_of_the_weights(tmp_path):
    import numpy as np
    import onnx
    from onnx import helper, numpy_helper

    values = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 1000]) for name in "xy"]
    weights = [numpy_helper.from_array(np.ones((1, 1000), "float32"), "w")]
    graph = helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"])], "graph", values[:1], values[1:], weights)
    onnx.save(helper.make_model(graph), tmp_path / "model.onnx", save_as_external_data=True, location="weights")
    (tmp_path / "other").write_bytes(b"0" * 9000)
    size = (tmp_path / "model.onnx").stat().st_size + (tmp_path / "weights").stat().st_size
    assert command_line._size(tmp_path / "model.onnx") == size > 4000
    assert command_line._size(tmp_path) == size + 9000
