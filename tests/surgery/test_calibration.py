"""With `calibrate`, the new model does on that data, channel by channel, what the old one does."""

import keras
import numpy as np
import pytest
from backends import numpy
from surgery.stand_ins import image, nested, outputs, randomize, small_model

import keras_proxynorm as kp

layers = keras.layers
TARGETS = ["group_norm_proxy", "layer_norm_proxy", "group_norm", "layer_norm", "instance_norm"]


def network(padding="valid", activation="relu", gate=False, axis=-1):
    """Convolutions with batch norm and activation, a pooling, and a gate if asked for."""
    x = inputs = keras.Input((12, 12, 3))
    for i, width in enumerate((8, 12, 8)):
        x = layers.Conv2D(width, 3, padding=padding, use_bias=False, name=f"conv{i}")(x)
        x = layers.BatchNormalization(axis=axis, name=f"bn{i}")(x)
        x = layers.Activation(activation, name=f"act{i}")(x)
        if gate and i == 1:
            y = layers.GlobalAveragePooling2D(keepdims=True)(x)
            y = layers.Conv2D(width, 1, activation="sigmoid", name="gate")(y)
            x = layers.Multiply()([x, y])
    x = layers.GlobalAveragePooling2D()(layers.AveragePooling2D(2)(x))
    return randomize(keras.Model(inputs, layers.Dense(5, name="head")(x)))


def data(count=4, size=12, seed=0):
    return image(count, size, size, 3, seed=seed) / 100 - 1


def relative_difference(model, source, x):
    (ours,), (theirs,) = outputs(model, x), outputs(source, x)
    return np.abs(ours - theirs).max() / np.ptp(theirs)


def input_of(model, name, x):
    """The input of a layer, found by cutting the model there."""
    return numpy(keras.Model(model.input, model.get_layer(name).input)(x, training=False)).astype("float64")


def channel_moments(x):
    return x.mean((0, 1, 2)), x.std((0, 1, 2))


@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("to", ["group_norm_proxy", "instance_norm"])
def test_exact_with_the_statistics_of_one_sample(to, activation):
    """Instance norm of one sample is batch norm with other scales and offsets: calibration finds these."""
    source = network(activation=activation)
    x = data(1)
    kwargs = {"groups": 12, "min_channels_per_group": 1, "epsilon": 1e-7} if to == "group_norm_proxy" else {}
    kwargs["epsilon"] = 1e-7
    before = kp.replace_normalization(source, to=to, **kwargs)
    model = kp.replace_normalization(source, to=to, calibrate=x, **kwargs)
    assert relative_difference(before, source, x) > 0.05
    assert relative_difference(model, source, x) < 2e-4


@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize("to", TARGETS)
def test_moments_of_what_is_activated(to, padding):
    source, x = network(padding), data(6)
    model = kp.replace_normalization(source, to=to, groups=4, calibrate=x)
    for i in range(3):
        wanted = channel_moments(input_of(source, f"act{i}", x))
        layer = model.get_layer(f"act{i}")
        if "proxy" in to:
            normalized = numpy(layer.normalize_inputs(input_of(model, f"act{i}", x).astype("float32"))).astype(
                "float64"
            )
            found = channel_moments(numpy(layer.gamma) * normalized + numpy(layer.beta))
            np.testing.assert_allclose(numpy(layer.proxy_mean), channel_moments(normalized)[0], atol=2e-5)
            np.testing.assert_allclose(numpy(layer.proxy_stddev), channel_moments(normalized)[1], atol=2e-5)
        else:
            found = channel_moments(input_of(model, f"act{i}", x))
        np.testing.assert_allclose(found, wanted, atol=1e-4)


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize("to", TARGETS[:4])
def test_nearer_to_the_old_model_on_other_data(to, padding, gate):
    source, x, others = network(padding, gate=gate), data(16), data(16, seed=1)
    before = kp.replace_normalization(source, to=to, groups=4)
    model = kp.replace_normalization(source, to=to, groups=4, calibrate=x)
    assert relative_difference(model, source, others) < 0.5 * relative_difference(before, source, others)


def test_negative_and_zero_scales():
    source, x = network(), data(6)
    gamma = source.get_layer("bn0").gamma
    gamma.assign(np.where(np.arange(8) < 3, -1.5, np.where(np.arange(8) < 5, 0.0, 0.7)))
    model = kp.replace_normalization(source, calibrate=x)
    scale = numpy(model.get_layer("act0").gamma)
    assert (scale[:3] < 0).all() and (np.abs(scale[3:5]) < 1e-5).all() and (scale[5:] > 0).all()
    assert np.isfinite(outputs(model, x)).all()


