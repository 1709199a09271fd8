"""What a user of replace_normalization relies on, and the traps that lie in Keras models, one test each."""

import contextlib
import functools
import json
import subprocess
import sys

import keras
import numpy as np
import pytest
from backends import numpy
from backends import tensorflow_only
from surgery.stand_ins import StandIn
from surgery.stand_ins import assert_same_outputs
from surgery.stand_ins import image
from surgery.stand_ins import outputs
from surgery.stand_ins import randomize
from surgery.stand_ins import small_model

import keras_proxynorm as kp

pytestmark = pytest.mark.filterwarnings("error::UserWarning:keras_proxynorm", "error:.*not reached")

BatchNormalization = keras.layers.BatchNormalization
LAYER_NORM = keras.layers.LayerNormalization


def conv_bn(x, name, filters=8, **kwargs):
    x = keras.layers.Conv2D(filters, 3, padding="same", use_bias=False, name=name)(x)
    return BatchNormalization(name=f"{name}_bn", **kwargs)(x)


def exact(model, x=None):
    """Converts to the stand-in and checks that nothing changed; returns the converted model and the report."""
    randomize(model)
    replaced, report = kp.replace_normalization(model, to=StandIn, return_report=True)
    x = image(2, *(size or 8 for size in model.input_shape[1:])) if x is None else x
    assert_same_outputs(model, replaced, x)
    return replaced, report


def found(report, path):
    (layer,) = [layer for layer in report.layers if layer.path == path]
    return layer


# What becomes of what


def test_fused_plain_and_what_they_are_made_of():
    model = small_model()
    replaced, report = kp.replace_normalization(model, return_report=True)
    assert [type(layer).__name__ for layer in replaced.layers] == [
        *("InputLayer", "Conv2D", "GroupNormProxy", "Conv2D", "GroupNormProxy"),
        *("Add", "GlobalAveragePooling2D", "Dense"),
    ]
    fused, plain = replaced.get_layer("conv_relu"), replaced.get_layer("branch_bn")
    assert fused.activation is keras.activations.relu and fused.proxy is not None
    assert plain.activation is keras.activations.linear and plain.proxy is None
    assert (fused.groups, plain.groups) == (2, 2)
    source = model.get_layer("conv_bn")
    for weight in ("gamma", "beta"):
        np.testing.assert_array_equal(numpy(getattr(fused, weight)), numpy(getattr(source, weight)))
    assert found(report, "conv_bn").names == ("conv_relu",) and found(report, "conv_bn").weights == ("gamma", "beta")
    np.testing.assert_array_equal(*(numpy(m.get_layer("conv").kernel) for m in (model, replaced)))
    assert replaced.name == model.name


@pytest.mark.parametrize(
    ("to", "fused", "plain", "kept"),
    [
        ("group_norm_proxy", kp.GroupNormProxy, kp.GroupNormProxy, False),
        ("layer_norm_proxy", kp.LayerNormProxy, kp.LayerNormProxy, False),
        ("group_norm", keras.layers.GroupNormalization, keras.layers.GroupNormalization, True),
        ("layer_norm", keras.layers.GroupNormalization, keras.layers.GroupNormalization, True),
        (kp.LayerNormProxy, kp.LayerNormProxy, kp.LayerNormProxy, False),
        (functools.partial(kp.GroupNormProxy, proxy_epsilon=0.1), kp.GroupNormProxy, kp.GroupNormProxy, False),
        (lambda channels, name, dtype: keras.layers.UnitNormalization(name=name, dtype=dtype),)
        + (keras.layers.UnitNormalization,) * 2
        + (True,),
    ],
)
def test_targets(to, fused, plain, kept):
    replaced = kp.replace_normalization(small_model(), to=to)
    assert type(replaced.get_layer("conv_bn" if kept else "conv_relu")) is fused
    assert type(replaced.get_layer("branch_bn")) is plain
    assert any(isinstance(layer, keras.layers.ReLU) for layer in replaced.layers) is kept
    assert np.isfinite(replaced.predict(image(2, 8, 8, 3), verbose=0)).all()
    if to == "layer_norm":
        assert replaced.get_layer("conv_bn").groups == 1


def test_group_norm_computes_what_keras_would():
    model = small_model()
    x = image(2, 8, 8, 3)
    # Without its proxy normalization, the fused layer is GroupNormalization and the activation.
    stock = kp.replace_normalization(model, to="group_norm")

    def without_activation(groups, name, dtype):
        return kp.GroupNormProxy(groups, activation=None, name=name, dtype=dtype)

    plain = kp.replace_normalization(model, to=without_activation)
    np.testing.assert_allclose(outputs(stock, x)[0], outputs(plain, x)[0], rtol=1e-4, atol=1e-5)


def test_the_arguments_of_the_old_layer_are_kept_and_can_be_overridden():
    inputs = keras.Input((4, 4, 8))
    x = BatchNormalization(
        *(-1, 0.99, 1.001e-5), scale=False, beta_regularizer="l2", beta_initializer="ones", gamma_constraint="non_neg"
    )(inputs)
    model = keras.Model(inputs, keras.layers.ReLU(name="act")(x))
    layer = kp.replace_normalization(model).get_layer("act")
    assert (layer.epsilon, layer.scale, layer.gamma) == (1.001e-5, False, None)
    assert isinstance(layer.beta_regularizer, keras.regularizers.L2) and layer.beta.regularizer is not None
    assert isinstance(layer.beta_initializer, keras.initializers.Ones)
    assert isinstance(layer.gamma_constraint, keras.constraints.NonNeg)
    layer = kp.replace_normalization(model, epsilon=0.1, scale=True, proxy_epsilon=0.5, learn_proxy=False).get_layer(
        "act"
    )
    assert (layer.epsilon, layer.proxy_epsilon, layer.proxy.trainable) == (0.1, 0.5, False)
    np.testing.assert_array_equal(numpy(layer.gamma), np.ones(8))


