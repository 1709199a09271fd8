"""Mean and variance of each sample over groups of channels and all positions, exact under large offsets and masks.

What every function here promises: sums are taken of differences from a pivot close to the mean, never of raw values
or their squares, so that ``x + 1e4`` has the statistics of ``x`` up to the rounding of the input; nothing crosses the
batch axis; nothing is cast, so the caller chooses the precision.
"""

import math

from keras import ops

from keras_proxynorm.kernels import channels
from keras_proxynorm.kernels.compilation import barrier, rounded
from keras_proxynorm.kernels.reductions import axis_sums, position_sums
from keras_proxynorm.moments import Tensor

__all__ = [
    "expand_mask",
    "group_moments",
    "group_pivot",
    "group_size",
    "hide_masked",
    "moments_about_pivot",
    "unmasked_counts",
]

_PIVOT_DIVISOR = 16


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
    pivot = rounded(sums(ops.where(mask, x, ops.zeros_like(x))) / counts)
    centered = ops.where(mask, x, pivot) - pivot
    distance = sums(weights * centered) / counts
    deviations = weights * (centered - distance)
    return pivot, distance, sums(ops.square(deviations)) / counts


def group_pivot(x: Tensor, groups: int, axis: int) -> Tensor:
    """A constant close to the mean of each group: the mean of about a sixteenth of the positions.

    The variance loses the more digits the further the pivot is from the mean, in standard deviations. The mean of a
    share of the values is at most ``1 / sqrt(share)`` away, whatever these are; a single value may be anywhere.
    """
    share, divisor = [slice(None)] * len(x.shape), _PIVOT_DIVISOR
    for i, size in enumerate(ops.shape(x)):
        if i not in (0, axis) and divisor > 1:
            # One block, which is faster to cut out than many, from the middle, because borders are often padding.
            length = size // divisor + 1
            share[i] = slice(size // 2, size // 2 + length)
            divisor = 1 if x.shape[i] is None else divisor * length // max(size, 1)
    # A barrier, so that the input keeps its own layout.
    chosen = barrier(x[tuple(share)])
    pivot = _group_sums(chosen, groups, axis) / group_size(chosen, groups, axis)
    return channels.repeat(rounded(pivot), x, axis)


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
    return axis_sums(sums, 2)


def _sizes(x):
    """The sizes of all axes but the batch, as integers where they are known: their operations are to be few."""
    if None not in x.shape[1:]:
        return list(x.shape[1:])
    # Those that are known are integers in it.
    return list(ops.shape(x)[1:])


def unmasked_counts(mask: Tensor, x: Tensor, axis: int) -> Tensor:
    """How many positions of each sample and channel of `x` a mask leaves, of size 1 at the positions."""
    return position_sums(ops.cast(expand_mask(mask, x, axis), x.dtype) * ops.ones_like(x), axis)


def hide_masked(x: Tensor, mask: Tensor | None, axis: int) -> Tensor:
    """`x` with 0 where a mask is False: whatever is there must not reach gradients, where infinity times 0 is NaN."""
    return x if mask is None else ops.where(expand_mask(mask, x, axis), x, 0)


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
