"""Folded SavedModels: for TensorFlow's own tools, without variables, and with all that else belongs to them."""

import pathlib
import re
import subprocess
import sys

import keras
import numpy as np
import pytest
from backends import tensorflow_only
from keras import layers
from layers.samples import normal, randomize

import keras_proxynorm as kp
from keras_proxynorm.export import export_saved_model, fold, saved_model

pytestmark = tensorflow_only


def network(activation="silu"):
    image = keras.Input((8, 8, 3), name="image")
    x = layers.BatchNormalization()(layers.Conv2D(8, 3, padding="same", use_bias=False)(image))
    x = kp.GroupNormProxy(groups=4, activation=activation)(x)
    x = layers.ZeroPadding2D(1)(layers.Conv2D(8, 3)(x))
    x = layers.MaxPooling2D(2)(layers.Conv2D(8, 1)(kp.LayerNormProxy(activation="relu")(x)))
    x = layers.GlobalAveragePooling2D()(layers.GroupNormalization(4)(x))
    return randomize(keras.Model(image, layers.Dense(5, name="logits")(x)))


def load(path):
    import tensorflow as tf

    return tf.saved_model.load(path)


def run(path, x, signature="serving_default"):
    import tensorflow as tf

    (output,) = load(path).signatures[signature](image=tf.constant(x)).values()
    return output.numpy()