@pytest.mark.parametrize(("channels", "groups"), [(8, 2), (11, 1), (12, 3), (44, 11), (48, 12), (84, 21), (728, 28)])
def test_groups(channels, groups):
    inputs = keras.Input((2, 2, channels))
    model = keras.Model(inputs, BatchNormalization(name="bn")(inputs))
    assert kp.replace_normalization(model).get_layer("bn").groups == groups
    assert kp.replace_normalization(model, groups=channels, min_channels_per_group=1).get_layer("bn").groups == channels


def mobile(weights, **kwargs):
    source = keras.applications.MobileNetV2(alpha=0.35, input_shape=(32, 32, 3), weights=None, classes=3)
    return kp.replace_normalization(source, weights=weights, **kwargs)


def test_center():
    residual = keras.applications.ResNet50(input_shape=(32, 32, 3), weights=None, include_top=False)
    # An activation follows the sum, the weights are copied, or none of both: the authors' rule.
    assert kp.replace_normalization(residual, weights="fresh").get_layer("conv2_block1_3_bn").center
    assert mobile("copy").get_layer("block_1_project_BN").center
    assert not mobile("fresh").get_layer("block_1_project_BN").center
    assert mobile("fresh").get_layer("block_1_expand_relu").center
    assert mobile("fresh", center=True).get_layer("block_1_project_BN").center
    copied = mobile("copy", center=False)
    assert not copied.get_layer("block_1_project_BN").center and copied.get_layer("block_1_expand_relu").center


def test_fresh_weights():
    model = small_model()
    replaced, report = kp.replace_normalization(model, weights="fresh", return_report=True)
    np.testing.assert_array_equal(numpy(replaced.get_layer("conv_relu").gamma), np.ones(8))
    assert np.abs(numpy(replaced.get_layer("conv").kernel) - numpy(model.get_layer("conv").kernel)).max() > 1e-3
    assert found(report, "conv_bn").weights == ()


def test_several_equal_activations_become_one():
    inputs = keras.Input((8, 8, 3))
    x = conv_bn(inputs, "a")
    first, second = keras.layers.ReLU(name="first")(x), keras.layers.Activation("relu", name="second")(x)
    x = keras.layers.Add()([conv_bn(first, "b"), conv_bn(second, "c")])
    replaced, report = exact(keras.Model(inputs, x))
    assert found(report, "a_bn").absorbed == ("first", "second") and found(report, "a_bn").names == ("first",)
    assert [layer.name for layer in replaced.layers if "first" in layer.name or "second" in layer.name] == ["first"]


def test_different_activations_stay_where_they_are():
    inputs = keras.Input((8, 8, 3))
    x = conv_bn(inputs, "a")
    x = keras.layers.Multiply()([keras.layers.Activation("tanh")(x), keras.layers.Activation("sigmoid")(x)])
    _, report = exact(keras.Model(inputs, x))
    assert found(report, "a_bn").action == "plain"
    assert found(report, "a_bn").reason == "different activations read its output: tanh, sigmoid"


def test_read_with_and_without_activation():
    inputs = keras.Input((8, 8, 3))
    x = conv_bn(inputs, "a")
    y = conv_bn(keras.layers.ReLU(name="act")(x), "b")
    model = keras.Model(inputs, keras.layers.Add()([x, y]))
    _, report = exact(model)
    assert (found(report, "a_bn").action, found(report, "a_bn").names) == ("split", ("act", "a_bn"))
    replaced = kp.replace_normalization(model)
    assert replaced.get_layer("act").proxy is not None and replaced.get_layer("a_bn").proxy is None
    np.testing.assert_array_equal(*(numpy(replaced.get_layer(name).beta) for name in ("act", "a_bn")))


def test_a_normalization_that_is_an_output_is_split():
    inputs = keras.Input((8, 8, 3))
    x = conv_bn(inputs, "a")
    replaced, report = exact(keras.Model(inputs, [x, keras.layers.ReLU(name="act")(x)]))
    assert found(report, "a_bn").action == "split" and replaced.output_names == ["a_bn", "act"]


def test_squeeze_and_excite_stays():
    inputs = keras.Input((8, 8, 3))
    x = keras.layers.Activation("silu", name="act")(conv_bn(inputs, "a"))
    s = keras.layers.GlobalAveragePooling2D(keepdims=True)(x)
    s = keras.layers.Conv2D(2, 1, activation="relu", name="reduce")(s)
    s = keras.layers.Conv2D(8, 1, name="expand")(s)
    s = keras.layers.Activation("sigmoid", name="gate")(s)
    replaced, _ = exact(keras.Model(inputs, keras.layers.Multiply()([x, s])))
    assert type(replaced.get_layer("gate")) is keras.layers.Activation
    assert replaced.get_layer("reduce").activation is keras.activations.relu


