"""What the methods share that wrap the preceding linear layer, because they read or change its kernel."""

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_proxynorm import kernels
from keras_proxynorm.arguments import argument_error, as_epsilon
from keras_proxynorm.kernels.channels import broadcast
from keras_proxynorm.layers.activations import WithActivation
from keras_proxynorm.layers.base import ActivationLike, NormalizationLayer, Shape
from keras_proxynorm.moments import Tensor, computation_dtype

__all__ = ["ActivatedKernelNormalization", "KernelNormalization", "square_root"]

_DEPTHWISE = ("DepthwiseConv1D", "DepthwiseConv2D")
_KINDS = ("Dense", "Conv1D", "Conv2D", "Conv3D", *_DEPTHWISE)


def _classes(names):
    return tuple(getattr(keras.layers, name) for name in names)


class KernelNormalization(NormalizationLayer):
    """A normalization that wraps a linear layer; subclasses say in `_normalize` what they compute.

    Not meant to be used directly. As in `keras.layers.SpectralNormalization`, the linear layer is the first argument.
    """

    kinds: tuple[str, ...] = _KINDS

    def __init__(self, layer: keras.layers.Layer, **kwargs: Any) -> None:
        reason = self.unsupported_because(layer)
        if reason is not None:
            raise argument_error("layer", layer, f"a layer of the kind {', '.join(self.kinds)}", reason)
        if layer.use_bias or layer.activation is not keras.activations.linear:
            raise argument_error(
                "layer",
                layer,
                f"a layer with use_bias=False and without activation: {type(self).__name__} has a `beta`, and the "
                "activation comes after it",
                f"use_bias={layer.use_bias}, activation={layer.activation!r}",
            )
        if layer.activity_regularizer is not None:
            raise argument_error(
                "layer",
                layer,
                f"a layer without activity_regularizer; give it to {type(self).__name__}",
                f"activity_regularizer={layer.activity_regularizer!r}",
            )
        axis = 1 if getattr(layer, "data_format", None) == "channels_first" else -1
        super().__init__(axis=axis, **kwargs)
        # A convolution has other positions in its outputs than in its inputs, and drops masks.
        self.supports_masking = layer.supports_masking
        self.layer = layer

    @classmethod
    def unsupported_because(cls, layer: Any) -> str | None:
        """Why a layer cannot be wrapped, even without bias and activation; None if it can."""
        if type(layer) not in _classes(cls.kinds):
            return f"which is a {type(layer).__name__}"
        if getattr(layer, "lora_rank", None) or getattr(layer, "quantization_mode", None):
            return "whose kernel is quantized or adapted"
        return None

    @property
    def is_depthwise(self) -> bool:
        return isinstance(self.layer, _classes(_DEPTHWISE))

    def build(self, input_shape: Shape) -> None:
        if not self.layer.built:
            self.layer.build(input_shape)
            self.layer.built = True
        self.input_spec = self.layer.input_spec
        self.channels = self.layer.compute_output_shape(input_shape)[self.axis]
        self._add_affine(self.channels)
        self.built = True

    def call(self, inputs: Tensor, training: bool | None = None) -> Tensor:
        self._check_dtype(inputs)
        reason = self.unsupported_because(self.layer)  # Keras quantizes what is inside of layers, too.
        if reason is not None:
            raise ValueError(f"{type(self).__name__} cannot work with {self.layer.name!r}, {reason}.")
        # The kernel itself, which is not cast in here, since `autocast` is False.
        kernel = ops.convert_to_tensor(self.layer.kernel)
        dtype = computation_dtype(kernel.dtype, self.variable_dtype)
        outputs = self._normalize(inputs, ops.cast(kernel, dtype), dtype, bool(training) and self.trainable)
        return ops.cast(outputs, self.compute_dtype)

    def compute_mask(self, inputs: Tensor, previous_mask: Tensor | None) -> Tensor | None:
        return self.layer.compute_mask(inputs, previous_mask)

    def _normalize(self, inputs, kernel, dtype, training):
        """The whole layer as a function of tensors.

        Args:
            inputs: The inputs, of any float dtype.
            kernel: The kernel of the wrapped layer, in `dtype`.
            dtype: The dtype that statistics are computed in.
            training: Whether it is trained.
        """
        raise NotImplementedError

    def _linear(self, inputs, kernel, dtype):
        """The outputs of the wrapped layer with another kernel, computed in its own dtype and cast to `dtype`."""
        mapping = [(v, kernel if v is self.layer.kernel else v.value) for v in self.layer.variables]
        with keras.StatelessScope(state_mapping=mapping):
            return ops.cast(self.layer(inputs), dtype)

    def _plus_beta(self, outputs):
        """Outputs of the wrapped layer, with `beta` added if there is one."""
        _, beta = self._affine(outputs.dtype)
        return kernels.affine(outputs, None, broadcast(beta, outputs, self.axis % len(outputs.shape)))

    def _by_filter(self, kernel):
        """A kernel as a matrix with one column for each channel of the output."""
        return ops.reshape(kernel, (-1, self.channels))

    def inference_linear(self) -> tuple[np.ndarray, np.ndarray, Any] | None:
        """Kernel, bias and activation with which the wrapped layer alone computes what this layer does at inference.

        Returns:
            ``(kernel, bias, activation)``, NumPy arrays in float64 where the backend has it, and an activation as Keras
            takes it; None if there are none.
        """
        return None

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        return self.layer.compute_output_shape(input_shape)

    def get_config(self) -> dict[str, Any]:
        config = {**super().get_config(), "layer": keras.saving.serialize_keras_object(self.layer)}
        # It is that of the wrapped layer.
        del config["axis"]
        return config

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: dict | None = None) -> "KernelNormalization":
        layer = keras.saving.deserialize_keras_object(config["layer"], custom_objects=custom_objects)
        return cls(**{**config, "layer": layer})


class ActivatedKernelNormalization(WithActivation, KernelNormalization):
    """A linear layer with filters that are normalized, `gamma` and `beta`, and an activation.

    Not meant to be used directly; see `WeightNormalization` and `WeightStandardization`.
    """

    def __init__(
        self,
        layer: keras.layers.Layer,
        kernel_epsilon: float = 1e-5,
        *,
        activation: ActivationLike = "relu",
        **kwargs: Any,
    ) -> None:
        super().__init__(layer, **kwargs)
        self.kernel_epsilon = as_epsilon("kernel_epsilon", kernel_epsilon)
        self.activation = activation

    def _standard_moments(self, dtype):
        """Mean and variance of the activation of a standard normal."""
        return self._elementwise.moments(ops.zeros((), dtype), ops.ones((), dtype))

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "kernel_epsilon": self.kernel_epsilon,
            "activation": keras.activations.serialize(self.activation),
        }


def square_root(x: Tensor) -> Tensor:
    """The square root, with a gradient of 0 at 0, where that of `keras.ops.sqrt` is infinite."""
    return ops.where(x > 0, ops.sqrt(ops.where(x > 0, x, ops.ones_like(x))), 0.0)
