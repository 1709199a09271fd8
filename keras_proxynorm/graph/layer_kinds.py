"""Which layers pass a scale and an offset of each channel on, and which are linear and could take them in."""

import keras

__all__ = [
    "CONVOLUTIONS",
    "DEPTHWISE",
    "LINEAR",
    "NORMALIZATIONS",
    "SEPARABLE",
    "absorbs_offset",
    "data_axis",
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
LINEAR = (*_classes("Dense"), *CONVOLUTIONS, *DEPTHWISE)

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
    *SEPARABLE,
    *_classes("EinsumDense"),
    *_classes("Conv1DTranspose", "Conv2DTranspose", "Conv3DTranspose"),
)


def data_axis(layer: keras.layers.Layer, rank: int) -> int:
    """The channel axis of a linear or pooling layer, of its input and its output of this rank."""
    return 1 if getattr(layer, "data_format", None) == "channels_first" else rank - 1


def passes_affine(operation: keras.Operation) -> bool:
    """Whether a scale and an offset for each channel of its input are those of its output, to the last bit."""
    # The class itself: what a subclass does, nobody knows.
    return type(operation) in _AFFINE


def pads_with_zeros(operation: keras.Operation) -> bool:
    """Whether it puts zeros around its input and does nothing else, so that it passes a scale on and no offset."""
    return type(operation) in _ZERO_PADDING


def passes_offset(operation: keras.Operation) -> bool:
    """Whether an offset of its input comes through in some form."""
    return isinstance(operation, _OFFSET) or type(operation).__name__ in _OFFSET_OPERATIONS


def absorbs_offset(operation: keras.Operation) -> bool:
    """Whether it has an offset of its own, or was made to do without, so that none is needed in front of it."""
    return isinstance(operation, _AFFINE_OPERATIONS)
