"""How far, and where to, sharpness-aware minimization moves weights: pure functions of weights and gradients."""

from collections.abc import Sequence

from keras import ops

__all__ = ["ADAPTIVE", "NORMS", "perturbations"]

ADAPTIVE = (None, "elementwise", "layerwise")
NORMS = ("l2", "linf")


def perturbations(
    weights: Sequence,
    gradients: Sequence,
    adapted: Sequence[bool],
    *,
    loss_scale,
    rho: float,
    adaptive: str | None,
    norm: str,
    eta: float,
) -> list:
    """The perturbation of each weight, float32; one norm is taken over all of them.

    They are 0 if any gradient is not finite, so that the weights stay finite, too, and it is for the optimizer to see
    that the gradient is not.

    Args:
        weights: Tensors.
        gradients: Gradients of the loss times `loss_scale`, or None where it does not depend on a weight.
        adapted: For each weight, whether it has a scale of its own if `adaptive` is not None.
        loss_scale: Number or scalar tensor.
        rho: The radius.
        adaptive: None, ``"elementwise"`` or ``"layerwise"``.
        norm: ``"l2"`` or ``"linf"``.
        eta: What is added to elementwise scales, and the share that is added to layerwise ones.
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
    # The sum is a tensor even where TensorFlow has the gradient of an embedding as slices.
    return zeros if gradient is None else ops.add(zeros, ops.cast(gradient, "float32"))


def _scale(weight, adaptive, eta):
    if adaptive is None:
        return 1.0
    weight = ops.cast(weight, "float32")
    if adaptive == "elementwise":
        return ops.abs(weight) + eta
    return ops.sqrt(ops.sum(ops.square(weight))) * (1.0 + eta)
