"""What is not understood is left alone, with a reason that the report and a warning give."""

import functools

import keras
import numpy as np
import pytest
from backends import numpy
from keras import layers, ops
from surgery.stand_ins import StandIn, assert_same_outputs, found, image, randomize

import keras_proxynorm as kp
from keras_proxynorm import baselines
from keras_proxynorm.surgery.targets import TARGETS

BatchNormalization = layers.BatchNormalization
PER_SAMPLE = ["group_norm_proxy", "layer_norm_proxy", "group_norm", "layer_norm", "instance_norm", "evonorm_s0"]


@keras.saving.register_keras_serializable("keras_proxynorm_tests")
class BatchNormAct(BatchNormalization):
    def call(self, inputs, training=None, mask=None):
        return ops.silu(super().call(inputs, training=training, mask=mask))


@keras.saving.register_keras_serializable("keras_proxynorm_tests")
class OtherMoments(BatchNormalization):
    def _moments(self, inputs, mask):
        mean, variance = super()._moments(inputs, mask)
        return mean + 1, variance


@keras.saving.register_keras_serializable("keras_proxynorm_tests")
class ConditionalBN(BatchNormalization):
    def build(self, input_shape):
        super().build(input_shape)
        self.table = self.add_weight(shape=(10, input_shape[-1]), name="table", initializer="random_normal")

    def call(self, inputs, label=None, training=None, mask=None):
        y = super().call(inputs, training=training)
        return y * (1 + ops.take(self.table, label, axis=0)[:, None, None])


@keras.saving.register_keras_serializable("keras_proxynorm_tests")
class WithArguments(BatchNormalization):
    """A subclass that has another constructor and nothing else."""

    def __init__(self, momentum=0.5, **kwargs):
        super().__init__(momentum=momentum, **kwargs)


@keras.saving.register_keras_serializable("keras_proxynorm_tests")
class LeakyConv(layers.Conv2D):
    def call(self, inputs):
        return ops.leaky_relu(super().call(inputs))


def conv_norm_relu(norm, **call):
    inputs = keras.Input((8, 8, 3))
    x = norm(layers.Conv2D(8, 3, use_bias=False, name="conv")(inputs), **call)
    return randomize(keras.Model(inputs, layers.Conv2D(4, 1)(layers.ReLU(name="relu")(x))))


def left_alone(model, reason, to="group_norm_proxy", **kwargs):
    """Checks that the one normalization is left alone, and the function is the same."""
    with pytest.warns(UserWarning, match="Left alone: 1 of 1 normalizations") as warned:
        replaced, report = kp.replace_normalization(model, to=to, return_report=True, **kwargs)
    (layer,) = report.layers
    assert layer.action == "left alone" and reason in layer.reason
    assert any(reason in str(warning.message) for warning in warned)
    assert report.not_done == {layer.path: layer.reason} and reason in str(report)
    return replaced


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("norm", [BatchNormAct, OtherMoments])
def test_a_subclass_that_overrides_a_method(to, norm):
    method = "call" if norm is BatchNormAct else "_moments"
    model = conv_norm_relu(norm(name="norm"))
    replaced = left_alone(model, f"a subclass that overrides {method}", to)
    assert type(replaced.get_layer("norm")) is norm
    assert_same_outputs(model, replaced, image(2, 8, 8, 3))


def test_a_subclass_of_another_constructor_is_understood():
    _, report = kp.replace_normalization(conv_norm_relu(WithArguments(name="norm")), return_report=True)
    assert found(report, "norm").action == "fused" and report.warnings == ()


@pytest.mark.parametrize("to", ["cross_iteration_batch_norm", "weight_standardization", "conv_norm"])
def test_a_subclass_of_a_linear_layer(to):
    inputs = keras.Input((8, 8, 3))
    x = BatchNormalization(name="norm")(LeakyConv(8, 3, use_bias=False, name="conv")(inputs))
    model = keras.Model(inputs, layers.ReLU()(x))
    assert_same_outputs(model, left_alone(model, "which is a subclass that overrides call", to), image(2, 8, 8, 3))


