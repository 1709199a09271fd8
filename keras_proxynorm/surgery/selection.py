"""Which normalization layers a user asks for."""

from collections.abc import Callable
from collections.abc import Iterable
from typing import TypeAlias

import keras

from keras_proxynorm.graph.layer_kinds import NORMALIZATIONS
from keras_proxynorm.graph.reading import Graph

__all__ = ["LayerSelection", "selector"]

LayerChoice: TypeAlias = str | type | keras.layers.Layer
LayerSelection: TypeAlias = LayerChoice | Iterable[LayerChoice] | Callable[[keras.layers.Layer], bool] | None


def selector(layers: LayerSelection, graphs: list[Graph]) -> Callable[[str, keras.layers.Layer], bool]:
    """Turns the argument `layers` of `replace_normalization` into a function of a path and a layer.

    Raises:
        ValueError: If `layers` holds something else than normalization layers of the graphs.
    """
    if layers is None:
        layers = keras.layers.BatchNormalization
    if callable(layers) and not isinstance(layers, (type, keras.layers.Layer)):
        return lambda path, layer: bool(layers(layer))
    several = isinstance(layers, Iterable) and not isinstance(layers, (str, type))
    chosen: list = [*layers] if several else [layers]  # type: ignore[misc]
    known = {
        choice
        for graph in graphs
        for operation in graph.operations.values()
        if isinstance(operation, NORMALIZATIONS)
        for choice in (operation.name, graph.path + operation.name, operation)
    }
    for choice in chosen:
        is_class = isinstance(choice, type) and issubclass(choice, NORMALIZATIONS)
        if not is_class and not (isinstance(choice, (str, keras.layers.Layer)) and choice in known):
            names = ", ".join(normalization.__name__ for normalization in NORMALIZATIONS)
            raise ValueError(
                "Argument `layers` must be normalization layers of the model or their names, their classes "
                f"({names}), or a function of a layer. Received: layers={layers!r}, and the model has no normalization "
                f"{choice!r}"
            )
    classes = tuple(choice for choice in chosen if isinstance(choice, type))
    return lambda path, layer: isinstance(layer, classes) or path in chosen or layer.name in chosen or layer in chosen
