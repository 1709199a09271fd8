"""Artefacts that are right pass, whatever the input; those that were tampered with in any way are refused."""

import functools
import importlib.util
import sys
import warnings

import keras
import numpy as np
import pytest
from backends import BACKEND, tensorflow_only
from keras import layers
from layers.samples import randomize

import keras_proxynorm as kp
from keras_proxynorm.export import export_onnx, export_saved_model
from keras_proxynorm.export import verification as verification_module
from keras_proxynorm.export.verification import (
    CannotLoadError,
    Verification,
    VerificationError,
    artefact_inputs,
    fitting_runtimes,
    verify,
)

ORT = ["onnxruntime"]
SETS = ["normal", "pixel", "zero", "constant", "offset", "tiny"]


def network(units=5, input_name="image", output_name="logits"):
    image = keras.Input((8, 8, 3), name=input_name)
    x = kp.GroupNormProxy(groups=4)(layers.Conv2D(8, 3, padding="same", use_bias=False)(image))
    return randomize(keras.Model(image, layers.Dense(units, name=output_name)(layers.GlobalAveragePooling2D()(x))))


@pytest.fixture(scope="module")
def model():
    keras.utils.set_random_seed(0)
    return network()


@pytest.fixture(scope="module")
def onnx_file(model, tmp_path_factory):
    pytest.importorskip("onnxruntime")
    return export_onnx(model, tmp_path_factory.mktemp("onnx") / "model", batch_size=None)


@pytest.fixture
def tampered(onnx_file, tmp_path):
    """Writes the ONNX file with its graph changed by a function."""
    import onnx

    def write(change):
        proto = onnx.load(onnx_file)
        change(proto.graph)
        onnx.save(proto, tmp_path / "tampered.onnx")
        return tmp_path / "tampered.onnx"

    return write


def weight(graph, change):
    """Changes the kernel of the convolution."""
    from onnx import numpy_helper

    (kernel,) = [tensor for tensor in graph.initializer if list(tensor.dims) == [8, 3, 3, 3]]
    kernel.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(kernel)), kernel.name))


@tensorflow_only
def test_onnx(model, onnx_file):
    before = model.get_weights()
    verification = verify(model, onnx_file)
    assert list(verification.worst) == fitting_runtimes(onnx_file)
    for runtime, worst in verification.worst.items():
        cases = [(c.batch_size, c.inputs) for c in verification.comparisons if c.runtime == runtime]
        assert cases == [(size, name) for size in (1, 3) for name in SETS]
        assert worst.relative == max(c.relative for c in verification.comparisons if c.runtime == runtime) < 1e-4
        assert f"{runtime}: relative difference {worst.relative:.1e}" in str(verification)
    assert len(str(verification).splitlines()) == len(verification.worst)
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


@tensorflow_only
def test_saved_model(model, tmp_path):
    path = export_saved_model(model, tmp_path, batch_size=2)
    verification = verify(model, path)
    assert [(c.runtime, c.batch_size, c.inputs) for c in verification.comparisons] == [
        ("tensorflow", 2, name) for name in SETS
    ]
    keras.utils.set_random_seed(1)
    other = network()
    with pytest.raises(VerificationError, match="tensorflow: relative difference .* output 'logits'"):
        verify(other, path)


@tensorflow_only
@pytest.mark.parametrize("case", ["lists", "repeated_output", "open_sizes_of_two", "subclassed"], indirect=True)
def test_inputs_and_outputs(case, tmp_path):
    pytest.importorskip("onnxruntime")
    path = export_onnx(case.model, tmp_path / "model.onnx", **case.arguments)
    # What the artefact says need not be said again, except how a subclassed model wants it.
    arguments = case.arguments if case.model.__class__.__name__ == "Subclassed" else {}
    verification = verify(case.model, path, runtimes=ORT, **arguments)
    assert {c.output for c in verification.comparisons} == set(case.call(case.model, case.inputs(1)))


