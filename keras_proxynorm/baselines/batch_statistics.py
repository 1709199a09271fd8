"""Mean and variance over samples and groups of channels, merged from those of each sample and channel.

As in `keras_proxynorm.kernels.statistics`, neither raw values nor their squares are summed. A mean is two tensors, a
pivot and the distance to it, so that large means keep their digits; variances are merged by Chan's formula, as the mean
of the variances and the variance of the means.
"""

from typing import NamedTuple

from keras import ops

from keras_proxynorm import kernels
from keras_proxynorm.kernels import channels
from keras_proxynorm.kernels.statistics import group_moments, group_size
from keras_proxynorm.moments import Tensor

__all__ = ["Moments", "batch_count", "channel_moments", "merge", "mix", "normalize", "unbiased"]


class Moments(NamedTuple):
    """Moments of each channel, alike in every sample or not: the shape is ``(samples or 1, channels)``.

    Attributes:
        pivot: A constant for gradients, close to the mean.
        distance: The mean minus the pivot.
        variance: The biased variance.
    """

    pivot: Tensor
    distance: Tensor
    variance: Tensor

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
    pivot, distance, variance, gamma, beta = (channels.broadcast(v, x, axis) for v in (*moments, gamma, beta))
    return kernels.normalize(x, pivot, distance, variance, gamma, beta, epsilon)


def channel_moments(x: Tensor, axis: int) -> Moments:
    """Moments over the positions of each sample and channel.

    Args:
        x: Float tensor of rank 2 or more; axis 0 is the batch.
        axis: Index of the channel axis, positive.
    """
    size = x.shape[axis]
    return Moments(*(ops.reshape(moment, (-1, size)) for moment in group_moments(x, size, axis)))


def merge(moments: Moments, groups: int | None = None, samples: int | None = None) -> Moments:
    """Moments over blocks of consecutive samples and channels, whose members have equally many values.

    Args:
        moments: Those of each sample and channel.
        groups: The number of groups of channels, which divides that of the channels. Defaults to one for each channel.
        samples: The number of samples of a block; the last block has those that are left. Defaults to all.

    Returns:
        Moments, for each channel again; for each sample again, unless a block has all of them.
    """

    def average(values):
        if groups is not None and groups != values.shape[1]:
            values = _average_channels(values, groups)
        if samples == 1:
            return values
        return _average_batch(values) if samples is None else _average_samples(values, samples)

    pivot = average(moments.pivot)
    # Close to each other, so their difference is exact.
    means = (moments.pivot - pivot) + moments.distance
    distance = average(means)
    return Moments(pivot, distance, average(moments.variance) + average(ops.square(means - distance)))


def mix(first: Moments, second: Moments, weight: float) -> Moments:
    """Moments of a mixture: of values that are from `second` with the probability `weight`, and else from `first`.

    That is a weighted average of raw moments, ``E[x]`` and ``E[x^2]``, whatever the variances.
    """
    apart = (second.pivot - first.pivot) + second.distance - first.distance
    variance = first.variance + weight * (second.variance - first.variance)
    variance = variance + weight * (1 - weight) * ops.square(apart)
    return Moments(first.pivot + ops.zeros_like(apart), first.distance + weight * apart, variance)


def batch_count(x: Tensor, axis: int) -> Tensor:
    """How many values of a channel there are in a batch, as a tensor of the dtype of `x`."""
    return ops.cast(ops.shape(x)[0], x.dtype) * group_size(x, x.shape[axis], axis)


def unbiased(variance: Tensor, count: Tensor) -> Tensor:
    """A variance of `count` values that was divided by `count`, divided by ``count - 1``."""
    return variance * (count / ops.maximum(ops.cast(count, variance.dtype) - 1, 1))


# Not ops.mean, which computes in float32 outside TensorFlow, for float64 too.
def _average_batch(values):
    return ops.sum(values, axis=0, keepdims=True) / ops.maximum(ops.cast(ops.shape(values)[0], values.dtype), 1)


def _average_channels(values, groups):
    values = channels.by_groups(values, groups, axis=1)
    per_group = values.shape[2]
    values = ops.sum(values, axis=2, keepdims=True) / per_group
    return ops.reshape(ops.tile(values, (1, 1, per_group)), (-1, groups * per_group))


def _average_samples(values, per_block):
    size = ops.shape(values)[0]
    blocks = ops.arange(size) // per_block
    # As many segments as samples are enough for any size of a block; those that are not used are never read.
    sums, counts = (ops.segment_sum(x, blocks, num_segments=size) for x in (values, ops.ones_like(values[:, :1])))
    return ops.take(sums / ops.maximum(counts, 1), blocks, axis=0)