@pytest.mark.parametrize("to", ["group_norm_proxy", StandIn])
def test_layer_and_group_normalization_on_request(to):
    inputs = keras.Input((8, 8, 8))
    x = keras.layers.GroupNormalization(4, name="gn")(inputs)
    x = keras.layers.ReLU(name="act")(x)
    x = keras.layers.LayerNormalization(name="lone")(x)
    model = keras.Model(inputs, x)
    with pytest.warns(UserWarning, match="No normalization layer"):
        kp.replace_normalization(model)
    kinds = [keras.layers.GroupNormalization, LAYER_NORM]
    replaced, report = kp.replace_normalization(model, to=to, layers=kinds, return_report=True)
    assert [layer.action for layer in report.layers] == ["fused", "left alone"]
    assert report.layers[1].reason == "LayerNormalization that does not feed one activation alone"
    if to != StandIn:
        assert replaced.get_layer("act").groups == 4


def test_layer_normalization_of_several_axes_is_left_alone():
    inputs = keras.Input((8, 8, 8))
    x = LAYER_NORM(axis=(1, 2, 3))(inputs)
    model = keras.Model(inputs, keras.layers.ReLU()(x))
    with pytest.warns(UserWarning, match="No normalization layer"):
        _, report = kp.replace_normalization(model, layers=LAYER_NORM, return_report=True)
    assert "differ between positions" in report.layers[0].reason


@pytest.mark.parametrize(
    ("layers", "replaced"),
    [
        (None, {"conv_bn", "branch_bn"}),
        ("conv_bn", {"conv_bn"}),
        (["branch_bn"], {"branch_bn"}),
        (BatchNormalization, {"conv_bn", "branch_bn"}),
        (lambda layer: layer.name.startswith("branch"), {"branch_bn"}),
        ((), set()),
    ],
)
def test_layers(layers, replaced):
    expected = contextlib.nullcontext() if replaced else pytest.warns(UserWarning, match="No normalization layer")
    with expected:
        _, report = kp.replace_normalization(small_model(), layers=layers, return_report=True)
    assert {layer.path for layer in report.layers if layer.action != "left alone"} == replaced
    assert all(layer.reason == "not selected" for layer in report.layers if layer.action == "left alone")


# Which models


def nested():
    backbone = small_model()
    inputs = keras.Input((8, 8, 3), name="picture")
    x = backbone(inputs, training=False)
    x = keras.layers.Dense(8, use_bias=False, name="project")(x)
    x = BatchNormalization(name="project_bn")(x)
    return keras.Model(inputs, keras.layers.Activation("silu", name="project_silu")(x), name="nested")


def siamese():
    backbone = small_model()
    left, right = keras.Input((8, 8, 3), name="left"), keras.Input((8, 8, 3), name="right")
    return keras.Model([left, right], keras.layers.Subtract()([backbone(left), backbone(right)]))


def sequential():
    return keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            keras.layers.Conv2D(8, 3),
            BatchNormalization(),
            keras.layers.ReLU(),
            keras.Sequential([keras.layers.Conv2D(8, 3), BatchNormalization(), keras.layers.LeakyReLU(0.1)]),
            small_model_from(8),
        ],
        name="chain",
    )


def small_model_from(channels):
    inputs = keras.Input((None, None, channels))
    return keras.Model(inputs, keras.layers.ReLU()(conv_bn(inputs, "inner")), name="inner_model")


def dictionaries():
    a, b = keras.Input((8, 8, 3), name="a"), keras.Input((8, 8, 3), name="b")
    x = keras.layers.ReLU(name="shared")(conv_bn(keras.layers.Concatenate()([a, b]), "conv"))
    return keras.Model({"a": a, "b": b}, {"mean": keras.layers.GlobalAveragePooling2D(name="mean")(x), "map": x})


def shared_layers():
    conv, bn, relu = keras.layers.Conv2D(3, 3, padding="same"), BatchNormalization(), keras.layers.ReLU()
    inputs = keras.Input((8, 8, 3))
    x = relu(bn(conv(inputs)))
    return keras.Model(inputs, relu(bn(conv(x))))


def cut():
    base = small_model()
    return keras.Model(base.get_layer("conv").output, base.output)


def video():
    inputs = keras.Input((4, 8, 8, 3))
    x = keras.layers.TimeDistributed(small_model(), name="frames")(inputs)
    return keras.Model(inputs, keras.layers.GRU(4)(x))


def masked():
    inputs = keras.Input((8,), dtype="int32")
    x = keras.layers.Embedding(10, 8, mask_zero=True)(inputs)
    x = keras.layers.ReLU()(BatchNormalization()(x))
    return keras.Model(inputs, keras.layers.GlobalAveragePooling1D()(x))


def functions():
    inputs = keras.Input((8, 8, 3))
    x = keras.ops.relu(conv_bn(inputs, "a"))
    x = keras.activations.silu(conv_bn(x, "b"))
    x = keras.activations.gelu(conv_bn(x, "c"))
    return keras.Model(inputs, keras.activations.relu(conv_bn(x, "d"), max_value=3.0))


@keras.saving.register_keras_serializable("keras_proxynorm_tests")
class Ours(keras.Model):
    def train_step(self, data):
        return super().train_step(data)


def of_a_class():
    model = small_model()
    return Ours(model.input, model.output, name="ours")