def test_a_further_tensor():
    picture, label = keras.Input((8, 8, 3), name="image"), keras.Input((), dtype="int32", name="label")
    x = ConditionalBN(name="norm")(layers.Conv2D(8, 3)(picture), label=label)
    model = randomize(keras.Model([picture, label], layers.GlobalAveragePooling2D()(layers.ReLU()(x))))
    replaced = left_alone(model, "a subclass that overrides build, call")
    z = image(2, 8, 8, 3)
    outputs = [numpy(replaced([z, np.array(labels)])) for labels in ([0, 0], [1, 2])]
    assert np.abs(outputs[0] - outputs[1]).max() > 0
    np.testing.assert_array_equal(outputs[0], numpy(model([z, np.array([0, 0])])))


def test_a_tensor_that_the_new_layer_does_not_take():
    steps, mask = keras.Input((5, 8)), keras.Input((5,), dtype="bool")
    model = keras.Model([steps, mask], layers.ReLU()(BatchNormalization(name="norm")(steps, mask=mask)))
    left_alone(model, "it reads the tensor `mask`, which GroupNormalization does not take", "group_norm")
    _, report = kp.replace_normalization(model, return_report=True)
    assert report.replaced == 1 and report.warnings == ()


@pytest.mark.parametrize("to", ["group_norm_proxy", "weight_standardization", "cross_iteration_batch_norm", StandIn])
def test_calls_by_keyword_are_calls(to):
    def network(by_keyword):
        call = (lambda layer, x: layer(inputs=x)) if by_keyword else (lambda layer, x: layer(x))
        inputs = keras.Input((8, 8, 3), name="image")
        x = call(layers.Conv2D(8, 3, use_bias=False, name="conv"), inputs)
        x = call(layers.ReLU(name="relu"), call(BatchNormalization(name="norm"), x))
        y = call(layers.Multiply(name="product"), [x, call(layers.GlobalAveragePooling2D(keepdims=True, name="p"), x)])
        return randomize(keras.Model(inputs, call(layers.Conv2D(2, 1, name="head"), y)))

    keras.utils.set_random_seed(0)
    by_keyword, by_position = network(True), network(False)
    by_keyword.set_weights(by_position.get_weights())
    # Masks and random weights aside, the reports and the models are the same.
    keras.utils.set_random_seed(1)
    first, report = kp.replace_normalization(by_keyword, to=to, return_report=True)
    keras.utils.set_random_seed(1)
    second, expected = kp.replace_normalization(by_position, to=to, return_report=True)
    assert report.layers == expected.layers and report.replaced == 1 and report.warnings == expected.warnings == ()
    assert_same_outputs(first, second, image(2, 8, 8, 3))


def test_adapters_come_through_as_they_are():
    model = keras.Sequential(
        [keras.Input((8, 8, 3)), layers.Conv2D(8, 3, use_bias=False), BatchNormalization(), layers.ReLU()]
    )
    for layer in (layers.GlobalAveragePooling2D(), layers.Dense(4, name="head")):
        model.add(layer)
    for layer in (model.layers[0], model.get_layer("head")):
        layer.enable_lora(2)
        layer.lora_kernel_b.assign(0.1 * np.ones(layer.lora_kernel_b.shape))
    replaced = kp.replace_normalization(model, to=StandIn)
    assert_same_outputs(model, replaced, image(2, 8, 8, 3))
    old, new = model.get_layer("head"), replaced.get_layer("head")
    for name in ("_kernel", "lora_kernel_a", "lora_kernel_b"):
        np.testing.assert_array_equal(numpy(getattr(new, name)), numpy(getattr(old, name)))
    assert [w.path.split("/")[-1] for w in new.trainable_weights] == ["bias", "lora_kernel_a", "lora_kernel_b"]


@pytest.mark.parametrize("mode", ["int8", "float8"])
def test_quantized_layers_come_through_as_they_are(mode):
    inputs = keras.Input((8,))
    x = layers.ReLU()(BatchNormalization()(layers.Dense(16, name="dense")(inputs)))
    model = keras.Model(inputs, layers.Dense(4, name="head")(x))
    for name in ("dense", "head"):
        model.get_layer(name).quantize(mode)
    replaced = kp.replace_normalization(model, to=StandIn)
    assert replaced.get_layer("dense").quantization_mode == mode
    for name in ("dense", "head"):
        olds, news = ({weight.name: numpy(weight) for weight in x.get_layer(name).weights} for x in (model, replaced))
        assert olds.keys() == news.keys()
        for weight, value in olds.items():
            np.testing.assert_array_equal(news[weight], value)
    assert_same_outputs(model, replaced, image(2, 8) / 255)


