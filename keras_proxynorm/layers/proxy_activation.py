"""The activation step of proxy normalization alone, for an input that some other layer has normalized."""

from typing import Any

import keras

from keras_proxynorm.layers.base import (
    ActivationLike,
    ConstraintLike,
    InitializerLike,
    RegularizerLike,
    arguments_passed_on,
)
from keras_proxynorm.layers.proxy_normalization import ProxyNormalizationLayer

__all__ = ["ProxyActivation"]


@keras.saving.register_keras_serializable(package="keras_proxynorm")
class ProxyActivation(ProxyNormalizationLayer):
    """Affine, activation and Proxy Normalization of an input that is already normalized.

    For a normalization of your own (zero mean and unit variance over its statistics set, without `gamma` and `beta`),
    this is the rest of the layer: ``(phi(gamma y + beta) - mu) / sqrt(var + proxy_epsilon)``, see `GroupNormProxy`.
    `GroupNormProxy(...)` computes the same as a `keras.layers.GroupNormalization(center=False, scale=False, ...)`
    followed by `ProxyActivation(...)`, in one layer.

    Args:
        axis: Integer, the channel axis, not 0. Defaults to -1.
        **kwargs: Base layer keyword arguments, such as `name` and `dtype`.

    The other arguments and their defaults, attributes, call arguments, output and errors are those of `GroupNormProxy`;
    a mask is passed on and not used.

    Example:

    >>> import keras, keras_proxynorm
    >>> model = keras.Sequential([
    ...     keras.Input((16, 16, 24)),
    ...     keras.layers.GroupNormalization(groups=8, center=False, scale=False),
    ...     keras_proxynorm.ProxyActivation(activation="silu"),
    ... ])
    >>> model.output_shape
    (None, 16, 16, 24)

    Reference:

    - [Labatie et al., 2021](https://arxiv.org/abs/2106.03743)
    """

    def __init__(
        self,
        axis: int = -1,
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
        super().__init__(**arguments_passed_on(locals()))
