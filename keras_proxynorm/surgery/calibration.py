"""Sets gamma, beta and proxy of new layers so that on a batch they do what the old ones do, channel by channel.

With other statistics, a normalization gives each channel another mean and standard deviation, which the copied gamma
and beta do not account for. Here they are set so that the input of the activation has the mean and the standard
deviation over the batch that it had in the old model, and the proxy is set to those of the normalized input.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_proxynorm.layers import GroupNormProxy
from keras_proxynorm.observation.calls import observed, visit_normalized_inputs
from keras_proxynorm.observation.channels import channel_moments

__all__ = ["ChannelMoments", "calibrate_layers", "can_calibrate", "channel_moments_of_outputs", "set_affine"]

ChannelMoments = tuple[np.ndarray, np.ndarray]
"""Mean and standard deviation of each channel, over samples and positions."""

# A channel that varies less, where its group has a standard deviation of 1, counts as constant and keeps its scale.
SMALLEST_STDDEV = 1e-2


def can_calibrate(layer: keras.layers.Layer) -> bool:
    """Whether it is a group, layer or instance norm, with or without proxy normalization."""
    return isinstance(layer, (keras.layers.GroupNormalization, GroupNormProxy))


def channel_moments_of_outputs(
    model: keras.Model, layers: Iterable[tuple[Any, int]], batch: Any
) -> dict[Any, ChannelMoments]:
    """Runs a model and looks at the outputs of some of its layers.

    Args:
        model: A model.
        layers: Pairs of layers and the channel axes of their outputs.
        batch: A batch of inputs, as for a call of the model.

    Returns:
        Dict of the `ChannelMoments` of the output of the first call of each layer, by the layer.
    """
    found: dict[Any, ChannelMoments] = {}
    axes = dict(layers)

    def observe(name, layer, call, args, kwargs):
        outputs = call(*args, **kwargs)
        if layer not in found:
            found[layer] = channel_moments(outputs, axes[layer])
        return outputs

    with observed({str(id(layer)): layer for layer in axes}, observe):
        model(batch, training=False)
    return found


def calibrate_layers(model: keras.Model, wanted: Mapping[Any, ChannelMoments], batch: Any) -> None:
    """Sets gamma, beta and proxy of layers, each when what comes before it is set already.

    Args:
        model: A model.
        wanted: For layers for which `can_calibrate`: the moments that the input of their activation, or their output
            without one, is to have.
        batch: A batch of inputs, as for a call of the model.
    """

    def calibrate(layer, mean, stddev):
        _calibrate(layer, mean, stddev, *wanted[layer])

    visit_normalized_inputs(model, wanted, batch, calibrate)


def set_affine(layer: Any, mean: np.ndarray, stddev: np.ndarray) -> None:
    """Sets gamma and beta so that a channel that is as its proxy, N(0, 1), gets this mean and standard deviation."""
    if layer.gamma is not None:
        # The sign is learned, too.
        layer.gamma.assign(np.where(ops.convert_to_numpy(layer.gamma) < 0, -stddev, stddev))
    if layer.beta is not None:
        layer.beta.assign(mean)
    if getattr(layer, "proxy", None) is not None:
        layer.proxy.assign(np.zeros(layer.proxy.shape))


def _calibrate(layer, mean, stddev, wanted_mean, wanted_stddev):
    scale = wanted_stddev / np.where(stddev < SMALLEST_STDDEV, 1, stddev)
    set_affine(layer, wanted_mean, scale)
    if layer.beta is not None:
        gamma = 1.0 if layer.gamma is None else ops.convert_to_numpy(layer.gamma)
        layer.beta.assign(wanted_mean - gamma * mean)
    if getattr(layer, "proxy", None) is not None:
        layer.proxy.assign(np.stack([mean, stddev - 1]))
