"""Decides what becomes of each normalization of a model, before anything is built."""

import collections
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras

from keras_proxynorm.surgery.activation_nodes import activation_of
from keras_proxynorm.surgery.activation_nodes import describe_activation
from keras_proxynorm.surgery.activation_nodes import same_activation
from keras_proxynorm.surgery.graph import Call
from keras_proxynorm.surgery.graph import Graph
from keras_proxynorm.surgery.graph import nested_model

__all__ = ["FUSED", "LEFT", "PLAIN", "SPLIT", "Decision", "Plan", "make_plan"]

FUSED, PLAIN, SPLIT, LEFT = "fused", "plain", "split", "left alone"

NORMALIZATIONS = (
    keras.layers.BatchNormalization,
    keras.layers.GroupNormalization,
    keras.layers.LayerNormalization,
)

# Layers and operations that an offset for each channel passes through, on its way to an activation or a linear layer.
_PASSED_LAYERS = (
    *(keras.layers.Add, keras.layers.Average, keras.layers.Concatenate, keras.layers.Multiply, keras.layers.Subtract),
    *(
        keras.layers.Dropout,
        keras.layers.SpatialDropout1D,
        keras.layers.SpatialDropout2D,
        keras.layers.SpatialDropout3D,
    ),
    *(keras.layers.Flatten, keras.layers.Identity, keras.layers.Permute, keras.layers.Reshape),
    *(
        getattr(keras.layers, f"{kind}{rank}D")
        for kind in (
            "AveragePooling",
            "MaxPooling",
            "GlobalAveragePooling",
            "GlobalMaxPooling",
            "ZeroPadding",
            "Cropping",
        )
        for rank in (1, 2, 3)
    ),
    *(keras.layers.UpSampling1D, keras.layers.UpSampling2D, keras.layers.UpSampling3D),
)
_PASSED_OPERATIONS = ("Add", "Concatenate", "GetItem", "Mean", "Multiply", "Reshape", "Subtract", "Transpose")
# Layers that have an offset of their own, or do without, so that none is needed in front of them.
_LINEAR_LAYERS = (
    *NORMALIZATIONS,
    keras.layers.Dense,
    keras.layers.EinsumDense,
    *(getattr(keras.layers, f"{kind}{rank}D") for kind in ("Conv",) for rank in (1, 2, 3)),
    *(keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D),
    *(keras.layers.SeparableConv1D, keras.layers.SeparableConv2D),
    *(keras.layers.Conv1DTranspose, keras.layers.Conv2DTranspose, keras.layers.Conv3DTranspose),
)


@dataclass(frozen=True)
class Decision:
    """What becomes of one normalization layer.

    Attributes:
        layer: The layer.
        path: Its name, behind the names of the models that it is nested in.
        action: `FUSED`: it becomes one layer together with its activation. `PLAIN`: it becomes a layer without
            activation. `SPLIT`: its output is read with and without activation, and it becomes one layer of each kind.
            `LEFT`: it stays.
        channels: The number of its channels, 0 if it is left alone.
        activation: The activation that is contained in the new layer, or None.
        absorbed: The operations that apply this activation now, and vanish.
        name: The name of the layer with the activation.
        activation_follows: Whether an activation, or something unknown, comes later; only for `PLAIN`.
        reason: Why it is left alone, or why the activation behind it is not contained in it.
    """

    layer: keras.layers.Layer
    path: str
    action: str
    channels: int = 0
    activation: Any = None
    absorbed: tuple[keras.Operation, ...] = ()
    name: str | None = None
    activation_follows: bool = True
    reason: str | None = None

    @property
    def outermost(self) -> keras.layers.Layer:
        """The layer whose output that of the layer with the activation is, if no function is: it has its dtype."""
        return next((layer for layer in self.absorbed if isinstance(layer, keras.layers.Layer)), self.layer)


@dataclass(frozen=True)
class Plan:
    """The decisions about a model.

    Attributes:
        graphs: The graphs of the model and of the models nested in it.
        decisions: By the `id` of the normalization layer.
        calls: How often an operation is called in all graphs, by its `id`.
        renamed_outputs: The `id`s of activations that vanish although an output of the model has their name.
        hidden: Layers with batch statistics inside, where no graph leads, by their paths.
    """

    graphs: tuple[Graph, ...]
    decisions: dict[int, Decision]
    calls: collections.Counter
    renamed_outputs: set[int]
    hidden: dict[str, keras.layers.Layer]

    def absorbed_by(self, graph: Graph, call: Call) -> keras.layers.Layer | None:
        """The normalization whose replacement contains the activation that this call applies."""
        return _absorbed_by(self.decisions, graph, call)


def make_plan(graphs: list[Graph], selects: Callable[[str, keras.layers.Layer], bool], fuses: bool) -> Plan:
    """Decides about every normalization layer in `graphs`.

    Args:
        graphs: From `read_graphs`.
        selects: Whether a normalization layer, given its path and itself, is to be replaced.
        fuses: Whether the new layers can contain an activation.

    Returns:
        A `Plan`.
    """
    calls = collections.Counter(id(call.operation) for graph in graphs for call in graph.calls)
    uses = collections.defaultdict(list)
    hidden = {}
    for graph in graphs:
        for call in graph.calls:
            if isinstance(call.operation, NORMALIZATIONS):
                uses[id(call.operation)].append((graph, call))
            elif _hides_batch_statistics(call.operation):
                hidden[graph.path + call.operation.name] = call.operation
    decisions = {key: _decide(used, calls, selects, fuses) for key, used in uses.items()}
    # Where such an activation is also applied to something else, it stays, with its name.
    kept = {id(call.operation) for graph in graphs for call in graph.calls if not _absorbed_by(decisions, graph, call)}
    renamed_outputs = {
        id(operation)
        for decision in decisions.values()
        for operation in decision.absorbed
        if operation.name != decision.name and id(operation) not in kept
        if any(_is_output(graph, operation) and graph.calls_of(operation) for graph in graphs)
    }
    return Plan(tuple(graphs), decisions, calls, renamed_outputs, hidden)