def assert_equal(received, expected, tolerance=1e-5):
    expected = np.asarray(expected)
    assert expected.std() > 0.01
    np.testing.assert_allclose(received, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def meta_graph(path):
    from tensorflow.core.protobuf.saved_model_pb2 import SavedModel

    (graph,) = SavedModel.FromString((path / "saved_model.pb").read_bytes()).meta_graphs
    return graph


def operations(path):
    """The operations of all functions in it."""
    graph = meta_graph(path).graph_def
    nodes = [*graph.node, *(node for function in graph.library.function for node in function.node_def)]
    return {node.op for node in nodes}


VARIABLES = {"ReadVariableOp", "VarHandleOp", "AssignVariableOp"}


def has_variables(path):
    """Whether anything is read from, or stored in, the files of variables."""
    nodes = {node.WhichOneof("kind") for node in meta_graph(path).object_graph_def.nodes}
    return "variable" in nodes


def command_line(*arguments):
    script = pathlib.Path(sys.executable).with_name("saved_model_cli")
    start = [script] if script.exists() else [sys.executable, "-m", "tensorflow.python.tools.saved_model_cli"]
    done = subprocess.run([*map(str, [*start, *arguments])], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_command_line_show(tmp_path):
    path = export_saved_model(network(), tmp_path)
    text = command_line("show", "--dir", path, "--all")
    assert "MetaGraphDef with tag-set: 'serve'" in text
    (signature,) = re.findall(r"signature_def\['serving_default'\]:(.*?)Method name", text, re.DOTALL)
    (inputs, outputs) = signature.split("The given SavedModel SignatureDef contains the following output(s):")
    assert "inputs['image'] tensor_info:" in inputs and "shape: (1, 8, 8, 3)" in inputs and "DT_FLOAT" in inputs
    assert "outputs['logits'] tensor_info:" in outputs and "shape: (1, 5)" in outputs


@pytest.mark.parametrize("how", ["inputs", "input_exprs"])
def test_command_line_run(how, tmp_path):
    model = network()
    path = export_saved_model(model, tmp_path / "model")
    x = normal(1, 8, 8, 3)
    if how == "inputs":
        np.save(tmp_path / "x.npy", x)
        inputs = ["--inputs", f"image={tmp_path / 'x.npy'}"]
    else:
        x = x.round(3)
        inputs = ["--input_exprs", f"image={x.tolist()}"]
    arguments = ["--dir", path, "--tag_set", "serve", "--signature_def", "serving_default", *inputs]
    command_line("run", *arguments, "--outdir", tmp_path / "out")
    assert_equal(np.load(tmp_path / "out" / "logits.npy"), model(x))


@pytest.mark.parametrize("batch_size", [1, 2, None])
def test_no_variables(batch_size, tmp_path):
    model = network()
    path = export_saved_model(model, tmp_path, batch_size=batch_size)
    assert not has_variables(path) and not VARIABLES & operations(path)
    variables = sum(file.stat().st_size for file in (path / "variables").glob("variables.data-*"))
    assert variables < 1000
    x = normal(batch_size or 3, 8, 8, 3)
    assert_equal(run(path, x), model(x))


def test_without_folding(tmp_path):
    model = network()
    path = export_saved_model(model, tmp_path, fold=False)
    assert has_variables(path) and "ReadVariableOp" in operations(path)
    x = normal(1, 8, 8, 3)
    assert_equal(run(path, x), model(x))
    # The moments of the proxies are not constants in it, but nothing is missing.
    assert len(load(path).variables) == len(model.variables)


def test_large_models_keep_their_variables(tmp_path, monkeypatch):
    monkeypatch.setattr(saved_model, "_LARGEST_GRAPH", 1000)
    model = network()
    path = export_saved_model(model, tmp_path)
    assert has_variables(path) and "ReadVariableOp" in operations(path)
    x = normal(1, 8, 8, 3)
    assert_equal(run(path, x), model(x))
    # Those of the folded model.
    assert {tuple(variable.shape) for variable in load(path).variables} == {
        tuple(variable.shape) for variable in fold(model).variables
    }


def test_the_limit_counts_each_signature(tmp_path, monkeypatch):
    model = network()
    size = sum(weight.nbytes for weight in fold(model).get_weights())
    monkeypatch.setattr(saved_model, "_LARGEST_GRAPH", 1.5 * size)
    assert not has_variables(export_saved_model(model, tmp_path / "one"))
    assert has_variables(export_saved_model(model, tmp_path / "two", xla_signature=True))


@pytest.mark.parametrize("folded", [True, False])
@pytest.mark.parametrize("large", [True, False])
def test_xla_signature(folded, large, tmp_path, monkeypatch):
    if large:
        monkeypatch.setattr(saved_model, "_LARGEST_GRAPH", 1000)
    model = network()
    path = export_saved_model(model, tmp_path, fold=folded, xla_signature=True)
    signatures = load(path).signatures
    assert {"serving_default", "serving_xla"} <= set(signatures)
    x = normal(1, 8, 8, 3)
    for name in ("serving_default", "serving_xla"):
        assert_equal(run(path, x, name), model(x))
        specs = signatures[name].structured_input_signature[1]
        assert {key: tuple(spec.shape) for key, spec in specs.items()} == {"image": (1, 8, 8, 3)}
    attributes = [
        node.attr["_XlaMustCompile"].b
        for function in meta_graph(path).graph_def.library.function
        for node in function.node_def
        if "_XlaMustCompile" in node.attr
    ]
    compiled = [function.attr["_XlaMustCompile"].b for function in meta_graph(path).graph_def.library.function]
    assert any([*attributes, *compiled])


def test_no_xla_signature(tmp_path):
    assert set(load(export_saved_model(network(), tmp_path)).signatures) == {"serving_default", "serve"}


@pytest.mark.parametrize("activation", ["relu", "gelu", "hard_silu", "tanh", None])
def test_activations(activation, tmp_path):
    model = network(activation)
    x = normal(1, 8, 8, 3)
    assert_equal(run(export_saved_model(model, tmp_path), x), model(x))


def requests(path):
    import tensorflow as tf

    prediction_log_pb2 = pytest.importorskip("tensorflow_serving.apis.prediction_log_pb2")
    file = path / "assets.extra" / "tf_serving_warmup_requests"
    records = tf.data.TFRecordDataset(str(file)).as_numpy_iterator()
    return [prediction_log_pb2.PredictionLog.FromString(record).predict_log.request for record in records]


@pytest.mark.parametrize("batch_size", [1, 3, None])
def test_warm_up(batch_size, tmp_path):
    import tensorflow as tf

    path = export_saved_model(network(), tmp_path, batch_size=batch_size)
    (request,) = requests(path)
    serve = load(path).signatures[request.model_spec.signature_name]
    inputs = {name: tf.constant(tf.make_ndarray(proto)) for name, proto in request.inputs.items()}
    assert inputs["image"].shape == (batch_size or 1, 8, 8, 3)
    assert np.isfinite(serve(**inputs)["logits"]).all()


def test_no_warm_up(tmp_path):
    path = export_saved_model(network(), tmp_path, warmup=False)
    assert not (path / "assets.extra").exists()


def lookup():
    word = keras.Input((2,), dtype="string", name="word")
    x = layers.StringLookup(vocabulary=["a", "b", "c"])(word)
    x = kp.LayerNormProxy(activation="silu")(layers.Embedding(4, 8)(x))
    return randomize(keras.Model(word, layers.Dense(3, name="logits")(layers.Flatten()(x))))


def test_string_lookup(tmp_path):
    import tensorflow as tf

    model, words = lookup(), tf.constant([["b", "c"]])
    path = export_saved_model(model, tmp_path)
    serve = load(path).signatures["serving_default"]
    assert_equal(serve(word=words)["logits"].numpy(), model(words))
    (request,) = requests(path)
    assert tf.make_ndarray(request.inputs["word"]).tolist() == [[b"", b""]]
    assert np.isfinite(serve(word=tf.constant(tf.make_ndarray(request.inputs["word"])))["logits"]).all()


@pytest.mark.parametrize("large", [True, False])
def test_as_a_keras_layer(large, tmp_path, monkeypatch):
    if large:
        monkeypatch.setattr(saved_model, "_LARGEST_GRAPH", 1000)
    model, x = network(), normal(2, 8, 8, 3)
    path = export_saved_model(model, tmp_path, batch_size=None)
    layer = layers.TFSMLayer(path, call_endpoint="serve")
    assert_equal(layer(x)["logits"] if isinstance(layer(x), dict) else layer(x), model(x))
    image = keras.Input((8, 8, 3))
    layer = layers.TFSMLayer(path, call_endpoint="serving_default")
    assert_equal(keras.Model(image, layer(image))(x)["logits"], model(x))


def test_a_model_that_cannot_be_folded(tmp_path):
    class Twice(keras.Model):
        def __init__(self):
            super().__init__()
            self.norm = kp.GroupNormProxy(groups=2, activation="silu")

        def call(self, image):
            return {"logits": self.norm(self.norm(image))}

    model, x = Twice(), normal(1, 8, 8, 4)
    model(x)
    randomize(model)
    with pytest.warns(UserWarning, match="without folding.*fold=False.*Twice"):
        path = export_saved_model(model, tmp_path, input_shape=(8, 8, 4))
    assert not has_variables(path)
    assert_equal(run(path, x), model(x)["logits"])


@pytest.mark.parametrize("policy, tolerance", [("mixed_float16", 4e-3), ("mixed_bfloat16", 3e-2)])
def test_mixed_precision(policy, tolerance, tmp_path):
    keras.config.set_dtype_policy(policy)
    model, x = network(), normal(1, 8, 8, 3)
    received = run(export_saved_model(model, tmp_path), x)
    expected = np.asarray(model(x)).astype("float32")
    assert_equal(received.astype("float32"), expected, tolerance)


@pytest.mark.verified
@pytest.mark.parametrize("arguments", [{}, {"xla_signature": True, "batch_size": None}])
def test_verified(arguments, tmp_path):
    model, x = network(), normal(1, 8, 8, 3)
    assert_equal(run(export_saved_model(model, tmp_path, **arguments), x), model(x))
