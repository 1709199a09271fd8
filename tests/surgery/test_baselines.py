"""The normalizations of other papers in the place of batch norm, also those that contain the linear layer in front."""

import keras
import numpy as np
import pytest
from backends import numpy

import keras_proxynorm as kp
from keras_proxynorm import baselines as bl
from keras_proxynorm.surgery.targets import TARGETS, Target

CONTAINING = [name for name in TARGETS if Target(name, {}).contains_linear]
OTHERS = [name for name in TARGETS if name not in CONTAINING]
# What computes at inference what batch norm computes.
SAME_AT_INFERENCE = ["ghost_batch_norm", "cross_iteration_batch_norm"]


def layers():
    return [
        keras.layers.Conv2D(8, 3, name="conv1", use_bias=False),
        keras.layers.BatchNormalization(name="norm1", epsilon=1e-2, momentum=0.7),
        keras.layers.ReLU(name="relu1"),
        keras.layers.DepthwiseConv2D(3, name="conv2"),
        keras.layers.BatchNormalization(name="norm2"),
        keras.layers.Activation("silu", name="silu2"),
        keras.layers.Flatten(name="flat"),
        keras.layers.Dense(6, name="dense3"),
        keras.layers.BatchNormalization(name="norm3", center=False),
        keras.layers.Dense(3, name="logits"),
    ]


def make_model(kind):
    inputs = keras.Input((9, 9, 3))
    if kind == "sequential":
        model = keras.Sequential([inputs, *layers()])
    else:
        *inside, last = layers()
        x = inputs
        if kind == "nested":
            x = keras.Sequential([keras.Input((9, 9, 3)), *inside], name="backbone")(x)
        else:
            for layer in inside:
                x = layer(x)
        model = keras.Model(inputs, last(x))
    rng = np.random.default_rng(0)
    for weight in model.weights:
        if len(weight.shape) == 1:
            weight.assign(rng.uniform(0.5, 1.5, weight.shape))
    return model


def images(seed=0):
    return np.random.default_rng(seed).standard_normal((8, 9, 9, 3)).astype("float32")


def flat_names(model):
    return [layer.name for layer in model._flatten_layers() if not isinstance(layer, keras.Model)]