@pytest.mark.slow
@tensorflow_only
def test_every_case(case, tmp_path):
    for path in (
        export_onnx(case.model, tmp_path / "model.onnx", batch_size=None, **case.arguments),
        export_saved_model(case.model, tmp_path / "model", **case.arguments),
    ):
        comparisons = verify(case.model, path, **case.arguments).comparisons
        # Where a normalization reads the input itself, the last place of large numbers makes more than that.
        assert all(c.relative < (1e-2 if c.inputs in ("constant", "offset") else 1e-4) for c in comparisons)


@pytest.mark.slow
@tensorflow_only
@pytest.mark.parametrize("make", [keras.applications.MobileNetV2, keras.applications.DenseNet121])
def test_deep_networks(make, tmp_path):
    source = make(input_shape=(64, 64, 3), weights=None, classes=10)
    model = randomize(kp.replace_normalization(source))
    path = export_onnx(model, tmp_path / "model.onnx")
    assert all(c.relative < 2e-4 for c in verify(model, path).comparisons)

    import onnx
    from onnx import numpy_helper

    proto = onnx.load(path)
    convolutions = [node for node in proto.graph.node if node.op_type == "Conv"]
    name = convolutions[len(convolutions) // 2].input[1]
    (kernel,) = [tensor for tensor in proto.graph.initializer if tensor.name == name]
    value = numpy_helper.to_array(kernel).copy()
    # 1 % of a filter in the middle is less than the rounding of so deep a network.
    value[0] *= 1.1
    kernel.CopyFrom(numpy_helper.from_array(value, name))
    onnx.save(proto, path)
    with pytest.raises(VerificationError):
        verify(model, path)


@tensorflow_only
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: np.float32(1.01) * x + np.float32(1e-3), "for .* of 12 outputs .*onnxruntime: .* output 'logits'"),
        (lambda x: np.float32(np.nan) * x, "for 12 of 12 outputs .*relative difference inf"),
        (lambda x: np.float32(np.inf) * np.abs(x), "relative difference inf"),
    ],
    ids=["wrong", "nan", "inf"],
)
def test_changed_weights(change, message, model, tampered):
    with pytest.raises(VerificationError, match=f"(?s){message}"):
        verify(model, tampered(lambda graph: weight(graph, change)), runtimes=ORT)


@tensorflow_only
def test_tolerance(model, tampered):
    path = tampered(lambda graph: weight(graph, lambda x: x + np.float32(1e-3)))
    with pytest.raises(VerificationError):
        verify(model, path, runtimes=ORT)
    assert verify(model, path, runtimes=ORT, tolerance=1).worst["onnxruntime"].relative > 1e-4


@tensorflow_only
def test_outputs_of_another_form(onnx_file):
    with pytest.raises(VerificationError, match=r"outputs of `model`, \['scores'\]\. .*onnxruntime: \['logits'\]"):
        verify(network(output_name="scores"), onnx_file, runtimes=ORT)
    with pytest.raises(VerificationError, match=r"'logits' with shape \(1, 4\).*onnxruntime: \(1, 5\)"):
        verify(network(units=4), onnx_file, runtimes=ORT)
    image = keras.Input((8, 8, 3), name="image")
    doubles = layers.Dense(5, name="logits", dtype="float64")(layers.GlobalAveragePooling2D()(image))
    with pytest.raises(VerificationError, match=r"dtype float64.*float32"):
        verify(keras.Model(image, doubles), onnx_file, runtimes=ORT)


@tensorflow_only
def test_inputs_of_another_form(onnx_file):
    message = r"`model`, picture: float32 \(None, 8, 8, 3\)\. Received: image: float32 \(None, 8, 8, 3\)"
    with pytest.raises(VerificationError, match=message):
        verify(network(input_name="picture"), onnx_file, runtimes=ORT)


@tensorflow_only
def test_process_that_fails(model, tampered):
    def unknown_operator(graph):
        graph.node[0].op_type = "Unknown"

    with pytest.raises(VerificationError, match="(?s)^onnxruntime cannot load the artefact. Received:.*Unknown"):
        verify(model, tampered(unknown_operator), runtimes=ORT)