@pytest.mark.parametrize("mode", ["full", "activations"])
def test_rematerialization_comes_through(mode):
    with keras.RematScope(mode=mode):
        model = conv_norm_relu(BatchNormalization(name="norm"))
    replaced = kp.replace_normalization(model)
    assert model.get_layer("conv")._remat_mode.mode == mode
    assert {layer._remat_mode and layer._remat_mode.mode for layer in replaced.layers[1:]} == {mode}


def pooled(keepdims):
    inputs = keras.Input((8, 8, 6))
    x = layers.GlobalAveragePooling2D(keepdims=keepdims)(inputs)
    x = layers.Conv2D(8, 1, use_bias=False)(x) if keepdims else layers.Dense(8, use_bias=False)(x)
    return keras.Model(inputs, layers.ReLU()(BatchNormalization(name="norm")(x)))


@pytest.mark.parametrize("keepdims", [True, False])
@pytest.mark.parametrize("to", ["instance_norm", "filter_response_norm"])
def test_statistics_of_one_value(to, keepdims):
    model = pooled(keepdims)
    replaced = left_alone(model, "each statistic would be one value", to)
    assert_same_outputs(model, replaced, image(4, 8, 8, 6))


@pytest.mark.parametrize("groups", [8, 4])
def test_groups_of_one_channel_without_positions(groups):
    options = {"groups": groups, "min_channels_per_group": 1}
    if groups == 8:
        left_alone(pooled(True), "each statistic would be one value", **options)
    else:
        assert kp.replace_normalization(pooled(True), return_report=True, **options)[1].replaced == 1


@pytest.mark.parametrize("to", [*PER_SAMPLE[:5], "batch_group_norm"])
def test_the_features_of_a_table_are_not_mixed(to):
    columns = [keras.Input((4,)), keras.Input((2,))]
    x = layers.Dense(16)(BatchNormalization(name="inputs_bn")(layers.Concatenate()(columns)))
    model = randomize(keras.Model(columns, layers.Dense(1)(layers.ReLU()(BatchNormalization(name="inner")(x)))))
    rng = np.random.default_rng(0)
    rows = [rng.normal(size=(64, n)).astype("float32") * [1, 10, 1e3, 1e5][:n] for n in (4, 2)]
    with pytest.warns(UserWarning, match="Left alone: . of 2 normalizations: 'inputs_bn'"):
        replaced, report = kp.replace_normalization(model, to=to, return_report=True)
    assert type(replaced.get_layer("inputs_bn")) is BatchNormalization
    assert (found(report, "inner").action == "left alone") == (to == "instance_norm")
    assert np.ptp(numpy(replaced(rows))) > 0


@pytest.mark.parametrize("to", ["ghost_batch_norm", "variance_norm", "group_norm_proxy"])
def test_an_image_may_be_normalized_first(to):
    model = keras.Sequential([keras.Input((8, 8, 3)), BatchNormalization(name="first"), layers.Conv2D(4, 3)])
    _, report = kp.replace_normalization(model, to=to, return_report=True)
    assert report.replaced == 1


@pytest.mark.parametrize("separate", [True, False])
def test_an_activation_that_comes_before(separate):
    inputs = x = keras.Input((16, 16, 3))
    for i, width in enumerate((8, 16)):
        x = layers.Conv2D(width, 3, activation=None if separate else "relu", name=f"conv{i}")(x)
        x = layers.ReLU(name=f"relu{i}")(x) if separate else x
        x = BatchNormalization(name=f"norm{i}")(x)
    model = keras.Model(inputs, layers.Dense(2)(layers.GlobalAveragePooling2D()(x)))
    with pytest.warns(UserWarning, match="2 normalizations follow their activation.*no layer of group_norm_proxy has"):
        replaced, report = kp.replace_normalization(model, return_report=True)
    assert found(report, "norm0").reason == f"its activation comes before it, in {'relu' if separate else 'conv'}0"
    assert report.count("plain") == 2 and not [w for w in replaced.weights if w.name == "proxy"]
    # What has no proxy anyway needs no advice.
    assert kp.replace_normalization(model, to="group_norm", return_report=True)[1].warnings == ()


