"""EvoNorm-B0: normalization and activation in one formula, by the larger of two standard deviations."""

from typing import Any

import keras
from keras import ops

from keras_proxynorm import kernels
from keras_proxynorm.arguments import as_boolean
from keras_proxynorm.baselines.batch_statistics import batch_count, channel_moments, merge, sample_count
from keras_proxynorm.baselines.batch_statistics import unbiased as as_unbiased
from keras_proxynorm.baselines.moving_statistics import MovingStatisticsLayer
from keras_proxynorm.kernels.channels import broadcast
from keras_proxynorm.layers.base import InitializerLike, Shape

__all__ = ["EvoNormB0"]


@keras.saving.register_keras_serializable(package="keras_proxynorm")
class EvoNormB0(MovingStatisticsLayer):
    """EvoNorm-B0, which takes the place of a batch normalization and its activation.

        z = gamma_c x / max(sqrt(var_c + epsilon), v_c x + sqrt(var_nc + epsilon)) + beta_c

    with the variance ``var_c`` of a channel over the batch, in training, or its moving average, at inference; and the
    variance ``var_nc`` of a channel in a sample, always.

    In training that is what EvoNorm2dB0 of timm computes. There the moving variance is unbiased, so that inference
    differs slightly, and epsilon is 1e-3 by default.

    Args:
        axis: Integer, the channel axis, not 0. Use 1 for ``channels_first`` data. Defaults to -1.
        momentum: Float, the share of the moving average that stays in each step. Defaults to 0.9.
        epsilon: Float, added to both variances. Defaults to 1e-5.
        nonlinearity: If False, the layer is `gamma` and `beta` alone, without normalization, as with
            ``apply_act=False`` in timm. Defaults to True.
        v_initializer: Initializer of `v`. Defaults to ones.
        unbiased: If True, variances of a sample are unbiased, as in the code of Lubana et al. Defaults to False, the
            biased variances of Liu et al. A config without it, of version 0.1.0, means True.
        **kwargs: The arguments for `gamma` and `beta` of `keras_proxynorm.GroupNormProxy`; base layer arguments.

    Attributes:
        gamma, beta: Weights of shape ``(channels,)``, or None.
        v: Weight of shape ``(channels,)``, or None without nonlinearity.
        moving_variance: Weight of shape ``(channels,)``, of biased variances.

    Call arguments, output and errors are those of `keras_proxynorm.GroupNormProxy`, and `training`: whether to use the
    statistics of the batch and to move the averages, which a frozen layer never does. Masked positions do not
    enter the statistics.

    Example:

    >>> import keras
    >>> from keras_proxynorm.baselines import EvoNormB0
    >>> model = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Conv2D(16, 3), EvoNormB0()])
    >>> model.output_shape
    (None, 6, 6, 16)

    Reference:

    - [Liu et al., 2020](https://arxiv.org/abs/2004.02967), whose formula this is
    - [Lubana et al., 2021](https://arxiv.org/abs/2106.05956), whose variances of samples are unbiased
    """

    moves_mean = False

    def __init__(
        self,
        axis: int = -1,
        momentum: float = 0.9,
        epsilon: float = 1e-5,
        *,
        nonlinearity: bool = True,
        v_initializer: InitializerLike = "ones",
        unbiased: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(momentum, epsilon, axis=axis, **kwargs)
        self.nonlinearity = as_boolean("nonlinearity", nonlinearity)
        self.v_initializer = keras.initializers.get(v_initializer)
        self.unbiased = as_boolean("unbiased", unbiased)
        self.v: Any = None

    def build(self, input_shape: Shape) -> None:
        super().build(input_shape)
        if self.nonlinearity:
            self.v = self._add_parameter("v", self._channels(input_shape))

    def _normalize_batch(self, x, gamma, beta, mask):
        if self.v is None:
            return self._normalize(x, None, None, gamma, beta)
        axis = self._channel_axis(x.shape)
        of_channels = channel_moments(x, axis, mask)
        of_batch = merge(of_channels)
        self._move(None, of_batch.variance[0], batch_count(x, axis, of_batch))
        return self._normalize(x, of_batch.variance, of_channels, gamma, beta)

    def _normalize_moving(self, x, gamma, beta, mask):
        if self.v is None:
            return self._normalize(x, None, None, gamma, beta)
        variance = ops.expand_dims(self._moving(x.dtype)[1], 0)
        return self._normalize(x, variance, channel_moments(x, self._channel_axis(x.shape), mask), gamma, beta)

    def _normalize(self, x, variance, of_channels, gamma, beta):
        axis = self._channel_axis(x.shape)
        if self.v is not None:
            of_sample = of_channels.variance
            if self.unbiased:
                of_sample = as_unbiased(of_sample, sample_count(x, x.shape[axis], axis, of_channels))
            stddev, sample_stddev = (broadcast(ops.sqrt(v + self.epsilon), x, axis) for v in (variance, of_sample))
            v = broadcast(ops.cast(self.v, x.dtype), x, axis)
            x = x / ops.maximum(stddev, v * x + sample_stddev)
        return kernels.affine(x, broadcast(gamma, x, axis), broadcast(beta, x, axis))

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "nonlinearity": self.nonlinearity,
            "v_initializer": keras.initializers.serialize(self.v_initializer),
            "unbiased": self.unbiased,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        return super().from_config({"unbiased": True, **config})
