"""Carries what a layer has learned, and whether it may learn, over to the layer that takes its place."""

import tempfile
from typing import Any

import keras
import numpy as np

from keras_proxynorm.compat import copy_rematerialization, excludes_from_weight_decay, layers_inside, own_variables

__all__ = [
    "cannot_clone",
    "carry_by_name",
    "carry_compile_state",
    "carry_own_weights",
    "carry_state",
    "copy_of",
    "dtype_of",
    "has_late_regularizers",
    "weights_by_name",
]


def cannot_clone(operation: keras.Operation, error: Exception) -> ValueError:
    """The error for a layer whose config does not make it again."""
    return ValueError(
        f"Layer '{operation.name}' ({type(operation).__name__}) cannot be cloned, because it cannot be made from its "
        "config. Its class needs a `get_config()` with all arguments of its constructor, and custom functions in it "
        "need `keras.saving.register_keras_serializable()`. "
        f"Received: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    )


def dtype_of(layer: Any) -> Any:
    """The dtype policy of a layer, as an argument for another one."""
    policy = layer.dtype_policy
    # Layers without a get_config of their own can be saved with a name only.
    return policy.name if type(policy) is keras.dtype_policies.DTypePolicy else policy


def carry_state(source: keras.layers.Layer, target: keras.layers.Layer, weights: bool = True) -> None:
    """Copies the state of a layer to its clone: weights, what it has adapted to, what is trainable.

    Args:
        source: A layer that is built.
        target: Its clone, built.
        weights: If False, weights are not copied, but what preprocessing layers have adapted to still is.

    Raises:
        ValueError: If the clone has other weights than the layer, or the same.
    """
    layers, variables = _pairs_inside(source, target)
    # From the outside in, because setting it on a layer sets it on all layers inside.
    for old, new in layers:
        new.trainable = old.trainable
        copy_rematerialization(old, new)
        if new.dtype_policy.name != old.dtype_policy.name:
            # Of a layer that its owner makes, under the policy of the process at that time.
            new.dtype_policy = old.dtype_policy
    for old, new in variables:
        if new.trainable != old.trainable:
            new.trainable = old.trainable
    for old, new in layers:
        if weights or hasattr(old, "adapt"):
            _carry_as_a_file_would(old, new)
    if weights:
        # Exactly: a file merges the adapters of a layer into its kernel.
        for old, new in variables:
            new.assign(copy_of(old))


def _pairs_inside(source, target):
    """Pairs of the layers inside of a layer and of its clone, and pairs of their weights."""
    layers = layers_inside(source), layers_inside(target)
    if [type(layer) for layer in layers[0]] != [type(layer) for layer in layers[1]]:
        raise cannot_clone(source, ValueError(f"the layers {layers[1]}, expected {layers[0]}"))
    pairs = list(zip(*layers, strict=True))
    variables = [pair for old, new in pairs for pair in _pairs_of_variables(old, new)]
    shapes = [[(tuple(pair[i].shape), pair[i].dtype) for pair in variables] for i in range(2)]
    if shapes[0] != shapes[1] or len(source.weights) != len(target.weights):
        if any(getattr(x, "quantization_mode", None) or getattr(x, "lora_enabled", False) for x in layers[0]):
            raise ValueError(
                f"Layer '{source.name}' ({type(source).__name__}) cannot be cloned, because layers in it are quantized "
                "or have adapters, which its config does not say. Convert the model first, then quantize or adapt it."
            )
        raise cannot_clone(source, ValueError(f"weights of the shapes {shapes[1]}, expected {shapes[0]}"))
    if any(old is new for old, new in variables):
        raise cannot_clone(source, ValueError("a layer with the same variables, so that `get_config` holds a layer"))
    return pairs, variables


def _pairs_of_variables(old, new):
    """Pairs of a layer's own weights and those of its clone, which may have made them in another order."""
    olds, news = own_variables(old), own_variables(new)
    by_name = {weight.name: weight for weight in news}
    if len(by_name) == len(news) and by_name.keys() == {weight.name for weight in olds}:
        return [(weight, by_name[weight.name]) for weight in olds]
    return zip(olds, news, strict=False)


def _carry_as_a_file_would(old, new):
    # Layers such as Normalization derive more from their weights, and others keep vocabularies.
    store: dict = {}
    old.save_own_variables(store)
    if store:
        new.load_own_variables({name: copy_of(value) for name, value in store.items()})
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
    copy_rematerialization(source, target)
    pairs = weights_by_name(source, target)
    for old, new in pairs:
        if source.trainable and not old.trainable:
            new.trainable = False
        if weights:
            new.assign(copy_of(old))
    return [new.name for _, new in pairs if weights]


def weights_by_name(source: keras.layers.Layer, target: keras.layers.Layer) -> list[tuple[Any, Any]]:
    """Pairs of the weights of two layers that mean the same: same name, same shape."""
    known = {(weight.name, tuple(weight.shape)): weight for weight in source.weights}
    places = [(weight.name, tuple(weight.shape)) for weight in target.weights]
    return [(known[place], new) for place, new in zip(places, target.weights, strict=True) if place in known]


def carry_own_weights(source: keras.Model, target: keras.Model, graph_model: keras.Model, weights: bool = True) -> bool:
    """Copies the weights that a model has besides those of the layers in its graph.

    Returns:
        Whether that was possible; if there are none, it was.
    """
    known = {id(weight) for model in (graph_model, target) for layer in model.layers for weight in layer.weights}
    own, others = ([weight for weight in model.weights if id(weight) not in known] for model in (source, target))
    if [tuple(weight.shape) for weight in own] != [tuple(weight.shape) for weight in others]:
        return False
    for old, new in zip(own, others, strict=True):
        new.trainable = old.trainable
        if weights:
            new.assign(copy_of(old))
    return True


def copy_of(weight: Any) -> np.ndarray:
    """The value of a weight, as an array of its own."""
    # On JAX an assigned array is shared, and a function that is given the one model's may destroy the other's.
    return np.array(keras.ops.convert_to_numpy(weight))


def has_late_regularizers(source: keras.layers.Layer, target: keras.layers.Layer) -> bool:
    """Whether a regularizer was set on a layer after it was built: it does nothing there, but acts in the clone."""
    if len(source.weights) != len(target.weights):
        return False
    pairs = zip(source.weights, target.weights, strict=True)
    return any(old.name == new.name and old.regularizer is None and new.regularizer is not None for old, new in pairs)


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
        reason = " ".join(str(error).split())[:300]
        return [
            f"The model was compiled, but the new one could not be ({type(error).__name__}: {reason}). "
            "Call `compile` on it."
        ]
    if excludes_from_weight_decay(getattr(source.optimizer, "inner_optimizer", source.optimizer)):
        return [
            "What was excluded from weight decay is not known to the new optimizer. Call `compile` with one for which "
            "`keras_proxynorm.exclude_norm_from_weight_decay(optimizer, model)` was called."
        ]
    return []
