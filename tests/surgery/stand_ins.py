"""A layer that computes what a batch normalization and its activation do at inference, so that surgery can be exact."""

import keras
import numpy as np


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
