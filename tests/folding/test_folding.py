"""A folded model computes what its source does, and each constant is where it belongs."""

import json
import math
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from backends import BACKEND, float64_allowed, numpy, tensorflow_only
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from keras import layers, ops
from layers.samples import normal

import keras_proxynorm as kp
from keras_proxynorm.export import FoldedNormalization, fold
from keras_proxynorm.folding.folding import fold_with_report

ACTIVATIONS = ("relu", "leaky_relu", "relu6", "silu", "gelu", "hard_silu", "tanh", "elu", None)
NORMS = {
    "group": lambda activation, **kw: kp.GroupNormProxy(4, activation=activation, **kw),
    "instance": lambda activation, **kw: kp.GroupNormProxy(-1, activation=activation, **kw),
    "layer": lambda activation, **kw: kp.LayerNormProxy(activation=activation, **kw),
    "activation": lambda activation, **kw: kp.ProxyActivation(activation=activation, **kw),
}
VECTORS = ["scale", "offset", "output_scale", "output_offset"]


def randomize(model, seed=0, signs=(1, -1)):
    """Norm parameters, moving statistics and biases that a mistake would show in."""
    rng = np.random.default_rng(seed)
    for weight in model.weights:
        shape = tuple(weight.shape)
        if weight.name == "gamma":
            weight.assign(rng.uniform(0.5, 1.5, shape) * rng.choice(signs, shape))
        elif weight.name == "moving_variance":
            weight.assign(rng.uniform(0.5, 1.5, shape))
        elif weight.name in ("beta", "proxy", "moving_mean", "bias"):
            weight.assign(0.3 * rng.standard_normal(shape))
    return model


def sample(model, batch_size=2):
    """Inputs for a model, in its structure."""
    inputs = [normal(batch_size, *(size or 6 for size in x.shape[1:]), seed=i) for i, x in enumerate(model.inputs)]
    return inputs[0] if len(inputs) == 1 else inputs


def outputs(model, x):
    return [numpy(output).astype("float64") for output in keras.tree.flatten(model(x, training=False))]


def assert_equal(folded, model, x, tolerance=1e-5):
    for ours, theirs in zip(outputs(folded, x), outputs(model, x), strict=True):
        assert np.abs(theirs).max() > 1e-3 and theirs.std() > 1e-3
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * np.abs(theirs).max())


def check(model, x=None, signs=(1, -1), tolerance=1e-5):
    """Folds a model with random norm parameters, compares it with its source, and returns both results of `fold`."""
    randomize(model, signs=signs)
    x = sample(model) if x is None else x
    before, weights = outputs(model, x), model.get_weights()
    folded, report = fold(model, return_report=True)
    assert_equal(folded, model, x, tolerance)
    for new, old in zip(outputs(model, x) + model.get_weights(), before + weights, strict=True):
        np.testing.assert_array_equal(new, old)
    assert [layer.name for layer in folded.layers] == [layer.name for layer in model.layers]
    assert folded.name == model.name and folded.trainable_weights == []
    if not isinstance(model, keras.Sequential):
        assert folded.output_names == model.output_names
    return folded, report


def chain(*steps, shape=(6, 6, 4)):
    """A functional model of layers or functions, one behind the other."""
    inputs = x = keras.Input(shape)
    for step in steps:
        x = step(x)
    return keras.Model(inputs, x)


def constants(folded, name="norm"):
    return folded.get_layer(name).constants


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(norm, activation):
    make = NORMS[norm]
    model = chain(
        layers.Conv2D(8, 3, padding="same", use_bias=False),
        make(activation, name="valid"),
        layers.Conv2D(8, 2),
        make(activation, name="same"),
        layers.Conv2D(8, 3, padding="same"),
        make(activation, name="end"),
    )
    folded, _ = check(model)
    assert [type(folded.get_layer(name)) for name in ("valid", "same", "end")] == 3 * [FoldedNormalization]


# Layers behind a normalization, and what of its output they can take in.
READERS = {
    "valid": (lambda: layers.Conv2D(6, 3, name="reader", use_bias=False), "both"),
    "same": (lambda: layers.Conv2D(6, 3, padding="same", name="reader", use_bias=False), "scale"),
    "1x1": (lambda: layers.Conv2D(6, 1, name="reader"), "both"),
    "1x1 same, strided": (lambda: layers.Conv2D(6, 1, 2, padding="same", name="reader"), "both"),
    "strided": (lambda: layers.Conv2D(6, 3, 2, name="reader", use_bias=False), "both"),
    "dilated": (lambda: layers.Conv2D(6, 3, dilation_rate=2, activation="silu", name="reader"), "both"),
    "grouped": (lambda: layers.Conv2D(12, 3, groups=4, name="reader", use_bias=False), "both"),
    "grouped same": (lambda: layers.Conv2D(12, 3, groups=4, padding="same", name="reader"), "scale"),
    "depthwise": (lambda: layers.DepthwiseConv2D(3, depth_multiplier=2, name="reader", use_bias=False), "both"),
    "depthwise same": (lambda: layers.DepthwiseConv2D(3, padding="same", name="reader"), "scale"),
    "separable": (lambda: layers.SeparableConv2D(6, 3, depth_multiplier=2, name="reader", use_bias=False), "both"),
    "separable same": (lambda: layers.SeparableConv2D(6, 3, padding="same", name="reader"), "scale"),
    "dense": (lambda: layers.Dense(5, name="reader", use_bias=False), "both"),
    "transposed": (lambda: layers.Conv2DTranspose(6, 3, name="reader"), "scale"),
    "transposed same": (lambda: layers.Conv2DTranspose(6, 3, 2, "same", use_bias=False, name="reader"), "scale"),
    "activation": (lambda: layers.Activation("tanh", name="reader"), "nothing"),
    "permuted": (lambda: layers.Permute((3, 1, 2), name="reader"), "nothing"),
    "layer norm": (lambda: layers.LayerNormalization(name="reader"), "nothing"),
}


@pytest.mark.parametrize("reader", READERS)
def test_what_of_silu_goes_where(reader):
    make, takes = READERS[reader]
    folded, report = check(chain(kp.GroupNormProxy(2, activation="silu", name="norm"), make()))
    assert constants(folded) == {"both": VECTORS[:2], "scale": ["scale", "offset", "output_offset"]}.get(takes, VECTORS)
    assert report.absorbed == ({} if takes == "nothing" else {"reader": ("norm",)})
    moved = {"both": "scale and offset"}.get(takes, takes)
    into = "" if takes == "nothing" else f", {moved} into the following layers"
    assert report.folded == {"norm": f"GroupNormProxy to constants{into}"}
    assert (report.not_done == {}) == (takes == "both")


@pytest.mark.parametrize("reader", READERS)
def test_what_of_relu_goes_where(reader):
    # Its scale is in front of it, so that the shift is all that there is.
    make, takes = READERS[reader]
    folded, report = check(chain(kp.LayerNormProxy(name="norm"), make()))
    assert constants(folded) == ["scale", "offset"] + ["output_offset"] * (takes != "both")
    assert report.absorbed == ({"reader": ("norm",)} if takes == "both" else {})


@pytest.mark.parametrize("reader", READERS)
def test_what_of_a_stock_group_norm_goes_where(reader):
    make, takes = READERS[reader]
    folded, report = check(chain(layers.GroupNormalization(2, name="norm"), make()), signs=(1,))
    assert constants(folded) == ([] if takes == "both" else ["scale", "offset"])
    assert report.absorbed == ({"reader": ("norm",)} if takes == "both" else {})
    assert folded.get_layer("norm").groups == 2


