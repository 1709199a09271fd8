"""The two steps of a proxy-normalized layer as functions of tensors: normalize with the affine, then activate."""

from keras import ops

from keras_proxynorm.moments import ElementwiseActivation

__all__ = ["normalize", "proxy_moments", "proxy_normalize"]


def normalize(x, pivot, distance, variance, gamma, beta, epsilon: float):
    """``gamma (x - mean) / sqrt(variance + epsilon) + beta``, where the mean is ``pivot + distance``.

    Args:
        x: Float tensor.
        pivot: Tensor that broadcasts against `x`, see `group_moments`.
        distance: Tensor of the shape of `pivot`.
        variance: Tensor of the shape of `pivot`.
        gamma: Tensor that broadcasts against `x`, or None for 1.
        beta: Tensor that broadcasts against `x`, or None for 0.
        epsilon: Float, added to the variance.

    Returns:
        A tensor of the shape and dtype of `x`.
    """
    factor = ops.rsqrt(variance + epsilon)
    if gamma is not None:
        factor = factor * gamma
    # Not x * factor - mean * factor: the gradient of the factor then sums centered values.
    y = ((x - pivot) - distance) * factor
    return y if beta is None else y + beta


def proxy_moments(activation: ElementwiseActivation, gamma, beta, proxy, method: str, num_quantiles: int):
    """Mean and variance of ``activation(gamma Y + beta)`` for the proxy ``Y ~ N(proxy[0], (1 + proxy[1]) ** 2)``.

    Args:
        activation: The activation, with what is known of its shape.
        gamma: Tensor of shape ``(channels,)``, or None for 1.
        beta: Tensor of shape ``(channels,)``, or None for 0.
        proxy: Tensor of shape ``(2, channels)``.
        method: ``"exact"`` or ``"quantiles"``.
        num_quantiles: Number of points for ``"quantiles"``.

    Returns:
        ``(mean, variance)``, tensors of shape ``(channels,)``.
    """
    mean, stddev = proxy[0], 1.0 + proxy[1]
    if gamma is not None:
        mean, stddev = gamma * mean, gamma * stddev
    if beta is not None:
        mean = mean + beta
    return activation.moments(mean, ops.abs(stddev), method, num_quantiles)


def proxy_normalize(h, activation: ElementwiseActivation, mean, variance, epsilon: float):
    """``(activation(h) - mean) / sqrt(variance + epsilon)``, the activation step of Proxy Normalization.

    Args:
        h: Float tensor, the normalized input after the affine.
        activation: The activation.
        mean: The proxy's mean after the activation, a tensor that broadcasts against `h`.
        variance: Its variance.
        epsilon: Float, added to the variance.

    Returns:
        A tensor of the shape and dtype of `h`.
    """
    return (activation.function(h) - mean) * ops.rsqrt(variance + epsilon)
