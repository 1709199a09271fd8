"""Names and shapes of what is exported, and a clear error for every model and argument that leaves them open."""

import subprocess
import sys

import keras
import numpy as np
import pytest
from backends import BACKEND, tensorflow_only

import keras_proxynorm as kp
from keras_proxynorm.export import export_onnx, export_saved_model
from keras_proxynorm.export.serving_function import serving_function


def signature(model, batch_size=1, input_shape=None):
    _, specs = serving_function(model, batch_size, input_shape)
    return [(spec.name, tuple(spec.shape), spec.dtype.name) for spec in specs]


def open_model(*names):
    inputs = [keras.Input((None, None, 3), name=name) for name in names]
    return keras.Model(inputs, [kp.LayerNormProxy()(x) for x in inputs])


def fixed_model(name):
    x = keras.Input((8, 4), name=name)
    return keras.Model(x, kp.LayerNormProxy()(x))


class ListModel(keras.Model):
    def call(self, images, training=False):
        return [images[0] * 2.0, images[1] + 1.0]


class DictModel(keras.Model):
    def call(self, images):
        return images["b"] - images["a"]


class TwoArguments(keras.Model):
    def call(self, a, b, training=False):
        return a + b


def called(model, *inputs):
    model(*inputs)
    return model


X = np.ones((2, 4), "float32")


@tensorflow_only
@pytest.mark.parametrize("export", [export_onnx, export_saved_model])
@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (lambda: "model", {}, r"`model` must be a keras\.Model\. Received: model='model'"),
        (lambda: keras.layers.Dense(2), {}, "`model` must be a keras.Model"),
        (lambda: keras.Sequential([keras.layers.Dense(2)]), {}, "`model` must be built.*call it.*keras.Input"),
        (DictModel, {"input_shape": (4,)}, "`model` must be built.*call it"),
        (lambda: open_model("x"), {"batch_size": 0}, "`batch_size` .*Received: batch_size=0"),
        (lambda: open_model("x"), {"batch_size": True}, "`batch_size`"),
        (lambda: open_model("x"), {"batch_size": 2.0}, "`batch_size`"),
        (
            lambda: open_model("x"),
            {},
            r"`input_shape` must.*input 'x'.*\(224, 224, 3\), or .*open, too: \(None, None, 3\)\. Received: .*=None",
        ),
        (lambda: open_model("x", "y"), {}, r"`input_shape` must.*input 'x'.*each of \['x', 'y'\]"),
        (lambda: open_model("x"), {"input_shape": (8, 3)}, r"`input_shape` must agree.*'x'.*Received: .*\(8, 3\)"),
        (lambda: open_model("x"), {"input_shape": (8, 8, 4)}, "`input_shape` must agree.*'x'"),
        (lambda: open_model("x"), {"input_shape": (1, 8, 8, 3)}, "`input_shape` must agree.*'x'"),
        (lambda: open_model("x"), {"input_shape": (8, None)}, "`input_shape` must agree.*'x'"),
        (lambda: fixed_model("x"), {"input_shape": (None, 4)}, "`input_shape` must agree.*'x'"),
        (lambda: open_model("x"), {"input_shape": (8, 0, 3)}, "`input_shape` must be"),
        (lambda: open_model("x"), {"input_shape": 8}, "`input_shape` must be"),
        (lambda: open_model("x"), {"input_shape": "8"}, "`input_shape` must be"),
        (lambda: open_model("x", "y"), {"input_shape": (8, 8, 3)}, r"`input_shape` must be.*\['x', 'y'\]"),
        (lambda: open_model("x", "y"), {"input_shape": [(8, 8, 3)]}, "`input_shape` must be"),
        (lambda: open_model("x", "y"), {"input_shape": {"x": (8, 8, 3)}}, "`input_shape` must be"),
        (lambda: open_model("x"), {"input_shape": {"z": (8, 8, 3)}}, "`input_shape` must be"),
        (
            lambda: called(DictModel(), {"a": X, "b": X}),
            {},
            "`input_shape` must.*subclassed.*Received: input_shape=None",
        ),
        (lambda: called(DictModel(), {"a": X, "b": X}), {"input_shape": {"a": 4, "b": 4}}, "`input_shape` must be"),
        (lambda: called(ListModel(), [X, X]), {"input_shape": "no"}, "`input_shape` must be"),
        (lambda: called(ListModel(), [X, X]), {"input_shape": 4}, "`input_shape` must be"),
        (lambda: called(ListModel(), [X, X]), {"input_shape": [(4,), 4]}, "`input_shape` must be"),
        (lambda: called(TwoArguments(), X, X), {"input_shape": (4,)}, "`model` must take.*one argument.*keras.Model"),
    ],
)
def test_errors(export, model, arguments, message, tmp_path, files):
    with pytest.raises(ValueError, match=message):
        export(model(), tmp_path / "new" / "model", **arguments)
    assert files() == []


