"""With compensate=True, copied weights mean what they meant: exactly, or the report says where not."""

import keras
import numpy as np
import pytest
from backends import numpy
from surgery.stand_ins import image, outputs, randomize

import keras_proxynorm as kp

layers = keras.layers


def check(model, compensated, uncompensated=()):
    """Compares with the model that has the same normalizations and no proxy normalization."""
    randomize(model)
    x = image(2, *(size or 6 for size in model.input_shape[1:])) / 100
    reference = kp.replace_normalization(model, to="group_norm", groups=2)
    changed = kp.replace_normalization(model, groups=2)
    replaced, report = kp.replace_normalization(model, groups=2, compensate=True, return_report=True)
    assert set(report.compensated) == set(compensated)
    assert {place.path for place in report.uncompensated} == set(uncompensated)
    if uncompensated:
        return report
    for expected, plain, ours in zip(*(outputs(m, x) for m in (reference, changed, replaced)), strict=True):
        scale = np.abs(expected).max()
        assert np.abs(plain - expected).max() > 1e-2 * scale  # there was something to undo
        np.testing.assert_allclose(ours, expected, atol=2e-5 * scale, rtol=0)
    return report


def fused(x, name="a", activation="relu", channels=8):
    x = layers.Conv2D(channels, 3, padding="same", name=f"{name}_conv")(x)
    return layers.Activation(activation, name=name)(layers.BatchNormalization(name=f"{name}_bn")(x))


READERS = {
    "1x1": lambda: layers.Conv2D(6, 1, name="reader", use_bias=False),
    "1x1 same, strided": lambda: layers.Conv2D(6, 1, 2, padding="same", name="reader"),
    "valid": lambda: layers.Conv2D(6, 3, name="reader", use_bias=False),
    "dilated, with activation": lambda: layers.Conv2D(6, 3, dilation_rate=2, activation="silu", name="reader"),
    "grouped": lambda: layers.Conv2D(12, 3, groups=4, name="reader", use_bias=False),
    "depthwise": lambda: layers.DepthwiseConv2D(3, depth_multiplier=2, name="reader", use_bias=False),
    "separable": lambda: layers.SeparableConv2D(6, 3, depth_multiplier=2, name="reader", use_bias=False),
    "dense": lambda: layers.Dense(5, name="reader", use_bias=False),
}


@pytest.mark.parametrize("activation", ["relu", "silu", "sigmoid"])
@pytest.mark.parametrize("reader", READERS)
def test_linear_layers(reader, activation):
    inputs = keras.Input((6, 6, 3))
    model = keras.Model(inputs, READERS[reader]()(fused(inputs, activation=activation)))
    bias = kp.replace_normalization(model, compensate=True).get_layer("reader").bias
    assert bias is not None
    assert check(model, ["reader"]).compensated == {"reader": ("a_bn",)}


PASSING = {
    "max pooling": lambda: layers.MaxPooling2D(3, 2, padding="same"),
    "average pooling": lambda: layers.AveragePooling2D(3, 2, padding="same"),
    "cropping": lambda: layers.Cropping2D(1),
    "upsampling": lambda: layers.UpSampling2D(2, interpolation="bilinear"),
    "dropout": lambda: layers.Dropout(0.5),
    "spatial dropout": lambda: layers.SpatialDropout2D(0.5),
    "identity": lambda: layers.Identity(),
    "flatten": lambda: layers.Flatten(),
    "global average": lambda: layers.GlobalAveragePooling2D(),
    "global maximum": lambda: layers.GlobalMaxPooling2D(keepdims=True),
}


@pytest.mark.parametrize("passing", PASSING)
def test_through(passing):
    inputs = keras.Input((6, 6, 3))
    x = PASSING[passing]()(fused(inputs))
    check(keras.Model(inputs, layers.Dense(4, name="reader")(x)), ["reader"])


def test_concatenation_with_what_is_not_rescaled():
    inputs = keras.Input((6, 6, 3))
    a, b = fused(inputs, "a"), fused(inputs, "b", "silu", 4)
    x = layers.Concatenate()([a, inputs, b, a])
    report = check(keras.Model(inputs, layers.Conv2D(4, 2, name="reader")(x)), ["reader"])
    assert report.compensated == {"reader": ("a_bn", "b_bn", "a_bn")}


