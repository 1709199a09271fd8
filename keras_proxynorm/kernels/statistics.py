"""Mean and variance of each sample over groups of channels and all positions, exact under large offsets and masks.

What every function here promises: sums are taken of differences from a pivot close to the mean, never of raw values
or their squares, so that ``x + 1e4`` has the statistics of ``x`` up to the rounding of the input; nothing crosses the
batch axis; nothing is cast, so the caller chooses the precision.
"""

import math

from keras import ops

__all__ = ["group_moments"]


def group_moments(x, groups: int, axis: int, mask=None):
    """Mean and variance over the positions and the channels of each group, for each sample.

    Moments are taken per channel over the positions first and combined over the channels of a group by Chan's formula
    (``Var = E_c[var_c] + Var_c[mean_c]``): unlike a reshape to groups, that leaves the layout of `x` alone.

    Args:
        x: Float tensor of rank 2 or more; axis 0 is the batch.
        groups: Number of groups; it divides the number of channels.
        axis: Index of the channel axis, positive.
        mask: Optional boolean tensor of the shape of `x` or of its leading axes. Positions where it is False do not
            enter, whatever is in them; where a whole group is masked the result is 0, 0.

    Returns:
        ``(pivot, distance, variance)``, tensors of the rank of `x` with its batch and channel sizes, and size 1
        elsewhere. The mean is ``pivot + distance``; it comes in two parts because their sum would be rounded, and
        ``(x - pivot) - distance`` is not. The pivot is a constant for gradients, the distance makes up for it.
    """
    positions = tuple(i for i in range(1, len(x.shape)) if i != axis)
    if mask is None:
        counts = None
        pivot, distance, variance = _moments(x, positions)
    else:
        pivot, distance, variance, counts = _masked_moments(x, _expand_mask(mask, x), positions)
    channels = x.shape[axis]
    if groups == channels:
        return pivot, distance, variance

    def split(value):
        return ops.reshape(value, (-1, groups, channels // groups))

    channel_pivot, pivot, distance, variance = pivot, split(pivot), split(distance), split(variance)
    if counts is None:
        origin = pivot[:, :, :1]

        def average(value):
            return _mean(value, (2,))

    else:
        counts = split(counts)
        weights = counts / _at_least_one(ops.sum(counts, axis=2, keepdims=True))

        def average(value):
            return ops.sum(weights * value, axis=2, keepdims=True)

        origin = average(pivot)
    # The pivots of a group are close to each other, so that their differences are exact.
    offset = pivot - origin
    distance = offset + distance
    group_distance = average(distance)
    group_variance = average(variance + ops.square(distance - group_distance))

    def merge(value):
        return ops.reshape(value, ops.shape(channel_pivot))

    return channel_pivot, merge(group_distance - offset), merge(group_variance + ops.zeros_like(pivot))


def _moments(x, axes):
    """A pivot, the distance of the mean from it, and the variance, over `axes`, which are kept."""
    # The mean does not depend on the pivot, so neither does its gradient.
    pivot = ops.stop_gradient(x[tuple(slice(0, 1) if i in axes else slice(None) for i in range(len(x.shape)))])
    if not axes:
        return pivot, x - pivot, ops.zeros_like(x)
    x = x - pivot
    distance = _mean(x, axes)
    return pivot, distance, _mean(ops.square(x - distance), axes)


def _masked_moments(x, mask, axes):
    """The same over the unmasked elements, and how many they are."""
    weights = ops.cast(mask, x.dtype) * ops.ones_like(x)
    counts = ops.sum(weights, axis=axes, keepdims=True) if axes else weights
    safe_counts = _at_least_one(counts)

    def average(value):
        value = weights * value
        return (ops.sum(value, axis=axes, keepdims=True) if axes else value) / safe_counts

    # Replaced, not multiplied away: a masked infinity times 0 would be NaN, here or in the gradient.
    pivot = ops.stop_gradient(average(ops.where(mask, x, ops.zeros_like(x))))
    x = ops.where(mask, x, pivot) - pivot
    distance = average(x)
    return pivot, distance, average(ops.square(x - distance)), counts


def _mean(x, axes):
    # Not ops.mean, which computes in float32 outside TensorFlow, for float64 too.
    sizes = [ops.shape(x)[i] for i in axes]
    count = math.prod(sizes) if all(isinstance(n, int) for n in sizes) else ops.cast(ops.prod(sizes), x.dtype)
    return ops.sum(x, axis=axes, keepdims=True) / count


def _at_least_one(counts):
    return ops.where(counts > 0, counts, ops.ones_like(counts))


def _expand_mask(mask, x):
    sizes = zip(mask.shape, x.shape, strict=False)
    if len(mask.shape) > len(x.shape) or any(None not in (a, b) and a not in (1, b) for a, b in sizes):
        raise ValueError(
            "Argument `mask` must have the shape of the inputs or of their leading axes. "
            f"Received: mask.shape={tuple(mask.shape)}, inputs.shape={tuple(x.shape)}"
        )
    mask = ops.cast(mask, "bool")
    for _ in range(len(x.shape) - len(mask.shape)):
        mask = ops.expand_dims(mask, -1)
    return mask