@pytest.mark.parametrize("reader", READERS)
def test_what_of_a_batch_norm_goes_where(reader):
    make, takes = READERS[reader]
    folded, report = check(chain(layers.BatchNormalization(name="norm"), make()), signs=(1,))
    if takes == "both":
        assert type(folded.get_layer("norm")) is layers.Identity
        assert report.folded == {"norm": "BatchNormalization into the following layers"}
        assert report.absorbed == {"reader": ("norm",)}
    else:
        assert folded.get_layer("norm").groups is None and constants(folded) == ["scale", "offset"]
        assert report.absorbed == {}


LINEAR = {
    "conv": lambda: layers.Conv2D(8, 3, padding="same", use_bias=False, name="linear"),
    "grouped": lambda: layers.Conv2D(8, 3, groups=4, name="linear"),
    "depthwise": lambda: layers.DepthwiseConv2D(3, depth_multiplier=2, use_bias=False, name="linear"),
    "separable": lambda: layers.SeparableConv2D(8, 3, use_bias=False, name="linear"),
    "dense": lambda: layers.Dense(8, name="linear"),
}


@pytest.mark.parametrize("linear", LINEAR)
@pytest.mark.parametrize("center, scale", [(True, True), (False, True), (True, False)])
def test_batch_norm_into_the_layer_in_front(linear, center, scale):
    norm = layers.BatchNormalization(center=center, scale=scale, name="norm")
    folded, report = check(chain(LINEAR[linear](), norm, layers.ReLU()))
    assert type(folded.get_layer("norm")) is layers.Identity and folded.get_layer("linear").bias is not None
    assert report.folded == {"norm": "BatchNormalization into the preceding layer"} and report.absorbed == {}


NOT_INTO_THE_LAYER_IN_FRONT = {
    "activation": lambda x: (
        x := layers.Conv2D(4, 1, activation="relu")(x),
        layers.BatchNormalization(name="norm")(x),
    )[1:],
    "read by others": lambda x: (
        x := layers.Conv2D(4, 1)(x),
        layers.Add()([layers.BatchNormalization(name="norm")(x), x]),
    )[1:],
    "output": lambda x: (x := layers.Conv2D(4, 1)(x), layers.BatchNormalization(name="norm")(x)),
    "called twice": lambda x: (
        conv := layers.Conv2D(4, 1),
        layers.BatchNormalization(name="norm")(conv(x)),
        conv(conv(x)),
    )[1:],
    "another axis": lambda x: (layers.BatchNormalization(axis=1, name="norm")(layers.Conv2D(4, 1)(x)),),
    "called twice itself": lambda x: (
        norm := layers.BatchNormalization(name="norm"),
        norm(layers.Conv2D(4, 1)(x)),
        norm(layers.Conv2D(4, 2)(x)),
    )[1:],
}


@pytest.mark.parametrize("case", NOT_INTO_THE_LAYER_IN_FRONT)
def test_batch_norm_not_into_the_layer_in_front(case):
    inputs = keras.Input((6, 6, 4))
    folded, report = check(keras.Model(inputs, list(NOT_INTO_THE_LAYER_IN_FRONT[case](inputs))))
    assert report.folded == {"norm": "BatchNormalization to constants"}
    assert folded.get_layer("norm").groups is None and constants(folded) == ["scale", "offset"]


# Layers between a normalization and a reader, and what they let through.
PASSING = {
    "max pooling": (lambda: layers.MaxPooling2D(3, 2, padding="same"), "both"),
    "average pooling": (lambda: layers.AveragePooling2D(3, 2, padding="same"), "both"),
    "global average": (lambda: layers.GlobalAveragePooling2D(), "both"),
    "global maximum": (lambda: layers.GlobalMaxPooling2D(keepdims=True), "both"),
    "cropping": (lambda: layers.Cropping2D(1), "both"),
    "upsampling": (lambda: layers.UpSampling2D(2, interpolation="bilinear"), "both"),
    "dropout": (lambda: layers.Dropout(0.5), "both"),
    "spatial dropout": (lambda: layers.SpatialDropout2D(0.5), "both"),
    "identity": (lambda: layers.Identity(), "both"),
    "flatten": (lambda: layers.Flatten(), "both"),
    "reshape": (lambda: layers.Reshape((36, 4)), "both"),
    "reshape, open": (lambda: layers.Reshape((2, -1, 4)), "both"),
    "zero padding": (lambda: layers.ZeroPadding2D(((0, 1), (2, 0))), "scale"),
    "reshape of channels": (lambda: layers.Reshape((6, 12, 2)), "nothing"),
    "average of other channels": (lambda: layers.AveragePooling2D(2, 1, data_format="channels_first"), "nothing"),
}


@pytest.mark.parametrize("passing", PASSING)
@pytest.mark.parametrize("norm", ["silu", "batch"])
def test_through(norm, passing):
    make, lets = PASSING[passing]
    if BACKEND == "tensorflow" and "other channels" in passing:
        pytest.skip("TensorFlow has no pooling of channels_first on the CPU")
    layer = (
        layers.BatchNormalization(name="norm")
        if norm == "batch"
        else kp.GroupNormProxy(2, activation="silu", name="norm")
    )
    model = chain(layer, make(), layers.Dense(5, name="reader"))
    folded, report = check(model, signs=(1,))
    assert report.absorbed == ({"reader": ("norm",)} if lets == "both" or (lets, norm) == ("scale", "silu") else {})
    if norm == "silu":
        kept = {"both": VECTORS[:2], "scale": ["scale", "offset", "output_offset"], "nothing": VECTORS}[lets]
        assert constants(folded) == kept
    else:
        assert isinstance(folded.get_layer("norm"), layers.Identity) == (lets == "both")


@pytest.mark.parametrize(
    "norm", [lambda: layers.BatchNormalization(name="norm"), lambda: kp.LayerNormProxy(activation=None, name="norm")]
)
@pytest.mark.parametrize("pooling", [layers.MaxPooling2D, layers.AveragePooling2D])
def test_negative_scales_stay(norm, pooling):
    folded, report = check(chain(norm(), pooling(2), layers.Dense(5, name="reader")), signs=(-1, 1))
    assert constants(folded) == ["scale", "offset"] and report.absorbed == {}


def test_zero_scales_stay():
    model = chain(layers.BatchNormalization(name="norm"), layers.Dense(5, name="reader"))
    randomize(model, signs=(0, 1))
    folded, report = fold(model, return_report=True)
    assert report.absorbed == {} and constants(folded) == ["scale", "offset"]
    assert_equal(folded, model, sample(model))


def squeeze_excite(x):
    gate = layers.GlobalAveragePooling2D(keepdims=True)(x)
    gate = layers.Dense(2, activation="relu", name="squeeze")(gate)
    gate = layers.Dense(x.shape[-1], activation="sigmoid", name="excite")(gate)
    return layers.Multiply()([x, gate])


def test_squeeze_and_excite():
    # The scale comes through the product, and the gate is made from what is scaled too; the shift would not.
    norm, end = kp.GroupNormProxy(2, activation="silu", name="norm"), layers.Conv2D(5, 3, padding="same", name="reader")
    folded, report = check(chain(norm, squeeze_excite, end))
    assert report.absorbed == {"squeeze": ("norm",), "reader": ("norm",)}
    assert constants(folded) == ["scale", "offset", "output_offset"]


