"""The channels of a layer's output: their axis, their mean and their standard deviation."""

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_proxynorm.graph.layer_kinds import data_axis, normalization_axis
from keras_proxynorm.observation.layers import is_normalization

__all__ = ["channel_axis", "channel_moments"]


def channel_axis(layer: keras.layers.Layer, rank: int) -> int:
    """The channel axis of a layer's output of a given rank, not negative."""
    axis = normalization_axis(layer) if is_normalization(layer) else None
    if axis is not None:
        return axis % rank
    if rank > 3 and not hasattr(layer, "data_format"):
        return 1 if keras.config.image_data_format() == "channels_first" else rank - 1
    return data_axis(layer, rank)


def channel_moments(x: Any, axis: int, by_sample: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each channel, over positions and, unless `by_sample`, over samples.

    Args:
        x: Tensor of rank 2 or more; axis 0 is the batch.
        axis: The channel axis.
        by_sample: Whether each sample has its own moments.

    Returns:
        Two float64 arrays of shape ``(channels,)``, or ``(batch, channels)`` if `by_sample`, computed in float32, or in
        float64 if `x` is float64. The standard deviations of samples without positions are 0.
    """
    if keras.backend.standardize_dtype(x.dtype) != "float64":
        x = ops.cast(x, "float32")
    kept = {axis % len(x.shape), *([0] if by_sample else [])}
    axes = [i for i in range(len(x.shape)) if i not in kept]
    mean = ops.mean(x, axes, keepdims=True) if axes else x
    stddev = ops.sqrt(ops.mean(ops.square(x - mean), axes)) if axes else ops.zeros_like(x)
    moments = ops.convert_to_numpy(ops.reshape(mean, stddev.shape)), ops.convert_to_numpy(stddev)
    return moments[0].astype("float64"), moments[1].astype("float64")
