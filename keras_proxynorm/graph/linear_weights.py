"""The kernel and the bias of a linear layer, to be changed by scales and offsets of its channels and written back."""

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_proxynorm.graph.layer_kinds import DEPTHWISE, SEPARABLE, TRANSPOSED

__all__ = ["WITH_BIAS", "LinearWeights", "as_float64", "fixed_weights_reason"]

WITH_BIAS = {"use_bias": True, "bias_initializer": "zeros", "bias_regularizer": None, "bias_constraint": None}
"""What changes in the config of a linear layer without bias when it gets one."""


class LinearWeights:
    """Kernel and bias of a dense, convolution, transposed, depthwise or separable layer, in float64.

    Args:
        layer: The layer, built. One without bias counts as one with zeros.
    """

    def __init__(self, layer: Any):
        # Those of transposed convolutions have the channels of the output before those of the input.
        self._is_transposed = isinstance(layer, TRANSPOSED)
        self._kernels = {name: self._turned(as_float64(getattr(layer, name))) for name in _kernel_names(layer)}
        self._is_depthwise = isinstance(layer, (*DEPTHWISE, *SEPARABLE))
        last = list(self._kernels.values())[-1]
        filters = last.shape[-2] * last.shape[-1] if isinstance(layer, DEPTHWISE) else last.shape[-1]
        bias = getattr(layer, "bias", None)
        self._bias = np.zeros(filters) if bias is None else as_float64(bias)

    def _turned(self, kernel):
        return np.swapaxes(kernel, -1, -2) if self._is_transposed else kernel

    def response(self, offset: np.ndarray) -> np.ndarray:
        """The kernel by which a vector over input channels, times `offset`, becomes one over output channels."""
        (kernel,) = self._kernels.values()
        return kernel * offset[:, None]

    def absorb(self, scale: np.ndarray, offset: np.ndarray) -> None:
        """Makes the layer compute of ``x`` what it computed of ``scale * x + offset``; vectors over input channels."""
        name, kernel = next(iter(self._kernels.items()))
        if self._is_depthwise:
            bias = (kernel.reshape(-1, *kernel.shape[-2:]).sum(axis=0) * offset[:, None]).reshape(-1)
            for pointwise in list(self._kernels.values())[1:]:
                bias = bias @ pointwise.reshape(-1, pointwise.shape[-1])
            scale = scale[:, None]
        else:
            scale, offset = (_for_each_filter(x, kernel.shape) for x in (scale, offset))
            bias = (kernel * offset).reshape(-1, kernel.shape[-1]).sum(axis=0)
        self._kernels[name] = kernel * scale
        self._bias = self._bias + bias

    def rescale_output(self, scale: np.ndarray, offset: np.ndarray) -> None:
        """Makes the layer compute ``scale * y + offset`` where it computed ``y``; vectors over output channels."""
        name, kernel = list(self._kernels.items())[-1]
        per_filter = scale.reshape(kernel.shape[-2:]) if kernel.shape[-1] != len(scale) else scale
        self._kernels[name] = kernel * per_filter
        self._bias = scale * self._bias + offset

    def assign(self, layer: Any) -> None:
        """Writes them to `layer`, of the same kind, which must have a bias."""
        for name, kernel in self._kernels.items():
            getattr(layer, name).assign(self._turned(kernel))
        layer.bias.assign(self._bias)


def fixed_weights_reason(layer: keras.layers.Layer) -> str | None:
    """Why the weights of a linear layer cannot be changed; None if they can."""
    # Quantized layers, and those with low-rank adapters, whose kernels are not what is stored.
    is_quantized = any(not keras.backend.is_float_dtype(weight.dtype) for weight in layer.weights)
    if is_quantized or getattr(layer, "quantization_mode", None) or getattr(layer, "lora_enabled", False):
        return f"{type(layer).__name__} whose kernel is quantized or adapted"
    return None


def _kernel_names(layer):
    return ("depthwise_kernel", "pointwise_kernel") if isinstance(layer, SEPARABLE) else ("kernel",)


def as_float64(weight: Any) -> np.ndarray:
    """A weight as a NumPy array of float64."""
    return ops.convert_to_numpy(weight).astype("float64")


def _for_each_filter(vector, kernel_shape):
    """`vector`, with an entry for each channel, as `(channels / groups, filters)`."""
    channels, filters = kernel_shape[-2:]
    groups = len(vector) // channels
    return np.repeat(vector.reshape(groups, channels), filters // groups, axis=0).T