def test_product_of_two():
    inputs = keras.Input((6, 6, 4))
    a, b = (
        kp.GroupNormProxy(2, activation="silu", name="a")(inputs),
        kp.LayerNormProxy(activation="tanh", name="b")(inputs),
    )
    model = keras.Model(inputs, layers.Dense(3, name="reader")(layers.Multiply()([a, b, inputs, a])))
    folded, report = check(model)
    assert report.absorbed == {"reader": ("a", "b", "a")}
    assert constants(folded, "a") == constants(folded, "b") == ["scale", "offset", "output_offset"]


def test_product_with_one_channel():
    inputs = keras.Input((6, 6, 4))
    one = kp.LayerNormProxy(activation="silu", name="one")(layers.Conv2D(1, 1)(inputs))
    folded, report = check(keras.Model(inputs, layers.Dense(3, name="reader")(layers.Multiply()([inputs, one]))))
    assert report.absorbed == {} and constants(folded, "one") == VECTORS


def test_concatenation():
    inputs = keras.Input((6, 6, 4))
    a, b = (
        kp.GroupNormProxy(2, activation="silu", name="a")(inputs),
        kp.LayerNormProxy(activation="relu6", name="b")(inputs),
    )
    c = layers.BatchNormalization(name="c")(inputs)
    x = layers.Concatenate()([a, inputs, b, layers.Concatenate()([c, a])])
    folded, report = check(keras.Model(inputs, layers.Conv2D(4, 2, name="reader")(x)), signs=(1,))
    assert report.absorbed == {"reader": ("a", "b", "c", "a")}
    assert constants(folded, "a") == constants(folded, "b") == VECTORS[:2]


def test_concatenation_along_another_axis():
    inputs = keras.Input((6, 6, 4))
    a, b = (
        kp.GroupNormProxy(2, activation="silu", name="a")(inputs),
        kp.LayerNormProxy(activation="silu", name="b")(inputs),
    )
    model = keras.Model(inputs, layers.Conv2D(4, 2, name="reader")(layers.Concatenate(axis=1)([a, b])))
    assert check(model)[1].absorbed == {}


def test_residual_sum():
    inputs = keras.Input((6, 6, 4))
    x = kp.GroupNormProxy(2, activation="silu", name="shortcut")(inputs)
    y = layers.Conv2D(4, 3, padding="same", name="one")(x)
    y = kp.GroupNormProxy(2, activation="silu", name="inner")(y)
    y = layers.Conv2D(4, 1, name="two")(y)
    y = layers.BatchNormalization(name="batch")(y)
    folded, report = check(keras.Model(inputs, layers.Add()([x, y])))
    assert report.absorbed == {"two": ("inner",)}
    assert constants(folded, "shortcut") == VECTORS and constants(folded, "inner") == VECTORS[:2]
    assert type(folded.get_layer("batch")) is layers.Identity


def test_several_readers():
    inputs = keras.Input((6, 6, 4))
    x = kp.GroupNormProxy(2, activation="silu", name="norm")(inputs)
    one, two, three = layers.Conv2D(4, 1, name="one"), layers.Dense(4, name="two"), layers.Conv2D(3, 6, name="three")
    folded, report = check(keras.Model(inputs, [layers.Add()([one(x), two(x)]), three(x)]))
    assert report.absorbed == dict.fromkeys(("one", "two", "three"), ("norm",))
    assert constants(folded) == VECTORS[:2]


@pytest.mark.parametrize(
    "other, kept",
    [
        (lambda x: layers.Conv2D(3, 3, padding="same")(x), ["scale", "offset", "output_offset"]),
        (lambda x: layers.Activation("tanh")(x), VECTORS),
        (lambda x: ops.tanh(x), VECTORS),
        (lambda x: layers.Dropout(0.1)(x), VECTORS),  # an output of the model
    ],
)
def test_several_readers_of_which_one_cannot(other, kept):
    inputs = keras.Input((6, 6, 4))
    x = kp.GroupNormProxy(2, activation="silu", name="norm")(inputs)
    model = keras.Model(inputs, [layers.Conv2D(4, 1, name="one")(x), other(x)])
    folded, report = check(model)
    assert constants(folded) == kept
    assert ("one" in report.absorbed) == (kept != VECTORS)


def test_output_of_the_model():
    inputs = keras.Input((6, 6, 4))
    x = kp.GroupNormProxy(2, activation="silu", name="features")(inputs)
    y = layers.BatchNormalization(name="batch")(layers.Dense(3, name="logits")(x))
    model = keras.Model(inputs, {"b": y, "a": x})
    folded, report = check(model)
    assert constants(folded, "features") == VECTORS and report.absorbed == {}
    assert list(folded(sample(folded))) == list(model(sample(model)))


def test_reader_called_twice():
    inputs = keras.Input((6, 6, 4))
    norm, reader = kp.GroupNormProxy(2, activation="silu", name="norm"), layers.Dense(4, name="reader")
    folded, report = check(keras.Model(inputs, reader(reader(norm(inputs)))))
    assert report.absorbed == {} and constants(folded) == VECTORS


def test_norm_called_twice():
    inputs = keras.Input((6, 6, 4))
    norm = kp.GroupNormProxy(2, activation="silu", name="norm")
    x = layers.Dense(4, name="one")(norm(inputs))
    folded, report = check(keras.Model(inputs, layers.Dense(4, name="two")(norm(x))))
    assert report.absorbed == {} and constants(folded) == VECTORS


@pytest.mark.parametrize(
    "second",
    [
        lambda: kp.LayerNormProxy(activation="silu", name="second"),
        lambda: kp.LayerNormProxy(name="second"),
        lambda: kp.LayerNormProxy(activation=None, name="second"),
        lambda: kp.ProxyActivation(activation="tanh", name="second"),
        lambda: layers.GroupNormalization(2, name="second"),
        lambda: layers.BatchNormalization(name="second"),
    ],
)
@pytest.mark.parametrize("between", [layers.Identity, layers.MaxPooling2D])
def test_norm_behind_norm(second, between):
    model = chain(
        kp.GroupNormProxy(2, activation="silu", name="norm"), between(), second(), layers.Dense(4, name="reader")
    )
    folded, report = check(model, signs=(1,))
    assert constants(folded) == VECTORS and report.absorbed == {"reader": ("second",)}


@pytest.mark.parametrize("training", [False, True])
def test_batch_norm_called_with_training(training):
    # What the model is called with takes precedence over it, in Keras.
    model = chain(layers.Conv2D(4, 2), lambda x: layers.BatchNormalization(name="norm")(x, training=training))
    assert type(check(model)[0].get_layer("norm")) is layers.Identity


def backbone(name="backbone"):
    inputs = keras.Input((6, 6, 4), name=f"{name}_image")
    x = kp.GroupNormProxy(2, activation="silu", name="inner")(inputs)
    x = layers.BatchNormalization(name="batch")(layers.Conv2D(8, 2, name="conv")(x))
    return keras.Model(inputs, kp.GroupNormProxy(4, activation="silu", name="last")(x), name=name)


def test_nested():
    inputs = keras.Input((6, 6, 4))
    x = layers.GlobalAveragePooling2D()(backbone()(inputs))
    folded, report = check(keras.Model(inputs, layers.Dense(3, name="head")(x)))
    assert report.absorbed == {"backbone/conv": ("backbone/inner",), "head": ("backbone/last",)}
    assert set(report.folded) == {"backbone/inner", "backbone/batch", "backbone/last"}
    assert constants(folded.get_layer("backbone"), "last") == VECTORS[:2]


