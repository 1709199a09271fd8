"""Decides what becomes of each normalization of a model, and makes the layers that replace it."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras

from keras_proxynorm.compat import own_mask
from keras_proxynorm.graph.activation_nodes import (
    activation_of,
    describe_activation,
    looks_like_activation,
    same_activation,
)
from keras_proxynorm.graph.layer_kinds import (
    LINEAR_WITH_KERNEL,
    NORMALIZATIONS,
    absorbs_offset,
    data_axis,
    has_activation,
    normalization_axis,
    overridden_methods,
    passes_offset,
)
from keras_proxynorm.graph.linear_weights import fixed_weights_reason
from keras_proxynorm.graph.reading import Call, Graph, as_path, count_calls, nested_model, tensors_in
from keras_proxynorm.graph.report import LEFT_ALONE
from keras_proxynorm.layers.base import NormalizationLayer
from keras_proxynorm.surgery.targets import Target

__all__ = ["Decision", "hidden_normalizations", "plan"]

FUSED, PLAIN, SPLIT = "fused", "plain", "split"


@dataclasses.dataclass(frozen=True, eq=False)
class Decision:
    """What becomes of one normalization layer.

    Attributes:
        layer: The layer.
        path: Its name, preceded by the names of the models that it is nested in.
        action: "fused": it becomes one layer together with its activation. "plain": it becomes a layer without
            activation. "split": its output is read with and without activation, and it becomes one layer of each kind.
            "left alone".
        channels: The number of its channels, 0 if it is left alone.
        activation: The activation that is fused with the new layer, or None.
        absorbed: The calls that apply this activation now, and vanish.
        renamed: The operations among them whose names are names of outputs, and not that of the new layer.
        name: The name of the layer with the activation.
        activation_follows: Whether an activation, or something unknown, comes later; for a layer without activation.
        reason: Why it is left alone, or why no activation is fused with it.
        linear: The preceding linear layer that the new layer absorbs, too; or None.
        activated: The new layer with the activation, or None.
        plain: The new layer without activation, or None.
        is_selected: Whether it was to be replaced.
        follows_activation: Whether there is no activation to fuse with, because it comes before the normalization.
    """

    layer: Any
    path: str
    action: str
    channels: int = 0
    activation: Any = None
    absorbed: tuple[Call, ...] = ()
    renamed: tuple[keras.Operation, ...] = ()
    name: str | None = None
    activation_follows: bool = True
    reason: str | None = None
    linear: Any = None
    activated: Any = None
    plain: Any = None
    is_selected: bool = True
    follows_activation: bool = False

    @property
    def is_replaced(self) -> bool:
        return self.action != LEFT_ALONE

    @property
    def new_layers(self) -> tuple[Any, ...]:
        """The layers that it becomes, the one with the activation first."""
        return tuple(layer for layer in (self.activated, self.plain) if layer is not None)

    @property
    def outermost(self) -> Any:
        """The layer whose output that of the layer with the activation is, if no function is: it has its dtype."""
        return next((x for x in self.absorbed_operations if isinstance(x, keras.layers.Layer)), self.layer)

    @property
    def absorbed_operations(self) -> tuple[keras.Operation, ...]:
        """The operations of the absorbed calls, each once."""
        return tuple(dict.fromkeys(call.operation for call in self.absorbed))


class _Use(NamedTuple):
    """One call of a normalization."""

    graph: Graph
    call: Call

    @property
    def tensor(self) -> keras.KerasTensor:
        """The normalized tensor."""
        return self.call.inputs[0]


class _Consumer(NamedTuple):
    """A call that reads the output of a normalization, and the activation that it applies if that can be absorbed."""

    graph: Graph
    call: Call
    activation: Any

    @property
    def operation(self):
        return self.call.operation

    @property
    def is_output(self):
        return self.graph.is_output(self.call.output)


def plan(
    graphs: Sequence[Graph],
    selects: Callable[[str, keras.layers.Layer], bool],
    target: Target,
    make: Callable[[Decision, bool], Any],
) -> list[Decision]:
    """Decides about every normalization layer in `graphs`.

    Args:
        graphs: From `read_graphs`.
        selects: Whether a normalization layer, given its path and itself, is to be replaced.
        target: What the new layers are made by, and what they can absorb.
        make: Makes the new layer of a decision, with the activation or without.

    Returns:
        The decisions, in the order of the model.
    """
    counts = count_calls(graphs)
    uses: dict[keras.Operation, list[_Use]] = {}
    for graph in graphs:
        order = {operation: index for index, operation in enumerate(graph.operations)}
        for call in sorted(graph.calls, key=lambda call: order[call.operation]):
            if isinstance(call.operation, NORMALIZATIONS):
                uses.setdefault(call.operation, []).append(_Use(graph, call))
    return [_made(_decide(used, counts, selects, target), used, make) for used in uses.values()]


def hidden_normalizations(graphs: Sequence[Graph]) -> dict[str, int]:
    """How many batch normalizations are inside of layers, where no graph leads, by the paths of these layers."""
    hidden = {}
    for graph in graphs:
        for operation in graph.operations:
            # Normalizations of the package have moving statistics of their own.
            is_known = isinstance(operation, (*NORMALIZATIONS, NormalizationLayer))
            if isinstance(operation, keras.layers.Layer) and nested_model(operation) is None and not is_known:
                count = [variable.name for variable in operation.variables].count("moving_variance")
                if count:
                    hidden[as_path(graph, operation)] = count
    return hidden


def _decide(used: list[_Use], counts, selects, target: Target) -> Decision:
    graph, call = used[0]
    layer, path = call.operation, as_path(graph, call.operation)
    if not selects(path, layer):
        is_batch_norm = isinstance(layer, keras.layers.BatchNormalization)
        reason = "not selected" if is_batch_norm else f"{type(layer).__name__}, which was not asked for"
        return Decision(layer, path, LEFT_ALONE, reason=reason, is_selected=False)
    linear = graph.operation(used[0].tensor) if target.contains_linear else None
    left_because = _reason_to_leave(used)
    if left_because is None and target.contains_linear:
        left_because = _reason_against_linear(used, linear, counts, target)
    if left_because is not None:
        return Decision(layer, path, LEFT_ALONE, reason=left_because)
    channels = used[0].tensor.shape[normalization_axis(layer)]
    return _with_activation(Decision(layer, path, PLAIN, channels, linear=linear), used, counts, target)


def _with_activation(decision: Decision, used: list[_Use], counts, target: Target) -> Decision:
    """The decision to replace a normalization, with the activation that its new layer has."""
    layer = decision.layer
    consumers = [
        _Consumer(graph, consumer, _activation_to_absorb(graph, consumer, counts))
        for graph, call in used
        for consumer in graph.consumers(call.output)
    ]
    activated = [consumer for consumer in consumers if consumer.activation is not None]
    mixed = len(activated) < len(consumers) or any(graph.is_output(call.output) for graph, call in used)
    reason = _reason_not_to_fuse(layer, consumers, activated, target.fuses)
    if activated and mixed and decision.linear is not None:
        reason = reason or "its output is read without activation, too"
    is_batch_norm = isinstance(layer, keras.layers.BatchNormalization)
    if activated and reason is None and (is_batch_norm or not mixed):
        name = _name(layer, activated, counts, [graph for graph, _ in used], mixed)
        return dataclasses.replace(
            decision,
            action=SPLIT if mixed else FUSED,
            activation=activated[0].activation,
            absorbed=tuple(consumer.call for consumer in activated),
            renamed=tuple(x.operation for x in activated if x.is_output and x.operation.name != name),
            name=name,
        )
    if target.fuses and not is_batch_norm:
        reason = reason or f"{type(layer).__name__} that does not feed one activation alone"
        return Decision(layer, decision.path, LEFT_ALONE, reason=reason)
    if reason is not None and not target.normalizes_alone:
        return Decision(layer, decision.path, LEFT_ALONE, reason=reason)
    comes_before = _activation_before(used[0]) if target.fuses and not activated and reason is None else None
    return dataclasses.replace(
        decision,
        activation_follows=any(_activation_follows(graph, call.output) for graph, call in used),
        reason=reason or comes_before,
        follows_activation=comes_before is not None,
    )


def _made(decision, used, make):
    """The decision with its new layers, or the one to leave the normalization alone, because they would not do."""
    if not decision.is_replaced:
        return decision
    activated = make(decision, True) if decision.action in (FUSED, SPLIT) else None
    plain = make(decision, False) if decision.action in (PLAIN, SPLIT) else None
    decision = dataclasses.replace(decision, activated=activated, plain=plain)
    for use in used:
        for layer in decision.new_layers:
            reason = _reason_against_new_layer(use, layer, decision)
            if reason is not None:
                return Decision(decision.layer, decision.path, LEFT_ALONE, reason=reason)
    return decision


def _reason_to_leave(used):
    """Why a normalization is left alone, whatever would replace it; None if it is not."""
    layer = used[0].call.operation
    methods = overridden_methods(layer, NORMALIZATIONS)
    if methods:
        return f"a subclass that overrides {', '.join(methods)}, so that it may compute something else"
    if normalization_axis(layer) is None:
        return f"its gamma and beta differ between positions: axis={layer.axis}"
    if getattr(layer, "rms_scaling", False):
        return "it does not subtract the mean: rms_scaling=True"
    for use in used:
        if not keras.backend.is_float_dtype(use.tensor.dtype):
            return f"its input is {use.tensor.dtype}"
    return None


def _reason_against_linear(used, linear, counts, target):
    """Why the operation before a normalization cannot become one layer with it; None if it can."""
    reason = _reason_against_kernel(used, linear, counts) or target.unsupported_reason(linear)
    return reason and f"after {used[0].tensor.name if linear is None else linear.name}, {reason}"


def _reason_against_kernel(used, linear, counts):
    tensor = used[0].tensor
    if not isinstance(linear, LINEAR_WITH_KERNEL):
        return "which is not a linear layer with a kernel"
    methods = overridden_methods(linear, LINEAR_WITH_KERNEL)
    if methods:
        return f"which is a subclass that overrides {', '.join(methods)}"
    if len(used) > 1 or counts[linear] > 1:
        return "which is called several times"
    if not used[0].graph.is_read_once(tensor):
        return "which is read by others, too"
    if has_activation(linear):
        return f"which has the activation {describe_activation(linear.activation)}"
    rank = len(tensor.shape)
    if data_axis(linear, rank) != normalization_axis(used[0].call.operation) % rank:
        return "which has another channel axis"
    if linear.activity_regularizer is not None:
        return "which has an activity_regularizer"
    return fixed_weights_reason(linear)


def _reason_against_new_layer(use: _Use, layer, decision: Decision):
    """Why a new layer cannot take the place of a normalization in one of its calls; None if it can."""
    known = Target.call_arguments(layer)
    for name, value in list(use.call.arguments.items())[1:]:
        # A mask that follows the tensor by itself does so after the new layer, too.
        if name not in known and tensors_in(value) and value is not own_mask(use.tensor):
            return f"it reads the tensor `{name}`, which {type(layer).__name__} does not take"
    if decision.linear is not None:
        return None
    shape = use.tensor.shape
    values = _values_per_statistic(layer, shape)
    if values == 1:
        return f"each statistic would be one value, of inputs of the shape {tuple(shape)}"
    mixes = values is not None or getattr(layer, "groups", decision.channels) != decision.channels
    if mixes and len(shape) == 2 and _is_input(use.graph, use.tensor):
        return "it standardizes the features of the model's input, which would be mixed"
    return None


def _values_per_statistic(layer, shape):
    """How many values of a sample share their mean or variance; None if that is not known, or if samples share them."""
    if isinstance(layer, NormalizationLayer):
        return layer.values_per_statistic(shape)
    if not isinstance(layer, keras.layers.GroupNormalization) or None in shape[1:]:
        return None
    groups = shape[layer.axis] if layer.groups == -1 else layer.groups
    return math.prod(shape[1:]) // groups


def _is_input(graph, tensor):
    """Whether `tensor` is an input of the outermost model, or several side by side."""
    call = graph.maker(tensor)
    if call is None:
        return graph.path == ""
    passing = (keras.layers.Concatenate, keras.layers.Dropout, keras.layers.Flatten, keras.layers.Identity)
    return isinstance(call.operation, passing) and any(_is_input(graph, x) for x in call.inputs)


def _activation_to_absorb(graph, call, counts):
    # An output has the name of the operation that it comes from. One that is needed elsewhere keeps its name there.
    if graph.is_output(call.output) and counts[call.operation] > 1:
        return None
    return activation_of(call.operation) if len(call.inputs) == 1 else None


def _reason_not_to_fuse(layer, consumers, activated, fuses):
    """Why an activation that reads the output of `layer` is not fused with the new layer; None if there is none."""
    others = [consumer.operation for consumer in consumers if consumer.activation is None]
    if not activated:
        kept = [operation for operation in others if looks_like_activation(operation)]
        if kept and activation_of(kept[0]) is not None:
            return f"{kept[0].name} makes an output of the model, and is called elsewhere, too"
        return f"{kept[0].name} ({type(kept[0]).__name__}) cannot be fused with it" if kept else None
    if not fuses:
        return "the new layers have no activation"
    if any(not same_activation(consumer.activation, activated[0].activation) for consumer in activated):
        names = dict.fromkeys(str(describe_activation(consumer.activation)) for consumer in activated)
        return f"different activations read its output: {', '.join(names)}"
    layers = list(dict.fromkeys(x.operation for x in activated if isinstance(x.operation, keras.layers.Layer)))
    if layer.activity_regularizer is not None:
        return "its activity_regularizer reads the output before the activation"
    if len(layers) > 1 and any(activation.activity_regularizer is not None for activation in layers):
        return "of several activations, one has an activity_regularizer"
    policies = {activation.dtype_policy.name for activation in layers}
    if len(policies) > 1 or any(
        activation.dtype_policy.variable_dtype != layer.dtype_policy.variable_dtype for activation in layers
    ):
        return f"the dtype policies do not go together: {layer.dtype_policy.name}, and of activations {policies}"
    if any(_gates_its_input(activation) for activation in activated):
        return f"{describe_activation(activated[0].activation)} is the gate of its output"
    return None


def _gates_its_input(consumer):
    """Whether the output of an activation is multiplied with what it reads."""
    return any(
        type(reader.operation).__name__ == "Multiply" and set(reader.inputs) & set(consumer.call.inputs)
        for reader in consumer.graph.consumers(consumer.call.output)
    )


def _name(layer, activated, counts, graphs, mixed):
    """The name of an activation that vanishes, so that `get_layer` and the names of outputs stay the same."""
    own = {consumer.operation for consumer in activated} | (set() if mixed else {layer})
    taken = {operation.name for graph in graphs for operation in graph.operations if operation not in own}
    outputs = [consumer.operation.name for consumer in activated if consumer.is_output]
    names = [
        consumer.operation.name
        for consumer in activated
        if counts[consumer.operation] == 1
        # A function has no name that anybody gave it, but an output may be known by it.
        and (isinstance(consumer.operation, keras.layers.Layer) or consumer.operation.name in outputs)
    ]
    names.sort(key=lambda name: name not in outputs)
    names += [layer.name, f"{layer.name}_activation"]
    while names[-1] in taken:
        names.append(names[-1] + "_1")
    return next(name for name in names if name not in taken)


def _activation_before(use: _Use):
    """The reason that a normalization has no activation to fuse with: it follows one."""
    operation: Any = use.graph.operation(use.tensor)
    if operation is not None and (looks_like_activation(operation) or _is_activated_linear(operation)):
        return f"its activation comes before it, in {operation.name}"
    return None


def _is_activated_linear(operation):
    return isinstance(operation, LINEAR_WITH_KERNEL) and has_activation(operation)


def _activation_follows(graph, tensor):
    """Whether an activation reads `tensor`, also through sums and poolings; yes where that cannot be known."""
    seen, waiting = set(), [tensor]
    while waiting:
        tensor = waiting.pop()
        if graph.is_output(tensor):
            return True
        for consumer in graph.consumers(tensor):
            if passes_offset(consumer.operation):
                if consumer.output not in seen:
                    seen.add(consumer.output)
                    waiting.append(consumer.output)
            elif not absorbs_offset(consumer.operation):
                return True
    return False
