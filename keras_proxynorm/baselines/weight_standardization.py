"""Weight standardization: filters of zero mean and unit variance in place of normalized activations."""

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_proxynorm import kernels
from keras_proxynorm.baselines.kernel_normalization import ActivatedKernelNormalization, square_root

__all__ = ["WeightStandardization"]


@keras.saving.register_keras_serializable(package="keras_proxynorm")
class WeightStandardization(ActivatedKernelNormalization):
    """Scaled weight standardization: a linear layer whose filters are standardized, with affine and activation.

    For each filter ``c`` with ``fan_in`` weights, of mean ``m_c`` and standard deviation ``s_c``,

        z = phi(x * W' + beta_c),    W' = gain gamma_c (W - m_c) / ((s_c + kernel_epsilon) sqrt(fan_in))

    where ``gain`` is 1 over the standard deviation of ``phi(N(0, 1))``, for relu ``sqrt(2 pi / (pi - 1))``, so that
    signals keep their variance from layer to layer. Nothing depends on data. There is nothing to normalize where a
    filter has one weight (a depthwise 1x1 convolution): it becomes 0.

    Args:
        layer: The linear layer, without bias and activation: a `Dense`, `Conv1D`, `Conv2D`, `Conv3D`,
            `DepthwiseConv1D` or `DepthwiseConv2D` of `keras.layers`.
        kernel_epsilon: Float, added to the standard deviation of a filter. Defaults to 1e-5.
        activation: The activation after the layer, as in `keras_proxynorm.GroupNormProxy`; with None the gain is 1.
            Defaults to ``"relu"``.
        **kwargs: The arguments for `gamma` and `beta` of `keras_proxynorm.GroupNormProxy`; base layer arguments.

    Attributes:
        gamma, beta: Weights of shape ``(channels,)``, or None.

    The call arguments, the output and its mask are those of the wrapped layer, the output in the compute dtype of this
    one. Bad arguments and integer inputs raise a ValueError.

    Example:

    >>> import keras
    >>> from keras_proxynorm.baselines import WeightStandardization
    >>> layer = WeightStandardization(keras.layers.Conv2D(16, 3, use_bias=False))
    >>> tuple(layer(keras.ops.ones((2, 8, 8, 3))).shape)
    (2, 6, 6, 16)

    Reference:

    - [Qiao et al., 2019](https://arxiv.org/abs/1903.10520), weight standardization
    - [Brock et al., 2021](https://arxiv.org/abs/2101.08692), the gain
    - [Lubana et al., 2021](https://arxiv.org/abs/2106.05956), whose formula this is
    """

    def _normalize(self, inputs, kernel, dtype, training):
        outputs = self._linear(inputs, self._standardized(kernel), dtype)
        return self._elementwise.function(self._plus_beta(outputs))

    def _standardized(self, kernel):
        gamma, _ = self._affine(kernel.dtype)
        filters = self._by_filter(kernel)
        fan_in = filters.shape[0]
        filters = filters - ops.sum(filters, axis=0) / fan_in
        stddev = square_root(ops.sum(ops.square(filters), axis=0) / fan_in)
        _, activated_variance = self._standard_moments(kernel.dtype)
        filters = filters * ops.rsqrt(activated_variance) / ((stddev + self.kernel_epsilon) * fan_in**0.5)
        return ops.reshape(kernels.affine(filters, gamma, None), kernel.shape)

    def inference_linear(self) -> tuple[np.ndarray, np.ndarray, Any]:
        kernel = ops.convert_to_numpy(self._standardized(ops.cast(self.layer.kernel, "float64")))
        beta = np.zeros(self.channels) if self.beta is None else ops.convert_to_numpy(self.beta)
        return kernel, beta.astype("float64"), self.activation
