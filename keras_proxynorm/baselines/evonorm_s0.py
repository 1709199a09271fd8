"""EvoNorm-S0: normalization and activation in one formula, of each example by itself."""

from typing import Any

import keras
from keras import ops

from keras_proxynorm import kernels
from keras_proxynorm.arguments import as_integer
from keras_proxynorm.arguments import as_nonnegative
from keras_proxynorm.baselines.batch_statistics import channel_moments
from keras_proxynorm.baselines.batch_statistics import merge
from keras_proxynorm.baselines.batch_statistics import spread
from keras_proxynorm.baselines.batch_statistics import unbiased
from keras_proxynorm.kernels.channels import broadcast
from keras_proxynorm.kernels.statistics import group_size
from keras_proxynorm.layers.base import NormalizationLayer
from keras_proxynorm.moments import computation_dtype

__all__ = ["EvoNormS0"]


@keras.saving.register_keras_serializable(package="keras_proxynorm")
class EvoNormS0(NormalizationLayer):
    """EvoNorm-S0, which takes the place of a normalization and its activation.

        z = gamma_c x sigmoid(v_c x) / sqrt(var_g + epsilon) + beta_c

    with the unbiased variance over a group of channels and all positions of an example. Nothing depends on the batch.

    Args:
        groups: Integer that divides the number of channels, or -1 for one for each channel. Defaults to 32.
        axis: Integer, the channel axis, not 0. Use 1 for ``channels_first`` data. Defaults to -1.
        epsilon: Float, added to the variance. Defaults to 1e-5.
        nonlinearity: If False, the layer is scale and offset alone, without normalization, which is what stands in the
            authors' networks where no activation follows (quoted from memory). Defaults to True.
        v_initializer: Initializer of `v`. Defaults to ones.
        **kwargs: `center`, `scale`, and initializers, regularizers and constraints of `beta` and `gamma`, as in
            `keras_proxynorm.GroupNormProxy`; base layer keyword arguments, such as `name` and `dtype`.

    Attributes:
        gamma: Weight of shape ``(channels,)``, or None.
        beta: Weight of shape ``(channels,)``, or None.
        v: Weight of shape ``(channels,)``, or None without nonlinearity.

    Call arguments:
        inputs: Float tensor of rank 2 or more, batch first; sizes other than that of the channel axis may be unknown.

    Output:
        A tensor of the shape of the inputs in the layer's compute dtype. Statistics are float32 at least.

    Raises:
        ValueError: For bad arguments when the layer is made; for groups that do not divide the channels and an axis
            that is out of range when it is built; for integer inputs when it is called.

    Example:

    >>> import keras
    >>> from keras_proxynorm.baselines import EvoNormS0
    >>> model = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Conv2D(16, 3), EvoNormS0(groups=4)])
    >>> model.output_shape
    (None, 6, 6, 16)

    Reference:

    - [Liu et al., 2020](https://arxiv.org/abs/2004.02967)
    - [Lubana et al., 2021](https://arxiv.org/abs/2106.05956), whose formula this is
    """

    def __init__(
        self,
        groups: int = 32,
        axis: int = -1,
        epsilon: float = 1e-5,
        *,
        nonlinearity: bool = True,
        v_initializer="ones",
        **kwargs,
    ):
        super().__init__(axis=axis, **kwargs)
        expected = "a positive integer, or -1 for one group for each channel"
        self.groups = as_integer("groups", groups, expected)
        if self.groups < 1 and self.groups != -1:
            raise ValueError(f"Argument `groups` must be {expected}. Received: groups={groups}")
        self.epsilon = as_nonnegative("epsilon", epsilon)
        self.nonlinearity = bool(nonlinearity)
        self.v_initializer = keras.initializers.get(v_initializer)
        self.v = None

    def build(self, input_shape):
        super().build(input_shape)
        if self.nonlinearity:
            channels = input_shape[self._channel_axis(input_shape)]
            self.v = self.add_weight(shape=(channels,), name="v", initializer=self.v_initializer, autocast=False)

    def _check_channels(self, input_shape, channels):
        if self.nonlinearity and self.groups != -1 and channels % self.groups:
            raise ValueError(
                f"Argument `groups` must divide the number of channels, {channels}, or be -1. "
                f"Received: groups={self.groups}, inputs.shape={tuple(input_shape)}"
            )

    def call(self, inputs):
        self._check_dtype(inputs)
        dtype = computation_dtype(inputs.dtype, self.variable_dtype)
        x = ops.cast(inputs, dtype)
        axis = self._channel_axis(x.shape)
        gamma, beta = (broadcast(weight, x, axis) for weight in self._affine(dtype))
        if self.v is not None:
            groups = x.shape[axis] if self.groups == -1 else self.groups
            variance = merge(channel_moments(x, axis), groups, examples=1).variance
            variance = spread(unbiased(variance, group_size(x, groups, axis)), x, axis)
            x = x * ops.sigmoid(broadcast(ops.cast(self.v, dtype), x, axis) * x) * ops.rsqrt(variance + self.epsilon)
        return ops.cast(kernels.affine(x, gamma, beta), self.compute_dtype)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "groups": self.groups,
            "epsilon": self.epsilon,
            "nonlinearity": self.nonlinearity,
            "v_initializer": keras.initializers.serialize(self.v_initializer),
        }
