"""The networks of the accuracy benchmarks, plain, residual and EfficientNet-style, with any normalization."""

import ast

import keras
from keras import layers

from keras_proxynorm import replace_normalization

__all__ = ["GROUPS", "NETWORKS", "build_model", "efficientnet", "identity", "parse_normalization", "plain", "resnet_v2"]

WIDTHS = (16, 32, 64)
# The first stage has 16 channels, so its groups have two.
GROUPS = {"groups": 8, "min_channels_per_group": 2}
# Lower than Keras's, because with large batches a run has only a few hundred steps.
MOMENTUM = 0.9


def convolution(x, width, kernel_size=3, strides=1, use_bias=False):
    return layers.Conv2D(
        width, kernel_size, strides, padding="same", use_bias=use_bias, kernel_initializer="he_normal"
    )(x)


def normalized(x, activation=None):
    x = layers.BatchNormalization(momentum=MOMENTUM)(x)
    return x if activation is None else layers.Activation(activation)(x)


def with_head(inputs, x, classes):
    return keras.Model(inputs, layers.Dense(classes, name="logits")(layers.GlobalAveragePooling2D()(x)))


def plain(shape, classes, depth=15, use_bias=False):
    """3x3 convolutions in three stages, each followed by batch norm and relu."""
    x = inputs = keras.Input(shape)
    for stage, width in enumerate(WIDTHS):
        for i in range(depth // len(WIDTHS)):
            x = normalized(convolution(x, width, strides=2 if stage and i == 0 else 1, use_bias=use_bias), "relu")
    return with_head(inputs, x, classes)


def resnet_v2(shape, classes, depth=20, use_bias=False):
    """He et al., https://arxiv.org/abs/1603.05027: normalization and relu before each convolution."""
    inputs = keras.Input(shape)
    x = convolution(inputs, WIDTHS[0], use_bias=use_bias)
    for stage, width in enumerate(WIDTHS):
        for i in range((depth - 2) // 6):
            strides = 2 if stage and i == 0 else 1
            y = normalized(x, "relu")
            shortcut = x if x.shape[-1] == width else convolution(y, width, 1, strides, use_bias)
            y = normalized(convolution(y, width, strides=strides, use_bias=use_bias), "relu")
            x = layers.Add()([shortcut, convolution(y, width, use_bias=use_bias)])
    return with_head(inputs, normalized(x, "relu"), classes)


def squeeze_excite(x, units):
    y = layers.GlobalAveragePooling2D(keepdims=True)(x)
    y = layers.Conv2D(units, 1, activation="silu")(y)
    return layers.Multiply()([x, layers.Conv2D(x.shape[-1], 1, activation="sigmoid")(y)])


def efficientnet(shape, classes, use_bias=False):
    """Tan and Le, https://arxiv.org/abs/1905.11946: inverted bottlenecks, depthwise, silu, squeeze and excitation."""
    inputs = keras.Input(shape)
    x = normalized(convolution(inputs, WIDTHS[0], strides=2, use_bias=use_bias), "silu")
    for stage, width in enumerate(WIDTHS):
        for i in range(2):
            strides, narrow = 2 if stage and i == 0 else 1, x.shape[-1]
            y = normalized(convolution(x, 4 * narrow, 1, use_bias=use_bias), "silu")
            y = layers.DepthwiseConv2D(
                3, strides, padding="same", use_bias=use_bias, depthwise_initializer="he_normal"
            )(y)
            y = squeeze_excite(normalized(y, "silu"), max(4, narrow // 4))
            y = normalized(convolution(y, width, 1, use_bias=use_bias))
            x = layers.Add()([x, y]) if strides == 1 and narrow == width else y
    return with_head(inputs, normalized(convolution(x, 2 * WIDTHS[-1], 1, use_bias=use_bias), "silu"), classes)


# Functions of the image shape, the number of classes and `use_bias`, which is for all convolutions.
NETWORKS = {
    "plain15": plain,
    "plain30": lambda shape, classes, use_bias=False: plain(shape, classes, 30, use_bias),
    "resnet20": resnet_v2,
    "efficientnet": efficientnet,
}


def identity(name, dtype):
    """A layer for the place of a normalization that does nothing."""
    return layers.Activation("linear", name=name, dtype=dtype)


def parse_normalization(text):
    """Splits NAME:ARGUMENT=VALUE,... into the name of a normalization and its arguments."""
    name, _, arguments = text.partition(":")
    call = ast.parse(f"f({arguments})", mode="eval").body
    if not isinstance(call, ast.Call) or call.args:
        raise ValueError(f"must be NAME or NAME:ARGUMENT=VALUE,..., not {text}")
    return name, {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}


def build_model(network, name, arguments, shape, classes):
    """A network with a normalization; with the same seed, the kernels are the same with each normalization."""
    model = NETWORKS[network](shape, classes, use_bias=name == "none")
    if name == "batch_norm":
        return model
    if name == "none":
        return replace_normalization(model, identity)
    return replace_normalization(model, name, **{**GROUPS, **arguments})
