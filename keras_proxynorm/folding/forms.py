"""The computation of a folded normalization, in the form that is fastest where an exported graph will run."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from keras import ops

from keras_proxynorm import kernels
from keras_proxynorm.kernels import channels

__all__ = ["FORMS", "Constants", "normalize_and_activate"]

# Elements of an image from which these are faster in TensorFlow on a CPU than products, sums and reductions.
_SMALLEST_CONVOLVED, _SMALLEST_POOLED = 2**17, 2**18


class Constants(NamedTuple):
    """What a folded normalization multiplies with and adds: tensors of shape ``(channels,)``, or None for 1 and 0."""

    scale: object = None
    offset: object = None
    output_scale: object = None
    output_offset: object = None


def normalize_and_activate(
    x: Any,
    constants: Constants,
    activation: Callable,
    groups: int | None,
    axis: int,
    epsilon: float,
    mask: Any = None,
    form: str = "keras",
) -> Any:
    """``output_scale * activation(scale * y + offset) + output_offset`` of the normalized input ``y``.

    Args:
        x: Float tensor of rank 2 or more; axis 0 is the batch.
        constants: The scales and offsets.
        activation: Maps a tensor to a tensor, each element alone.
        groups: Number of groups of channels that share their statistics, or None if `x` is ``y``.
        axis: Index of the channel axis, positive.
        epsilon: Float, added to the variance of the input.
        mask: Optional boolean tensor of the shape of `x`, or of its leading axes without the channel axis; positions
            where it is False do not enter the statistics.
        form: One of `FORMS`: ``"keras"``, in operations of Keras alone; or what is fastest on a CPU for batch size 1,
            ``"tensorflow"`` in a graph of TensorFlow and ``"onnx"`` in what tf2onnx makes of one. With a mask it is the
            first.

    Returns:
        A tensor of the shape and dtype of `x`.
    """
    return FORMS["keras" if mask is not None else form](x, constants, activation, groups, axis, epsilon, mask)


def _for_keras(x, constants, activation, groups, axis, epsilon, mask):
    scale, offset, output_scale, output_offset = (channels.broadcast(constant, x, axis) for constant in constants)
    if groups is None:
        y = _affine(x, scale, offset)
    else:
        y = kernels.group_normalize(x, groups, axis, epsilon, scale, offset, mask)
    return _affine(activation(y), output_scale, output_offset)


def _affine(x, scale, offset):
    """``scale * x + offset`` for tensors that broadcast, or None."""
    if scale is not None:
        x = x * scale
    return x if offset is None else x + offset


def _for_tensorflow(x, constants, activation, groups, axis, epsilon, mask):
    # Batch size 1 and a CPU, where a depthwise convolution applies a scale, an offset and relu at once.
    batch_size, *sizes = x.shape
    if len(x.shape) != 4 or axis != 3 or None in sizes or (groups is not None and batch_size != 1):
        return _for_keras(x, constants, activation, groups, axis, epsilon, mask)
    apply = _pointwise if math.prod(sizes) >= _SMALLEST_CONVOLVED else _affine
    scale, offset, output_scale, output_offset = constants
    if groups is not None:
        scale, offset = _normalizing_affine(x, scale, offset, groups, epsilon)
    y = activation(apply(x, scale, offset))
    # An offset alone is added in place.
    return (_affine if output_scale is None else apply)(y, output_scale, output_offset)


def _normalizing_affine(x, scale, offset, groups, epsilon):
    """The scale and the offset of each channel that normalize one image and then apply `scale` and `offset`."""
    import tensorflow as tf

    _, height, width, count = x.shape
    if math.prod(x.shape[1:]) < _SMALLEST_POOLED:
        pixels = tf.reshape(x, (height * width, count))
        mean = tf.reduce_mean(pixels, 0)
        variance = tf.reduce_mean(tf.square(pixels - mean), 0)
    else:
        # Pooling is faster than a reduction, but loses digits of a large mean. The mean of a row is close to it: within
        # sqrt(height) standard deviations.
        pivot = _position_means(x[:, height // 2 : height // 2 + 1])
        centered = x - pivot
        distance = _position_means(centered)
        mean, variance = pivot + distance, _position_means(tf.square(centered)) - tf.square(distance)

    def by_groups(vector):
        return tf.reshape(vector, (groups, count // groups))

    mean, variance = by_groups(mean), by_groups(variance)
    group_mean = tf.reduce_mean(mean, 1, keepdims=True)
    spread = tf.math.squared_difference(mean, group_mean)
    factor = tf.math.rsqrt(tf.reduce_mean(variance + spread, 1, keepdims=True) + epsilon)
    factor = factor * by_groups(tf.ones(count, x.dtype) if scale is None else scale)
    shift = by_groups(tf.zeros(count, x.dtype) if offset is None else offset) - group_mean * factor
    return tf.reshape(factor, (count,)), tf.reshape(shift, (count,))


def _position_means(x):
    # Row by row, because long sums lose digits.
    for window in ((1, x.shape[2]), (x.shape[1], 1)):
        x = ops.average_pool(x, window, data_format="channels_last")
    return x


def _pointwise(x, scale, offset, data_format="NHWC"):
    """``scale * x + offset`` for each channel of images, as a depthwise convolution."""
    import tensorflow as tf

    if scale is None and offset is None:
        return x
    count = x.shape[3 if data_format == "NHWC" else 1]
    scale = tf.ones(count, x.dtype) if scale is None else scale
    y = tf.nn.depthwise_conv2d(x, tf.reshape(scale, (1, 1, count, 1)), [1] * 4, "VALID", data_format=data_format)
    return y if offset is None else tf.nn.bias_add(y, offset, data_format=data_format)


def _for_onnx(x, constants, activation, groups, axis, epsilon, mask):
    # Kernels that ONNX Runtime and OpenVINO have: InstanceNormalization, and depthwise convolutions for scales and
    # offsets, which do not leave the layout of the convolutions around them, as products and sums would.
    import tensorflow as tf

    rank = len(x.shape)
    to_first = [0, axis, *(i for i in range(1, rank) if i != axis)]
    to_own = [to_first.index(i) for i in range(rank)]
    x = tf.transpose(x, to_first)
    scale, offset, output_scale, output_offset = constants
    if groups is None:
        y = _channels_first_affine(x, scale, offset)
    elif groups == x.shape[1] and rank > 2:
        y = _instance_normalization(x, groups, scale, offset, epsilon)
    else:
        y = _channels_first_affine(_instance_normalization(x, groups, None, None, epsilon), scale, offset)
    y = _channels_first_affine(activation(y), output_scale, output_offset)
    return tf.transpose(y, to_own)


def _instance_normalization(x, groups, scale, offset, epsilon):
    """The op InstanceNormalization of ONNX, of `x` with the channels first."""
    import tensorflow as tf

    batch_size, *sizes = x.shape
    if None in sizes:
        shape = tf.shape(x)
        grouped = tf.stack([shape[0], groups, -1, 1])
    else:
        shape = (-1 if batch_size is None else batch_size, *sizes)
        grouped = (shape[0], groups, math.prod(sizes) // groups, 1)
    # TensorFlow has no such op. This one has its arguments; the converter translates it, and it never runs.
    normalized = tf.raw_ops.FusedBatchNormV3(
        x=tf.reshape(x, grouped),
        scale=tf.ones(groups, x.dtype) if scale is None else scale,
        offset=tf.zeros(groups, x.dtype) if offset is None else offset,
        mean=tf.constant([], x.dtype),
        variance=tf.constant([], x.dtype),
        epsilon=epsilon,
        data_format="NCHW",
        is_training=True,
    )
    return tf.reshape(normalized.y, shape)


def _channels_first_affine(x, scale, offset):
    if len(x.shape) == 4:
        return _pointwise(x, scale, offset, "NCHW")
    return _affine(x, channels.broadcast(scale, x, 1), channels.broadcast(offset, x, 1))


FORMS = {"keras": _for_keras, "tensorflow": _for_tensorflow, "onnx": _for_onnx}