def fake_runtime(monkeypatch, runtime, failure):
    """Makes one runtime fail in its own way."""
    run = verification_module.run_in_fresh_process

    def run_or_fail(path, name, calls, **options):
        if name == runtime:
            raise failure
        return run(path, name, calls, **options)

    monkeypatch.setattr(verification_module, "run_in_fresh_process", run_or_fail)


@tensorflow_only
def test_one_of_two_runtimes_cannot_load_it(model, onnx_file, monkeypatch):
    pytest.importorskip("openvino")
    fake_runtime(monkeypatch, "openvino", CannotLoadError("openvino cannot load the artefact."))
    with pytest.warns(UserWarning, match="^onnxruntime computes what the model does, but openvino cannot load"):
        assert list(verify(model, onnx_file).worst) == ORT
    with pytest.raises(CannotLoadError, match="openvino cannot load"):
        verify(model, onnx_file, runtimes=["onnxruntime", "openvino"])
    with pytest.raises(VerificationError, match="onnxruntime: relative difference"):
        keras.utils.set_random_seed(5)
        verify(network(), onnx_file)


@tensorflow_only
def test_no_runtime_can_load_it(model, tampered):
    def unknown_operator(graph):
        graph.node[0].op_type = "Unknown"

    with pytest.raises(CannotLoadError, match="(?s)^onnxruntime cannot load the artefact.*Unknown"):
        verify(model, tampered(unknown_operator))


@tensorflow_only
def test_one_of_two_runtimes_fails_later(model, onnx_file, monkeypatch):
    pytest.importorskip("openvino")
    fake_runtime(monkeypatch, "openvino", VerificationError("The artefact must run in openvino."))
    with pytest.raises(VerificationError, match="must run in openvino"):
        verify(model, onnx_file)


def text_recognition(recurrent):
    image = keras.Input((16, 32, 1), name="image")
    x = layers.ReLU()(layers.BatchNormalization()(layers.Conv2D(8, 3, padding="same", use_bias=False)(image)))
    x = layers.Reshape((16, 64))(layers.Permute((2, 1, 3))(layers.MaxPooling2D()(x)))
    return keras.Model(image, layers.Dense(11, activation="softmax", name="chars")(recurrent(x)))


RECURRENT = {
    "lstm": lambda x: layers.Bidirectional(layers.LSTM(4, return_sequences=True))(x),
    "gru": lambda x: layers.GRU(4, return_sequences=True)(x),
}


@tensorflow_only
@pytest.mark.verified
@pytest.mark.parametrize("name, batch_size", [("lstm", 1), ("lstm", None), ("gru", None)])
def test_recurrent_layers(name, batch_size, tmp_path):
    pytest.importorskip("onnxruntime")
    openvino = pytest.importorskip("openvino")
    model = kp.replace_normalization(text_recognition(RECURRENT[name]), compensate=True)
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        path = export_onnx(model, tmp_path / "model.onnx", batch_size=batch_size)
    messages = [str(warning.message) for warning in given if "cannot load" in str(warning.message)]
    try:
        openvino.Core().read_model(path)
    except Exception:  # whatever OpenVINO raises
        (message,) = messages
        assert "openvino cannot load" in message and "The reason may be recurrent layers (Loop)" in message
        only = functools.partial(verify, runtimes=["openvino"])
        with pytest.raises(CannotLoadError, match="openvino cannot load.*recurrent layers"):
            export_onnx(model, tmp_path / "other.onnx", batch_size=batch_size, verify=only)
        assert not (tmp_path / "other.onnx").exists()
    else:
        assert messages == []
    export_saved_model(model, tmp_path / "model", batch_size=batch_size)


@tensorflow_only
@pytest.mark.skipif(sys.platform == "win32", reason="a script of the shell")
def test_process_that_dies(model, onnx_file, tmp_path, monkeypatch):
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho last words >&2\nkill -9 $$\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    with pytest.raises(VerificationError, match="(?s)exit status -9 .*last words"):
        verify(model, onnx_file, runtimes=ORT)


