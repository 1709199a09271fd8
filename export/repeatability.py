"""Whether a model computes the same at each call: a file holds a function, no random numbers and no state."""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras

from keras_proxynorm.compat import layers_inside

__all__ = ["check_repeatable"]

# The types of TensorFlow's operations that change a variable, those of random ones that keep a state of their own, and
# those of all random ones.
_CHANGES = re.compile(r".*Assign|ResourceScatter|Rng|Stateful(Random|Standard|Truncated|Uniform)")
_KEEPS_STATE = re.compile(r"Multinomial|(Parameterized)?TruncatedNormal|Random")
_DRAWS = re.compile(rf"{_KEEPS_STATE.pattern}|Rng|Stateful(?!Partitioned)|Stateless(Multi|Param|Random|Trunc)")


def check_repeatable(model: keras.Model, serve: Callable, signature: Sequence[Any]) -> None:
    """Raises a ValueError that names the layer if the outputs at inference depend on more than inputs and weights.

    They do if a layer draws random numbers, or keeps other values from one call to the next. Random numbers of a fixed
    seed are constants. Values that do not reach the outputs are no obstacle: some augmentation layers draw random
    numbers at inference, too, and return their input.

    Args:
        model: The model that computes.
        serve: The function that will be exported, which calls it.
        signature: List of `tf.TensorSpec`, one for each argument of `serve`.

    Raises:
        ValueError: Also if the model does not run with sizes that the signature leaves open.
    """
    graph = _traced(serve, signature).graph
    types = _TypesOfOperations(graph)
    operations = graph.get_operations()
    changed = {
        tensor.name
        for operation in operations
        if any(map(_CHANGES.match, types(operation)))
        for tensor in operation.inputs
        if tensor.dtype == "resource"
    }
    for operation in _ancestors(graph.outputs):
        keeps_state = any(map(_KEEPS_STATE.match, types(operation)))
        if keeps_state or any(tensor.name in changed for tensor in operation.inputs):
            scope, layer = _place(operation, model)
            inside = [operation, *(other for other in operations if other.name.startswith(f"{scope}/"))]
            draws = any(_DRAWS.match(kind) for other in inside for kind in types(other))
            what = "draws random numbers" if draws else "keeps values from one call to the next"
            raise ValueError(
                f"Argument `model` must compute the same at each call, but {layer} {what} at inference. Make these an "
                f"input of the model. Received: model={model!r}"
            )


def _traced(serve, signature):
    import tensorflow as tf

    # Not in a StatelessScope, so that changes of variables are in the graph.
    traced = tf.function(serve, input_signature=signature, autograph=False)
    try:
        return traced.get_concrete_function()
    except Exception as error:  # whatever the layers of a user and of Keras raise
        if not any(None in spec.shape[1:] for spec in signature):
            raise
        raise ValueError(
            "Argument `input_shape` must fix all sizes, because the model does not run while some are open. Received: "
            f"{', '.join(f'{spec.name}: {tuple(spec.shape[1:])}' for spec in signature)} "
            f"({type(error).__name__}: {' '.join(str(error).split())[:300]})"
        ) from error


class _TypesOfOperations:
    """The type of an operation and those of all operations in the functions that it calls, such as branches."""

    def __init__(self, graph):
        self.graph = graph
        self.functions = None

    def __call__(self, operation) -> set[str]:
        types, names = {operation.type}, set(_functions_called(operation.node_def))
        waiting = list(names)
        while waiting:
            for node in self.nodes(waiting.pop()):
                types.add(node.op)
                new = set(_functions_called(node)) - names
                names |= new
                waiting.extend(new)
        return types

    def nodes(self, function):
        if self.functions is None:
            library = self.graph.as_graph_def().library
            self.functions = {entry.signature.name: entry.node_def for entry in library.function}
        return self.functions.get(function, ())


def _functions_called(node) -> Iterator[str]:
    for value in node.attr.values():
        for function in (value.func, *value.list.func):
            if function.name:
                yield function.name


def _ancestors(tensors) -> Iterator[Any]:
    """The operations that tensors are computed from, their own last operations first."""
    waiting = [tensor.op for tensor in tensors]
    seen = set()
    while waiting:
        operation = waiting.pop()
        if operation.name not in seen:
            seen.add(operation.name)
            yield operation
            waiting.extend(tensor.op for tensor in operation.inputs)


def _place(operation, model) -> tuple[str, str]:
    """The scope of the innermost layer that an operation belongs to, and how to call that layer in an error."""
    layers = {layer.name: layer for layer in layers_inside(model)}
    scopes = operation.name.split("/")[:-1]
    for depth in range(len(scopes), 0, -1):
        # TensorFlow numbers the calls of a layer.
        for name in (re.sub(r"_\d+$", "", scopes[depth - 1]), scopes[depth - 1]):
            if name in layers and layers[name] is not model:
                return "/".join(scopes[:depth]), f"layer '{name}' ({type(layers[name]).__name__})"
    return "/".join(scopes[:1]), f"its `call` ({type(model).__name__})"
