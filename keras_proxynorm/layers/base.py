"""What the proxy-normalized layers share: their arguments, weights, config and error messages."""

import numbers
from collections.abc import Callable
from typing import Any
from typing import TypeAlias

import keras
import numpy as np
from keras import constraints
from keras import initializers
from keras import ops
from keras import regularizers

from keras_proxynorm import kernels
from keras_proxynorm.moments import check_method
from keras_proxynorm.moments import computation_dtype
from keras_proxynorm.moments import resolve_activation

__all__ = [
    "ActivationLike",
    "ConstraintLike",
    "InitializerLike",
    "ProxyNormalizationLayer",
    "RegularizerLike",
    "as_epsilon",
    "as_integer",
]

# A layer is a callable, too.
ActivationLike: TypeAlias = str | Callable | dict | None
InitializerLike: TypeAlias = str | Callable | dict
RegularizerLike: TypeAlias = str | Callable | dict | None
ConstraintLike: TypeAlias = str | Callable | dict | None


class ProxyNormalizationLayer(keras.layers.Layer):
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
        super().__init__(**kwargs)
        check_method(proxy_moments, num_quantiles, name="proxy_moments")
        self.supports_masking = True
        # Statistics are float32 whatever the policy, so the input must not be cast to float16 on the way in.
        self.autocast = False
        self.axis = as_integer("axis", axis, "an integer, the channel axis")
        self.center = center
        self.scale = scale
        self.beta_initializer = initializers.get(beta_initializer)
        self.gamma_initializer = initializers.get(gamma_initializer)
        self.beta_regularizer = regularizers.get(beta_regularizer)
        self.gamma_regularizer = regularizers.get(gamma_regularizer)
        self.beta_constraint = constraints.get(beta_constraint)
        self.gamma_constraint = constraints.get(gamma_constraint)
        # Not by the property: on PyTorch a layer is a Module, and Modules are assigned past properties.
        self._set_activation(activation)
        self.proxy_epsilon = as_epsilon("proxy_epsilon", proxy_epsilon)
        self.proxy_moments = proxy_moments
        self.num_quantiles = num_quantiles
        self.learn_proxy = learn_proxy
        self.proxy_initializer = initializers.get(proxy_initializer)
        self.proxy_regularizer = regularizers.get(proxy_regularizer)
        self.proxy_constraint = constraints.get(proxy_constraint)
        self.gamma = None
        self.beta = None
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
        if any(isinstance(size, (list, tuple)) for size in input_shape):
            raise ValueError(f"The inputs must be one tensor, not several. Received: inputs of shapes {input_shape}")
        axis = self._channel_axis(input_shape)
        channels = input_shape[axis]
        if channels is None:
            raise ValueError(
                f"The channel axis of the inputs must have a known size, but axis={self.axis} of the shape "
                f"{tuple(input_shape)} has none."
            )
        self._check_channels(input_shape, channels)
        self.input_spec = keras.layers.InputSpec(ndim=len(input_shape), axes={axis: channels})
        if self.scale:
            self.gamma = self.add_weight(
                shape=(channels,),
                name="gamma",
                initializer=self.gamma_initializer,
                regularizer=self.gamma_regularizer,
                constraint=self.gamma_constraint,
                autocast=False,
            )
        if self.center:
            self.beta = self.add_weight(
                shape=(channels,),
                name="beta",
                initializer=self.beta_initializer,
                regularizer=self.beta_regularizer,
                constraint=self.beta_constraint,
                autocast=False,
            )
        # Proxy normalization of a line would only cancel gamma.
        if not self._elementwise.is_identity:
            self.proxy = self.add_weight(
                shape=(2, channels),
                name="proxy",
                initializer=self.proxy_initializer,
                regularizer=self.proxy_regularizer,
                constraint=self.proxy_constraint,
                trainable=self.learn_proxy,
                autocast=False,
            )
        super().build(input_shape)

    def call(self, inputs, mask=None):
        self._check_dtype(inputs)
        dtype = computation_dtype(inputs.dtype, self.variable_dtype)
        gamma, beta = (None if weight is None else ops.cast(weight, dtype) for weight in (self.gamma, self.beta))
        outputs = self._normalize_and_activate(
            ops.cast(inputs, dtype), mask, gamma, beta, self.activation_moments(dtype)
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
        gamma, beta, proxy = (
            None if weight is None else ops.cast(weight, dtype) for weight in (self.gamma, self.beta, self.proxy)
        )
        return kernels.proxy_moments(self._elementwise, gamma, beta, proxy, self.proxy_moments, self.num_quantiles)

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

    def _check_channels(self, input_shape, channels):
        """Raises a ValueError if the layer cannot have this many channels."""

    def _channel_axis(self, input_shape):
        rank = len(input_shape)
        if rank < 2:
            raise ValueError(
                "The inputs must have a batch axis and a channel axis, that is rank 2 or more. "
                f"Received: inputs.shape={tuple(input_shape)}"
            )
        if not -rank < self.axis < rank or self.axis == 0:
            raise ValueError(
                f"Argument `axis` must be the index of the channel axis, from 1 to {rank - 1} or from {1 - rank} to -1 "
                f"for inputs of rank {rank}; axis 0 is the batch. "
                f"Received: axis={self.axis}, inputs.shape={tuple(input_shape)}"
            )
        return self.axis % rank

    def _check_dtype(self, inputs):
        if not keras.backend.is_float_dtype(inputs.dtype):
            raise ValueError(
                f"The inputs of {type(self).__name__} must have a float dtype; cast or rescale integers first. "
                f"Received: inputs.dtype={keras.backend.standardize_dtype(inputs.dtype)}"
            )

    def compute_output_shape(self, input_shape):
        self._channel_axis(input_shape)
        return input_shape

    def compute_output_spec(self, inputs, mask=None):
        self._check_dtype(inputs)
        return keras.KerasTensor(self.compute_output_shape(inputs.shape), dtype=self.compute_dtype)

    def save_own_variables(self, store):
        for variable in self._own_variables():
            store[variable.name] = variable

    def load_own_variables(self, store):
        # By name: a BatchNormalization stores "0", "1", ..., and without a scale and an offset it has two vectors,
        # as many as a plain norm here. By position its moving statistics would become gamma and beta.
        variables = self._own_variables()
        expected, received = {variable.name for variable in variables}, set(store.keys())
        if expected != received:
            raise ValueError(
                f"Layer '{self.name}' ({type(self).__name__}) expected the variables {sorted(expected)}, but the file "
                f"has {sorted(received) or 'none'} in its place. Weights of another kind of layer cannot be loaded "
                "into it; carry them over with `set_weights` if they mean the same."
            )
        for variable in variables:
            variable.assign(store[variable.name])

    def _own_variables(self):
        return [*self._trainable_variables, *self._non_trainable_variables]

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        config.update(
            {
                "axis": self.axis,
                "center": self.center,
                "scale": self.scale,
                "beta_initializer": initializers.serialize(self.beta_initializer),
                "gamma_initializer": initializers.serialize(self.gamma_initializer),
                "beta_regularizer": regularizers.serialize(self.beta_regularizer),
                "gamma_regularizer": regularizers.serialize(self.gamma_regularizer),
                "beta_constraint": constraints.serialize(self.beta_constraint),
                "gamma_constraint": constraints.serialize(self.gamma_constraint),
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


def as_integer(name: str, value, expected: str) -> int:
    """`value` as a Python integer, or a ValueError; NumPy's integers are integers too, booleans are not."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Integral):
        raise ValueError(f"Argument `{name}` must be {expected}. Received: {name}={value!r}")
    return int(value)


def as_epsilon(name: str, value) -> float:
    """`value` as a Python float that is not negative, or a ValueError."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not float(value) >= 0:
        raise ValueError(f"Argument `{name}` must be a number that is not negative. Received: {name}={value!r}")
    return float(value)
