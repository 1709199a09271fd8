"""The shapes of small tensors: a value for each channel, or for each channel or group of a sample."""

from keras import ops

from keras_proxynorm.moments import Tensor

__all__ = ["broadcast", "by_channels", "by_groups", "repeat"]


def broadcast(values: Tensor | None, like: Tensor, axis: int) -> Tensor:
    """Values of the channels, or of each sample and channel, shaped to broadcast against `like`; None stays None."""
    if values is None:
        return None
    return ops.reshape(values, (-1, *(size if i == axis else 1 for i, size in enumerate(like.shape[1:], 1))))


def by_groups(values: Tensor | None, groups: int, axis: int) -> Tensor:
    """Values of the channels, in the shape ``(batch, groups, channels of a group)``; None stays None.

    Args:
        values: Vector of the channels, which gets the batch size 1, or tensor of size 1 at the positions.
        groups: Number of groups.
        axis: Index of the channel axis of a tensor.
    """
    if values is None:
        return None
    channels = values.shape[0 if len(values.shape) == 1 else axis]
    return ops.reshape(values, (-1, groups, channels // groups))


def by_channels(values: Tensor, like: Tensor, axis: int) -> Tensor:
    """The inverse of `by_groups`: of the rank of `like`, with its batch and channel sizes and size 1 elsewhere."""
    batch = -1 if like.shape[0] is None else like.shape[0]
    return ops.reshape(values, (batch, *(n if i == axis else 1 for i, n in enumerate(like.shape[1:], 1))))


def repeat(values: Tensor, like: Tensor, axis: int) -> Tensor:
    """Values of groups, of shape ``(batch, groups, 1)``, for each of the channels of `like`, as in `by_channels`."""
    return by_channels(ops.tile(values, (1, 1, like.shape[axis] // values.shape[1])), like, axis)
