"""What the proxy-normalized layers share: the activation step, its arguments and weights."""

from typing import Any

import keras
import numpy as np
from keras import constraints, initializers, ops, regularizers

from keras_proxynorm import kernels
from keras_proxynorm.arguments import argument_error, as_boolean, as_choice, as_epsilon, as_positive_integer
from keras_proxynorm.layers.activations import WithActivation
from keras_proxynorm.layers.base import (
    ActivationLike,
    ConstraintLike,
    InitializerLike,
    NormalizationLayer,
    RegularizerLike,
    Shape,
)
from keras_proxynorm.moments import METHODS, Tensor, computation_dtype, resolve_activation

__all__ = ["ProxyNormalizationLayer"]


class ProxyNormalizationLayer(WithActivation, NormalizationLayer):
    """Affine, activation and proxy normalization; subclasses may normalize first.

    Not meant to be used directly; see `GroupNormProxy`, `LayerNormProxy` and `ProxyActivation`.
    """

    def __init__(
        self,
        *,
        activation: ActivationLike,
        proxy_epsilon: float,
        proxy_moments: str,
        num_quantiles: int,
        learn_proxy: bool,
        proxy_initializer: InitializerLike,
        proxy_regularizer: RegularizerLike,
        proxy_constraint: ConstraintLike,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.proxy: Any = None
        self.activation = activation
        self.proxy_epsilon = as_epsilon("proxy_epsilon", proxy_epsilon)
        self.proxy_moments = as_choice("proxy_moments", proxy_moments, METHODS)
        self.num_quantiles = as_positive_integer("num_quantiles", num_quantiles)
        self.learn_proxy = as_boolean("learn_proxy", learn_proxy)
        self.proxy_initializer = initializers.get(proxy_initializer)
        self.proxy_regularizer = regularizers.get(proxy_regularizer)
        self.proxy_constraint = constraints.get(proxy_constraint)

    def _set_activation(self, activation):
        if self.built and resolve_activation(activation).is_identity != (self.proxy is None):
            raise argument_error(
                "activation",
                activation,
                "None exactly if it was None when the layer was built, since only then there is no proxy; otherwise "
                "make a new layer",
            )
        super()._set_activation(activation)

    @property
    def proxy_mean(self) -> Tensor | None:
        """Mean of the Gaussian proxy of each channel, shape ``(channels,)``; None without a proxy or before build."""
        return None if self.proxy is None else self.proxy[0]

    @property
    def proxy_stddev(self) -> Tensor | None:
        """Standard deviation of the proxy of each channel, shape ``(channels,)``; None like `proxy_mean`."""
        return None if self.proxy is None else ops.abs(1.0 + self.proxy[1])

    def build(self, input_shape: Shape) -> None:
        super().build(input_shape)
        # Proxy normalization of a line would only cancel gamma.
        if not self._elementwise.is_identity:
            self.proxy = self._add_parameter("proxy", 2, self._channels(input_shape), trainable=self.learn_proxy)

    def call(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self._for_statistics(inputs)
        outputs = self._normalize_and_activate(x, mask, *self._affine(x.dtype), self.activation_moments(x.dtype))
        return ops.cast(outputs, self.compute_dtype)

    def normalize_inputs(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """The normalized inputs ``y``, which `gamma`, `beta`, the activation and proxy normalization are applied to.

        Args:
            inputs: Tensor, as for a call of the layer.
            mask: As for a call of the layer.

        Returns:
            A tensor of the shape of `inputs`, in the dtype that the layer computes statistics in.
        """
        return self._normalize(self._for_statistics(inputs), mask)

    def activation_moments(self, dtype: Any = None) -> tuple[Tensor, Tensor] | None:
        """Mean and variance of the activation under the proxy, by which the output is normalized.

        Args:
            dtype: The dtype to compute in. Defaults to that of the variables, or float32 if that is less precise.

        Returns:
            Two tensors of shape ``(channels,)``; None without a proxy.
        """
        if self.proxy is None:
            return None
        if dtype is None:
            dtype = computation_dtype(self.variable_dtype)
        return kernels.proxy_moments(
            self._elementwise,
            *self._affine(dtype),
            ops.cast(self.proxy, dtype),
            method=self.proxy_moments,
            num_quantiles=self.num_quantiles,
        )

    def inference_constants(self) -> tuple[np.ndarray, ...]:
        """What the layer multiplies with and adds, once its weights do not change any more.

        Returns:
            ``(scale, offset, output_scale, output_offset)``, NumPy vectors of shape ``(channels,)``, computed in
            float64 where the backend has it, such that the layer computes ``output_scale * activation(scale * y +
            offset) + output_offset`` of the normalized input ``y``.
        """
        (channels,) = self.input_spec.axes.values()
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
        return {
            **super().get_config(),
            "activation": keras.activations.serialize(self.activation),
            "proxy_epsilon": self.proxy_epsilon,
            "proxy_moments": self.proxy_moments,
            "num_quantiles": self.num_quantiles,
            "learn_proxy": self.learn_proxy,
            **self._config_of_parameter("proxy"),
        }
