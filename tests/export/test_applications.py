"""Every family of keras.applications with proxy normalization in it: both exports compute what the model does."""

import keras
import numpy as np
import pytest
from backends import tensorflow_only

import keras_proxynorm as kp
from keras_proxynorm.export import export_onnx, export_saved_model

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

pytestmark = tensorflow_only

# The smallest inputs, or those with more than a pixel at the end, where a norm over a few values amplifies rounding.
FAMILIES = {
    "DenseNet121": 64,
    "EfficientNetB0": 64,
    "EfficientNetV2B0": 64,
    "InceptionResNetV2": 107,
    "InceptionV3": 107,
    "MobileNet": 64,
    "MobileNetV2": 64,
    "MobileNetV3Large": 64,
    "MobileNetV3Small": 64,
    "NASNetMobile": 64,
    "ResNet50": 64,
    "ResNet50V2": 64,
    "Xception": 96,
}
TOLERANCE = 1e-4


def randomize(model, seed=0):
    rng = np.random.default_rng(seed)
    for weight in model.weights:
        if weight.name == "gamma":
            weight.assign(rng.uniform(0.5, 1.5, weight.shape))
        elif weight.name in ("beta", "proxy"):
            weight.assign(0.3 * rng.standard_normal(weight.shape))
    return model


def make(family):
    """The model with two outputs: the logits and the last feature map."""
    size = FAMILIES[family]
    source = getattr(keras.applications, family)(
        weights=None, input_shape=(size, size, 3), classes=10, classifier_activation=None
    )
    converted = kp.replace_normalization(source)
    # Some heads are convolutions of one pixel.
    maps = [layer.output for layer in converted.layers if len(layer.output.shape) == 4 and layer.output.shape[1] > 1]
    return randomize(keras.Model(converted.input, {"logits": converted.output, "features": maps[-1]}))


def image(family, seed=0):
    size = FAMILIES[family]
    return np.random.default_rng(seed).standard_normal((1, size, size, 3)).astype("float32")


def differences(received, expected):
    return {name: float(np.abs(received[name] - value).max() / np.abs(value).max()) for name, value in expected.items()}


def run_model(model, x):
    return {name: np.asarray(value) for name, value in model(x, training=False).items()}


def run_onnx(path, x):
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, {session.get_inputs()[0].name: x}), strict=True))


def run_saved_model(path, x):
    import tensorflow as tf

    serve = tf.saved_model.load(path).signatures["serving_default"]
    (name,) = serve.structured_input_signature[1]
    return {name: value.numpy() for name, value in serve(**{name: tf.constant(x)}).items()}


def inner_transposes(proto):
    """The transpositions that are neither next to an input or an output nor in front of a Flatten."""
    edges = {value.name for values in (proto.graph.input, proto.graph.output) for value in values}
    flattened = {name for node in proto.graph.node if node.op_type in ("Flatten", "Reshape") for name in node.input}
    return [
        node.name
        for node in proto.graph.node
        if node.op_type == "Transpose" and not edges.union(flattened).intersection([*node.input, *node.output])
    ]


def check(family, tmp_path, record=None):
    model, x = make(family), image(family)
    expected = run_model(model, x)
    assert all(value.std() > 1e-3 for value in expected.values())
    path = export_onnx(model, tmp_path / "model.onnx", verify=False)
    found = {"onnx": differences(run_onnx(path, x), expected)}
    directory = export_saved_model(model, tmp_path / "model", verify=False)
    found["saved_model"] = differences(run_saved_model(directory, x), expected)
    # How far the model's own output moves with a unit in the last place of the input.
    found["rounding"] = differences(run_model(model, np.nextafter(x, np.float32(np.inf))), expected)
    print(family, {kind: {name: f"{value:.1e}" for name, value in row.items()} for kind, row in found.items()})
    assert inner_transposes(onnx.load(path)) == []
    # InceptionV3 itself moves by 1e-4.
    for kind in ("onnx", "saved_model"):
        assert all(found[kind][name] <= max(TOLERANCE, 3 * found["rounding"][name]) for name in expected), found


def test_mobilenet(tmp_path):
    check("MobileNetV3Small", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "family",
    [family for family in FAMILIES if family != "MobileNetV3Small"],
)
def test_families(family, tmp_path):
    check(family, tmp_path)