def test_not_into_nested():
    inputs = keras.Input((6, 6, 4))
    folded, report = check(
        keras.Model(inputs, backbone()(kp.GroupNormProxy(2, activation="silu", name="norm")(inputs)))
    )
    assert report.absorbed == {"backbone/conv": ("backbone/inner",)} and constants(folded) == VECTORS


@pytest.mark.parametrize("second, both", [(lambda: layers.Dense(3), True), (lambda: layers.Activation("tanh"), False)])
def test_nested_called_twice(second, both):
    net, left, right = backbone(), keras.Input((6, 6, 4)), keras.Input((6, 6, 4))
    model = keras.Model([left, right], [layers.Dense(3, name="head")(net(left)), second()(net(right))])
    folded, report = check(model)
    assert ("head" in report.absorbed) == both
    assert constants(folded.get_layer("backbone"), "last") == (VECTORS[:2] if both else VECTORS)


def test_nested_in_nested_sequential():
    net = keras.Sequential([keras.Input((6, 6, 4)), backbone(), layers.Flatten()], name="net")
    folded, report = check(keras.Sequential([keras.Input((6, 6, 4)), net, layers.Dense(3, name="head")]))
    assert report.absorbed["head"] == ("net/backbone/last",)
    assert isinstance(folded, keras.Sequential) and isinstance(folded.get_layer("net"), keras.Sequential)


def test_time_distributed():
    video = keras.Input((3, 6, 6, 4))
    x = layers.TimeDistributed(backbone())(video)
    x = layers.TimeDistributed(layers.BatchNormalization(), name="hidden")(x)
    x = kp.LayerNormProxy(activation="silu", name="norm")(x)
    _, report = check(keras.Model(video, layers.Dense(3, name="head")(x)))
    assert report.absorbed["head"] == ("norm",) and len(report.folded) == 4
    direct = keras.Model(
        video, layers.Dense(3, name="head")(layers.TimeDistributed(backbone("net"), name="net")(video))
    )
    assert check(direct)[1].absorbed["head"] == ("net/last",)


def test_sequential():
    model = keras.Sequential([layers.Conv2D(8, 3), kp.LayerNormProxy(name="norm"), layers.Dense(3, name="head")])
    model.build((None, 6, 6, 4))
    folded, report = check(model, normal(2, 6, 6, 4))
    assert isinstance(folded, keras.Sequential) and report.absorbed == {"head": ("norm",)}


@pytest.mark.parametrize("shape", [(8,), (7, 8), (5, 6, 8), (3, 4, 5, 8)], ids=len)
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_ranks(shape, activation):
    rank = len(shape)
    conv = layers.Dense if rank == 1 else getattr(layers, f"Conv{rank - 1}D")
    arguments = {} if rank == 1 else {"kernel_size": 2}
    model = chain(
        conv(8, **arguments),
        kp.GroupNormProxy(4, activation=activation, name="norm"),
        conv(8, name="reader", **arguments),
        layers.BatchNormalization(name="batch"),
        shape=shape,
    )
    folded, report = check(model)
    assert report.absorbed == {"reader": ("norm",)} and type(folded.get_layer("batch")) is layers.Identity


def test_causal_and_depthwise_1d():
    model = chain(
        kp.GroupNormProxy(2, activation="silu", name="a"),
        layers.Conv1D(4, 3, padding="causal", name="causal"),
        kp.GroupNormProxy(2, activation="silu", name="b"),
        layers.DepthwiseConv1D(2, depth_multiplier=2, name="depthwise"),
        layers.BatchNormalization(name="batch"),
        kp.GroupNormProxy(2, activation="silu", name="c"),
        layers.AveragePooling1D(2),
        layers.SeparableConv1D(4, 2, name="separable"),
        shape=(9, 4),
    )
    folded, report = check(model)
    assert report.absorbed == {"causal": ("a",), "depthwise": ("b",), "separable": ("c",)}
    assert [constants(folded, name) for name in "abc"] == [["scale", "offset", "output_offset"], *2 * [VECTORS[:2]]]


def test_open_sizes():
    model = chain(
        kp.GroupNormProxy(2, activation="silu", name="norm"), layers.Conv2D(4, 3, name="reader"), shape=(None, None, 4)
    )
    assert check(model, normal(2, 7, 5, 4))[1].absorbed == {"reader": ("norm",)}
    flat = chain(
        kp.LayerNormProxy(activation="silu", name="norm"), layers.Reshape((-1, 4)), layers.Dense(3), shape=(None, 5, 4)
    )
    assert constants(check(flat, normal(2, 3, 5, 4))[0]) == VECTORS[:2]


