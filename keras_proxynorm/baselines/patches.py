"""Derivatives of the moments of a convolution's outputs with respect to its kernel, by patches of its inputs."""

import itertools
import math

from keras import ops

from keras_proxynorm.kernels.reductions import position_sums
from keras_proxynorm.moments import Tensor

__all__ = ["moment_derivatives"]


def moment_derivatives(
    inputs: Tensor,
    centered: Tensor,
    groups: int = 1,
    kernel_size: tuple[int, ...] = (),
    strides: tuple[int, ...] = (),
    dilation_rate: tuple[int, ...] = (),
    padding: str = "valid",
) -> tuple[Tensor, Tensor]:
    """Derivatives of mean and variance, over samples and positions, of the output of a linear layer by its kernel.

    The output is ``sum(kernel * patch)`` over the taps of the kernel and the input channels of a group. The derivative
    of its mean is the mean patch, and that of its variance twice the covariance of output and patch.

    Args:
        inputs: The inputs of the layer, float tensor of the shape ``(batch, positions..., input channels)``.
        centered: The outputs of the layer, minus the mean of each channel.
        groups: The number of groups of channels; for a depthwise convolution the number of input channels.
        kernel_size: The size of a convolution's kernel; empty for a dense layer, as the next two are.
        strides: Its strides.
        dilation_rate: Its dilation.
        padding: Its padding, ``"valid"``, ``"same"`` or ``"causal"``.

    Returns:
        ``(mean, variance)``. The derivative of the mean is the same for all filters of a group and has the shape
        ``(fan_in, groups, 1)``; that of the variance is ``(fan_in, groups, filters of a group)``. A reshaped kernel has
        this shape, too.
    """
    channels, filters = inputs.shape[-1] // groups, centered.shape[-1] // groups
    *positions, _ = ops.shape(centered)
    count = ops.maximum(ops.cast(math.prod(positions), inputs.dtype), 1)
    centered = ops.reshape(centered, (-1, groups, filters))
    means, covariances = [], []
    for patch in _patches(inputs, positions[1:], kernel_size, strides, dilation_rate, padding):
        mean = ops.sum(position_sums(patch, len(patch.shape) - 1), axis=0, keepdims=True) / count
        # Centered, too: large offsets would take digits from the product.
        deviations = ops.reshape(patch - mean, (-1, groups, channels))
        means.append(ops.transpose(ops.reshape(mean, (groups, channels))))
        covariances.append(_products(deviations, centered) / count)
    return ops.expand_dims(ops.concatenate(means), -1), 2 * ops.concatenate(covariances)


def _products(x, y):
    """Products of each `x` and each `y` of a group, summed over the positions: ``(size of x, groups, size of y)``."""
    if x.shape[2] == 1:
        return ops.expand_dims(ops.sum(x * y, axis=0), 0)
    return ops.einsum("pgi,pgo->igo", x, y)


def _patches(x, output_sizes, kernel_size, strides, dilation_rate, padding):
    """For each tap of the kernel, the input that it meets at each position of the output."""
    reaches = [(size - 1) * rate for size, rate in zip(kernel_size, dilation_rate, strict=True)]
    starts = [0] * len(reaches)
    if padding == "same":
        sizes = zip(ops.shape(x)[1:-1], output_sizes, reaches, strides, strict=True)
        starts = [reach - _padding(size, output, reach, stride) // 2 for size, output, reach, stride in sizes]
    if padding != "valid":
        # As much as there can be on one side, on both: how much there is may depend on an unknown size.
        x = ops.pad(x, [(0, 0), *((reach, reach) for reach in reaches), (0, 0)])
    for taps in itertools.product(*map(range, kernel_size)):
        firsts = [start + tap * rate for start, tap, rate in zip(starts, taps, dilation_rate, strict=True)]
        ends = [first + (n - 1) * stride + 1 for first, n, stride in zip(firsts, output_sizes, strides, strict=False)]
        yield x[(slice(None), *map(slice, firsts, ends, strides))]


def _padding(size, output_size, reach, stride):
    """How much is added on both sides together so that each stride has its output."""
    total = (output_size - 1) * stride + reach + 1 - size
    return max(total, 0) if isinstance(total, int) else ops.maximum(total, 0)