MASKED = ["group_norm_proxy", "layer_norm_proxy", "ghost_batch_norm", "cross_iteration_batch_norm", "evonorm_b0"]


@pytest.mark.parametrize("to", TARGETS)
def test_masks_pass(to):
    tokens = keras.Input((None,), dtype="int32")
    x = layers.Dense(16, use_bias=False)(layers.Embedding(50, 16, mask_zero=True)(tokens))
    model = keras.Model(tokens, layers.LSTM(4)(layers.ReLU()(BatchNormalization(name="norm")(x))))
    rng = np.random.default_rng(0)
    ids = np.where(np.arange(12) < rng.integers(3, 9, size=(4, 1)), rng.integers(1, 50, size=(4, 12)), 0)
    longer = np.pad(ids, ((0, 0), (0, 8)))  # the same sequences, padded further
    if to == "conv_norm":
        left_alone(model, "which is a Dense", to)
        return
    replaced, report = kp.replace_normalization(model, to=to, return_report=True)
    assert report.replaced == 1
    lstm = replaced.layers[-1]
    seen = []
    call = lstm.call
    lstm.call = lambda *args, mask=None, **kwargs: seen.append(mask) or call(*args, mask=mask, **kwargs)
    short, long = (numpy(replaced(x, training=False)) for x in (ids, longer))
    np.testing.assert_array_equal(numpy(seen[0]), ids != 0)
    if to in ("ghost_batch_norm", "cross_iteration_batch_norm", "variance_norm", "weight_standardization"):
        np.testing.assert_allclose(short, long, atol=1e-6)
    if to in ("ghost_batch_norm", "cross_iteration_batch_norm"):
        np.testing.assert_allclose(short, numpy(model(ids, training=False)), atol=1e-5)


def make_variance(**kwargs):
    return baselines.VarianceNormalization(**kwargs)


@pytest.mark.parametrize(
    "to",
    [
        baselines.VarianceNormalization,
        functools.partial(baselines.VarianceNormalization, momentum=0.7),
        functools.partial(functools.partial(baselines.VarianceNormalization, momentum=0.6), momentum=0.7),
    ],
)
def test_a_partial_gets_the_arguments_of_its_class(to):
    norm = BatchNormalization(name="norm", center=False, scale=False, momentum=0.8, epsilon=0.25)
    replaced = kp.replace_normalization(conv_norm_relu(norm), to=to).get_layer("norm")
    assert (replaced.center, replaced.scale, replaced.epsilon) == (False, False, 0.25)
    assert replaced.momentum == (0.8 if to is baselines.VarianceNormalization else 0.7)


def test_initializers_and_regularizers_reach_a_partial():
    norm = BatchNormalization(name="norm", gamma_initializer="zeros", beta_regularizer="l2")
    to = functools.partial(baselines.GhostBatchNormalization, examples_per_group=4)
    replaced = kp.replace_normalization(conv_norm_relu(norm), to=to, weights="fresh").get_layer("norm")
    assert numpy(replaced.gamma).max() == 0 and replaced.beta_regularizer is not None


CALIBRATED = ("group_norm_proxy", "layer_norm_proxy", "group_norm", "layer_norm", "instance_norm")


@pytest.mark.parametrize("weights", ["copy", "fresh"])
@pytest.mark.parametrize("option", ["compensate", "calibrate"])
@pytest.mark.parametrize("to", [*TARGETS, StandIn, kp.GroupNormProxy])
def test_every_option_with_every_target(to, option, weights):
    model = conv_norm_relu(BatchNormalization(name="norm"))
    kwargs = {"to": to, "weights": weights, option: True if option == "compensate" else image(4, 8, 8, 3)}
    with_proxy = to is kp.GroupNormProxy or to in ("group_norm_proxy", "layer_norm_proxy")
    works = with_proxy if option == "compensate" else with_proxy or to in CALIBRATED
    if works and weights == "copy":
        assert kp.replace_normalization(model, return_report=True, **kwargs)[1].replaced == 1
    else:
        with pytest.raises(ValueError, match=f"Argument `{option}`"):
            kp.replace_normalization(model, **kwargs)