MODELS = [nested, siamese, sequential, dictionaries, shared_layers, cut, video, masked, functions, of_a_class]


def data_for(model):
    def for_input(tensor):
        shape = (2, *(size or 8 for size in tensor.shape[1:]))
        if "int" in str(tensor.dtype):
            return np.random.default_rng(0).integers(0, 4, shape).astype("int32")
        return image(*shape) / 100

    return keras.tree.map_structure(for_input, model.inputs[0] if isinstance(model, keras.Sequential) else model.input)


@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_models_of_every_kind(make):
    model = make()
    x = data_for(model)
    before = [numpy(weight) for weight in randomize(model).weights]
    replaced, report = exact(model, x)
    assert report.count("left alone") == 0 and report.count("fused") + report.count("split") >= 1
    assert type(replaced) is type(model) and replaced.name == model.name
    for structure in ("inputs", "outputs") if isinstance(model, keras.Sequential) else ("input", "output"):
        shapes = [keras.tree.map_structure(lambda x: x.shape, getattr(m, structure)) for m in (model, replaced)]
        assert shapes[0] == shapes[1]
    assert [layer.name for layer in replaced.layers if isinstance(layer, keras.layers.InputLayer)] == [
        layer.name for layer in model.layers if isinstance(layer, keras.layers.InputLayer)
    ]
    for weight, value in zip(model.weights, before, strict=True):
        np.testing.assert_array_equal(numpy(weight), value)
    proxied, report = kp.replace_normalization(model, return_report=True)
    assert report.parameters_after == proxied.count_params() and report.parameters_before == model.count_params()
    assert not any(isinstance(layer, BatchNormalization) for layer in proxied._flatten_layers())
    assert all(np.isfinite(output).all() for output in outputs(proxied, x))
    with pytest.warns(UserWarning, match="No normalization layer"):
        again = kp.replace_normalization(proxied)
    assert_same_outputs(proxied, again, x)


@tensorflow_only
@pytest.mark.parametrize("make", [nested, sequential, functions, of_a_class], ids=lambda make: make.__name__)
def test_the_result_is_a_model_like_any_other(make, tmp_path):
    model = make()
    replaced = kp.replace_normalization(model, to="layer_norm_proxy")
    replaced.summary(print_fn=lambda line: None)
    assert replaced.layers[2].name in keras.utils.model_to_dot(replaced, expand_nested=True).to_string()
    x = data_for(model)
    features = keras.Model(replaced.inputs[0], replaced.layers[2].output)
    assert np.isfinite(outputs(features, x)[0]).all()
    clone = keras.models.clone_model(replaced)
    clone.set_weights(replaced.get_weights())
    assert_same_outputs(replaced, clone, x)
    replaced.compile("adam", "mse")
    replaced.fit(x, np.zeros_like(outputs(replaced, x)[0]), verbose=0)
    replaced.save(tmp_path / "model.keras")
    assert_same_outputs(replaced, keras.saving.load_model(tmp_path / "model.keras"), x)


def test_a_model_from_a_file_in_a_fresh_process(tmp_path):
    model = small_model()
    model.save(tmp_path / "source.keras")
    replaced = kp.replace_normalization(keras.saving.load_model(tmp_path / "source.keras"))
    replaced.save(tmp_path / "model.keras")
    np.save(tmp_path / "x.npy", image(2, 8, 8, 3))
    code = """
import sys, keras, numpy as np, keras_proxynorm
folder = sys.argv[1]
np.save(folder + "/y.npy", keras.saving.load_model(folder + "/model.keras").predict(np.load(folder + "/x.npy")))
"""
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True, capture_output=True)
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), outputs(replaced, image(2, 8, 8, 3))[0], rtol=1e-5)


def test_channels_first():
    inputs = keras.Input((3, None, None))
    x = keras.layers.Conv2D(8, 3, data_format="channels_first", name="conv")(inputs)
    x = BatchNormalization(axis=1)(x)
    model = keras.Model(inputs, keras.layers.ReLU(name="act")(x))
    layer = kp.replace_normalization(model).get_layer("act")
    assert (layer.axis, layer.groups, layer.gamma.shape) == (1, 2, (8,))


# Traps


def test_trap_adapted_normalization():
    inputs = keras.Input((4, 4, 3))
    normalization = keras.layers.Normalization(name="normalization")
    model = keras.Model(inputs, keras.layers.ReLU()(conv_bn(normalization(inputs), "conv")))
    normalization.adapt(image(16, 4, 4, 3))
    for weights in ("copy", "fresh"):
        layer = kp.replace_normalization(model, weights=weights).get_layer("normalization")
        np.testing.assert_array_equal(numpy(layer(image(1, 4, 4, 3))), numpy(normalization(image(1, 4, 4, 3))))


@tensorflow_only
def test_trap_vocabularies():
    text, picture = keras.Input((1,), dtype="string"), keras.Input((8, 8, 3))
    lookup = keras.layers.StringLookup(output_mode="one_hot", name="lookup")
    lookup.adapt(["cat", "dog", "cat"])
    pooled = keras.layers.GlobalAveragePooling2D()(keras.layers.ReLU()(conv_bn(picture, "conv")))
    model = keras.Model([text, picture], keras.layers.Concatenate()([lookup(text), pooled]))
    replaced = kp.replace_normalization(model)
    assert replaced.get_layer("lookup").get_vocabulary() == lookup.get_vocabulary()


