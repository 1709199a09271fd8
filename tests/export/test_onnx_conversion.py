"""The contents of ONNX files: operations that engines have kernels for, and constants."""

from concurrent.futures import ThreadPoolExecutor

import keras
import numpy as np
import pytest
from backends import tensorflow_only
from keras import layers, ops
from layers.samples import normal, randomize
from onnx_files import RUNTIMES, assert_equal, chain, count, run_onnx, run_openvino

import keras_proxynorm as kp
from keras_proxynorm import compat
from keras_proxynorm.export import export_onnx, fold

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

pytestmark = tensorflow_only


def exported(model, tmp_path, x, **options):
    """The ONNX file as a proto, after all runtimes gave what the model gives."""
    path = export_onnx(model, tmp_path / "model.onnx", batch_size=len(x), **options)
    onnx.checker.check_model(path, full_check=True)
    expected = model(x, training=False)
    for run in RUNTIMES.values():
        assert_equal(run(path, x), expected)
    return onnx.load(path)


every_pooling = pytest.mark.parametrize("pooling", [layers.MaxPooling2D, layers.AveragePooling2D])


@every_pooling
@pytest.mark.parametrize("padding", [((1, 1), (1, 1)), ((0, 1), (0, 1)), ((2, 0), (0, 2))])
def test_zeros_before_a_pooling(pooling, padding, tmp_path):
    # ONNX Runtime before 1.32 merges the padding into the pooling, which then leaves it out: wrong below zero.
    x = -1 - np.abs(normal(1, 6, 6, 4))
    model = chain(layers.ZeroPadding2D(padding), pooling(3, 2))
    assert (np.asarray(model(x)).max() == 0) == (pooling is layers.MaxPooling2D)
    proto = exported(model, tmp_path, x)
    weights = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    for node in proto.graph.node:
        assert node.op_type != "Pad" or (weights[node.input[2]] == 0 and np.signbit(weights[node.input[2]]))


@every_pooling
def test_zeros_before_poolings_after_a_norm(pooling, tmp_path):
    norm = kp.GroupNormProxy(2, activation="silu")
    model = chain(norm, layers.ZeroPadding2D(1), pooling(3, 2), layers.Conv2D(4, 1))
    exported(randomize(model), tmp_path, normal(2, 6, 6, 4))


def test_zeros_for_several(tmp_path):
    inputs = keras.Input((6, 6, 4), name="x")
    x = layers.ZeroPadding2D(1)(-layers.ReLU()(inputs) - 0.5)
    outputs = [layers.MaxPooling2D(3, 2)(x), layers.AveragePooling2D(3, 1)(x), layers.Conv2D(4, 3)(x)]
    exported(keras.Model(inputs, outputs), tmp_path, normal(1, 6, 6, 4))


HARD_SIGMOIDS = {
    "hard_sigmoid": lambda x: layers.Activation("hard_sigmoid")(x),
    "of MobileNetV3": lambda x: layers.ReLU(6.0)(x + 3.0) * (1.0 / 6.0),
    "divided": lambda x: layers.ReLU(6.0)(3.0 + x) / 6.0,
    "ops": lambda x: (1.0 / 6.0) * ops.relu6(x + 3.0),
}
NO_HARD_SIGMOIDS = {
    "another shift": lambda x: layers.ReLU(6.0)(x + 2.0) * (1.0 / 6.0),
    "another factor": lambda x: layers.ReLU(6.0)(x + 3.0) * 0.2,
    "another limit": lambda x: layers.ReLU(5.0)(x + 3.0) * (1.0 / 6.0),
    "subtracted": lambda x: layers.ReLU(6.0)(3.0 - x) * (1.0 / 6.0),
    "another divisor": lambda x: layers.ReLU(6.0)(x + 3.0) / 3.0,
    "several shifts": lambda x: layers.ReLU(6.0)(x + np.array([3, 3, 3, 2], "float32")) * (1.0 / 6.0),
    "no factor": lambda x: layers.ReLU(6.0)(x + 3.0),
    "reciprocal": lambda x: 6.0 / layers.ReLU(6.0)(x + 3.0),
}


