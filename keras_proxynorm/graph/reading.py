"""Reads a functional or sequential model as a graph: which operation reads which tensor."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import keras

__all__ = [
    "Call",
    "Graph",
    "Tensor",
    "cannot_clone",
    "check_readable",
    "is_functional",
    "is_sequential",
    "nested_model",
    "read_graphs",
]


class Tensor(NamedTuple):
    """The place of a tensor in a graph: an output of call `node` of the operation of this name."""

    operation: str
    node: int
    output_index: int


class Call(NamedTuple):
    """One call of an operation (a layer, a nested model or a function of keras.ops)."""

    operation: keras.Operation
    node: int
    inputs: tuple[Tensor, ...]

    @property
    def output(self) -> Tensor:
        return Tensor(self.operation.name, self.node, 0)


@dataclass(frozen=True)
class Graph:
    """The calls of one model.

    Attributes:
        model: The functional or sequential model.
        path: Its path in the outermost model, such as `"classifier/backbone/"`; empty for the outermost.
        functional: A plain functional model of the same tensors: not compiled, and of no class of its own.
        operations: Its operations by name.
        calls: All calls but those of the input layers.
        inputs: The names of the input layers.
        outputs: The tensors that the model returns.
        shapes: The shapes of the tensors that are read by a call.
        dtypes: Their dtypes.
    """

    model: keras.Model
    path: str
    functional: keras.Model
    operations: dict[str, keras.Operation]
    calls: tuple[Call, ...]
    inputs: tuple[str, ...]
    outputs: tuple[Tensor, ...]
    shapes: dict[Tensor, tuple]
    dtypes: dict[Tensor, str]

    def operation(self, tensor: Tensor) -> keras.Operation:
        """The operation that `tensor` comes from."""
        return self.operations[tensor.operation]

    def consumers(self, tensor: Tensor) -> list[Call]:
        return [call for call in self.calls if tensor in call.inputs]

    def returns(self, operation: keras.Operation) -> bool:
        """Whether an output of the model is one of `operation`."""
        return any(self.operation(tensor) is operation for tensor in self.outputs)

    def calls_of(self, operation: keras.Operation) -> list[Call]:
        return [call for call in self.calls if call.operation is operation]


def is_sequential(operation) -> bool:
    """Whether it is a sequential model."""
    return isinstance(operation, keras.Sequential)


def is_functional(operation) -> bool:
    """Whether it is a functional model, of whatever class."""
    # Keras does not export the class; of all models only functional ones know their operations.
    return isinstance(operation, keras.Model) and hasattr(operation, "operations")


def nested_model(operation) -> keras.Model | None:
    """The model that an operation runs: itself, or the model inside a `TimeDistributed`; None if there is none."""
    if isinstance(operation, keras.layers.TimeDistributed):
        operation = operation.layer
    return operation if is_functional(operation) or is_sequential(operation) else None


def check_readable(model):
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


def read_graphs(model: keras.Model) -> list[Graph]:
    """The graphs of `model` and of all models nested in it, each once, outermost first."""
    graphs = {}

    def read(model, path):
        if id(model) not in graphs:
            graphs[id(model)] = graph = _read_graph(model, path)
            for call in graph.calls:
                nested = nested_model(call.operation)
                if nested is not None:
                    read(nested, f"{path}{call.operation.name}/")

    read(model, "")
    return list(graphs.values())


def _read_graph(model, path):
    # Custom classes of models have a config of their own, so the graph is read from a plain model of the same tensors.
    # `input` of a sequential model that was called is that of the call.
    inputs, outputs = (model.inputs, model.outputs) if is_sequential(model) else (model.input, model.output)
    functional = keras.Model(inputs, outputs, name=model.name)
    try:
        config = functional.get_config()
    except Exception:
        # Which layer it was, Keras does not say.
        for operation in functional.operations:
            try:
                keras.saving.serialize_keras_object(operation)
            except Exception as error:
                raise cannot_clone(operation, error) from error
        raise
    operations = {operation.name: operation for operation in functional.operations}
    calls, shapes, dtypes = [], {}, {}
    for operation_config in config["layers"]:
        operation = operations[operation_config["name"]]
        for node, node_config in enumerate(operation_config["inbound_nodes"]):
            read = list(_tensors(node_config))
            calls.append(Call(operation, node, tuple(tensor for tensor, _ in read)))
            shapes.update((tensor, tuple(config["shape"])) for tensor, config in read)
            dtypes.update((tensor, config["dtype"]) for tensor, config in read)
    return Graph(
        model=model,
        path=path,
        functional=functional,
        operations=operations,
        calls=tuple(calls),
        inputs=tuple(keras.tree.flatten(config["input_layers"])[::3]),
        outputs=tuple(_output(operations, *place) for place in _in_threes(keras.tree.flatten(config["output_layers"]))),
        shapes=shapes,
        dtypes=dtypes,
    )


def _output(operations, name, node, output_index):
    # Functional models are born with a node, which is counted here and only here.
    return Tensor(name, node - is_functional(operations[name]), output_index)


def _tensors(config) -> Iterator[tuple[Tensor, dict]]:
    if isinstance(config, dict) and config.get("class_name") == "__keras_tensor__":
        yield Tensor(*config["config"]["keras_history"]), config["config"]
    elif isinstance(config, dict):
        for value in config.values():
            yield from _tensors(value)
    elif isinstance(config, (list, tuple)):
        for value in config:
            yield from _tensors(value)


def _in_threes(flat):
    return [flat[i : i + 3] for i in range(0, len(flat), 3)]


def cannot_clone(operation: keras.Operation, error: Exception) -> ValueError:
    """The error for a layer whose config does not make it again."""
    return ValueError(
        f"Layer '{operation.name}' ({type(operation).__name__}) cannot be cloned, because it cannot be made from its "
        "config. Its class needs a `get_config()` with all arguments of its constructor, and custom functions in it "
        "need `keras.saving.register_keras_serializable()`. "
        f"Received: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    )