@tensorflow_only
def test_runtimes(onnx_file, tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    missing = {"openvino"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in missing else find_spec(name))
    assert fitting_runtimes(onnx_file) == ORT
    assert fitting_runtimes(tmp_path) == ["tensorflow"]
    with pytest.raises(ImportError, match="pip install openvino"):
        fitting_runtimes(onnx_file, ["onnxruntime", "openvino"])
    missing.add("onnxruntime")
    with pytest.raises(ImportError, match="verify=False.*pip install onnxruntime$"):
        fitting_runtimes(onnx_file)
    for runtimes in ("onnxruntime", [], ["tensorflow"], 3):
        with pytest.raises(ValueError, match="`runtimes` must.*'onnxruntime', 'openvino'.*Received: runtimes="):
            fitting_runtimes(onnx_file, runtimes)


@tensorflow_only
@pytest.mark.parametrize("tolerance", [0, -1.0, float("nan"), float("inf"), "1e-4", True])
def test_tolerance_that_is_none(tolerance, model, onnx_file):
    with pytest.raises(ValueError, match="`tolerance` must.*Received: tolerance="):
        verify(model, onnx_file, tolerance=tolerance)


def test_paths_that_are_no_artefacts(tmp_path):
    (tmp_path / "text.onnx").write_text("no")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "saved_model.pb").write_text("no")
    for path in (tmp_path, tmp_path / "bad", tmp_path / "none.onnx", tmp_path / "text.onnx"):
        with pytest.raises(ValueError, match="`path` must be the directory of a SavedModel's version.*Received: path="):
            artefact_inputs(path)


@tensorflow_only
def test_a_saved_model_without_the_signature(tmp_path):
    import tensorflow as tf

    tf.saved_model.save(tf.Module(), tmp_path)
    with pytest.raises(
        ValueError, match=r"`path` must be .* with the signatures \['__saved_model_init_op'\]\)\. Received"
    ):
        artefact_inputs(tmp_path)


def test_an_onnx_file_with_an_input_that_is_no_tensor(tmp_path):
    from onnx import TensorProto, helper, save

    sequence = helper.make_tensor_sequence_value_info("many", TensorProto.FLOAT, None)
    output = helper.make_tensor_value_info("count", TensorProto.INT64, [])
    node = helper.make_node("SequenceLength", ["many"], ["count"])
    save(helper.make_model(helper.make_graph([node], "graph", [sequence], [output])), tmp_path / "model.onnx")
    with pytest.raises(ValueError, match=r"`path` must be .*\(its input 'many' is no tensor\)"):
        artefact_inputs(tmp_path / "model.onnx")


@tensorflow_only
def test_a_fault_of_ours_is_not_one_of_the_path(onnx_file, monkeypatch):
    def fault(path):
        raise KeyError("fault")

    monkeypatch.setattr(verification_module, "_onnx_graph", fault)
    with pytest.raises(KeyError, match="fault"):
        artefact_inputs(onnx_file)


@tensorflow_only
def test_ids(tmp_path):
    pytest.importorskip("onnxruntime")
    ids, mask = keras.Input((6,), dtype="int32", name="ids"), keras.Input((6, 1), dtype="bool", name="mask")
    x = layers.Embedding(4, 8)(ids) * keras.ops.cast(mask, "float32")
    model = keras.Model([ids, mask], kp.LayerNormProxy(name="features")(x))
    path = export_onnx(model, tmp_path / "model.onnx")
    # Ids that the embedding does not have are left out.
    sets = {c.inputs for c in verify(model, path, runtimes=ORT).comparisons}
    assert sets == {"normal", "zero", "constant", "tiny"}


@tensorflow_only
def test_bytes(tmp_path):
    pytest.importorskip("onnxruntime")
    image = keras.Input((4, 4, 3), dtype="uint8", name="image")
    model = keras.Model(image, layers.Dense(3, name="logits")(layers.Rescaling(1 / 255)(image)))
    verify(model, export_onnx(model, tmp_path / "model.onnx"), runtimes=ORT)


@tensorflow_only
def test_strings(model, tmp_path):
    import tensorflow as tf

    from keras_proxynorm.export.verification import _draw

    with pytest.raises(ValueError, match="floats, integers or booleans.*Received: input 'words' of string"):
        _draw("normal", tf.TensorSpec((1, 3), "string", "words"), (1, 3), np.random.default_rng(0))


