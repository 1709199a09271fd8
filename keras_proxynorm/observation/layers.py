"""Which layers of a model are observed: kinds of layers, and the choice of a user."""

import collections
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import keras
from keras import layers as keras_layers

from keras_proxynorm.arguments import argument_error
from keras_proxynorm.compat import layers_inside
from keras_proxynorm.layers.proxy_normalization import ProxyNormalizationLayer

__all__ = ["LayerChoice", "choose", "chooses", "distinct", "has_activation", "is_normalization"]

LayerChoice: TypeAlias = str | type | keras.layers.Layer | Iterable | Callable[[keras.layers.Layer], bool] | None

_NORMALIZATIONS = (
    keras_layers.BatchNormalization,
    keras_layers.GroupNormalization,
    keras_layers.LayerNormalization,
    keras_layers.RMSNormalization,
    ProxyNormalizationLayer,
)
_ACTIVATIONS = (
    keras_layers.Activation,
    keras_layers.ELU,
    keras_layers.LeakyReLU,
    keras_layers.PReLU,
    keras_layers.ReLU,
)


def is_normalization(layer: keras.layers.Layer) -> bool:
    """Whether it is a normalization layer whose normalized input can be observed."""
    return isinstance(layer, _NORMALIZATIONS)


def has_activation(layer: keras.layers.Layer) -> bool:
    """Whether its output is an activation: of an activation layer, or of one that ends with a nonlinear activation."""
    if isinstance(layer, _ACTIVATIONS) and not hasattr(layer, "activation"):
        return True
    # Recurrent layers have one inside.
    if isinstance(layer, keras_layers.RNN) or hasattr(layer, "state_size"):
        return False
    activation = getattr(layer, "activation", None)
    name = getattr(activation, "__name__", type(activation).__name__)
    return activation is not None and name.lower() not in ("linear", "softmax", "log_softmax", "logsoftmax")


def chooses(
    layers: Any,
    candidates: Iterable[tuple[str, keras.layers.Layer]],
    kind: str = "layer",
    classes: tuple[type, ...] = (),
) -> Callable[[str, keras.layers.Layer], bool]:
    """Turns a choice of layers into a predicate.

    Args:
        layers: Name, path, class, instance, or function of a layer, or an iterable of these.
        candidates: Pairs of the paths and the layers that can be chosen.
        kind: What the candidates are, in words.
        classes: Classes that may be chosen, with their subclasses, even if there is no such candidate.

    Returns:
        Function of a path and a layer that says whether the layer is chosen.

    Raises:
        ValueError: If a name, path, class or instance in `layers` is that of no candidate.
    """
    candidates = list(candidates)
    several = isinstance(layers, Iterable) and not isinstance(layers, (str, type, keras.layers.Layer))
    choices = [*layers] if several else [layers]
    for choice in choices:
        known = _is_predicate(choice) or (isinstance(choice, type) and issubclass(choice, classes))
        if not known and not any(_is_chosen(choice, path, layer) for path, layer in candidates):
            raise argument_error(
                "layers",
                layers,
                f"names, paths, classes or instances of {kind}s of the model, or a function of a layer",
                f"and the model has no {kind} {choice!r}",
            )
    return lambda path, layer: any(_is_chosen(choice, path, layer) for choice in choices)


def _is_predicate(choice):
    return callable(choice) and not isinstance(choice, (type, keras.layers.Layer))


def _is_chosen(choice, path, layer):
    if _is_predicate(choice):
        return bool(choice(layer))
    if isinstance(choice, str):
        return choice in (layer.name, path)
    return isinstance(layer, choice) if isinstance(choice, type) else layer is choice


def choose(
    model: keras.Model, layers: LayerChoice, default: Callable[[keras.layers.Layer], bool], kind: str
) -> dict[str, keras.layers.Layer]:
    """The layers of a model that a user asks for, at any depth.

    Args:
        model: A built model.
        layers: As in `chooses`; None for the default.
        default: Function of a layer that says whether it is chosen by default.
        kind: What the default is, in words.

    Returns:
        Layers by name, in the order of the model. Layers that share a name have their paths instead.

    Raises:
        ValueError: If there is no such layer.
    """
    unique = {id(layer): layer for layer in layers_inside(model, include_self=False)}
    candidates = [(layer.path, layer) for layer in unique.values() if not isinstance(layer, keras.Model)]
    is_chosen = chooses(default if layers is None else layers, candidates)
    chosen = [layer for path, layer in candidates if is_chosen(path, layer)]
    if not chosen and layers is None:
        raise ValueError(
            f"The model '{model.name}' has no {kind}; name the layers in question with the argument `layers`."
        )
    if not chosen:
        raise argument_error("layers", layers, f"such that it chooses at least one layer of the model '{model.name}'")
    names = [layer.name for layer in chosen]
    names = [layer.path if names.count(layer.name) > 1 else layer.name for layer in chosen]
    return {
        name if names.count(name) == 1 else f"{name}#{i}": layer
        for i, (name, layer) in enumerate(zip(names, chosen, strict=True))
    }


def distinct(keys: Iterable[tuple[str, int]]) -> list[str]:
    """Names for pairs of a layer's name and its number of channels, of which a shared layer has several.

    >>> from keras_proxynorm.observation.layers import distinct
    >>> distinct([("relu", 8), ("norm", 8), ("relu", 16)])
    ['relu', 'norm', 'relu#2']
    """
    counts: collections.Counter[str] = collections.Counter()
    names = []
    for name, _ in keys:
        counts[name] += 1
        names.append(name if counts[name] == 1 else f"{name}#{counts[name]}")
    return names
