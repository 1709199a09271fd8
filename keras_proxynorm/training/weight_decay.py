"""The weight decay of the paper: kernels and proxies decay, gamma and beta do not."""

import re
import warnings

import keras

from keras_proxynorm.arguments import argument_error, check_built_model
from keras_proxynorm.compat import exclude_further_from_weight_decay, layers_inside, own_variables

__all__ = ["exclude_norm_from_weight_decay"]


def exclude_norm_from_weight_decay(
    optimizer: keras.optimizers.Optimizer, model: keras.Model
) -> keras.optimizers.Optimizer:
    """Excludes gamma and beta of the normalization layers of a model from weight decay, and nothing else.

    This is the rule of the paper: proxies decay as kernels do, gamma and beta do not decay. It covers all weights named
    exactly ``gamma`` or ``beta``, which are those of the normalization layers of Keras too, and the ``scale`` of
    `keras.layers.RMSNormalization` and of other layers whose class has "norm" in its name, such as those of KerasHub.

    Exclusions add up: for an optimizer of several models, call this once for each, in any order. What was excluded by
    the optimizer's own `exclude_from_weight_decay` before stays excluded. Called afterwards, that method of Keras
    forgets all exclusions but its own: call this function again then.

    `keras.optimizers.Muon` treats every matrix as a kernel, including the proxies. Make it with
    ``Muon(exclude_layers=["proxy"])``: proxies then get its AdamW step and `adam_weight_decay`. (This is a regular
    expression for the paths of weights; use ``"/proxy$"`` if other names contain "proxy".)

    Call it before `fit`. Keras does not save exclusions: after `keras.models.load_model`, call it again with
    ``model.optimizer`` before training continues.

    Args:
        optimizer: A Keras optimizer. For a `keras.optimizers.LossScaleOptimizer`, its inner optimizer is meant.
        model: A built model.

    Returns:
        The optimizer, so that the call can stand inside ``model.compile``.

    Raises:
        ValueError: If the model is not built, or if its training step with this optimizer is compiled already.

    Example:

    >>> import keras, keras_proxynorm
    >>> model = keras.Sequential([
    ...     keras.Input((8, 8, 1)), keras.layers.Conv2D(16, 3), keras_proxynorm.LayerNormProxy(),
    ... ])
    >>> optimizer = keras.optimizers.AdamW(weight_decay=1e-4)
    >>> optimizer = keras_proxynorm.exclude_norm_from_weight_decay(optimizer, model)
    >>> model.compile(optimizer, loss="mse")

    Reference:

    - [Labatie et al., 2021](https://arxiv.org/abs/2106.03743)
    """
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise argument_error("optimizer", optimizer, "a keras.optimizers.Optimizer")
    check_built_model(model)
    if getattr(model, "optimizer", None) is optimizer and getattr(model, "train_function", None) is not None:
        raise ValueError(
            "Argument `optimizer` is in use: the training step is compiled, so excluding weights now would have no "
            f"effect. Call this before `fit`, or `model.compile` again first. Received: optimizer={optimizer!r}"
        )
    inner = optimizer
    while isinstance(inner, keras.optimizers.LossScaleOptimizer):
        inner = inner.inner_optimizer
    weights = model.weights  # with those of frozen layers, which may thaw
    exclude_further_from_weight_decay(inner, [*(w for w in weights if w.name in ("gamma", "beta")), *_scales(model)])
    proxies = [weight for weight in weights if weight.name == "proxy"]
    if isinstance(inner, keras.optimizers.Muon) and not all(
        any(re.search(pattern, proxy.path) for pattern in inner.exclude_layers) for proxy in proxies
    ):
        warnings.warn(
            "Muon treats every matrix as a kernel and would orthogonalize the proxies of the normalization layers. "
            'Make it with Muon(exclude_layers=["proxy"]).',
            stacklevel=2,
        )
    return optimizer


def _scales(model):
    """The gammas that are called "scale": of RMS normalization."""
    return [
        weight
        for layer in layers_inside(model)
        if isinstance(layer, keras.layers.RMSNormalization) or "norm" in type(layer).__name__.lower()
        for weight in own_variables(layer)
        if weight.name == "scale"
    ]