def _absorbed_by(decisions, graph, call):
    producers = [decisions.get(id(graph.operation(tensor))) for tensor in call.inputs]
    for decision in producers:
        if decision is not None and any(operation is call.operation for operation in decision.absorbed):
            return decision.layer
    return None


def _decide(used: list[tuple[Graph, Call]], calls, selects, fuses) -> Decision:
    graph, call = used[0]
    layer = call.operation
    path = graph.path + layer.name

    def left(reason):
        return Decision(layer, path, LEFT, reason=reason)

    is_batch_norm = isinstance(layer, keras.layers.BatchNormalization)
    if not selects(path, layer):
        return left("not selected" if is_batch_norm else f"a {type(layer).__name__}, which was not asked for")
    axes = layer.axis if isinstance(layer.axis, (list, tuple)) else [layer.axis]
    if len(axes) > 1:
        return left(f"its scale and offset differ between positions: axis={layer.axis}")
    channels = graph.shapes[call.inputs[0]][axes[0]]

    readers = [
        (reading, reader.operation, activation_of(reader.operation))
        for reading, call in used
        for reader in reading.consumers(call.output)
    ]
    readers_activations = [reader for reader in readers if reader[2] is not None]
    mixed = len(readers_activations) < len(readers) or any(call.output in graph.outputs for graph, call in used)
    reason = _why_not_fused(layer, readers_activations) if fuses else "the new layers contain no activation"
    if readers_activations and reason is None and (is_batch_norm or not mixed):
        absorbed = tuple({id(operation): operation for _, operation, _ in readers_activations}.values())
        return Decision(
            layer,
            path,
            SPLIT if mixed else FUSED,
            channels,
            activation=readers_activations[0][2],
            absorbed=absorbed,
            name=_name(layer, readers_activations, calls, mixed),
        )
    if fuses and not is_batch_norm:
        return left(reason or f"a {type(layer).__name__} that does not feed one activation alone")
    return Decision(
        layer,
        path,
        PLAIN,
        channels,
        activation_follows=any(_activation_follows(graph, call.output) for graph, call in used),
        reason=reason if readers_activations else None,
    )


def _why_not_fused(layer, readers):
    if any(not same_activation(activation, readers[0][2]) for *_, activation in readers):
        names = {describe_activation(activation): None for *_, activation in readers}
        return f"different activations read its output: {', '.join(names)}"
    if layer.activity_regularizer is not None:
        return "its activity_regularizer reads the output in front of the activation"
    policies = {operation.dtype_policy.name for _, operation, _ in readers if isinstance(operation, keras.layers.Layer)}
    if len(policies) > 1 or any(
        operation.dtype_policy.variable_dtype != layer.dtype_policy.variable_dtype
        for _, operation, _ in readers
        if isinstance(operation, keras.layers.Layer)
    ):
        return (
            f"its dtype policy, {layer.dtype_policy.name}, and those of its activations, {policies}, do not go together"
        )
    return None


def _name(layer, readers, calls, mixed):
    """The name of an activation that vanishes, so that `get_layer` and the names of outputs stay the same."""
    names = [
        operation.name
        for graph, operation, _ in readers
        if calls[id(operation)] == 1
        # A function has no name that anybody gave it, but an output may be known by it.
        and (isinstance(operation, keras.layers.Layer) or _is_output(graph, operation))
    ]
    outputs = [operation.name for graph, operation, _ in readers if _is_output(graph, operation)]
    names.sort(key=lambda name: name not in outputs)
    if names:
        return names[0]
    if not mixed:
        return layer.name
    taken = {operation.name for graph, *_ in readers for operation in graph.functional.operations}
    name = f"{layer.name}_activation"
    while name in taken:
        name += "_1"
    return name


def _is_output(graph, operation):
    return any(tensor.operation == operation.name for tensor in graph.outputs)


def _activation_follows(graph, tensor):
    """Whether an activation reads `tensor`, be it through sums and poolings; yes where that cannot be known."""
    seen, waiting = set(), [tensor]
    while waiting:
        tensor = waiting.pop()
        if tensor in graph.outputs:
            return True
        for reader in graph.consumers(tensor):
            operation = reader.operation
            if isinstance(operation, _PASSED_LAYERS) or type(operation).__name__ in _PASSED_OPERATIONS:
                if reader.output not in seen:
                    seen.add(reader.output)
                    waiting.append(reader.output)
            elif not isinstance(operation, _LINEAR_LAYERS):
                return True
    return False


def _hides_batch_statistics(operation):
    return (
        isinstance(operation, keras.layers.Layer)
        and nested_model(operation) is None
        and any(variable.name == "moving_variance" for variable in operation.variables)
    )
