"""Group normalization, activation and proxy normalization as one layer."""

from typing import Any

import keras

from keras_proxynorm import kernels
from keras_proxynorm.arguments import as_epsilon, as_groups, check_divides_channels
from keras_proxynorm.layers.base import (
    ActivationLike,
    ConstraintLike,
    InitializerLike,
    RegularizerLike,
    Shape,
    arguments_passed_on,
    values_per_group,
)
from keras_proxynorm.layers.proxy_normalization import ProxyNormalizationLayer

__all__ = ["GroupNormProxy"]


@keras.saving.register_keras_serializable(package="keras_proxynorm")
class GroupNormProxy(ProxyNormalizationLayer):
    """Group normalization, affine, activation and Proxy Normalization: a batch-independent BatchNormalization + ReLU.

    Each sample is normalized by the mean and variance of its groups of channels, as in
    `keras.layers.GroupNormalization`. `gamma`, `beta` and the activation follow, and then the output of each channel
    ``c`` is normalized by the mean and variance that the activation would have if its input were a Gaussian proxy:

        z = (phi(gamma_c y + beta_c) - mu_c) / sqrt(var_c + proxy_epsilon)
        mu_c, var_c = mean and variance of phi(gamma_c Y_c + beta_c),  Y_c ~ N(proxy_mean_c, proxy_stddev_c^2)

    The proxy starts as ``N(0, 1)`` and is learned. ``mu`` and ``var`` depend on the layer's weights alone, so the
    output of a sample does not depend on the rest of the batch, there are no running statistics, and training and
    inference compute the same function.

    The layer has its activation fused in: it replaces a normalization layer together with the activation after it.
    Where no activation follows, use ``activation=None``: group normalization with its affine, without a proxy.

    Args:
        groups: Integer, the number of groups of channels; it must divide the number of channels. -1 means one group
            for each channel (instance normalization). Defaults to 32.
        axis: Integer, the channel axis, not 0. Use 1 for ``channels_first`` data. Defaults to -1.
        epsilon: Float, added to the variance of the input. Less than 1e-12 counts as that, so that constant inputs have
            finite gradients; likewise for `proxy_epsilon`. Defaults to 1e-3.
        center: If True, add `beta` before the activation. Defaults to True.
        scale: If True, multiply by `gamma` before the activation. Defaults to True.
        beta_initializer, gamma_initializer: Initializers of `beta` and `gamma`. Default to zeros and ones.
        beta_regularizer, gamma_regularizer: Optional regularizers of `beta` and `gamma`.
        beta_constraint, gamma_constraint: Optional constraints of `beta` and `gamma`.
        activation: The name of an activation, an elementwise callable of one tensor that can be saved (a registered
            function, or a `functools.partial` of one with keyword arguments), a parameter-free Keras activation layer,
            or None. A function of your own may hold variables and have a gradient of its own; training then takes more
            time on TensorFlow than with a function of Keras. Defaults to ``"relu"``.
        proxy_epsilon: Float, added to the variance of the activation. It keeps channels that are almost always off from
            being blown up. Defaults to 0.03, the paper's value; it is not the same thing as `epsilon`.
        proxy_moments: ``"exact"``, or ``"quantiles"`` for the biased estimate of the authors' code; see
            `keras_proxynorm.activation_moments`. Defaults to ``"exact"``.
        num_quantiles: Number of points for ``"quantiles"``. Defaults to 256.
        learn_proxy: If False, the proxy keeps its initial value. Defaults to True.
        proxy_initializer: Initializer of `proxy`, the weight of shape ``(2, channels)`` that holds the proxy's mean and
            its standard deviation minus 1. Defaults to zeros.
        proxy_regularizer: Optional regularizer of `proxy`. The paper decays the proxies with the strength that it uses
            for the kernels; `keras_proxynorm.exclude_norm_from_weight_decay` sets that up in the optimizer.
        proxy_constraint: Optional constraint of `proxy`.
        **kwargs: Base layer keyword arguments, such as `name` and `dtype`.

    Attributes:
        gamma, beta: Weights of shape ``(channels,)``, or None.
        proxy: Weight of shape ``(2, channels)``, or None where the activation is the identity.
        proxy_mean, proxy_stddev: Tensors of shape ``(channels,)``, or None.

    Call arguments:
        inputs: Float tensor of rank 2 or more, batch first; sizes other than that of the channel axis may be unknown.
            Integers are refused.
        mask: Optional boolean tensor of the shape of the inputs, or of their leading axes without the channel axis, as
            Keras makes them: ``(batch, steps)``, wherever the channels are. Masked positions do not enter the
            statistics, and whatever is in them reaches neither outputs nor gradients: they come out as the mean of the
            others would.

    Output:
        A tensor of the shape of the inputs in the layer's compute dtype. Statistics, affine, activation and moments are
        computed in float32 (in float64 for float64), also under ``mixed_float16`` and ``mixed_bfloat16``.

    Raises:
        ValueError: For bad arguments when the layer is made; for groups that do not divide the channels and an axis
            that is out of range when it is built; for integer inputs when it is called.

    Example:

    >>> import keras, keras_proxynorm
    >>> model = keras.Sequential([
    ...     keras.Input((32, 32, 3)),
    ...     keras.layers.Conv2D(64, 3, use_bias=False),
    ...     keras_proxynorm.GroupNormProxy(groups=16),
    ... ])
    >>> model.output_shape
    (None, 30, 30, 64)

    Reference:

    - [Labatie et al., 2021](https://arxiv.org/abs/2106.03743)
    - [Wu and He, 2018](https://arxiv.org/abs/1803.08494)
    """

    effect_on_single_values = "each value is its own mean, so every normalized value is 0. Use fewer groups."

    def __init__(
        self,
        groups: int = 32,
        axis: int = -1,
        epsilon: float = 1e-3,
        center: bool = True,
        scale: bool = True,
        beta_initializer: InitializerLike = "zeros",
        gamma_initializer: InitializerLike = "ones",
        beta_regularizer: RegularizerLike = None,
        gamma_regularizer: RegularizerLike = None,
        beta_constraint: ConstraintLike = None,
        gamma_constraint: ConstraintLike = None,
        *,
        activation: ActivationLike = "relu",
        proxy_epsilon: float = 0.03,
        proxy_moments: str = "exact",
        num_quantiles: int = 256,
        learn_proxy: bool = True,
        proxy_initializer: InitializerLike = "zeros",
        proxy_regularizer: RegularizerLike = None,
        proxy_constraint: ConstraintLike = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**arguments_passed_on(locals(), without=("groups", "epsilon")))
        self.groups = as_groups("groups", groups)
        self.epsilon = as_epsilon("epsilon", epsilon)

    def _number_of_groups(self, shape):
        return self._channels(shape) if self.groups == -1 else self.groups

    def _check_channels(self, input_shape, channels):
        check_divides_channels("groups", self._number_of_groups(input_shape), channels, input_shape)

    def values_per_statistic(self, input_shape: Shape) -> int | None:
        return values_per_group(input_shape, self._number_of_groups(input_shape))

    def _normalize_and_activate(self, x, mask, gamma, beta, moments):
        return kernels.group_normalize_and_activate(
            x,
            gamma,
            beta,
            moments,
            activation=self._elementwise,
            groups=self._number_of_groups(x.shape),
            axis=self._channel_axis(x.shape),
            epsilon=self.epsilon,
            proxy_epsilon=self.proxy_epsilon,
            mask=mask,
        )

    def _normalize(self, x, mask):
        groups, axis = self._number_of_groups(x.shape), self._channel_axis(x.shape)
        return kernels.group_normalize(x, groups, axis, self.epsilon, mask=mask)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "groups": self.groups, "epsilon": self.epsilon}
