"""Decides what becomes of each normalization of a model, before anything is built."""

import collections
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from typing import NamedTuple

import keras

from keras_proxynorm.graph.activation_nodes import activation_of
from keras_proxynorm.graph.activation_nodes import describe_activation
from keras_proxynorm.graph.activation_nodes import looks_like_activation
from keras_proxynorm.graph.activation_nodes import same_activation
from keras_proxynorm.graph.layer_kinds import LINEAR
from keras_proxynorm.graph.layer_kinds import NORMALIZATIONS
from keras_proxynorm.graph.layer_kinds import absorbs_offset
from keras_proxynorm.graph.layer_kinds import data_axis
from keras_proxynorm.graph.layer_kinds import passes_offset
from keras_proxynorm.graph.linear_weights import why_weights_are_fixed
from keras_proxynorm.graph.reading import Call
from keras_proxynorm.graph.reading import Graph
from keras_proxynorm.graph.reading import nested_model
from keras_proxynorm.layers.base import NormalizationLayer
from keras_proxynorm.surgery.targets import Target

__all__ = ["Decision", "Plan", "channel_axis", "make_plan"]

FUSED, PLAIN, SPLIT, LEFT = "fused", "plain", "split", "left alone"


@dataclass(frozen=True)
class Decision:
    """What becomes of one normalization layer.

    Attributes:
        layer: The layer.
        path: Its name, behind the names of the models that it is nested in.
        action: "fused": it becomes one layer together with its activation. "plain": it becomes a layer without
            activation. "split": its output is read with and without activation, and it becomes one layer of each kind.
            "left alone".
        channels: The number of its channels, 0 if it is left alone.
        activation: The activation that is contained in the new layer, or None.
        absorbed: The operations that apply this activation now, and vanish.
        name: The name of the layer with the activation.
        activation_follows: Whether an activation, or something unknown, comes later; for a layer without activation.
        reason: Why it is left alone, or why the activation behind it is not contained in it.
        linear: The linear layer in front of it that is contained in the new layer, too, and vanishes; or None.
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
    linear: keras.layers.Layer | None = None

    @property
    def is_replaced(self) -> bool:
        return self.action != LEFT

    @property
    def has_activated(self) -> bool:
        """Whether it becomes a layer with an activation, among others."""
        return self.action in (FUSED, SPLIT)

    @property
    def has_plain(self) -> bool:
        """Whether it becomes a layer without activation, among others."""
        return self.action in (PLAIN, SPLIT)

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
        vanishing: The decisions by the `id`s of the activations that they absorb, of those that are applied to nothing
            else.
        hidden: By the paths of layers with batch statistics inside, where no graph leads: of how many normalizations.
        contained: The linear layers that become part of the layer behind them, by their `id`.
    """

    graphs: tuple[Graph, ...]
    decisions: dict[int, Decision]
    calls: collections.Counter
    vanishing: dict[int, Decision]
    hidden: dict[str, int]

    @property
    def contained(self) -> dict[int, keras.layers.Layer]:
        return {id(d.linear): d.linear for d in self.decisions.values() if d.linear is not None}

    def absorbing(self, graph: Graph, call: Call) -> Decision | None:
        """The decision by which the activation that this call applies is contained in a normalization."""
        return _absorbing(self.decisions, graph, call)

    def is_renamed_output(self, operation: keras.Operation) -> bool:
        """Whether an output of a model has the name of this activation, which vanishes."""
        decision = self.vanishing.get(id(operation))
        return (
            decision is not None
            and decision.name != operation.name
            and any(graph.returns(operation) for graph in self.graphs if operation.name in graph.operations)
        )


class _Reader(NamedTuple):
    graph: Graph
    call: Call
    activation: Any

    @property
    def operation(self):
        return self.call.operation


def channel_axis(layer: keras.layers.Layer) -> int:
    """The axis of a normalization layer that has one."""
    return layer.axis[0] if isinstance(layer.axis, (list, tuple)) else layer.axis


