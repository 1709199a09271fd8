"""What is known of the layers of Keras: channel axes, which pass scales and offsets on, which absorb them."""

from typing import Any

import keras

__all__ = [
    "CONVOLUTIONS",
    "DEPTHWISE",
    "LINEAR",
    "LINEAR_WITH_KERNEL",
    "NORMALIZATIONS",
    "SEPARABLE",
    "TRANSPOSED",
    "absorbs_offset",
    "data_axis",
    "has_activation",
    "normalization_axis",
    "overridden_methods",
    "pads_with_zeros",
    "passes_affine",
    "passes_offset",
]

_DIMENSIONS = (1, 2, 3)


def _classes(*names):
    return tuple(getattr(keras.layers, name) for name in names)


def _classes_of_each_dimension(*names):
    return _classes(*(f"{name}{dimension}D" for name in names for dimension in _DIMENSIONS))


NORMALIZATIONS = _classes("BatchNormalization", "GroupNormalization", "LayerNormalization")
CONVOLUTIONS = _classes_of_each_dimension("Conv")
DEPTHWISE = _classes("DepthwiseConv1D", "DepthwiseConv2D")
SEPARABLE = _classes("SeparableConv1D", "SeparableConv2D")
# Those with one kernel, which maps input channels to output channels.
LINEAR_WITH_KERNEL = (keras.layers.Dense, *CONVOLUTIONS, *DEPTHWISE)
TRANSPOSED = _classes("Conv1DTranspose", "Conv2DTranspose", "Conv3DTranspose")
LINEAR = (*LINEAR_WITH_KERNEL, *SEPARABLE, *TRANSPOSED)

# Poolings of windows that reach over the border leave the padding out, and the weights of an interpolation sum to 1.
_AFFINE = _classes("Dropout", "Identity") + _classes_of_each_dimension(
    *("AveragePooling", "MaxPooling", "GlobalAveragePooling", "GlobalMaxPooling"),
    *("Cropping", "SpatialDropout", "UpSampling"),
)
_ZERO_PADDING = _classes_of_each_dimension("ZeroPadding")
_OFFSET = (
    *_AFFINE,
    *_classes("Add", "Average", "Concatenate", "Multiply", "Subtract", "Flatten", "Permute", "Reshape"),
    *_ZERO_PADDING,
)
_OFFSET_OPERATIONS = ("Add", "Concatenate", "GetItem", "Mean", "Multiply", "Reshape", "Subtract", "Transpose")
_AFFINE_OPERATIONS = (
    *NORMALIZATIONS,
    *LINEAR,
    *_classes("EinsumDense"),
)

# What a subclass may define without changing what the layer computes.
_HARMLESS = {"__init__", "get_config", "from_config", "compute_output_shape", "compute_output_spec", "__repr__"}


def data_axis(layer: keras.layers.Layer, rank: int) -> int:
    """The channel axis of a linear or pooling layer, of its input and its output of this rank."""
    return 1 if getattr(layer, "data_format", None) == "channels_first" else rank - 1


def normalization_axis(layer: Any) -> Any:
    """The channel axis of a normalization layer, an integer as its argument says it; None if it has several."""
    axis = layer.axis
    if isinstance(axis, (list, tuple)):
        return int(axis[0]) if len(axis) == 1 else None
    return int(axis)


def overridden_methods(operation: keras.Operation, kinds: tuple[type, ...]) -> list[str]:
    """The methods by which a layer may compute something else than the class among `kinds` that it is derived from.

    Args:
        operation: An instance of one of `kinds` or of a subclass.
        kinds: Classes of layers.
    """
    base = next(cls for cls in type(operation).__mro__ if cls in kinds)
    derived = type(operation).__mro__[: type(operation).__mro__.index(base)]
    known = {name for cls in base.__mro__ for name in vars(cls)} - _HARMLESS - set(vars(object))
    return sorted({name for cls in derived for name in vars(cls) if name in known and callable(getattr(cls, name))})


def passes_affine(operation: keras.Operation | None) -> bool:
    """Whether a scale and an offset for each channel of its input are exactly those of its output."""
    # The class itself: a subclass may do more.
    return type(operation) in _AFFINE


def pads_with_zeros(operation: keras.Operation | None) -> bool:
    """Whether it puts zeros around its input and does nothing else, so that it passes a scale on and no offset."""
    return type(operation) in _ZERO_PADDING


def passes_offset(operation: keras.Operation) -> bool:
    """Whether an offset of its input comes through in some form."""
    return isinstance(operation, _OFFSET) or type(operation).__name__ in _OFFSET_OPERATIONS


def absorbs_offset(operation: keras.Operation) -> bool:
    """Whether it has an offset of its own, or was made to do without, so that none is needed before it."""
    return isinstance(operation, _AFFINE_OPERATIONS)


def has_activation(layer: Any) -> bool:
    """Whether a linear layer applies an activation of its own."""
    return getattr(layer, "activation", None) not in (None, keras.activations.linear)