@pytest.mark.parametrize("function", HARD_SIGMOIDS)
def test_hard_sigmoid(function, tmp_path):
    proto = exported(chain(layers.Conv2D(4, 2), HARD_SIGMOIDS[function]), tmp_path, 5 * normal(1, 6, 6, 4))
    assert count(proto)["HardSigmoid"] == 1 and count(proto)["Clip"] == 0
    (node,) = [node for node in proto.graph.node if node.op_type == "HardSigmoid"]
    attributes = {attribute.name: attribute.f for attribute in node.attribute}
    np.testing.assert_allclose([attributes["alpha"], attributes["beta"]], [1 / 6, 0.5], rtol=1e-6)


HARD_SWISHES = {
    "hard_silu": lambda x: layers.Activation("hard_silu")(x),
    "of MobileNetV3": lambda x: layers.Multiply()([x, HARD_SIGMOIDS["of MobileNetV3"](x)]),
    "other order": lambda x: layers.Multiply()([HARD_SIGMOIDS["divided"](x), x]),
}


@pytest.mark.parametrize("opset", [13, 17])
@pytest.mark.parametrize("function", HARD_SWISHES)
def test_hard_swish(function, opset, tmp_path):
    model = chain(layers.Conv2D(4, 2), HARD_SWISHES[function])
    nodes = count(exported(model, tmp_path, 5 * normal(1, 6, 6, 4), opset=opset))
    # Opset 13 has no HardSwish.
    assert (nodes["HardSwish"], nodes["HardSigmoid"]) == ((1, 0) if opset > 13 else (0, 1))
    assert nodes["Clip"] == 0 and nodes["Mul"] == nodes["HardSigmoid"]


def test_hard_sigmoid_of_something_else_is_no_hard_swish(tmp_path):
    model = chain(lambda x: layers.Multiply()([x, layers.Activation("hard_sigmoid")(layers.Conv2D(4, 1)(x))]))
    nodes = count(exported(model, tmp_path, 5 * normal(1, 6, 6, 4)))
    assert (nodes["HardSwish"], nodes["HardSigmoid"], nodes["Mul"]) == (0, 1, 1)


@pytest.mark.parametrize("function", NO_HARD_SIGMOIDS)
def test_no_hard_sigmoid(function, tmp_path):
    model = chain(NO_HARD_SIGMOIDS[function])
    proto = exported(model, tmp_path, np.clip(5 * normal(1, 6, 6, 4), -2.5, 9))
    assert count(proto)["HardSigmoid"] == 0


def test_intermediate_values_of_a_hard_sigmoid_are_still_there(tmp_path):
    inputs = keras.Input((6, 6, 4), name="x")
    clipped = layers.ReLU(6.0, name="clipped")(inputs + 3.0)
    model = keras.Model(inputs, {"gate": clipped * (1.0 / 6.0), "clipped": layers.Conv2D(2, 1)(clipped)})
    proto = exported(model, tmp_path, 5 * normal(1, 6, 6, 4))
    assert count(proto)["HardSigmoid"] == 1


@pytest.mark.parametrize("channels", [3, 200])
@pytest.mark.parametrize("folded", [True, False])
def test_captured_constants_are_no_inputs(channels, folded, tmp_path):
    rng = np.random.default_rng(0)
    mean, variance = rng.standard_normal(channels), rng.uniform(0.5, 2, channels)
    model = chain(layers.Normalization(mean=mean, variance=variance), layers.Conv2D(3, 2), shape=(4, 4, channels))
    proto = exported(model, tmp_path, normal(2, 4, 4, channels), fold=folded)
    assert [value.name for value in proto.graph.input] == ["x"]


@pytest.mark.parametrize("folded", [True, False])
def test_captured_constants_of_ones_own(folded, tmp_path):
    table = ops.convert_to_tensor(normal(6, 6, 40))
    model = chain(layers.Conv2D(40, 1), layers.Lambda(lambda x: x * table, name="table"), layers.Dense(3))
    proto = exported(model, tmp_path, normal(1, 6, 6, 4), fold=folded)
    assert [value.name for value in proto.graph.input] == ["x"]


@pytest.mark.parametrize("groups, filters", [(2, 8), (4, 4), (4, 12)])
def test_grouped_convolutions(groups, filters, tmp_path):
    model = chain(
        layers.Conv2D(8, 3, groups=2, padding="same"),
        kp.GroupNormProxy(4),
        layers.Conv2D(filters, 3, groups=groups, strides=2),
    )
    proto = exported(randomize(model), tmp_path, normal(2, 6, 6, 4))
    assert count(proto)["Conv"] <= 3 and count(proto)["Split"] == count(proto)["Transpose"] - 2 == 0