@tensorflow_only
def test_output_that_is_all_zero(tmp_path):
    pytest.importorskip("onnxruntime")
    x = keras.Input((4,), name="x")
    model = keras.Model(x, layers.Dense(2, kernel_initializer="zeros", name="y")(x))
    path = export_onnx(model, tmp_path / "model.onnx")
    assert verify(model, path, runtimes=ORT).worst["onnxruntime"].relative == 0
    other = keras.Model(x, layers.Dense(2, kernel_initializer="ones", name="y")(x))
    path = export_onnx(other, tmp_path / "other.onnx")
    with pytest.raises(VerificationError, match="5 of 6 outputs.*\n.*relative difference inf"):
        verify(model, path, runtimes=ORT)


@tensorflow_only
def test_output_that_is_only_rounding(tmp_path):
    pytest.importorskip("onnxruntime")
    x = keras.Input((999,), name="x")
    centered = layers.Lambda(lambda x: x - keras.ops.mean(x, axis=-1, keepdims=True), name="y")
    model = keras.Model(x, centered(x))
    verification = verify(model, export_onnx(model, tmp_path / "model.onnx"), runtimes=ORT)
    # Of the constant 100 nothing should be left; of 1e4 a thousandth of a per cent is rounding.
    allowed = {c.inputs: c.allowed for c in verification.comparisons}
    scale = {c.inputs: c.scale for c in verification.comparisons}
    assert 1e-5 < allowed["constant"] < 1e-3 and scale["constant"] < 1e-3
    assert 1e-3 < allowed["offset"] < 1e-1 and scale["offset"] > 1
    assert allowed["normal"] == pytest.approx(1e-4 * scale["normal"])


@tensorflow_only
def test_outputs_that_are_not_finite(tmp_path):
    pytest.importorskip("onnxruntime")
    x = keras.Input((8,), name="x")
    model = keras.Model(x, layers.Lambda(keras.ops.log, name="y")(x))
    path = export_onnx(model, tmp_path / "model.onnx")
    # Of negative numbers the logarithm is NaN here and there, and only the others are compared.
    verify(model, path, runtimes=ORT)
    nothing = keras.Model(x, layers.Lambda(lambda x: keras.ops.log(-1 - x * x), name="y")(x))
    with pytest.raises(ValueError, match="`model` must give finite numbers. Received: output 'y'"):
        verify(nothing, path, runtimes=ORT)


@tensorflow_only
def test_half_precision(tmp_path):
    pytest.importorskip("onnxruntime")
    keras.config.set_dtype_policy("mixed_float16")
    x = keras.Input((16,), name="x")
    model = keras.Model(x, layers.Dense(4, name="y")(layers.Dense(32, activation="tanh")(x)))
    verification = verify(model, export_onnx(model, tmp_path / "model.onnx"), runtimes=ORT)
    normal = verification.comparisons[0]
    assert normal.inputs == "normal" and 1e-3 < normal.allowed / normal.scale < 1e-1


@pytest.mark.slow
@tensorflow_only
def test_bfloat16(tmp_path):
    keras.config.set_dtype_policy("mixed_bfloat16")
    x = keras.Input((16,), name="x")
    model = keras.Model(x, layers.Dense(4, name="y")(layers.Dense(32, activation="tanh")(x)))
    verify(model, export_saved_model(model, tmp_path))


def test_as_text():
    assert str(Verification(())) == ""


@pytest.mark.skipif(BACKEND == "tensorflow", reason="about the other backends")
def test_other_backend(tmp_path):
    from onnx import TensorProto, helper

    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "graph", values[:1], values[1:])
    (tmp_path / "model.onnx").write_bytes(helper.make_model(graph).SerializeToString())
    model = keras.Sequential([keras.Input((4,), name="x"), keras.layers.ReLU(name="y")])
    with pytest.raises(RuntimeError, match=rf"KERAS_BACKEND=tensorflow.*'{BACKEND}'"):
        verify(model, tmp_path / "model.onnx")
