"""What the methods share that take statistics of the batch in training, and their moving averages at inference."""

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_proxynorm.arguments import as_epsilon, as_fraction
from keras_proxynorm.kernels.statistics import hide_masked
from keras_proxynorm.layers.base import NormalizationLayer, Shape
from keras_proxynorm.moments import Tensor

__all__ = ["MovingStatisticsLayer", "add_moving", "affine_at_inference", "move", "share_of_batch"]


class MovingStatisticsLayer(NormalizationLayer):
    """A normalization by statistics of the batch in training and by their moving averages at inference.

    Not meant to be used directly; subclasses say in `_normalize_batch` and `_normalize_moving` what they compute. A
    layer that is frozen, by ``trainable = False``, uses the moving averages, as `keras.layers.BatchNormalization` does.
    """

    moves_mean = True

    def __init__(self, momentum: float, epsilon: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.momentum = as_fraction("momentum", momentum)
        self.epsilon = as_epsilon("epsilon", epsilon)
        self.moving_mean: Any = None
        self.moving_variance: Any = None

    def build(self, input_shape: Shape) -> None:
        super().build(input_shape)
        size = self._statistics_size(input_shape)
        if self.moves_mean:
            self.moving_mean = add_moving(self, "moving_mean", size, "zeros")
        self.moving_variance = add_moving(self, "moving_variance", size, "ones")

    def _statistics_size(self, input_shape) -> int:
        """How many means and variances there are; here one for each channel."""
        return self._channels(input_shape)

    def call(self, inputs: Tensor, training: bool | None = None, mask: Tensor | None = None) -> Tensor:
        x = self._for_statistics(inputs)
        affine = self._affine(x.dtype)
        if training and self.trainable:
            x = hide_masked(x, mask, self._channel_axis(x.shape))
            outputs = self._normalize_batch(x, *affine, mask)
        else:
            outputs = self._normalize_moving(x, *affine, mask)
        return ops.cast(outputs, self.compute_dtype)

    def _normalize_batch(self, x, gamma, beta, mask):
        """The layer in training; it updates the moving averages.

        Args:
            x: The inputs, float32 or float64.
            gamma: Tensor of shape ``(channels,)`` or None.
            beta: Tensor of shape ``(channels,)`` or None.
            mask: The mask or None.
        """
        raise NotImplementedError

    def _normalize_moving(self, x, gamma, beta, mask):
        """The layer at inference."""
        raise NotImplementedError

    def inference_affine(self) -> tuple[np.ndarray, np.ndarray] | None:
        """What the layer does at inference, if that is an affine of each channel.

        Returns:
            ``(scale, offset)``, NumPy vectors of shape ``(channels,)``, float64; None if it looks at its inputs.
        """
        return None

    def _moving(self, dtype):
        """The moving mean, or None, and variance, in the dtype of a computation."""
        mean = None if self.moving_mean is None else ops.cast(self.moving_mean, dtype)
        return mean, ops.cast(self.moving_variance, dtype)

    def _move(self, mean, variance, count):
        """Moves the averages towards statistics of a batch of `count` values."""
        for weight, value in ((self.moving_mean, mean), (self.moving_variance, variance)):
            if weight is not None:
                move(weight, value, self.momentum, count)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "momentum": self.momentum, "epsilon": self.epsilon}


def add_moving(layer: keras.layers.Layer, name: str, size: int, initializer: str) -> keras.Variable:
    """Adds a weight for moving averages to a layer."""
    # Each replica has its own batch; the average belongs to all of them.
    return layer.add_weight(
        shape=(size,), name=name, initializer=initializer, trainable=False, autocast=False, aggregation="mean"
    )


def share_of_batch(momentum: float, count: Tensor) -> Tensor:
    """The share that a batch of `count` values gets in a moving average: none if there are no values."""
    return (1.0 - momentum) * ops.cast(count > 0, count.dtype)


def move(weight: keras.Variable, value: Tensor, momentum: float, count: Tensor) -> None:
    """Moves a moving average towards a statistic of a batch of `count` values; not at all if there are none."""
    # float32 also where variables are half precision: small steps would be rounded away.
    old = ops.cast(weight, value.dtype)
    weight.assign(old + ops.reshape(share_of_batch(momentum, count), (-1,)) * (value - old))


def affine_at_inference(
    layer: NormalizationLayer, mean: Tensor | None, variance: Tensor, epsilon: float
) -> tuple[np.ndarray, np.ndarray]:
    """Scale and offset of a normalization by a mean and a variance of each channel, in float64."""
    gamma, beta, mean, variance = (
        np.float64(default) if weight is None else ops.convert_to_numpy(weight).astype("float64")
        for weight, default in ((layer.gamma, 1.0), (layer.beta, 0.0), (mean, 0.0), (variance, 1.0))
    )
    scale = gamma / np.sqrt(variance + epsilon)
    return scale, beta - mean * scale
