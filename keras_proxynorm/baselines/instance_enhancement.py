"""Instance enhancement batch normalization: batch norm whose gamma each sample gates for itself."""

from typing import Any

import keras
from keras import ops

from keras_proxynorm import kernels
from keras_proxynorm.baselines.batch_statistics import Moments, batch_count, channel_moments, merge, normalize, unbiased
from keras_proxynorm.baselines.moving_statistics import MovingStatisticsLayer
from keras_proxynorm.layers.base import InitializerLike, Shape

__all__ = ["InstanceEnhancementBatchNormalization"]


@keras.saving.register_keras_serializable(package="keras_proxynorm")
class InstanceEnhancementBatchNormalization(MovingStatisticsLayer):
    """Batch normalization whose `gamma` is gated by the mean of the sample's own channel (IEBN).

    With the batch-normalized input ``y`` and the mean ``m`` over the positions of a sample ``n`` and channel ``c``,

        z = gamma_c sigmoid(gate_gamma_c m_nc + gate_beta_c) y + beta_c

    The gate reads the input itself, before normalization, in training and at inference, so that no preceding
    convolution can absorb the layer. At the start each gate is ``sigmoid(-1) = .269``, as in the authors' code, which
    is not neutral: do not start with a `gamma` of 0 on top.

    Args:
        axis: Integer, the channel axis, not 0. Use 1 for ``channels_first`` data. Defaults to -1.
        momentum: Float, the share of the moving averages that stays in each step. Defaults to 0.9.
        epsilon: Float, added to the variance. Defaults to 1e-5.
        gate_gamma_initializer: Initializer of `gate_gamma`. Defaults to zeros.
        gate_beta_initializer: Initializer of `gate_beta`. Defaults to the constant -1.
        **kwargs: The arguments for `gamma` and `beta` of `keras_proxynorm.GroupNormProxy`; base layer arguments.

    Attributes:
        gamma, beta: Weights of shape ``(channels,)``, or None.
        gate_gamma: Weight of shape ``(channels,)``.
        gate_beta: Weight of shape ``(channels,)``.
        moving_mean: Weight of shape ``(channels,)``.
        moving_variance: Weight of shape ``(channels,)``, of unbiased variances, as in the authors' code.

    Call arguments, output and errors are those of `keras_proxynorm.GroupNormProxy`, and `training`: whether to use the
    statistics of the batch and to move the averages, which a frozen layer never does. Masked positions do not
    enter the statistics.

    Example:

    >>> import keras
    >>> from keras_proxynorm.baselines import InstanceEnhancementBatchNormalization
    >>> layer = InstanceEnhancementBatchNormalization()
    >>> tuple(layer(keras.ops.ones((32, 4, 4, 16)), training=True).shape)
    (32, 4, 4, 16)

    Reference:

    - [Liang et al., 2020](https://arxiv.org/abs/1908.04008)
    """

    def __init__(
        self,
        axis: int = -1,
        momentum: float = 0.9,
        epsilon: float = 1e-5,
        *,
        gate_gamma_initializer: InitializerLike = "zeros",
        gate_beta_initializer: InitializerLike | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(momentum, epsilon, axis=axis, **kwargs)
        self.gate_gamma_initializer = keras.initializers.get(gate_gamma_initializer)
        self.gate_beta_initializer = keras.initializers.get(gate_beta_initializer or keras.initializers.Constant(-1.0))
        self.gate_gamma: Any = None
        self.gate_beta: Any = None

    def build(self, input_shape: Shape) -> None:
        super().build(input_shape)
        channels = self._channels(input_shape)
        self.gate_gamma, self.gate_beta = (self._add_parameter(name, channels) for name in ("gate_gamma", "gate_beta"))

    def _normalize_batch(self, x, gamma, beta, mask):
        axis = self._channel_axis(x.shape)
        of_channels = channel_moments(x, axis, mask)
        moments = merge(of_channels)
        count = batch_count(x, axis, moments)
        self._move(moments.mean[0], unbiased(moments.variance, count)[0], count)
        return self._normalize(x, moments, of_channels.mean, gamma, beta)

    def _normalize_moving(self, x, gamma, beta, mask):
        moments = Moments.of_vectors(*self._moving(x.dtype))
        return self._normalize(x, moments, channel_moments(x, self._channel_axis(x.shape), mask).mean, gamma, beta)

    def _normalize(self, x, moments, means, gamma, beta):
        gate_gamma, gate_beta = (ops.cast(weight, x.dtype) for weight in (self.gate_gamma, self.gate_beta))
        gated = kernels.affine(ops.sigmoid(gate_gamma * means + gate_beta), gamma, None)
        return normalize(x, moments, self._channel_axis(x.shape), self.epsilon, gated, beta)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "gate_gamma_initializer": keras.initializers.serialize(self.gate_gamma_initializer),
            "gate_beta_initializer": keras.initializers.serialize(self.gate_beta_initializer),
        }
