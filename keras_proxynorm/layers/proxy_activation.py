"""The activation step of proxy normalization alone, for an input that some other layer has normalized."""

import keras

from keras_proxynorm.layers.base import ActivationLike
from keras_proxynorm.layers.base import ConstraintLike
from keras_proxynorm.layers.base import InitializerLike
from keras_proxynorm.layers.base import RegularizerLike
from keras_proxynorm.layers.proxy_normalization import ProxyNormalizationLayer

__all__ = ["ProxyActivation"]


@keras.saving.register_keras_serializable(package="keras_proxynorm")
class ProxyActivation(ProxyNormalizationLayer):
    """Affine, activation and Proxy Normalization of an input that is already normalized.

    For a normalization of your own (zero mean and unit variance over its statistics set, without scale and offset),
    this is the rest of the layer: ``(phi(gamma y + beta) - mu) / sqrt(var + proxy_epsilon)``, see `GroupNormProxy`.
    `GroupNormProxy(...)` computes the same as a `keras.layers.GroupNormalization(center=False, scale=False, ...)`
    followed by `ProxyActivation(...)`, in one layer.

    Args:
        axis: Integer, the channel axis, not 0. Defaults to -1.
        center: If True, add the offset `beta` before the activation. Defaults to True.
        scale: If True, multiply by `gamma` before the activation. Defaults to True.
        beta_initializer: Initializer of `beta`. Defaults to zeros.
        gamma_initializer: Initializer of `gamma`. Defaults to ones.
        beta_regularizer: Optional regularizer of `beta`.
        gamma_regularizer: Optional regularizer of `gamma`.
        beta_constraint: Optional constraint of `beta`.
        gamma_constraint: Optional constraint of `gamma`.
        activation: As in `GroupNormProxy`. Defaults to ``"relu"``.
        proxy_epsilon: As in `GroupNormProxy`. Defaults to 0.03.
        proxy_moments: As in `GroupNormProxy`. Defaults to ``"exact"``.
        num_quantiles: As in `GroupNormProxy`. Defaults to 256.
        learn_proxy: As in `GroupNormProxy`. Defaults to True.
        proxy_initializer: As in `GroupNormProxy`. Defaults to zeros.
        proxy_regularizer: As in `GroupNormProxy`.
        proxy_constraint: As in `GroupNormProxy`.
        **kwargs: Base layer keyword arguments, such as `name` and `dtype`.

    Attributes, call arguments, output and errors are those of `GroupNormProxy`; a mask is passed on and not used.

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
        **kwargs,
    ):
        super().__init__(
            axis=axis,
            center=center,
            scale=scale,
            beta_initializer=beta_initializer,
            gamma_initializer=gamma_initializer,
            beta_regularizer=beta_regularizer,
            gamma_regularizer=gamma_regularizer,
            beta_constraint=beta_constraint,
            gamma_constraint=gamma_constraint,
            activation=activation,
            proxy_epsilon=proxy_epsilon,
            proxy_moments=proxy_moments,
            num_quantiles=num_quantiles,
            learn_proxy=learn_proxy,
            proxy_initializer=proxy_initializer,
            proxy_regularizer=proxy_regularizer,
            proxy_constraint=proxy_constraint,
            **kwargs,
        )