@pytest.mark.parametrize("use_bias", [True, False])
def test_several_biases(use_bias, tmp_path):
    import tensorflow as tf

    # tf2onnx makes an input of a convolution of each of two.
    biases = [layers.Lambda(lambda x, i=i: tf.nn.bias_add(x, tf.constant([i, 2.0, -3.0]))) for i in range(3)]
    exported(chain(layers.Conv2D(3, 2, use_bias=use_bias), *biases), tmp_path, normal(1, 6, 6, 4))


BLOCKS = {
    "group": lambda activation: kp.GroupNormProxy(4, activation=activation),
    "layer": lambda activation: kp.LayerNormProxy(activation=activation),
    "instance": lambda activation: kp.GroupNormProxy(-1, activation=activation),
}


# With the scale and offset that stay between the relu and a padded convolution: a convolution and a sum more.
@pytest.mark.parametrize("size, most", [(1, 6), (3, 8)])
@pytest.mark.parametrize("batch_size", [1, None])
@pytest.mark.parametrize("block", BLOCKS)
def test_a_norm_is_a_handful_of_nodes(block, batch_size, size, most, tmp_path):
    def model(count):
        x = inputs = keras.Input((8, 8, 3), name="x")
        for _ in range(count):
            x = BLOCKS[block]("relu")(layers.Conv2D(8, size, padding="same", use_bias=False)(x))
        return randomize(keras.Model(inputs, layers.Conv2D(8, size, padding="same", use_bias=False)(x)))

    protos = [
        onnx.load(export_onnx(model(number), tmp_path / f"{number}.onnx", batch_size=batch_size)) for number in (1, 3)
    ]
    one, three = map(count, protos)
    assert (three - one)["InstanceNormalization"] == 2
    # Two more of each kind: a convolution and a norm.
    assert sum((three - one).values()) <= 2 * (1 + most)
    assert set(three) <= {"Transpose", "Conv", "Reshape", "InstanceNormalization", "Relu", "Add"}
    assert three["Transpose"] == 2
    # The sizes of a Reshape are constants.
    constants = {tensor.name for proto in protos for tensor in proto.graph.initializer}
    assert all(node.input[1] in constants for proto in protos for node in proto.graph.node if node.op_type == "Reshape")


@pytest.mark.parametrize("activation", ["silu", "gelu", "tanh", "elu", "hard_silu", "relu6"])
@pytest.mark.parametrize("folded", [True, False])
def test_no_moments_are_computed(activation, folded, tmp_path):
    model = randomize(chain(layers.Conv2D(8, 3), kp.GroupNormProxy(2, activation=activation), layers.Conv2D(4, 2)))
    proto = exported(model, tmp_path, normal(1, 6, 6, 4), fold=folded)
    constants = {tensor.name for tensor in proto.graph.initializer} | {""}
    for node in proto.graph.node:
        assert not constants.issuperset(node.input), node.op_type
    # Once each, for the activation itself.
    nodes = count(proto)
    assert nodes["Erf"] == (activation == "gelu") and nodes["Softplus"] == 0 and nodes["Exp"] <= (activation == "elu")


@pytest.mark.parametrize("shape", [(8,), (7, 8), (5, 6, 8), (3, 4, 5, 8)], ids=len)
@pytest.mark.parametrize("activation", ["relu", "silu", None])
@pytest.mark.parametrize("batch_size", [1, 3, None])
def test_ranks(shape, activation, batch_size, tmp_path):
    model = chain(
        kp.GroupNormProxy(2, activation=activation), layers.BatchNormalization(), kp.LayerNormProxy(), shape=shape
    )
    path = export_onnx(randomize(model), tmp_path / "model.onnx", batch_size=batch_size)
    x = normal(batch_size or 2, *shape)
    for run in RUNTIMES.values():
        assert_equal(run(path, x), model(x))


def test_open_sizes(tmp_path):
    model = chain(layers.Conv2D(8, 3), kp.GroupNormProxy(2, activation="silu"), shape=(None, None, 4))
    path = export_onnx(randomize(model), tmp_path / "model.onnx", input_shape=(9, 7, 4), batch_size=2)
    x = normal(2, 9, 7, 4)
    assert_equal(run_onnx(path, x), model(x))


