"""A layer that computes what a batch normalization and its activation do at inference, so that surgery can be exact."""

import keras
import numpy as np

import keras_proxynorm as kp


@keras.saving.register_keras_serializable("keras_proxynorm_tests")
class StandIn(keras.layers.BatchNormalization):
    """Batch normalization with its moving statistics, and the activation."""

    def __init__(self, *, activation=None, axis=-1, epsilon=1e-3, center=True, scale=True, **kwargs):
        super().__init__(axis=axis, epsilon=epsilon, center=center, scale=scale, **kwargs)
        self.activation = keras.activations.get(activation)

    def call(self, inputs, mask=None):
        return self.activation(super().call(inputs, training=False, mask=mask))

    def get_config(self):
        return {**super().get_config(), "activation": keras.activations.serialize(self.activation)}


def randomize(model, seed=0):
    """Gives every normalization scales, offsets and moving statistics that a mistake would show in."""
    rng = np.random.default_rng(seed)
    for weight in model.weights:
        if weight.name in ("gamma", "moving_variance"):
            weight.assign(rng.uniform(0.5, 1.5, weight.shape))
        elif weight.name in ("beta", "moving_mean"):
            weight.assign(rng.normal(0.0, 0.3, weight.shape))
    return model


def image(*shape, seed=0):
    return np.random.default_rng(seed).uniform(0, 255, shape).astype("float32")


def outputs(model, x):
    """The outputs at inference, operation by operation: a compiled graph may sum in another order."""
    return [keras.ops.convert_to_numpy(output) for output in keras.tree.flatten(model(x, training=False))]


def assert_same_outputs(model, other, x):
    for ours, theirs in zip(outputs(model, x), outputs(other, x), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def small_model():
    """A convolution, BN and ReLU with the usual names; a BN that feeds a sum; a dense head."""
    inputs = keras.Input((8, 8, 3), name="image")
    x = keras.layers.Conv2D(8, 3, use_bias=False, name="conv")(inputs)
    x = keras.layers.BatchNormalization(name="conv_bn")(x)
    x = keras.layers.ReLU(name="conv_relu")(x)
    y = keras.layers.Conv2D(8, 1, use_bias=False, name="branch")(x)
    y = keras.layers.BatchNormalization(name="branch_bn")(y)
    x = keras.layers.Add(name="sum")([x, y])
    x = keras.layers.GlobalAveragePooling2D(name="pool")(x)
    return randomize(keras.Model(inputs, keras.layers.Dense(3, name="head")(x), name="small"))


def conv_bn(x, name, filters=8, **kwargs):
    x = keras.layers.Conv2D(filters, 3, padding="same", use_bias=False, name=name)(x)
    return keras.layers.BatchNormalization(name=f"{name}_bn", **kwargs)(x)


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


def nested():
    backbone = small_model()
    inputs = keras.Input((8, 8, 3), name="picture")
    x = backbone(inputs, training=False)
    x = keras.layers.Dense(8, use_bias=False, name="project")(x)
    x = keras.layers.BatchNormalization(name="project_bn")(x)
    return keras.Model(inputs, keras.layers.Activation("silu", name="project_silu")(x), name="nested")
