"""What replace_normalization replaces, with what, and what it reports."""

import contextlib
import functools
import json

import keras
import numpy as np
import pytest
from backends import numpy
from surgery.stand_ins import StandIn, conv_bn, exact, found, image, nested, outputs, small_model

import keras_proxynorm as kp

pytestmark = pytest.mark.filterwarnings("error::UserWarning:keras_proxynorm", "error:.*not reached")

BatchNormalization = keras.layers.BatchNormalization
LAYER_NORM = keras.layers.LayerNormalization


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
    fresh = mobile("fresh")
    assert not fresh.get_layer("block_1_project_BN").center and fresh.get_layer("block_1_expand_relu").center
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


def test_report():
    model = small_model()
    _, report = kp.replace_normalization(model, return_report=True)
    assert (report.count("fused"), report.count("plain"), report.replaced, report.groups) == (1, 1, 2, {2: 2})
    assert report.parameters_before - report.parameters_after == 2 * 16 - 16  # moving statistics out, a proxy in
    dictionary = json.loads(json.dumps(report.to_dict()))
    assert dictionary["counts"] == {"fused": 1, "split": 0, "plain": 1, "left alone": 0}
    assert dictionary["layers"][0] == {
        **{"path": "conv_bn", "layer": "BatchNormalization", "action": "fused", "names": ["conv_relu"]},
        **{"activation": "relu", "absorbed": ["conv_relu"], "channels": 8, "groups": 2, "center": True, "linear": None},
        **{"frozen": False, "weights": ["gamma", "beta"], "calibrated": False, "reason": None},
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
