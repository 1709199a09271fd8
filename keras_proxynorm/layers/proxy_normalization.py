"""What the proxy-normalized layers share: the activation step, its arguments and weights."""

from typing import Any

import keras
import numpy as np
from keras import constraints
from keras import initializers
from keras import ops
from keras import regularizers

from keras_proxynorm import kernels
from keras_proxynorm.arguments import as_nonnegative
from keras_proxynorm.layers.base import ActivationLike
from keras_proxynorm.layers.base import ConstraintLike
from keras_proxynorm.layers.base import InitializerLike
from keras_proxynorm.layers.base import NormalizationLayer
from keras_proxynorm.layers.base import RegularizerLike
from keras_proxynorm.moments import check_method
from keras_proxynorm.moments import computation_dtype
from keras_proxynorm.moments import resolve_activation

__all__ = ["ProxyNormalizationLayer"]


class ProxyNormalizationLayer(NormalizationLayer):
    """Affine, activation and proxy normalization; subclasses may normalize first.

    Not meant to be used directly; see `GroupNormProxy`, `LayerNormProxy` and `ProxyActivation`.
    """

    def __init__(
        self,
        axis: int,
        center: bool,
        scale: bool,
        beta_initializer: InitializerLike,
        gamma_initializer: InitializerLike,
        beta_regularizer: RegularizerLike,
        gamma_regularizer: RegularizerLike,
        beta_constraint: ConstraintLike,
        gamma_constraint: ConstraintLike,
        activation: ActivationLike,
        proxy_epsilon: float,
        proxy_moments: str,
        num_quantiles: int,
        learn_proxy: bool,
        proxy_initializer: InitializerLike,
        proxy_regularizer: RegularizerLike,
        proxy_constraint: ConstraintLike,
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
            **kwargs,
        )
        check_method(proxy_moments, num_quantiles, name="proxy_moments")
        self.supports_masking = True
        # Not by the property: on PyTorch a layer is a Module, and Modules are assigned past properties.
        self._set_activation(activation)
        self.proxy_epsilon = as_nonnegative("proxy_epsilon", proxy_epsilon)
        self.proxy_moments = proxy_moments
        self.num_quantiles = num_quantiles
        self.learn_proxy = learn_proxy
        self.proxy_initializer = initializers.get(proxy_initializer)
        self.proxy_regularizer = regularizers.get(proxy_regularizer)
        self.proxy_constraint = constraints.get(proxy_constraint)
        self.proxy = None

    @property
    def activation(self):
        """The activation, as a function or a layer. Assigning another one takes effect at the next call or tracing."""
        return self._activation

    @activation.setter
    def activation(self, activation: ActivationLike):
        self._set_activation(activation)

    def _set_activation(self, activation):
        elementwise = resolve_activation(activation)
        if self.built and elementwise.is_identity != (self.proxy is None):
            raise ValueError(
                "The activation of a layer that is built cannot change between None and another, because only one of "
                f"them has a proxy. Make a new layer. Received: activation={activation!r}"
            )
        self._elementwise = elementwise
        self._activation = keras.activations.get(activation)

    @property
    def proxy_mean(self):
        """Mean of the Gaussian proxy of each channel, shape ``(channels,)``; None without a proxy or before build."""
        return None if self.proxy is None else self.proxy[0]

    @property
    def proxy_stddev(self):
        """Standard deviation of the proxy of each channel, shape ``(channels,)``; None like `proxy_mean`."""
        return None if self.proxy is None else ops.abs(1.0 + self.proxy[1])

    def build(self, input_shape):
        super().build(input_shape)
        # Proxy normalization of a line would only cancel gamma.
        if not self._elementwise.is_identity:
            (channels,) = self.input_spec.axes.values()
            self.proxy = self.add_weight(
                shape=(2, channels),
                name="proxy",
                initializer=self.proxy_initializer,
                regularizer=self.proxy_regularizer,
                constraint=self.proxy_constraint,
                trainable=self.learn_proxy,
                autocast=False,
            )

    def call(self, inputs, mask=None):
        self._check_dtype(inputs)
        dtype = computation_dtype(inputs.dtype, self.variable_dtype)
        outputs = self._normalize_and_activate(
            ops.cast(inputs, dtype), mask, *self._affine(dtype), self.activation_moments(dtype)
        )
        return ops.cast(outputs, self.compute_dtype)

    def normalize_inputs(self, inputs, mask=None):
        """The normalized inputs ``y``, which `gamma`, `beta`, the activation and proxy normalization are applied to.

        Args:
            inputs: Tensor, as for a call of the layer.
            mask: As for a call of the layer.

        Returns:
            A tensor of the shape of `inputs`, in the dtype that the layer computes statistics in.
        """
        self._check_dtype(inputs)
        return self._normalize(ops.cast(inputs, computation_dtype(inputs.dtype, self.variable_dtype)), mask)

    def activation_moments(self, dtype=None):
        """Mean and variance of the activation under the proxy, by which the output is normalized.

        Args:
            dtype: The dtype to compute in. Defaults to that of the variables, or float32 if that is less precise.

        Returns:
            Two tensors of shape ``(channels,)``; None without a proxy.
        """
        if self.proxy is None:
            return None
        dtype = dtype or computation_dtype(self.variable_dtype)
        return kernels.proxy_moments(
            self._elementwise,
            *self._affine(dtype),
            ops.cast(self.proxy, dtype),
            self.proxy_moments,
            self.num_quantiles,
        )

    def inference_constants(self) -> tuple[np.ndarray, ...]:
        """What the layer multiplies with and adds, once its weights do not change any more.

        Returns:
            ``(scale, offset, output_scale, output_offset)``, NumPy vectors of shape ``(channels,)``, computed in
            float64 where the backend has it, such that the layer computes ``output_scale * activation(scale * y +
            offset) + output_offset`` of the normalized input ``y``.
        """
        channels = next(iter(self.input_spec.axes.values()))
        scale, offset = (
            np.full(channels, default) if weight is None else ops.convert_to_numpy(weight).astype("float64")
            for weight, default in ((self.gamma, 1.0), (self.beta, 0.0))
        )
        moments = self.activation_moments("float64")
        if moments is None:
            return scale, offset, np.ones(channels), np.zeros(channels)
        mean, variance = (ops.convert_to_numpy(moment).astype("float64") for moment in moments)
        output_scale = 1 / np.sqrt(variance + self.proxy_epsilon)
        return scale, offset, output_scale, -mean * output_scale

    def _normalize_and_activate(self, x, mask, gamma, beta, moments):
        """The whole layer as a function of tensors, here without a normalization.

        Args:
            x: The inputs, a tensor of the dtype of the computation.
            mask: The mask or None.
            gamma: Tensor of shape ``(channels,)`` or None.
            beta: Tensor of shape ``(channels,)`` or None.
            moments: What `activation_moments` returns.
        """
        return kernels.affine_and_activate(
            x,
            gamma,
            beta,
            moments,
            activation=self._elementwise,
            axis=self._channel_axis(x.shape),
            proxy_epsilon=self.proxy_epsilon,
        )

    def _normalize(self, x, mask):
        """The first step of `_normalize_and_activate` alone; here there is none."""
        return x

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        config.update(
            {
                "activation": keras.activations.serialize(self.activation),
                "proxy_epsilon": self.proxy_epsilon,
                "proxy_moments": self.proxy_moments,
                "num_quantiles": self.num_quantiles,
                "learn_proxy": self.learn_proxy,
                "proxy_initializer": initializers.serialize(self.proxy_initializer),
                "proxy_regularizer": regularizers.serialize(self.proxy_regularizer),
                "proxy_constraint": constraints.serialize(self.proxy_constraint),
            }
        )
        return config
