"""Reads a functional or sequential model as a graph: which call of an operation reads which tensor."""

import functools
import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import keras

from keras_proxynorm.compat import functional_class, nodes_of

__all__ = [
    "Call",
    "Graph",
    "as_path",
    "check_readable",
    "count_calls",
    "is_functional",
    "is_sequential",
    "nested_model",
    "overrides_call",
    "read_graphs",
    "tensors_in",
]


@dataclass(frozen=True, eq=False)
class Call:
    """One call of an operation: of a layer, of a nested model, or of a function of `keras.ops`.

    Attributes:
        operation: The operation.
        args: Its positional arguments, with the symbolic tensors of the model in them.
        kwargs: Its keyword arguments.
        outputs: The tensors that it returns.
    """

    operation: keras.Operation
    args: tuple
    kwargs: dict[str, Any]
    outputs: tuple[keras.KerasTensor, ...]

    @functools.cached_property
    def inputs(self) -> tuple[keras.KerasTensor, ...]:
        """All tensors that it reads, however they are passed."""
        return tensors_in((self.args, self.kwargs))

    @property
    def output(self) -> keras.KerasTensor:
        return self.outputs[0]

    @functools.cached_property
    def arguments(self) -> dict[str, Any]:
        """All arguments by the names that the `call` of the operation gives them."""
        # That of the class: the one of the object may be hooked by somebody who observes it.
        bound = inspect.signature(type(self.operation).call).bind(self.operation, *self.args, **self.kwargs)
        return dict(list(bound.arguments.items())[1:])


def tensors_in(structure) -> tuple[keras.KerasTensor, ...]:
    """The symbolic tensors in a nested structure of arguments."""
    return tuple(x for x in keras.tree.flatten(structure) if isinstance(x, keras.KerasTensor))


@dataclass(frozen=True, eq=False)
class Graph:
    """The calls of one model.

    Attributes:
        model: The functional or sequential model.
        path: Its path in the outermost model, such as `"classifier/backbone/"`; empty for the outermost.
        functional: A plain functional model of the same tensors: not compiled, and of no class of its own.
        calls: All calls but those of the input layers, each after those that it reads.
    """

    model: keras.Model
    path: str
    functional: keras.Model
    calls: tuple[Call, ...]

    @property
    def inputs(self) -> list[keras.KerasTensor]:
        return self.functional.inputs

    @property
    def outputs(self) -> list[keras.KerasTensor]:
        """The tensors that the model returns."""
        return self.functional.outputs

    @functools.cached_property
    def operations(self) -> list[keras.Operation]:
        """All operations, the input layers too, in the order of the model."""
        return list(self.functional.operations)

    @functools.cached_property
    def _makers(self) -> dict[keras.KerasTensor, Call]:
        return {tensor: call for call in self.calls for tensor in call.outputs}

    @functools.cached_property
    def _consumers(self) -> dict[keras.KerasTensor, list[Call]]:
        consumers: dict[keras.KerasTensor, list[Call]] = {}
        for call in self.calls:
            for tensor in dict.fromkeys(call.inputs):
                consumers.setdefault(tensor, []).append(call)
        return consumers

    def maker(self, tensor: keras.KerasTensor) -> Call | None:
        """The call that `tensor` comes from; None for an input of the model."""
        return self._makers.get(tensor)

    def operation(self, tensor: keras.KerasTensor) -> keras.Operation | None:
        """The operation that `tensor` comes from; None for an input of the model."""
        call = self.maker(tensor)
        return None if call is None else call.operation

    def consumers(self, tensor: keras.KerasTensor) -> list[Call]:
        """The calls that read `tensor`."""
        return self._consumers.get(tensor, [])

    def is_output(self, tensor: keras.KerasTensor) -> bool:
        """Whether the model returns `tensor`."""
        return any(tensor is output for output in self.outputs)

    def is_read_once(self, tensor: keras.KerasTensor) -> bool:
        """Whether one call reads `tensor`, and the model does not return it."""
        return len(self.consumers(tensor)) == 1 and not self.is_output(tensor)


def is_sequential(operation: Any) -> bool:
    """Whether it is a sequential model."""
    return isinstance(operation, keras.Sequential)


def is_functional(operation: Any) -> bool:
    """Whether it is a functional model, of whatever class."""
    return isinstance(operation, functional_class())


def overrides_call(model: keras.Model) -> bool:
    """Whether a functional or sequential model computes something else than its graph says."""
    return type(model).call not in (keras.Sequential.call, functional_class().call)


def nested_model(operation: Any) -> keras.Model | None:
    """The model whose graph an operation runs: itself, or that inside a `TimeDistributed`; None if there is none."""
    # The class itself: a subclass may do more, and so may a model that overrides `call`.
    if type(operation) is keras.layers.TimeDistributed:
        operation = operation.layer
    has_graph = is_functional(operation) or is_sequential(operation)
    return operation if has_graph and not overrides_call(operation) else None


def check_readable(model: Any) -> None:
    """Raises a ValueError unless `model` has a graph to read: it is functional or sequential, and built."""
    if not isinstance(model, keras.Model):
        raise ValueError(f"Argument `model` must be a keras.Model. Received: model={model!r}")
    if is_sequential(model):
        try:
            built = model.inputs
        except AttributeError:
            built = False
        if not built:
            raise ValueError(
                "Argument `model` must be built, so that its layers have shapes: call `model.build(input_shape)` "
                f"first. Received: the Sequential model '{model.name}', which is not built"
            )
    elif not is_functional(model):
        raise ValueError(
            "Argument `model` must be a functional or sequential model: what a subclassed model does with its layers "
            "is only in its code. Convert the functional models inside it one by one, or use the layers in the code. "
            f"Received: the model '{model.name}' of the class {type(model).__name__}"
        )
    if overrides_call(model):
        raise ValueError(
            "Argument `model` must be a model that computes what its graph says, and not override `call`. Convert the "
            f"model that it calls. Received: the model '{model.name}' of the class {type(model).__name__}, which does"
        )


def read_graphs(model: keras.Model) -> list[Graph]:
    """The graphs of `model` and of all models nested in it, each once, outermost first."""
    graphs: dict[int, Graph] = {}

    def read(model, path):
        if id(model) not in graphs:
            graphs[id(model)] = graph = _read_graph(model, path)
            for call in graph.calls:
                nested = nested_model(call.operation)
                if nested is not None:
                    read(nested, as_path(graph, call.operation) + "/")

    read(model, "")
    return list(graphs.values())


def _read_graph(model, path):
    # Custom classes of models may override what is read here, so it is read from a plain model of the same tensors.
    # `input` of a sequential model that was called is that of the call.
    inputs, outputs = (model.inputs, model.outputs) if is_sequential(model) else (model.input, model.output)
    functional = keras.Model(inputs, outputs, name=model.name)
    calls = [Call(*node[:4]) for node in nodes_of(functional) if not node.is_input]
    return Graph(model, path, functional, tuple(calls))


def as_path(graph: Graph, operation: keras.Operation) -> str:
    """The name of an operation, preceded by the names of the models that it is nested in."""
    return graph.path + operation.name


def count_calls(graphs: Iterable[Graph]) -> dict[keras.Operation, int]:
    """How often each operation is called in all graphs."""
    counts: dict[keras.Operation, int] = {}
    for graph in graphs:
        for call in graph.calls:
            counts[call.operation] = counts.get(call.operation, 0) + 1
    return counts
