"""Mean and variance over samples and groups of channels, merged from those of each sample and channel.

As in `keras_proxynorm.kernels.statistics`, neither raw values nor their squares are summed. A mean is two tensors, a
pivot and the distance to it, so that large means keep their digits; variances are merged by Chan's formula, as the mean
of the variances and the variance of the means.
"""

from typing import Any, NamedTuple

from keras import ops

from keras_proxynorm import kernels
from keras_proxynorm.kernels import channels
from keras_proxynorm.kernels.compilation import rounded
from keras_proxynorm.kernels.statistics import group_moments, group_size, unmasked_counts
from keras_proxynorm.moments import Tensor

__all__ = ["Moments", "batch_count", "channel_moments", "merge", "mix", "normalize", "sample_count", "unbiased"]


class Moments(NamedTuple):
    """Moments of each channel, alike in every sample or not: the shape is ``(samples or 1, channels)``.

    Attributes:
        pivot: A constant for gradients, close to the mean.
        distance: The mean minus the pivot.
        variance: The biased variance.
        counts: How many values they are of, where a mask leaves some out; else None.
    """

    pivot: Tensor
    distance: Tensor
    variance: Tensor
    counts: Tensor | None = None

    @property
    def mean(self) -> Tensor:
        """The mean, rounded."""
        return self.pivot + self.distance

    @classmethod
    def of_vectors(cls, mean: Tensor, variance: Tensor) -> "Moments":
        """Moments from vectors of the channels."""
        mean, variance = ops.expand_dims(mean, 0), ops.expand_dims(variance, 0)
        return cls(mean, ops.zeros_like(mean), variance)


def normalize(
    x: Tensor, moments: Moments, axis: int, epsilon: float, gamma: Tensor | None = None, beta: Tensor | None = None
) -> Tensor:
    """``gamma (x - mean) / sqrt(variance + epsilon) + beta``.

    `gamma` and `beta` are vectors of the channels, or values of each sample and channel, or None for 1 and 0.
    """
    vectors = (*moments[:3], gamma, beta)
    pivot, distance, variance, gamma, beta = (channels.broadcast(vector, x, axis) for vector in vectors)
    return kernels.normalize(x, pivot, distance, variance, gamma, beta, epsilon)


def channel_moments(x: Tensor, axis: int, mask: Tensor | None = None) -> Moments:
    """Moments over the positions of each sample and channel.

    Args:
        x: Float tensor of rank 2 or more; axis 0 is the batch.
        axis: Index of the channel axis, positive.
        mask: Optional boolean tensor, as `expand_mask` takes it. Where it is False, positions do not enter.
    """
    size = x.shape[axis]
    tensors: tuple[Tensor, ...] = group_moments(x, size, axis, mask)
    if mask is not None:
        tensors = (*tensors, unmasked_counts(mask, x, axis))
    return Moments(*(ops.reshape(tensor, (-1, size)) for tensor in tensors))


def merge(moments: Moments, groups: int | None = None, samples: int | None = None) -> Moments:
    """Moments over blocks of consecutive samples and channels.

    Args:
        moments: Those of each sample and channel.
        groups: The number of groups of channels, which divides that of the channels. Defaults to one for each channel.
        samples: The number of samples of a block; the last block has those that are left. Defaults to all.

    Returns:
        Moments, for each channel again; for each sample again, unless a block has all of them.
    """

    def totals(values):
        if groups is not None and groups != values.shape[1]:
            values = _channel_sums(values, groups)
        if samples == 1:
            return values
        return ops.sum(values, axis=0, keepdims=True) if samples is None else _sample_sums(values, samples)

    weights = ops.ones_like(moments.variance) if moments.counts is None else moments.counts
    count = totals(weights)

    def average(values):
        # Nothing of nothing is 0. Not ops.mean, which computes in float32 outside TensorFlow, for float64 too.
        return totals(weights * values) / ops.maximum(count, 1)

    pivot = rounded(average(moments.pivot))
    # Close to each other, so their difference is exact.
    means = (moments.pivot - pivot) + moments.distance
    distance = average(means)
    variance = average(moments.variance) + average(ops.square(means - distance))
    return Moments(pivot, distance, variance, None if moments.counts is None else count)


def mix(first: Moments, second: Moments, weight: Any) -> Moments:
    """Moments of a mixture: of values that are from `second` with the probability `weight`, and else from `first`.

    That is a weighted average of raw moments, ``E[x]`` and ``E[x^2]``, whatever the variances.
    """
    apart = (second.pivot - first.pivot) + second.distance - first.distance
    variance = first.variance + weight * (second.variance - first.variance)
    variance = variance + weight * (1 - weight) * ops.square(apart)
    return Moments(first.pivot + ops.zeros_like(apart), first.distance + weight * apart, variance)


def batch_count(x: Tensor, axis: int, moments: Moments) -> Tensor:
    """How many values of a batch the moments of each channel are of, as a tensor that broadcasts against them."""
    if moments.counts is not None:
        return moments.counts
    return ops.cast(ops.shape(x)[0], x.dtype) * group_size(x, x.shape[axis], axis)


def sample_count(x: Tensor, groups: int, axis: int, moments: Moments) -> Tensor | int:
    """How many values of a sample the moments of each group are of, as a number that broadcasts against them."""
    return group_size(x, groups, axis) if moments.counts is None else moments.counts


def unbiased(variance: Tensor, count: Tensor) -> Tensor:
    """A variance of `count` values that was divided by `count`, divided by ``count - 1``."""
    return variance * (count / ops.maximum(ops.cast(count, variance.dtype) - 1, 1))


def _channel_sums(values, groups):
    values = channels.by_groups(values, groups, axis=1)
    sums = ops.sum(values, axis=2, keepdims=True)
    return ops.reshape(ops.tile(sums, (1, 1, values.shape[2])), (-1, groups * values.shape[2]))


def _sample_sums(values, per_block):
    size = ops.shape(values)[0]
    blocks = ops.arange(size) // per_block
    # As many segments as samples are enough for any size of a block; those that are not used are never read.
    segments = max(size, 1) if isinstance(size, int) else size
    return ops.take(ops.segment_sum(values, blocks, num_segments=segments), blocks, axis=0)