def test_several_readers_of_an_output_that_is_read_without_activation_too():
    inputs = keras.Input((6, 6, 3))
    x = layers.BatchNormalization(name="bn")(layers.Conv2D(8, 1)(inputs))
    y = layers.ReLU(name="act")(x)
    outputs = layers.Add()([layers.Conv2D(8, 1, name="one")(y), layers.Dense(8, name="two")(y), x])
    check(keras.Model(inputs, outputs), ["one", "two"])


def test_out_of_nested_models():
    inputs, pictures = keras.Input((6, 6, 3)), keras.Input((6, 6, 3))
    x = layers.Conv2D(4, 1, name="inner")(fused(inputs))
    backbone = keras.Model(inputs, layers.ReLU(name="end")(layers.BatchNormalization(name="end_bn")(x)), name="net")
    x = layers.GlobalAveragePooling2D()(backbone(pictures))
    report = check(keras.Model(pictures, layers.Dense(3, name="head")(x)), ["net/inner", "head"])
    assert report.compensated["head"] == ("net/end_bn",)


def test_out_of_models_for_each_time_step():
    frame, video = keras.Input((6, 6, 3)), keras.Input((4, 6, 6, 3))
    backbone = keras.Model(frame, layers.GlobalMaxPooling2D()(fused(frame)))
    x = layers.TimeDistributed(backbone)(video)
    check(keras.Model(video, layers.Dense(3, name="head")(x)), ["head"])


def test_sequential():
    model = keras.Sequential([keras.Input((6, 6, 3)), layers.Conv2D(8, 3), layers.BatchNormalization(), layers.ReLU()])
    model.add(layers.Flatten())
    model.add(layers.Dense(3, name="head"))
    check(model, ["head"])


def test_channels_first():
    # Its convolutions need a GPU in TensorFlow, so the weights are compared with those of channels_last.
    def make(data_format):
        inputs = keras.Input((3, 6, 6) if data_format == "channels_first" else (6, 6, 3))
        axis = 1 if data_format == "channels_first" else -1
        x = layers.Conv2D(8, 3, data_format=data_format)(inputs)
        x = layers.ReLU()(layers.BatchNormalization(axis=axis)(x))
        y = layers.Conv2D(4, 1, data_format=data_format, name="conv")(x)
        z = layers.Dense(4, name="dense")(layers.Flatten(data_format=data_format)(x))
        return keras.Model(inputs, [y, z])

    first, last = make("channels_first"), randomize(make("channels_last"))
    first.set_weights(last.get_weights())
    for ours, theirs in zip(
        *(kp.replace_normalization(m, compensate=True).weights for m in (first, last)), strict=True
    ):
        np.testing.assert_array_equal(numpy(ours), numpy(theirs))


UNDONE_NOWHERE = {
    "same": (lambda x: layers.Conv2D(4, 3, padding="same", name="reader")(x), "padding='same'"),
    "zero padding": (lambda x: layers.ZeroPadding2D(name="reader")(x), "ZeroPadding2D"),
    "activation": (lambda x: layers.Activation("tanh", name="reader")(x), "Activation"),
    "sum": (lambda x: layers.Add(name="reader")([x, layers.Conv2D(8, 1, name="one")(x)]), "Add"),
    "transposed": (lambda x: layers.Conv2DTranspose(4, 3, name="reader")(x), "Conv2DTranspose"),
    "another norm": (lambda x: layers.BatchNormalization(name="reader")(x), "statistics"),
    "layer norm": (lambda x: layers.LayerNormalization(name="reader")(x), "statistics"),
    "dense of another axis": (lambda x: layers.Dense(4, name="reader")(layers.Permute((3, 1, 2))(x)), "Permute"),
    "function": (lambda x: keras.ops.transpose(x, (0, 3, 1, 2)), "Transpose"),
    "nested model": (
        lambda x: keras.Sequential([keras.Input((6, 6, 8)), layers.Conv2D(4, 1)], name="reader")(x),
        "nested model",
    ),
}


@pytest.mark.parametrize("reader", UNDONE_NOWHERE)
def test_the_report_says_where_it_was_not_possible(reader):
    make, reason = UNDONE_NOWHERE[reader]
    inputs = keras.Input((6, 6, 3))
    model = randomize(keras.Model(inputs, make(fused(inputs))))
    replaced, report = kp.replace_normalization(model, compensate=True, return_report=True)
    (place,) = report.uncompensated
    assert reason in place.reason and place.sources == ("a_bn",)
    assert f"{place.reason} ({place.path})" in str(report)
    assert list(report.compensated) == (["one"] if reader == "sum" else [])
    if reader == "same":
        np.testing.assert_array_equal(*(numpy(m.get_layer("reader").kernel) for m in (model, replaced)))


