"""ONNX files are checked and run in ONNX Runtime; what cannot be converted is an error and not a file."""

import pathlib
import re
import subprocess
import sys

import keras
import numpy as np
import pytest
from backends import tensorflow_only

import keras_proxynorm as kp
from keras_proxynorm.export import export_onnx

pytestmark = tensorflow_only


def runner(path):
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(path)
    names = [output.name for output in session.get_outputs()]
    return lambda inputs: dict(zip(names, session.run(names, inputs), strict=True))


def load(path):
    import onnx

    return onnx.load(path)


def sizes(value):
    return tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in value.type.tensor_type.shape.dim)


def nodes_of_constants(proto):
    """Names of the nodes that compute something from weights alone."""
    constants = {weight.name for weight in proto.graph.initializer} | {""}
    found = []
    for node in proto.graph.node:
        if constants.issuperset(node.input):
            constants.update(node.output)
            found.append(node.name)
    return found


def test_any_batch_size(case, tmp_path):
    path = export_onnx(case.model, tmp_path / "model.onnx", batch_size=None, **case.arguments)
    run = runner(path)
    for batch_size in (1, 2, 5):
        case.check(run, batch_size)
    assert nodes_of_constants(load(path)) == []


def test_one_batch_size(case, tmp_path):
    path = export_onnx(case.model, tmp_path / "model.onnx", batch_size=3, **case.arguments)
    run = runner(path)
    case.check(run, 3)
    proto = load(path)
    assert nodes_of_constants(proto) == []
    assert {value.name: sizes(value) for value in proto.graph.input} == {
        name: (3, *shape) for name, shape in case.shapes.items()
    }
    assert all(sizes(value)[0] == 3 for value in proto.graph.output)
    with pytest.raises(Exception, match="[Dd]imension"):
        run(case.inputs(2))


def test_batch_size_defaults_to_one(small, tmp_path):
    path = export_onnx(small.model, tmp_path / "model.onnx")
    small.check(runner(path), 1)
    assert [sizes(value) for value in load(path).graph.input] == [(1, 8, 8, 3)]


def test_outputs_are_in_the_order_of_the_model(tmp_path):
    x = keras.Input((4,), name="x")
    model = keras.Model(x, [keras.layers.Dense(2, name=name)(x) for name in "hcaf"])
    proto = load(export_onnx(model, tmp_path / "model.onnx"))
    assert [value.name for value in proto.graph.output] == list("hcaf")


@pytest.mark.parametrize("activation", ["relu", "silu", "hard_silu"])
def test_no_moments_at_inference_with_many_channels(activation, tmp_path):
    # TensorFlow does not fold constants that are larger than what they are computed from; 129 nodes by 2048 are.
    x = keras.Input((2, 2, 2048), name="x")
    proto = load(export_onnx(keras.Model(x, kp.GroupNormProxy(activation=activation)(x)), tmp_path / "model.onnx"))
    assert nodes_of_constants(proto) == []
    assert sum(len(weight.raw_data) for weight in proto.graph.initializer) < 10 * 4 * 2048


@pytest.mark.parametrize("opset", [None, 13, 18])
def test_opset(small, opset, tmp_path):
    path = export_onnx(small.model, tmp_path / "model.onnx", opset=opset)
    assert [entry.version for entry in load(path).opset_import if entry.domain == ""] == [opset or 17]
    small.check(runner(path), 1)


@pytest.mark.parametrize("opset", [12, 99, 17.0, True, "17"])
def test_bad_opset(small, opset, tmp_path, files):
    with pytest.raises(ValueError, match="`opset`.*from 13 to.*Received: opset="):
        export_onnx(small.model, tmp_path / "new" / "model.onnx", opset=opset)
    assert files() == []


def test_mixed_float16(tmp_path):
    keras.config.set_dtype_policy("mixed_float16")
    image = keras.Input((4, 4, 8), name="image")
    model = keras.Model(image, kp.GroupNormProxy(groups=4, name="norm")(keras.layers.Conv2D(8, 3)(image)))
    x = np.random.default_rng(0).standard_normal((1, 4, 4, 8)).astype("float32")
    output = runner(export_onnx(model, tmp_path / "model.onnx"))({"image": x})["norm"]
    assert output.dtype == np.float32
    np.testing.assert_allclose(output, np.asarray(model(x)), atol=2e-2)


def test_what_the_checker_refuses(tmp_path, files):
    def convolve(x):
        kernel = keras.ops.ones((3, 3, 8, 8), "bfloat16")
        return keras.ops.cast(keras.ops.conv(keras.ops.cast(x, "bfloat16"), kernel), "float32")

    image = keras.Input((4, 4, 8), name="image")
    model = keras.Model(image, keras.layers.Lambda(convolve)(image))
    with pytest.raises(ValueError, match=r"`model`.* ONNX of opset 17.*bfloat16"):
        export_onnx(model, tmp_path / "model.onnx")
    assert files() == []