def test_trap_names():
    inputs = keras.Input((8, 8, 3))  # has a name of Keras's own
    outputs = [keras.layers.ReLU(name="post_relu")(conv_bn(inputs, "post"))]
    model = keras.Model(inputs, outputs)
    replaced = kp.replace_normalization(model)
    assert replaced.output_names == ["post_relu"] and replaced.layers[0].name == model.layers[0].name
    assert replaced.get_layer("post_relu").output is replaced.outputs[0]


def test_trap_two_outputs_of_equal_activations_keep_their_names():
    inputs = keras.Input((8, 8, 3))
    x = conv_bn(inputs, "a")
    model = keras.Model(inputs, [keras.layers.ReLU(name="first")(x), keras.layers.ReLU(name="second")(x)])
    replaced, _ = exact(model)
    assert replaced.output_names == ["first", "second"]
    replaced.compile(loss={"first": "mse", "second": "mse"})
    np.testing.assert_array_equal(*outputs(replaced, image(1, 8, 8, 3)))


def test_trap_a_function_that_is_an_output_keeps_its_name():
    inputs = keras.Input((8, 8, 3))
    model = keras.Model(inputs, keras.ops.relu(conv_bn(inputs, "a")))
    assert kp.replace_normalization(model).output_names == model.output_names


def test_trap_auto_named_layers_in_one_process():
    models = [keras.Sequential([keras.Input((4, 4, 8)), BatchNormalization(), keras.layers.ReLU()]) for _ in range(2)]
    outer = keras.Input((4, 4, 8))
    model = keras.Model(outer, models[1](models[0](outer)))
    for value, inner in enumerate(models):
        inner.layers[0].gamma.assign(np.full(8, value + 2.0))
    replaced = kp.replace_normalization(model)
    assert [float(layer.layers[0].gamma[0]) for layer in replaced.layers[1:]] == [2.0, 3.0]


def test_trap_frozen_layers_stay_frozen():
    model = small_model()
    model.trainable = False
    assert kp.replace_normalization(model).trainable_weights == []
    assert not kp.replace_normalization(model).trainable
    model.trainable = True
    model.get_layer("conv").trainable = False
    model.get_layer("conv_bn").trainable = False
    model.get_layer("branch_bn").beta.trainable = False
    replaced, report = kp.replace_normalization(model, return_report=True)
    assert sorted(weight.path for weight in replaced.trainable_weights) == [
        *("branch/kernel", "branch_bn/gamma", "head/bias", "head/kernel"),
    ]
    # The proxy is frozen with its layer, and thaws with it.
    frozen = replaced.get_layer("conv_relu")
    assert found(report, "conv_bn").frozen and not found(report, "branch_bn").frozen
    frozen.trainable = True
    assert [weight.name for weight in frozen.trainable_weights] == ["gamma", "beta", "proxy"]


def test_trap_a_model_that_is_frozen_but_for_its_end():
    inner = small_model()
    inner.trainable = False
    inner.get_layer("head").trainable = True
    inputs = keras.Input((8, 8, 3))
    model = keras.Model(inputs, inner(inputs))
    replaced = kp.replace_normalization(model)
    assert [weight.path for weight in replaced.trainable_weights] == [weight.path for weight in model.trainable_weights]
    flags = [layer.trainable for layer in replaced.get_layer("small").layers if layer.name != "conv_relu"]
    assert flags == [layer.trainable for layer in inner.layers if layer.name not in ("conv_bn", "conv_relu")]


def test_trap_regularizers():
    model = small_model()
    before = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, kernel_regularizer="l2"), BatchNormalization()])
    assert len(kp.replace_normalization(before).losses) == 1
    model.get_layer("branch").kernel_regularizer = keras.regularizers.L2(0.1)
    assert model.losses == []
    with pytest.warns(UserWarning, match=r"regularizers of the layers \['branch'\] were set after"):
        replaced = kp.replace_normalization(model)
    assert len(replaced.losses) == 1


def test_trap_activity_regularizers():
    inputs = keras.Input((8, 8, 3))
    x = keras.layers.ReLU(activity_regularizer="l2", name="act")(conv_bn(inputs, "a"))
    x = keras.layers.ReLU()(conv_bn(x, "b", activity_regularizer="l1"))
    replaced, report = exact(keras.Model(inputs, x))
    assert isinstance(replaced.get_layer("act").activity_regularizer, keras.regularizers.L2)
    assert isinstance(replaced.get_layer("b_bn").activity_regularizer, keras.regularizers.L1)
    assert "activity_regularizer" in found(report, "b_bn").reason


def compiled_model(**kwargs):
    model = small_model()
    model.compile(**{"optimizer": keras.optimizers.SGD(0.25, momentum=0.5), "loss": "mse", **kwargs})
    return model


def test_trap_compile_state():
    model = compiled_model(metrics=["mae"], loss_weights=[2.0], steps_per_execution=2)
    replaced = kp.replace_normalization(model)
    assert replaced.compiled and replaced.optimizer is not model.optimizer and replaced.loss == "mse"
    assert replaced.optimizer.learning_rate == 0.25 and replaced.optimizer.momentum == 0.5
    assert replaced.steps_per_execution == 2 and replaced.get_compile_config() == model.get_compile_config()
    assert not kp.replace_normalization(small_model()).compiled


