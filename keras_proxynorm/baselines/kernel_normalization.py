"""What the methods share that own the linear layer in front of them, because they read or change its kernel."""

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_proxynorm.layers.base import NormalizationLayer
from keras_proxynorm.moments import computation_dtype

__all__ = ["KernelNormalization"]

_KINDS = ("Dense", "Conv1D", "Conv2D", "Conv3D", "DepthwiseConv1D", "DepthwiseConv2D")
_DEPTHWISE = ("DepthwiseConv1D", "DepthwiseConv2D")


def _classes(names):
    return tuple(getattr(keras.layers, name) for name in names)


class KernelNormalization(NormalizationLayer):
    """A normalization that contains a linear layer; subclasses say in `_normalize` what they compute.

    Not meant to be used directly. As in `keras.layers.SpectralNormalization`, the linear layer is the first argument.
    """

    kinds: tuple[str, ...] = _KINDS

    def __init__(self, layer: keras.layers.Layer, **kwargs):
        unfit = self.why_unfit(layer)
        if unfit is not None:
            raise ValueError(
                f"Argument `layer` must be a layer of the kind {', '.join(self.kinds)}. Received: layer={layer!r}, "
                f"{unfit}"
            )
        if layer.use_bias or layer.activation is not keras.activations.linear:
            raise ValueError(
                "Argument `layer` must be a layer with use_bias=False and without activation: the offset is `beta`, of "
                f"{type(self).__name__}, and the activation comes behind it. Received: layer={layer!r} with "
                f"use_bias={layer.use_bias}, activation={layer.activation!r}"
            )
        if layer.activity_regularizer is not None:
            raise ValueError(
                "Argument `layer` must be a layer without activity_regularizer; give it to "
                f"{type(self).__name__}. Received: layer={layer!r} with "
                f"activity_regularizer={layer.activity_regularizer!r}"
            )
        axis = 1 if getattr(layer, "data_format", None) == "channels_first" else -1
        super().__init__(axis=axis, **kwargs)
        self.layer = layer

    @classmethod
    def why_unfit(cls, layer: keras.layers.Layer) -> str | None:
        """Why a layer, were it without bias and activation, cannot be contained; None if it can."""
        if type(layer) not in _classes(cls.kinds):
            return f"which is a {type(layer).__name__}"
        if getattr(layer, "lora_rank", None) or getattr(layer, "quantization_mode", None):
            return "whose kernel is quantized or adapted"
        return None

    @property
    def is_depthwise(self) -> bool:
        return isinstance(self.layer, _classes(_DEPTHWISE))

    def build(self, input_shape):
        if not self.layer.built:
            self.layer.build(input_shape)
            self.layer.built = True
        self.input_spec = self.layer.input_spec
        self.channels = self.layer.compute_output_shape(input_shape)[self.axis]
        self._add_affine(self.channels)
        self.built = True

    def call(self, inputs, training=None):
        self._check_dtype(inputs)
        unfit = self.why_unfit(self.layer)  # Keras quantizes what is inside of layers, too.
        if unfit is not None:
            raise ValueError(f"{type(self).__name__} cannot work with {self.layer.name!r}, {unfit}.")
        # The kernel itself, which is not cast in here, since `autocast` is False.
        kernel = ops.convert_to_tensor(self.layer.kernel)
        dtype = computation_dtype(kernel.dtype, self.variable_dtype)
        outputs = self._normalize(inputs, ops.cast(kernel, dtype), dtype, bool(training) and self.trainable)
        return ops.cast(outputs, self.compute_dtype)

    def _normalize(self, inputs, kernel, dtype, training):
        """The whole layer as a function of tensors.

        Args:
            inputs: The inputs, of any float dtype.
            kernel: The kernel of the layer inside, in `dtype`.
            dtype: The dtype that statistics are computed in.
            training: Whether it is trained.
        """
        raise NotImplementedError

    def _linear(self, inputs, kernel, dtype):
        """What the layer inside makes of the inputs with another kernel, computed in its own dtype, cast to `dtype`."""
        values = {id(variable): variable.value for variable in self.layer.variables}
        values[id(self.layer._kernel if hasattr(self.layer, "_kernel") else self.layer.kernel)] = kernel
        mapping = [(variable, values[id(variable)]) for variable in self.layer.variables]
        with keras.StatelessScope(state_mapping=mapping):
            return ops.cast(self.layer(inputs), dtype)

    def _by_filter(self, kernel):
        """A kernel as a matrix with one column for each channel of the output."""
        return ops.reshape(kernel, (-1, self.channels))

    def inference_linear(self) -> tuple[np.ndarray, np.ndarray, Any] | None:
        """The kernel, the bias and the activation with which the layer inside alone is this layer at inference.

        Returns:
            ``(kernel, bias, activation)``, NumPy arrays in float64 where the backend has it, and an activation as Keras
            takes it; None if there are none.
        """
        return None

    def compute_output_shape(self, input_shape):
        return self.layer.compute_output_shape(input_shape)

    def get_config(self) -> dict[str, Any]:
        config = {**super().get_config(), "layer": keras.saving.serialize_keras_object(self.layer)}
        # It is that of the layer inside.
        del config["axis"]
        return config

    @classmethod
    def from_config(cls, config, custom_objects=None):
        layer = keras.saving.deserialize_keras_object(config["layer"], custom_objects=custom_objects)
        return cls(**{**config, "layer": layer})
