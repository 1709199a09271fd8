"""Fourier transforms of images by real matrix products, and filters that act on each frequency of each channel.

Products with cosines and sines, because every runtime has them: TPUs have slow Fourier transforms, and ONNX converters
none of several dimensions. On an accelerator they are as precise as its float32 products.
"""

import math
from collections.abc import Sequence

import numpy as np
from keras import ops

from keras_proxynorm.moments import Tensor

__all__ = ["filter_frequencies", "kernel_power"]


def kernel_power(kernel: Tensor, sizes: Sequence) -> Tensor:
    """The power of each frequency of each filter of a kernel, summed over input channels.

    Args:
        kernel: Tensor of shape ``(*kernel sizes, input channels, filters)``.
        sizes: The sizes of the images, integers or scalar tensors, not smaller than the kernel.

    Returns:
        A tensor of shape ``(n // 2 + 1, *other sizes, filters)`` with ``n`` the first size: the other frequencies of a
        real kernel have the powers of these.
    """
    real, imaginary = _transform(ops.expand_dims(kernel, 0), [1 + i for i in range(len(sizes))], sizes)
    return ops.sum(ops.square(real) + ops.square(imaginary), axis=-2)[0]


def filter_frequencies(x: Tensor, response: Tensor, axes: Sequence[int]) -> Tensor:
    """Multiplies each frequency of images with a real response, that is even: a circular convolution without phase.

    Args:
        x: Float tensor.
        response: Tensor that broadcasts against the frequencies of `x`, those of the first axis from 0 to ``n // 2``.
        axes: The axes of the positions.

    Returns:
        A tensor of the shape and dtype of `x`.
    """
    sizes = [_size(x, axis) for axis in axes]
    real, imaginary = _transform(x, axes, sizes)
    real, imaginary = real * response, imaginary * response
    for axis, size in zip(axes[1:], sizes[1:], strict=True):
        cosine, sine = (waves / ops.cast(size, x.dtype) for waves in _waves(size, size, size, x.dtype))
        real, imaginary = (
            _along(cosine, real, axis) - _along(sine, imaginary, axis),
            _along(cosine, imaginary, axis) + _along(sine, real, axis),
        )
    axis, size = axes[0], sizes[0]
    cosine, sine = (ops.transpose(waves) for waves in _waves(size // 2 + 1, size, size, x.dtype))
    # Frequencies between 0 and n / 2 stand for their negatives, too.
    frequencies = ops.arange(size // 2 + 1)
    twice = ops.cast(ops.logical_and(frequencies > 0, 2 * frequencies < size), x.dtype) + 1
    weights = twice / ops.cast(size, x.dtype)
    return _along(cosine * weights, real, axis) - _along(sine * weights, imaginary, axis)


def _transform(x, axes, sizes):
    """Real and imaginary part of the transform of `x`, which is padded with zeros at the end, along `axes`."""
    first, *others = zip(axes, sizes, strict=True)
    axis, size = first
    cosine, sine = _waves(size // 2 + 1, _size(x, axis), size, x.dtype)
    real, imaginary = _along(cosine, x, axis), -_along(sine, x, axis)
    for axis, size in others:
        cosine, sine = _waves(size, _size(x, axis), size, x.dtype)
        real, imaginary = (
            _along(cosine, real, axis) + _along(sine, imaginary, axis),
            _along(cosine, imaginary, axis) - _along(sine, real, axis),
        )
    return real, imaginary


def _waves(frequencies, positions, period, dtype):
    """Cosine and sine of ``2 pi f p / period``, of shape ``(frequencies, positions)``."""
    known = all(isinstance(number, int) for number in (frequencies, positions, period))
    numbers = np if known else ops
    turns = numbers.expand_dims(numbers.arange(frequencies), 1) * numbers.expand_dims(numbers.arange(positions), 0)
    # Whole turns are taken away as integers: of a large angle float32 knows few digits.
    turns = turns % period
    if known:
        angles = 2 * math.pi * turns / period
        return ops.convert_to_tensor(np.cos(angles), dtype=dtype), ops.convert_to_tensor(np.sin(angles), dtype=dtype)
    angles = ops.cast(turns, dtype) * (2 * math.pi / ops.cast(period, dtype))
    return ops.cos(angles), ops.sin(angles)


def _along(matrix, x, axis):
    """The product of a matrix and a tensor, along an axis of that."""
    shape = ops.shape(x)
    x = ops.reshape(x, (math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :])))
    return ops.reshape(ops.matmul(matrix, x), (*shape[:axis], _size(matrix, 0), *shape[axis + 1 :]))


def _size(x, axis):
    """An integer, if it is known."""
    return ops.shape(x)[axis]