@pytest.mark.parametrize(
    "kind", [*(pytest.param(kind, marks=pytest.mark.slow) for kind in ("functional", "sequential")), "nested"]
)
@pytest.mark.parametrize("to", TARGETS)
def test_models_train_and_survive_a_file(to, kind, tmp_path):
    source = make_model(kind)
    before = [numpy(weight.value).copy() for weight in source.weights]
    model, report = kp.replace_normalization(source, to=to, return_report=True)
    # What a method is not for is left alone: layers that are no convolutions, and channels without positions.
    contained = {"conv_norm": ["conv1"], "instance_norm": ["conv1", "conv2"]}.get(to, ["conv1", "conv2", "dense3"])
    contained = ["conv1", "conv2"] if to == "filter_response_norm" else contained
    assert report.replaced == len(contained) and len(report.warnings) == (len(contained) < 3)
    norms = [layer for layer in model._flatten_layers() if isinstance(layer, keras.layers.BatchNormalization)]
    assert len(norms) == 3 - len(contained)
    names = flat_names(model)
    for name in ("conv1", "conv2", "dense3"):
        # One that is contained in another layer is a layer inside.
        assert names.count(name) == 1
    assert ("relu1" in names) and ("norm1" in names) is not Target(to, {}).fuses
    linear = [layer.linear for layer in report.layers if layer.linear is not None]
    assert linear == (contained if to in CONTAINING else [])
    model.compile(keras.optimizers.SGD(1e-3), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(images(), np.arange(8) % 3, batch_size=4, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(numpy(loaded(images())), numpy(model(images())), rtol=1e-5, atol=1e-5)
    for weight, value in zip(source.weights, before, strict=True):
        np.testing.assert_array_equal(numpy(weight.value), value)


@pytest.mark.parametrize("kind", ["functional", "sequential", "nested"])
@pytest.mark.parametrize("to", SAME_AT_INFERENCE)
def test_inference_stays_what_it_was(to, kind):
    """Kernels, scales, offsets, moving averages, epsilons and biases, those of contained layers included."""
    source = make_model(kind)
    model = kp.replace_normalization(source, to=to)
    np.testing.assert_allclose(numpy(model(images())), numpy(source(images())), rtol=1e-4, atol=1e-4)


def test_arguments_come_from_the_old_layer():
    model = kp.replace_normalization(make_model("functional"), to="cross_iteration_batch_norm", window=2)
    norm = model.get_layer("norm1")
    assert (norm.epsilon, norm.momentum, norm.window) == (1e-2, 0.7, 2)
    assert model.get_layer("norm3").beta is None
    assert not norm.layer.use_bias and not model.get_layer("norm2").layer.use_bias


@pytest.mark.parametrize("to", ["filter_response_norm", "evonorm_s0", "evonorm_b0"])
def test_a_nonlinearity_stands_where_an_activation_was(to):
    model = kp.replace_normalization(make_model("functional"), to=to)
    # A response of one value would be its sign.
    names = ("relu1", "silu2") if to == "filter_response_norm" else ("relu1", "silu2", "norm3")
    assert [model.get_layer(name).nonlinearity for name in names] == [True, True, False][: len(names)]


@pytest.mark.parametrize("to, action", [("filter_response_norm", "plain"), ("evonorm_s0", "left alone")])
def test_where_the_activation_cannot_be_contained(to, action):
    """Without its nonlinearity EvoNorm is a scale and an offset, which are no normalization."""
    inputs = keras.Input((8, 8, 3))
    norm = keras.layers.BatchNormalization(name="norm")(keras.layers.Conv2D(8, 3)(inputs))
    two = keras.layers.BatchNormalization()(keras.layers.PReLU(name="prelu")(norm))
    source = keras.Model(inputs, keras.layers.ReLU()(two))
    _, report = kp.replace_normalization(source, to=to, return_report=True)
    assert [layer.action for layer in report.layers] == [action, "fused"]
    assert report.layers[0].reason == "prelu (PReLU) cannot be fused with it"


@pytest.mark.parametrize("groups", [1, 2, 4, 8])
def test_statistics_of_channels_become_those_of_groups(groups):
    """Of channels that each are two values, their mean plus or minus their standard deviation."""
    source = keras.Sequential([keras.Input((2, 8)), keras.layers.BatchNormalization()])
    mean, variance = np.random.default_rng(0).uniform(0.5, 2, (2, 8)).astype("float32")
    source.layers[0].moving_mean.assign(mean)
    source.layers[0].moving_variance.assign(variance)
    norm = kp.replace_normalization(source, to="batch_group_norm", groups=groups, min_channels_per_group=1).layers[0]
    values = np.stack([mean - np.sqrt(variance), mean + np.sqrt(variance)]).T.reshape(groups, -1)
    np.testing.assert_allclose(numpy(norm.moving_mean.value), values.mean(1), rtol=1e-5)
    np.testing.assert_allclose(numpy(norm.moving_variance.value), values.var(1), rtol=1e-5)


def test_statistics_of_parts_of_channels_start_anew():
    source = keras.Sequential([keras.Input((4, 4, 2)), keras.layers.BatchNormalization(name="norm")])

    def factory(**kwargs):
        return bl.BatchGroupNormalization(8, name=kwargs["name"], dtype=kwargs["dtype"])

    with pytest.warns(UserWarning, match="of 'norm' are those of channels. Those of parts start anew"):
        kp.replace_normalization(source, to=factory)


@pytest.mark.parametrize("to", CONTAINING)
def test_frozen_layers_stay_frozen(to):
    name = "relu1" if Target(to, {}).fuses else "norm1"
    source = make_model("functional")
    source.get_layer("conv1").trainable = False
    layer = kp.replace_normalization(source, to=to).get_layer(name)
    assert layer.trainable and not layer.layer.trainable
    assert "beta" in [weight.name for weight in layer.trainable_weights]
    assert "kernel" in [weight.name for weight in layer.non_trainable_weights]
    source.get_layer("norm1").trainable = False
    assert not kp.replace_normalization(source, to=to).get_layer(name).trainable_weights
    source.get_layer("conv1").trainable = True
    with pytest.warns(UserWarning, match="The layers \\['conv1'\\] could be trained.*frozen with these"):
        layer = kp.replace_normalization(source, to=to).get_layer(name)
    assert not layer.trainable_weights


def read_twice(x):
    x = keras.layers.Conv2D(8, 3, padding="same", name="conv")(x)
    return keras.layers.Add()([x, keras.layers.BatchNormalization()(x)])


def behind_an_activation(x):
    return keras.layers.BatchNormalization()(keras.layers.Conv2D(8, 3, activation="relu", name="conv")(x))


def behind_a_pooling(x):
    return keras.layers.BatchNormalization()(keras.layers.MaxPooling2D(name="pool")(x))


def behind_two_kernels(x):
    return keras.layers.BatchNormalization()(keras.layers.SeparableConv2D(8, 3, name="conv")(x))


def shared(x):
    conv = keras.layers.Conv2D(3, 3, padding="same", name="conv")
    return keras.layers.BatchNormalization()(conv(conv(x)))


def another_axis(x):
    return keras.layers.BatchNormalization(axis=1)(keras.layers.Conv2D(8, 3, name="conv")(x))


@pytest.mark.parametrize(
    "network, reason",
    [
        (read_twice, "after conv, which is read by others, too"),
        (behind_an_activation, "after conv, which has the activation relu"),
        (behind_a_pooling, "after pool, which is not a linear layer with a kernel"),
        (behind_two_kernels, "after conv, which is not a linear layer with a kernel"),
        (shared, "after conv, which is called several times"),
        (another_axis, "after conv, which has another channel axis"),
    ],
)
@pytest.mark.parametrize("to", ["cross_iteration_batch_norm", "weight_standardization"])
def test_what_cannot_be_contained_is_left_alone(to, network, reason):
    inputs = keras.Input((8, 8, 3))
    source = keras.Model(inputs, network(inputs))
    with pytest.warns(UserWarning, match="No normalization layer"):
        model, report = kp.replace_normalization(source, to=to, return_report=True)
    assert [(layer.action, layer.reason) for layer in report.layers] == [("left alone", reason)]
    x = np.random.default_rng(0).standard_normal((2, 8, 8, 3)).astype("float32")
    np.testing.assert_array_equal(numpy(model(x)), numpy(source(x)))


def test_an_output_that_is_read_both_ways_has_one_kernel():
    inputs = keras.Input((8, 8, 3))
    y = keras.layers.BatchNormalization(name="norm")(keras.layers.Conv2D(8, 3, name="conv")(inputs))
    source = keras.Model(inputs, keras.layers.Add()([y, keras.layers.ReLU(name="relu")(y)]))
    model, report = kp.replace_normalization(source, to="weight_normalization", return_report=True)
    assert (report.layers[0].action, report.layers[0].names) == ("plain", ("norm",))
    assert report.layers[0].reason == "its output is read without activation, too"
    assert isinstance(model.get_layer("norm"), bl.WeightNormalization) and model.get_layer("relu") is not None


def test_models_with_baselines_are_not_said_to_hide_statistics():
    model = kp.replace_normalization(make_model("functional"), to="variance_norm")
    with pytest.warns(UserWarning) as warned:
        kp.replace_normalization(model)
    messages = [str(warning.message) for warning in warned if warning.category is UserWarning]
    assert len(messages) == 1 and "No normalization layer" in messages[0]


def test_a_class_of_ones_own_that_contains_the_linear_layer():
    @keras.saving.register_keras_serializable("keras_proxynorm_tests")
    class Wrapped(keras.layers.Wrapper):
        def call(self, inputs):
            return self.layer(inputs)

    def factory(layer, name, dtype):
        return Wrapped(layer, name=name, dtype=dtype)

    model = kp.replace_normalization(make_model("functional"), to=factory)
    assert model.get_layer("norm1").layer.name == "conv1"
