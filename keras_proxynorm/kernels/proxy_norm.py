"""The two steps of a proxy-normalized layer as functions of tensors: normalize with the affine, then activate."""

import functools

import keras
from keras import ops

from keras_proxynorm.kernels import channels
from keras_proxynorm.kernels.statistics import expand_mask, group_moments
from keras_proxynorm.moments import ElementwiseActivation, Tensor

__all__ = [
    "affine",
    "affine_and_activate",
    "group_normalize",
    "group_normalize_and_activate",
    "normalize",
    "proxy_moments",
]


def group_normalize_and_activate(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    proxy_moments: tuple[Tensor, Tensor] | None,
    *,
    activation: ElementwiseActivation,
    groups: int,
    axis: int,
    epsilon: float,
    proxy_epsilon: float,
    mask: Tensor | None = None,
) -> Tensor:
    """Group normalization, affine, activation and proxy normalization.

    On TensorFlow the gradient is written by hand, for standard activations and without a mask. Elsewhere automatic
    differentiation does as well: on PyTorch a gradient by hand could not be differentiated again, and on JAX it would
    rule out forward mode.

    Args:
        x: Float tensor of rank 2 or more; axis 0 is the batch.
        gamma: Tensor of shape ``(channels,)``, or None for 1.
        beta: Tensor of shape ``(channels,)``, or None for 0.
        proxy_moments: Mean and variance of the activation under the proxy, two tensors of shape ``(channels,)``, or
            None for no proxy normalization.
        activation: The activation.
        groups: Number of groups of channels that share their statistics.
        axis: Index of the channel axis, positive.
        epsilon: Float, added to the variance of the input.
        proxy_epsilon: Float, added to the variance of the activation.
        mask: Optional boolean tensor of the shape of `x`, or of its leading axes without the channel axis. Where it is
            False the output is that of the mean, whatever is in `x`.

    Returns:
        A tensor of the shape and dtype of `x`.
    """
    if mask is None and activation.is_standard and keras.backend.backend() == "tensorflow":
        from keras_proxynorm.kernels.tensorflow.normalize_and_activate import normalize_and_activate

        ones, zeros = (functools.partial(make, (x.shape[axis],), x.dtype) for make in (ops.ones, ops.zeros))
        scale = ones() if gamma is None else gamma
        offset = zeros() if beta is None else beta
        if proxy_moments is None:
            output_scale, output_offset = ones(), zeros()
        else:
            mean, variance = proxy_moments
            output_scale = ops.rsqrt(variance + proxy_epsilon)
            output_offset = -mean * output_scale
        return normalize_and_activate(x, scale, offset, output_scale, output_offset, activation, groups, axis, epsilon)
    gamma, beta = channels.broadcast(gamma, x, axis), channels.broadcast(beta, x, axis)
    y = group_normalize(x, groups, axis, epsilon, gamma, beta, mask)
    return affine_and_activate(
        y, None, None, proxy_moments, activation=activation, axis=axis, proxy_epsilon=proxy_epsilon
    )


def group_normalize(
    x: Tensor,
    groups: int,
    axis: int,
    epsilon: float,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Group normalization, with tensors `gamma` and `beta` that broadcast against `x`, or None for 1 and 0.

    Takes the other arguments of `group_normalize_and_activate` that it has, and returns a tensor of the shape and dtype
    of `x`.
    """
    pivot, distance, variance = group_moments(x, groups, axis, mask)
    if mask is not None:
        # Masked values have another scale than the others; float16 may not hold what normalization makes of them. The
        # mean stays in two parts, since in one it would be rounded.
        x, pivot = ops.where(expand_mask(mask, x, axis), x - pivot, distance), ops.zeros_like(pivot)
    return normalize(x, pivot, distance, variance, gamma, beta, epsilon)


def affine_and_activate(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    proxy_moments: tuple[Tensor, Tensor] | None,
    *,
    activation: ElementwiseActivation,
    axis: int,
    proxy_epsilon: float,
) -> Tensor:
    """Affine, activation and proxy normalization, of an input that is normalized.

    Takes the arguments of `group_normalize_and_activate` that it has, and returns a tensor of the shape and dtype of
    `x`.
    """
    x = affine(x, channels.broadcast(gamma, x, axis), channels.broadcast(beta, x, axis))
    if proxy_moments is None:
        return activation.function(x)
    mean, variance = (channels.broadcast(moment, x, axis) for moment in proxy_moments)
    return (activation.function(x) - mean) * ops.rsqrt(variance + proxy_epsilon)


def affine(x: Tensor, gamma: Tensor | None, beta: Tensor | None) -> Tensor:
    """``gamma x + beta``, of tensors that broadcast against `x`, or None for 1 and 0."""
    if gamma is not None:
        x = x * gamma
    return x if beta is None else x + beta


def normalize(
    x: Tensor,
    pivot: Tensor,
    distance: Tensor,
    variance: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    epsilon: float,
) -> Tensor:
    """``gamma (x - mean) / sqrt(variance + epsilon) + beta``, where the mean is ``pivot + distance``.

    All tensors broadcast against `x`; see `group_moments` for the first three. `gamma` is None for 1, `beta` for 0.
    """
    scale = affine(ops.rsqrt(variance + epsilon), gamma, None)
    # Not x * scale - mean * scale: the gradient of the scale then sums centered values.
    return affine((x - pivot) - distance, scale, beta)


def proxy_moments(
    activation: ElementwiseActivation,
    gamma: Tensor | None,
    beta: Tensor | None,
    proxy: Tensor,
    method: str,
    num_quantiles: int,
) -> tuple[Tensor, Tensor]:
    """Mean and variance of ``activation(gamma Y + beta)`` for the proxy ``Y ~ N(proxy[0], (1 + proxy[1]) ** 2)``.

    `gamma` and `beta` have the shape ``(channels,)``, or are None for 1 and 0; `proxy` has ``(2, channels)``. The other
    arguments are those of `keras_proxynorm.activation_moments`. Returns two tensors of shape ``(channels,)``.
    """
    mean, stddev = ops.unstack(proxy)
    stddev = 1.0 + stddev
    if gamma is not None:
        mean, stddev = gamma * mean, gamma * stddev
    if beta is not None:
        mean = mean + beta
    return activation.moments(mean, ops.abs(stddev), method, num_quantiles)
