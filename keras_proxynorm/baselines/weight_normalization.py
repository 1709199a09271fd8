"""Weight normalization: filters of unit length, and activations that are standardized for a Gaussian input."""

import keras
from keras import ops

from keras_proxynorm import kernels
from keras_proxynorm.baselines.kernel_normalization import ActivatedKernelNormalization, square_root

__all__ = ["WeightNormalization"]


@keras.saving.register_keras_serializable(package="keras_proxynorm")
class WeightNormalization(ActivatedKernelNormalization):
    """Weight normalization: a linear layer whose filters have unit length, with affine and activation.

    For each filter ``c``,

        z = (phi(x * W' + beta_c) - mean) / stddev,    W' = gamma_c W / (||W_c||_2 + kernel_epsilon)

    where ``mean`` and ``stddev`` are those of ``phi(N(0, 1))``, for relu .3989 and .5838, so that signals of zero mean
    and unit variance stay so from layer to layer. Nothing depends on data.

    Args:
        layer: The linear layer, without bias and activation: a `Dense`, `Conv1D`, `Conv2D`, `Conv3D`,
            `DepthwiseConv1D` or `DepthwiseConv2D` of `keras.layers`.
        kernel_epsilon: Float, added to the length of a filter. Defaults to 1e-5.
        activation: The activation after the layer, as in `keras_proxynorm.GroupNormProxy`; with None nothing is
            standardized. Defaults to ``"relu"``.
        **kwargs: The arguments for `gamma` and `beta` of `keras_proxynorm.GroupNormProxy`; base layer arguments.

    Attributes:
        gamma, beta: Weights of shape ``(channels,)``, or None.

    The call arguments, the output and its mask are those of the wrapped layer, the output in the compute dtype of this
    one. Bad arguments and integer inputs raise a ValueError.

    Example:

    >>> import keras
    >>> from keras_proxynorm.baselines import WeightNormalization
    >>> layer = WeightNormalization(keras.layers.Conv2D(16, 3, use_bias=False))
    >>> tuple(layer(keras.ops.ones((2, 8, 8, 3))).shape)
    (2, 6, 6, 16)

    Reference:

    - [Salimans and Kingma, 2016](https://arxiv.org/abs/1602.07868), weight normalization
    - [Arpit et al., 2016](https://arxiv.org/abs/1603.01431), the standardized activation
    - [Lubana et al., 2021](https://arxiv.org/abs/2106.05956), whose formula this is
    """

    def _normalize(self, inputs, kernel, dtype, training):
        gamma, _ = self._affine(dtype)
        filters = self._by_filter(kernel)
        lengths = square_root(ops.sum(ops.square(filters), axis=0))
        filters = kernels.affine(filters / (lengths + self.kernel_epsilon), gamma, None)
        outputs = self._plus_beta(self._linear(inputs, ops.reshape(filters, kernel.shape), dtype))
        if self._elementwise.is_identity:
            return outputs
        mean, variance = self._standard_moments(dtype)
        return (self._elementwise.function(outputs) - mean) * ops.rsqrt(variance)