@pytest.mark.parametrize("opset", [13, 15, 17, 18])
def test_opsets(opset, tmp_path):
    model = chain(
        layers.MaxPooling2D(2),
        kp.GroupNormProxy(2, activation="gelu"),
        layers.Conv2D(8, 2, activation="hard_silu"),
        layers.GlobalAveragePooling2D(),
    )
    proto = exported(randomize(model), tmp_path, normal(2, 6, 6, 4), opset=opset)
    assert [entry.version for entry in proto.opset_import if entry.domain == ""] == [opset]
    assert {node.domain for node in proto.graph.node} <= {"", "ai.onnx"}


def test_dynamic_batch(tmp_path):
    model = randomize(chain(layers.Conv2D(8, 3), kp.LayerNormProxy(), layers.Flatten(), layers.Dense(3)))
    path = export_onnx(model, tmp_path / "model.onnx", dynamic_batch=True)
    for batch_size in (1, 4):
        x = normal(batch_size, 6, 6, 4)
        for run in (run_onnx, run_openvino):
            assert_equal(run(path, x), model(x))
    for batch_size in (2, 3):
        with pytest.raises(ValueError, match="`batch_size`.*dynamic_batch=True.*Received: batch_size="):
            export_onnx(model, tmp_path / "other.onnx", batch_size=batch_size, dynamic_batch=True)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_float16_weights(tmp_path):
    model = chain(
        layers.Conv2D(64, 3, padding="same"),
        kp.GroupNormProxy(4, activation="silu"),
        layers.Conv2D(64, 3),
        kp.LayerNormProxy(activation="gelu"),
        layers.Flatten(),
        layers.Dense(40),
    )
    randomize(model)
    weights = model.get_weights()
    full = export_onnx(model, tmp_path / "full.onnx")
    half = export_onnx(model, tmp_path / "half.onnx", float16_weights=True)
    assert half.stat().st_size < 0.55 * full.stat().st_size
    for new, old in zip(model.get_weights(), weights, strict=True):
        np.testing.assert_array_equal(new, old)
    rounded = fold(model)
    for weight in rounded.weights:
        if len(weight.shape) > 1:
            weight.assign(np.asarray(weight).astype("float16"))
    x = normal(1, 6, 6, 4)
    for run in RUNTIMES.values():
        assert_equal(run(half, x), rounded(x))
    assert np.abs(run_onnx(half, x)[0] - np.asarray(model(x))).max() > 1e-5  # there was something to round
    # What came out when this was written: inputs and weights in the first digits that float16 has.
    assert {value.type.tensor_type.elem_type for value in onnx.load(half).graph.input} == {onnx.TensorProto.FLOAT}


def test_float16_weights_keep_what_float16_does_not_hold(tmp_path):
    model = chain(layers.Dense(3, name="large"), layers.Dense(2, name="small"), shape=(4,))
    model.get_layer("large").kernel.assign(1e5 * (1 + normal(4, 3)))
    model.get_layer("small").kernel.assign(1e-3 * normal(3, 2))
    path = export_onnx(model, tmp_path / "model.onnx", float16_weights=True)
    stored = {tuple(tensor.dims): tensor.data_type for tensor in onnx.load(path).graph.initializer}
    assert stored[4, 3] == onnx.TensorProto.FLOAT and stored[3, 2] == onnx.TensorProto.FLOAT16
    assert_equal(run_onnx(path, x := normal(1, 4)), model(x), 1e-3)


