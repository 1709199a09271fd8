"""EvoNorm-B0: normalization and activation in one formula, by the larger of two standard deviations."""

from typing import Any

import keras
from keras import ops

from keras_proxynorm import kernels
from keras_proxynorm.baselines.batch_statistics import channel_moments
from keras_proxynorm.baselines.batch_statistics import merge
from keras_proxynorm.baselines.batch_statistics import spread
from keras_proxynorm.baselines.batch_statistics import unbiased
from keras_proxynorm.baselines.moving_statistics import MovingStatisticsLayer
from keras_proxynorm.kernels.channels import broadcast
from keras_proxynorm.kernels.statistics import group_size

__all__ = ["EvoNormB0"]


@keras.saving.register_keras_serializable(package="keras_proxynorm")
class EvoNormB0(MovingStatisticsLayer):
    """EvoNorm-B0, which takes the place of a batch normalization and its activation.

        z = gamma_c x / max(sqrt(var_c + epsilon), v_c x + sqrt(var_nc + epsilon)) + beta_c

    with the variance ``var_c`` of a channel over the batch, in training, or its moving average, at inference; and the
    unbiased variance ``var_nc`` of a channel in an example, always.

    Args:
        axis: Integer, the channel axis, not 0. Use 1 for ``channels_first`` data. Defaults to -1.
        momentum: Float, the share of the moving average that stays in each step. Defaults to 0.9.
        epsilon: Float, added to both variances. Defaults to 1e-5.
        nonlinearity: If False, the layer is scale and offset alone, without normalization, which is what stands in the
            authors' networks where no activation follows (quoted from memory). Defaults to True.
        v_initializer: Initializer of `v`. Defaults to ones.
        **kwargs: `center`, `scale`, and initializers, regularizers and constraints of `beta` and `gamma`, as in
            `keras_proxynorm.GroupNormProxy`; base layer keyword arguments, such as `name` and `dtype`.

    Attributes:
        gamma: Weight of shape ``(channels,)``, or None.
        beta: Weight of shape ``(channels,)``, or None.
        v: Weight of shape ``(channels,)``, or None without nonlinearity.
        moving_variance: Weight of shape ``(channels,)``, of biased variances.

    Call arguments:
        inputs: Float tensor of rank 2 or more, batch first; sizes other than that of the channel axis may be unknown.
        training: Whether to use the variance of the batch and to move the average. A frozen layer does not.

    Output:
        A tensor of the shape of the inputs in the layer's compute dtype. Statistics are float32 at least.

    Raises:
        ValueError: For bad arguments when the layer is made; for an axis that is out of range when it is built; for
            integer inputs when it is called.

    Example:

    >>> import keras
    >>> from keras_proxynorm.baselines import EvoNormB0
    >>> model = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Conv2D(16, 3), EvoNormB0()])
    >>> model.output_shape
    (None, 6, 6, 16)

    Reference:

    - [Liu et al., 2020](https://arxiv.org/abs/2004.02967)
    - [Lubana et al., 2021](https://arxiv.org/abs/2106.05956), whose formula this is
    """

    moves_mean = False

    def __init__(
        self,
        axis: int = -1,
        momentum: float = 0.9,
        epsilon: float = 1e-5,
        *,
        nonlinearity: bool = True,
        v_initializer="ones",
        **kwargs,
    ):
        super().__init__(momentum, epsilon, axis=axis, **kwargs)
        self.nonlinearity = bool(nonlinearity)
        self.v_initializer = keras.initializers.get(v_initializer)
        self.v = None

    def build(self, input_shape):
        super().build(input_shape)
        if self.nonlinearity:
            channels = input_shape[self._channel_axis(input_shape)]
            self.v = self.add_weight(shape=(channels,), name="v", initializer=self.v_initializer, autocast=False)

    def _normalize_batch(self, x, gamma, beta):
        if self.v is None:
            return self._normalize(x, None, None, gamma, beta)
        of_channels = channel_moments(x, self._channel_axis(x.shape))
        variance = merge(of_channels).variance
        self._move(None, variance[0])
        return self._normalize(x, variance, of_channels, gamma, beta)

    def _normalize_moving(self, x, gamma, beta):
        if self.v is None:
            return self._normalize(x, None, None, gamma, beta)
        variance = ops.expand_dims(self._moving(x.dtype)[1], 0)
        return self._normalize(x, variance, channel_moments(x, self._channel_axis(x.shape)), gamma, beta)

    def _normalize(self, x, variance, of_channels, gamma, beta):
        axis = self._channel_axis(x.shape)
        if self.v is not None:
            of_example = unbiased(of_channels.variance, group_size(x, x.shape[axis], axis))
            stddev, example_stddev = (spread(ops.sqrt(v + self.epsilon), x, axis) for v in (variance, of_example))
            v = broadcast(ops.cast(self.v, x.dtype), x, axis)
            x = x / ops.maximum(stddev, v * x + example_stddev)
        return kernels.affine(x, broadcast(gamma, x, axis), broadcast(beta, x, axis))

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "nonlinearity": self.nonlinearity,
            "v_initializer": keras.initializers.serialize(self.v_initializer),
        }
