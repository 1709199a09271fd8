"""Mean and variance of each sample over groups of channels and all positions, exact under large offsets and masks.

What every function here promises: sums are taken of differences from a pivot close to the mean, never of raw values
or their squares, so that ``x + 1e4`` has the statistics of ``x`` up to the rounding of the input; nothing crosses the
batch axis; nothing is cast, so the caller chooses the precision.
"""

import math

from keras import ops

from keras_proxynorm.kernels import channels
from keras_proxynorm.kernels.compilation import barrier
from keras_proxynorm.kernels.reductions import position_sums
from keras_proxynorm.moments import Tensor

__all__ = ["expand_mask", "group_moments", "group_pivot", "group_size", "moments_about_pivot"]


def group_moments(x: Tensor, groups: int, axis: int, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and variance over the positions and the channels of each group, for each sample.

    Args:
        x: Float tensor of rank 2 or more; axis 0 is the batch.
        groups: Number of groups; it divides the number of channels.
        axis: Index of the channel axis, positive.
        mask: Optional boolean tensor, as `expand_mask` takes it. Positions where it is False do not enter, whatever is
            in them; where a whole group is masked the result is 0, 0.

    Returns:
        ``(pivot, distance, variance)``, tensors of the rank of `x` with its batch and channel sizes, and size 1
        elsewhere. The mean is ``pivot + distance``; it comes in two parts because their sum would be rounded, and
        ``(x - pivot) - distance`` is not. The pivot is a constant for gradients, the distance makes up for it.
    """
    if mask is None:
        pivot = group_pivot(x, groups, axis)
        distance, variance = moments_about_pivot(x - pivot, groups, axis)
        return pivot, channels.repeat(distance, x, axis), channels.repeat(variance, x, axis)

    def sums(values):
        return channels.repeat(_group_sums(values, groups, axis), x, axis)

    mask = expand_mask(mask, x, axis)
    weights = ops.cast(mask, x.dtype) * ops.ones_like(x)
    counts = sums(weights)
    counts = ops.where(counts > 0, counts, ops.ones_like(counts))
    # Replaced, not multiplied away: a masked infinity times 0 would be NaN, here or in the gradient.
    pivot = ops.stop_gradient(sums(ops.where(mask, x, ops.zeros_like(x))) / counts)
    centered = ops.where(mask, x, pivot) - pivot
    distance = sums(weights * centered) / counts
    deviations = weights * (centered - distance)
    return pivot, distance, sums(ops.square(deviations)) / counts


def group_pivot(x: Tensor, groups: int, axis: int) -> Tensor:
    """A constant close to the mean of each group: the median of the elements at 1/4, 1/2 and 3/4 of each axis.

    Not at the corners, which are padding more often than other pixels. Not one element, which may be far out: the
    larger the distance to the mean is in standard deviations, the more digits the variance loses. And not a mean of
    several, which a compiler may round in one place and not in another.
    """
    per_group = x.shape[axis] // groups

    def elements(choose):
        pixel, members = [slice(None)], [slice(None)] * len(x.shape)
        for size in _sizes(x):
            index = choose(size)
            pixel.append(slice(index, index + 1))
        pixel[axis] = slice(None)
        members[axis] = slice(choose(per_group), None, per_group)
        # A barrier, so that the input keeps its own layout.
        return barrier(x[tuple(pixel)])[tuple(members)]

    a, b, c = elements(lambda size: size // 4), elements(lambda size: size // 2), elements(lambda size: 3 * size // 4)
    median = ops.maximum(ops.minimum(a, b), ops.minimum(ops.maximum(a, b), c))
    pivot = channels.by_groups(median, groups, axis)
    return ops.stop_gradient(channels.repeat(pivot, x, axis))


def moments_about_pivot(centered: Tensor, groups: int, axis: int) -> tuple[Tensor, Tensor]:
    """Mean and variance of each group, of shape ``(batch, groups, 1)``, in one pass: for a mean close to 0 only."""
    count = group_size(centered, groups, axis)
    # Not ops.mean, which computes in float32 outside TensorFlow, for float64 too.
    distance = _group_sums(centered, groups, axis) / count
    return distance, ops.relu(_group_sums(ops.square(centered), groups, axis) / count - ops.square(distance))


def group_size(x: Tensor, groups: int, axis: int) -> Tensor | int:
    """How many values of a sample share their statistics."""
    if None in x.shape[1:]:
        return ops.cast(ops.prod(_sizes(x)) // groups, x.dtype)
    return math.prod(x.shape[1:]) // groups


def _group_sums(x, groups, axis):
    """Sums over the positions and the channels of each group, of shape ``(batch, groups, 1)``."""
    # Of two sums in a row XLA makes one. On a TPU that wants a layout that suits no other sum, and copies the input.
    sums = channels.by_groups(barrier(position_sums(x, axis)), groups, axis)
    return ops.sum(sums, axis=2, keepdims=True)


def _sizes(x):
    """The sizes of all axes but the batch, as integers where they are known: their operations are to be few."""
    if None not in x.shape[1:]:
        return list(x.shape[1:])
    # Those that are known are integers in it.
    return list(ops.shape(x)[1:])


def expand_mask(mask: Tensor, x: Tensor, axis: int) -> Tensor:
    """A mask as booleans of the rank of `x`; a ValueError if it does not fit.

    Args:
        mask: Tensor of the shape of `x`, or of the leading ones of its axes other than the channel axis, as Keras makes
            them: ``(batch, steps)``, wherever the channels are. Sizes of 1 broadcast.
        x: Tensor of rank 2 or more; axis 0 is the batch.
        axis: Index of the channel axis, positive.
    """
    rank, given = len(x.shape), len(mask.shape)
    axes = list(range(rank)) if given == rank else [i for i in range(rank) if i != axis][:given]
    sizes = [(mask.shape[i], x.shape[a]) for i, a in enumerate(axes)]
    if given > rank or any(None not in (a, b) and a not in (1, b) for a, b in sizes):
        raise ValueError(
            "Argument `mask` must have the shape of the inputs, or of their leading axes without the channel axis, as "
            f"(batch, steps) has. Received: mask.shape={tuple(mask.shape)}, inputs.shape={tuple(x.shape)}, axis={axis}"
        )
    mask = ops.cast(mask, "bool")
    for a in range(rank):
        if a not in axes:
            mask = ops.expand_dims(mask, a)
    return mask