def test_trap_a_loss_that_cannot_be_saved():
    model = compiled_model(loss=lambda y, p: keras.ops.mean((y - p) ** 2))
    with pytest.warns(UserWarning, match="The model was compiled, but the new one could not be"):
        replaced, report = kp.replace_normalization(model, return_report=True)
    assert not replaced.compiled and "Call `compile`" in report.warnings[0]


def test_trap_weight_decay_exclusions():
    model = small_model()
    model.compile(kp.exclude_norm_from_weight_decay(keras.optimizers.AdamW(), model), "mse")
    with pytest.warns(UserWarning, match="excluded from weight decay"):
        kp.replace_normalization(model)


def test_trap_loss_scaling_and_dtype_policies():
    keras.config.set_dtype_policy("mixed_float16")
    model = compiled_model()
    keras.config.set_dtype_policy("float32")
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    replaced = kp.replace_normalization(model)
    assert isinstance(replaced.optimizer, keras.optimizers.LossScaleOptimizer)
    assert replaced.dtype_policy.name == "mixed_float16"
    assert {layer.dtype_policy.name for layer in replaced.layers[1:]} == {"mixed_float16"}
    assert replaced.get_layer("conv_relu").gamma.dtype == "float32"


def test_trap_a_normalization_in_float32_in_front_of_an_activation_in_float16():
    inputs = keras.Input((8, 8, 3), dtype="float16")
    x = BatchNormalization(dtype="float32")(keras.layers.Conv2D(8, 3, dtype="mixed_float16")(inputs))
    model = keras.Model(inputs, keras.layers.ReLU(dtype="mixed_float16", name="act")(x))
    replaced = kp.replace_normalization(model)
    assert replaced.get_layer("act").dtype_policy.name == "mixed_float16"
    assert replaced.outputs[0].dtype == model.outputs[0].dtype == "float16"


