"""Mixed precision is float32 in an ONNX file, and stays what it is in a SavedModel; float64 stays float64."""

import keras
import numpy as np
import pytest
from backends import tensorflow_only
from keras import layers
from layers.samples import normal

import keras_proxynorm as kp
from keras_proxynorm.export import export_onnx, export_saved_model
from keras_proxynorm.export.precision import in_float32
from keras_proxynorm.export.verification import CannotLoadError

pytestmark = tensorflow_only

MIXED = ["mixed_bfloat16", "mixed_float16"]


def convolutional(inputs):
    x = kp.GroupNormProxy(4)(layers.Conv2D(16, 3, use_bias=False)(inputs))
    return layers.Dense(5)(layers.GlobalAveragePooling2D()(x))


def dense(inputs):
    return layers.Dense(5)(layers.BatchNormalization()(layers.Dense(8)(layers.Flatten()(inputs))))


def recurrent(inputs):
    x = layers.Bidirectional(layers.LSTM(4, return_sequences=True))(layers.Reshape((8, 24))(inputs))
    return layers.TimeDistributed(layers.Dense(2))(x)


def attention(inputs):
    x = layers.Reshape((8, 24))(inputs)
    return kp.LayerNormProxy(activation="gelu")(layers.MultiHeadAttention(2, 4)(x, x))


def nested(inputs):
    inner = keras.Sequential([keras.Input((8, 8, 3)), layers.Conv2D(8, 3), kp.LayerNormProxy()])
    return layers.Dense(3)(layers.Flatten()(inner(inputs)))


def make_model(build, policy="float32"):
    keras.config.set_dtype_policy(policy)
    inputs = keras.Input((8, 8, 3), name="image", dtype="float64" if policy == "float64" else "float32")
    return keras.Model(inputs, build(inputs))


def dtypes(path):
    import onnx

    graph = onnx.load(path).graph
    types = {value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)}
    types |= {tensor.data_type for tensor in graph.initializer}
    types |= {attribute.i for node in graph.node if node.op_type == "Cast" for attribute in node.attribute}
    return {onnx.helper.tensor_dtype_to_np_dtype(kind).name for kind in types} - {"int32", "int64", "bool"}


@pytest.mark.parametrize(
    "build, fold",
    [
        (convolutional, True),
        (convolutional, False),
        (dense, True),
        (recurrent, True),
        (attention, False),
        (nested, False),
    ],
)
@pytest.mark.parametrize("policy", MIXED)
def test_mixed_precision_becomes_a_float32_file(policy, build, fold, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    keras.utils.set_random_seed(0)
    model = make_model(build, policy)
    layer_policies = [layer.dtype_policy.name for layer in model.layers]
    path = export_onnx(model, tmp_path / "model.onnx", fold=fold)
    assert dtypes(path) == {"float32"}
    # The user's model stays what it is, and the file computes what the same weights make of float32.
    assert [layer.dtype_policy.name for layer in model.layers] == layer_policies
    exact = make_model(build)
    exact.set_weights(model.get_weights())
    x = normal(1, 8, 8, 3)
    received = onnxruntime.InferenceSession(path).run(None, {"image": x})[0]
    np.testing.assert_allclose(received, exact(x), rtol=1e-4, atol=1e-5)


@pytest.mark.verified
@pytest.mark.parametrize("policy", MIXED)
def test_it_is_verified_at_the_precision_of_the_model(policy, tmp_path):
    pytest.importorskip("onnxruntime")
    model = make_model(convolutional, policy)
    export_onnx(model, tmp_path / "model.onnx")
    model.layers[1].kernel.assign_add(normal(*model.layers[1].kernel.shape))
    with pytest.raises(ValueError, match="must compute what `model` computes"):
        kp.export.verify(model, tmp_path / "model.onnx", runtimes=["onnxruntime"])


def test_numbers_too_small_for_float16(tmp_path):
    pytest.importorskip("onnxruntime")
    model = make_model(recurrent, "mixed_float16")
    path = export_onnx(model, tmp_path / "model.onnx")
    kp.export.verify(model, path, runtimes=["onnxruntime"])


@pytest.mark.parametrize("policy", MIXED)
def test_a_saved_model_keeps_the_precision(policy, tmp_path):
    import tensorflow as tf

    model = make_model(convolutional, policy)
    serve = tf.saved_model.load(export_saved_model(model, tmp_path)).signatures["serving_default"]
    (output,) = serve.structured_outputs.values()
    assert output.dtype.name == policy.removeprefix("mixed_")


@pytest.mark.verified
def test_a_saved_model_with_inputs_of_bfloat16(tmp_path):
    keras.config.set_dtype_policy("mixed_bfloat16")
    x = keras.Input((4,), name="x", dtype="bfloat16")
    export_saved_model(keras.Model(x, layers.Dense(2)(x)), tmp_path)


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(5)

    def call(self, image):
        return self.dense(image)


def test_subclassed_models_cannot_be_copied(tmp_path, files):
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = Subclassed()
    model(np.zeros((1, 4), "float32"))
    with pytest.raises(
        ValueError, match="`model` must be functional.*'float32' and load its weights.*export_saved_model"
    ):
        export_onnx(model, tmp_path / "model.onnx", input_shape=(4,), fold=False)
    assert files() == []
    assert model.dense.dtype_policy.name == "mixed_bfloat16"


def test_weights_and_inputs_of_bfloat16(tmp_path, files):
    model = make_model(convolutional, "bfloat16")
    x = keras.Input((4,), name="x", dtype="bfloat16")
    for refused in (model, keras.Model(x, layers.Dense(2, dtype="float32")(x))):
        with pytest.raises(
            ValueError, match="`model` must have weights and inputs of another dtype than bfloat16.*'float32'"
        ):
            export_onnx(refused, tmp_path / "model.onnx")
    assert files() == []


def test_weights_of_float16_stay(tmp_path):
    assert dtypes(export_onnx(make_model(dense, "float16"), tmp_path / "model.onnx")) == {"float16", "float32"}


def test_float32_is_not_copied():
    model = make_model(convolutional)
    assert in_float32(model, model) is model


@pytest.mark.verified
def test_float64(tmp_path):
    pytest.importorskip("onnxruntime")
    path = export_onnx(make_model(dense, "float64"), tmp_path / "model.onnx", verify=only_onnxruntime)
    assert dtypes(path) == {"float64"}


def only_onnxruntime(*args, **kwargs):
    return kp.export.verify(*args, **kwargs, runtimes=["onnxruntime"])


@pytest.mark.verified
def test_float64_that_the_runtime_does_not_compute_in(tmp_path, files):
    pytest.importorskip("onnxruntime")
    with pytest.raises(CannotLoadError, match="may be float64.*'float32' and load its weights.*export_saved_model"):
        export_onnx(make_model(convolutional, "float64"), tmp_path / "model.onnx", verify=only_onnxruntime)
    assert files() == []
