"""Variance normalization: batch normalization that does not subtract the mean."""

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_proxynorm import kernels
from keras_proxynorm.baselines.batch_statistics import batch_count, channel_moments, merge
from keras_proxynorm.baselines.moving_statistics import MovingStatisticsLayer, affine_at_inference
from keras_proxynorm.kernels.channels import broadcast

__all__ = ["VarianceNormalization"]


@keras.saving.register_keras_serializable(package="keras_proxynorm")
class VarianceNormalization(MovingStatisticsLayer):
    """Division by the standard deviation over the batch, about the mean, which is not subtracted.

        z = gamma_c x / sqrt(var_c + epsilon) + beta_c

    Args:
        axis: Integer, the channel axis, not 0. Use 1 for ``channels_first`` data. Defaults to -1.
        momentum: Float, the share of the moving average that stays in each step. Defaults to 0.9.
        epsilon: Float, added to the variance. Defaults to 1e-5.
        **kwargs: The arguments for `gamma` and `beta` of `keras_proxynorm.GroupNormProxy`; base layer arguments.

    Attributes:
        gamma, beta: Weights of shape ``(channels,)``, or None.
        moving_variance: Weight of shape ``(channels,)``.

    Call arguments, output and errors are those of `keras_proxynorm.GroupNormProxy`, and `training`: whether to use the
    statistics of the batch and to move the averages, which a frozen layer never does. Masked positions do not
    enter the statistics.

    Example:

    >>> import keras
    >>> from keras_proxynorm.baselines import VarianceNormalization
    >>> layer = VarianceNormalization()
    >>> tuple(layer(keras.ops.ones((32, 4, 4, 16)), training=True).shape)
    (32, 4, 4, 16)

    Reference:

    - [Lubana et al., 2021](https://arxiv.org/abs/2106.05956)
    """

    moves_mean = False

    def __init__(self, axis: int = -1, momentum: float = 0.9, epsilon: float = 1e-5, **kwargs: Any) -> None:
        super().__init__(momentum, epsilon, axis=axis, **kwargs)

    def _normalize_batch(self, x, gamma, beta, mask):
        axis = self._channel_axis(x.shape)
        moments = merge(channel_moments(x, axis, mask))
        self._move(None, moments.variance[0], batch_count(x, axis, moments))
        return self._normalize(x, moments.variance[0], gamma, beta)

    def _normalize_moving(self, x, gamma, beta, mask):
        return self._normalize(x, self._moving(x.dtype)[1], gamma, beta)

    def inference_affine(self) -> tuple[np.ndarray, np.ndarray] | None:
        return affine_at_inference(self, None, self.moving_variance, self.epsilon)

    def _normalize(self, x, variance, gamma, beta):
        axis = self._channel_axis(x.shape)
        scale = kernels.affine(ops.rsqrt(variance + self.epsilon), gamma, None)
        return kernels.affine(x, broadcast(scale, x, axis), broadcast(beta, x, axis))