@keras.saving.register_keras_serializable("keras_proxynorm_tests")
class Block(keras.layers.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.inner = BatchNormalization(name="inner")
        self.dense = keras.layers.Dense(8)

    def build(self, input_shape):
        self.inner.build(input_shape)
        self.dense.build(input_shape)
        super().build(input_shape)

    def call(self, inputs):
        return self.dense(self.inner(inputs))


@pytest.mark.parametrize(
    "layer", [lambda: Block(name="hides"), lambda: keras.layers.TimeDistributed(BatchNormalization(), name="hides")]
)
@pytest.mark.filterwarnings("default")
def test_trap_batch_normalization_inside_other_layers(layer):
    model = keras.Sequential([keras.Input((4, 8)), layer(), BatchNormalization(name="bn"), keras.layers.ReLU()])
    randomize(model)
    with pytest.warns(UserWarning, match="1 of 2 normalizations were not reached .*: 'hides'."):
        replaced, report = kp.replace_normalization(model, to=StandIn, return_report=True)
    assert_same_outputs(model, replaced, image(2, 4, 8))
    assert report.replaced == 1 and report.hidden == {"hides": 1}


class Unregistered(keras.layers.Layer):
    def call(self, inputs):
        return inputs * 2


class WithoutConfig(keras.layers.Layer):
    def __init__(self, scale):
        super().__init__(name="no_config")
        self.factor = scale

    def call(self, inputs):
        return self.factor() * inputs


def test_trap_unregistered_layers():
    exact(keras.Sequential([keras.Input((8, 8, 3)), Unregistered(), BatchNormalization(), keras.layers.ReLU()]))


def test_trap_lambda_layers():
    factor = 3.0
    layer = keras.layers.Lambda(lambda x, shift: image(1)[0] + factor * x + shift, arguments={"shift": 1.0})
    exact(keras.Sequential([keras.Input((8, 8, 3)), layer, BatchNormalization(), keras.layers.ReLU()]))


def test_trap_layers_without_config():
    inputs = keras.Input((8, 8, 3))
    x = WithoutConfig(lambda: 2.0)(conv_bn(inputs, "a"))
    with pytest.raises(ValueError, match=r"Layer 'no_config' \(WithoutConfig\) cannot be cloned"):
        kp.replace_normalization(keras.Model(inputs, x))


def test_trap_a_custom_class_of_models_without_a_functional_constructor():
    class Fixed(keras.Model):
        def __init__(self):
            model = small_model()
            super().__init__(model.input, model.output, name="fixed")

        def get_config(self):
            return {}

    model = Fixed()
    with pytest.warns(UserWarning, match="Model 'fixed' is a Fixed; its replacement is a functional keras.Model"):
        replaced = kp.replace_normalization(model, to=StandIn)
    assert_same_outputs(model, replaced, image(2, 8, 8, 3))


class Scaled(keras.layers.Activation):
    def call(self, inputs):
        return 3 * super().call(inputs)


def test_trap_a_subclass_of_an_activation_layer():
    inputs = keras.Input((8, 8, 3))
    _, report = exact(keras.Model(inputs, Scaled("relu", name="scaled")(conv_bn(inputs, "a"))))
    assert found(report, "a_bn").reason == "scaled (Scaled) cannot be contained in it"


@pytest.mark.parametrize(
    ("activation", "reason"),
    [
        (keras.layers.Softmax(name="act"), "act (Softmax) cannot be contained in it"),
        (keras.layers.PReLU(shared_axes=[1, 2], name="act"), "act (PReLU) cannot be contained in it"),
        (lambda x: keras.ops.gelu(x, approximate=True), "(Gelu) cannot be contained in it"),
        (keras.layers.Activation("linear"), None),
    ],
)
def test_trap_activations_that_cannot_be_contained(activation, reason):
    inputs = keras.Input((8, 8, 3))
    _, report = exact(keras.Model(inputs, activation(conv_bn(inputs, "a"))))
    assert found(report, "a_bn").action == "plain"
    assert found(report, "a_bn").reason is reason is None or reason in found(report, "a_bn").reason


def test_trap_relus_that_differ_in_an_argument_that_is_zero():
    inputs = keras.Input((8, 8, 3))
    x = conv_bn(inputs, "a")
    relus = [keras.layers.ReLU(negative_slope=0.1), keras.layers.ReLU(negative_slope=0.1, max_value=0.0)]
    _, report = exact(keras.Model(inputs, [relu(x) for relu in relus]))
    assert found(report, "a_bn").action == "plain"


@pytest.mark.parametrize("multiply", [keras.layers.Multiply(), lambda pair: keras.ops.multiply(*pair)])
def test_trap_a_gate_written_by_hand(multiply):
    inputs = keras.Input((8, 8, 3))
    x = conv_bn(inputs, "a")
    _, report = exact(keras.Model(inputs, multiply([x, keras.layers.Activation("sigmoid")(x)])))
    assert found(report, "a_bn").action == "plain"
    assert found(report, "a_bn").reason == "sigmoid is the gate of its output"


def test_trap_an_activation_that_is_shared_and_an_output():
    inputs = keras.Input((8, 8, 8))
    relu = keras.layers.ReLU(name="shared")
    replaced, report = exact(keras.Model(inputs, relu(conv_bn(relu(inputs), "a"))))
    assert replaced.output_names == ["shared"] and found(report, "a_bn").action == "plain"


def test_trap_two_equal_functions_that_are_outputs():
    inputs = keras.Input((8, 8, 3))
    x = conv_bn(inputs, "a")
    model = keras.Model(inputs, [keras.ops.relu(x), keras.ops.relu(x)])
    assert exact(model)[0].output_names == model.output_names


def test_trap_a_normalization_shared_by_models_in_which_names_clash():
    shared = BatchNormalization(name="shared")

    def inner(name, relu, conv):
        inputs = keras.Input((8, 8, 8))
        x = shared(keras.layers.Conv2D(8, 1, name=conv)(inputs))
        return keras.Model(inputs, keras.layers.ReLU(name=relu)(x), name=name)

    inputs = keras.Input((8, 8, 8))
    model = keras.Model(inputs, [inner("first", "r", "c")(inputs), inner("second", "s", "r")(inputs)])
    _, report = exact(model)
    assert report.layers[0].names == ("s",)


def test_trap_an_unregistered_function_that_vanishes():
    inputs = keras.Input((8, 8, 3))
    cube = keras.layers.Activation(lambda x: 0.1 * x**3, name="cube")
    replaced, _ = exact(keras.Model(inputs, cube(conv_bn(inputs, "a"))))
    assert type(replaced.get_layer("cube")) is StandIn


def test_trap_layers_that_are_part_of_several_others():
    dense = keras.layers.Dense(8, name="vector")
    steps, vector = keras.Input((5, 8)), keras.Input((8,))
    x = keras.layers.ReLU()(BatchNormalization()(dense(vector)))
    model = keras.Model([steps, vector], [keras.layers.TimeDistributed(dense, name="steps")(steps), x])
    with pytest.warns(UserWarning, match=r"The layers \['(steps', 'vector|vector', 'steps)'\] share weights"):
        kp.replace_normalization(model)


class Holder(keras.layers.Layer):
    def __init__(self, layer, **kwargs):
        super().__init__(**kwargs)
        self.layer = layer

    def call(self, inputs):
        return self.layer(inputs)

    def get_config(self):
        return {**super().get_config(), "layer": self.layer}


def test_trap_a_config_that_holds_a_layer():
    dense = keras.layers.Dense(4)
    dense.build((None, 8))
    inputs = keras.Input((8,))
    model = keras.Model(inputs, BatchNormalization()(Holder(dense, name="holder")(inputs)))
    with pytest.raises(ValueError, match=r"Layer 'holder' \(Holder\) cannot be cloned"):
        kp.replace_normalization(model)


class WithState(keras.Model):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.temperature = self.add_weight(name="temperature", initializer="ones")


class WithArgument(keras.Model):
    def __init__(self, *args, factor=1.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.factor = factor


def test_trap_weights_of_the_model_itself():
    source = small_model()
    model = WithState(source.input, source.output)
    model.temperature.assign(5.0)
    assert float(kp.replace_normalization(model).temperature) == 5.0
    with pytest.warns(UserWarning, match="is a WithArgument; its replacement is a functional keras.Model"):
        kp.replace_normalization(WithArgument(source.input, source.output, factor=2.0))


def test_trap_integer_inputs():
    inputs = keras.Input((8,), dtype="int32")
    model = keras.Model(inputs, keras.layers.ReLU()(BatchNormalization()(inputs)))
    with pytest.warns(UserWarning, match="No normalization layer"):
        _, report = kp.replace_normalization(model, return_report=True)
    assert report.layers[0].reason == "its input is int32"


def test_trap_rms_normalization():
    inputs = keras.Input((8, 8))
    model = keras.Model(inputs, keras.layers.ReLU()(LAYER_NORM(rms_scaling=True)(inputs)))
    with pytest.warns(UserWarning, match="No normalization layer"):
        kp.replace_normalization(model, layers=LAYER_NORM)


# Bad input


def unbuilt():
    return keras.Sequential([keras.layers.Conv2D(3, 3), BatchNormalization()])


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.bn = BatchNormalization()

    def call(self, inputs):
        return self.bn(inputs)


@pytest.mark.parametrize(
    ("make", "kwargs", "message"),
    [
        (small_model, {"to": "group"}, r"`to` must be one of 'group_norm', .* Received: to='group'"),
        (small_model, {"to": lambda name: None}, "`to` must be a function that takes the keyword argument `dtype`"),
        (small_model, {"to": lambda name, dtype: None}, "`to` must be a function that returns a new Keras layer"),
        (small_model, {"weights": "both"}, r"`weights` must be 'copy' or 'fresh'. Received: weights='both'"),
        (small_model, {"groups": 0}, r"`groups` must be a positive integer. Received: groups=0"),
        (small_model, {"groups": 2.0}, r"`groups` must be a positive integer. Received: groups=2.0"),
        (small_model, {"min_channels_per_group": True}, "`min_channels_per_group` must be a positive integer"),
        (small_model, {"layers": "conv_nb"}, "`layers` must be normalization layers .* no normalization 'conv_nb'"),
        (small_model, {"layers": "conv_relu"}, "`layers` must be normalization layers .* no normalization 'conv_relu'"),
        (small_model, {"layers": keras.layers.ReLU}, "`layers` must be normalization layers"),
        (small_model, {"layers": BatchNormalization(name="x")}, "`layers` must be normalization layers"),
        (small_model, {"layers": [["conv_bn"]]}, r"no normalization \['conv_bn'\]"),
        (small_model, {"layers": 3}, "`layers` must be normalization layers"),
        (small_model, {"center": "x"}, "`center` must be None, True or False. Received: center='x'"),
        (small_model, {"compensate": "yes"}, "`compensate` must be True or False. Received: compensate='yes'"),
        (small_model, {"axis": 1}, "`axis` is not one that can be handed on"),
        (small_model, {"trainable": False}, "`trainable` is not one that can be handed on"),
        (small_model, {"to": "group_norm", "proxy_epsilon": 1.0}, "`proxy_epsilon` is not one that can be handed on"),
        (small_model, {"to": functools.partial(kp.GroupNormProxy, activation="gelu")}, "`to` must not fix the activa"),
        (small_model, {"to": "group_norm", "compensate": True}, "`compensate` undoes proxy normalization"),
        (small_model, {"activation": "relu"}, "`activation` is not one that can be handed on"),
        (small_model, {"proxy_epsilo": 1}, "proxy_epsilo"),
        (small_model, {"compensate": True, "weights": "fresh"}, "`compensate` keeps the meaning of copied weights"),
        (small_model, {"compensate": True, "to": StandIn}, "`compensate` undoes proxy normalization"),
        (unbuilt, {}, r"must be built.*`model.build\(input_shape\)`"),
        (Subclassed, {}, "must be a functional or sequential model.*of the class Subclassed"),
        (lambda: keras.layers.Dense(1), {}, "`model` must be a keras.Model"),
    ],
)
def test_bad_input(make, kwargs, message):
    with pytest.raises(ValueError, match=message):
        kp.replace_normalization(make(), **kwargs)


def test_nothing_to_replace():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    with pytest.warns(
        UserWarning, match="No normalization layer of the model .* was replaced. It has none in its graph."
    ):
        kp.replace_normalization(model)


# The report


def test_report():
    model = small_model()
    _, report = kp.replace_normalization(model, return_report=True)
    assert (report.count("fused"), report.count("plain"), report.replaced, report.groups) == (1, 1, 2, {2: 2})
    assert report.parameters_before - report.parameters_after == 2 * 16 - 16  # moving statistics out, a proxy in
    dictionary = json.loads(json.dumps(report.to_dict()))
    assert dictionary["counts"] == {"fused": 1, "split": 0, "plain": 1, "left alone": 0}
    assert dictionary["layers"][0] == {
        **{"path": "conv_bn", "layer": "BatchNormalization", "action": "fused", "names": ["conv_relu"]},
        **{"activation": "relu", "absorbed": ["conv_relu"], "channels": 8, "groups": 2, "center": True},
        **{"frozen": False, "weights": ["gamma", "beta"], "reason": None},
    }
    text = str(report)
    for line in (
        "conv_bn    fused: conv_relu  2       with relu",
        "small: 2 of 2 normalization layers replaced by group_norm_proxy",
        "groups          2 (2x)",
    ):
        assert line in text


def test_report_knows_paths():
    _, report = kp.replace_normalization(nested(), return_report=True)
    assert [layer.path for layer in report.layers] == ["project_bn", "small/conv_bn", "small/branch_bn"]
    _, report = kp.replace_normalization(nested(), layers="small/conv_bn", return_report=True)
    assert [layer.path for layer in report.layers if layer.action == "fused"] == ["small/conv_bn"]