def without_native_notes(text):
    """What TensorFlow's C++ notes itself is for TF_CPP_MIN_LOG_LEVEL to silence, before the process starts."""
    return re.sub(r"^(I\d{4}|WARNING: All log messages before absl).*\n?", "", text, flags=re.MULTILINE)


def test_unsupported_operation(tmp_path, files, capfd):
    x = keras.Input((4,), name="x")
    model = keras.Model(x, keras.layers.Lambda(keras.ops.erfinv, name="odd_one")(x))
    with pytest.raises(ValueError, match=r"(?s)`model`.*export_saved_model.*from tf2onnx.*odd_one.*Erfinv"):
        export_onnx(model, tmp_path / "new" / "model.onnx")
    assert files() == []
    assert without_native_notes(capfd.readouterr().err) == ""


def test_one_name_for_input_and_output(tmp_path, files):
    x = keras.Input((4,), name="x")
    with pytest.raises(ValueError, match=r"`model`.*name='x'"):
        export_onnx(keras.Model({"x": x}, {"x": keras.layers.Dense(4)(x)}), tmp_path / "model.onnx")
    assert files() == []


def test_without_keras_and_tensorflow(small, tmp_path):
    pytest.importorskip("onnxruntime")
    path = export_onnx(small.model, tmp_path / "model.onnx", batch_size=2)
    np.savez(tmp_path / "inputs.npz", **small.inputs(2))
    script = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(('keras', 'keras_proxynorm', 'tensorflow')))\n"
        "import numpy as np, onnxruntime\n"
        "session = onnxruntime.InferenceSession(sys.argv[1])\n"
        "names = [output.name for output in session.get_outputs()]\n"
        "np.savez(sys.argv[3], **dict(zip(names, session.run(names, dict(np.load(sys.argv[2]))))))\n"
    )
    arguments = [path, tmp_path / "inputs.npz", tmp_path / "outputs.npz"]
    subprocess.run([sys.executable, "-c", script, *arguments], check=True)
    small.check(lambda inputs: dict(np.load(tmp_path / "outputs.npz")), 2)


def test_overwrite(small, tmp_path, files):
    path = tmp_path / "not" / "there" / "model.onnx"
    assert export_onnx(small.model, str(path)) == path
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match="overwrite"):
        export_onnx(small.model, path, batch_size=None)
    with pytest.raises(FileExistsError):  # before anything that takes time
        export_onnx("not looked at", path)
    assert path.read_bytes() == before
    assert export_onnx(small.model, path, batch_size=None, overwrite=True) == path
    small.check(runner(path), 4)
    assert files() == ["not", "not/there", "not/there/model.onnx"]


def write_half(proto, path, **options):
    data = proto.SerializeToString()
    pathlib.Path(path).write_bytes(data[: len(data) // 2])
    raise OSError("disk full")


def test_failure_leaves_nothing(small, tmp_path, files, monkeypatch):
    monkeypatch.setattr("onnx.save_model", write_half)
    with pytest.raises(OSError, match="disk full"):
        export_onnx(small.model, tmp_path / "new" / "model.onnx")
    assert files() == []


def test_failure_leaves_the_old_file(small, tmp_path, files, monkeypatch):
    path = export_onnx(small.model, tmp_path / "model.onnx")
    before = path.read_bytes()
    monkeypatch.setattr("onnx.save_model", write_half)
    with pytest.raises(OSError, match="disk full"):
        export_onnx(small.model, path, overwrite=True)
    assert files() == ["model.onnx"] and path.read_bytes() == before


def test_bad_path(small, tmp_path):
    with pytest.raises(ValueError, match="`path`.*directory"):
        export_onnx(small.model, tmp_path, overwrite=True)
    for path in (None, 3, "gs://bucket/model.onnx"):
        with pytest.raises(ValueError, match="Argument `path`.*Received: path="):
            export_onnx(small.model, path)


@pytest.mark.parametrize("missing", ["onnx", "tf2onnx"])
def test_missing_converter(missing, small, tmp_path, files, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    if missing == "onnx":
        # An import that succeeded earlier would hide it.
        for name in [name for name in sys.modules if name.split(".")[0] == "tf2onnx"]:
            monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match="pip install .*tf2onnx.*onnx"):
        export_onnx(small.model, tmp_path / "model.onnx")
    assert files() == []


def test_quiet(small, tmp_path, notes, capfd):
    export_onnx(small.model, tmp_path / "model.onnx")
    out, err = capfd.readouterr()
    assert notes == [] and out == "" and without_native_notes(err) == ""
