"""Carries what a layer has learned, and whether it may learn, over to the layer that takes its place."""

import tempfile

import keras

__all__ = ["carry_by_name", "carry_compile_state", "carry_state", "carry_trainable", "dtype_of", "late_regularizers"]


def dtype_of(layer: keras.layers.Layer):
    """The dtype policy of a layer, as an argument for another one."""
    policy = layer.dtype_policy
    # Layers without a get_config of their own can be saved with a name only.
    return policy.name if type(policy) is keras.dtype_policies.DTypePolicy else policy


def carry_state(source: keras.layers.Layer, target: keras.layers.Layer, weights: bool = True):
    """Copies the weights of a layer and of the layers inside it to its clone, and what preprocessing layers adapted.

    Args:
        source: A layer that is built.
        target: Its clone, built.
        weights: If False, only what preprocessing layers have adapted to is copied: it is no subject of training.

    Raises:
        ValueError: If the clone has other weights than the layer.
    """
    sources, targets = source._flatten_layers(), target._flatten_layers()
    for old, new in zip(sources, targets, strict=True):
        if not weights and not hasattr(old, "adapt"):
            continue
        if [tuple(weight.shape) for weight in old.weights] != [tuple(weight.shape) for weight in new.weights]:
            raise ValueError(
                f"Layer '{source.name}' ({type(source).__name__}) cannot be carried over: its clone, made from its "
                "`get_config()`, has other weights. "
                f"Expected: {[(weight.name, tuple(weight.shape)) for weight in old.weights]}. "
                f"Received: {[(weight.name, tuple(weight.shape)) for weight in new.weights]}"
            )
        # As a file would be written and read, because layers such as Normalization derive more from their weights.
        store: dict = {}
        old.save_own_variables(store)
        if store:
            new.load_own_variables(store)
        if hasattr(old, "save_assets"):
            with tempfile.TemporaryDirectory() as folder:
                old.save_assets(folder)
                new.load_assets(folder)


def carry_by_name(source: keras.layers.Layer, target: keras.layers.Layer, weights: bool = True) -> list[str]:
    """Copies the weights of a layer to one of another kind, where they mean the same: same name, same shape.

    Whether they are trainable is copied, too. A frozen layer is frozen as a whole, its proxy included.

    Returns:
        The names of the weights that were copied.
    """
    target.trainable = source.trainable
    known = {weight.name: weight for weight in source.weights}
    copied = []
    for weight in target.weights:
        old = known.get(weight.name)
        if old is not None and tuple(old.shape) == tuple(weight.shape):
            if source.trainable and not old.trainable:
                weight.trainable = False
            if weights:
                weight.assign(old)
                copied.append(weight.name)
    return copied


def carry_trainable(source: keras.layers.Layer, target: keras.layers.Layer):
    """Copies the `trainable` of a layer that was cloned, and of the layers and variables inside it."""
    # From the outside in, because setting it on a layer sets it on all layers inside.
    for old, new in zip(source._flatten_layers(), target._flatten_layers(), strict=True):
        new.trainable = old.trainable
    for old, new in zip(source.weights, target.weights, strict=True):
        if new.trainable != old.trainable:
            new.trainable = old.trainable


def late_regularizers(source: keras.layers.Layer, target: keras.layers.Layer) -> bool:
    """Whether a regularizer was set on a layer after it was built: it does nothing there, but acts in the clone."""
    regularizers = {weight.name: weight.regularizer for weight in source.weights}
    return any(weight.regularizer and regularizers.get(weight.name, True) is None for weight in target.weights)


def carry_compile_state(source: keras.Model, target: keras.Model) -> list[str]:
    """Compiles `target` as `source` is, with a fresh optimizer.

    Returns:
        What did not come through.
    """
    if not source.compiled:
        return []
    try:
        target.compile_from_config(source.get_compile_config())
    except Exception as error:  # whatever a custom loss or metric raises when it is made from its config
        return [
            f"The model was compiled, but the new one could not be ({type(error).__name__}: {error}). "
            "Call `compile` on it."
        ]
    optimizer = getattr(source.optimizer, "inner_optimizer", source.optimizer)
    if any(getattr(optimizer, f"_exclude_from_weight_decay{kind}", None) for kind in ("", "_pattern")):
        return [
            "What was excluded from weight decay is not known to the new optimizer. Call `compile` with one for which "
            "`keras_proxynorm.exclude_norm_from_weight_decay(optimizer, model)` was called."
        ]
    return []