@tensorflow_only
def test_batch_size_that_the_model_fixes(tmp_path):
    x = keras.Input((4,), batch_size=8, name="x")
    model = keras.Model(x, keras.layers.Dense(2)(x))
    with pytest.raises(ValueError, match="`batch_size` must be 8.*'x'.*Received: batch_size=1"):
        serving_function(model, 1, None)
    assert signature(model, 8) == [("x", (8, 4), "float32")]


@tensorflow_only
def test_names_that_tensorflow_cannot_have():
    x = keras.Input((4,), name="the input")
    with pytest.raises(ValueError, match="name='the input'"):
        serving_function(keras.Model(x, keras.layers.Dense(2)(x)), 1, None)


@tensorflow_only
@pytest.mark.parametrize("name", ["b.in", "1st", "dash-ed", "UPPER"])
def test_odd_names_survive(name, tmp_path):
    import onnx
    import tensorflow as tf

    x = keras.Input((4,), name=name)
    model = keras.Model(x, {f"{name}_out": keras.layers.Dense(2)(x)})
    serve = tf.saved_model.load(export_saved_model(model, tmp_path)).signatures["serving_default"]
    assert list(serve(**{name: tf.ones((1, 4))})) == [f"{name}_out"]
    graph = onnx.load(export_onnx(model, tmp_path / "model.onnx")).graph
    assert [value.name for value in graph.input] == [name] and graph.output[0].name == f"{name}_out"


@tensorflow_only
def test_signatures():
    x, y = keras.Input((None, 4), name="x"), keras.Input((3,), dtype="int32", name="y")
    model = keras.Model([x, y], [x + 1.0, y])
    expected = [("x", (5, 7, 4), "float32"), ("y", (5, 3), "int32")]
    for input_shape in ([(7, 4), (3,)], ((7, 4), (3,)), {"y": (3,), "x": (7, 4)}, [[7, 4], [3]]):
        assert signature(model, 5, input_shape) == expected
    assert signature(model, None, [(None, 4), (3,)]) == [("x", (None, None, 4), "float32"), ("y", (None, 3), "int32")]
    assert signature(keras.Model([y], [y])) == [("y", (1, 3), "int32")]
    assert signature(keras.Model({"x": x}, x + 1.0), None, [(7, 4)]) == [("x", (None, 7, 4), "float32")]


@tensorflow_only
def test_batch_size_of_the_call_that_built_a_sequential():
    model = called(keras.Sequential([keras.layers.Dense(3)]), X)
    assert [shape for _, shape, _ in signature(model, 5)] == [(5, 4)]


@tensorflow_only
def test_outputs_of_subclassed_models():
    model = called(ListModel(), [X, X])
    serve, specs = serving_function(model, 2, [(4,), (4,)])
    assert [spec.name for spec in specs] == ["images_0", "images_1"]
    outputs = serve(X, 3 * X)
    np.testing.assert_array_equal(outputs["output"], 2 * X)
    np.testing.assert_array_equal(outputs["output_1"], 4)

    model = called(DictModel(), {"b": X, "a": X})
    serve, specs = serving_function(model, 2, {"b": (4,), "a": (4,)})
    inputs = {"a": X, "b": 5 * X}
    np.testing.assert_array_equal(serve(*(inputs[spec.name] for spec in specs))["output"], 4)


@tensorflow_only
def test_nested_outputs():
    x = keras.Input((4,), name="x")
    model = keras.Model(x, {"sums": [x + 1.0, x + 2.0], "product": 3.0 * x})
    outputs = serving_function(model, 2, None)[0](X)
    assert {name: float(value[0, 0]) for name, value in outputs.items()} == {"sums_0": 2, "sums_1": 3, "product": 3}


@tensorflow_only
def test_inference_mode():
    x = keras.Input((4,), name="x")
    model = keras.Model(x, keras.layers.Dropout(0.9, name="dropout")(x))
    np.testing.assert_array_equal(serving_function(model, 2, None)[0](X)["dropout"], X)


@pytest.mark.skipif(BACKEND == "tensorflow", reason="about the other backends")
@pytest.mark.parametrize("export", [export_onnx, export_saved_model])
def test_other_backend(export, tmp_path, files):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    with pytest.raises(RuntimeError, match=rf"model\.keras.*KERAS_BACKEND=tensorflow.*'{BACKEND}'"):
        export(model, tmp_path / "model")
    assert files() == []


def test_other_backend_in_a_fresh_process(tmp_path):
    pytest.importorskip("jax")
    script = (
        "import os; os.environ['KERAS_BACKEND'] = 'jax'\n"
        "import keras, keras_proxynorm.export as export\n"
        "model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])\n"
        "for function in (export.export_onnx, export.export_saved_model):\n"
        "    try:\n"
        "        function(model, 'model')\n"
        "    except RuntimeError as error:\n"
        "        print(error)\n"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert result.stdout.count("KERAS_BACKEND=tensorflow") == 2
    assert list(tmp_path.iterdir()) == []