def test_float16_weights_of_a_model_that_is_not_folded(tmp_path):
    model = chain(layers.Dense(3))
    with pytest.raises(ValueError, match="`float16_weights` needs fold=True.*Received: float16_weights=True, fold=F"):
        export_onnx(model, tmp_path / "model.onnx", float16_weights=True, fold=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.verified
def test_float16_weights_are_verified(tmp_path):
    model = randomize(chain(layers.Conv2D(8, 3), kp.LayerNormProxy(activation="silu"), layers.Conv2D(8, 3)))
    path = export_onnx(model, tmp_path / "model.onnx", float16_weights=True)
    assert_equal(run_onnx(path, x := normal(1, 6, 6, 4)), model(x), 1e-2)


def test_metadata(tmp_path):
    model = randomize(chain(layers.Conv2D(8, 3), layers.BatchNormalization(), kp.LayerNormProxy(), layers.Dense(3)))
    proto = onnx.load(export_onnx(model, tmp_path / "model.onnx"))
    _, report = fold(model, return_report=True)
    assert (proto.producer_name, proto.producer_version) == ("keras_proxynorm", kp.__version__)
    properties = {entry.key: entry.value for entry in proto.metadata_props}
    folded = report.summary()
    assert properties == {"keras_proxynorm": kp.__version__, "keras": keras.__version__, "folded": folded}
    session = ort.InferenceSession(tmp_path / "model.onnx")
    assert session.get_modelmeta().custom_metadata_map == properties
    unfolded = onnx.load(export_onnx(model, tmp_path / "unfolded.onnx", fold=False))
    assert {entry.key: entry.value for entry in unfolded.metadata_props}["folded"] == "nothing"


@pytest.mark.parametrize("folded", [True, False])
@pytest.mark.parametrize("function", [ops.erfinv, ops.digamma if hasattr(ops, "digamma") else ops.erfinv])
def test_no_form_in_onnx(function, folded, tmp_path, files):
    model = chain(layers.Lambda(lambda x: function(ops.tanh(x)), name="odd_one"), layers.Dense(2))
    with pytest.raises(ValueError, match=r"(?s)`model`.*export_saved_model.*odd_one"):
        export_onnx(model, tmp_path / "new" / "model.onnx", fold=folded)
    assert files() == []


@pytest.mark.parametrize("overwrite", [True, False])
def test_no_form_in_onnx_leaves_the_old_file(overwrite, tmp_path, files):
    path = export_onnx(chain(layers.Dense(2)), tmp_path / "model.onnx")
    before = path.read_bytes()
    model = chain(layers.Lambda(ops.erfinv))
    with pytest.raises(ValueError if overwrite else FileExistsError):
        export_onnx(model, path, overwrite=overwrite)
    assert files() == ["model.onnx"] and path.read_bytes() == before


def test_threads_export_at_once(tmp_path):
    import tensorflow as tf

    run_eagerly = []

    @keras.saving.register_keras_serializable("tests")
    class Observer(layers.Layer):
        def call(self, x):
            run_eagerly.append(tf.config.functions_run_eagerly())
            return x

    def image_model(activation):
        blocks = [layers.Conv2D(8, 3, groups=2), kp.GroupNormProxy(4, activation=activation), Observer()]
        return randomize(chain(*blocks, layers.Conv2D(4, 3)))

    models = [
        image_model("silu"),
        image_model("gelu"),
        chain(layers.LSTM(6), Observer(), shape=(5, 4)),
        chain(layers.GRU(5), Observer(), shape=(5, 4)),
    ]
    refused = chain(Observer(), layers.Lambda(ops.erfinv, name="odd_one"))
    inputs = [normal(1, *model.input_shape[1:]) for model in models]
    alone = [
        run_onnx(export_onnx(model, tmp_path / "alone.onnx", overwrite=True), x)
        for model, x in zip(models, inputs, strict=True)
    ]

    def export(i):
        return export_onnx(models[i], tmp_path / f"{i}.onnx")

    def export_refused():
        with pytest.raises(ValueError, match="odd_one"):
            export_onnx(refused, tmp_path / "refused.onnx")

    with ThreadPoolExecutor(5) as pool:
        refusal = pool.submit(export_refused)
        paths = list(pool.map(export, range(4)))
        refusal.result()
    for path, x, expected in zip(paths, inputs, alone, strict=True):
        assert_equal(run_onnx(path, x), expected, 1e-6)
    assert len(run_eagerly) > 5 and not any(run_eagerly)


def test_faults_of_the_converter_are_not_blamed_on_the_model(tmp_path, monkeypatch, files):
    def fail(*arguments):
        raise TypeError("a fault")

    monkeypatch.setattr(compat, "onnx_of_graph", fail)
    with pytest.raises(TypeError, match="a fault") as error:
        export_onnx(chain(layers.Dense(2)), tmp_path / "model.onnx")
    assert "tf2onnx" in error.value.__notes__[0] and files() == []
