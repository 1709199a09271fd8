"""Weight normalization: filters of unit length, and activations that are standardized for a Gaussian input."""

import keras
from keras import ops

from keras_proxynorm import kernels
from keras_proxynorm.arguments import as_nonnegative
from keras_proxynorm.baselines.kernel_normalization import KernelNormalization
from keras_proxynorm.kernels import channels
from keras_proxynorm.layers.base import ActivationLike
from keras_proxynorm.moments import resolve_activation

__all__ = ["WeightNormalization"]


@keras.saving.register_keras_serializable(package="keras_proxynorm")
class WeightNormalization(KernelNormalization):
    """Weight normalization: a linear layer whose filters have unit length, with scale, offset and activation.

    For each filter ``c``,

        z = (phi(x * W' + beta_c) - mean) / stddev,    W' = gamma_c W / (||W_c||_2 + kernel_epsilon)

    where ``mean`` and ``stddev`` are those of ``phi(N(0, 1))``, for relu .3989 and .5838, so that signals of zero mean
    and unit variance stay so from layer to layer. Nothing depends on data.

    Args:
        layer: The linear layer, without bias and activation: a `Dense`, `Conv1D`, `Conv2D`, `Conv3D`,
            `DepthwiseConv1D` or `DepthwiseConv2D` of `keras.layers`.
        kernel_epsilon: Float, added to the length of a filter. Defaults to 1e-5.
        activation: The activation behind the layer: a name, an elementwise callable of one tensor, a parameter-free
            Keras activation layer, or None, where nothing is standardized. Defaults to ``"relu"``.
        **kwargs: `center`, `scale`, and initializers, regularizers and constraints of `beta` and `gamma`, as in
            `keras_proxynorm.GroupNormProxy`; base layer keyword arguments, such as `name` and `dtype`.

    Attributes:
        gamma: Weight of shape ``(channels,)``, or None.
        beta: Weight of shape ``(channels,)``, or None.

    Call arguments:
        inputs: Float tensor, as for the layer inside.

    Output:
        A tensor of the shape of the output of the layer inside, in the layer's compute dtype.

    Raises:
        ValueError: For bad arguments.

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

    def __init__(
        self,
        layer: keras.layers.Layer,
        kernel_epsilon: float = 1e-5,
        *,
        activation: ActivationLike = "relu",
        **kwargs,
    ):
        super().__init__(layer, **kwargs)
        self.kernel_epsilon = as_nonnegative("kernel_epsilon", kernel_epsilon)
        self._elementwise = resolve_activation(activation)
        self.activation = keras.activations.get(activation)

    def _normalize(self, inputs, kernel, dtype, training):
        gamma, beta = self._affine(dtype)
        filters = self._by_filter(kernel)
        squares = ops.sum(ops.square(filters), axis=0)
        # The gradient of a square root at 0 is infinite.
        norms = ops.where(squares > 0, ops.sqrt(ops.where(squares > 0, squares, ops.ones_like(squares))), 0.0)
        filters = kernels.affine(filters / (norms + self.kernel_epsilon), gamma, None)
        outputs = self._linear(inputs, ops.reshape(filters, kernel.shape), dtype)
        outputs = kernels.affine(outputs, None, channels.broadcast(beta, outputs, self.axis % len(outputs.shape)))
        if self._elementwise.is_identity:
            return outputs
        mean, variance = self._elementwise.moments(ops.zeros((), dtype), ops.ones((), dtype))
        return (self._elementwise.function(outputs) - mean) * ops.rsqrt(variance)

    def get_config(self):
        return {
            **super().get_config(),
            "kernel_epsilon": self.kernel_epsilon,
            "activation": keras.activations.serialize(self.activation),
        }
