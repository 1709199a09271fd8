"""What replace_normalization refuses, and how it says so."""

import functools

import keras
import pytest
from surgery.stand_ins import StandIn, small_model

import keras_proxynorm as kp

pytestmark = pytest.mark.filterwarnings("error::UserWarning:keras_proxynorm", "error:.*not reached")

BatchNormalization = keras.layers.BatchNormalization


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
        (small_model, {"to": "group"}, r"`to` must be one of .*'group_norm', .* Received: to='group'"),
        (small_model, {"to": lambda name: None}, "`to` must be a function that takes the keyword argument `dtype`"),
        (small_model, {"to": lambda name, dtype: None}, "`to` must be a function that returns a new Keras layer"),
        (small_model, {"weights": "both"}, r"`weights` must be one of 'copy', 'fresh'. Received: weights='both'"),
        (small_model, {"groups": 0}, r"`groups` must be a positive integer. Received: groups=0"),
        (small_model, {"groups": 2.0}, r"`groups` must be a positive integer. Received: groups=2.0"),
        (small_model, {"min_channels_per_group": True}, "`min_channels_per_group` must be a positive integer"),
        (
            small_model,
            {"layers": "conv_nb"},
            "`layers` must be names, paths, classes or instances of normalizations .* no normalization 'conv_nb'",
        ),
        (
            small_model,
            {"layers": "conv_relu"},
            "`layers` must be names, paths, classes or instances of normalizations .* no normalization 'conv_relu'",
        ),
        (
            small_model,
            {"layers": keras.layers.ReLU},
            "`layers` must be names, paths, classes or instances of normalizations",
        ),
        (
            small_model,
            {"layers": BatchNormalization(name="x")},
            "`layers` must be names, paths, classes or instances of normalizations",
        ),
        (small_model, {"layers": [["conv_bn"]]}, r"no normalization \['conv_bn'\]"),
        (small_model, {"layers": 3}, "`layers` must be names, paths, classes or instances of normalizations"),
        (small_model, {"center": "x"}, "`center` must be one of None, True, False. Received: center='x'"),
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