def test_channels_first():
    # Its convolutions need a GPU in TensorFlow, so the weights are compared with those of channels_last.
    def make(data_format):
        inputs = keras.Input((3, 6, 6) if data_format == "channels_first" else (6, 6, 3))
        axis = 1 if data_format == "channels_first" else -1
        x = layers.Conv2D(8, 3, data_format=data_format)(inputs)
        x = layers.BatchNormalization(axis=axis)(x)
        x = kp.GroupNormProxy(2, activation="silu", axis=axis, name="norm")(layers.ReLU()(x))
        y = layers.Conv2D(4, 1, data_format=data_format, name="conv")(x)
        z = layers.MaxPooling2D(data_format=data_format)(x)
        return keras.Model(inputs, [y, layers.Dense(4, name="dense")(layers.Flatten(data_format=data_format)(z))])

    models = randomize(make("channels_first")), randomize(make("channels_last"))
    models[0].set_weights(models[1].get_weights())
    (first, report), (last, _) = (fold(model, return_report=True) for model in models)
    assert report.absorbed == {"conv": ("norm",), "dense": ("norm",)}
    assert first.get_layer("norm").axis == 1 and constants(first) == VECTORS[:2]
    for ours, theirs in zip(first.get_weights(), last.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("activation", ["relu", "silu", None])
def test_channels_first_that_runs_anywhere(activation):
    model = chain(
        kp.GroupNormProxy(2, activation=activation, axis=1),
        layers.BatchNormalization(axis=1),
        layers.Flatten(data_format="channels_last"),
        layers.Dense(3),
        shape=(4, 6, 5),
    )
    check(model, signs=(-1,))


@pytest.mark.parametrize("norm", ["group", "layer", "activation", "batch", "stock"])
def test_masks(norm):
    make = {
        **{name: lambda name=name: NORMS[name]("silu", name="norm") for name in NORMS},
        "batch": lambda: layers.BatchNormalization(name="norm"),
        "stock": lambda: layers.GroupNormalization(4, name="norm"),
    }[norm]
    ids = keras.Input((7,), dtype="int32")
    x = make()(layers.Embedding(10, 8, mask_zero=True, embeddings_initializer="normal")(ids))
    model = keras.Model(ids, layers.Dense(3, name="head")(layers.GlobalAveragePooling1D()(x)))
    words = np.array([[1, 2, 3, 0, 0, 0, 0], [5, 0, 6, 7, 8, 9, 1]])
    folded, report = check(model, words, signs=(1,))
    assert report.absorbed == {"head": ("norm",)}
    # Words that are masked do not matter.
    embedding = folded.get_layer(model.layers[1].name).embeddings
    before = outputs(folded, words)
    if norm in ("group", "layer", "activation", "batch"):
        embedding.assign(ops.concatenate([100 + embedding[:1], embedding[1:]]))
        np.testing.assert_allclose(outputs(folded, words), before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("policy, tolerance", [("mixed_float16", 4e-3), ("mixed_bfloat16", 3e-2)])
@pytest.mark.parametrize("padding", ["valid", "same"])
def test_mixed_precision(policy, tolerance, padding):
    keras.config.set_dtype_policy(policy)
    model = chain(
        layers.Conv2D(8, 3, use_bias=False),
        layers.BatchNormalization(),
        kp.GroupNormProxy(4, activation="silu", name="norm"),
        layers.Conv2D(4, 2, padding=padding, name="reader"),
    )
    folded, report = check(model, tolerance=tolerance)
    assert report.absorbed == {"reader": ("norm",)}
    assert {keras.backend.standardize_dtype(weight.dtype) for weight in folded.weights} == {"float32"}
    assert [layer.dtype_policy.name for layer in folded.layers[1:]] == 4 * [policy]
    assert folded.dtype_policy.name == policy and folded.outputs[0].dtype == model.outputs[0].dtype


def test_float64():
    keras.config.set_dtype_policy("float64")
    with float64_allowed():
        inputs = keras.Input((6, 6, 4), dtype="float64")
        x = kp.GroupNormProxy(2, activation="silu")(inputs)
        x = layers.BatchNormalization()(layers.Conv2D(8, 3)(x))
        x = layers.DepthwiseConv2D(2, padding="same")(kp.LayerNormProxy(activation="relu")(x))
        x = layers.SeparableConv2D(5, 2)(layers.MaxPooling2D()(kp.ProxyActivation(activation="gelu")(x)))
        model = keras.Model(inputs, layers.Flatten()(x))
        x = np.random.default_rng(0).standard_normal((2, 6, 6, 4))
        # The reductions of Keras on other backends are float32.
        folded, _ = check(model, x, tolerance=1e-12 if BACKEND == "tensorflow" else 1e-5)
        assert {keras.backend.standardize_dtype(weight.dtype) for weight in folded.weights} == {"float64"}


@pytest.mark.parametrize("change", [lambda layer: layer.enable_lora(2), lambda layer: layer.quantize("int8")])
@pytest.mark.parametrize("place", ["in front", "behind"])
def test_kernels_that_are_not_what_is_stored(change, place):
    norm = layers.BatchNormalization(name="norm")
    dense = layers.Dense(4, name="dense")
    model = chain(*((dense, norm) if place == "in front" else (norm, dense)))
    change(dense)
    # A scale in front of a kernel in int8 is rounded with the inputs.
    folded, report = check(model, signs=(1,), tolerance=1e-5 if dense.lora_enabled else 1e-2)
    assert report.absorbed == {} and constants(folded) == ["scale", "offset"]


@keras.saving.register_keras_serializable("keras_proxynorm_tests_export")
class Standardized(layers.Conv2D):
    def call(self, inputs):
        kernel = self.kernel - ops.mean(self.kernel, (0, 1, 2), keepdims=True)
        return ops.conv(inputs, kernel, padding="valid")


@keras.saving.register_keras_serializable("keras_proxynorm_tests_export")
class Doubled(layers.Dropout):
    def call(self, inputs, training=False):
        return ops.tanh(inputs)


@keras.saving.register_keras_serializable("keras_proxynorm_tests_export")
class Halved(layers.BatchNormalization):
    def call(self, inputs, training=False, mask=None):
        return 0.5 * super().call(inputs, training=training)


@keras.saving.register_keras_serializable("keras_proxynorm_tests_export")
class Signed(kp.LayerNormProxy):
    def call(self, inputs, mask=None):
        return -super().call(inputs)


@pytest.mark.parametrize("reader", [lambda: Standardized(3, 3, name="reader"), lambda: Doubled(0.5, name="reader")])
def test_what_a_subclass_of_a_reader_does_is_not_guessed(reader):
    folded, report = check(chain(kp.GroupNormProxy(2, activation="silu", name="norm"), reader()))
    assert report.absorbed == {} and constants(folded) == VECTORS


@pytest.mark.parametrize("norm", [Halved, Signed])
def test_what_a_subclass_of_a_norm_does_is_not_guessed(norm):
    folded, report = check(chain(layers.Conv2D(4, 2), norm(name="norm"), layers.Dense(3)))
    assert report.folded == {} and type(folded.get_layer("norm")) is norm


@keras.saving.register_keras_serializable("keras_proxynorm_tests_export")
class Standalone(keras.Model):
    """A class whose constructor does not take inputs and outputs."""

    def __init__(self, channels=8):
        inputs = keras.Input((6, 6, 4))
        x = kp.GroupNormProxy(4, activation="silu", name="norm")(layers.Conv2D(channels, 2)(inputs))
        super().__init__(inputs, layers.Dense(3, name="head")(x))

    def get_config(self):
        return {}


def test_model_of_a_class_of_its_own():
    with pytest.warns(UserWarning, match="Standalone; its replacement is a functional keras.Model"):
        folded, report = check(Standalone())
    assert type(folded) is not Standalone and report.absorbed == {"head": ("norm",)}


class Named(keras.Model):
    pass


def test_model_of_a_class_that_takes_inputs_and_outputs():
    inputs = keras.Input((6, 6, 4))
    model = Named(inputs, layers.Dense(3, name="head")(kp.LayerNormProxy(name="norm")(inputs)))
    folded, _ = check(model)
    assert type(folded) is Named


def test_names():
    model = odd_model()
    folded = fold(model)
    assert [(x.name, x.shape, x.dtype) for x in folded.inputs] == [("image", (None, 8, 8, 4), "float32")]
    assert folded.name == "odd" and folded.output_names == model.output_names
    assert folded.output["map"].shape == (None, 6, 6, 8)


def test_lambda():
    factor = 3.0
    model = chain(
        kp.GroupNormProxy(2, activation="silu", name="norm"), layers.Lambda(lambda x: factor * x), layers.Dense(3)
    )
    folded, report = check(model)
    assert report.absorbed == {} and constants(folded) == VECTORS


def test_preprocessing_keeps_its_statistics():
    normalization = layers.Normalization()
    normalization.adapt(5 + 3 * normal(64, 6, 6, 4))
    check(chain(normalization, layers.Rescaling(0.5), layers.Conv2D(4, 2), kp.LayerNormProxy(), layers.Dense(3)))


def moments(function, mean, stddev):
    """Mean and variance of a function of a Gaussian, as plain sums."""
    t = np.linspace(-12, 12, 400_001)[:, None]
    weights = np.exp(-(t**2) / 2)
    weights /= weights.sum()
    values = function(mean + stddev * t)
    first = np.sum(weights * values, axis=0)
    return first, np.sum(weights * np.square(values - first), axis=0)


def relu_moments(mean, stddev):
    cdf = np.array([0.5 * (1 + math.erf(x / math.sqrt(2))) for x in mean / stddev])
    pdf = np.exp(-((mean / stddev) ** 2) / 2) / math.sqrt(2 * math.pi)
    first = mean * cdf + stddev * pdf
    return first, (mean**2 + stddev**2) * cdf + mean * stddev * pdf - first**2


FUNCTIONS = {
    "relu": None,
    "silu": lambda u: u / (1 + np.exp(-u)),
    "tanh": np.tanh,
    "relu6": lambda u: np.clip(u, 0, 6),
    "gelu": lambda u: u * 0.5 * (1 + np.vectorize(math.erf, otypes=[float])(u / math.sqrt(2))),
}


def expected_constants(layer):
    """The four vectors, in float64, from the weights and the formulas of the paper."""
    gamma, beta, proxy = (numpy(weight).astype("float64") for weight in (layer.gamma, layer.beta, layer.proxy))
    mean, stddev = gamma * proxy[0] + beta, np.abs(gamma * (1 + proxy[1]))
    name = layer.activation.__name__
    first, variance = relu_moments(mean, stddev) if name == "relu" else moments(FUNCTIONS[name], mean, stddev)
    scale = 1 / np.sqrt(variance + layer.proxy_epsilon)
    if name == "relu":
        return {"scale": gamma * scale, "offset": beta * scale, "output_offset": -first * scale}
    return {"scale": gamma, "offset": beta, "output_scale": scale, "output_offset": -first * scale}


@pytest.mark.parametrize("activation", [name for name in FUNCTIONS if name != "gelu"])
def test_constants_are_rounded_once(activation):
    model = randomize(chain(kp.GroupNormProxy(4, activation=activation, name="norm"), shape=(6, 6, 16)))
    folded = fold(model).get_layer("norm")
    expected = expected_constants(model.get_layer("norm"))
    assert folded.constants == list(expected)
    for name, vector in expected.items():
        found = numpy(getattr(folded, name))
        assert found.dtype == "float32"
        if BACKEND == "jax":  # which has no float64
            np.testing.assert_allclose(found, vector, rtol=2e-5, atol=1e-6)
        elif activation == "relu":
            np.testing.assert_array_equal(found, vector.astype("float32"))
        else:
            np.testing.assert_allclose(found, vector, rtol=1.2e-7, atol=1e-8)


@pytest.mark.slow
def test_constants_of_gelu():
    model = randomize(chain(kp.GroupNormProxy(4, activation="gelu", name="norm")))
    folded = fold(model).get_layer("norm")
    for name, vector in expected_constants(model.get_layer("norm")).items():
        np.testing.assert_allclose(numpy(getattr(folded, name)), vector, rtol=2e-7 if BACKEND != "jax" else 2e-5)


@pytest.mark.parametrize("learn", ["center", "scale"])
def test_constants_without_gamma_or_beta(learn):
    norm = kp.GroupNormProxy(2, center=learn == "center", scale=learn == "scale", name="norm")
    folded, _ = check(chain(norm))
    assert constants(folded) == ["scale"] + ["offset"] * (learn == "center") + ["output_offset"]


def test_kernels_are_rounded_once():
    model = chain(kp.LayerNormProxy(activation="silu", name="norm"), layers.Conv2D(5, (2, 3), name="conv"))
    folded = fold(randomize(model))
    expected = expected_constants(model.get_layer("norm")) if BACKEND != "jax" else None
    kernel, bias = (numpy(weight).astype("float64") for weight in model.get_layer("conv").weights)
    if expected is None:
        scale = numpy(fold(chain(model.get_layer("norm"))).get_layer("norm").output_scale)
        np.testing.assert_allclose(numpy(folded.get_layer("conv").kernel), kernel * scale[:, None], rtol=1e-5)
        return
    np.testing.assert_allclose(
        numpy(folded.get_layer("conv").kernel), kernel * expected["output_scale"][:, None], rtol=1.2e-7
    )
    bias = bias + np.einsum("hwio,i->o", kernel, expected["output_offset"])
    np.testing.assert_allclose(numpy(folded.get_layer("conv").bias), bias, rtol=1.2e-7)


def test_batch_norm_in_closed_form():
    model = randomize(chain(layers.Dense(5, name="dense"), layers.BatchNormalization(epsilon=1e-2, name="norm")))
    kernel, bias = (numpy(weight).astype("float64") for weight in model.get_layer("dense").weights)
    gamma, beta, mean, variance = (numpy(weight).astype("float64") for weight in model.get_layer("norm").weights)
    scale = gamma / np.sqrt(variance + 1e-2)
    dense = fold(model).get_layer("dense")
    np.testing.assert_array_equal(numpy(dense.kernel), (kernel * scale).astype("float32"))
    np.testing.assert_allclose(numpy(dense.bias), beta + (bias - mean) * scale, rtol=1.2e-7, atol=1e-8)


def test_the_layer_in_closed_form():
    x, rng = normal(2, 5, 8), np.random.default_rng(0)
    for groups in (None, 1, 2, 8):
        layer = FoldedNormalization(groups, epsilon=0.1, activation="tanh")
        layer.build(x.shape)
        vectors = [rng.standard_normal(8) for _ in VECTORS]
        for name, vector in zip(VECTORS, vectors, strict=True):
            getattr(layer, name).assign(vector)
        y = x.astype("float64")
        if groups is not None:
            y = y.reshape(2, 5, groups, -1)
            y = (y - y.mean((1, 3), keepdims=True)) / np.sqrt(y.var((1, 3), keepdims=True) + 0.1)
            y = y.reshape(x.shape)
        scale, offset, output_scale, output_offset = vectors
        expected = output_scale * np.tanh(scale * y + offset) + output_offset
        np.testing.assert_allclose(numpy(layer(x)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kept", [[], ["offset"], ["output_scale", "scale"], VECTORS])
def test_config_of_the_layer(kept):
    layer = FoldedNormalization(2, axis=1, epsilon=0.1, activation="silu", constants=kept, reads_mask=False, name="x")
    config = layer.get_config()
    layer.build((None, 4, 3))
    assert layer.get_config() == config == json.loads(json.dumps(config))
    assert FoldedNormalization.from_config(config).get_config() == config
    assert [weight.name for weight in layer.weights] == [name for name in VECTORS if name in kept]
    assert layer.trainable_weights == []
    with pytest.raises(ValueError, match="`constants`.*Received: constants="):
        FoldedNormalization(2, constants=["gamma"])


def odd_model():
    """Something of everything, with readers that get a bias and names that must stay."""
    inputs = keras.Input((8, 8, 4), name="image")
    x = layers.Conv2D(8, 3, use_bias=False, name="stem")(inputs)
    x = layers.BatchNormalization(name="stem_bn")(x)
    x = squeeze_excite(kp.GroupNormProxy(4, activation="silu", name="norm")(x))
    x = layers.Conv2D(8, 3, padding="same", use_bias=False, name="conv")(x)
    x = kp.LayerNormProxy(activation=layers.LeakyReLU(0.1), name="leaky")(x)
    y = layers.GroupNormalization(4, name="stock")(x)
    x = layers.Concatenate(name="both")([x, y])
    x = layers.Dense(5, use_bias=False, name="head")(layers.GlobalAveragePooling2D(name="pool")(x))
    return randomize(keras.Model(inputs, {"logits": x, "map": y}, name="odd"), signs=(1,))


def test_twice():
    model = odd_model()
    once = fold(model)
    twice, report = fold(once, return_report=True)
    assert report.folded == report.absorbed == {} and "odd: 0 of 0 normalization layers folded" in str(report)
    for ours, theirs in zip(twice.get_weights(), once.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert_equal(twice, model, sample(model))


def test_report():
    _, report = fold(odd_model(), return_report=True)
    assert report.folded == {
        "stem_bn": "BatchNormalization into the preceding layer",
        "norm": "GroupNormProxy to constants, scale into the following layers",
        "leaky": "LayerNormProxy to constants",
        "stock": "GroupNormalization to constants",
    }
    assert report.absorbed == {"squeeze": ("norm",), "conv": ("norm",)}
    lines = str(report).splitlines()
    assert lines[0].split() == ["layer", "was", "became", "not", "done,", "because"]
    assert "odd: 4 of 4 normalization layers folded" in lines
    assert "                     1  BatchNormalization into the preceding layer" in lines
    assert report.not_done == {
        "norm": "Multiply, which neither absorbs it nor passes it on",
        "leaky": "GroupNormalization, whose statistics it changes",
        "stock": "it is an output of the model",
    }
    assert report.to_dict()["not_done"] == report.not_done


def test_saved_and_loaded(tmp_path):
    model = odd_model()
    folded, x = fold(model), sample(model)
    folded.save(tmp_path / "model.keras")
    np.savez(tmp_path / "data.npz", x=x, **{name: numpy(value) for name, value in folded(x).items()})
    script = (
        "import sys, keras, numpy as np, keras_proxynorm.export\n"
        "model = keras.saving.load_model(sys.argv[1] + '/model.keras')\n"
        "data = np.load(sys.argv[1] + '/data.npz')\n"
        "outputs = model(data['x'])\n"
        "for name in ('logits', 'map'):\n"
        "    value = keras.ops.convert_to_numpy(outputs[name])\n"
        "    np.testing.assert_allclose(value, data[name], rtol=1e-6, atol=1e-6)\n"
        "assert model.trainable_weights == []\n"
    )
    env = {**os.environ, "KERAS_BACKEND": BACKEND}
    run = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stderr


def test_source_may_be_frozen_and_compiled():
    model = odd_model()
    model.compile("sgd", "mse")
    model.get_layer("norm").trainable = False
    trainable = [weight.path for weight in model.trainable_weights]
    folded = fold(model)
    assert [weight.path for weight in model.trainable_weights] == trainable
    assert folded.trainable_weights == [] and model.compiled
    assert_equal(folded, model, sample(model))


def test_predict():
    model = odd_model()
    x = sample(model, 5)
    ours, theirs = (m.predict(x, batch_size=2, verbose=0) for m in (fold(model), model))
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, atol=1e-5 * np.abs(value).max())


def test_doubled_model_in_one_process():
    # Names repeat, and layers of the copy of a copy are not those of the first.
    model = odd_model()
    first, second = fold(model), fold(model)
    first.get_layer("head").kernel.assign(0 * first.get_layer("head").kernel)
    assert_equal(second, model, sample(model))


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.norm = kp.LayerNormProxy()

    def call(self, x):
        return self.norm(x)


def called(model):
    model(normal(2, 6, 6, 4))
    return model


class NoConfig(layers.Layer):
    def __init__(self, number):
        super().__init__()
        self.number = number

    def call(self, x):
        return x


@pytest.mark.parametrize(
    "model, message",
    [
        (lambda: keras.Sequential([kp.LayerNormProxy()]), "`model` must be built.*Received: the Sequential"),
        (lambda: called(Subclassed()), "`model` must be a functional or sequential model.*Subclassed"),
        (lambda: layers.Dense(3), r"`model` must be a keras\.Model\. Received: model="),
        (lambda: None, r"`model` must be a keras\.Model\. Received: model=None"),
        (lambda: chain(kp.LayerNormProxy(), NoConfig(3)), "'no_config.*cannot be cloned.*get_config"),
    ],
)
def test_errors(model, message):
    with pytest.raises(ValueError, match=message):
        fold(model())


NEW_CHANNELS = st.sampled_from([2, 4, 8])


@st.composite
def graphs(draw):
    """A random functional model, with every tensor that nothing reads as an output."""
    tensors = [keras.Input((7, 7, 4), dtype="float64")]
    read = set()

    def choose(*candidates):
        x = draw(st.sampled_from(candidates or tensors[-3:]))
        read.add(id(x))
        return x

    def norm(x):
        kind = draw(st.sampled_from(["group", "layer", "activation", "batch", "batch", "stock"]))
        if kind == "batch":
            return layers.BatchNormalization()(x)
        if kind == "stock":
            return layers.GroupNormalization(2)(x)
        activation = draw(st.sampled_from(ACTIVATIONS))
        make = {"group": lambda **kw: kp.GroupNormProxy(2, **kw), "layer": kp.LayerNormProxy}.get(
            kind, kp.ProxyActivation
        )
        return make(activation=activation)(x)

    def linear(x):
        bias = draw(st.booleans())
        padding = draw(st.sampled_from(["same", "valid"]))
        size = draw(st.sampled_from([1, 1, 2])) if min(x.shape[1:3]) > 1 else 1
        kind = draw(st.sampled_from(["conv", "conv", "grouped", "depthwise", "separable", "dense"]))
        arguments = {"padding": padding, "use_bias": bias}
        if kind == "dense":
            return layers.Dense(draw(NEW_CHANNELS), use_bias=bias)(x)
        if kind == "depthwise":
            return layers.DepthwiseConv2D(size, **arguments)(x)
        if kind == "separable":
            return layers.SeparableConv2D(draw(NEW_CHANNELS), size, **arguments)(x)
        groups = 2 if kind == "grouped" else 1
        activation = draw(st.sampled_from([None, None, "silu"]))
        return layers.Conv2D(draw(NEW_CHANNELS), size, groups=groups, activation=activation, **arguments)(x)

    def passing(x):
        small = min(x.shape[1:3]) < 3
        candidates = [layers.Dropout(0.3), layers.Identity(), layers.ZeroPadding2D(1)]
        candidates += [
            layers.MaxPooling2D(2, 1, padding="same"),
            layers.AveragePooling2D(2, 1, padding="same"),
            layers.Reshape((-1, 1, x.shape[-1])),
        ]
        if not small:
            candidates += [layers.Cropping2D(((1, 0), (0, 1))), layers.MaxPooling2D(2)]
        return draw(st.sampled_from(candidates))(x)

    def joined(x):
        others = [y for y in tensors if y.shape[1:3] == x.shape[1:3]]
        same = [y for y in others if y.shape == x.shape]
        kind = draw(st.sampled_from(["concatenate", "add", "multiply", "gate"]))
        if kind == "concatenate":
            return layers.Concatenate()([x, choose(*others)])
        if kind == "gate":
            return squeeze_like(x)
        return (layers.Add() if kind == "add" else layers.Multiply())([x, choose(*same)])

    def squeeze_like(x):
        gate = layers.GlobalAveragePooling2D(keepdims=True)(x)
        return layers.Multiply()([x, layers.Conv2D(x.shape[-1], 1, activation="sigmoid")(gate)])

    for _ in range(draw(st.integers(2, 9))):
        x = choose()
        step = draw(st.sampled_from([norm, norm, linear, linear, passing, joined]))
        tensors.append(step(x))
    ends = [x for x in tensors[1:] if id(x) not in read]
    if draw(st.booleans()):
        flat = draw(st.sampled_from([layers.Flatten, layers.GlobalAveragePooling2D]))
        ends[0] = layers.Dense(3)(flat()(ends[0]))
    return keras.Model(tensors[0], ends)


@settings(max_examples=40 if BACKEND == "tensorflow" else 5, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), seed=st.integers(0, 100), signs=st.sampled_from([(1,), (1, -1)]))
def test_random_graphs(data, seed, signs):
    keras.config.set_dtype_policy("float64")
    with float64_allowed():
        model = randomize(data.draw(graphs()), seed, signs)
        x = np.random.default_rng(seed).standard_normal((2, 7, 7, 4))
        tolerance = 1e-9 if BACKEND == "tensorflow" else 1e-3
        for ours, theirs in zip(outputs(fold(model), x), outputs(model, x), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * max(1, np.abs(theirs).max()))


@pytest.mark.slow
@settings(max_examples=600, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), seed=st.integers(0, 100), signs=st.sampled_from([(1,), (1, -1)]))
def test_many_random_graphs(data, seed, signs):
    test_random_graphs.hypothesis.inner_test(data, seed, signs)


@tensorflow_only
def test_traced():
    import tensorflow as tf

    model = odd_model()
    folded, x = fold(model), tf.constant(sample(model))
    traced = tf.function(lambda x: folded(x, training=False)["logits"])(x)
    np.testing.assert_allclose(traced, folded(x)["logits"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("kind", [1, 2, 3])
def test_batch_norm_after_a_transposed_convolution(kind, data_format):
    if data_format == "channels_first" and (BACKEND == "tensorflow" or kind == 3):
        pytest.skip("TensorFlow has no such convolution on a CPU")
    transposed = getattr(layers, f"Conv{kind}DTranspose")
    axis = -1 if data_format == "channels_last" else 1
    inputs = keras.Input((*(4,) * kind, 3) if axis == -1 else (3, *(4,) * kind))
    x = transposed(5, 3, strides=2, padding="same", use_bias=False, data_format=data_format, name="up")(inputs)
    model = keras.Model(inputs, layers.BatchNormalization(axis=axis, name="norm")(x))
    folded, report = check(model)
    assert report.folded == {"norm": "BatchNormalization into the preceding layer"}
    assert type(folded.get_layer("norm")) is layers.Identity and folded.get_layer("up").use_bias


def u_net(norm, call=lambda layer, x: layer(x)):
    inputs = keras.Input((16, 16, 3), name="image")

    def block(x, convolution, name):
        return call(layers.ReLU(), call(norm(name=name), call(convolution, x)))

    skip = block(inputs, layers.Conv2D(8, 3, padding="same", use_bias=False), "skip")
    x = block(skip, layers.Conv2D(16, 3, strides=2, padding="same", use_bias=False), "down")
    x = block(x, layers.Conv2DTranspose(8, 3, strides=2, padding="same", use_bias=False), "up")
    return keras.Model(inputs, layers.Conv2D(2, 1, name="mask")(call(layers.Concatenate(), [x, skip])))


@pytest.mark.parametrize("norm", [layers.BatchNormalization, lambda name: kp.GroupNormProxy(4, name=name)])
def test_a_decoder_folds_whole(norm):
    folded, report = check(u_net(norm))
    assert len(report.folded) == 3
    kinds = {type(folded.get_layer(name)) for name in ("skip", "down", "up")}
    assert kinds == ({layers.Identity} if norm is layers.BatchNormalization else {FoldedNormalization})


def gated_model(call, taken=("end",)):
    inputs = keras.Input((8, 8, 8), name="image")
    x = call(kp.GroupNormProxy(4, activation="silu", name="norm"), inputs)
    gate = call(layers.GlobalAveragePooling2D(keepdims=True), x)
    gate = call(layers.Conv2D(8, 1, activation="sigmoid", name="gate"), gate)
    y = call(layers.Conv2D(4, 1, name="project"), call(layers.Multiply(name="product"), [x, gate]))
    for name in taken:
        y = call(layers.Activation("tanh", name=name), y)
    return randomize(keras.Model(inputs, y))


@pytest.mark.parametrize("through_gates", [True, False])
def test_calls_by_keyword(through_gates):
    by_keyword = gated_model(lambda layer, x: layer(inputs=x))
    by_position = gated_model(lambda layer, x: layer(x))
    by_keyword.set_weights(by_position.get_weights())
    (folded, report), (other, expected) = (fold_with_report(x, through_gates) for x in (by_keyword, by_position))
    assert report.absorbed == expected.absorbed and report.folded == expected.folded
    assert ("project_offset" in [layer.name for layer in folded.layers]) == through_gates
    assert_equal(folded, by_keyword, sample(by_keyword))
    assert_equal(folded, other, sample(by_keyword))
    by_keyword = u_net(layers.BatchNormalization, lambda layer, x: layer(inputs=x))
    assert len(check(by_keyword)[1].folded) == 3


def test_what_a_gate_adds_gets_names_that_are_free():
    model = gated_model(lambda layer, x: layer(x), taken=("project_offset", "project_with_offset"))
    folded, report = fold_with_report(model, through_gates=True)
    assert {"project_offset_1", "project_with_offset_1"} <= {layer.name for layer in folded.layers}
    assert report.warnings == ()
    assert_equal(folded, model, sample(model))


def test_an_output_keeps_its_name_where_a_gate_precedes_it():
    model = gated_model(lambda layer, x: layer(x), taken=())
    folded, _ = fold_with_report(model, through_gates=True)
    assert folded.output_names == model.output_names == ["project"]
    assert_equal(folded, model, sample(model))


@pytest.mark.parametrize("make", [lambda: kp.GroupNormProxy(4, name="norm"), lambda: kp.LayerNormProxy(name="norm")])
def test_masked_positions_come_out_as_in_the_layer(make):
    # Whatever is in them: the convolution after the layer reads them.
    steps, mask = keras.Input((7, 8)), keras.Input((7,), dtype="bool")
    x = make()(steps, mask=mask)
    model = randomize(keras.Model([steps, mask], layers.Conv1D(4, 3, name="reader")(x)))
    x, kept = normal(2, 7, 8), np.arange(7) < [[3], [5]]
    x[~kept] = np.inf
    expected, received = (numpy(m([x, kept], training=False)) for m in (model, fold(model)))
    assert np.isfinite(expected).all()
    np.testing.assert_allclose(received, expected, rtol=1e-5, atol=1e-5)


class Squared(keras.Model):
    def call(self, inputs):
        return super().call(inputs) ** 2


class TimesTwoPlusOne(layers.TimeDistributed):
    def call(self, inputs):
        return 2 * super().call(inputs) + 1


@pytest.mark.parametrize("wrapped", [False, True])
def test_nothing_is_moved_out_of_a_model_that_overrides_call(wrapped):
    inner = backbone() if wrapped else Squared(*(lambda m: (m.input, m.output))(backbone()), name="backbone")
    inputs = keras.Input((3, 6, 6, 4) if wrapped else (6, 6, 4))
    x = TimesTwoPlusOne(inner)(inputs) if wrapped else inner(inputs)
    model = keras.Model(inputs, layers.Dense(3, name="head")(x))
    assert check(model)[1].absorbed == {}


def test_the_report_says_why_nothing_is_moved():
    norm = layers.BatchNormalization(name="norm")
    twice = chain(lambda x: norm(norm(x)), layers.Dense(3))
    identity = keras.Sequential([keras.Input((4,)), layers.BatchNormalization(epsilon=0.0, name="norm")])
    twice_report = fold(randomize(twice), return_report=True)[1]
    assert twice_report.not_done == {"norm": "it is called several times"}
    bn = keras.Sequential([keras.Input((4,)), layers.BatchNormalization(name="norm"), layers.Dense(3)])
    bn.layers[0].gamma.assign([1, -1, 1, 1])
    assert fold(bn, return_report=True)[1].not_done == {"norm": "some of its scales are not positive"}
    assert fold(identity, return_report=True)[1].layers[0].action == "dropped, since it changes nothing"
