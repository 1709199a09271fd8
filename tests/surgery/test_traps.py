"""The traps that lie in Keras models for replace_normalization, one test each."""

import keras
import numpy as np
import pytest
from backends import numpy, tensorflow_only
from surgery.stand_ins import (
    StandIn,
    assert_same_outputs,
    conv_bn,
    exact,
    found,
    image,
    outputs,
    randomize,
    small_model,
)

import keras_proxynorm as kp

pytestmark = pytest.mark.filterwarnings("error::UserWarning:keras_proxynorm", "error:.*not reached")

BatchNormalization = keras.layers.BatchNormalization
LAYER_NORM = keras.layers.LayerNormalization


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
    assert found(report, "a_bn").reason == "scaled (Scaled) cannot be fused with it"


@pytest.mark.parametrize(
    ("activation", "reason"),
    [
        (keras.layers.Softmax(name="act"), "act (Softmax) cannot be fused with it"),
        (keras.layers.PReLU(shared_axes=[1, 2], name="act"), "act (PReLU) cannot be fused with it"),
        (lambda x: keras.ops.gelu(x, approximate=True), "(Gelu) cannot be fused with it"),
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


def test_trap_a_shared_activation_that_is_an_output_in_one_call():
    relu = keras.layers.ReLU(name="relu")
    inputs = keras.Input((8, 8, 3))
    x = relu(conv_bn(inputs, "a"))
    model = keras.Model(inputs, relu(conv_bn(x, "b")))
    replaced, report = exact(model)
    assert (found(report, "a_bn").action, found(report, "b_bn").action) == ("fused", "plain")
    assert found(report, "b_bn").reason == "relu makes an output of the model, and is called elsewhere, too"
    assert replaced.output_names == ["relu"] and float(outputs(replaced, image(1, 8, 8, 3))[0].min()) >= 0


def test_trap_a_shared_normalization_that_is_activated_in_one_call():
    inputs = keras.Input((8, 8, 8))
    norm = BatchNormalization(name="norm")
    x = keras.layers.ReLU(name="relu")(norm(inputs))
    y = norm(keras.layers.Conv2D(8, 3, padding="same", name="conv")(x))
    replaced, report = exact(keras.Model(inputs, keras.layers.Dense(2, name="head")(y)))
    assert found(report, "norm").action == "split" and found(report, "norm").names == ("relu", "norm")
    assert {"relu", "norm"} <= {layer.name for layer in replaced.layers}


def test_trap_an_activation_that_is_called_twice_on_one_tensor():
    relu = keras.layers.ReLU(name="relu")
    inputs = keras.Input((8, 8, 3))
    y = conv_bn(inputs, "a")
    model = keras.Model(inputs, [relu(y), keras.layers.Dense(2, name="head")(relu(y))])
    replaced, report = exact(model)
    assert replaced.output_names == ["relu", "head"] and found(report, "a_bn").action == "split"
    assert set(found(report, "a_bn").names) <= {layer.name for layer in replaced.layers}


def test_trap_reports_are_true():
    inputs = keras.Input((8, 8, 8))
    x = BatchNormalization(name="norm")(keras.layers.Conv2D(8, 3, name="conv")(inputs))
    model = keras.Model(inputs, keras.layers.Activation("tanh", name="tanh")(x))
    _, report = kp.replace_normalization(model, to="evonorm_s0", return_report=True)
    assert found(report, "norm").action == "fused" and found(report, "norm").activation is None
    assert found(report, "norm").reason == "a nonlinearity of its own takes the place of tanh"
    to = lambda name, dtype: kp.baselines.BatchGroupNormalization(4, name=name, dtype=dtype)  # noqa: E731
    _, report = kp.replace_normalization(model, to=to, return_report=True)
    assert found(report, "norm").weights == ("gamma", "beta")
    model.get_layer("norm").trainable = False
    with pytest.warns(UserWarning, match="are frozen with these"):
        replaced = kp.replace_normalization(model, to="weight_standardization")
    assert replaced.trainable_weights == []
