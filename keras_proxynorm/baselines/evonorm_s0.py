"""EvoNorm-S0: normalization and activation in one formula, of each sample by itself."""

from typing import Any

import keras
from keras import ops

from keras_proxynorm import kernels
from keras_proxynorm.arguments import as_boolean, as_epsilon, as_groups, check_divides_channels
from keras_proxynorm.baselines.batch_statistics import channel_moments, merge, sample_count
from keras_proxynorm.baselines.batch_statistics import unbiased as as_unbiased
from keras_proxynorm.kernels.channels import broadcast
from keras_proxynorm.kernels.statistics import hide_masked
from keras_proxynorm.layers.base import InitializerLike, NormalizationLayer, Shape, values_per_group
from keras_proxynorm.moments import Tensor

__all__ = ["EvoNormS0"]


@keras.saving.register_keras_serializable(package="keras_proxynorm")
class EvoNormS0(NormalizationLayer):
    """EvoNorm-S0, which takes the place of a normalization and its activation.

        z = gamma_c x sigmoid(v_c x) / sqrt(var_g + epsilon) + beta_c

    with the variance over a group of channels and all positions of a sample. Nothing depends on the batch.

    Args:
        groups: Integer that divides the number of channels, or -1 for one for each channel. Defaults to 32.
        axis: Integer, the channel axis, not 0. Use 1 for ``channels_first`` data. Defaults to -1.
        epsilon: Float, added to the variance. Defaults to 1e-5.
        nonlinearity: If False, the layer is `gamma` and `beta` alone, without normalization, as with
            ``apply_act=False`` in timm. Defaults to True.
        v_initializer: Initializer of `v`. Defaults to ones.
        unbiased: If True, variances of a sample are unbiased, as in the code of Lubana et al. Defaults to False, the
            biased variances of Liu et al. A config without it, of version 0.1.0, means True.
        **kwargs: The arguments for `gamma` and `beta` of `keras_proxynorm.GroupNormProxy`; base layer arguments.

    Attributes:
        gamma, beta: Weights of shape ``(channels,)``, or None.
        v: Weight of shape ``(channels,)``, or None without nonlinearity.

    Call arguments, output and errors are those of `keras_proxynorm.GroupNormProxy`. Masked positions
    do not enter the statistics.

    Example:

    >>> import keras
    >>> from keras_proxynorm.baselines import EvoNormS0
    >>> model = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Conv2D(16, 3), EvoNormS0(groups=4)])
    >>> model.output_shape
    (None, 6, 6, 16)

    Reference:

    - [Liu et al., 2020](https://arxiv.org/abs/2004.02967), whose formula this is, and timm's EvoNorm2dS0
    - [Lubana et al., 2021](https://arxiv.org/abs/2106.05956), whose variances of samples are unbiased
    """

    effect_on_single_values = "their variance is 0, so that only `epsilon` divides them. Use fewer groups."

    def __init__(
        self,
        groups: int = 32,
        axis: int = -1,
        epsilon: float = 1e-5,
        *,
        nonlinearity: bool = True,
        v_initializer: InitializerLike = "ones",
        unbiased: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(axis=axis, **kwargs)
        self.groups = as_groups("groups", groups)
        self.epsilon = as_epsilon("epsilon", epsilon)
        self.nonlinearity = as_boolean("nonlinearity", nonlinearity)
        self.v_initializer = keras.initializers.get(v_initializer)
        self.unbiased = as_boolean("unbiased", unbiased)
        self.v: Any = None

    def build(self, input_shape: Shape) -> None:
        super().build(input_shape)
        if self.nonlinearity:
            self.v = self._add_parameter("v", self._channels(input_shape))

    def _number_of_groups(self, shape):
        return self._channels(shape) if self.groups == -1 else self.groups

    def _check_channels(self, input_shape, channels):
        if self.nonlinearity:
            check_divides_channels("groups", self._number_of_groups(input_shape), channels, input_shape)

    def values_per_statistic(self, input_shape: Shape) -> int | None:
        return values_per_group(input_shape, self._number_of_groups(input_shape)) if self.nonlinearity else None

    def call(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self._for_statistics(inputs)
        axis = self._channel_axis(x.shape)
        x = hide_masked(x, mask, axis)
        gamma, beta = (broadcast(weight, x, axis) for weight in self._affine(x.dtype))
        if self.v is not None:
            groups = self._number_of_groups(x.shape)
            moments = merge(channel_moments(x, axis, mask), groups, samples=1)
            variance = moments.variance
            if self.unbiased:
                variance = as_unbiased(variance, sample_count(x, groups, axis, moments))
            scale = ops.rsqrt(variance + self.epsilon)
            x = x * ops.sigmoid(broadcast(ops.cast(self.v, x.dtype), x, axis) * x) * broadcast(scale, x, axis)
        return ops.cast(kernels.affine(x, gamma, beta), self.compute_dtype)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "groups": self.groups,
            "epsilon": self.epsilon,
            "nonlinearity": self.nonlinearity,
            "v_initializer": keras.initializers.serialize(self.v_initializer),
            "unbiased": self.unbiased,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        return super().from_config({"unbiased": True, **config})
