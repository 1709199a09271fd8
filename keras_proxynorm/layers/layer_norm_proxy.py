"""Layer normalization over all features of a sample, activation and proxy normalization as one layer."""

from typing import Any

import keras

from keras_proxynorm.layers.base import (
    ActivationLike,
    ConstraintLike,
    InitializerLike,
    RegularizerLike,
    arguments_passed_on,
)
from keras_proxynorm.layers.group_norm_proxy import GroupNormProxy

__all__ = ["LayerNormProxy"]


@keras.saving.register_keras_serializable(package="keras_proxynorm")
class LayerNormProxy(GroupNormProxy):
    """Layer normalization, affine, activation and Proxy Normalization: `GroupNormProxy` with one group.

    Each sample is normalized by one mean and one variance over all its features, ``(height, width, channels)`` for an
    image, as in the paper. Affine, activation and proxy normalization follow for each channel; see `GroupNormProxy`.

    This is not `keras.layers.LayerNormalization`, which by default normalizes each position by itself over the
    channels. Here all positions of a sample share their statistics: right for images, wrong for causal sequence
    models, where a position must not see the ones after it.

    Args:
        axis: Integer, the channel axis, not 0: where `gamma`, `beta` and the proxies live. The statistics are over all
            axes but the batch. Defaults to -1.
        epsilon: Float, added to the variance of the input. Defaults to 1e-3.
        **kwargs: Base layer keyword arguments, such as `name` and `dtype`.

    The other arguments and their defaults, attributes, call arguments, output and errors are those of `GroupNormProxy`.

    Example:

    >>> import keras, keras_proxynorm
    >>> model = keras.Sequential([keras.Input((8, 8, 1)), keras.layers.Conv2D(16, 3, use_bias=False)])
    >>> model.add(keras_proxynorm.LayerNormProxy())
    >>> [weight.name for weight in model.layers[-1].weights]
    ['gamma', 'beta', 'proxy']

    Reference:

    - [Labatie et al., 2021](https://arxiv.org/abs/2106.03743)
    - [Ba et al., 2016](https://arxiv.org/abs/1607.06450)
    """

    def __init__(
        self,
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
        if "groups" in kwargs:
            raise ValueError(
                "LayerNormProxy has no argument `groups`: it has one group. Use GroupNormProxy for more. "
                f"Received: groups={kwargs['groups']!r}"
            )
        super().__init__(groups=1, **arguments_passed_on(locals()))

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        del config["groups"]
        return config
