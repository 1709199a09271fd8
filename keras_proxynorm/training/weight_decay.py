"""The paper's weight decay: kernels and proxies decay, scales and offsets of normalization layers do not."""

import re
import warnings

import keras

__all__ = ["exclude_norm_from_weight_decay"]


def exclude_norm_from_weight_decay(
    optimizer: keras.optimizers.Optimizer, model: keras.Model
) -> keras.optimizers.Optimizer:
    """Excludes every `gamma` and `beta` of a model from an optimizer's weight decay, and nothing else.

    This is the rule of the paper: the proxies decay with the strength of the kernels, scales and offsets do not decay.
    It covers the scales and offsets of Keras's own normalization layers too: all weights that are named exactly
    ``gamma`` or ``beta``. Weights that the optimizer excludes already stay excluded.

    `keras.optimizers.Muon` treats every matrix as a kernel, the proxies included; make it with
    ``Muon(exclude_layers=["proxy"])``, then the proxies get its AdamW step and `adam_weight_decay`. (It is a regular
    expression for the paths of weights: take ``"/proxy$"`` if names of yours contain "proxy".)

    Call it before `fit`. Keras does not save exclusions: after `keras.models.load_model`, call it again with
    ``model.optimizer`` before training goes on.

    Args:
        optimizer: A Keras optimizer; a `keras.optimizers.LossScaleOptimizer` is looked through.
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
        raise ValueError(
            f"Argument `optimizer` must be a keras.optimizers.Optimizer. Received: optimizer={optimizer!r}"
        )
    if not isinstance(model, keras.Model):
        raise ValueError(f"Argument `model` must be a keras.Model. Received: model={model!r}")
    if not model.built:
        raise ValueError(
            "Argument `model` must be built, because an optimizer excludes weights and not names; call "
            f"`model.build(input_shape)` or the model first. Received: model={model!r}"
        )
    if getattr(model, "optimizer", None) is optimizer and getattr(model, "train_function", None) is not None:
        raise ValueError(
            "Argument `optimizer` is in use: the training step is compiled, so excluding weights now would have no "
            f"effect. Call this before `fit`, or `model.compile` again first. Received: optimizer={optimizer!r}"
        )
    inner = optimizer
    while isinstance(inner, keras.optimizers.LossScaleOptimizer):
        inner = inner.inner_optimizer
    weights = model.weights  # with those of frozen layers, which may thaw
    # Asking first keeps what was excluded before: exclude_from_weight_decay replaces its lists.
    inner.exclude_from_weight_decay(
        var_list=[w for w in weights if w.name in ("gamma", "beta") or not inner._use_weight_decay(w)]
    )
    proxies = [weight for weight in weights if weight.name == "proxy"]
    if isinstance(inner, keras.optimizers.Muon) and not all(
        any(re.search(pattern, proxy.path) for pattern in inner.exclude_layers) for proxy in proxies
    ):
        warnings.warn(
            "Muon takes every matrix for a kernel and would orthogonalize the proxies of the normalization layers. "
            'Make it with Muon(exclude_layers=["proxy"]).',
            stacklevel=2,
        )
    return optimizer