def make_plan(graphs: list[Graph], selects: Callable[[str, keras.layers.Layer], bool], target: Target) -> Plan:
    """Decides about every normalization layer in `graphs`.

    Args:
        graphs: From `read_graphs`.
        selects: Whether a normalization layer, given its path and itself, is to be replaced.
        target: What the new layers are made by, and what they can contain.

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
            elif _may_hide(call.operation):
                names = [variable.name for variable in call.operation.variables]
                if "moving_variance" in names:
                    hidden[graph.path + call.operation.name] = names.count("moving_variance")
    decisions = {key: _decide(used, calls, selects, target) for key, used in uses.items()}
    absorbed = [
        (call.operation, _absorbing(decisions, graph, call))
        for graph in graphs
        for call in graph.calls
        if looks_like_activation(call.operation)
    ]
    needed = {id(operation) for operation, decision in absorbed if decision is None}
    vanishing = {
        id(operation): decision for operation, decision in absorbed if decision and id(operation) not in needed
    }
    return Plan(tuple(graphs), decisions, calls, vanishing, hidden)


def _may_hide(operation):
    is_layer = isinstance(operation, keras.layers.Layer) and nested_model(operation) is None
    # Ours have moving statistics of their own.
    return is_layer and not isinstance(operation, NormalizationLayer)


def _absorbing(decisions, graph, call) -> Decision | None:
    for tensor in call.inputs:
        decision = decisions.get(id(graph.operation(tensor)))
        if decision is not None and any(operation is call.operation for operation in decision.absorbed):
            return decision
    return None


def _decide(used: list[tuple[Graph, Call]], calls, selects, target: Target) -> Decision:
    graph, call = used[0]
    layer = call.operation
    path = graph.path + layer.name
    is_batch_norm = isinstance(layer, keras.layers.BatchNormalization)
    reason = _why_left_alone(path, used, selects)
    if reason is not None:
        return Decision(layer, path, LEFT, reason=reason)
    linear = None
    if target.contains_linear:
        linear = graph.operation(call.inputs[0])
        reason = _why_not_contained(used, linear, calls) or target.why_unfit(linear)
        if reason is not None:
            return Decision(layer, path, LEFT, reason=f"behind {linear.name}, {reason}")
    channels = graph.shapes[call.inputs[0]][channel_axis(layer)]

    readers = [
        _Reader(graph, reader, _activation_to_absorb(graph, reader, calls))
        for graph, call in used
        for reader in graph.consumers(call.output)
    ]
    activated = [reader for reader in readers if reader.activation is not None]
    mixed = len(activated) < len(readers) or any(call.output in graph.outputs for graph, call in used)
    reason = _why_not_fused(layer, readers, activated, target.fuses)
    if activated and mixed and linear is not None:
        reason = reason or "its output is read without activation, too"
    if activated and reason is None and (is_batch_norm or not mixed):
        return Decision(
            layer,
            path,
            SPLIT if mixed else FUSED,
            channels,
            activation=activated[0].activation,
            absorbed=tuple({id(reader.operation): reader.operation for reader in activated}.values()),
            name=_name(layer, activated, calls, [graph for graph, _ in used], mixed),
            linear=linear,
        )
    if target.fuses and not is_batch_norm:
        return Decision(
            layer, path, LEFT, reason=reason or f"{type(layer).__name__} that does not feed one activation alone"
        )
    if reason is not None and not target.normalizes_alone:
        return Decision(layer, path, LEFT, reason=reason)
    follows = any(_activation_follows(graph, call.output) for graph, call in used)
    return Decision(layer, path, PLAIN, channels, activation_follows=follows, reason=reason, linear=linear)


def _why_not_contained(used, linear, calls):
    """Why the operation in front of a normalization cannot become one layer with it; None if it can."""
    graph, call = used[0]
    (tensor, *_) = call.inputs
    if not isinstance(linear, LINEAR):
        return "which is not a linear layer with a kernel"
    if len(used) > 1 or calls[id(linear)] > 1:
        return "which is called several times"
    if len(graph.consumers(tensor)) > 1 or tensor in graph.outputs:
        return "which is read by others, too"
    if linear.activation is not keras.activations.linear:
        return f"which has the activation {describe_activation(linear.activation)}"
    rank = len(graph.shapes[tensor])
    if data_axis(linear, rank) != channel_axis(used[0][1].operation) % rank:
        return "which has another channel axis"
    if linear.activity_regularizer is not None:
        return "which has an activity_regularizer"
    return why_weights_are_fixed(linear)


def _why_left_alone(path, used, selects):
    layer = used[0][1].operation
    if not selects(path, layer):
        is_batch_norm = isinstance(layer, keras.layers.BatchNormalization)
        return "not selected" if is_batch_norm else f"{type(layer).__name__}, which was not asked for"
    if isinstance(layer.axis, (list, tuple)) and len(layer.axis) > 1:
        return f"its scale and offset differ between positions: axis={layer.axis}"
    if getattr(layer, "rms_scaling", False):
        return "it does not subtract the mean: rms_scaling=True"
    for graph, call in used:
        dtype = graph.dtypes[call.inputs[0]]
        if not keras.backend.is_float_dtype(dtype):
            return f"its input is {dtype}"
    return None


def _activation_to_absorb(graph, call, calls):
    # An output has the name of the operation that it comes from. One that is needed elsewhere keeps its name there.
    if call.output in graph.outputs and calls[id(call.operation)] > 1:
        return None
    return activation_of(call.operation)


def _why_not_fused(layer, readers, activated, fuses):
    """Why an activation that reads the output of `layer` is not contained in the new layer; None if there is none."""
    others = [reader.operation for reader in readers if reader.activation is None]
    if not activated:
        kept = [operation for operation in others if looks_like_activation(operation)]
        return f"{kept[0].name} ({type(kept[0]).__name__}) cannot be contained in it" if kept else None
    if not fuses:
        return "the new layers contain no activation"
    if any(not same_activation(reader.activation, activated[0].activation) for reader in activated):
        names = dict.fromkeys(describe_activation(reader.activation) for reader in activated)
        return f"different activations read its output: {', '.join(names)}"
    layers = {id(x.operation): x.operation for x in activated if isinstance(x.operation, keras.layers.Layer)}.values()
    if layer.activity_regularizer is not None:
        return "its activity_regularizer reads the output in front of the activation"
    if len(layers) > 1 and any(activation.activity_regularizer is not None for activation in layers):
        return "of several activations, one has an activity_regularizer"
    policies = {activation.dtype_policy.name for activation in layers}
    if len(policies) > 1 or any(
        activation.dtype_policy.variable_dtype != layer.dtype_policy.variable_dtype for activation in layers
    ):
        return f"the dtype policies do not go together: {layer.dtype_policy.name}, and of activations {policies}"
    if any(
        type(reader.operation).__name__ == "Multiply" and set(reader.inputs) & set(activation.call.inputs)
        for activation in activated
        for reader in activation.graph.consumers(activation.call.output)
    ):
        return f"{describe_activation(activated[0].activation)} is the gate of its output"
    return None


def _name(layer, activated, calls, graphs, mixed):
    """The name of an activation that vanishes, so that `get_layer` and the names of outputs stay the same."""
    own = {id(reader.operation) for reader in activated} | (set() if mixed else {id(layer)})
    taken = {operation.name for graph in graphs for operation in graph.operations.values() if id(operation) not in own}
    outputs = [reader.operation.name for reader in activated if reader.graph.returns(reader.operation)]
    names = [
        reader.operation.name
        for reader in activated
        if calls[id(reader.operation)] == 1
        # A function has no name that anybody gave it, but an output may be known by it.
        and (isinstance(reader.operation, keras.layers.Layer) or reader.operation.name in outputs)
    ]
    names.sort(key=lambda name: name not in outputs)
    names += [layer.name, f"{layer.name}_activation"]
    while names[-1] in taken:
        names.append(names[-1] + "_1")
    return next(name for name in names if name not in taken)


def _activation_follows(graph, tensor):
    """Whether an activation reads `tensor`, be it through sums and poolings; yes where that cannot be known."""
    seen, waiting = set(), [tensor]
    while waiting:
        tensor = waiting.pop()
        if tensor in graph.outputs:
            return True
        for reader in graph.consumers(tensor):
            if passes_offset(reader.operation):
                if reader.output not in seen:
                    seen.add(reader.output)
                    waiting.append(reader.output)
            elif not absorbs_offset(reader.operation):
                return True
    return False
