"""Mean and variance of each sample over groups of channels and all positions, exact under large offsets and masks.

What every function here promises: sums are taken of differences from a pivot close to the mean, never of raw values
or their squares, so that ``x + 1e4`` has the statistics of ``x`` up to the rounding of the input; nothing crosses the
batch axis; nothing is cast, so the caller chooses the precision.
"""

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
        ``(mean, variance)``, tensors of the rank of `x` with its batch and channel sizes, and size 1 elsewhere.
    """
    positions = tuple(i for i in range(1, len(x.shape)) if i != axis)
    if mask is None:
        counts = None
        mean, variance = _moments(x, positions)
    else:
        mean, variance, counts = _masked_moments(x, _expand_mask(mask, x), positions)
    channels = x.shape[axis]
    if groups == channels:
        return mean, variance

    grouped = (-1, groups, channels // groups)
    mean, variance = ops.reshape(mean, grouped), ops.reshape(variance, grouped)
    if counts is None:
        group_mean = _mean(mean, (2,))
        group_variance = ops.mean(variance + ops.square(mean - group_mean), axis=2, keepdims=True)
    else:
        counts = ops.reshape(counts, grouped)
        weights = counts / _at_least_one(ops.sum(counts, axis=2, keepdims=True))
        pivot = ops.stop_gradient(ops.sum(weights * mean, axis=2, keepdims=True))
        group_mean = pivot + ops.sum(weights * (mean - pivot), axis=2, keepdims=True)
        group_variance = ops.sum(weights * (variance + ops.square(mean - group_mean)), axis=2, keepdims=True)

    ungrouped = [1] * len(x.shape)
    ungrouped[0], ungrouped[axis] = -1, channels
    return tuple(
        ops.reshape(ops.broadcast_to(value, ops.shape(mean)), ungrouped) for value in (group_mean, group_variance)
    )


def _moments(x, axes):
    if not axes:
        return x, ops.zeros_like(x)
    mean = _mean(x, axes)
    return mean, ops.mean(ops.square(x - mean), axis=axes, keepdims=True)


def _mean(x, axes):
    """Mean over `axes`, kept, by way of the difference from the first element along them."""
    # The result does not depend on the pivot, so neither does its gradient.
    pivot = ops.stop_gradient(x[tuple(slice(0, 1) if i in axes else slice(None) for i in range(len(x.shape)))])
    return pivot + ops.mean(x - pivot, axis=axes, keepdims=True)


def _masked_moments(x, mask, axes):
    weights = ops.cast(mask, x.dtype) * ops.ones_like(x, dtype=x.dtype)
    counts = ops.sum(weights, axis=axes, keepdims=True) if axes else weights
    safe_counts = _at_least_one(counts)

    def masked_sum(value):
        value = weights * value
        return ops.sum(value, axis=axes, keepdims=True) if axes else value

    # Replaced, not multiplied away: a masked infinity times 0 would be NaN, here or in the gradient.
    pivot = ops.stop_gradient(masked_sum(ops.where(mask, x, ops.zeros_like(x))) / safe_counts)
    x = ops.where(mask, x, pivot)
    mean = pivot + masked_sum(x - pivot) / safe_counts
    return mean, masked_sum(ops.square(x - mean)) / safe_counts, counts


def _at_least_one(counts):
    return ops.where(counts > 0, counts, ops.ones_like(counts))


def _expand_mask(mask, x):
    if len(mask.shape) > len(x.shape):
        raise ValueError(
            "Argument `mask` must have the shape of the inputs or of their leading axes. "
            f"Received: mask.shape={tuple(mask.shape)}, inputs.shape={tuple(x.shape)}"
        )
    mask = ops.cast(mask, "bool")
    for _ in range(len(x.shape) - len(mask.shape)):
        mask = ops.expand_dims(mask, -1)
    return mask