def test_constant_channels_keep_finite_scales():
    source, x = network(), data(6)
    kernel = np.array(numpy(source.get_layer("conv0").kernel))
    kernel[..., :2] = 0
    source.get_layer("conv0").kernel.assign(kernel)
    model = kp.replace_normalization(source, calibrate=x)
    assert np.abs(numpy(model.get_layer("act0").gamma)).max() < 50
    assert np.isfinite(outputs(model, x)).all()


def test_without_scale_and_offset():
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(8, 3, name="conv")(inputs)
    x = layers.ReLU(name="act")(layers.BatchNormalization(center=False, scale=False, name="bn")(x))
    source, x = keras.Model(inputs, x), data(6, 8)
    layer = kp.replace_normalization(source, calibrate=x).get_layer("act")
    assert layer.gamma is None and layer.beta is None and np.abs(numpy(layer.proxy)).max() > 0.01


def test_the_old_model_is_as_it_was():
    source, x = network(), data()
    weights = source.get_weights()
    kp.replace_normalization(source, calibrate=x)
    for before, after in zip(weights, source.get_weights(), strict=True):
        np.testing.assert_array_equal(before, after)
    assert all("call" not in vars(layer) for layer in source.layers)


def test_nested_split_frozen_and_plain():
    source = nested()
    source.get_layer("small").get_layer("conv_bn").trainable = False
    x = image(6, 8, 8, 3) / 100
    model, report = kp.replace_normalization(source, calibrate=x, return_report=True)
    assert all(layer.calibrated for layer in report.layers)
    assert "calibrated" in str(report) and report.to_dict()["layers"][0]["calibrated"]
    conv, branch = (model.get_layer("small").get_layer(name) for name in ("conv_relu", "branch_bn"))
    assert not conv.trainable and branch.proxy is None
    old = source.get_layer("small").get_layer("branch_bn")
    assert np.abs(numpy(branch.gamma) - numpy(old.gamma)).max() > 0.01


def test_called_twice():
    inputs = keras.Input((8, 8, 3))
    conv, norm = layers.Conv2D(3, 1), layers.BatchNormalization()
    model = randomize(keras.Model(inputs, norm(conv(norm(conv(inputs))))))
    x = data(6, 8)
    replaced = kp.replace_normalization(model, calibrate=x)
    assert np.isfinite(outputs(replaced, x)).all()


def test_time_distributed():
    inner = small_model()
    inputs = keras.Input((2, 8, 8, 3))
    source = keras.Model(inputs, layers.TimeDistributed(inner)(inputs))
    x = image(3, 2, 8, 8, 3) / 100
    _, report = kp.replace_normalization(source, calibrate=x, return_report=True)
    assert all(layer.calibrated for layer in report.layers)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision(policy):
    keras.config.set_dtype_policy(policy)
    try:
        source = network("same")
    finally:
        keras.config.set_dtype_policy("float32")
    x = data(8)
    before = kp.replace_normalization(source, groups=4)
    model = kp.replace_normalization(source, groups=4, calibrate=x)
    assert model.get_layer("act0").gamma.dtype == "float32"
    assert relative_difference(model, source, x) < 0.5 * relative_difference(before, source, x)


def test_saved_and_loaded(tmp_path):
    x = data()
    model = kp.replace_normalization(network("same"), calibrate=x)
    model.save(tmp_path / "model.keras")
    np.testing.assert_array_equal(outputs(keras.models.load_model(tmp_path / "model.keras"), x), outputs(model, x))


def test_trains():
    model = kp.replace_normalization(network("same"), calibrate=data(8))
    model.compile("sgd", "mse")
    before = model.evaluate(data(8), np.zeros((8, 5)), verbose=0)
    model.fit(data(8), np.zeros((8, 5)), epochs=5, verbose=0)
    assert model.evaluate(data(8), np.zeros((8, 5)), verbose=0) < before


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"weights": "fresh"}, "`calibrate`.*weights='copy'.*weights='fresh'"),
        ({"to": "batch_group_norm"}, "`calibrate`.*group, layer and instance norm.*batch_group_norm"),
        ({"to": "weight_standardization"}, "`calibrate`.*group, layer and instance norm.*weight_standardization"),
    ],
)
def test_bad_input(kwargs, message):
    with pytest.raises(ValueError, match=message):
        kp.replace_normalization(network(), calibrate=data(), **kwargs)


def test_data_that_the_model_does_not_take():
    with pytest.raises(ValueError, match="`calibrate` must be a batch of inputs of the model.*shape \\(4, 5\\)"):
        kp.replace_normalization(network(), calibrate=np.zeros((4, 5), "float32"))


def test_data_without_samples():
    with pytest.raises(ValueError, match="`calibrate` must be a batch of inputs of the model"):
        kp.replace_normalization(network(), calibrate=np.zeros((0, 12, 12, 3), "float32"))


def test_datasets_are_refused():
    with pytest.raises(ValueError, match="`calibrate` must be a batch of inputs of the model"):
        kp.replace_normalization(network(), calibrate=(batch for batch in [data()]))
