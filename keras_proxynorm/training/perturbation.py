"""The perturbations of sharpness-aware minimization: pure functions of weights and gradients."""

from collections.abc import Sequence
from typing import Any

from keras import ops

__all__ = ["ADAPTIVE", "NORMS", "perturbations"]

ADAPTIVE = (None, "elementwise", "layerwise")
NORMS = ("l2", "linf")


def perturbations(
    weights: Sequence,
    gradients: Sequence,
    adapted: Sequence[bool],
    *,
    loss_scale: Any,
    rho: float,
    adaptive: str | None,
    norm: str,
    eta: float,
) -> list:
    """The perturbation of each weight; one norm is taken over all of them.

    All are 0 if any gradient is not finite, so that the weights stay finite and the optimizer sees the gradient.

    Args:
        weights: Tensors.
        gradients: Gradients of the loss times `loss_scale`, or None where it does not depend on a weight.
        adapted: For each weight, whether `adaptive` applies to it.
        loss_scale: Number or scalar tensor.
        rho: The radius.
        adaptive: None, ``"elementwise"`` or ``"layerwise"``.
        norm: ``"l2"`` or ``"linf"``.
        eta: Added to the absolute value of weights (elementwise), or the relative increase of their norm (layerwise).

    Returns:
        float32 tensors.
    """
    gradients = [_float32(g, like=w) / loss_scale for w, g in zip(weights, gradients, strict=True)]
    scales = [_scale(w, adaptive if own else None, eta) for w, own in zip(weights, adapted, strict=True)]
    if norm == "linf":
        directions = [scale * ops.sign(g) for scale, g in zip(scales, gradients, strict=True)]
    else:
        scaled = [scale * g for scale, g in zip(scales, gradients, strict=True)]
        length = ops.sqrt(sum(ops.sum(ops.square(g)) for g in scaled))
        directions = [scale * g / (length + 1e-16) for scale, g in zip(scales, scaled, strict=True)]
    finite = ops.all(ops.stack([ops.all(ops.isfinite(g)) for g in gradients]))
    return [ops.where(finite, rho * direction, 0.0) for direction in directions]


def _float32(gradient, like):
    zeros = ops.zeros_like(like, dtype="float32")
    # The sum is a tensor even where the gradient of an embedding is an IndexedSlices of TensorFlow.
    return zeros if gradient is None else ops.add(zeros, ops.cast(gradient, "float32"))


def _scale(weight, adaptive, eta):
    if adaptive is None:
        return 1.0
    weight = ops.cast(weight, "float32")
    if adaptive == "elementwise":
        return ops.abs(weight) + eta
    return ops.sqrt(ops.sum(ops.square(weight))) * (1.0 + eta)
