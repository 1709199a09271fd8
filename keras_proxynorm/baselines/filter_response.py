"""Filter response normalization: division by the root mean square of a channel, and a learned threshold."""

from typing import Any

import keras
from keras import ops

from keras_proxynorm import kernels
from keras_proxynorm.arguments import as_boolean, as_epsilon
from keras_proxynorm.kernels.channels import broadcast
from keras_proxynorm.kernels.reductions import position_sums
from keras_proxynorm.kernels.statistics import group_size, hide_masked, unmasked_counts
from keras_proxynorm.layers.base import InitializerLike, NormalizationLayer, Shape, values_per_group
from keras_proxynorm.moments import Tensor

__all__ = ["FilterResponseNormalization"]


@keras.saving.register_keras_serializable(package="keras_proxynorm")
class FilterResponseNormalization(NormalizationLayer):
    """Filter response normalization with its thresholded linear unit (FRN and TLU).

        y = gamma_c x / sqrt(mean_p x^2 + |learned_epsilon|) + beta_c,    z = max(y, tau_c)

    with the mean over the positions of a sample and channel. Nothing depends on the batch. The threshold takes the
    place of the activation. The authors warm the learning rate up, linearly over the first epochs. On inputs without
    positions, such as those after global pooling, only signs are left; do not use it there.

    Args:
        axis: Integer, the channel axis, not 0. Use 1 for ``channels_first`` data. Defaults to -1.
        epsilon: Float, where `learned_epsilon` starts. Defaults to 1e-5.
        learn_epsilon: If False, `epsilon` stays as it is. Defaults to True.
        nonlinearity: If False, there is no threshold. Defaults to True.
        tau_initializer: Initializer of `tau`. Defaults to zeros, so that the layer starts with a relu.
        **kwargs: The arguments for `gamma` and `beta` of `keras_proxynorm.GroupNormProxy`; base layer arguments.

    Attributes:
        gamma, beta: Weights of shape ``(channels,)``, or None.
        tau: Weight of shape ``(channels,)``, or None without nonlinearity.
        learned_epsilon: Weight of shape ``()``, trainable unless `learn_epsilon` is False.

    Call arguments, output and errors are those of `keras_proxynorm.GroupNormProxy`. Masked positions
    do not enter the statistics.

    Example:

    >>> import keras
    >>> from keras_proxynorm.baselines import FilterResponseNormalization
    >>> model = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Conv2D(16, 3), FilterResponseNormalization()])
    >>> model.output_shape
    (None, 6, 6, 16)

    Reference:

    - [Singh and Krishnan, 2020](https://arxiv.org/abs/1911.09737)
    - [Lubana et al., 2021](https://arxiv.org/abs/2106.05956), whose formula this is
    """

    effect_on_single_values = "each is divided by its own size, so that little more than its sign is left."

    def __init__(
        self,
        axis: int = -1,
        epsilon: float = 1e-5,
        *,
        learn_epsilon: bool = True,
        nonlinearity: bool = True,
        tau_initializer: InitializerLike = "zeros",
        **kwargs: Any,
    ) -> None:
        super().__init__(axis=axis, **kwargs)
        self.epsilon = as_epsilon("epsilon", epsilon)
        self.learn_epsilon = as_boolean("learn_epsilon", learn_epsilon)
        self.nonlinearity = as_boolean("nonlinearity", nonlinearity)
        self.tau_initializer = keras.initializers.get(tau_initializer)
        self.learned_epsilon: Any = None
        self.tau: Any = None

    def build(self, input_shape: Shape) -> None:
        super().build(input_shape)
        self.learned_epsilon = self.add_weight(
            shape=(),
            name="learned_epsilon",
            initializer=keras.initializers.Constant(self.epsilon),
            trainable=self.learn_epsilon,
            autocast=False,
        )
        if self.nonlinearity:
            self.tau = self._add_parameter("tau", self._channels(input_shape))

    def values_per_statistic(self, input_shape: Shape) -> int | None:
        return values_per_group(input_shape, self._channels(input_shape))

    def call(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self._for_statistics(inputs)
        axis = self._channel_axis(x.shape)
        gamma, beta = (broadcast(weight, x, axis) for weight in self._affine(x.dtype))
        x = hide_masked(x, mask, axis)
        count = group_size(x, x.shape[axis], axis) if mask is None else ops.maximum(unmasked_counts(mask, x, axis), 1)
        power = position_sums(ops.square(x), axis) / count
        scale = ops.rsqrt(power + ops.abs(ops.cast(self.learned_epsilon, x.dtype)))
        outputs = kernels.affine(x, kernels.affine(scale, gamma, None), beta)
        if self.tau is not None:
            outputs = ops.maximum(outputs, broadcast(ops.cast(self.tau, x.dtype), x, axis))
        return ops.cast(outputs, self.compute_dtype)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "epsilon": self.epsilon,
            "learn_epsilon": self.learn_epsilon,
            "nonlinearity": self.nonlinearity,
            "tau_initializer": keras.initializers.serialize(self.tau_initializer),
        }