def test_outputs_and_shared_layers_are_reported():
    inputs = keras.Input((6, 6, 3))
    shared = layers.Conv2D(8, 1, name="shared")
    model = keras.Model(inputs, [fused(inputs, "a"), shared(fused(inputs, "b")), shared(fused(inputs, "c", "silu"))])
    report = check(model, [], ["a", "shared"])
    assert [(place.path, place.reason) for place in report.uncompensated] == [
        ("shared", "Conv2D that is called more than once"),
        ("shared", "Conv2D that is called more than once"),
        ("a", "it is an output of the model"),
    ]


def test_a_frozen_layer_stays_frozen_with_its_new_bias():
    inputs = keras.Input((6, 6, 3))
    model = keras.Model(inputs, layers.Conv2D(4, 1, use_bias=False, name="reader")(fused(inputs)))
    model.get_layer("reader").trainable = False
    reader = kp.replace_normalization(model, compensate=True).get_layer("reader")
    assert reader.trainable_weights == [] and [weight.name for weight in reader.weights] == ["kernel", "bias"]


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision(policy):
    keras.config.set_dtype_policy(policy)
    inputs = keras.Input((6, 6, 3))
    model = randomize(keras.Model(inputs, layers.Conv2D(4, 1, name="reader")(fused(inputs))))
    plain, replaced = (kp.replace_normalization(model, compensate=value).get_layer("reader") for value in (False, True))
    assert replaced.kernel.dtype == "float32"
    layer = kp.replace_normalization(model).get_layer("a")
    mean, variance = (numpy(x) for x in layer.activation_moments())
    scale = np.sqrt(variance + layer.proxy_epsilon)
    np.testing.assert_allclose(numpy(replaced.kernel), numpy(plain.kernel) * scale[:, None], rtol=1e-5)
    np.testing.assert_allclose(numpy(replaced.bias), mean @ numpy(plain.kernel)[0, 0], rtol=1e-4, atol=1e-6)


def test_an_output_that_comes_out_of_a_nested_model():
    inputs, pictures = keras.Input((6, 6, 3)), keras.Input((6, 6, 3))
    backbone = keras.Model(inputs, fused(inputs), name="net")
    check(keras.Model(pictures, backbone(pictures)), [], ["net"])


class Standardized(layers.Conv2D):
    def call(self, inputs):
        kernel = self.kernel - keras.ops.mean(self.kernel, (0, 1, 2), keepdims=True)
        return keras.ops.conv(inputs, kernel, padding="valid")


class Doubled(layers.Dropout):
    def call(self, inputs, training=False):
        return 2.0 * inputs


@pytest.mark.parametrize("reader", [lambda: Standardized(3, 3, name="reader"), lambda: Doubled(0.5, name="reader")])
def test_what_a_subclass_does_is_not_guessed(reader):
    inputs = keras.Input((6, 6, 3))
    check(keras.Model(inputs, reader()(fused(inputs))), [], ["reader"])


def test_a_bias_that_is_added_starts_at_zero_and_free():
    inputs = keras.Input((6, 6, 3))
    arguments = {"bias_initializer": "ones", "bias_regularizer": "l2", "bias_constraint": "non_neg", "use_bias": False}
    model = keras.Model(inputs, layers.Dense(5, name="reader", **arguments)(fused(inputs)))
    check(model, ["reader"])
    reader = kp.replace_normalization(model, compensate=True).get_layer("reader")
    assert reader.bias_regularizer is None and reader.bias_constraint is None


@pytest.mark.parametrize("change", [lambda layer: layer.enable_lora(2), lambda layer: layer.quantize("int8")])
def test_kernels_that_are_not_what_is_stored(change):
    inputs = keras.Input((6, 6, 3))
    model = keras.Model(inputs, layers.Dense(5, name="reader")(fused(inputs)))
    change(model.get_layer("reader"))
    report = check(model, [], ["reader"])
    assert report.uncompensated[0].reason == "Dense whose kernel is quantized or adapted"
