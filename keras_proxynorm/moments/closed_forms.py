"""Closed-form moments of an activation of a Gaussian: two half-lines (relu and its relatives), and the exponential."""

import math

import keras
import numpy as np
from keras import ops

from keras_proxynorm.moments.precision import Tensor
from keras_proxynorm.moments.quadrature import standardized

__all__ = ["exponential_moments", "rectifier_moments"]

# Standard deviations beyond which the float32 normal density is zero. Clipping there keeps every product finite.
_CLIP = 13.0


def rectifier_moments(kink: float, left: float, right: float, mean: Tensor, stddev: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of ``phi(U)``, ``U ~ N(mean, stddev ** 2)``, for two half-lines that meet in ``(kink, 0)``.

    ``phi`` is a line plus a rectifier, ``phi(u) = left (u - a) + (right - left) relu(u - a)``. With
    ``t = (mean - a) / stddev``, ``Phi`` and ``p`` the normal distribution function and density, and
    ``g(t) = t Phi(t) + p(t)``,

    - ``E[relu(U - a)] = stddev g(t)``,
    - ``Var[relu(U - a)] = stddev^2 (Phi(t) - g(t) g(-t))``,
    - ``Cov[U, relu(U - a)] = stddev^2 Phi(t)``.

    Args:
        kink: The point ``a`` where the slope changes.
        left: The slope left of it.
        right: The slope right of it.
        mean: Float tensor.
        stddev: Float tensor of the same shape, not negative. At 0 the mean is ``phi(mean)`` and the variance is 0.

    Returns:
        ``(mean, variance)`` of ``phi(U)``, tensors of the shape and dtype of `mean`.
    """
    change = right - left
    distance = mean - kink
    t = standardized(distance, stddev, _CLIP)
    # By erfc: (1 + erf) / 2 cancels in the left tail, and XLA's float32 erf makes that visible.
    cdf = 0.5 * ops.erfc(t * -math.sqrt(0.5))
    pdf = ops.exp(-0.5 * ops.square(t)) * math.sqrt(0.5 / math.pi)
    # Not stddev * g(t): where t is clipped this is still exactly relu(mean - kink), with the right gradient. To the
    # left, large distances times a probability that underflows would be anything.
    bounded = ops.where(distance < -_CLIP * stddev, -_CLIP * stddev, distance)
    output_mean = change * (bounded * cdf + stddev * pdf)
    g = t * cdf + pdf
    unit_variance = change * change * (cdf - g * (g - t))
    if left:
        output_mean = output_mean + left * distance
        unit_variance = unit_variance + left * left + 2.0 * left * change * cdf
    return output_mean, ops.square(stddev) * ops.relu(unit_variance)


def exponential_moments(mean: Tensor, stddev: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of ``exp(U)``, ``U ~ N(mean, stddev ** 2)``: the log-normal distribution."""
    variance = ops.square(stddev)
    # In this form and order, so that neither factor is infinite where the product is not, and a standard deviation of 0
    # gives 0.
    root = ops.exp(mean + variance)
    largest = float(np.finfo(keras.backend.standardize_dtype(mean.dtype)).max)
    root = ops.where(root > largest, largest, root)
    return ops.exp(mean + 0.5 * variance), root * (root * -ops.expm1(-variance))
